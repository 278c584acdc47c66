//! Tiled softmax attention on the CPU: the tiles, packing and tasks of stick-breaking attention with another recurrence.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::SoftmaxSpec;
use crate::attention::gradients::TileGradients;
use crate::attention::pack::{DimBlocks, KeyBlocks, Rows, pack_panels, unpack_panels};
use crate::attention::schedule::{
    BackwardTask, KeyGradients, QueryTile, backward_tasks, interleave_heads, query_tiles, reduce_key_gradients, split,
};
use crate::attention::tile::{BLOCK, LANES, Lanes, PANELS, TILE_KEYS, Visible, accumulate, hide_future, scores};
use crate::attention::{AttentionGradients, AttentionInputs};
use crate::error::check_len;
use crate::{Float, Result};

const FORWARD: &str = "softmax attention";
const BACKWARD: &str = "softmax attention, backward";

/// Writes o (with `output_stride`) and the logsumexp of the scores, `[tokens, query_heads]`.
///
/// # Errors
/// Sizes that do not fit the layout, or wrong document offsets; nothing is written then.
pub fn forward<T: Float>(
    spec: &SoftmaxSpec,
    inputs: &AttentionInputs<'_, T>,
    o: &mut [T],
    logsumexp: &mut [T],
) -> Result<()> {
    let documents = spec.validate(FORWARD, inputs)?;
    let layout = &spec.layout;
    let (heads, width) = (layout.query_heads, layout.head_dim);
    layout.check_output(FORWARD, "o", o)?;
    check_len(FORWARD, "logsumexp", logsumexp, layout.tokens * heads)?;
    let k = Rows { data: inputs.k, stride: layout.key_stride, head_dim: width };
    let v = Rows { data: inputs.v, stride: layout.value_stride, head_dim: width };
    let pass = ForwardPass {
        spec,
        q: Rows { data: inputs.q, stride: layout.query_stride, head_dim: width },
        keys: KeyBlocks::new(k, layout.kv_heads, &documents),
        values: DimBlocks::new(v, layout.kv_heads, layout.tokens),
    };
    let tiles = query_tiles(&documents, heads, 1);
    let mut o_scratch = vec![T::ZERO; layout.tokens * heads * width];
    let mut lse_scratch = vec![T::ZERO; layout.tokens * heads];
    let o_pieces = split(&mut o_scratch, tiles.iter().map(|tile| tile.visible.rows * width));
    let lse_pieces = split(&mut lse_scratch, tiles.iter().map(|tile| tile.visible.rows));
    tiles.par_iter().zip(o_pieces).zip(lse_pieces).with_max_len(1).for_each_init(
        || ForwardScratch::new(width),
        |scratch, ((tile, o), logsumexp)| {
            let pass = &pass;
            Arch::new().dispatch(ForwardTask { pass, tile, scratch, o, logsumexp })
        },
    );
    interleave_heads(o, layout.output_stride, &o_scratch, width, heads, &documents);
    interleave_heads(logsumexp, heads, &lse_scratch, 1, heads, &documents);
    Ok(())
}

struct ForwardPass<'a, T> {
    spec: &'a SoftmaxSpec,
    q: Rows<'a, T>,
    keys: KeyBlocks<T>,
    values: DimBlocks<T>,
}

struct ForwardScratch<T> {
    queries: Vec<Lanes<T>>,
    z: Vec<Lanes<T>>,
    o: Vec<Lanes<T>>,
}

impl<T: Float> ForwardScratch<T> {
    fn new(head_dim: usize) -> Self {
        let lanes = |count: usize| vec![[T::ZERO; LANES]; count];
        Self {
            queries: lanes(PANELS * head_dim),
            z: lanes(TILE_KEYS),
            o: lanes(PANELS * head_dim.next_multiple_of(BLOCK)),
        }
    }
}

/// Subtracts slope * (i - j) from the scores of a panel's rows and a tile's keys.
#[inline(always)]
fn add_alibi<T: Float>(z: &mut [Lanes<T>], visible: Visible, panel: usize, first_key: usize, slope: T) {
    let row = visible.first_row + panel * LANES;
    for (key, z) in z.iter_mut().enumerate() {
        // Exact in float32 up to 2^24 tokens.
        let ahead = T::from_f64((first_key + key) as f64 - row as f64);
        for lane in 0..LANES {
            z[lane] = slope.mul_add(ahead - T::from_f64(lane as f64), z[lane]);
        }
    }
}

struct ForwardTask<'a, T> {
    pass: &'a ForwardPass<'a, T>,
    tile: &'a QueryTile,
    scratch: &'a mut ForwardScratch<T>,
    o: &'a mut [T],
    logsumexp: &'a mut [T],
}

impl<T: Float> WithSimd for ForwardTask<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { pass, tile, scratch, .. } = self;
        let visible = tile.visible;
        let width = pass.q.head_dim;
        let dim_blocks = width.div_ceil(BLOCK);
        let kv_head = pass.spec.layout.kv_head(tile.head);
        let slope = T::from_f64(pass.spec.slope(tile.head));
        pack_panels(&mut scratch.queries, pass.q, tile.head, tile.tokens(), T::from_f64(pass.spec.scale));
        scratch.o.fill([T::ZERO; LANES]);
        let mut largest = [[T::NEG_INFINITY; LANES]; PANELS];
        let mut sum = [[T::ZERO; LANES]; PANELS];
        // Oldest tile first: every row sees its document's first key, so the maximum is finite from the start.
        for key_tile in 0..visible.key_tiles() {
            let first_key = key_tile * TILE_KEYS;
            let token = tile.start + first_key;
            let key_blocks = pass.keys.from(kv_head, tile.document, first_key);
            for panel in 0..visible.panels() {
                let (seen, all) = visible.in_tile(panel, first_key);
                let z = &mut scratch.z[..seen.next_multiple_of(BLOCK)];
                scores(z, key_blocks, &scratch.queries[panel * width..][..width]);
                if slope != T::ZERO {
                    add_alibi(z, visible, panel, first_key, slope);
                }
                hide_future(z, all);
                let o = &mut scratch.o[panel * dim_blocks * BLOCK..][..dim_blocks * BLOCK];
                normalize(z, &mut largest[panel], &mut sum[panel], o);
                let (o, _) = o.as_chunks_mut::<BLOCK>();
                for (block, o) in o.iter_mut().enumerate() {
                    accumulate(o, pass.values.tokens(kv_head, block, token..token + seen), &z[..seen]);
                }
            }
        }
        for (o, sum) in scratch.o.chunks_mut(dim_blocks * BLOCK).zip(&sum[..visible.panels()]) {
            let inverse = sum.map(|sum| T::ONE / sum);
            for o in o {
                for lane in 0..LANES {
                    o[lane] *= inverse[lane];
                }
            }
        }
        unpack_panels(self.o, width, &scratch.o, T::ONE);
        let lanes = largest.as_flattened().iter().zip(sum.as_flattened());
        for (out, (&largest, &sum)) in self.logsumexp.iter_mut().zip(lanes) {
            *out = largest + sum.ln();
        }
    }
}

/// Replaces z by e^(z - largest so far) and rescales what was summed up under the earlier maximum.
#[inline(always)]
fn normalize<T: Float>(z: &mut [Lanes<T>], largest: &mut Lanes<T>, sum: &mut Lanes<T>, o: &mut [Lanes<T>]) {
    let mut new = *largest;
    for z in z.iter() {
        for lane in 0..LANES {
            new[lane] = if z[lane] > new[lane] { z[lane] } else { new[lane] };
        }
    }
    let mut shrink = [T::ZERO; LANES];
    for lane in 0..LANES {
        shrink[lane] = (largest[lane] - new[lane]).exp();
    }
    let mut total = *sum;
    for lane in 0..LANES {
        total[lane] *= shrink[lane];
    }
    for z in z.iter_mut() {
        for lane in 0..LANES {
            z[lane] = (z[lane] - new[lane]).exp();
        }
    }
    for z in z.iter() {
        for lane in 0..LANES {
            total[lane] += z[lane];
        }
    }
    for o in o {
        for lane in 0..LANES {
            o[lane] *= shrink[lane];
        }
    }
    *largest = new;
    *sum = total;
}

/// Writes the gradients of `sum(o * output_gradient)`. `o` and `logsumexp` are what [`forward`] wrote;
/// `output_gradient` has the layout of o.
///
/// # Errors
/// Sizes that do not fit the layout, or wrong document offsets; nothing is written then.
pub fn backward<T: Float>(
    spec: &SoftmaxSpec,
    inputs: &AttentionInputs<'_, T>,
    o: &[T],
    logsumexp: &[T],
    output_gradient: &[T],
    gradients: AttentionGradients<'_, T>,
) -> Result<()> {
    let documents = spec.validate(BACKWARD, inputs)?;
    let layout = &spec.layout;
    let (heads, width) = (layout.query_heads, layout.head_dim);
    layout.check_output(BACKWARD, "o", o)?;
    layout.check_output(BACKWARD, "output_gradient", output_gradient)?;
    check_len(BACKWARD, "logsumexp", logsumexp, layout.tokens * heads)?;
    layout.check_gradients(BACKWARD, &gradients)?;
    let tiles = query_tiles(&documents, heads, 1);
    let k = Rows { data: inputs.k, stride: layout.key_stride, head_dim: width };
    let v = Rows { data: inputs.v, stride: layout.value_stride, head_dim: width };
    let pass = BackwardPass {
        spec,
        tiles: &tiles,
        q: Rows { data: inputs.q, stride: layout.query_stride, head_dim: width },
        o: Rows { data: o, stride: layout.output_stride, head_dim: width },
        output_gradient: Rows { data: output_gradient, stride: layout.output_stride, head_dim: width },
        logsumexp,
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
    spec: &'a SoftmaxSpec,
    tiles: &'a [QueryTile],
    q: Rows<'a, T>,
    o: Rows<'a, T>,
    output_gradient: Rows<'a, T>,
    logsumexp: &'a [T],
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
        let layout = &pass.spec.layout;
        let width = layout.head_dim;
        let scale = T::from_f64(pass.spec.scale);
        let mut sums = KeyGradients::zero(task.keys, width);
        let mut scratch = TileGradients::new(width);
        for tile in &pass.tiles[task.tiles.clone()] {
            scratch.load(pass.q, pass.output_gradient, tile.head, tile.tokens(), scale);
            // Rows that do not exist get a logsumexp of infinity, hence no weight.
            let mut logsumexp = [[-T::NEG_INFINITY; LANES]; PANELS];
            let mut mean = [[T::ZERO; LANES]; PANELS];
            let lanes = logsumexp.as_flattened_mut().iter_mut().zip(mean.as_flattened_mut());
            for ((logsumexp, mean), token) in lanes.zip(tile.tokens()) {
                *logsumexp = pass.logsumexp[token * layout.query_heads + tile.head];
                let (o, d_o) = (pass.o.row(token, tile.head), pass.output_gradient.row(token, tile.head));
                *mean = o.iter().zip(d_o).map(|(&o, &d_o)| o * d_o).sum();
            }
            pass.tile(tile, task.kv_head, &logsumexp, &mean, &mut scratch, &mut sums);
            let (rows, rest) = dq.split_at_mut(tile.visible.rows * width);
            scratch.write_dq(rows, scale);
            dq = rest;
        }
        sums
    }
}

impl<T: Float> BackwardPass<'_, T> {
    #[inline(always)]
    fn tile(
        &self,
        tile: &QueryTile,
        kv_head: usize,
        logsumexp: &[Lanes<T>; PANELS],
        mean: &[Lanes<T>; PANELS],
        scratch: &mut TileGradients<T>,
        sums: &mut KeyGradients<T>,
    ) {
        let visible = tile.visible;
        let width = self.spec.layout.head_dim;
        let slope = T::from_f64(self.spec.slope(tile.head));
        for key_tile in 0..visible.key_tiles() {
            let first_key = key_tile * TILE_KEYS;
            let key_blocks = self.key_blocks.from(kv_head, tile.document, first_key);
            let value_blocks = self.value_blocks.from(kv_head, tile.document, first_key);
            for panel in 0..visible.panels() {
                let (seen, all) = visible.in_tile(panel, first_key);
                let count = seen.next_multiple_of(BLOCK);
                let TileGradients { queries, output_gradient, weights, dz, .. } = &mut *scratch;
                let weights = &mut weights[panel * TILE_KEYS..][..count];
                let dz = &mut dz[panel * TILE_KEYS..][..count];
                scores(weights, key_blocks, &queries[panel * width..][..width]);
                if slope != T::ZERO {
                    add_alibi(weights, visible, panel, first_key, slope);
                }
                hide_future(weights, all);
                scores(dz, value_blocks, &output_gradient[panel * width..][..width]);
                for (weights, dz) in weights.iter_mut().zip(dz) {
                    for lane in 0..LANES {
                        weights[lane] = (weights[lane] - logsumexp[panel][lane]).exp();
                        dz[lane] = weights[lane] * (dz[lane] - mean[panel][lane]);
                    }
                }
            }
            scratch.accumulate(&self.keys, kv_head, tile.start, visible, first_key, sums);
        }
    }
}
