//! Reductions on the CPU.
//!
//! Where the output is large, each task reduces its own piece of it. Where it is small and much is reduced, the reduced
//! range is cut into fixed parts with an output each, which are combined in order.

use rayon::prelude::*;

use super::Reduction;
use crate::error::{KernelError, Result, check_len};
use crate::float::Float;
use crate::parallel::{TASK, max_of, max_or_nan, sum_by};
use crate::simd::vectorize;
use crate::strided::{Layout, Strided, check_view, count};

/// Elements of `x` that one part reduces at least, when the reduced range is cut.
const PART: usize = 1 << 16;

/// Reduces `x` over `axes` into a contiguous `out`.
///
/// # Errors
/// A view that reaches past its memory, an output of the wrong length, an axis out of range or named twice.
pub fn reduce<T: Float>(op: Reduction, shape: &[usize], x: Strided<T>, axes: &[usize], out: &mut [T]) -> Result<()> {
    check_view("reduce", "x", shape, x.strides, x.data.len())?;
    let mut is_reduced = vec![false; shape.len()];
    for &axis in axes {
        if axis >= shape.len() {
            return Err(KernelError::size("reduce", "axis", format!("below {}", shape.len()), axis));
        }
        if std::mem::replace(&mut is_reduced[axis], true) {
            return Err(KernelError::size("reduce", "axes", "all different", format!("{axes:?}")));
        }
    }
    let dims = |reduced: bool| {
        let is_reduced = &is_reduced;
        (0..shape.len()).filter(move |&d| is_reduced[d] == reduced).map(|d| (shape[d], [x.strides[d]]))
    };
    let sizes = |reduced| dims(reduced).map(|(n, _)| n).collect::<Vec<_>>();
    let (terms, outputs) = (count("reduce", &sizes(true))?, count("reduce", &sizes(false))?);
    check_len("reduce", "out", out, outputs)?;
    if outputs == 0 {
        return Ok(());
    }
    if terms == 0 {
        out.fill(start(op));
        return Ok(());
    }
    let plan = Plan { op, data: x.data, kept: Layout::merged(dims(false)), reduced: Layout::merged(dims(true)) };

    let per_part = (PART / outputs).max(64);
    if outputs < TASK && terms >= 2 * per_part {
        let mut partials = vec![T::ZERO; terms.div_ceil(per_part) * outputs];
        partials.par_chunks_mut(outputs).enumerate().for_each(|(part, out)| {
            let first = part * per_part;
            plan.run(0, first, per_part.min(terms - first), out);
        });
        vectorize(
            #[inline(always)]
            || {
                out.copy_from_slice(&partials[..outputs]);
                for part in partials.chunks_exact(outputs).skip(1) {
                    combine_run(op, part, 1, out);
                }
            },
        );
    } else {
        let per_task = (PART / terms).clamp(1, TASK);
        out.par_chunks_mut(per_task).enumerate().for_each(|(task, out)| plan.run(task * per_task, 0, terms, out));
    }
    Ok(())
}

fn start<T: Float>(op: Reduction) -> T {
    match op {
        Reduction::Sum => T::ZERO,
        Reduction::Max => T::NEG_INFINITY,
    }
}

#[inline(always)]
fn combine<T: Float>(op: Reduction, a: T, b: T) -> T {
    match op {
        Reduction::Sum => a + b,
        Reduction::Max => max_or_nan(a, b),
    }
}

/// `out[i] = combine(out[i], x[i * stride])`
#[inline(always)]
fn combine_run<T: Float>(op: Reduction, x: &[T], stride: usize, out: &mut [T]) {
    macro_rules! each {
        (|$out:ident, $x:ident| $result:expr) => {
            if stride == 1 {
                for ($out, &$x) in out.iter_mut().zip(x) {
                    *$out = $result;
                }
            } else {
                for (i, $out) in out.iter_mut().enumerate() {
                    let $x = x[i * stride];
                    *$out = $result;
                }
            }
        };
    }
    match op {
        Reduction::Sum => each!(|out, x| *out + x),
        Reduction::Max => each!(|out, x| max_or_nan(*out, x)),
    }
}

/// One number from `run` elements, `stride` apart.
#[inline(always)]
fn fold_run<T: Float>(op: Reduction, x: &[T], stride: usize, run: usize) -> T {
    match (op, stride) {
        (Reduction::Sum, 1) => sum_by(&x[..run], |x| x),
        (Reduction::Max, 1) => max_of(&x[..run]),
        _ => {
            let mut result = start(op);
            for i in 0..run {
                result = combine(op, result, x[i * stride]);
            }
            result
        }
    }
}

struct Plan<'a, T> {
    op: Reduction,
    data: &'a [T],
    kept: Layout<1>,
    reduced: Layout<1>,
}

impl<T: Float> Plan<'_, T> {
    /// Outputs `first_output ..`, each over the terms `first_term .. first_term + terms`.
    fn run(&self, first_output: usize, first_term: usize, terms: usize, out: &mut [T]) {
        let Self { op, data, kept, reduced } = self;
        let (op, [kept_stride], [reduced_stride]) = (*op, kept.inner_strides(), reduced.inner_strides());
        out.fill(start(op));
        vectorize(
            #[inline(always)]
            || {
                // Along the dimension that is denser in memory; a kept one of size 1 has nothing to run along.
                let along_reduced = kept.inner() == 1 || (reduced.inner() > 1 && reduced_stride <= kept_stride);
                kept.for_each_run(
                    first_output,
                    out.len(),
                    #[inline(always)]
                    |position, run, [base]| {
                        let out = &mut out[position..position + run];
                        if along_reduced {
                            for (i, out) in out.iter_mut().enumerate() {
                                reduced.for_each_run(
                                    first_term,
                                    terms,
                                    #[inline(always)]
                                    |_, run, [offset]| {
                                        let x = &data[base + i * kept_stride + offset..];
                                        *out = combine(op, *out, fold_run(op, x, reduced_stride, run));
                                    },
                                );
                            }
                        } else {
                            reduced.for_each_run(
                                first_term,
                                terms,
                                #[inline(always)]
                                |_, run, [offset]| {
                                    for i in 0..run {
                                        let x = &data[base + offset + i * reduced_stride..];
                                        combine_run(op, x, kept_stride, out);
                                    }
                                },
                            );
                        }
                    },
                );
            },
        );
    }
}

/// Sum of the squares, in float64 over fixed pieces added in order.
pub fn sum_of_squares<T: Float>(x: &[T]) -> f64 {
    let partials: Vec<f64> = x
        .par_chunks(PART)
        .map(|x| {
            vectorize(
                #[inline(always)]
                || {
                    sum_by(
                        x,
                        #[inline(always)]
                        |x| x.to_f64() * x.to_f64(),
                    )
                },
            )
        })
        .collect();
    partials.iter().sum()
}
