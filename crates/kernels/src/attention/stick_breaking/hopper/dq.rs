//! dq and the sums over older keys on Hopper cards (`cuda/stick_breaking_hopper_dq.cu`): the first backward pass.

use std::ops::Range;

use super::super::StickBreakingSpec;
use super::super::cuda::{Backward, PIECE, TileSize, Tiles};
use super::{BACKWARD as OP, CONTROL_BYTES, Persistent, Turns, key_boxes, key_bytes, query_boxes, section};
use crate::Result;
use crate::attention::AttentionLayout;
use crate::cuda::{Arg, DeviceRef, DeviceType, Queue, Source, TensorMap};

/// Keys of a block.
const KEYS: usize = 64;

/// How the kernel is built. Every choice gives the same bits; the default is what was fastest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    /// Consumer warpgroups of a block, 64 rows each.
    pub warpgroups: usize,
    /// Blocks of keys and values that shared memory holds.
    pub stages: usize,
    /// Whether the warpgroups take turns in starting their products.
    pub turns: Turns,
}

impl Tuning {
    /// The default for a head dim.
    pub fn new(head_dim: usize) -> Self {
        Self { warpgroups: if head_dim > 64 { 2 } else { 3 }, stages: 4, turns: Turns::None }
    }

    /// Choices worth measuring for a head dim.
    pub fn candidates(head_dim: usize) -> Vec<Self> {
        let warpgroups: &[usize] = if head_dim > 64 { &[2] } else { &[3, 2] };
        let with = |turns| move |&warpgroups| Self { warpgroups, turns, ..Self::new(head_dim) };
        [Turns::None, Turns::Start, Turns::Scores]
            .into_iter()
            .flat_map(|turns| warpgroups.iter().map(with(turns)))
            .collect()
    }

    /// The kernel of a head dim, for compiling it ahead.
    pub fn source(&self, head_dim: usize) -> Source {
        let parts = &[
            include_str!("../../../../cuda/hopper.cuh"),
            include_str!("../../../../cuda/stick_breaking.cuh"),
            include_str!("../../../../cuda/stick_breaking_hopper.cuh"),
            include_str!("../../../../cuda/stick_breaking_hopper_dq.cu"),
        ];
        let defines = vec![
            ("HEAD_DIM", head_dim.to_string()),
            ("WARPGROUPS", self.warpgroups.to_string()),
            ("STAGES", self.stages.to_string()),
            ("TURNS", (self.turns as u8).to_string()),
        ];
        Source { file: "stick_breaking_hopper_dq.cu", parts, defines }
    }

    fn rows(&self) -> usize {
        PIECE * self.warpgroups
    }

    pub(super) fn tile_size(&self) -> TileSize {
        (self.rows(), false)
    }

    pub(super) fn shared(&self, head_dim: usize) -> usize {
        let row = DeviceType::Bf16.size() * head_dim;
        2 * row * (self.rows() + self.stages * KEYS) + CONTROL_BYTES
    }
}

#[derive(Debug)]
pub(in super::super) struct Dq {
    kernel: Persistent,
    /// Query heads that run at a time.
    section: usize,
}

impl Dq {
    pub(super) fn new(queue: &Queue, layout: &AttentionLayout, tiles: Tiles, tuning: Tuning) -> Result<Self> {
        let source = (&tuning.source(layout.head_dim), "stick_breaking_dq_hopper_bf16");
        let block = (tuning.warpgroups, tuning.shared(layout.head_dim));
        let section = section(layout, key_bytes(layout)) * layout.group();
        Ok(Self { kernel: Persistent::new(queue, OP, source, tiles, layout.query_heads, block)?, section })
    }

    /// For the query heads `heads`.
    pub(in super::super) fn run(
        &self,
        queue: &Queue,
        spec: &StickBreakingSpec,
        (entries, pieces): (usize, usize),
        factor: f32,
        heads: Range<usize>,
        call: &Backward<'_>,
    ) -> Result<()> {
        let layout = &spec.layout;
        let tokens = layout.tokens;
        let (width, kv_width) = (layout.query_heads * layout.head_dim, layout.kv_heads * layout.head_dim);
        let [q, k, v] = call.inputs;
        let mut ticket = Persistent::ticket(queue)?;
        let maps = [
            TensorMap::swizzled(OP, "q", q, &query_boxes(tokens, width, layout.query_stride))?,
            TensorMap::swizzled(OP, "k", k, &key_boxes::<KEYS>(tokens, kv_width, layout.key_stride))?,
            TensorMap::swizzled(OP, "v", v, &key_boxes::<KEYS>(tokens, kv_width, layout.value_stride))?,
            TensorMap::swizzled(OP, "d_o", call.d_o, &query_boxes(tokens, width, layout.output_stride))?,
        ];
        let int = |size: usize| Arg::from(size as i32);
        let arguments = [
            k.into(),
            v.into(),
            call.drem,
            call.sticks,
            call.sums,
            call.first_blocks,
            call.dq,
            DeviceRef::into(self.kernel.tiles.list()),
            Arg::from(&mut ticket.as_mut()),
            int(layout.key_stride),
            int(layout.value_stride),
            int(tokens),
            int(self.kernel.tiles.count()),
            int(layout.query_heads),
            int(layout.group()),
            int(heads.start),
            int(heads.len()),
            int(self.section),
            int(entries),
            int(pieces),
            int(usize::from(spec.attend_current)),
            factor.into(),
            Arg::from(spec.scale as f32),
        ];
        self.kernel.launch(queue, heads.len(), &maps, &arguments)
    }
}
