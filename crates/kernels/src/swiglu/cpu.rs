//! SwiGLU on the CPU.

use rayon::prelude::*;

use crate::error::{Result, check_len};
use crate::float::Float;
use crate::parallel::{TASK, chunks_or_none};
use crate::simd::vectorize;

const OP: &str = "swiglu";

/// `out = silu(gate) * up`.
///
/// # Errors
/// Slices of different lengths.
pub fn forward<T: Float>(gate: &[T], up: &[T], out: &mut [T]) -> Result<()> {
    check_len(OP, "up", up, gate.len())?;
    check_len(OP, "out", out, gate.len())?;
    (gate.par_chunks(TASK), up.par_chunks(TASK), out.par_chunks_mut(TASK)).into_par_iter().for_each(
        |(gate, up, out)| {
            vectorize(
                #[inline(always)]
                || {
                    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
                        *out = gate * gate.sigmoid() * up;
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
/// Slices of different lengths.
pub fn backward<T: Float>(
    gate: &[T],
    up: &[T],
    dout: &[T],
    dgate: Option<&mut [T]>,
    dup: Option<&mut [T]>,
) -> Result<()> {
    check_len(OP, "up", up, gate.len())?;
    check_len(OP, "dout", dout, gate.len())?;
    if let Some(dgate) = &dgate {
        check_len(OP, "dgate", dgate, gate.len())?;
    }
    if let Some(dup) = &dup {
        check_len(OP, "dup", dup, gate.len())?;
    }
    let tasks = gate.len().div_ceil(TASK);
    let (dgate, dup) = (chunks_or_none(dgate, TASK, tasks), chunks_or_none(dup, TASK, tasks));
    (gate.par_chunks(TASK), up.par_chunks(TASK), dout.par_chunks(TASK), dgate, dup).into_par_iter().for_each(
        |(gate, up, dout, dgate, dup)| {
            vectorize(
                #[inline(always)]
                || match (dgate, dup) {
                    (Some(dgate), Some(dup)) => {
                        let gradients = dgate.iter_mut().zip(dup);
                        for (((&gate, &up), &dout), (dgate, dup)) in gate.iter().zip(up).zip(dout).zip(gradients) {
                            let s = gate.sigmoid();
                            *dgate = dout * up * s * (T::ONE - s).mul_add(gate, T::ONE);
                            *dup = dout * gate * s;
                        }
                    }
                    (Some(dgate), None) => {
                        for (((&gate, &up), &dout), dgate) in gate.iter().zip(up).zip(dout).zip(dgate) {
                            let s = gate.sigmoid();
                            *dgate = dout * up * s * (T::ONE - s).mul_add(gate, T::ONE);
                        }
                    }
                    (None, Some(dup)) => {
                        for ((&gate, &dout), dup) in gate.iter().zip(dout).zip(dup) {
                            *dup = dout * gate * gate.sigmoid();
                        }
                    }
                    (None, None) => {}
                },
            );
        },
    );
    Ok(())
}
