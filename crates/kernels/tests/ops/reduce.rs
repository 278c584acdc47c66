use proptest::prelude::*;
use stickbreak_kernels::elementwise::Strided;
use stickbreak_kernels::reduce::Reduction;
use stickbreak_kernels::reduce::cpu::{reduce, sum_of_squares};
use stickbreak_kernels::strided::contiguous_strides;

use crate::support::*;

fn check(shape: &[usize], strides: &[usize], axes: &[usize], seed: u64) {
    let x = random(seed, reach(shape, strides));
    let kept: Vec<usize> = (0..shape.len()).map(|d| if axes.contains(&d) { 1 } else { shape[d] }).collect();
    let kept_strides: Vec<usize> =
        contiguous_strides(&kept).iter().enumerate().map(|(d, &s)| if axes.contains(&d) { 0 } else { s }).collect();
    let outputs = kept.iter().product();
    let (mut sums, mut largest) = (vec![CompensatedSum::default(); outputs], vec![f64::NEG_INFINITY; outputs]);
    for_each_index(shape, |index| {
        let (x, out) = (x[offset(index, strides)], offset(index, &kept_strides));
        sums[out].add(x);
        largest[out] = f64::max(largest[out], x);
    });
    let view = Strided::new(&x, strides);
    let mut out = vec![f64::NAN; outputs];
    reduce(Reduction::Max, shape, view, axes, &mut out).unwrap();
    assert_eq!(out, largest, "max of {shape:?} {strides:?} over {axes:?}");
    reduce(Reduction::Sum, shape, view, axes, &mut out).unwrap();
    let terms: usize = axes.iter().map(|&d| shape[d]).product();
    for (out, sum) in out.iter().zip(&sums) {
        // What float64 allows a sum in any order; equal terms, as of a broadcast view, come near it.
        let bound = terms as f64 * f64::EPSILON / 2.0 * sum.magnitude;
        let error = (out - sum.value()).abs();
        assert!(error <= bound, "sum of {shape:?} {strides:?} over {axes:?}: {error:e} off, {bound:e} allowed");
    }
}

/// A sum that keeps what each addition rounds away (Neumaier).
#[derive(Clone, Default)]
struct CompensatedSum {
    sum: f64,
    lost: f64,
    /// Sum of the terms' magnitudes.
    magnitude: f64,
}

impl CompensatedSum {
    fn add(&mut self, x: f64) {
        let sum = self.sum + x;
        self.lost += if self.sum.abs() >= x.abs() { self.sum - sum + x } else { x - sum + self.sum };
        self.sum = sum;
        self.magnitude += x.abs();
    }

    fn value(&self) -> f64 {
        self.sum + self.lost
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn any_axes_of_any_view(
        dims in prop::collection::vec((0usize..7, any::<bool>(), prop::bool::weighted(0.2)), 0..5),
        column_major: bool, gap in 0usize..2, seed: u64,
    ) {
        let mut shape: Vec<usize> = dims.iter().map(|d| d.0).collect();
        if let Some(last) = shape.last_mut() {
            *last *= 11;
        }
        let axes: Vec<usize> = (0..dims.len()).filter(|&d| dims[d].1).collect();
        let mut strides = if column_major {
            let reversed: Vec<usize> = shape.iter().rev().copied().collect();
            contiguous_strides(&reversed).into_iter().rev().collect()
        } else {
            contiguous_strides(&shape)
        };
        for (stride, dim) in strides.iter_mut().zip(&dims) {
            *stride = if dim.2 { 0 } else { *stride * (1 + gap) };
        }
        check(&shape, &strides, &axes, seed);
    }
}

#[test]
fn large_reductions_in_every_direction() {
    for (shape, axes) in [
        (vec![1000, 300], vec![0]),
        (vec![1000, 300], vec![1]),
        (vec![1000, 300], vec![0, 1]),
        (vec![300_000], vec![0]),
        (vec![3, 20_000], vec![0]),
        (vec![20_000, 3], vec![1]),
        (vec![100_000, 3], vec![0]),
        (vec![40, 50, 60], vec![1]),
        (vec![40, 50, 60], vec![0, 2]),
    ] {
        check(&shape, &contiguous_strides(&shape), &axes, 7);
        let transposed: Vec<usize> =
            contiguous_strides(&shape.iter().rev().copied().collect::<Vec<_>>()).into_iter().rev().collect();
        check(&shape, &transposed, &axes, 8);
    }
}

#[test]
fn nan_propagates() {
    let mut x = vec![1f32; 1000];
    x[777] = f32::NAN;
    let mut out = [0f32];
    for op in [Reduction::Sum, Reduction::Max] {
        reduce(op, &[1000], Strided::new(&x, &[1]), &[0], &mut out).unwrap();
        assert!(out[0].is_nan(), "{op:?}");
        reduce(op, &[500], Strided::new(&x[1..], &[2]), &[0], &mut out).unwrap();
        assert!(out[0].is_nan(), "{op:?}");
    }
    assert!(sum_of_squares(&x).is_nan());
    x[777] = f32::INFINITY;
    assert_eq!(sum_of_squares(&x), f64::INFINITY);
}

#[test]
fn sum_of_squares_is_a_float64_sum() {
    let x = single(&random(3, 300_001));
    let expected: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    assert!((sum_of_squares(&x) - expected).abs() <= 1e-12 * expected);
    // The square overflows float32 but not the sum.
    assert_eq!(sum_of_squares(&[1e30f32; 2]), 2.0 * f64::from(1e30f32).powi(2));
    assert_eq!(sum_of_squares::<f64>(&[]), 0.0);
}

#[test]
fn wrong_calls_are_refused() {
    let x = [0f64; 12];
    let view = Strided::new(&x, &[4, 1]);
    assert_length_error(reduce(Reduction::Sum, &[3, 4], view, &[0], &mut [0.0; 3]), 4, 3);
    assert_length_error(reduce(Reduction::Sum, &[3, 5], view, &[0], &mut [0.0; 5]), 13, 12);
    assert!(reduce(Reduction::Sum, &[3, 4], view, &[2], &mut [0.0; 12]).is_err());
    assert!(reduce(Reduction::Sum, &[3, 4], view, &[0, 0], &mut [0.0; 4]).is_err());
}
