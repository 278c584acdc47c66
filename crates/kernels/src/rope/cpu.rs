//! Rotary embedding on the CPU: tokens in parallel, one table of sines and cosines per token for all of its heads.

use rayon::prelude::*;

use super::RopeSpec;
use crate::error::{KernelError, Result, check_len};
use crate::float::Float;
use crate::parallel::rows_per_task;
use crate::simd::vectorize;

const OP: &str = "rope";

/// Rotates every head by its token's position, or back.
///
/// # Errors
/// An odd head dimension, or a slice whose length is not that of the spec.
pub fn rotate<T: Float>(spec: &RopeSpec, positions: &[u32], inverse: bool, x: &[T], out: &mut [T]) -> Result<()> {
    let RopeSpec { tokens, heads, head_dim, theta } = *spec;
    if !head_dim.is_multiple_of(2) {
        return Err(KernelError::size(OP, "head_dim", "even", head_dim));
    }
    let width = heads.saturating_mul(head_dim);
    check_len(OP, "positions", positions, tokens)?;
    check_len(OP, "x", x, tokens.saturating_mul(width))?;
    check_len(OP, "out", out, tokens.saturating_mul(width))?;
    if width == 0 {
        return Ok(());
    }
    let half = head_dim / 2;
    let frequencies: Vec<f64> = (0..half).map(|d| theta.powf(-2.0 * d as f64 / head_dim as f64)).collect();
    let block = rows_per_task(width);
    (positions.par_chunks(block), x.par_chunks(block * width), out.par_chunks_mut(block * width))
        .into_par_iter()
        .for_each(|(positions, x, out)| {
            let mut table = vec![(T::ZERO, T::ZERO); half];
            for ((&position, x), out) in positions.iter().zip(x.chunks_exact(width)).zip(out.chunks_exact_mut(width)) {
                for (entry, &frequency) in table.iter_mut().zip(&frequencies) {
                    let (sin, cos) = (f64::from(position) * frequency).sin_cos();
                    *entry = (T::from_f64(if inverse { -sin } else { sin }), T::from_f64(cos));
                }
                vectorize(
                    #[inline(always)]
                    || {
                        for (x, out) in x.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)) {
                            let (low, high) = x.split_at(half);
                            let (out_low, out_high) = out.split_at_mut(half);
                            let inputs = low.iter().zip(high).zip(&table);
                            for (((&a, &b), &(sin, cos)), (out_low, out_high)) in
                                inputs.zip(out_low.iter_mut().zip(out_high))
                            {
                                *out_low = a * cos - b * sin;
                                *out_high = b * cos + a * sin;
                            }
                        }
                    },
                );
            }
        });
    Ok(())
}
