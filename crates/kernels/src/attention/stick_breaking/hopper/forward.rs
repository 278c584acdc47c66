//! The forward pass on Hopper cards (`cuda/stick_breaking_hopper_forward.cu`). It writes what the portable kernel writes,
//! state included, or of that the part next to each row.

use super::super::StickBreakingSpec;
use super::super::cuda::{self, PIECE, TileSize, Tiles};
use super::{CONTROL_BYTES, FORWARD as OP, Persistent, Turns, key_boxes, key_bytes, query_boxes, section};
use crate::Result;
use crate::attention::AttentionLayout;
use crate::cuda::{Arg, DeviceRef, DeviceType, Queue, Source, TensorMap};

/// Keys of a tile.
pub(super) const TILE_KEYS: usize = 128;

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
    pub turns: Turns,
}

impl Tuning {
    /// The default for a head dim.
    pub fn new(head_dim: usize) -> Self {
        let small = head_dim <= 64;
        let (warpgroups, stages, chunk) = if small { (3, 4, 8) } else { (2, 2, 4) };
        Self { warpgroups, stages, chunk, overlap: !small, turns: if small { Turns::Start } else { Turns::None } }
    }

    /// Choices worth measuring for a head dim.
    pub fn candidates(head_dim: usize) -> Vec<Self> {
        // Warpgroups, stages, overlap.
        let shapes: &[_] = if head_dim > 64 { &[(2, 2, true), (2, 2, false)] } else { &[(3, 4, false), (2, 4, true)] };
        let mut all = Vec::new();
        for turns in [Turns::None, Turns::Start, Turns::Scores] {
            for chunk in [4, 8] {
                all.extend(shapes.iter().map(|&(warpgroups, stages, overlap)| Self {
                    warpgroups,
                    stages,
                    chunk,
                    overlap,
                    turns,
                }));
            }
        }
        all
    }

    /// The kernel of a head dim, for compiling it ahead.
    pub fn source(&self, head_dim: usize) -> Source {
        let defines = vec![
            ("HEAD_DIM", head_dim.to_string()),
            ("WARPGROUPS", self.warpgroups.to_string()),
            ("STAGES", self.stages.to_string()),
            ("CHUNK", self.chunk.to_string()),
            ("OVERLAP", u8::from(self.overlap).to_string()),
            ("TURNS", (self.turns as u8).to_string()),
        ];
        source!("stick_breaking_hopper_forward.cu", defines)
    }

    fn rows(&self) -> usize {
        PIECE * self.warpgroups
    }

    pub(super) fn tile_size(&self) -> TileSize {
        (self.rows(), false)
    }

    pub(super) fn shared(&self, head_dim: usize) -> usize {
        let row = DeviceType::Bf16.size() * head_dim;
        row * (self.rows() + 2 * self.stages * TILE_KEYS) + CONTROL_BYTES
    }
}

#[derive(Debug)]
pub(in super::super) struct Forward {
    kernel: Persistent,
    /// Query heads that run at a time.
    section: usize,
}

impl Forward {
    pub(super) fn new(queue: &Queue, layout: &AttentionLayout, tiles: Tiles, tuning: Tuning) -> Result<Self> {
        let source = (&tuning.source(layout.head_dim), "stick_breaking_forward_hopper_bf16");
        let block = (tuning.warpgroups, tuning.shared(layout.head_dim));
        let section = section(layout, key_bytes(layout)) * layout.group();
        Ok(Self { kernel: Persistent::new(queue, OP, source, tiles, layout.query_heads, block)?, section })
    }

    /// Everything of `call` but the logarithm.
    pub(in super::super) fn run(
        &self,
        queue: &Queue,
        spec: &StickBreakingSpec,
        (entries, pieces): (usize, usize),
        factor: f32,
        call: cuda::Forward<'_>,
    ) -> Result<()> {
        let layout = &spec.layout;
        let tokens = layout.tokens;
        let (width, kv_width) = (layout.query_heads * layout.head_dim, layout.kv_heads * layout.head_dim);
        let [q, k, v] = call.inputs;
        let mut ticket = Persistent::ticket(queue)?;
        let maps = [
            TensorMap::swizzled(OP, "q", q, &query_boxes(tokens, width, layout.query_stride))?,
            TensorMap::swizzled(OP, "k", k, &key_boxes::<TILE_KEYS>(tokens, kv_width, layout.key_stride))?,
            TensorMap::swizzled(OP, "v", v, &key_boxes::<TILE_KEYS>(tokens, kv_width, layout.value_stride))?,
        ];
        let int = |size: usize| Arg::from(size as i32);
        let arguments = [
            k.into(),
            v.into(),
            call.o,
            call.rem,
            call.sticks,
            call.first_blocks,
            DeviceRef::into(self.kernel.tiles.list()),
            Arg::from(&mut ticket.as_mut()),
            int(layout.key_stride),
            int(layout.value_stride),
            int(layout.output_stride),
            int(tokens),
            int(self.kernel.tiles.count()),
            int(layout.query_heads),
            int(layout.group()),
            int(self.section),
            int(entries),
            int(pieces),
            int(call.kept),
            int(usize::from(spec.attend_current)),
            factor.into(),
            spec.threshold().into(),
        ];
        self.kernel.launch(queue, layout.query_heads, &maps, &arguments)
    }
}
