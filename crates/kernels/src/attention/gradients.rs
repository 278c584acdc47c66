//! The part of a backward pass that both attentions share: from the weights A and the score gradients dz of one tile to
//! dq, dk and dv.

use std::ops::Range;

use super::pack::{DimBlocks, Rows, pack_panels, pack_rows, unpack_panels};
use super::schedule::KeyGradients;
use super::tile::{BLOCK, LANES, Lanes, PANELS, TILE_KEYS, TILE_ROWS, Visible, accumulate, accumulate_rows};
use crate::Float;

/// One query tile's operands, and A and dz of the key tile at hand. Held once per task and reused from tile to tile.
pub(super) struct TileGradients<T> {
    head_dim: usize,
    /// Scaled queries, `[panel][dim][row]`.
    pub queries: Vec<Lanes<T>>,
    /// Gradient of the output, `[panel][dim][row]`.
    pub output_gradient: Vec<Lanes<T>>,
    query_rows: Vec<Lanes<T>>,
    output_gradient_rows: Vec<Lanes<T>>,
    /// Attention weights, `[panel][key][row]`; zero where a row does not see a key.
    pub weights: Vec<Lanes<T>>,
    /// Gradient of the scores, `[panel][key][row]`; zero where a row does not see a key.
    pub dz: Vec<Lanes<T>>,
    dq: Vec<Lanes<T>>,
}

impl<T: Float> TileGradients<T> {
    pub fn new(head_dim: usize) -> Self {
        let lanes = |count: usize| vec![[T::ZERO; LANES]; count];
        Self {
            head_dim,
            queries: lanes(PANELS * head_dim),
            output_gradient: lanes(PANELS * head_dim),
            query_rows: lanes(head_dim.div_ceil(LANES) * TILE_ROWS),
            output_gradient_rows: lanes(head_dim.div_ceil(LANES) * TILE_ROWS),
            weights: lanes(PANELS * TILE_KEYS),
            dz: lanes(PANELS * TILE_KEYS),
            dq: lanes(PANELS * head_dim.next_multiple_of(BLOCK)),
        }
    }

    /// Takes in the queries (times `scale`) and the output gradient of a tile and starts its dq at zero.
    #[inline(always)]
    pub fn load(&mut self, q: Rows<'_, T>, output_gradient: Rows<'_, T>, head: usize, tokens: Range<usize>, scale: T) {
        pack_panels(&mut self.queries, q, head, tokens.clone(), scale);
        pack_panels(&mut self.output_gradient, output_gradient, head, tokens.clone(), T::ONE);
        pack_rows(&mut self.query_rows, TILE_ROWS, q, head, tokens.clone(), scale);
        pack_rows(&mut self.output_gradient_rows, TILE_ROWS, output_gradient, head, tokens, T::ONE);
        self.dq.fill([T::ZERO; LANES]);
    }

    /// Adds the key tile's share to dq, and this query tile's share to the dk and dv of the tile's keys.
    #[inline(always)]
    pub fn accumulate(
        &mut self,
        keys: &DimBlocks<T>,
        kv_head: usize,
        start: usize,
        visible: Visible,
        first_key: usize,
        sums: &mut KeyGradients<T>,
    ) {
        let dim_blocks = self.head_dim.div_ceil(BLOCK);
        let (dq, _) = self.dq.as_chunks_mut::<BLOCK>();
        for panel in 0..visible.panels() {
            let (seen, _) = visible.in_tile(panel, first_key);
            let dz = &self.dz[panel * TILE_KEYS..][..seen];
            let first = start + first_key;
            for block in 0..dim_blocks {
                let keys = keys.tokens(kv_head, block, first..first + seen);
                accumulate(&mut dq[panel * dim_blocks + block], keys, dz);
            }
        }
        let seen = (visible.tile_end() - first_key).min(TILE_KEYS);
        for block in 0..seen.div_ceil(BLOCK) {
            let key = block * BLOCK;
            let first_panel =
                (0..PANELS).find(|&panel| visible.in_tile(panel, first_key).0 > key).unwrap_or(visible.panels());
            let panels = first_panel..visible.panels();
            for (weights, rows, sums, stride) in [
                (&self.weights, &self.output_gradient_rows, &mut sums.dv, sums.keys),
                (&self.dz, &self.query_rows, &mut sums.dk, sums.keys),
            ] {
                let (weights, _) = weights.as_chunks::<BLOCK>();
                let (rows, _) = rows.as_chunks::<LANES>();
                for dims in 0..self.head_dim.div_ceil(LANES) {
                    let sums = &mut sums[dims * stride + first_key + key..][..BLOCK];
                    let Ok(sums) = <&mut [Lanes<T>; BLOCK]>::try_from(sums) else { continue };
                    for panel in panels.clone() {
                        let weights = &weights[panel * (TILE_KEYS / BLOCK) + block];
                        accumulate_rows(sums, weights, &rows[dims * PANELS + panel]);
                    }
                }
            }
        }
    }

    /// Writes the finished dq, times `scale`, as rows `[row][dim]`.
    #[inline(always)]
    pub fn write_dq(&self, rows: &mut [T], scale: T) {
        unpack_panels(rows, self.head_dim, &self.dq, scale);
    }
}
