//! The whole backward pass in one kernel on Hopper cards (`cuda/stick_breaking_hopper_backward.cu`), and the small one behind
//! it that rounds dq. It reads the same state as the portable kernels.

use std::ops::Range;

use super::super::StickBreakingSpec;
use super::super::cuda::{self, PIECE, TileSize, Tiles};
use super::{BACKWARD as OP, CONTROL_BYTES, Persistent, key_boxes, query_boxes, section};
use crate::Result;
use crate::attention::AttentionLayout;
use crate::cuda::{Arg, DeviceRef, DeviceType, Kernel, Launch, Queue, Scratch, Source, TensorMap};

/// Keys of a block, one per consumer warpgroup.
const KEYS: usize = 64;
const WARPGROUPS: usize = 2;
pub(super) const TILE_SIZE: TileSize = (WARPGROUPS * KEYS, true);
/// Queries of a block of the kernel that rounds.
pub(super) const FINISH_SIZE: TileSize = (PIECE, false);

/// How the kernel is built. Every choice gives the same results up to rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    /// Pieces of 64 queries, with their output gradients, that shared memory holds: 2 or 3, or for head dim 64 also 4.
    pub stages: usize,
    /// Whether two keys share a reciprocal. Head dim 64 only: it takes registers.
    pub pairs: bool,
    /// Whether the scores of the next piece are computed while one is scanned. Head dim 64 only: it takes registers.
    pub ahead: bool,
}

impl Tuning {
    /// The default for a head dim.
    pub fn new(head_dim: usize) -> Self {
        let small = head_dim <= 64;
        Self { stages: if small { 4 } else { 3 }, pairs: small, ahead: small }
    }

    /// Choices worth measuring for a head dim.
    pub fn candidates(head_dim: usize) -> Vec<Self> {
        let default = Self::new(head_dim);
        if head_dim > 64 {
            return vec![default, Self { stages: 2, ..default }];
        }
        vec![default, Self { stages: 2, ..default }, Self { pairs: false, ..default }, Self { ahead: false, ..default }]
    }

    /// The kernels of a head dim, for compiling them ahead.
    pub fn source(&self, head_dim: usize) -> Source {
        let defines = vec![
            ("HEAD_DIM", head_dim.to_string()),
            ("STAGES", self.stages.to_string()),
            ("PAIRS", u8::from(self.pairs).to_string()),
            ("AHEAD", u8::from(self.ahead).to_string()),
        ];
        source!("stick_breaking_hopper_backward.cu", defines)
    }

    pub(super) fn shared(&self, head_dim: usize) -> usize {
        let tile = KEYS * head_dim * DeviceType::Bf16.size();
        let scores = KEYS * PIECE * DeviceType::Bf16.size();
        let state = PIECE * (size_of::<u16>() + size_of::<f32>());
        WARPGROUPS * (2 * tile + 4 * scores) + self.stages * (2 * tile + WARPGROUPS * state) + CONTROL_BYTES
    }
}

/// What the blocks of a launch pass on to one another, for each query head and piece.
#[derive(Debug)]
pub(in super::super) struct Chains {
    /// f32 `[heads, pieces, PIECE, head_dim]`, each piece's elements in an order of the kernel's own: dq before it is rounded.
    accumulator: Scratch,
    /// u32, zeros at first: `[heads, pieces, PIECE]` sums with their numbers, two words each; `[heads, pieces]` turns; the
    /// ticket.
    words: Scratch,
    heads: Range<usize>,
}

/// Words of the sums of a piece.
const SUM_WORDS: usize = 2 * PIECE;

impl Chains {
    /// Bytes for one query head.
    pub(in super::super) fn head_bytes(head_dim: usize, pieces: usize) -> usize {
        pieces * (PIECE * head_dim * size_of::<f32>() + (SUM_WORDS + 1) * size_of::<u32>())
    }
}

#[derive(Debug)]
pub(in super::super) struct Backward {
    kernel: Persistent,
    finish: Kernel,
    finish_tiles: Tiles,
    /// Key/value heads that run at a time.
    section: usize,
}

impl Backward {
    pub(super) fn new(
        queue: &Queue,
        layout: &AttentionLayout,
        [tiles, finish_tiles]: [Tiles; 2],
        tuning: Tuning,
    ) -> Result<Self> {
        let source = tuning.source(layout.head_dim);
        let block = (WARPGROUPS, tuning.shared(layout.head_dim));
        // What is read again and again is Q and dO and what is added to again and again is dQ, of all query heads of the group.
        let row = 2 * DeviceType::Bf16.size() + DeviceType::F32.size();
        let section = section(layout, layout.group() * layout.tokens.max(1) * layout.head_dim * row);
        let entry = (&source, "stick_breaking_backward_hopper_bf16");
        let kernel = Persistent::new(queue, OP, entry, tiles, layout.kv_heads, block)?;
        let finish = queue.gpu().kernel(&source, "stick_breaking_finish_hopper_bf16")?;
        Ok(Self { kernel, finish, finish_tiles, section })
    }

    /// What the kernels need besides the state, for the query heads `heads` of `pieces` pieces each.
    pub(in super::super) fn chains(
        &self,
        queue: &Queue,
        layout: &AttentionLayout,
        pieces: usize,
        heads: Range<usize>,
    ) -> Result<Chains> {
        let slots = heads.len() * pieces;
        let accumulator = queue.scratch(DeviceType::F32, slots * PIECE * layout.head_dim)?;
        let words = queue.scratch(DeviceType::U32, slots * (SUM_WORDS + 1) + 1)?;
        Ok(Chains { accumulator, words, heads })
    }

    /// dk, dv and, in the chains, dq, for the heads of the chains: whole groups of them.
    pub(in super::super) fn run(
        &self,
        queue: &Queue,
        spec: &StickBreakingSpec,
        (entries, pieces): (usize, usize),
        factor: f32,
        chains: &mut Chains,
        call: &cuda::Backward<'_>,
    ) -> Result<()> {
        let layout = &spec.layout;
        let tokens = layout.tokens;
        let (width, kv_width) = (layout.query_heads * layout.head_dim, layout.kv_heads * layout.head_dim);
        let [q, k, v] = call.inputs;
        let [_, dk, dv] = call.gradients;
        // Before tensor maps: it binds the device to this thread, which they need.
        queue.zero(&mut chains.words.as_mut())?;
        let maps = [
            TensorMap::swizzled(OP, "q", q, &query_boxes(tokens, width, layout.query_stride))?,
            TensorMap::swizzled(OP, "d_o", call.d_o, &query_boxes(tokens, width, layout.output_stride))?,
            TensorMap::swizzled(OP, "k", k, &key_boxes::<KEYS>(tokens, kv_width, layout.key_stride))?,
            TensorMap::swizzled(OP, "v", v, &key_boxes::<KEYS>(tokens, kv_width, layout.value_stride))?,
        ];
        let kv_heads = chains.heads.len() / layout.group();
        let slots = chains.heads.len() * pieces;
        let mut words = chains.words.as_mut();
        let sums = Arg::from(&mut words.slice_mut(0..slots * SUM_WORDS));
        let turns = Arg::from(&mut words.slice_mut(slots * SUM_WORDS..slots * (SUM_WORDS + 1)));
        let ticket = Arg::from(&mut words.slice_mut(slots * (SUM_WORDS + 1)..slots * (SUM_WORDS + 1) + 1));
        let int = |size: usize| Arg::from(size as i32);
        let arguments = [
            k.into(),
            v.into(),
            call.drem,
            call.sticks,
            sums,
            turns,
            Arg::from(&mut chains.accumulator.as_mut()),
            call.first_blocks,
            dk,
            dv,
            DeviceRef::into(self.kernel.tiles.list()),
            ticket,
            int(layout.key_stride),
            int(layout.value_stride),
            int(tokens),
            int(self.kernel.tiles.count()),
            int(layout.query_heads),
            int(layout.group()),
            int(chains.heads.start / layout.group()),
            int(kv_heads),
            int(self.section),
            int(kv_width),
            int(entries),
            int(pieces),
            int(usize::from(spec.attend_current)),
            factor.into(),
            Arg::from(spec.scale as f32),
        ];
        self.kernel.launch(queue, kv_heads, &maps, &arguments)
    }

    /// Writes dq of the heads of the chains.
    pub(in super::super) fn finish(
        &self,
        queue: &Queue,
        spec: &StickBreakingSpec,
        pieces: usize,
        chains: &Chains,
        call: &cuda::Backward<'_>,
    ) -> Result<()> {
        let layout = &spec.layout;
        let arguments = [
            chains.accumulator.as_ref().into(),
            call.gradients[0],
            DeviceRef::into(self.finish_tiles.list()),
            Arg::from(layout.query_heads as i32),
            Arg::from(chains.heads.start as i32),
            Arg::from(pieces as i32),
            Arg::from(spec.scale as f32),
        ];
        let grid = [self.finish_tiles.count() as u32, chains.heads.len() as u32, 1];
        queue.launch(&self.finish, Launch { grid, block: 2 * layout.head_dim as u32, shared: 0 }, &arguments)
    }
}
