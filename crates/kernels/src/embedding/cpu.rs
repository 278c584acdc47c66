//! Embedding on the CPU. The backward pass sorts the tokens by id, so that each task owns some rows of the table.

use rayon::prelude::*;

use super::EmbeddingSpec;
use crate::error::{KernelError, Result, check_len};
use crate::float::Float;
use crate::parallel::rows_per_task;
use crate::simd::vectorize;

const OP: &str = "embedding";

fn check_ids(spec: &EmbeddingSpec, ids: &[u32]) -> Result<()> {
    check_len(OP, "ids", ids, spec.tokens)?;
    match ids.iter().position(|&id| id as usize >= spec.vocabulary) {
        None => Ok(()),
        Some(position) => Err(KernelError::Index {
            op: OP,
            what: "ids",
            position,
            value: i64::from(ids[position]),
            allowed: format!("below the vocabulary of {}", spec.vocabulary),
        }),
    }
}

/// Gathers rows of the table.
///
/// # Errors
/// An id outside of the vocabulary, or a slice whose length is not that of the spec.
pub fn forward<T: Float>(spec: &EmbeddingSpec, ids: &[u32], table: &[T], out: &mut [T]) -> Result<()> {
    let EmbeddingSpec { tokens, vocabulary, width } = *spec;
    check_len(OP, "table", table, vocabulary.saturating_mul(width))?;
    check_len(OP, "out", out, tokens.saturating_mul(width))?;
    check_ids(spec, ids)?;
    if width == 0 {
        return Ok(());
    }
    let block = rows_per_task(width);
    ids.par_chunks(block).zip(out.par_chunks_mut(block * width)).for_each(|(ids, out)| {
        for (&id, out) in ids.iter().zip(out.chunks_exact_mut(width)) {
            out.copy_from_slice(&table[id as usize * width..][..width]);
        }
    });
    Ok(())
}

/// Adds the gradient of every token to its row of `dtable`.
///
/// # Errors
/// An id outside of the vocabulary, or a slice whose length is not that of the spec.
pub fn backward<T: Float>(spec: &EmbeddingSpec, ids: &[u32], dout: &[T], dtable: &mut [T]) -> Result<()> {
    let EmbeddingSpec { tokens, vocabulary, width } = *spec;
    check_len(OP, "dout", dout, tokens.saturating_mul(width))?;
    check_len(OP, "dtable", dtable, vocabulary.saturating_mul(width))?;
    check_ids(spec, ids)?;
    if width == 0 {
        return Ok(());
    }
    // All pairs differ, so the order is unique: by id, then by token.
    let mut by_id: Vec<(u32, usize)> = ids.iter().copied().zip(0..).collect();
    by_id.par_sort_unstable();
    let block = rows_per_task(width);
    dtable.par_chunks_mut(block * width).enumerate().for_each(|(task, dtable)| {
        let first = task * block;
        let start = by_id.partition_point(|&(id, _)| (id as usize) < first);
        let length = by_id[start..].partition_point(|&(id, _)| (id as usize) < first + block);
        vectorize(
            #[inline(always)]
            || {
                for &(id, token) in &by_id[start..start + length] {
                    let row = &mut dtable[(id as usize - first) * width..][..width];
                    for (sum, &gradient) in row.iter_mut().zip(&dout[token * width..]) {
                        *sum += gradient;
                    }
                }
            },
        );
    });
    Ok(())
}
