//! Cutting work into pieces by shape alone, sums in a fixed order: what makes results independent of the number of threads.

use rayon::prelude::*;

use crate::float::Float;
use crate::simd::vectorize;

/// Elements of one array that one task of an elementwise kernel handles: small enough that a task's slices of all its
/// arrays lie in the second-level cache, large enough that starting the task costs nothing.
pub(crate) const TASK: usize = 8192;

/// Rows of `width` elements per task, at least one.
pub(crate) fn rows_per_task(width: usize) -> usize {
    (TASK / width.max(1)).max(1)
}

/// `slice` in pieces of `size`, or `count` times nothing: lets an optional output take part in a parallel zip.
pub(crate) fn chunks_or_none<T>(slice: Option<&mut [T]>, size: usize, count: usize) -> Vec<Option<&mut [T]>> {
    match slice {
        Some(slice) => slice.chunks_mut(size).map(Some).collect(),
        None => (0..count).map(|_| None).collect(),
    }
}

/// `out[j] = partials[0][j] + partials[1][j] + ...`, in that order; `partials` is `[any, out.len()]`.
pub(crate) fn sum_partials<T: Float>(partials: &[T], out: &mut [T]) {
    let width = out.len();
    if width == 0 {
        return;
    }
    const COLUMNS: usize = 512;
    out.par_chunks_mut(COLUMNS).enumerate().for_each(|(block, out)| {
        let start = block * COLUMNS;
        vectorize(
            #[inline(always)]
            || {
                out.fill(T::ZERO);
                for row in partials.chunks_exact(width) {
                    for (sum, &x) in out.iter_mut().zip(&row[start..]) {
                        *sum += x;
                    }
                }
            },
        );
    });
}

/// Independent running sums, so that a sum runs at the speed of additions and not at their latency.
const LANES: usize = 32;

#[inline(always)]
fn add_lanes<T: Float>(mut lanes: [T; LANES]) -> T {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            let high = lanes[i + half];
            lanes[i] += high;
        }
        half /= 2;
    }
    lanes[0]
}

/// Sum of `f(x)` in an order that depends on the length alone.
#[inline(always)]
pub(crate) fn sum_by<T: Float, R: Float>(x: &[T], f: impl Fn(T) -> R) -> R {
    let mut lanes = [R::ZERO; LANES];
    let mut blocks = x.chunks_exact(LANES);
    for x in &mut blocks {
        for i in 0..LANES {
            lanes[i] += f(x[i]);
        }
    }
    let mut tail = R::ZERO;
    for &x in blocks.remainder() {
        tail += f(x);
    }
    add_lanes(lanes) + tail
}

/// Sum of `f(x, y)` in an order that depends on the length alone.
#[inline(always)]
pub(crate) fn sum_by_2<T: Float>(x: &[T], y: &[T], f: impl Fn(T, T) -> T) -> T {
    let mut lanes = [T::ZERO; LANES];
    let (mut xs, mut ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    for (x, y) in (&mut xs).zip(&mut ys) {
        for i in 0..LANES {
            lanes[i] += f(x[i], y[i]);
        }
    }
    let mut tail = T::ZERO;
    for (&x, &y) in xs.remainder().iter().zip(ys.remainder()) {
        tail += f(x, y);
    }
    add_lanes(lanes) + tail
}

/// Sum of `f(x, y, z)` in an order that depends on the length alone.
#[inline(always)]
pub(crate) fn sum_by_3<T: Float>(x: &[T], y: &[T], z: &[T], f: impl Fn(T, T, T) -> T) -> T {
    let mut lanes = [T::ZERO; LANES];
    let (mut xs, mut ys, mut zs) = (x.chunks_exact(LANES), y.chunks_exact(LANES), z.chunks_exact(LANES));
    for ((x, y), z) in (&mut xs).zip(&mut ys).zip(&mut zs) {
        for i in 0..LANES {
            lanes[i] += f(x[i], y[i], z[i]);
        }
    }
    let mut tail = T::ZERO;
    for ((&x, &y), &z) in xs.remainder().iter().zip(ys.remainder()).zip(zs.remainder()) {
        tail += f(x, y, z);
    }
    add_lanes(lanes) + tail
}

/// The larger of two; NaN if either is.
#[inline(always)]
pub(crate) fn max_or_nan<T: Float>(a: T, b: T) -> T {
    // A comparison with NaN is false, and only NaN differs from itself.
    #[allow(clippy::eq_op)]
    if a >= b || a != a { a } else { b }
}

/// Largest element, negative infinity if there is none, NaN if one is.
#[inline(always)]
pub(crate) fn max_of<T: Float>(x: &[T]) -> T {
    let mut lanes = [T::NEG_INFINITY; LANES];
    let mut blocks = x.chunks_exact(LANES);
    for x in &mut blocks {
        for i in 0..LANES {
            lanes[i] = max_or_nan(lanes[i], x[i]);
        }
    }
    let mut largest = T::NEG_INFINITY;
    for x in lanes.into_iter().chain(blocks.remainder().iter().copied()) {
        largest = max_or_nan(largest, x);
    }
    largest
}
