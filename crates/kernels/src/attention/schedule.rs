//! How attention is cut into tasks: by shape alone, so that the result does not depend on the number of threads.
//!
//! Tasks write to scratch in the order (document, head, row), where every task owns one contiguous piece; a second,
//! cheap pass puts the heads of a token next to each other.

use std::ops::Range;

use rayon::prelude::*;

use super::AttentionLayout;
use super::tile::{BLOCK, LANES, Lanes, TILE_ROWS, Visible};
use crate::Float;

/// One query tile of one head of one document.
#[derive(Debug, Clone, Copy)]
pub(super) struct QueryTile {
    pub document: usize,
    /// First token of the document.
    pub start: usize,
    pub head: usize,
    pub visible: Visible,
}

impl QueryTile {
    /// The tile's tokens, counted over all documents.
    #[inline(always)]
    pub fn tokens(&self) -> Range<usize> {
        let first = self.start + self.visible.first_row;
        first..first + self.visible.rows
    }
}

/// All query tiles in the order of the scratch: document, head, row.
pub(super) fn query_tiles(documents: &[Range<usize>], heads: usize, own_key: usize) -> Vec<QueryTile> {
    let mut tiles = Vec::new();
    for (document, range) in documents.iter().enumerate() {
        for head in 0..heads {
            for first_row in (0..range.len()).step_by(TILE_ROWS) {
                let rows = TILE_ROWS.min(range.len() - first_row);
                let visible = Visible { first_row, rows, own_key };
                tiles.push(QueryTile { document, start: range.start, head, visible });
            }
        }
    }
    tiles
}

/// Cuts a slice into pieces of the given lengths, in order.
pub(super) fn split<T>(mut slice: &mut [T], lengths: impl Iterator<Item = usize>) -> Vec<&mut [T]> {
    let mut pieces = Vec::new();
    for length in lengths {
        let (piece, rest) = std::mem::take(&mut slice).split_at_mut(length);
        pieces.push(piece);
        slice = rest;
    }
    pieces
}

/// From scratch `[document][head][row][width]` to `[token][head][width]` with a token stride.
pub(super) fn interleave_heads<T: Float>(
    out: &mut [T],
    stride: usize,
    scratch: &[T],
    width: usize,
    heads: usize,
    documents: &[Range<usize>],
) {
    out.par_chunks_mut(stride).with_min_len(64).enumerate().for_each(|(token, row)| {
        // The last chunk may be what a strided slice holds beyond the last token.
        let Some(range) = document_of(documents, token) else { return };
        let base = range.start * heads * width;
        for (head, out) in row[..heads * width].chunks_exact_mut(width).enumerate() {
            let from = base + (head * range.len() + token - range.start) * width;
            out.copy_from_slice(&scratch[from..from + width]);
        }
    });
}

fn document_of(documents: &[Range<usize>], token: usize) -> Option<&Range<usize>> {
    documents.get(documents.partition_point(|range| range.end <= token))
}

/// Query tiles whose key gradients one task sums up: neighbours in scratch order, of one document and one key head.
pub(super) struct BackwardTask {
    pub tiles: Range<usize>,
    pub document: usize,
    pub kv_head: usize,
    /// Keys that the tiles see, rounded up to whole blocks.
    pub keys: usize,
}

/// Tasks that a backward pass is cut into when the documents and heads alone would give fewer. More tasks balance
/// better and cost memory: every task beyond one per document and key head holds key gradients of its own.
const BACKWARD_TASKS: usize = 16;

/// Cuts the tiles into backward tasks of similar work.
pub(super) fn backward_tasks(layout: &AttentionLayout, tiles: &[QueryTile]) -> Vec<BackwardTask> {
    let work = |tile: &QueryTile| tile.visible.rows * (tile.visible.tile_end() + TILE_ROWS);
    let share = tiles.iter().map(work).sum::<usize>().div_ceil(BACKWARD_TASKS);
    let mut tasks: Vec<BackwardTask> = Vec::new();
    let mut filled = 0;
    for (index, tile) in tiles.iter().enumerate() {
        let kv_head = layout.kv_head(tile.head);
        let keys = tile.visible.tile_end().next_multiple_of(BLOCK);
        match tasks.last_mut() {
            Some(task)
                if (task.document, task.kv_head) == (tile.document, kv_head) && filled + work(tile) / 2 <= share =>
            {
                task.tiles.end = index + 1;
                task.keys = task.keys.max(keys);
                filled += work(tile);
            }
            _ => {
                tasks.push(BackwardTask { tiles: index..index + 1, document: tile.document, kv_head, keys });
                filled = work(tile);
            }
        }
    }
    tasks
}

/// Gradients of keys and values that one backward task has summed up, each `[block of LANES dims][key][dim in block]`.
pub(super) struct KeyGradients<T> {
    pub dk: Vec<Lanes<T>>,
    pub dv: Vec<Lanes<T>>,
    pub keys: usize,
}

impl<T: Float> KeyGradients<T> {
    pub fn zero(keys: usize, head_dim: usize) -> Self {
        let length = head_dim.div_ceil(LANES) * keys;
        Self { dk: vec![[T::ZERO; LANES]; length], dv: vec![[T::ZERO; LANES]; length], keys }
    }
}

/// Adds up the tasks' key gradients, in task order, into dk and dv `[token, kv_head, head_dim]`.
pub(super) fn reduce_key_gradients<T: Float>(
    layout: &AttentionLayout,
    documents: &[Range<usize>],
    tasks: &[BackwardTask],
    sums: &[KeyGradients<T>],
    dk: &mut [T],
    dv: &mut [T],
) {
    let (heads, width) = (layout.kv_heads, layout.head_dim);
    let reduce = |out: &mut [T], pick: &(dyn Fn(&KeyGradients<T>) -> &[Lanes<T>] + Sync)| {
        out.par_chunks_mut(heads * width).with_min_len(64).enumerate().for_each(|(token, row)| {
            row.fill(T::ZERO);
            let document = documents.partition_point(|range| range.end <= token);
            let key = token - documents[document].start;
            let first = tasks.partition_point(|task| task.document < document);
            for (task, sums) in tasks[first..].iter().zip(&sums[first..]).take_while(|(t, _)| t.document == document) {
                if key >= sums.keys {
                    continue;
                }
                let head = &mut row[task.kv_head * width..][..width];
                for (block, out) in head.chunks_mut(LANES).enumerate() {
                    for (x, &part) in out.iter_mut().zip(&pick(sums)[block * sums.keys + key]) {
                        *x += part;
                    }
                }
            }
        });
    };
    reduce(dk, &|sums| &sums.dk);
    reduce(dv, &|sums| &sums.dv);
}
