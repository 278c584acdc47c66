//! One query per sequence against a cache of keys and values: what both attentions' decode kernels share.

use std::ops::Range;

use super::tile::{BLOCK, LANES, Lanes, TILE_KEYS};
use crate::{Float, KernelError, Result};

/// Sizes and strides (in elements) of q and o `[sequences, query_heads, head_dim]` and of the caches
/// `[sequences, capacity, kv_heads, head_dim]`. The heads of one token are contiguous.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeLayout {
    /// Sequences, each with one query.
    pub sequences: usize,
    /// Tokens that one sequence's cache can hold.
    pub capacity: usize,
    /// Query heads.
    pub query_heads: usize,
    /// Key/value heads; divides `query_heads`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Elements from one sequence's query to the next one's.
    pub query_stride: usize,
    /// Elements from one cached token to the next.
    pub cache_stride: usize,
    /// Elements from one sequence's cache to the next one's.
    pub sequence_stride: usize,
}

/// What decoding reads: `lengths` are the numbers of cached keys that each query sees, 0 to `capacity`.
#[derive(Debug, Clone, Copy)]
pub struct DecodeInputs<'a, T> {
    /// Queries.
    pub q: &'a [T],
    /// Cached keys.
    pub k: &'a [T],
    /// Cached values.
    pub v: &'a [T],
    /// Visible keys of each sequence.
    pub lengths: &'a [i32],
}

impl DecodeLayout {
    /// The layout of contiguous queries and caches.
    pub fn contiguous(sequences: usize, capacity: usize, query_heads: usize, kv_heads: usize, head_dim: usize) -> Self {
        let cache_stride = kv_heads * head_dim;
        Self {
            sequences,
            capacity,
            query_heads,
            kv_heads,
            head_dim,
            query_stride: query_heads * head_dim,
            cache_stride,
            sequence_stride: capacity * cache_stride,
        }
    }

    pub(super) fn group(&self) -> usize {
        self.query_heads / self.kv_heads
    }

    /// Checks sizes, slices and lengths, and returns the lengths.
    pub(super) fn check<T>(&self, op: &'static str, inputs: &DecodeInputs<'_, T>, o: &[T]) -> Result<Vec<usize>> {
        // A decode step is one token per sequence of a packed layout, as far as queries and heads are concerned.
        let layout = super::AttentionLayout {
            query_stride: self.query_stride,
            key_stride: self.cache_stride,
            value_stride: self.cache_stride,
            ..super::AttentionLayout::contiguous(self.sequences, self.query_heads, self.kv_heads, self.head_dim)
        };
        layout.validate(op)?;
        layout.check_rows(op, "q", inputs.q, self.query_stride, self.query_heads)?;
        let width = self.query_heads * self.head_dim;
        crate::error::check_len(op, "o", o, self.sequences * width)?;
        crate::error::check_len(op, "lengths", inputs.lengths, self.sequences)?;
        let mut lengths = Vec::with_capacity(self.sequences);
        for (position, &length) in inputs.lengths.iter().enumerate() {
            match usize::try_from(length) {
                Ok(length) if length <= self.capacity => lengths.push(length),
                _ => {
                    let (what, value) = ("lengths", i64::from(length));
                    let allowed = format!("between 0 and the capacity, {}", self.capacity);
                    return Err(KernelError::Index { op, what, position, value, allowed });
                }
            }
        }
        let last_token = self.sequences.saturating_sub(1) * self.sequence_stride
            + self.capacity.saturating_sub(1) * self.cache_stride;
        let expected = if self.sequences * self.capacity == 0 { 0 } else { last_token + self.kv_heads * self.head_dim };
        for (argument, cache) in [("k", inputs.k), ("v", inputs.v)] {
            if cache.len() < expected {
                return Err(KernelError::Length { op, argument, expected, found: cache.len() });
            }
        }
        Ok(lengths)
    }

    /// The tasks: each key head of each sequence, its keys cut into pieces of at most `piece`, newest piece first.
    pub(super) fn tasks(&self, lengths: &[usize], piece: usize) -> Vec<DecodeTask> {
        let mut tasks = Vec::new();
        for (sequence, &length) in lengths.iter().enumerate() {
            for kv_head in 0..self.kv_heads {
                let mut end = length;
                while end > 0 {
                    // Pieces end at multiples of `piece`, so that a growing cache keeps its old pieces.
                    let start = (end - 1) / piece * piece;
                    tasks.push(DecodeTask { sequence, kv_head, keys: start..end });
                    end = start;
                }
            }
        }
        tasks
    }

    #[inline(always)]
    fn cached<'a, T>(&self, cache: &'a [T], task: &DecodeTask, key: usize) -> &'a [T] {
        let at = task.sequence * self.sequence_stride + key * self.cache_stride + task.kv_head * self.head_dim;
        &cache[at..at + self.head_dim]
    }

    /// The query that is number `member` of the task's group of heads.
    #[inline(always)]
    pub(super) fn query<'a, T>(&self, q: &'a [T], task: &DecodeTask, member: usize) -> &'a [T] {
        let head = task.kv_head * self.group() + member;
        &q[task.sequence * self.query_stride + head * self.head_dim..][..self.head_dim]
    }
}

/// A run of cached keys of one key head of one sequence; read by all query heads of the group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DecodeTask {
    pub sequence: usize,
    pub kv_head: usize,
    pub keys: Range<usize>,
}

impl DecodeTask {
    /// The task's keys in tiles, oldest first.
    #[inline(always)]
    pub fn tiles(&self) -> impl DoubleEndedIterator<Item = Range<usize>> + use<> {
        let keys = self.keys.clone();
        keys.clone().step_by(TILE_KEYS).map(move |start| start..keys.end.min(start + TILE_KEYS))
    }
}

/// A tile's scores of one query, or its weights.
pub(super) type TileScores<T> = [Lanes<T>; TILE_KEYS / LANES];

/// `scale * (q . k)` of a tile's keys; -infinity behind them.
#[inline(always)]
pub(super) fn tile_scores<T: Float>(
    layout: &DecodeLayout,
    task: &DecodeTask,
    tile: Range<usize>,
    query: &[T],
    k: &[T],
    scale: T,
) -> TileScores<T> {
    let mut z = [[T::NEG_INFINITY; LANES]; TILE_KEYS / LANES];
    for (z, key) in z.as_flattened_mut().iter_mut().zip(tile) {
        *z = scale * dot(query, layout.cached(k, task, key));
    }
    z
}

/// `o += sum_key weights[key] v[key]`
#[inline(always)]
pub(super) fn add_values<T: Float>(
    layout: &DecodeLayout,
    task: &DecodeTask,
    tile: Range<usize>,
    weights: &TileScores<T>,
    v: &[T],
    o: &mut [T],
) {
    for (&weight, key) in weights.as_flattened().iter().zip(tile) {
        for (o, &value) in o.iter_mut().zip(layout.cached(v, task, key)) {
            *o = weight.mul_add(value, *o);
        }
    }
}

/// A dot product in [`LANES`] interleaved sums.
#[inline(always)]
fn dot<T: Float>(a: &[T], b: &[T]) -> T {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [T::ZERO; LANES];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            sums[lane] = a[lane].mul_add(b[lane], sums[lane]);
        }
    }
    let rest = a_rest.iter().zip(b_rest).fold(T::ZERO, |sum, (&a, &b)| a.mul_add(b, sum));
    sums.into_iter().sum::<T>() + rest
}

const _: () = assert!(TILE_KEYS.is_multiple_of(LANES) && TILE_KEYS.is_multiple_of(BLOCK));
