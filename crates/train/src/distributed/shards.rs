//! How the flat arena is cut for ranks that share the optimizer's work (ZeRO-1, arXiv 1910.02054).
//!
//! ```text
//! arena    | bucket 0        | bucket 1        | bucket 2 |      a bucket is what one collective carries
//! owner    | 0   | 1   | 2   | 0   | 1   | 2   | 0| 1| 2  |      each rank owns one part of every bucket
//! shard 1        | 0   |           | 1   |        | 2|           its parts end to end are a rank's shard
//! ```
//!
//! A reduce-scatter of a bucket leaves each rank the sum of its part, an all-gather puts the parts together again, both in
//! place. One rank has one bucket, and its shard is the arena.

use std::ops::Range;
use stickbreak_autograd::{ALIGNMENT, ArenaLayout};
use stickbreak_tensor::DType;

/// The cut of an arena of a certain length for one of several ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardLayout {
    rank: usize,
    ranks: usize,
    length: usize,
    bucket_length: usize,
}

/// A rank's part of one bucket: where it lies in the arena and in the rank's shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Elements of the arena.
    pub arena: Range<usize>,
    /// The same elements in the shard.
    pub shard: Range<usize>,
}

/// Elements that every rank's part of a bucket starts at a multiple of.
fn unit(ranks: usize) -> usize {
    ranks * ALIGNMENT
}

impl ShardLayout {
    /// What the arena has to be like to be cut for so many ranks. One rank keeps the master whole, more keep a shard each.
    pub fn arena(ranks: usize) -> ArenaLayout {
        ArenaLayout { length_multiple: unit(ranks), keeps_master: ranks == 1, ..ArenaLayout::default() }
    }

    /// Cuts an arena of `length` elements, a multiple of what [`arena`](Self::arena) says, into buckets of at most
    /// `bucket_bytes` of gradients in float32 (but never less than the smallest possible).
    pub fn new(length: usize, rank: usize, ranks: usize, bucket_bytes: usize) -> Self {
        assert!(rank < ranks && length.is_multiple_of(unit(ranks)), "rank {rank} of {ranks}, {length} elements");
        let asked = bucket_bytes / DType::F32.size();
        let bucket_length = if ranks == 1 { length } else { (asked - asked % unit(ranks)).max(unit(ranks)) };
        Self { rank, ranks, length, bucket_length: bucket_length.max(1) }
    }

    /// Which rank this is the cut for.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many ranks there are.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Elements of the arena.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Elements of each rank's shard.
    pub fn shard_length(&self) -> usize {
        self.length / self.ranks
    }

    /// Number of buckets.
    pub fn buckets(&self) -> usize {
        self.length.div_ceil(self.bucket_length)
    }

    /// Elements of a bucket, counted from the arena's start.
    pub fn bucket(&self, index: usize) -> Range<usize> {
        let start = index * self.bucket_length;
        start..self.length.min(start + self.bucket_length)
    }

    /// The buckets that a range of the arena lies in.
    pub fn buckets_of(&self, range: &Range<usize>) -> Range<usize> {
        if range.is_empty() { 0..0 } else { range.start / self.bucket_length..range.end.div_ceil(self.bucket_length) }
    }

    /// This rank's part of a bucket.
    pub fn piece(&self, bucket: usize) -> Piece {
        self.piece_of(bucket, self.rank)
    }

    /// Any rank's part of a bucket.
    pub fn piece_of(&self, bucket: usize, rank: usize) -> Piece {
        let Range { start, end } = self.bucket(bucket);
        let part = (end - start) / self.ranks;
        let arena = start + rank * part..start + (rank + 1) * part;
        Piece { arena, shard: start / self.ranks..end / self.ranks }
    }

    /// The ranges of the arena that a rank's shard consists of, in its order; neighbours are one.
    pub fn ranges_of(&self, rank: usize) -> Vec<Range<usize>> {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for bucket in 0..self.buckets() {
            let Range { start, end } = self.piece_of(bucket, rank).arena;
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => ranges.push(start..end),
            }
        }
        ranges
    }
}

/// What two ranges share; empty if nothing.
pub(crate) fn intersection(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_equal_disjoint_complete_and_aligned() {
        for ranks in 1..=5 {
            for units in [0, 1, 2, 7, 40] {
                for bucket_bytes in [0, 1000, 64 * 4 * ranks * 3, 1 << 26] {
                    let length = units * unit(ranks);
                    let mut owners = vec![0; length];
                    for rank in 0..ranks {
                        let layout = ShardLayout::new(length, rank, ranks, bucket_bytes);
                        let mut filled = 0;
                        for bucket in 0..layout.buckets() {
                            let Piece { arena, shard } = layout.piece(bucket);
                            assert!(
                                arena.start >= layout.bucket(bucket).start && arena.end <= layout.bucket(bucket).end
                            );
                            assert_eq!((shard.start, shard.len()), (filled, arena.len()));
                            assert!(arena.start % ALIGNMENT == 0 && shard.start % ALIGNMENT == 0);
                            assert_eq!(layout.buckets_of(&arena), bucket..bucket + 1);
                            filled = shard.end;
                        }
                        assert_eq!(filled, layout.shard_length());
                        layout.ranges_of(rank).into_iter().flatten().for_each(|element| owners[element] += 1);
                    }
                    assert!(owners.iter().all(|&owners| owners == 1), "{ranks} ranks, {length} elements");
                }
            }
        }
    }

    #[test]
    fn one_rank_has_one_bucket_whatever_its_size() {
        let layout = ShardLayout::new(6400, 0, 1, 256);
        assert_eq!((layout.buckets(), layout.ranges_of(0).len(), layout.piece(0).arena), (1, 1, 0..6400));
    }

    #[test]
    fn a_bucket_is_at_most_as_large_as_asked() {
        let layout = ShardLayout::new(64 * 2 * 100, 1, 2, 4 * 64 * 2 * 7 + 5);
        assert_eq!((layout.bucket(0), layout.buckets(), layout.bucket(14)), (0..896, 15, 12544..12800));
    }
}
