//! The forward pass on Hopper cards (`cuda/stick_breaking_hopper.cu`): wgmma on tiles that the copy engine brings. It
//! writes what the portable kernel writes, state included.

use std::ops::Range;

use super::StickBreakingSpec;
use super::cuda::{Forward, PIECE, Shape, Tiles};
use crate::attention::AttentionLayout;
use crate::cuda::{Arg, Boxes, DeviceRef, DeviceType, HOPPER, Kernel, Launch, Queue, Source, TensorMap};
use crate::{KernelError, Result};

const OP: &str = "stick-breaking attention on Hopper";

/// Keys of a tile.
const TILE_KEYS: usize = 128;
/// Elements of a row of a box.
const CHUNK: usize = 64;
/// Bytes of the barriers and of what else passes between producer and consumers.
const CONTROL_BYTES: usize = 512;
/// Keys and values of heads that run at the same time should leave room in L2 (50 MB on an H100) for the rest.
const SECTION_BYTES: usize = 32 << 20;

/// How the kernel is built. Every choice gives the same results up to rounding; the default is what was fastest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    /// Consumer warpgroups of a block, 64 rows each.
    pub warpgroups: usize,
    /// Tiles of keys, and as many of values, that shared memory holds.
    pub stages: usize,
    /// Keys that share a reciprocal: 4 or 8.
    pub chunk: usize,
    /// Whether a tile is scanned while the product with the values before it is under way.
    pub overlap: bool,
    /// Whether the warpgroups take turns in starting their products.
    pub turns: bool,
    /// Whether a wait inside the kernel that takes too long is an error, rather than a hang. Slower.
    pub watchdog: bool,
}

impl Tuning {
    /// The default for a head dim.
    pub fn new(head_dim: usize) -> Self {
        let (warpgroups, stages) = if head_dim > 64 { (2, 2) } else { (3, 4) };
        Self { warpgroups, stages, chunk: 4, overlap: warpgroups == 2, turns: false, watchdog: false }
    }

    /// Choices worth measuring for a head dim.
    pub fn candidates(head_dim: usize) -> Vec<Self> {
        // Warpgroups, stages, overlap.
        let shapes: &[_] = if head_dim > 64 {
            &[(2, 2, true), (2, 3, true), (2, 2, false)]
        } else {
            &[(3, 4, false), (2, 4, true), (2, 4, false)]
        };
        let mut all = Vec::new();
        for (chunk, turns) in [(4, false), (8, false), (4, true), (8, true)] {
            all.extend(shapes.iter().map(|&(warpgroups, stages, overlap)| Self {
                warpgroups,
                stages,
                chunk,
                overlap,
                turns,
                watchdog: false,
            }));
        }
        all
    }

    /// The kernel of a head dim, for compiling it ahead.
    pub fn source(&self, head_dim: usize) -> Source {
        let parts = &[
            include_str!("../../../cuda/hopper.cuh"),
            include_str!("../../../cuda/stick_breaking.cuh"),
            include_str!("../../../cuda/stick_breaking_hopper.cu"),
        ];
        let mut defines = vec![
            ("HEAD_DIM", head_dim.to_string()),
            ("WARPGROUPS", self.warpgroups.to_string()),
            ("STAGES", self.stages.to_string()),
            ("CHUNK", self.chunk.to_string()),
            ("OVERLAP", u8::from(self.overlap).to_string()),
            ("TURNS", u8::from(self.turns).to_string()),
        ];
        if self.watchdog {
            // Nanoseconds: far longer than any tile takes.
            defines.push(("WATCHDOG", "2000000000".to_owned()));
        }
        Source { file: "stick_breaking_hopper.cu", parts, defines }
    }

    fn rows(&self) -> usize {
        PIECE * self.warpgroups
    }

    fn shared(&self, head_dim: usize) -> usize {
        let row = DeviceType::Bf16.size() * head_dim;
        row * (self.rows() + 2 * self.stages * TILE_KEYS) + CONTROL_BYTES
    }
}

/// Head dims with a kernel.
const HEAD_DIMS: [usize; 2] = [64, 128];

/// All sources that a plan can ask for.
pub fn sources() -> Vec<Source> {
    HEAD_DIMS.map(|head_dim| Tuning::new(head_dim).source(head_dim)).into()
}

/// Why the kernel cannot run. A forward pass that wants log2_rem, too, is the portable one's.
fn refusal(queue: &Queue, layout: &AttentionLayout) -> Option<KernelError> {
    let architecture = queue.gpu().architecture();
    if architecture != HOPPER {
        return Some(KernelError::size(OP, "the device", HOPPER, architecture));
    }
    if !HEAD_DIMS.contains(&layout.head_dim) {
        return Some(KernelError::size(OP, "head_dim", "64 or 128", layout.head_dim));
    }
    if layout.tokens < TILE_KEYS {
        return Some(KernelError::size(OP, "tokens", "at least 128", layout.tokens));
    }
    None
}

/// Queries as the copy engine sees them: pieces of 64 rows, 64 columns at a time; a row holds all heads of a token.
fn query_boxes(tokens: usize, width: usize, stride: usize) -> Boxes<2> {
    Boxes { sizes: [width, tokens], strides: [1, stride], extents: [CHUNK, PIECE] }
}

/// Keys or values: tiles of 128 rows in the order of `permuted_key` in `cuda/hopper.cuh`, 64 columns at a time. Row
/// 8 j + 2 c + e of a tile is key 32 c + 2 j + e, so the box has the dimensions e, c and j outside the columns. The engine
/// checks each coordinate alone; with the size of the second dimension a box stays inside as long as its first row is at
/// most tokens - 128.
pub(super) fn key_boxes(tokens: usize, width: usize, stride: usize) -> Boxes<4> {
    Boxes {
        sizes: [width, (tokens + 2).saturating_sub(TILE_KEYS), 4, 16],
        strides: [1, stride, 32 * stride, 2 * stride],
        extents: [CHUNK, 2, 4, 16],
    }
}

#[derive(Debug)]
pub(super) struct Hopper {
    tuning: Tuning,
    kernel: Kernel,
    tiles: Tiles,
    /// Query heads that run at a time.
    section: usize,
}

impl Hopper {
    pub(super) fn new(
        queue: &Queue,
        layout: &AttentionLayout,
        documents: &[Range<usize>],
        shape: &Shape,
        tuning: Tuning,
    ) -> Result<Self> {
        if let Some(refusal) = refusal(queue, layout) {
            return Err(refusal);
        }
        let tiles = shape.tiles(documents, tuning.rows(), false);
        let items = tiles.len() * layout.query_heads;
        // A ticket runs past the items by the number of blocks.
        if items > 1 << 30 {
            return Err(KernelError::size(OP, "tiles of queries times heads", "at most 2^30", items));
        }
        let head_bytes = 2 * layout.tokens * layout.head_dim * DeviceType::Bf16.size();
        let section = (SECTION_BYTES / head_bytes).clamp(1, layout.kv_heads) * layout.group();
        let kernel = queue.gpu().kernel(&tuning.source(layout.head_dim), "stick_breaking_forward_hopper_bf16")?;
        Ok(Self { tuning, kernel, tiles: Tiles::upload(queue, &tiles)?, section })
    }

    /// Everything of `call` but the logarithm.
    pub(super) fn forward(
        &self,
        queue: &Queue,
        spec: &StickBreakingSpec,
        (entries, pieces): (usize, usize),
        factor: f32,
        call: Forward<'_>,
    ) -> Result<()> {
        let layout = &spec.layout;
        let tokens = layout.tokens;
        let (width, kv_width) = (layout.query_heads * layout.head_dim, layout.kv_heads * layout.head_dim);
        let [q, k, v] = call.inputs;
        // Where the blocks take their items; each starts with the one of its own number. First of all, because it binds the
        // device to this thread, which the maps need.
        let mut ticket = queue.scratch(DeviceType::U32, 1)?;
        queue.zero(&mut ticket.as_mut())?;
        let maps = [
            TensorMap::swizzled(OP, "q", q, &query_boxes(tokens, width, layout.query_stride))?,
            TensorMap::swizzled(OP, "k", k, &key_boxes(tokens, kv_width, layout.key_stride))?,
            TensorMap::swizzled(OP, "v", v, &key_boxes(tokens, kv_width, layout.value_stride))?,
        ];
        let items = self.tiles.count as usize * layout.query_heads;
        let blocks = items.min(queue.gpu().multiprocessors() as usize);
        let int = |size: usize| Arg::from(size as i32);
        let arguments = [
            k.into(),
            v.into(),
            call.o,
            call.rem,
            call.sticks,
            call.first_blocks,
            DeviceRef::into(self.tiles.list.as_ref()),
            Arg::from(&mut ticket.as_mut()),
            int(layout.key_stride),
            int(layout.value_stride),
            int(layout.output_stride),
            int(tokens),
            int(self.tiles.count as usize),
            int(layout.query_heads),
            int(layout.group()),
            int(self.section),
            int(entries),
            int(pieces),
            int(usize::from(spec.attend_current)),
            factor.into(),
            spec.threshold().into(),
        ];
        let launch = Launch {
            grid: [blocks as u32, 1, 1],
            block: 128 * (self.tuning.warpgroups as u32 + 1),
            shared: self.tuning.shared(layout.head_dim),
        };
        queue.launch_with_maps(&self.kernel, launch, &maps, &arguments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `permuted_key` of `cuda/hopper.cuh`.
    fn permuted_key(row: usize) -> usize {
        32 * ((row >> 1) & 3) + 2 * (row >> 3) + (row & 1)
    }

    #[test]
    fn boxes_bring_the_rows_that_the_kernel_expects() {
        for (tokens, heads, head_dim, stride) in [(128, 1, 64, 64), (300, 3, 128, 400), (1000, 2, 64, 128)] {
            let width = heads * head_dim;
            let keys = key_boxes(tokens, width, stride);
            for first in [0, 1, 57, tokens - 128].into_iter().filter(|first| first + 128 <= tokens) {
                for column in (0..width).step_by(64) {
                    let rows = keys.rows([column, first, 0, 0]);
                    let expected = (0..128).map(|row| Some((first + permuted_key(row)) * stride + column));
                    assert!(rows.into_iter().eq(expected), "{tokens} tokens, first {first}, column {column}");
                }
            }
            // A box further on would be cut, and its copy is the producer's: no row of any box is past the end.
            for first in tokens - 127..tokens {
                assert!(keys.rows([0, first, 0, 0]).into_iter().flatten().all(|offset| offset / stride < tokens));
            }
            let queries = query_boxes(tokens, width, stride);
            let rows = queries.rows([width - 64, tokens - 20]);
            assert_eq!(rows[19], Some((tokens - 1) * stride + width - 64));
            assert!(rows[..20].iter().all(Option::is_some) && rows[20..].iter().all(Option::is_none));
        }
        // In a quad, lane c's columns 2c and 2c + 1 of the 16 groups of 8 rows are 32 keys in a row.
        for lane in 0..4 {
            let mine = (0..16).flat_map(|group| [8 * group + 2 * lane, 8 * group + 2 * lane + 1]);
            assert!(mine.map(permuted_key).eq(32 * lane..32 * lane + 32));
        }
    }

    #[test]
    fn shared_memory_fits() {
        for head_dim in HEAD_DIMS {
            let candidates = Tuning::candidates(head_dim);
            assert!(candidates.contains(&Tuning::new(head_dim)));
            for tuning in candidates {
                assert!(tuning.shared(head_dim) <= 227 << 10, "{tuning:?}: {}", tuning.shared(head_dim));
            }
        }
    }
}
