//! RMSNorm on the CPU: rows in parallel; the weight's gradient from partial sums over fixed blocks of rows.

use rayon::prelude::*;

use super::RmsNormSpec;
use crate::error::{Result, check_len};
use crate::float::Float;
use crate::parallel::{TASK, chunks_or_none, rows_per_task, sum_by, sum_by_3, sum_partials};
use crate::simd::vectorize;

const OP: &str = "rms_norm";

/// Writes the normalised rows and the inverse root mean square of each.
///
/// # Errors
/// A slice whose length is not that of the spec.
pub fn forward<T: Float>(
    spec: &RmsNormSpec,
    x: &[T],
    weight: &[T],
    out: &mut [T],
    inverse_rms: &mut [T],
) -> Result<()> {
    let RmsNormSpec { rows, width, epsilon } = *spec;
    check_len(OP, "x", x, rows.saturating_mul(width))?;
    check_len(OP, "weight", weight, width)?;
    check_len(OP, "out", out, rows.saturating_mul(width))?;
    check_len(OP, "inverse_rms", inverse_rms, rows)?;
    if width == 0 {
        inverse_rms.fill(T::from_f64(1.0 / epsilon.sqrt()));
        return Ok(());
    }
    let block = rows_per_task(width);
    x.par_chunks(block * width).zip(out.par_chunks_mut(block * width)).zip(inverse_rms.par_chunks_mut(block)).for_each(
        |((x, out), inverse_rms)| {
            vectorize(
                #[inline(always)]
                || {
                    let rows = x.chunks_exact(width).zip(out.chunks_exact_mut(width)).zip(inverse_rms);
                    for ((x, out), inverse_rms) in rows {
                        let squares = sum_by(x, |x| x * x).to_f64();
                        let r = T::from_f64(1.0 / (squares / width as f64 + epsilon).sqrt());
                        *inverse_rms = r;
                        for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
                            *out = x * r * weight;
                        }
                    }
                },
            );
        },
    );
    Ok(())
}

/// Overwrites the gradients that are asked for.
///
/// # Errors
/// A slice whose length is not that of the spec.
pub fn backward<T: Float>(
    spec: &RmsNormSpec,
    x: &[T],
    weight: &[T],
    inverse_rms: &[T],
    dout: &[T],
    dx: Option<&mut [T]>,
    dweight: Option<&mut [T]>,
) -> Result<()> {
    let RmsNormSpec { rows, width, .. } = *spec;
    check_len(OP, "x", x, rows.saturating_mul(width))?;
    check_len(OP, "weight", weight, width)?;
    check_len(OP, "inverse_rms", inverse_rms, rows)?;
    check_len(OP, "dout", dout, rows.saturating_mul(width))?;
    if let Some(dx) = &dx {
        check_len(OP, "dx", dx, rows.saturating_mul(width))?;
    }
    if let Some(dweight) = &dweight {
        check_len(OP, "dweight", dweight, width)?;
    }
    if width == 0 {
        return Ok(());
    }
    // At least 32 rows share one partial sum, so that the partial sums are small beside x.
    let block = (2 * TASK / width).max(32);
    let blocks = rows.div_ceil(block);
    let mut partials = vec![T::ZERO; if dweight.is_some() { blocks * width } else { 0 }];
    let partial_chunks = chunks_or_none(dweight.is_some().then_some(&mut partials[..]), width, blocks);
    let dx_chunks = chunks_or_none(dx, block * width, blocks);
    (
        x.par_chunks(block * width),
        dout.par_chunks(block * width),
        inverse_rms.par_chunks(block),
        dx_chunks,
        partial_chunks,
    )
        .into_par_iter()
        .for_each(|(x, dout, inverse_rms, mut dx, mut partial)| {
            vectorize(
                #[inline(always)]
                || {
                    for (row, &r) in inverse_rms.iter().enumerate() {
                        let at = row * width..(row + 1) * width;
                        let (x, dout) = (&x[at.clone()], &dout[at.clone()]);
                        if let Some(dx) = &mut dx {
                            let mean =
                                sum_by_3(x, dout, weight, |x, dout, weight| x * (dout * weight)) / T::from_usize(width);
                            let slope = mean * r * r;
                            for (((dx, &x), &dout), &weight) in dx[at].iter_mut().zip(x).zip(dout).zip(weight) {
                                *dx = r * (dout * weight - x * slope);
                            }
                        }
                        if let Some(partial) = &mut partial {
                            for ((sum, &x), &dout) in partial.iter_mut().zip(x).zip(dout) {
                                *sum = (dout * r).mul_add(x, *sum);
                            }
                        }
                    }
                },
            );
        });
    if let Some(dweight) = dweight {
        sum_partials(&partials, dweight);
    }
    Ok(())
}
