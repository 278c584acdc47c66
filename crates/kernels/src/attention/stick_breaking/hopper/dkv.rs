//! The gradients of keys and values on Hopper cards (`cuda/stick_breaking_hopper_dkv.cu`). It reads and writes what the
//! portable kernel does, state included.

use std::ops::Range;

use super::super::StickBreakingSpec;
use super::super::cuda::{Backward, PIECE, TileSize, Tiles};
use super::{BACKWARD as OP, CONTROL_BYTES, Persistent, key_boxes, key_bytes, query_boxes, section};
use crate::Result;
use crate::attention::AttentionLayout;
use crate::cuda::{Arg, DeviceRef, DeviceType, Queue, Source, TensorMap};

/// Keys of a block, one per consumer warpgroup.
const KEYS: usize = 64;
const WARPGROUPS: usize = 2;
pub(super) const TILE_SIZE: TileSize = (WARPGROUPS * KEYS, true);

/// How the kernel is built. Every choice gives the same results up to rounding; the default is what was fastest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    /// Pieces of 64 queries, with their output gradients, that shared memory holds.
    pub stages: usize,
    /// Whether the scores of the next piece are computed while one is scanned. Head dim 64 only: it takes registers.
    pub overlap: bool,
    /// Whether two keys share a reciprocal.
    pub pairs: bool,
    /// Whether the warpgroups take turns in starting their products. Not with `overlap`.
    pub turns: bool,
}

impl Tuning {
    /// The default for a head dim.
    pub fn new(head_dim: usize) -> Self {
        let small = head_dim <= 64;
        Self { stages: if small { 4 } else { 3 }, overlap: small, pairs: small, turns: false }
    }

    /// Choices worth measuring for a head dim.
    pub fn candidates(head_dim: usize) -> Vec<Self> {
        let default = Self::new(head_dim);
        let with = |overlap, pairs, turns| Self { overlap, pairs, turns, ..default };
        if head_dim > 64 {
            // Pairs would take one register more than there is.
            return vec![with(false, false, false), with(false, false, true)];
        }
        let starts = [(true, false), (false, false), (false, true)];
        let one = |pairs| starts.map(|(overlap, turns)| with(overlap, pairs, turns));
        [one(false), one(true)].concat()
    }

    /// The kernel of a head dim, for compiling it ahead.
    pub fn source(&self, head_dim: usize) -> Source {
        let parts = &[
            include_str!("../../../../cuda/hopper.cuh"),
            include_str!("../../../../cuda/stick_breaking.cuh"),
            include_str!("../../../../cuda/stick_breaking_hopper.cuh"),
            include_str!("../../../../cuda/stick_breaking_hopper_dkv.cu"),
        ];
        let defines = vec![
            ("HEAD_DIM", head_dim.to_string()),
            ("WARPGROUPS", WARPGROUPS.to_string()),
            ("STAGES", self.stages.to_string()),
            ("OVERLAP", u8::from(self.overlap).to_string()),
            ("PAIRS", u8::from(self.pairs).to_string()),
            ("TURNS", u8::from(self.turns).to_string()),
        ];
        Source { file: "stick_breaking_hopper_dkv.cu", parts, defines }
    }

    pub(super) fn shared(&self, head_dim: usize) -> usize {
        let tile = KEYS * head_dim * DeviceType::Bf16.size();
        let scores = KEYS * PIECE * DeviceType::Bf16.size();
        let state = 2 * PIECE * size_of::<f32>();
        WARPGROUPS * (2 * tile + 3 * scores) + self.stages * (2 * tile + WARPGROUPS * state) + CONTROL_BYTES
    }
}

#[derive(Debug)]
pub(in super::super) struct Dkv {
    kernel: Persistent,
    /// Key/value heads that run at a time.
    section: usize,
}

impl Dkv {
    pub(super) fn new(queue: &Queue, layout: &AttentionLayout, tiles: Tiles, tuning: Tuning) -> Result<Self> {
        let source = (&tuning.source(layout.head_dim), "stick_breaking_backward_dkdv_hopper_bf16");
        let block = (WARPGROUPS, tuning.shared(layout.head_dim));
        // What is read again and again is Q and dO, as large as K and V, of all query heads of the group.
        let section = section(layout, layout.group() * key_bytes(layout));
        Ok(Self { kernel: Persistent::new(queue, OP, source, tiles, layout.kv_heads, block)?, section })
    }

    /// For the key/value heads `kv_heads`.
    pub(in super::super) fn run(
        &self,
        queue: &Queue,
        spec: &StickBreakingSpec,
        (entries, pieces): (usize, usize),
        factor: f32,
        kv_heads: Range<usize>,
        call: &Backward<'_>,
    ) -> Result<()> {
        let layout = &spec.layout;
        let tokens = layout.tokens;
        let (width, kv_width) = (layout.query_heads * layout.head_dim, layout.kv_heads * layout.head_dim);
        let [q, k, v] = call.inputs;
        let mut ticket = Persistent::ticket(queue)?;
        let maps = [
            TensorMap::swizzled(OP, "q", q, &query_boxes(tokens, width, layout.query_stride))?,
            TensorMap::swizzled(OP, "d_o", call.d_o, &query_boxes(tokens, width, layout.output_stride))?,
            TensorMap::swizzled(OP, "k", k, &key_boxes::<KEYS>(tokens, kv_width, layout.key_stride))?,
            TensorMap::swizzled(OP, "v", v, &key_boxes::<KEYS>(tokens, kv_width, layout.value_stride))?,
        ];
        let int = |size: usize| Arg::from(size as i32);
        let arguments = [
            k.into(),
            v.into(),
            call.sticks,
            call.sums,
            call.first_blocks,
            call.dk,
            call.dv,
            DeviceRef::into(self.kernel.tiles.list()),
            Arg::from(&mut ticket.as_mut()),
            int(layout.key_stride),
            int(layout.value_stride),
            int(tokens),
            int(self.kernel.tiles.count()),
            int(layout.group()),
            int(kv_heads.start),
            int(kv_heads.len()),
            int(self.section),
            int(kv_width),
            int(entries),
            int(pieces),
            int(usize::from(spec.attend_current)),
            factor.into(),
            Arg::from(spec.scale as f32),
        ];
        self.kernel.launch(queue, kv_heads.len(), &maps, &arguments)
    }
}
