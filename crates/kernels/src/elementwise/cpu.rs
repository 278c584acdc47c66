//! Elementwise ops on the CPU: fixed pieces of the output, each a sequence of runs along the innermost dimension.

use rayon::prelude::*;

use super::{BinaryOp, UnaryOp};
use crate::error::{Result, check_len};
use crate::float::Float;
use crate::parallel::TASK;
use crate::simd::vectorize;
use crate::strided::{Layout, Strided, check_no_overlap, check_view, count};

/// `out = op(x)`.
///
/// # Errors
/// A view that reaches past its memory, or an output of the wrong length.
pub fn unary<T: Float>(op: UnaryOp, shape: &[usize], x: Strided<T>, out: &mut [T]) -> Result<()> {
    check_view("unary", "x", shape, x.strides, x.data.len())?;
    check_len("unary", "out", out, count("unary", shape)?)?;
    let layout = Layout::merged(shape.iter().zip(x.strides).map(|(&n, &stride)| (n, [stride])));
    let [stride] = layout.inner_strides();
    out.par_chunks_mut(TASK).enumerate().for_each(|(task, out)| {
        vectorize(
            #[inline(always)]
            || {
                layout.for_each_run(
                    task * TASK,
                    out.len(),
                    #[inline(always)]
                    |position, run, [offset]| {
                        unary_run(op, &x.data[offset..], stride, &mut out[position..position + run]);
                    },
                );
            },
        );
    });
    Ok(())
}

#[inline(always)]
fn unary_run<T: Float>(op: UnaryOp, x: &[T], stride: usize, out: &mut [T]) {
    // The loops are written into each branch, so that the choice of the op stays outside of them.
    macro_rules! each {
        (|$x:ident| $result:expr) => {
            match stride {
                1 => {
                    for (out, &$x) in out.iter_mut().zip(x) {
                        *out = $result;
                    }
                }
                0 => {
                    let $x = x[0];
                    out.fill($result);
                }
                _ => {
                    for (out, &$x) in out.iter_mut().zip(x.iter().step_by(stride)) {
                        *out = $result;
                    }
                }
            }
        };
    }
    match op {
        UnaryOp::Negate => each!(|x| -x),
        UnaryOp::Exp => each!(|x| x.exp()),
        UnaryOp::Log => each!(|x| x.ln()),
        UnaryOp::Sqrt => each!(|x| x.sqrt()),
        UnaryOp::Reciprocal => each!(|x| T::ONE / x),
        UnaryOp::Square => each!(|x| x * x),
        UnaryOp::Sigmoid => each!(|x| x.sigmoid()),
        UnaryOp::Tanh => each!(|x| x.tanh()),
        UnaryOp::Silu => each!(|x| x * x.sigmoid()),
        UnaryOp::Affine { scale, shift } => {
            let (scale, shift) = (T::from_f64(scale), T::from_f64(shift));
            each!(|x| x.mul_add(scale, shift));
        }
    }
}

/// `out = op(a, b)`.
///
/// # Errors
/// A view that reaches past its memory, or an output of the wrong length.
pub fn binary<T: Float>(op: BinaryOp, shape: &[usize], a: Strided<T>, b: Strided<T>, out: &mut [T]) -> Result<()> {
    check_view("binary", "a", shape, a.strides, a.data.len())?;
    check_view("binary", "b", shape, b.strides, b.data.len())?;
    check_len("binary", "out", out, count("binary", shape)?)?;
    let strides = a.strides.iter().zip(b.strides).map(|(&a, &b)| [a, b]);
    let layout = Layout::merged(shape.iter().copied().zip(strides));
    let strides = layout.inner_strides();
    out.par_chunks_mut(TASK).enumerate().for_each(|(task, out)| {
        vectorize(
            #[inline(always)]
            || {
                layout.for_each_run(
                    task * TASK,
                    out.len(),
                    #[inline(always)]
                    |position, run, [from_a, from_b]| {
                        let out = &mut out[position..position + run];
                        binary_run(op, &a.data[from_a..], &b.data[from_b..], strides, out);
                    },
                );
            },
        );
    });
    Ok(())
}

#[inline(always)]
fn binary_run<T: Float>(op: BinaryOp, a: &[T], b: &[T], strides: [usize; 2], out: &mut [T]) {
    macro_rules! each {
        (|$a:ident, $b:ident| $result:expr) => {
            match strides {
                [1, 1] => {
                    for ((out, &$a), &$b) in out.iter_mut().zip(a).zip(b) {
                        *out = $result;
                    }
                }
                [1, 0] => {
                    let $b = b[0];
                    for (out, &$a) in out.iter_mut().zip(a) {
                        *out = $result;
                    }
                }
                [0, 1] => {
                    let $a = a[0];
                    for (out, &$b) in out.iter_mut().zip(b) {
                        *out = $result;
                    }
                }
                [a_stride, b_stride] => {
                    for (i, out) in out.iter_mut().enumerate() {
                        let ($a, $b) = (a[i * a_stride], b[i * b_stride]);
                        *out = $result;
                    }
                }
            }
        };
    }
    match op {
        BinaryOp::Add => each!(|a, b| a + b),
        BinaryOp::Subtract => each!(|a, b| a - b),
        BinaryOp::Multiply => each!(|a, b| a * b),
        BinaryOp::Divide => each!(|a, b| a / b),
    }
}

/// Gathers a view into contiguous memory.
///
/// # Errors
/// A view that reaches past its memory, or an output of the wrong length.
pub fn copy<E: Copy + Send + Sync>(shape: &[usize], x: Strided<E>, out: &mut [E]) -> Result<()> {
    check_view("copy", "x", shape, x.strides, x.data.len())?;
    check_len("copy", "out", out, count("copy", shape)?)?;
    let layout = Layout::merged(shape.iter().zip(x.strides).map(|(&n, &stride)| (n, [stride])));
    let [stride] = layout.inner_strides();
    out.par_chunks_mut(TASK).enumerate().for_each(|(task, out)| {
        layout.for_each_run(task * TASK, out.len(), |position, run, [offset]| {
            let (x, out) = (&x.data[offset..], &mut out[position..position + run]);
            match stride {
                1 => out.copy_from_slice(&x[..run]),
                0 => out.fill(x[0]),
                _ => {
                    for (out, &x) in out.iter_mut().zip(x.iter().step_by(stride)) {
                        *out = x;
                    }
                }
            }
        });
    });
    Ok(())
}

/// `out += alpha * x`, into a view of strides `out_strides`.
///
/// # Errors
/// A view that reaches past its memory, or strides of `out` under which two elements share memory.
pub fn accumulate<T: Float>(
    shape: &[usize],
    alpha: T,
    x: Strided<T>,
    out: &mut [T],
    out_strides: &[usize],
) -> Result<()> {
    check_view("accumulate", "x", shape, x.strides, x.data.len())?;
    check_view("accumulate", "out", shape, out_strides, out.len())?;
    check_no_overlap("accumulate", shape, out_strides)?;
    let total = count("accumulate", shape)?;
    if total == 0 {
        return Ok(());
    }
    // In the order of the output's memory, the outermost dimension cuts it into slices that nothing else reaches into.
    let mut dims: Vec<(usize, [usize; 2])> =
        shape.iter().zip(x.strides).zip(out_strides).map(|((&n, &x), &out)| (n, [x, out])).collect();
    dims.sort_by_key(|&(n, [_, out])| std::cmp::Reverse(if n == 1 { 0 } else { out }));
    let layout = Layout::merged(dims.into_iter());
    let [x_stride, out_stride] = layout.inner_strides();
    let (rows, row_stride) = (layout.shape[0], layout.strides[0][1]);
    let row = total / rows;
    let per_task = (TASK / row).max(1);
    let tasks = rows.div_ceil(per_task);
    out.par_chunks_mut((per_task * row_stride).max(1)).take(tasks).enumerate().for_each(|(task, out)| {
        let first = task * per_task;
        let base = first * row_stride;
        vectorize(
            #[inline(always)]
            || {
                layout.for_each_run(
                    first * row,
                    per_task.min(rows - first) * row,
                    #[inline(always)]
                    |_, run, [from_x, from_out]| {
                        let out = &mut out[from_out - base..];
                        accumulate_run(alpha, &x.data[from_x..], x_stride, out, out_stride, run);
                    },
                );
            },
        );
    });
    Ok(())
}

#[inline(always)]
fn accumulate_run<T: Float>(alpha: T, x: &[T], x_stride: usize, out: &mut [T], out_stride: usize, run: usize) {
    match (x_stride, out_stride) {
        (1, 1) => {
            for (out, &x) in out[..run].iter_mut().zip(x) {
                *out = alpha.mul_add(x, *out);
            }
        }
        (0, 1) => {
            let step = x[0];
            for out in &mut out[..run] {
                *out = alpha.mul_add(step, *out);
            }
        }
        _ => {
            for i in 0..run {
                let out = &mut out[i * out_stride];
                *out = alpha.mul_add(x[i * x_stride], *out);
            }
        }
    }
}

/// `x *= alpha`.
pub fn scale_in_place<T: Float>(alpha: T, x: &mut [T]) {
    x.par_chunks_mut(TASK).for_each(|x| {
        vectorize(
            #[inline(always)]
            || {
                for x in x {
                    *x *= alpha;
                }
            },
        );
    });
}
