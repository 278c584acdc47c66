//! The state rebuilt on Hopper cards (`cuda/stick_breaking_hopper_sticks.cu`), for backward passes whose forward pass did
//! not keep all of it.

use std::ops::Range;

use super::super::StickBreakingSpec;
use super::super::cuda::{PIECE, TileSize, Tiles};
use super::{BACKWARD as OP, CONTROL_BYTES, Persistent, key_boxes, key_bytes, query_boxes, section};
use crate::Result;
use crate::attention::AttentionLayout;
use crate::cuda::{Arg, DeviceRef, DeviceType, Queue, Source, TensorMap};

/// Keys of a tile.
const TILE_KEYS: usize = 128;

/// How the kernel is built. Every choice gives the same bits; the default is what was fastest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    /// Consumer warpgroups of a block, 64 rows each.
    pub warpgroups: usize,
    /// Tiles of keys that shared memory holds.
    pub stages: usize,
}

impl Tuning {
    /// The default for a head dim.
    pub fn new(_head_dim: usize) -> Self {
        Self { warpgroups: 3, stages: 4 }
    }

    /// Choices worth measuring for a head dim.
    pub fn candidates(head_dim: usize) -> Vec<Self> {
        [2, 3].map(|warpgroups| Self { warpgroups, ..Self::new(head_dim) }).into()
    }

    /// The kernel of a head dim, for compiling it ahead.
    pub fn source(&self, head_dim: usize) -> Source {
        let defines = vec![
            ("HEAD_DIM", head_dim.to_string()),
            ("WARPGROUPS", self.warpgroups.to_string()),
            ("STAGES", self.stages.to_string()),
        ];
        source!("stick_breaking_hopper_sticks.cu", defines)
    }

    fn rows(&self) -> usize {
        PIECE * self.warpgroups
    }

    pub(super) fn tile_size(&self) -> TileSize {
        (self.rows(), false)
    }

    pub(super) fn shared(&self, head_dim: usize) -> usize {
        DeviceType::Bf16.size() * head_dim * (self.rows() + self.stages * TILE_KEYS) + CONTROL_BYTES
    }
}

#[derive(Debug)]
pub(in super::super) struct Sticks {
    kernel: Persistent,
    /// Query heads that run at a time.
    section: usize,
}

impl Sticks {
    pub(super) fn new(queue: &Queue, layout: &AttentionLayout, tiles: Tiles, tuning: Tuning) -> Result<Self> {
        let source = (&tuning.source(layout.head_dim), "stick_breaking_sticks_hopper_bf16");
        let block = (tuning.warpgroups, tuning.shared(layout.head_dim));
        let section = section(layout, key_bytes(layout)) * layout.group();
        Ok(Self { kernel: Persistent::new(queue, OP, source, tiles, layout.query_heads, block)?, section })
    }

    /// Writes the state of the query heads `heads` to `sticks`: of each piece's newest blocks, at most `kept`, what is `saved` of all
    /// heads, of older ones what follows from it.
    #[expect(clippy::too_many_arguments, reason = "each is a tensor or a size of its own")]
    pub(in super::super) fn run(
        &self,
        queue: &Queue,
        spec: &StickBreakingSpec,
        (entries, pieces): (usize, usize),
        factor: f32,
        heads: Range<usize>,
        [q, k]: [DeviceRef<'_>; 2],
        first_blocks: Arg,
        (saved, kept): (Option<DeviceRef<'_>>, usize),
        sticks: Arg,
    ) -> Result<()> {
        let layout = &spec.layout;
        let tokens = layout.tokens;
        let (width, kv_width) = (layout.query_heads * layout.head_dim, layout.kv_heads * layout.head_dim);
        let mut ticket = Persistent::ticket(queue)?;
        let maps = [
            TensorMap::swizzled(OP, "q", q, &query_boxes(tokens, width, layout.query_stride))?,
            TensorMap::swizzled(OP, "k", k, &key_boxes::<TILE_KEYS>(tokens, kv_width, layout.key_stride))?,
        ];
        let int = |size: usize| Arg::from(size as i32);
        let arguments = [
            k.into(),
            sticks,
            Arg::optional(saved),
            first_blocks,
            DeviceRef::into(self.kernel.tiles.list()),
            Arg::from(&mut ticket.as_mut()),
            int(layout.key_stride),
            int(tokens),
            int(self.kernel.tiles.count()),
            int(layout.group()),
            int(heads.start),
            int(heads.len()),
            int(self.section),
            int(entries),
            int(pieces),
            int(kept),
            int(usize::from(spec.attend_current)),
            factor.into(),
        ];
        self.kernel.launch(queue, heads.len(), &maps, &arguments)
    }
}
