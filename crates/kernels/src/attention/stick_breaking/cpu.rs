//! Tiled stick-breaking attention on the CPU.
//!
//! Forward: a task is one query tile of one head; it walks the key tiles from the newest to the oldest and carries what
//! is left of the stick. Backward: the same walk once more, which keeps one number per score of this query tile (scratch of
//! one task, as long as the document) and the remainder at each tile boundary; then a walk from the oldest key tile
//! upwards that rebuilds the weights and carries the sum of the older keys' a. A task takes a run of query tiles and sums
//! up dk and dv of their keys; the sums are added in a fixed order.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::stick::{LogRemainder, break_stick, recover_sticks, score_gradient, shorten_stick, split_sticks};
use super::{StickBreakingOutputs, StickBreakingSaved, StickBreakingSpec};
use crate::attention::gradients::TileGradients;
use crate::attention::pack::{DimBlocks, KeyBlocks, Rows, pack_panels, unpack_panels};
use crate::attention::schedule::{
    BackwardTask, KeyGradients, QueryTile, backward_tasks, interleave_heads, query_tiles, reduce_key_gradients, split,
};
use crate::attention::tile::{BLOCK, LANES, Lanes, PANELS, TILE_KEYS, accumulate, hide_future, scores};
use crate::attention::{AttentionGradients, AttentionInputs};
use crate::error::check_len;
use crate::{Float, Result};

const FORWARD: &str = "stick-breaking attention";
const BACKWARD: &str = "stick-breaking attention, backward";

/// Writes o, and rem and log2_rem if asked for. Returns what [`backward`] needs.
///
/// # Errors
/// Sizes that do not fit the layout, or wrong document offsets; nothing is written then.
pub fn forward<T: Float>(
    spec: &StickBreakingSpec,
    inputs: &AttentionInputs<'_, T>,
    outputs: StickBreakingOutputs<'_, T>,
) -> Result<StickBreakingSaved> {
    let documents = spec.validate(FORWARD, inputs)?;
    let layout = &spec.layout;
    let (heads, width) = (layout.query_heads, layout.head_dim);
    layout.check_output(FORWARD, "o", outputs.o)?;
    for (argument, slice) in [("rem", &outputs.rem), ("log2_rem", &outputs.log2_rem)] {
        if let Some(slice) = slice {
            check_len(FORWARD, argument, slice, layout.tokens * heads)?;
        }
    }
    let k = Rows { data: inputs.k, stride: layout.key_stride, head_dim: width };
    let v = Rows { data: inputs.v, stride: layout.value_stride, head_dim: width };
    let pass = ForwardPass {
        q: Rows { data: inputs.q, stride: layout.query_stride, head_dim: width },
        keys: KeyBlocks::new(k, layout.kv_heads, &documents),
        values: DimBlocks::new(v, layout.kv_heads, layout.tokens),
        scale: T::from_f64(spec.scale),
        threshold: early_exit_threshold(spec.early_exit_bits),
    };
    let tiles = query_tiles(&documents, heads, usize::from(spec.attend_current));

    let mut o = vec![T::ZERO; layout.tokens * heads * width];
    let mut rem = vec![T::ZERO; layout.tokens * heads];
    let mut log2_rem = vec![T::ZERO; if outputs.log2_rem.is_some() { layout.tokens * heads } else { 0 }];
    let rows = || tiles.iter().map(|tile| tile.visible.rows);
    let o_pieces = split(&mut o, rows().map(|rows| rows * width));
    let rem_pieces = split(&mut rem, rows());
    let with_log = outputs.log2_rem.is_some();
    let log_pieces = split(&mut log2_rem, rows().map(|rows| if with_log { rows } else { 0 }));
    let first_key_tiles: Vec<u32> = tiles
        .par_iter()
        .zip(o_pieces)
        .zip(rem_pieces)
        .zip(log_pieces)
        .with_max_len(1)
        .map_init(
            || ForwardScratch::new(width),
            |scratch, (((tile, o), rem), log2_rem)| {
                let kv_head = layout.kv_head(tile.head);
                let pass = &pass;
                Arch::new().dispatch(ForwardTask { pass, tile, kv_head, scratch, rem, log2_rem, o })
            },
        )
        .collect();

    interleave_heads(outputs.o, layout.output_stride, &o, width, heads, &documents);
    if let Some(out) = outputs.rem {
        interleave_heads(out, heads, &rem, 1, heads, &documents);
    }
    if let Some(out) = outputs.log2_rem {
        interleave_heads(out, heads, &log2_rem, 1, heads, &documents);
    }
    Ok(StickBreakingSaved::new(spec, &tiles, first_key_tiles))
}

/// 2^-k, or a number that no remainder is below.
pub(super) fn early_exit_threshold<T: Float>(bits: u32) -> T {
    if bits == 0 { T::ZERO } else { T::from_f64((-f64::from(bits)).exp2()) }
}

/// A whole stick for every row that exists. The others have none, so they take part in nothing.
#[inline(always)]
fn whole_sticks<T: Float>(panel: usize, rows: usize) -> Lanes<T> {
    std::array::from_fn(|lane| if panel * LANES + lane < rows { T::ONE } else { T::ZERO })
}

struct ForwardPass<'a, T> {
    q: Rows<'a, T>,
    keys: KeyBlocks<T>,
    values: DimBlocks<T>,
    scale: T,
    threshold: T,
}

struct ForwardScratch<T> {
    queries: Vec<Lanes<T>>,
    z: Vec<Lanes<T>>,
    keep: Vec<Lanes<T>>,
    weights: Vec<Lanes<T>>,
    o: Vec<Lanes<T>>,
}

impl<T: Float> ForwardScratch<T> {
    fn new(head_dim: usize) -> Self {
        let lanes = |count: usize| vec![[T::ZERO; LANES]; count];
        Self {
            queries: lanes(PANELS * head_dim),
            z: lanes(TILE_KEYS),
            keep: lanes(TILE_KEYS),
            weights: lanes(TILE_KEYS),
            o: lanes(PANELS * head_dim.next_multiple_of(BLOCK)),
        }
    }
}

/// One query tile of one head, and its pieces of the output scratch; `log2_rem` is empty if nobody wants it.
struct ForwardTask<'a, T> {
    pass: &'a ForwardPass<'a, T>,
    tile: &'a QueryTile,
    kv_head: usize,
    scratch: &'a mut ForwardScratch<T>,
    rem: &'a mut [T],
    log2_rem: &'a mut [T],
    o: &'a mut [T],
}

impl<T: Float> WithSimd for ForwardTask<'_, T> {
    /// The oldest key tile visited.
    type Output = u32;

    /// Walks the key tiles, newest first.
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> u32 {
        let Self { pass, tile, kv_head, scratch, .. } = self;
        let visible = tile.visible;
        let panels = visible.panels();
        let with_log = !self.log2_rem.is_empty();
        let head_dim = pass.q.head_dim;
        let dim_blocks = head_dim.div_ceil(BLOCK);
        pack_panels(&mut scratch.queries, pass.q, tile.head, tile.tokens(), pass.scale);
        let mut rem: [Lanes<T>; PANELS] = std::array::from_fn(|panel| whole_sticks(panel, visible.rows));
        let mut log_rem = [LogRemainder::<T>::ONE; PANELS];
        scratch.o.fill([T::ZERO; LANES]);
        let (o, _) = scratch.o.as_chunks_mut::<BLOCK>();
        let mut first = visible.key_tiles();
        while first > 0 {
            first -= 1;
            let first_key = first * TILE_KEYS;
            let token = tile.start + first_key;
            let key_blocks = pass.keys.from(kv_head, tile.document, first_key);
            for panel in 0..panels {
                let (seen, all) = visible.in_tile(panel, first_key);
                let z = &mut scratch.z[..seen.next_multiple_of(BLOCK)];
                let keep = &mut scratch.keep[..z.len()];
                scores(z, key_blocks, &scratch.queries[panel * head_dim..][..head_dim]);
                hide_future(z, all);
                if with_log {
                    log_rem[panel].take_scores(z);
                }
                split_sticks(z, keep);
                if with_log {
                    log_rem[panel].take_sticks(z, keep);
                }
                let weights = &mut scratch.weights[..z.len()];
                break_stick(z, keep, weights, &mut rem[panel]);
                for block in 0..dim_blocks {
                    let values = pass.values.tokens(kv_head, block, token..token + seen);
                    accumulate(&mut o[panel * dim_blocks + block], values, &weights[..seen]);
                }
            }
            if rem.as_flattened().iter().all(|&rem| rem < pass.threshold) {
                break;
            }
        }
        unpack_panels(self.o, head_dim, &scratch.o, T::ONE);
        for (out, &rem) in self.rem.iter_mut().zip(rem.as_flattened()) {
            *out = rem;
        }
        for (out, log_rem) in self.log2_rem.chunks_mut(LANES).zip(log_rem) {
            out.copy_from_slice(&log_rem.log2()[..out.len()]);
        }
        first as u32
    }
}

/// Writes the gradients of `sum(o * output_gradient) + sum(rem * rem_gradient)`. `output_gradient` has the layout of o,
/// `rem_gradient` is `[tokens, query_heads]` (None: zero), `saved` comes from [`forward`] with the same spec and inputs.
///
/// # Errors
/// Sizes that do not fit the layout, wrong document offsets, or the state of another call; nothing is written then.
pub fn backward<T: Float>(
    spec: &StickBreakingSpec,
    inputs: &AttentionInputs<'_, T>,
    output_gradient: &[T],
    rem_gradient: Option<&[T]>,
    saved: &StickBreakingSaved,
    gradients: AttentionGradients<'_, T>,
) -> Result<()> {
    let documents = spec.validate(BACKWARD, inputs)?;
    let layout = &spec.layout;
    let (heads, width) = (layout.query_heads, layout.head_dim);
    layout.check_output(BACKWARD, "output_gradient", output_gradient)?;
    if let Some(rem_gradient) = rem_gradient {
        check_len(BACKWARD, "rem_gradient", rem_gradient, layout.tokens * heads)?;
    }
    layout.check_gradients(BACKWARD, &gradients)?;
    let tiles = query_tiles(&documents, heads, usize::from(spec.attend_current));
    saved.check(BACKWARD, spec, &tiles)?;

    let k = Rows { data: inputs.k, stride: layout.key_stride, head_dim: width };
    let v = Rows { data: inputs.v, stride: layout.value_stride, head_dim: width };
    let pass = BackwardPass {
        spec,
        saved,
        tiles: &tiles,
        q: Rows { data: inputs.q, stride: layout.query_stride, head_dim: width },
        output_gradient: Rows { data: output_gradient, stride: layout.output_stride, head_dim: width },
        rem_gradient,
        key_blocks: KeyBlocks::new(k, layout.kv_heads, &documents),
        value_blocks: KeyBlocks::new(v, layout.kv_heads, &documents),
        keys: DimBlocks::new(k, layout.kv_heads, layout.tokens),
    };
    let tasks = backward_tasks(layout, &tiles);
    let mut dq = vec![T::ZERO; layout.tokens * heads * width];
    let task_rows = |task: &BackwardTask| tiles[task.tiles.clone()].iter().map(|tile| tile.visible.rows).sum::<usize>();
    let dq_pieces = split(&mut dq, tasks.iter().map(|task| task_rows(task) * width));
    let sums: Vec<KeyGradients<T>> = tasks
        .par_iter()
        .zip(dq_pieces)
        .with_max_len(1)
        .map(|(task, dq)| Arch::new().dispatch(BackwardRun { pass: &pass, task, dq }))
        .collect();
    interleave_heads(gradients.dq, heads * width, &dq, width, heads, &documents);
    reduce_key_gradients(layout, &documents, &tasks, &sums, gradients.dk, gradients.dv);
    Ok(())
}

struct BackwardPass<'a, T> {
    spec: &'a StickBreakingSpec,
    saved: &'a StickBreakingSaved,
    tiles: &'a [QueryTile],
    q: Rows<'a, T>,
    output_gradient: Rows<'a, T>,
    rem_gradient: Option<&'a [T]>,
    key_blocks: KeyBlocks<T>,
    value_blocks: KeyBlocks<T>,
    keys: DimBlocks<T>,
}

/// One backward task and its piece of the dq scratch.
struct BackwardRun<'a, T> {
    pass: &'a BackwardPass<'a, T>,
    task: &'a BackwardTask,
    dq: &'a mut [T],
}

impl<T: Float> WithSimd for BackwardRun<'_, T> {
    type Output = KeyGradients<T>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> KeyGradients<T> {
        let Self { pass, task, mut dq } = self;
        let width = pass.spec.layout.head_dim;
        let scale = T::from_f64(pass.spec.scale);
        let mut sums = KeyGradients::zero(task.keys, width);
        let mut scratch = BackwardScratch::new(width);
        for index in task.tiles.clone() {
            let tile = &pass.tiles[index];
            scratch.tile.load(pass.q, pass.output_gradient, tile.head, tile.tokens(), scale);
            let first = pass.saved.first_key_tile(index);
            let rem = pass.remainders(tile, task.kv_head, first, &mut scratch);
            pass.gradients(tile, task.kv_head, first, &rem, &mut scratch, &mut sums);
            let (rows, rest) = dq.split_at_mut(tile.visible.rows * width);
            scratch.tile.write_dq(rows, scale);
            dq = rest;
        }
        sums
    }
}

impl<T: Float> BackwardPass<'_, T> {
    /// Walks the key tiles from the newest one downwards: the sticks and the remainder before (nearer than) each key tile
    /// go to the scratch, the remainder after all of them is returned.
    #[inline(always)]
    fn remainders(
        &self,
        tile: &QueryTile,
        kv_head: usize,
        first: usize,
        scratch: &mut BackwardScratch<T>,
    ) -> [Lanes<T>; PANELS] {
        let visible = tile.visible;
        let width = self.spec.layout.head_dim;
        let mut rem: [Lanes<T>; PANELS] = std::array::from_fn(|panel| whole_sticks(panel, visible.rows));
        let key_tiles = visible.key_tiles() - first;
        if scratch.rem_before.len() < key_tiles {
            scratch.rem_before.resize(key_tiles, rem);
            scratch.sticks.resize(key_tiles * PANELS * TILE_KEYS, [T::ZERO; LANES]);
        }
        for key_tile in (first..visible.key_tiles()).rev() {
            let first_key = key_tile * TILE_KEYS;
            scratch.rem_before[key_tile - first] = rem;
            let keys = self.key_blocks.from(kv_head, tile.document, first_key);
            for panel in 0..visible.panels() {
                let (seen, all) = visible.in_tile(panel, first_key);
                let at = ((key_tile - first) * PANELS + panel) * TILE_KEYS;
                let z = &mut scratch.sticks[at..at + seen.next_multiple_of(BLOCK)];
                scores(z, keys, &scratch.tile.queries[panel * width..][..width]);
                hide_future(z, all);
                shorten_stick(z, &mut rem[panel]);
            }
        }
        rem
    }

    /// Walks the key tiles from the oldest visited one upwards.
    #[inline(always)]
    fn gradients(
        &self,
        tile: &QueryTile,
        kv_head: usize,
        first: usize,
        rem: &[Lanes<T>; PANELS],
        scratch: &mut BackwardScratch<T>,
        sums: &mut KeyGradients<T>,
    ) {
        let visible = tile.visible;
        let width = self.spec.layout.head_dim;
        let mut delta = [[T::ZERO; LANES]; PANELS];
        if let Some(rem_gradient) = self.rem_gradient {
            let lanes = delta.as_flattened_mut().iter_mut().zip(rem.as_flattened());
            for ((delta, &rem), token) in lanes.zip(tile.tokens()) {
                *delta = rem_gradient[token * self.spec.layout.query_heads + tile.head] * rem;
            }
        }
        for key_tile in first..visible.key_tiles() {
            let first_key = key_tile * TILE_KEYS;
            let value_blocks = self.value_blocks.from(kv_head, tile.document, first_key);
            for panel in 0..visible.panels() {
                let (seen, all) = visible.in_tile(panel, first_key);
                let count = seen.next_multiple_of(BLOCK);
                let TileGradients { output_gradient, weights, dz, .. } = &mut scratch.tile;
                let (beta, keep) = (&mut scratch.beta[..count], &mut scratch.keep[..count]);
                let weights = &mut weights[panel * TILE_KEYS..][..count];
                let dz = &mut dz[panel * TILE_KEYS..][..count];
                let at = ((key_tile - first) * PANELS + panel) * TILE_KEYS;
                recover_sticks(&scratch.sticks[at..at + count], beta, keep, all);
                break_stick(beta, keep, weights, &mut scratch.rem_before[key_tile - first][panel]);
                scores(dz, value_blocks, &output_gradient[panel * width..][..width]);
                score_gradient(dz, weights, beta, keep, &mut delta[panel]);
            }
            scratch.tile.accumulate(&self.keys, kv_head, tile.start, visible, first_key, sums);
        }
    }
}

struct BackwardScratch<T> {
    tile: TileGradients<T>,
    beta: Vec<Lanes<T>>,
    keep: Vec<Lanes<T>>,
    /// What is left of the stick before each key tile.
    rem_before: Vec<[Lanes<T>; PANELS]>,
    /// beta and 1 - beta of the query tile, packed, `[key tile][panel][key][row]`: as long as the document.
    sticks: Vec<Lanes<T>>,
}

impl<T: Float> BackwardScratch<T> {
    fn new(head_dim: usize) -> Self {
        let lanes = |count: usize| vec![[T::ZERO; LANES]; count];
        Self {
            tile: TileGradients::new(head_dim),
            beta: lanes(TILE_KEYS),
            keep: lanes(TILE_KEYS),
            rem_before: Vec::new(),
            sticks: Vec::new(),
        }
    }
}
