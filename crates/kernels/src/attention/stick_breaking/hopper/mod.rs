//! Kernels of their own for Hopper cards (compute capability 9.0), in bf16 for head dims 64 and 128: wgmma on tiles that the
//! copy engine brings. Each pass computes and writes what the portable one does, state included, so that any pass can go
//! on from any other; a part of the state, which is kept of long inputs, only the kernels here know (`docs/kernels-hopper.md`).

use super::cuda::{TileSize, Tiles};
use crate::attention::AttentionLayout;
use crate::cuda::{Arg, Boxes, DeviceType, HOPPER, Kernel, Launch, Queue, Scratch, Source, TensorMap};
use crate::{KernelError, Result};

/// The text of one of the kernels: its file, behind those that all of them build on.
macro_rules! source {
    ($file:literal, $defines:expr) => {
        Source {
            file: $file,
            parts: &[
                include_str!("../../../../cuda/hopper.cuh"),
                include_str!("../../../../cuda/stick_breaking.cuh"),
                include_str!("../../../../cuda/stick_breaking_hopper.cuh"),
                include_str!(concat!("../../../../cuda/", $file)),
            ],
            defines: $defines,
        }
    };
}

pub mod backward;
pub mod forward;
pub mod probe;
pub mod sticks;

const FORWARD: &str = "stick-breaking attention on Hopper";
const BACKWARD: &str = "stick-breaking attention on Hopper, backward";

/// Elements of a row of a box.
const CHUNK: usize = 64;
/// Rows of a box of queries.
const PIECE: usize = super::cuda::PIECE;
/// Bytes of the barriers and of what else passes between producer and consumers.
const CONTROL_BYTES: usize = 512;
/// What heads that run at the same time read again and again should leave room in L2 (50 MB on an H100) for the rest.
const SECTION_BYTES: usize = 32 << 20;

/// Whether the warpgroups of a block take turns in starting their products, and when a turn ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turns {
    /// They do not.
    None = 0,
    /// When the products are started.
    Start = 1,
    /// When the scores are computed, so that products of two warpgroups do not mix.
    Scores = 2,
}

/// Which passes have a kernel of their own, and how it is built; the other passes are the portable kernels'.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    /// o, the remainder and the state.
    pub forward: Option<forward::Tuning>,
    /// The state, where the forward pass did not keep all of it.
    pub sticks: Option<sticks::Tuning>,
    /// dq, dk and dv.
    pub backward: Option<backward::Tuning>,
    /// Blocks of keys of each piece of 64 queries whose state is kept at most, those next to it; an even number. None: as many
    /// as an eighth of q, k, v and o holds. The rest is rebuilt. Without `forward` and `sticks` it is all or none. For tests.
    pub kept: Option<usize>,
}

impl Choice {
    /// The portable kernels for every pass.
    pub const NONE: Self = Self { forward: None, sticks: None, backward: None, kept: None };

    /// All passes, each as it was fastest for the head dim.
    pub fn new(head_dim: usize) -> Self {
        Self {
            forward: Some(forward::Tuning::new(head_dim)),
            sticks: Some(sticks::Tuning::new(head_dim)),
            backward: Some(backward::Tuning::new(head_dim)),
            kept: None,
        }
    }

    /// Every way to build each kernel that is worth measuring, one kernel at a time.
    pub fn candidates(head_dim: usize) -> Vec<Self> {
        let forward = forward::Tuning::candidates(head_dim).into_iter();
        let sticks = sticks::Tuning::candidates(head_dim).into_iter();
        let backward = backward::Tuning::candidates(head_dim).into_iter();
        forward
            .map(|tuning| Self { forward: Some(tuning), ..Self::NONE })
            .chain(sticks.map(|tuning| Self { sticks: Some(tuning), kept: Some(0), ..Self::NONE }))
            .chain(backward.map(|tuning| Self { backward: Some(tuning), ..Self::NONE }))
            .collect()
    }

    /// The lists of tiles that the kernels take.
    pub(super) fn tile_sizes(&self) -> Vec<TileSize> {
        let forward = self.forward.map(|tuning| tuning.tile_size());
        let sticks = self.sticks.map(|tuning| tuning.tile_size());
        let backward = self.backward.map(|_| [backward::TILE_SIZE, backward::FINISH_SIZE]);
        [forward, sticks].into_iter().flatten().chain(backward.into_iter().flatten()).collect()
    }

    /// The kernels for a head dim, for compiling them ahead.
    pub fn sources(&self, head_dim: usize) -> Vec<Source> {
        let forward = self.forward.map(|tuning| tuning.source(head_dim));
        let sticks = self.sticks.map(|tuning| tuning.source(head_dim));
        let backward = self.backward.map(|tuning| tuning.source(head_dim));
        [forward, sticks, backward].into_iter().flatten().collect()
    }
}

/// Head dims with kernels.
const HEAD_DIMS: [usize; 2] = [64, 128];

/// All sources that a plan takes by itself.
pub fn sources() -> Vec<Source> {
    HEAD_DIMS.into_iter().flat_map(|head_dim| Choice::new(head_dim).sources(head_dim)).collect()
}

/// Why the kernels cannot run. A forward pass that wants log2_rem, too, is the portable one's.
pub(super) fn refusal(queue: &Queue, layout: &AttentionLayout) -> Option<KernelError> {
    let architecture = queue.gpu().architecture();
    if architecture != HOPPER {
        return Some(KernelError::size(FORWARD, "the device", HOPPER, architecture));
    }
    if !HEAD_DIMS.contains(&layout.head_dim) {
        return Some(KernelError::size(FORWARD, "head_dim", "64 or 128", layout.head_dim));
    }
    if layout.tokens < forward::TILE_KEYS {
        return Some(KernelError::size(FORWARD, "tokens", "at least 128", layout.tokens));
    }
    None
}

/// A kernel whose blocks, one per multiprocessor, stay for the whole launch and take items (a tile of one head) by a ticket:
/// a producer and so many consumer warpgroups each.
#[derive(Debug)]
struct Persistent {
    kernel: Kernel,
    tiles: Tiles,
    warpgroups: usize,
    /// Bytes of shared memory of a block.
    shared: usize,
}

impl Persistent {
    /// For launches over at most `heads` heads.
    fn new(
        queue: &Queue,
        op: &'static str,
        (source, entry): (&Source, &'static str),
        tiles: Tiles,
        heads: usize,
        (warpgroups, shared): (usize, usize),
    ) -> Result<Self> {
        let items = tiles.count() * heads;
        // A ticket runs past the items by the number of blocks.
        if items > 1 << 30 {
            return Err(KernelError::size(op, "tiles times heads", "at most 2^30", items));
        }
        let kernel = queue.gpu().kernel(source, entry)?;
        Ok(Self { kernel, tiles, warpgroups, shared })
    }

    /// Where the blocks of a launch take their items, each starting with the one of its own number. Comes before tensor maps,
    /// because it binds the device to this thread, which they need.
    fn ticket(queue: &Queue) -> Result<Scratch> {
        let mut ticket = queue.scratch(DeviceType::U32, 1)?;
        queue.zero(&mut ticket.as_mut())?;
        Ok(ticket)
    }

    /// Over so many heads.
    fn launch(&self, queue: &Queue, heads: usize, maps: &[TensorMap<'_>], arguments: &[Arg]) -> Result<()> {
        let items = self.tiles.count() * heads;
        let blocks = items.min(queue.gpu().multiprocessors() as usize);
        let block = 128 * (self.warpgroups as u32 + 1);
        queue.launch_with_maps(
            &self.kernel,
            Launch { grid: [blocks as u32, 1, 1], block, shared: self.shared },
            maps,
            arguments,
        )
    }
}

/// Key/value heads that run at a time, if each of them reads so many bytes again and again.
fn section(layout: &AttentionLayout, head_bytes: usize) -> usize {
    (SECTION_BYTES / head_bytes).clamp(1, layout.kv_heads)
}

/// Bytes of the keys and values of one head.
fn key_bytes(layout: &AttentionLayout) -> usize {
    2 * layout.tokens * layout.head_dim * DeviceType::Bf16.size()
}

/// Queries as the copy engine sees them: pieces of 64 rows, 64 columns at a time; a row holds all heads of a token.
fn query_boxes(tokens: usize, width: usize, stride: usize) -> Boxes<2> {
    Boxes { sizes: [width, tokens], strides: [1, stride], extents: [CHUNK, PIECE] }
}

/// Keys or values: tiles of `KEYS` rows in the order of `permuted_key` in `cuda/hopper.cuh`, 64 columns at a time. Row
/// 8 j + 2 c + e of a tile is key c KEYS / 4 + 2 j + e, so the box has the dimensions e, c and j outside the columns. The
/// engine checks each coordinate alone; with the size of the second dimension a box stays inside as long as its first row is
/// at most tokens - KEYS.
fn key_boxes<const KEYS: usize>(tokens: usize, width: usize, stride: usize) -> Boxes<4> {
    Boxes {
        sizes: [width, (tokens + 2).saturating_sub(KEYS), 4, KEYS / 8],
        strides: [1, stride, KEYS / 4 * stride, 2 * stride],
        extents: [CHUNK, 2, 4, KEYS / 8],
    }
}

/// The kernels of a plan.
#[derive(Debug)]
pub(super) struct Hopper {
    pub(super) forward: Option<forward::Forward>,
    pub(super) sticks: Option<sticks::Sticks>,
    pub(super) backward: Option<backward::Backward>,
    pub(super) kept: Option<usize>,
}

impl Hopper {
    /// `tiles` has the lists of [`Choice::tile_sizes`].
    pub(super) fn new(
        queue: &Queue,
        layout: &AttentionLayout,
        choice: Choice,
        tiles: impl Fn(TileSize) -> Result<Tiles>,
    ) -> Result<Self> {
        if let Some(refusal) = refusal(queue, layout) {
            return Err(refusal);
        }
        let Choice { forward, sticks, backward, kept } = choice;
        let forward = forward.map(|of| forward::Forward::new(queue, layout, tiles(of.tile_size())?, of));
        let sticks = sticks.map(|of| sticks::Sticks::new(queue, layout, tiles(of.tile_size())?, of));
        let backward = backward.map(|of| {
            let tiles = [tiles(backward::TILE_SIZE)?, tiles(backward::FINISH_SIZE)?];
            backward::Backward::new(queue, layout, tiles, of)
        });
        Ok(Self { forward: forward.transpose()?, sticks: sticks.transpose()?, backward: backward.transpose()?, kept })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `permuted_key` of `cuda/hopper.cuh`.
    fn permuted_key<const KEYS: usize>(row: usize) -> usize {
        KEYS / 4 * ((row >> 1) & 3) + 2 * (row >> 3) + (row & 1)
    }

    fn check_boxes<const KEYS: usize>() {
        for (tokens, heads, head_dim, stride) in [(128, 1, 64, 64), (300, 3, 128, 400), (1000, 2, 64, 128)] {
            let width = heads * head_dim;
            let keys = key_boxes::<KEYS>(tokens, width, stride);
            for first in [0, 1, 57, tokens - KEYS].into_iter().filter(|first| first + KEYS <= tokens) {
                for column in (0..width).step_by(64) {
                    let rows = keys.rows([column, first, 0, 0]);
                    let expected = (0..KEYS).map(|row| Some((first + permuted_key::<KEYS>(row)) * stride + column));
                    assert!(rows.into_iter().eq(expected), "{tokens} tokens, first {first}, column {column}");
                }
            }
            // A box further on would be cut, and its copy is the producer's: no row of any box is past the end.
            for first in tokens - KEYS + 1..tokens {
                assert!(keys.rows([0, first, 0, 0]).into_iter().flatten().all(|offset| offset / stride < tokens));
            }
            let queries = query_boxes(tokens, width, stride);
            let rows = queries.rows([width - 64, tokens - 20]);
            assert_eq!(rows[19], Some((tokens - 1) * stride + width - 64));
            assert!(rows[..20].iter().all(Option::is_some) && rows[20..].iter().all(Option::is_none));
        }
        // In a quad, lane c's columns 2c and 2c + 1 of the groups of 8 rows are KEYS / 4 keys in a row.
        for lane in 0..4 {
            let mine = (0..KEYS / 8).flat_map(|group| [8 * group + 2 * lane, 8 * group + 2 * lane + 1]);
            assert!(mine.map(permuted_key::<KEYS>).eq(KEYS / 4 * lane..KEYS / 4 * (lane + 1)));
        }
    }

    #[test]
    fn boxes_bring_the_rows_that_the_kernels_expect() {
        check_boxes::<128>();
        check_boxes::<64>();
    }

    #[test]
    fn shared_memory_fits() {
        for head_dim in HEAD_DIMS {
            for choice in Choice::candidates(head_dim).into_iter().chain([Choice::new(head_dim)]) {
                let forward = choice.forward.map(|tuning| tuning.shared(head_dim));
                let sticks = choice.sticks.map(|tuning| tuning.shared(head_dim));
                let backward = choice.backward.map(|tuning| tuning.shared(head_dim));
                assert!(
                    [forward, sticks, backward].into_iter().flatten().all(|bytes| bytes <= 227 << 10),
                    "{choice:?}"
                );
            }
        }
    }
}
