//! Copies of keys, values and query tiles in the orders that the products of `tile.rs` stream through.

use std::ops::Range;

use rayon::prelude::*;

use super::tile::{BLOCK, LANES, Lanes};
use crate::Float;

/// Keys or values of all tokens, `[token, head, dim]` with a token stride.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a, T> {
    pub data: &'a [T],
    pub stride: usize,
    pub head_dim: usize,
}

impl<'a, T> Rows<'a, T> {
    #[inline(always)]
    pub fn row(&self, token: usize, head: usize) -> &'a [T] {
        &self.data[token * self.stride + head * self.head_dim..][..self.head_dim]
    }
}

/// For sums over dims: `[head][block of keys][dim][key in block]`. A document's blocks start at its first key; the last
/// one is filled with zeros, so that a block never reaches into the next document.
pub(super) struct KeyBlocks<T> {
    data: Vec<[T; BLOCK]>,
    first_block: Vec<usize>,
    blocks: usize,
    head_dim: usize,
}

impl<T: Float> KeyBlocks<T> {
    pub fn new(rows: Rows<'_, T>, heads: usize, documents: &[Range<usize>]) -> Self {
        let mut first_block = Vec::with_capacity(documents.len());
        let mut tokens = Vec::new();
        for document in documents {
            first_block.push(tokens.len());
            tokens.extend(document.clone().step_by(BLOCK).map(|first| first..document.end.min(first + BLOCK)));
        }
        let (blocks, head_dim) = (tokens.len(), rows.head_dim);
        let mut data = vec![[T::ZERO; BLOCK]; heads * blocks * head_dim];
        data.par_chunks_mut(head_dim).with_min_len(16).enumerate().for_each(|(index, block)| {
            let (head, block_index) = (index / blocks, index % blocks);
            let tokens = tokens[block_index].clone();
            if tokens.len() == BLOCK {
                let keys: [&[T]; BLOCK] = std::array::from_fn(|m| rows.row(tokens.start + m, head));
                for (dim, entry) in block.iter_mut().enumerate() {
                    *entry = std::array::from_fn(|m| keys[m][dim]);
                }
            } else {
                for (m, token) in tokens.enumerate() {
                    for (entry, &x) in block.iter_mut().zip(rows.row(token, head)) {
                        entry[m] = x;
                    }
                }
            }
        });
        Self { data, first_block, blocks, head_dim }
    }

    /// The blocks of a document from `first_key` (a multiple of [`BLOCK`]) to the last one of the head.
    #[inline(always)]
    pub fn from(&self, head: usize, document: usize, first_key: usize) -> &[[T; BLOCK]] {
        let first = head * self.blocks + self.first_block[document] + first_key / BLOCK;
        &self.data[first * self.head_dim..(head + 1) * self.blocks * self.head_dim]
    }
}

/// For sums over keys: `[head][block of dims][token][dim in block]`, the last block filled with zeros.
pub(super) struct DimBlocks<T> {
    data: Vec<[T; BLOCK]>,
    tokens: usize,
    blocks: usize,
}

impl<T: Float> DimBlocks<T> {
    pub fn new(rows: Rows<'_, T>, heads: usize, tokens: usize) -> Self {
        let blocks = rows.head_dim.div_ceil(BLOCK);
        let mut data = vec![[T::ZERO; BLOCK]; heads * blocks * tokens];
        if tokens > 0 {
            data.par_chunks_mut(tokens).enumerate().for_each(|(index, column)| {
                let (head, first) = (index / blocks, index % blocks * BLOCK);
                let width = BLOCK.min(rows.head_dim - first);
                for (token, entry) in column.iter_mut().enumerate() {
                    entry[..width].copy_from_slice(&rows.row(token, head)[first..first + width]);
                }
            });
        }
        Self { data, tokens, blocks }
    }

    /// One block of dims of a range of tokens.
    #[inline(always)]
    pub fn tokens(&self, head: usize, block: usize, tokens: Range<usize>) -> &[[T; BLOCK]] {
        let start = (head * self.blocks + block) * self.tokens;
        &self.data[start + tokens.start..start + tokens.end]
    }
}

/// Transposes a query tile into panels, `[panel][dim][row]`, times `factor`; rows that do not exist are zero.
#[inline(always)]
pub(super) fn pack_panels<T: Float>(
    panels: &mut [Lanes<T>],
    rows: Rows<'_, T>,
    head: usize,
    tokens: Range<usize>,
    factor: T,
) {
    panels.fill([T::ZERO; LANES]);
    for (row, token) in tokens.enumerate() {
        let panel = &mut panels[row / LANES * rows.head_dim..][..rows.head_dim];
        for (entry, &x) in panel.iter_mut().zip(rows.row(token, head)) {
            entry[row % LANES] = x * factor;
        }
    }
}

/// Copies a query tile for sums over its rows, `[block of LANES dims][row][dim in block]` with `stride` rows per block,
/// times `factor`; rows and dims that do not exist are zero.
#[inline(always)]
pub(super) fn pack_rows<T: Float>(
    packed: &mut [Lanes<T>],
    stride: usize,
    rows: Rows<'_, T>,
    head: usize,
    tokens: Range<usize>,
    factor: T,
) {
    packed.fill([T::ZERO; LANES]);
    for (row, token) in tokens.enumerate() {
        for (block, source) in rows.row(token, head).chunks(LANES).enumerate() {
            for (entry, &x) in packed[block * stride + row].iter_mut().zip(source) {
                *entry = x * factor;
            }
        }
    }
}

/// Writes panels `[panel][dim, padded to whole blocks][row]` back as rows `[row][dim]`, times `factor`.
#[inline(always)]
pub(super) fn unpack_panels<T: Float>(rows: &mut [T], head_dim: usize, panels: &[Lanes<T>], factor: T) {
    let padded = head_dim.next_multiple_of(BLOCK);
    for (row, out) in rows.chunks_exact_mut(head_dim).enumerate() {
        let panel = &panels[row / LANES * padded..][..head_dim];
        for (x, entry) in out.iter_mut().zip(panel) {
            *x = entry[row % LANES] * factor;
        }
    }
}
