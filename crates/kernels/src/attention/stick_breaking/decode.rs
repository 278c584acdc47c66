//! Stick-breaking attention of one new query per sequence against cached keys and values, and the rule by which partial
//! results compose.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::stick::split_sticks;
use crate::attention::decode::{DecodeInputs, DecodeLayout, DecodeTask, add_values, tile_scores};
use crate::attention::tile::{LANES, TILE_KEYS};
use crate::error::check_len;
use crate::{Float, KernelError, Result};

const OP: &str = "stick-breaking attention, decode";

/// Keys that one task reads at most, without early exit: pieces are computed in parallel and composed.
const PIECE: usize = 12 * TILE_KEYS;

/// What to compute. Whether the query sees its own key is up to the cache and its length.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StickBreakingDecodeSpec {
    /// Sizes and strides.
    pub layout: DecodeLayout,
    /// Factor of q . k; 1 / sqrt(head_dim) by default.
    pub scale: f64,
    /// k: older keys are not read once all query heads of a key head have rem < 2^-k. 0 switches this off, and then the
    /// cache of one sequence is read by several threads.
    pub early_exit_bits: u32,
}

impl StickBreakingDecodeSpec {
    /// Scale 1 / sqrt(head_dim), no early exit.
    pub fn new(layout: DecodeLayout) -> Self {
        Self { layout, scale: 1.0 / (layout.head_dim.max(1) as f64).sqrt(), early_exit_bits: 0 }
    }
}

/// Writes o `[sequences, query_heads, head_dim]` and rem `[sequences, query_heads]`, both contiguous.
///
/// # Errors
/// Sizes that do not fit the layout, or a length beyond the capacity; nothing is written then.
pub fn decode<T: Float>(
    spec: &StickBreakingDecodeSpec,
    inputs: &DecodeInputs<'_, T>,
    o: &mut [T],
    rem: &mut [T],
) -> Result<()> {
    let layout = &spec.layout;
    if !spec.scale.is_finite() {
        return Err(KernelError::size(OP, "scale", "finite", spec.scale));
    }
    let lengths = layout.check(OP, inputs, o)?;
    check_len(OP, "rem", rem, layout.sequences * layout.query_heads)?;
    let tasks = layout.tasks(&lengths, if spec.early_exit_bits == 0 { PIECE } else { usize::MAX });
    let parts: Vec<(Vec<T>, Vec<T>)> =
        tasks.par_iter().with_max_len(1).map(|task| Arch::new().dispatch(Part { spec, inputs, task })).collect();
    o.fill(T::ZERO);
    rem.fill(T::ONE);
    for (task, (part_o, part_rem)) in tasks.iter().zip(&parts) {
        let first = task.sequence * layout.query_heads + task.kv_head * layout.group();
        let heads = first..first + layout.group();
        let nearer = &mut o[heads.start * layout.head_dim..heads.end * layout.head_dim];
        compose((nearer, &mut rem[heads]), (part_o, part_rem))?;
    }
    Ok(())
}

/// Joins the results of two neighbouring runs of keys, in place of the nearer (newer) one: for each row
/// `o = o_near + rem_near * o_far` and `rem = rem_near * rem_far`. Associative; the neutral element is (0, 1).
///
/// Each side is `(o [rows, width], rem [rows])`; both sides must have the same sizes.
///
/// # Errors
/// If they have not; nothing is written then.
pub fn compose<T: Float>(nearer: (&mut [T], &mut [T]), farther: (&[T], &[T])) -> Result<()> {
    const OP: &str = "stick-breaking compose";
    let ((o, rem), (farther_o, farther_rem)) = (nearer, farther);
    check_len(OP, "farther o", farther_o, o.len())?;
    check_len(OP, "farther rem", farther_rem, rem.len())?;
    if !o.len().is_multiple_of(rem.len().max(1)) {
        return Err(KernelError::size(OP, "the length of o", format!("a multiple of the {} rows", rem.len()), o.len()));
    }
    let width = o.len() / rem.len().max(1);
    for (row, (rem, &farther_rem)) in rem.iter_mut().zip(farther_rem).enumerate() {
        let range = row * width..(row + 1) * width;
        for (o, &farther) in o[range.clone()].iter_mut().zip(&farther_o[range]) {
            *o = rem.mul_add(farther, *o);
        }
        *rem *= farther_rem;
    }
    Ok(())
}

struct Part<'a, T> {
    spec: &'a StickBreakingDecodeSpec,
    inputs: &'a DecodeInputs<'a, T>,
    task: &'a DecodeTask,
}

impl<T: Float> WithSimd for Part<'_, T> {
    /// o `[group, head_dim]` and rem `[group]` of the task's keys.
    type Output = (Vec<T>, Vec<T>);

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Self::Output {
        let Self { spec, inputs, task } = self;
        let layout = &spec.layout;
        let threshold = super::cpu::early_exit_threshold::<T>(spec.early_exit_bits);
        let mut o = vec![T::ZERO; layout.group() * layout.head_dim];
        let mut rem = vec![T::ONE; layout.group()];
        for tile in task.tiles().rev() {
            for (member, (o, rem)) in o.chunks_exact_mut(layout.head_dim).zip(&mut rem).enumerate() {
                let query = layout.query(inputs.q, task, member);
                let mut weights = tile_scores(layout, task, tile.clone(), query, inputs.k, T::from_f64(spec.scale));
                let mut keep = [[T::ZERO; LANES]; TILE_KEYS / LANES];
                split_sticks(&mut weights, &mut keep);
                for (weight, &keep) in weights.as_flattened_mut().iter_mut().zip(keep.as_flattened()).rev() {
                    *weight *= *rem;
                    *rem *= keep;
                }
                add_values(layout, task, tile.clone(), &weights, inputs.v, o);
            }
            if rem.iter().all(|&rem| rem < threshold) {
                break;
            }
        }
        (o, rem)
    }
}
