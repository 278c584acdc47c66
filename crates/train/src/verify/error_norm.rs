//! How far a result is from its reference.

/// `|x - reference| / |reference|` in the Frobenius norm; absolute if the reference is all zero.
pub(super) fn tensor_error(x: &[f64], reference: &[f64]) -> f64 {
    if x.len() != reference.len() {
        return f64::NAN;
    }
    let (difference, norm) = (distance(x, reference), norm(reference));
    if norm == 0.0 { difference } else { difference / norm }
}

/// The largest error norm of one row of `width` entries over the larger of that row's reference norm and the root mean
/// square of all rows' norms. It shows a single wrong row that the norm of the tensor hides.
pub(super) fn row_error(x: &[f64], reference: &[f64], width: usize) -> f64 {
    if x.len() != reference.len() || reference.is_empty() {
        return if x.len() == reference.len() { 0.0 } else { f64::NAN };
    }
    let rows = reference.len() / width;
    let typical = norm(reference) / (rows as f64).sqrt();
    let errors = std::iter::zip(x.chunks(width), reference.chunks(width)).map(|(x, reference)| {
        let scale = norm(reference).max(typical);
        let difference = distance(x, reference);
        if scale == 0.0 { difference } else { difference / scale }
    });
    // f64::max would drop a NaN.
    errors.fold(0.0, |worst, error| if worst.is_nan() || error.is_nan() { f64::NAN } else { worst.max(error) })
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|v| v * v).sum::<f64>().sqrt()
}

fn distance(x: &[f64], y: &[f64]) -> f64 {
    std::iter::zip(x, y).map(|(x, y)| (x - y).powi(2)).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_wrong_row_shows_and_nan_never_passes() {
        let reference = vec![1.0; 1000];
        let mut x = reference.clone();
        x[500] = 2.0;
        assert!(tensor_error(&x, &reference) < 0.04);
        assert_eq!(row_error(&x, &reference, 1), 1.0);
        x[3] = f64::NAN;
        assert!(tensor_error(&x, &reference).is_nan() && row_error(&x, &reference, 10).is_nan());
        assert_eq!(tensor_error(&[0.5], &[0.0]), 0.5);
    }
}
