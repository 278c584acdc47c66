use half::bf16;
use stickbreak_kernels::cuda::{DeviceView, Queue};
use stickbreak_kernels::elementwise::Strided;
use stickbreak_kernels::reduce::{Reduction, cpu, cuda};

use crate::support::*;

/// Shape, strides, reduced axes.
const CASES: &[(&[usize], &[usize], &[usize])] = &[
    (&[1], &[1], &[0]),
    (&[300_007], &[1], &[0]),
    (&[300_000], &[1], &[0]),
    (&[300, 1000], &[1000, 1], &[0, 1]),
    (&[300, 1000], &[1000, 1], &[]),
    (&[70_001, 5], &[5, 1], &[0]),
    (&[4096, 96], &[96, 1], &[0]),
    (&[20_000, 264], &[264, 1], &[0]),
    (&[20_000, 263], &[263, 1], &[0]),
    (&[528, 1024], &[1024, 1], &[0]),
    (&[3, 40_000], &[40_000, 1], &[1]),
    (&[3, 40_001], &[40_001, 1], &[1]),
    (&[1000, 96], &[96, 1], &[1]),
    (&[1000, 37], &[40, 1], &[1]),
    (&[1000, 32], &[40, 1], &[1]),
    (&[7, 50, 64], &[3200, 64, 1], &[1]),
    (&[7, 50, 64], &[3200, 64, 1], &[0, 2]),
    (&[7, 50, 64], &[1, 7 * 64, 7], &[0]),
    (&[40, 30], &[0, 1], &[0]),
    (&[40, 30], &[1, 0], &[1]),
    (&[2, 3, 2, 3, 2, 8], &[1000, 300, 140, 48, 16, 1], &[1, 3, 5]),
    (&[0, 5], &[5, 1], &[0]),
    (&[5, 0], &[1, 1], &[0]),
];

fn reduce<X: Number, O: Number>(queue: &Queue) {
    for &(shape, strides, axes) in CASES {
        let outputs: usize = (0..shape.len()).filter(|d| !axes.contains(d)).map(|d| shape[d]).product();
        for op in [Reduction::Sum, Reduction::Max] {
            for shift in [0, 1] {
                let x = random(1, reach(shape, strides));
                let mut expected = vec![f64::NAN; outputs];
                cpu::reduce(op, shape, Strided::new(&x, strides), axes, &mut expected).unwrap();
                let device_x = Buffer::new::<X>(queue, &x, shift);
                let what = format!("{op:?} {} to {} {shape:?} {strides:?} {axes:?}", X::NAME, O::NAME);
                let found = twice(&what, || {
                    let mut out = Buffer::poisoned::<O>(queue, outputs, 0);
                    let view = DeviceView::new(device_x.get(), strides);
                    cuda::reduce(queue, op, shape, view, axes, &mut out.get_mut()).unwrap();
                    out.raw::<O>(queue)
                });
                let found: Vec<f64> = found.into_iter().map(O::to_f64).collect();
                if expected.iter().all(|x| x.is_finite()) {
                    assert_within(&what, O::BOUNDS, &found, &expected, outputs);
                } else {
                    assert_same(&what, &found, &expected);
                }
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn reductions_over_any_axes_agree_with_float64() {
    let queue = queue();
    reduce::<f32, f32>(&queue);
    reduce::<bf16, bf16>(&queue);
    reduce::<bf16, f32>(&queue);
    reduce::<f32, bf16>(&queue);
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn the_largest_is_nan_if_an_element_is() {
    let queue = queue();
    for (shape, axes, outputs) in
        [([300usize, 100], vec![0], 100), ([300, 100], vec![1], 300), ([300, 100], vec![0, 1], 1)]
    {
        let mut x = random(1, 30_000);
        x[12_345] = f64::NAN;
        let device = Buffer::new::<f32>(&queue, &x, 0);
        let mut out = Buffer::new::<f32>(&queue, &vec![0.0; outputs], 0);
        let view = DeviceView::new(device.get(), &[100, 1]);
        cuda::reduce(&queue, Reduction::Max, &shape, view, &axes, &mut out.get_mut()).unwrap();
        let nans: Vec<usize> = (0..outputs).filter(|&i| out.read::<f32>(&queue)[i].is_nan()).collect();
        let expected = match axes[..] {
            [0] => 45,
            [1] => 123,
            _ => 0,
        };
        assert_eq!(nans, [expected], "{axes:?}");
    }
}

fn flat_sums<T: Number>(queue: &Queue) {
    for length in [0, 1, 5, 4096, 100_003, (1 << 20) + 3, 9_000_001] {
        for shift in [0, 1] {
            let x = positive(1, length);
            let device = Buffer::new::<T>(queue, &x, shift);
            let run = |squares: bool| {
                let mut out = Buffer::poisoned::<f32>(queue, 1, 0);
                match squares {
                    true => cuda::sum_of_squares(queue, device.get(), &mut out.get_mut()),
                    false => cuda::sum(queue, 0.25, device.get(), &mut out.get_mut()),
                }
                .unwrap();
                out.read::<f32>(queue)[0]
            };
            let what = format!("{} {length} shift {shift}", T::NAME);
            // In float64 until the last rounding.
            let squares = twice(&what, || run(true));
            assert_within(&what, (1e-7, 1e-7), &[squares], &[cpu::sum_of_squares(&x)], 1);
            let sum = twice(&what, || run(false));
            assert_within(&what, (1e-7, 1e-7), &[sum], &[0.25 * x.iter().sum::<f64>()], 1);
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn flat_sums_are_exact_to_the_last_rounding() {
    let queue = queue();
    flat_sums::<f32>(&queue);
    flat_sums::<bf16>(&queue);
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn flat_sums_let_nan_and_infinity_through() {
    let queue = queue();
    for (bad, position) in [(f64::NAN, 0), (f64::NAN, 70_000), (f64::INFINITY, 99_999), (1e30, 5)] {
        let mut x = random(1, 100_000);
        x[position] = bad;
        let device = Buffer::new::<f32>(&queue, &x, 0);
        let mut out = Buffer::new::<f32>(&queue, &[0.0], 0);
        cuda::sum_of_squares(&queue, device.get(), &mut out.get_mut()).unwrap();
        // The square of 1e30 is beyond float32, so it counts as infinite.
        assert!(!out.read::<f32>(&queue)[0].is_finite(), "{bad}");
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn reductions_refuse_what_does_not_fit() {
    let queue = queue();
    let x = Buffer::new::<f32>(&queue, &[1.0; 6], 0);
    let mut out = Buffer::poisoned::<f32>(&queue, 3, 0);
    let mut run = |strides: &[usize], axes: &[usize]| {
        cuda::reduce(&queue, Reduction::Sum, &[2, 3], DeviceView::new(x.get(), strides), axes, &mut out.get_mut())
    };
    assert_refused(run(&[4, 1], &[0]), &["x", "6", "7"]);
    assert_refused(run(&[3, 1], &[1]), &["out", "2", "3"]);
    assert_refused(run(&[3, 1], &[2]), &["axis", "2"]);
    assert_refused(run(&[3, 1], &[0, 0]), &["axes"]);
    assert_refused(cuda::sum(&queue, 1.0, x.get(), &mut out.get_mut()), &["out", "1", "3"]);
}
