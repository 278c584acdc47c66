use half::bf16;
use stickbreak_kernels::cuda::{DeviceElement, DeviceView, Queue};
use stickbreak_kernels::elementwise::{BinaryOp, Strided, UnaryOp, cpu, cuda};

use crate::support::*;

/// Shapes with the strides of one operand: flat, with a tail, transposed, broadcast, with gaps, of six dimensions that do not
/// merge.
const VIEWS: &[(&[usize], &[usize])] = &[
    (&[1], &[1]),
    (&[7], &[1]),
    (&[4099], &[1]),
    (&[0, 3], &[3, 1]),
    (&[33, 40], &[1, 33]),
    (&[20, 64], &[0, 1]),
    (&[20, 64], &[1, 0]),
    (&[20, 63], &[70, 1]),
    (&[6, 5, 32], &[32, 6 * 32, 1]),
    (&[6, 5, 32], &[40, 6 * 40, 1]),
    (&[9, 11], &[30, 2]),
    (&[2, 3, 2, 3, 2, 8], &[1000, 300, 140, 40, 18, 1]),
    (&[2, 3, 2, 3, 2, 8], &[1000, 300, 140, 48, 16, 1]),
];

fn unary<T: Number>(queue: &Queue) {
    for &(shape, strides) in VIEWS {
        let total = shape.iter().product();
        for shift in [0, 1] {
            for op in [
                UnaryOp::Negate,
                UnaryOp::Exp,
                UnaryOp::Log,
                UnaryOp::Sqrt,
                UnaryOp::Reciprocal,
                UnaryOp::Square,
                UnaryOp::Sigmoid,
                UnaryOp::Tanh,
                UnaryOp::Silu,
                UnaryOp::Affine { scale: 1.5, shift: -0.25 },
            ] {
                let x = match op {
                    UnaryOp::Log | UnaryOp::Sqrt | UnaryOp::Reciprocal => positive(1, reach(shape, strides)),
                    _ => random(1, reach(shape, strides)),
                };
                let mut expected = vec![f64::NAN; total];
                cpu::unary(op, shape, Strided::new(&x, strides), &mut expected).unwrap();
                let device_x = Buffer::new::<T>(queue, &x, shift);
                let mut out = Buffer::poisoned::<T>(queue, total, shift);
                cuda::unary(queue, op, shape, DeviceView::new(device_x.get(), strides), &mut out.get_mut()).unwrap();
                let what = format!("{op:?} of {} {shape:?} {strides:?} shift {shift}", T::NAME);
                assert_within(&what, T::BOUNDS, &out.read::<T>(queue), &expected, 8);
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn unary_ops_agree_with_float64() {
    let queue = queue();
    unary::<f32>(&queue);
    unary::<bf16>(&queue);
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn unary_ops_at_the_ends_of_the_range() {
    let queue = queue();
    let x = [-1e30, -200.0, 200.0, 1e30];
    for (op, expected) in [(UnaryOp::Sigmoid, [0.0, 0.0, 1.0, 1.0]), (UnaryOp::Tanh, [-1.0, -1.0, 1.0, 1.0])] {
        let device_x = Buffer::new::<f32>(&queue, &x, 0);
        let mut out = Buffer::poisoned::<f32>(&queue, 4, 0);
        cuda::unary(&queue, op, &[4], DeviceView::new(device_x.get(), &[1]), &mut out.get_mut()).unwrap();
        assert_eq!(out.read::<f32>(&queue), expected, "{op:?}");
    }
    for op in [UnaryOp::Exp, UnaryOp::Sigmoid, UnaryOp::Tanh, UnaryOp::Silu, UnaryOp::Square, UnaryOp::Negate] {
        let device_x = Buffer::new::<f32>(&queue, &[f64::NAN; 5], 0);
        let mut out = Buffer::new::<f32>(&queue, &[0.0; 5], 0);
        cuda::unary(&queue, op, &[5], DeviceView::new(device_x.get(), &[1]), &mut out.get_mut()).unwrap();
        assert!(out.read::<f32>(&queue).iter().all(|x| x.is_nan()), "{op:?} of NaN");
    }
}

fn binary<T: Number>(queue: &Queue) {
    for &(shape, strides) in VIEWS {
        let total = shape.iter().product();
        // Against itself, a contiguous operand, and broadcasts of a row, a column and a scalar.
        let contiguous: Vec<usize> = (0..shape.len()).map(|d| shape[d + 1..].iter().product()).collect();
        let mut row = vec![0; shape.len()];
        row[shape.len() - 1] = 1;
        let mut column = contiguous.clone();
        column[shape.len() - 1] = 0;
        for other in [strides.to_vec(), contiguous, row, column, vec![0; shape.len()]] {
            for (shift, other_shift) in [(0, 0), (1, 0), (0, 3)] {
                for op in [BinaryOp::Add, BinaryOp::Subtract, BinaryOp::Multiply, BinaryOp::Divide] {
                    let (a, b) = (random(1, reach(shape, strides)), positive(2, reach(shape, &other)));
                    let mut expected = vec![f64::NAN; total];
                    let (view_a, view_b) = (Strided::new(&a, strides), Strided::new(&b, &other));
                    cpu::binary(op, shape, view_a, view_b, &mut expected).unwrap();
                    let (device_a, device_b) =
                        (Buffer::new::<T>(queue, &a, shift), Buffer::new::<T>(queue, &b, other_shift));
                    let mut out = Buffer::poisoned::<T>(queue, total, shift);
                    let (view_a, view_b) =
                        (DeviceView::new(device_a.get(), strides), DeviceView::new(device_b.get(), &other));
                    cuda::binary(queue, op, shape, view_a, view_b, &mut out.get_mut()).unwrap();
                    let what = format!("{op:?} of {} {shape:?} {strides:?} {other:?}", T::NAME);
                    assert_within(&what, T::BOUNDS, &out.read::<T>(queue), &expected, 8);
                }
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn binary_ops_agree_with_float64_and_broadcast() {
    let queue = queue();
    binary::<f32>(&queue);
    binary::<bf16>(&queue);
}

fn copy<T: DeviceElement + PartialEq + std::fmt::Debug>(queue: &Queue, value: impl Fn(usize) -> T) {
    for &(shape, strides) in VIEWS {
        for shift in [0, 1] {
            let x: Vec<T> = (0..reach(shape, strides) + shift).map(&value).collect();
            let mut expected = vec![T::default(); shape.iter().product()];
            cpu_copy(shape, &x[shift..], strides, &mut expected);
            let device_x = queue.upload(&x).unwrap();
            let mut out = queue.scratch(T::TYPE, expected.len()).unwrap();
            let view = DeviceView::new(device_x.as_ref().slice(shift..x.len()), strides);
            cuda::copy(queue, shape, view, &mut out.as_mut()).unwrap();
            assert_same(&format!("{shape:?} {strides:?}"), &queue.download::<T>(out.as_ref()).unwrap(), &expected);
        }
    }
}

fn cpu_copy<T: Copy>(shape: &[usize], x: &[T], strides: &[usize], out: &mut [T]) {
    for (i, out) in out.iter_mut().enumerate() {
        let (mut rest, mut at) = (i, 0);
        for d in (0..shape.len()).rev() {
            at += rest % shape[d] * strides[d];
            rest /= shape[d];
        }
        *out = x[at];
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn copies_of_views_keep_the_bits() {
    let queue = queue();
    copy(&queue, |i| i as u32 ^ 0x7fc0_0001);
    copy(&queue, |i| -(i as i32));
    copy(&queue, |i| i as f32);
    copy(&queue, |i| bf16::from_bits(i as u16 & 0x7eff));
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn casts_round_to_nearest_even() {
    let queue = queue();
    // Ties, neighbours of ties, denormals, the largest finite numbers, infinity.
    let mut x: Vec<f32> = (0..4099u32).map(|i| f32::from_bits(0x3f80_0000 + i * 0x1357)).collect();
    x.extend(
        [0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0x3f80_7fff, 0x7f7f_ffff, 0x0000_8001, 0x8000_0000].map(f32::from_bits),
    );
    x.extend([f32::INFINITY, f32::NEG_INFINITY, 0.0]);
    for shift in [0, 1] {
        let device = queue.upload(&x).unwrap();
        let x = &x[shift..];
        let view = DeviceView::new(device.as_ref().slice(shift..shift + x.len()), &[1]);
        let mut out = Buffer::poisoned::<bf16>(&queue, x.len(), shift);
        cuda::cast(&queue, &[x.len()], view, &mut out.get_mut()).unwrap();
        let expected: Vec<u32> = x.iter().map(|&x| bf16::from_f32(x).bits()).collect();
        assert_same("to bf16", &out.bits::<bf16>(&queue), &expected);
        let mut back = Buffer::poisoned::<f32>(&queue, x.len(), shift);
        cuda::cast(&queue, &[x.len()], DeviceView::new(out.get(), &[1]), &mut back.get_mut()).unwrap();
        let expected: Vec<u32> = x.iter().map(|&x| bf16::from_f32(x).to_f32().to_bits()).collect();
        assert_same("to f32", &back.bits::<f32>(&queue), &expected);
    }
    // A transposed view.
    let x = random(1, 24 * 17);
    let device = Buffer::new::<f32>(&queue, &x, 0);
    let mut out = Buffer::poisoned::<bf16>(&queue, x.len(), 0);
    cuda::cast(&queue, &[17, 24], DeviceView::new(device.get(), &[1, 17]), &mut out.get_mut()).unwrap();
    let mut expected = vec![0.0; x.len()];
    cpu_copy(&[17, 24], &x, &[1, 17], &mut expected);
    assert_same("transposed", &out.read::<bf16>(&queue), &expected);
}

fn accumulate<X: Number, O: Number>(queue: &Queue) {
    for &(shape, strides) in VIEWS {
        // The output contiguous, with gaps between the rows, and transposed.
        let contiguous: Vec<usize> = (0..shape.len()).map(|d| shape[d + 1..].iter().product()).collect();
        let mut gaps = contiguous.clone();
        for stride in &mut gaps[..shape.len() - 1] {
            *stride *= 2;
        }
        let mut transposed = vec![1; shape.len()];
        for d in 1..shape.len() {
            transposed[d] = transposed[d - 1] * shape[d - 1];
        }
        for out_strides in [contiguous, gaps, transposed] {
            for shift in [0, 1] {
                let x = random(1, reach(shape, strides));
                let before = random(2, reach(shape, &out_strides));
                let mut expected = before.clone();
                cpu::accumulate(shape, 0.75, Strided::new(&x, strides), &mut expected, &out_strides).unwrap();
                let device_x = Buffer::new::<X>(queue, &x, shift);
                let factor = queue.upload(&[0.75f32]).unwrap();
                for by_device in [false, true] {
                    let mut out = Buffer::new::<O>(queue, &before, shift);
                    let view = DeviceView::new(device_x.get(), strides);
                    match by_device {
                        false => cuda::accumulate(queue, shape, 0.75, view, &mut out.get_mut(), &out_strides),
                        true => {
                            cuda::accumulate_by(queue, shape, factor.as_ref(), view, &mut out.get_mut(), &out_strides)
                        }
                    }
                    .unwrap();
                    let what = format!("{} into {} {shape:?} {strides:?} {out_strides:?}", X::NAME, O::NAME);
                    assert_within(&what, O::BOUNDS, &out.read::<O>(queue), &expected, 8);
                }
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn accumulation_into_views_agrees_with_float64() {
    let queue = queue();
    accumulate::<f32, f32>(&queue);
    accumulate::<bf16, f32>(&queue);
    accumulate::<bf16, bf16>(&queue);
}

fn scale_and_fill<T: Number>(queue: &Queue) {
    for length in [0, 1, 15, 4096, 100_003] {
        for shift in [0, 3] {
            let x = random(1, length);
            let expected: Vec<f64> = x.iter().map(|x| x * -0.375).collect();
            let mut device = Buffer::new::<T>(queue, &x, shift);
            cuda::scale_in_place(queue, -0.375, &mut device.get_mut()).unwrap();
            assert_within("scale", T::BOUNDS, &device.read::<T>(queue), &expected, 8);
            let factor = queue.upload(&[-0.375f32]).unwrap();
            let mut device = Buffer::new::<T>(queue, &x, shift);
            cuda::scale_in_place_by(queue, factor.as_ref(), &mut device.get_mut()).unwrap();
            assert_within("scale by", T::BOUNDS, &device.read::<T>(queue), &expected, 8);
            cuda::fill(queue, 1.5, &mut device.get_mut()).unwrap();
            assert_same("fill", &device.read::<T>(queue), &vec![1.5; length]);
            cuda::fill(queue, 0.0, &mut device.get_mut()).unwrap();
            assert_same("fill", &device.read::<T>(queue), &vec![0.0; length]);
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn scale_and_fill_reach_every_element() {
    let queue = queue();
    scale_and_fill::<f32>(&queue);
    scale_and_fill::<bf16>(&queue);
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn elementwise_ops_refuse_what_does_not_fit() {
    let queue = queue();
    let x = Buffer::new::<f32>(&queue, &[1.0; 6], 0);
    let half = Buffer::new::<bf16>(&queue, &[1.0; 6], 0);
    let mut out = Buffer::poisoned::<f32>(&queue, 6, 0);
    let view = |strides| DeviceView::new(x.get(), strides);
    let negate = |shape: &[usize], strides, out: &mut Buffer| {
        cuda::unary(&queue, UnaryOp::Negate, shape, view(strides), &mut out.get_mut())
    };
    assert_refused(negate(&[2, 3], &[4, 1], &mut out), &["x", "6", "7"]);
    assert_refused(negate(&[5], &[1], &mut out), &["out", "5", "6"]);
    assert_refused(negate(&[6], &[1, 1], &mut out), &["strides"]);
    assert_refused(negate(&[1, 2, 1, 3], &[1], &mut out), &["strides"]);
    let half_view = DeviceView::new(half.get(), &[1]);
    let result = cuda::binary(&queue, BinaryOp::Add, &[6], view(&[1]), half_view, &mut out.get_mut());
    assert_refused(result, &["b", "f32", "bf16"]);
    assert_refused(cuda::cast(&queue, &[6], view(&[1]), &mut out.get_mut()), &["f32 to f32"]);
    assert_refused(cuda::copy(&queue, &[6], half_view, &mut out.get_mut()), &["bf16"]);
    let result = cuda::accumulate(&queue, &[2, 3], 1.0, view(&[3, 1]), &mut out.get_mut(), &[1, 1]);
    assert_refused(result, &["overlaps"]);
    let result = cuda::accumulate_by(&queue, &[6], x.get(), view(&[1]), &mut out.get_mut(), &[1]);
    assert_refused(result, &["factor", "1", "6"]);
    // Seven dimensions of two elements, none of which merge.
    let shape = [2usize; 7];
    let strides = [1000, 400, 150, 60, 24, 10, 3];
    let many = Buffer::new::<f32>(&queue, &vec![0.0; reach(&shape, &strides)], 0);
    let mut out = Buffer::poisoned::<f32>(&queue, 128, 0);
    let result =
        cuda::unary(&queue, UnaryOp::Negate, &shape, DeviceView::new(many.get(), &strides), &mut out.get_mut());
    assert_refused(result, &["dimensions", "6", "7"]);
    assert!(out.read::<f32>(&queue).iter().all(|x| x.is_nan()));
}
