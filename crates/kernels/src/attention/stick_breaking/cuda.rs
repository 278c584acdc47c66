//! Stick-breaking attention on the GPU: bf16 on tensor cores (`cuda/stick_breaking.cu`), float32 by
//! `cuda/attention_f32.cu`; Hopper cards have kernels of their own for some passes (`super::hopper`).
//!
//! **Between the passes.** [`Saved`] holds the oldest key block that each query tile visited, if early exit is on, and, in
//! bf16, what every row has left of the stick after each block of keys (2 bytes per row and 64 keys, `Stick` in
//! `cuda/stick_breaking.cuh`), as long as that, the remainder left out, is at most an eighth of q, k, v and o. Of longer inputs
//! the Hopper kernels keep so much of it, for the keys next to each row, and the portable ones nothing: the backward pass
//! rebuilds the rest with one walk more. It holds it, and what it needs besides, for as many heads at a time as
//! [`STATE_BYTES`] allow, at least for the query heads of one key/value head.

use std::ops::Range;
use std::sync::Arc;

use super::StickBreakingSpec;
use super::hopper::{self, Choice, Hopper};
use crate::attention::device::{bf16_head_dims, check_flat, check_gradients, check_inputs, check_layout, check_output};
use crate::attention::{AttentionLayout, documents, f32_cuda};
use crate::cuda::{Arg, DeviceMut, DeviceRef, DeviceType, Kernel, Launch, Queue, Scratch, Source};
use crate::{KernelError, Result};

const FORWARD: &str = "stick-breaking attention on CUDA";
const BACKWARD: &str = "stick-breaking attention on CUDA, backward";

/// Bytes of intermediate state that a backward pass in bf16 may hold.
pub const STATE_BYTES: usize = 1 << 30;
/// Of one number of the state.
const STICK_BYTES: usize = size_of::<u16>();
/// Of a document: the number of its last one times the next is below 2^31.
const MOST_PIECES: usize = 46_340;

/// Everything that calls with one spec and the same documents share: tile lists on the device and loaded kernels. Made once
/// per batch, used by every layer. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Plan {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    spec: StickBreakingSpec,
    documents: Vec<Range<usize>>,
    dtype: DeviceType,
    path: Path,
}

#[derive(Debug)]
enum Path {
    Float(f32_cuda::Plan),
    TensorCores(Box<TensorCores>),
}

/// Which kernels a plan uses in bf16. Their results agree up to rounding, and so do their states between the passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kernels {
    /// Those for Hopper cards where they can run, else the portable ones: what [`Plan::new`] takes.
    #[default]
    Automatic,
    /// Those that run on every card.
    Portable,
    /// Those for Hopper cards for the passes that are chosen, or an error that says why they cannot run.
    Hopper(Choice),
}

/// Starts a kernel of the backward pass, which has a name; whoever measures wraps it.
type Run<'a> = &'a mut dyn FnMut(&'static str, &mut dyn FnMut() -> Result<()>) -> Result<()>;

/// What a forward pass leaves for its backward pass, on the device.
#[derive(Debug)]
pub struct Saved {
    plan: Plan,
    /// u32 `[query_heads, pieces of 64 rows]` in bf16, else `[query_heads, query tiles]`; if early exit is on.
    first_tiles: Option<Scratch>,
    /// 16 bits each; None if the backward pass rebuilds all of it.
    sticks: Option<Scratch>,
    /// What is in it.
    kept: Kept,
}

impl Saved {
    /// Device memory held, in bytes.
    pub fn bytes(&self) -> usize {
        [&self.first_tiles, &self.sticks].into_iter().flatten().map(Scratch::bytes).sum()
    }

    pub(super) fn spec(&self) -> &StickBreakingSpec {
        self.plan.spec()
    }

    pub(super) fn first_tiles(&self) -> Option<DeviceRef<'_>> {
        self.first_tiles.as_ref().map(Scratch::as_ref)
    }

    /// (query tile, key tile) pairs of one head that hold a visible key.
    pub(super) fn causal_tiles(&self) -> u64 {
        self.tiles_left_by(&[]).1
    }

    /// For each query head how many (query tile, key tile) pairs the forward pass visited, and how many pairs of one head
    /// hold a visible key. Waits for the device if early exit is on.
    ///
    /// # Errors
    /// If the copy fails.
    pub fn visited_tiles(&self, queue: &Queue) -> Result<(Vec<u64>, u64)> {
        let first = self.first_tiles.as_ref().map(|first| queue.download::<u32>(first.as_ref())).transpose()?;
        Ok(self.tiles_left_by(&first.unwrap_or_default()))
    }

    fn tiles_left_by(&self, first_tiles: &[u32]) -> (Vec<u64>, u64) {
        let Inner { spec, documents, path, .. } = &*self.plan.inner;
        match path {
            Path::Float(plan) => plan.visited_tiles(documents, spec.attend_current, first_tiles),
            Path::TensorCores(kernels) => kernels.shape.visited_tiles(spec, documents, first_tiles),
        }
    }
}

/// All sources that a plan can ask for in bf16.
pub(crate) fn sources() -> Vec<Source> {
    // Cards with 99 KB of shared memory per block have no room for the copies of two stages from some head dim on.
    let staged = |head_dim, shared| Shape::new(head_dim, shared).ok().map(|shape| shape.source());
    let all: Vec<_> = bf16_head_dims().filter_map(|head_dim| staged(head_dim, usize::MAX)).collect();
    let small = bf16_head_dims().filter_map(|head_dim| staged(head_dim, 99 << 10));
    let small: Vec<_> = small.filter(|source| !all.contains(source)).collect();
    [all, small].concat()
}

impl Plan {
    /// Checks the spec and the documents, and loads (compiles, the first time) the kernels. `dtype` is that of q, k, v and
    /// the outputs: f32 (head_dim up to 256) or bf16 (head_dim a multiple of 8 up to 128, or 256; strides multiples of
    /// 8 elements; memory that starts at multiples of 16 bytes).
    ///
    /// # Errors
    /// A spec or offsets that are wrong or have no kernel, or a failure of the device.
    pub fn new(queue: &Queue, spec: &StickBreakingSpec, cu_seqlens: &[i32], dtype: DeviceType) -> Result<Self> {
        Self::with_kernels(queue, spec, cu_seqlens, dtype, Kernels::default())
    }

    /// [`new`](Self::new) with a choice of kernels, for tests and measurements.
    ///
    /// # Errors
    /// As [`new`](Self::new), or if the chosen kernels cannot run.
    pub fn with_kernels(
        queue: &Queue,
        spec: &StickBreakingSpec,
        cu_seqlens: &[i32],
        dtype: DeviceType,
        kernels: Kernels,
    ) -> Result<Self> {
        let layout = spec.layout;
        if !((spec.scale * std::f64::consts::LOG2_E) as f32).is_finite() {
            return Err(KernelError::size(FORWARD, "scale", "finite in float32, times log2(e) too", spec.scale));
        }
        check_layout(FORWARD, &layout, dtype)?;
        let documents = documents(FORWARD, cu_seqlens, layout.tokens)?;
        let path = if dtype == DeviceType::F32 {
            Path::Float(f32_cuda::Plan::new(queue, FORWARD, f32_cuda::Kind::StickBreaking, &layout, &documents)?)
        } else {
            Path::TensorCores(Box::new(TensorCores::new(queue, &layout, &documents, kernels)?))
        };
        Ok(Self { inner: Arc::new(Inner { spec: *spec, documents, dtype, path }) })
    }

    /// What it was made for.
    pub fn spec(&self) -> &StickBreakingSpec {
        &self.inner.spec
    }

    /// Writes o (with `output_stride`), and rem and log2_rem, f32 `[tokens, query_heads]`, if wanted. With `save`, returns
    /// what [`backward`](Self::backward) needs; without, nothing is kept.
    ///
    /// # Errors
    /// Views that do not fit the layout (nothing is launched then), or a failure of the device.
    #[expect(clippy::too_many_arguments, reason = "each is a tensor of its own")]
    pub fn forward(
        &self,
        queue: &Queue,
        q: DeviceRef<'_>,
        k: DeviceRef<'_>,
        v: DeviceRef<'_>,
        o: &mut DeviceMut<'_>,
        rem: Option<&mut DeviceMut<'_>>,
        log2_rem: Option<&mut DeviceMut<'_>>,
        save: bool,
    ) -> Result<Option<Saved>> {
        let Inner { spec, dtype, path, .. } = &*self.inner;
        let layout = &spec.layout;
        check_inputs(FORWARD, layout, *dtype, [q, k, v])?;
        check_output(FORWARD, "o", layout, *dtype, o)?;
        let rem_view = rem.as_deref().map(DeviceMut::as_ref);
        for (argument, view) in [("rem", rem_view), ("log2_rem", log2_rem.as_deref().map(DeviceMut::as_ref))] {
            if let Some(view) = view {
                check_flat(FORWARD, argument, &view, DeviceType::F32, layout.tokens * layout.query_heads)?;
            }
        }
        let tiles = match path {
            Path::Float(plan) => plan.query_tiles(),
            Path::TensorCores(kernels) => kernels.pieces,
        };
        let wanted = save && spec.early_exit_bits > 0;
        let mut first_tiles = wanted.then(|| queue.scratch(DeviceType::U32, tiles * layout.query_heads)).transpose()?;
        let (mut sticks, mut kept) = (None, Kept::Newest(0));
        let mut first = first_tiles.as_mut().map(Scratch::as_mut);
        match path {
            Path::Float(plan) => {
                plan.stick_breaking_forward(queue, spec, [q, k, v], o, rem, log2_rem, first.as_mut())?;
            }
            Path::TensorCores(kernels) => {
                if save {
                    // With the logarithm the kernel is a portable one.
                    kept = if log2_rem.is_some() { kernels.kept(layout).portable() } else { kernels.kept(layout) };
                }
                if kept != Kept::Newest(0) {
                    sticks = Some(kernels.scratch_for_sticks(queue, layout.query_heads, kept)?);
                }
                let call = Forward {
                    inputs: [q, k, v],
                    o: Arg::from(o),
                    rem: Arg::optional_mut(rem),
                    with_log: log2_rem.is_some(),
                    log2_rem: Arg::optional_mut(log2_rem),
                    sticks: Arg::optional_mut(sticks.as_mut().map(Scratch::as_mut).as_mut()),
                    kept: kept.newest(),
                    first_blocks: Arg::optional_mut(first.as_mut()),
                };
                kernels.forward(queue, spec, call)?;
            }
        }
        Ok(save.then(|| Saved { plan: self.clone(), first_tiles, sticks, kept }))
    }

    /// Writes the gradients of `sum(o * d_o) + sum(rem * drem)`, contiguous whatever the strides of the inputs, in full. d_o
    /// has the layout of o, drem is f32 `[tokens, query_heads]` (None: zero), `saved` comes from
    /// [`forward`](Self::forward) with the same inputs.
    ///
    /// # Errors
    /// Views that do not fit the layout or the state of another spec (nothing is launched then), or a failure of the device.
    #[expect(clippy::too_many_arguments, reason = "each is a tensor of its own")]
    pub fn backward(
        &self,
        queue: &Queue,
        q: DeviceRef<'_>,
        k: DeviceRef<'_>,
        v: DeviceRef<'_>,
        d_o: DeviceRef<'_>,
        drem: Option<DeviceRef<'_>>,
        saved: &Saved,
        dq: &mut DeviceMut<'_>,
        dk: &mut DeviceMut<'_>,
        dv: &mut DeviceMut<'_>,
    ) -> Result<()> {
        let gradients = [dq.reborrow(), dk.reborrow(), dv.reborrow()];
        self.backward_by(queue, [q, k, v], d_o, drem, saved, gradients, &mut |_, launch| launch())
    }

    /// [`backward`](Self::backward) without drem, with the name of each kernel in bf16 and the milliseconds it took; waits for
    /// each. For measurements.
    ///
    /// # Errors
    /// As [`backward`](Self::backward).
    pub fn time_backward(
        &self,
        queue: &Queue,
        inputs: [DeviceRef<'_>; 3],
        d_o: DeviceRef<'_>,
        saved: &Saved,
        gradients: [DeviceMut<'_>; 3],
    ) -> Result<Vec<(&'static str, f64)>> {
        let mut times = Vec::new();
        self.backward_by(queue, inputs, d_o, None, saved, gradients, &mut |name, launch| {
            let timer = queue.timer()?;
            launch()?;
            times.push((name, timer.milliseconds()?));
            Ok(())
        })?;
        Ok(times)
    }

    #[expect(clippy::too_many_arguments, reason = "each is a tensor of its own")]
    fn backward_by(
        &self,
        queue: &Queue,
        [q, k, v]: [DeviceRef<'_>; 3],
        d_o: DeviceRef<'_>,
        drem: Option<DeviceRef<'_>>,
        saved: &Saved,
        gradients: [DeviceMut<'_>; 3],
        run: Run<'_>,
    ) -> Result<()> {
        let Inner { spec, dtype, path, .. } = &*self.inner;
        let layout = &spec.layout;
        if !saved.plan.same(self) {
            return Err(KernelError::size(BACKWARD, "saved", "from a forward pass of the same plan", "another plan's"));
        }
        check_inputs(BACKWARD, layout, *dtype, [q, k, v])?;
        check_output(BACKWARD, "d_o", layout, *dtype, &d_o)?;
        if let Some(drem) = &drem {
            check_flat(BACKWARD, "drem", drem, DeviceType::F32, layout.tokens * layout.query_heads)?;
        }
        check_gradients(BACKWARD, layout, *dtype, gradients.each_ref())?;
        let first = saved.first_tiles.as_ref().map(Scratch::as_ref);
        match path {
            Path::Float(plan) => plan.stick_breaking_backward(queue, spec, [q, k, v], d_o, drem, first, gradients),
            Path::TensorCores(kernels) => {
                let sticks = saved.sticks.as_ref().map(|sticks| (sticks.as_ref(), saved.kept));
                kernels.backward(queue, spec, [q, k, v], d_o, drem, (first, sticks), gradients, run)
            }
        }
    }

    fn same(&self, other: &Self) -> bool {
        let (a, b) = (&*self.inner, &*other.inner);
        Arc::ptr_eq(&self.inner, &other.inner) || (a.spec == b.spec && a.dtype == b.dtype && a.documents == b.documents)
    }
}

/// Rows of one piece of the state.
pub(super) const PIECE: usize = 64;

/// Sizes that `cuda/stick_breaking.cu` derives from the head dim, once more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    head_dim: usize,
    /// Stages of the copies: 2, or 1 where shared memory is short.
    stages: usize,
    /// Keys of a block of the state, and that the forward pass takes at a time.
    keys: usize,
    forward_keys: usize,
    forward_rows: usize,
}

impl Shape {
    const WARPS: usize = 4;
    const DQ_ROWS: usize = 16 * Self::WARPS;

    /// For a device whose thread blocks can have so much shared memory.
    fn new(head_dim: usize, shared_memory: usize) -> Result<Self> {
        let keys = if head_dim > 128 { 32 } else { 64 };
        let row_tiles = if head_dim > 128 { 1 } else { 2 };
        let forward_keys = if head_dim > 64 { 32 } else { keys };
        let shape = |stages| Self { head_dim, stages, keys, forward_keys, forward_rows: 16 * Self::WARPS * row_tiles };
        match [shape(2), shape(1)].into_iter().find(|shape| shape.largest() <= shared_memory) {
            Some(shape) => Ok(shape),
            None => {
                let expected = format!("at least {} bytes per block for head_dim {head_dim}", shape(1).largest());
                Err(KernelError::size(FORWARD, "the device's shared memory", expected, shared_memory))
            }
        }
    }

    fn source(&self) -> Source {
        let parts = &[
            include_str!("../../../cuda/attention.cuh"),
            include_str!("../../../cuda/stick_breaking.cuh"),
            include_str!("../../../cuda/stick_breaking.cu"),
        ];
        let defines = vec![("HEAD_DIM", self.head_dim.to_string()), ("STAGES", self.stages.to_string())];
        Source { file: "stick_breaking.cu", parts, defines }
    }

    /// Bytes of a row in shared memory: padded to 16 dimensions, and by 16 bytes.
    fn row(&self) -> usize {
        2 * self.head_dim.next_multiple_of(16) + 16
    }

    fn forward_shared(&self) -> usize {
        self.row() * (self.forward_rows + 2 * self.stages * self.forward_keys)
    }

    fn sticks_shared(&self) -> usize {
        self.row() * (self.forward_rows + self.stages * self.keys)
    }

    fn dq_shared(&self) -> usize {
        self.row() * (2 * Self::DQ_ROWS + 2 * self.stages * self.keys)
    }

    fn dkdv_shared(&self) -> usize {
        // What two thread blocks of one multiprocessor can have on Hopper.
        const TWO_BLOCKS: usize = 226 << 10;
        let tiles = self.row() * (2 * self.keys + 2 * self.stages * PIECE);
        let exchange = PIECE * (2 * self.keys + 16);
        let one_fits_twice = 2 * (tiles + exchange) <= TWO_BLOCKS;
        let two_fit_twice = 2 * (tiles + 2 * exchange) <= TWO_BLOCKS;
        tiles + if one_fits_twice && !two_fit_twice { exchange } else { 2 * exchange }
    }

    fn largest(&self) -> usize {
        [self.forward_shared(), self.sticks_shared(), self.dq_shared(), self.dkdv_shared()]
            .into_iter()
            .max()
            .unwrap_or(0)
    }

    /// State entries of a document, one per piece and block of keys.
    fn entries(&self, length: usize) -> usize {
        let pieces = length.div_ceil(PIECE);
        pieces * (pieces + 1) / 2 * (PIECE / self.keys)
    }

    /// Tiles of `rows` rows: first token of the document, its length, the tile's first row, the document's first state
    /// entry and first piece. Those with the most work first: the last rows of a document, or with `keys` the first.
    pub(super) fn tiles(&self, documents: &[Range<usize>], rows: usize, keys: bool) -> Vec<[i32; 5]> {
        let (mut entry, mut piece) = (0, 0);
        let mut tiles = Vec::new();
        for document in documents {
            let length = document.len();
            let one = |first: usize| [document.start, length, first, entry, piece].map(|x| x as i32);
            tiles.extend((0..length).step_by(rows).map(one));
            entry += self.entries(length);
            piece += length.div_ceil(PIECE);
        }
        tiles.sort_by_key(|&[_, length, first, ..]| if keys { first - length } else { -first });
        tiles
    }

    fn visited_tiles(
        &self,
        spec: &StickBreakingSpec,
        documents: &[Range<usize>],
        first_blocks: &[u32],
    ) -> (Vec<u64>, u64) {
        let pieces = documents.iter().flat_map(|document| {
            let ends = (0..document.len()).step_by(PIECE).map(|row| (row + PIECE).min(document.len()));
            ends.map(|end| spec.visible_keys(end - 1).div_ceil(self.keys) as u64)
        });
        let (count, causal) = pieces.fold((0, 0), |(count, sum), blocks| (count + 1, sum + blocks));
        let mut visited = vec![causal; spec.layout.query_heads];
        for (visited, first) in visited.iter_mut().zip(first_blocks.chunks(count.max(1))) {
            *visited -= first.iter().map(|&first| u64::from(first)).sum::<u64>();
        }
        (visited, causal)
    }
}

/// Rows of each tile of a list, and whether they are keys rather than queries.
pub(super) type TileSize = (usize, bool);

/// The tile lists of a plan, brought to the device together: a further upload could have to wait for the device.
struct TileLists {
    memory: Arc<Scratch>,
    spans: Vec<(TileSize, Range<usize>)>,
}

impl TileLists {
    fn upload(queue: &Queue, shape: &Shape, documents: &[Range<usize>], mut sizes: Vec<TileSize>) -> Result<Self> {
        sizes.sort_unstable();
        sizes.dedup();
        let mut tiles = Vec::new();
        let spans = sizes.into_iter().map(|size| {
            let first = tiles.len();
            tiles.extend(shape.tiles(documents, size.0, size.1));
            (size, first..tiles.len())
        });
        let spans = spans.collect();
        Ok(Self { memory: Arc::new(queue.upload(tiles.as_flattened())?), spans })
    }

    /// The list of a size that was asked for; of another one there is none, rather than one without tiles.
    fn get(&self, size: TileSize) -> Result<Tiles> {
        match self.spans.iter().find(|(of, _)| *of == size) {
            Some((_, span)) => Ok(Tiles { memory: self.memory.clone(), span: span.clone() }),
            None => Err(KernelError::size(FORWARD, "the tile list", "one of the plan's", format!("{size:?}"))),
        }
    }
}

/// One list of tiles on the device.
#[derive(Debug)]
pub(super) struct Tiles {
    memory: Arc<Scratch>,
    span: Range<usize>,
}

impl Tiles {
    pub(super) fn count(&self) -> usize {
        self.span.len()
    }

    /// What [`Shape::tiles`] made, five numbers a tile.
    pub(super) fn list(&self) -> DeviceRef<'_> {
        self.memory.as_ref().as_ref().slice(5 * self.span.start..5 * self.span.end)
    }

    fn launch(&self, heads: usize, threads: usize, shared: usize) -> Launch {
        Launch { grid: [self.count() as u32, heads as u32, 1], block: threads as u32, shared }
    }
}

#[derive(Debug)]
struct TensorCores {
    shape: Shape,
    /// State entries and pieces of one head.
    entries: usize,
    pieces: usize,
    query_tiles: Tiles,
    dq_tiles: Tiles,
    key_tiles: Tiles,
    forward: Kernel,
    forward_log: Kernel,
    sticks: Kernel,
    dq: Kernel,
    dkdv: Kernel,
    hopper: Option<Hopper>,
}

/// Which part of the state the forward pass keeps: of each piece of 64 queries that of
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    /// every block of keys: u16 `[query_heads, entries, PIECE]` ([`Shape::entries`]).
    All,
    /// at most an even number of them, the piece's own and those next to it: u16 `[query_heads, pieces, blocks, PIECE]`.
    Newest(usize),
}

impl Kept {
    /// Zero for all.
    fn newest(self) -> usize {
        match self {
            Self::All => 0,
            Self::Newest(blocks) => blocks,
        }
    }

    /// What the portable kernels can keep of it.
    fn portable(self) -> Self {
        match self {
            Self::All => self,
            Self::Newest(_) => Self::Newest(0),
        }
    }
}

/// What a forward pass reads, and where it writes.
pub(super) struct Forward<'a> {
    pub(super) inputs: [DeviceRef<'a>; 3],
    pub(super) o: Arg,
    pub(super) rem: Arg,
    pub(super) log2_rem: Arg,
    pub(super) with_log: bool,
    pub(super) sticks: Arg,
    /// [`Kept::newest`].
    pub(super) kept: usize,
    pub(super) first_blocks: Arg,
}

/// What a backward pass reads, and where it writes. The state is that of the heads of the call.
pub(super) struct Backward<'a> {
    pub(super) inputs: [DeviceRef<'a>; 3],
    pub(super) d_o: DeviceRef<'a>,
    pub(super) drem: Arg,
    pub(super) sticks: Arg,
    pub(super) first_blocks: Arg,
    /// dq, dk, dv.
    pub(super) gradients: [Arg; 3],
}

impl TensorCores {
    fn new(queue: &Queue, layout: &AttentionLayout, documents: &[Range<usize>], kernels: Kernels) -> Result<Self> {
        let shape = Shape::new(layout.head_dim, queue.gpu().shared_memory_per_block())?;
        let entries = documents.iter().map(|document| shape.entries(document.len())).sum();
        let longest = documents.iter().map(|document| document.len()).max().unwrap_or(0);
        // Indices inside a head are 32 bits wide, and so are offsets inside a tile, and m (m + 1) for the last piece m.
        let strides = [layout.query_stride, layout.key_stride, layout.value_stride, layout.output_stride];
        for (what, found, most) in [
            ("tokens", layout.tokens, i32::MAX as usize),
            ("the longest document", longest, MOST_PIECES * PIECE),
            ("the number of pairs of 64 queries and 64 keys", entries, i32::MAX as usize),
            ("the largest stride", strides.into_iter().max().unwrap_or(0), 1 << 24),
        ] {
            if found > most {
                return Err(KernelError::size(FORWARD, what, format!("at most {most} for bf16 on CUDA"), found));
            }
        }
        let choice = match kernels {
            Kernels::Automatic if hopper::refusal(queue, layout).is_none() => Some(Choice::new(layout.head_dim)),
            Kernels::Automatic | Kernels::Portable => None,
            Kernels::Hopper(choice) => Some(choice),
        };
        let [queries, dq, keys] = [(shape.forward_rows, false), (Shape::DQ_ROWS, false), (shape.keys, true)];
        let mut sizes = choice.map(|choice| choice.tile_sizes()).unwrap_or_default();
        sizes.extend([queries, dq, keys]);
        let lists = TileLists::upload(queue, &shape, documents, sizes)?;
        let source = shape.source();
        let kernel = |entry| queue.gpu().kernel(&source, entry);
        Ok(Self {
            shape,
            entries,
            pieces: documents.iter().map(|document| document.len().div_ceil(PIECE)).sum(),
            query_tiles: lists.get(queries)?,
            dq_tiles: lists.get(dq)?,
            key_tiles: lists.get(keys)?,
            forward: kernel("stick_breaking_forward_bf16")?,
            forward_log: kernel("stick_breaking_forward_log_bf16")?,
            sticks: kernel("stick_breaking_sticks_bf16")?,
            dq: kernel("stick_breaking_backward_dq_bf16")?,
            dkdv: kernel("stick_breaking_backward_dkdv_bf16")?,
            hopper: choice.map(|choice| Hopper::new(queue, layout, choice, |size| lists.get(size))).transpose()?,
        })
    }

    /// Numbers of state of one query head.
    fn head_state(&self) -> usize {
        self.entries * PIECE
    }

    /// Two sticks a word.
    fn scratch_for_sticks(&self, queue: &Queue, heads: usize, kept: Kept) -> Result<Scratch> {
        let head = match kept {
            Kept::All => self.head_state(),
            Kept::Newest(blocks) => self.pieces * blocks * PIECE,
        };
        queue.scratch(DeviceType::U32, heads * head / 2)
    }

    /// How much of the state is worth keeping: what takes at most an eighth of q, k, v and o. One entry of each piece is the
    /// remainder, which does not count where all is kept.
    fn kept(&self, layout: &AttentionLayout) -> Kept {
        // A part of it is known to the Hopper kernels alone.
        let parts = |hopper: &&Hopper| hopper.forward.is_some() && hopper.sticks.is_some();
        let hopper = self.hopper.as_ref();
        if let Some(blocks) = hopper.and_then(|hopper| hopper.kept) {
            // No document has more.
            let blocks = blocks.min(self.pieces + 1) / 2 * 2;
            return Kept::Newest(hopper.filter(parts).map_or(0, |_| blocks));
        }
        let block = layout.query_heads * PIECE * STICK_BYTES;
        let heads = 2 * (layout.query_heads + layout.kv_heads);
        let most = layout.tokens * heads * layout.head_dim * DeviceType::Bf16.size() / 8;
        if (self.entries - self.pieces.min(self.entries)) * block <= most {
            return Kept::All;
        }
        Kept::Newest(hopper.filter(parts).map_or(0, |_| most / (self.pieces * block) / 2 * 2))
    }

    /// What a product q . k is multiplied by to be the binary logarithm of the odds. A score that nobody sees is -infinity
    /// before that, so it is never 0.
    fn factor(spec: &StickBreakingSpec) -> f32 {
        let factor = spec.scale * std::f64::consts::LOG2_E;
        (if factor.abs() < 1e-30 { 1e-30 } else { factor }) as f32
    }

    /// Strides and sizes as all kernels take them, ahead of the last two parameters.
    fn sizes(&self, spec: &StickBreakingSpec, first_head: usize) -> [Arg; 11] {
        let layout = &spec.layout;
        let [a, b, c, d, e, f, g, h, i, j] = [
            layout.query_stride,
            layout.key_stride,
            layout.value_stride,
            layout.output_stride,
            layout.query_heads,
            layout.group(),
            first_head,
            self.entries,
            self.pieces,
            usize::from(spec.attend_current),
        ]
        .map(|size| Arg::from(size as i32));
        [a, b, c, d, e, f, g, h, i, j, Self::factor(spec).into()]
    }

    fn forward(&self, queue: &Queue, spec: &StickBreakingSpec, call: Forward<'_>) -> Result<()> {
        let hopper = self.hopper.as_ref().and_then(|hopper| hopper.forward.as_ref());
        if let (Some(hopper), false) = (hopper, call.with_log) {
            return hopper.run(queue, spec, (self.entries, self.pieces), Self::factor(spec), call);
        }
        let list = self.query_tiles.list().into();
        let Forward { inputs: [q, k, v], o, rem, log2_rem, with_log, sticks, kept: _, first_blocks } = call;
        let [a, b, c, d, e, f, g, h, i, j, factor] = self.sizes(spec, 0);
        let arguments = [
            q.into(),
            k.into(),
            v.into(),
            o,
            rem,
            log2_rem,
            sticks,
            first_blocks,
            list,
            a,
            b,
            c,
            d,
            e,
            f,
            g,
            h,
            i,
            j,
            factor,
            spec.threshold().into(),
        ];
        // With the logarithm a warp has half as many rows.
        let threads = if with_log { 2 * self.shape.forward_rows } else { 32 * Shape::WARPS };
        let kernel = if with_log { &self.forward_log } else { &self.forward };
        let launch = self.query_tiles.launch(spec.layout.query_heads, threads, self.shape.forward_shared());
        queue.launch(kernel, launch, &arguments)
    }

    fn backward(
        &self,
        queue: &Queue,
        spec: &StickBreakingSpec,
        [q, k, v]: [DeviceRef<'_>; 3],
        d_o: DeviceRef<'_>,
        drem: Option<DeviceRef<'_>>,
        (first_blocks, saved): (Option<DeviceRef<'_>>, Option<(DeviceRef<'_>, Kept)>),
        [mut dq, mut dk, mut dv]: [DeviceMut<'_>; 3],
        run: Run<'_>,
    ) -> Result<()> {
        let layout = &spec.layout;
        let group = layout.group();
        let one_kernel = self.hopper.as_ref().and_then(|hopper| hopper.backward.as_ref());
        // What a head needs: the sums, or on Hopper the chains, and the state where it is rebuilt.
        let (sums_bytes, sticks_bytes) = (self.head_state() * size_of::<f32>(), self.head_state() * STICK_BYTES);
        let chain_bytes = one_kernel.map(|_| hopper::backward::Chains::head_bytes(layout.head_dim, self.pieces));
        // All of it is there, or part of it, which only the Hopper kernel can go on from, or nothing.
        let (mut whole, mut part) = (None, (None, 0));
        match saved {
            Some((sticks, Kept::All)) => whole = Some(sticks),
            Some((sticks, Kept::Newest(blocks))) => part = (Some(sticks), blocks),
            None => (),
        }
        let rebuilt_bytes = if whole.is_some() { 0 } else { sticks_bytes };
        let group_bytes = group * (rebuilt_bytes + chain_bytes.unwrap_or(sums_bytes));
        let groups = (STATE_BYTES / group_bytes.max(1)).clamp(1, layout.kv_heads);
        let mut rebuilt = match whole {
            Some(_) => None,
            None => Some(self.scratch_for_sticks(queue, groups * group, Kept::All)?),
        };
        let null = Arg::optional(None);
        for first_group in (0..layout.kv_heads).step_by(groups) {
            let kv_heads = groups.min(layout.kv_heads - first_group);
            let (first_head, heads) = (first_group * group, kv_heads * group);
            let [a, b, c, d, e, f, g, h, i, j, factor] = self.sizes(spec, first_head);
            let state = (self.entries, self.pieces);
            let hopper = self.hopper.as_ref().and_then(|hopper| hopper.sticks.as_ref());
            if let (Some(hopper), Some(rebuilt)) = (hopper, &mut rebuilt) {
                let (sticks, first_blocks) = (Arg::from(&mut rebuilt.as_mut()), Arg::optional(first_blocks));
                let heads = first_head..first_head + heads;
                run("sticks", &mut || {
                    hopper.run(
                        queue,
                        spec,
                        state,
                        Self::factor(spec),
                        heads.clone(),
                        [q, k],
                        first_blocks,
                        part,
                        sticks,
                    )
                })?;
            } else if let Some(rebuilt) = &mut rebuilt {
                let arguments = [
                    q.into(),
                    k.into(),
                    v.into(),
                    null,
                    null,
                    null,
                    Arg::from(&mut rebuilt.as_mut()),
                    Arg::optional(first_blocks),
                    self.query_tiles.list().into(),
                    a,
                    b,
                    c,
                    d,
                    e,
                    f,
                    g,
                    h,
                    i,
                    j,
                    factor,
                    Arg::from(0.0f32),
                ];
                let launch = self.query_tiles.launch(heads, 32 * Shape::WARPS, self.shape.sticks_shared());
                run("sticks", &mut || queue.launch(&self.sticks, launch, &arguments))?;
            }
            let sticks = match (whole, &rebuilt) {
                (Some(saved), _) => saved.slice(first_head * self.head_state() / 2..saved.len()).into(),
                (None, Some(rebuilt)) => rebuilt.as_ref().into(),
                (None, None) => null,
            };
            if let Some(kernel) = one_kernel {
                let call = Backward {
                    inputs: [q, k, v],
                    d_o,
                    drem: Arg::optional(drem),
                    sticks,
                    first_blocks: Arg::optional(first_blocks),
                    gradients: [&mut dq, &mut dk, &mut dv].map(Arg::from),
                };
                let mut chains = kernel.chains(queue, layout, self.pieces, first_head..first_head + heads)?;
                run("backward", &mut || kernel.run(queue, spec, state, Self::factor(spec), &mut chains, &call))?;
                run("finish", &mut || kernel.finish(queue, spec, self.pieces, &chains, &call))?;
                continue;
            }
            let mut sums = queue.scratch(DeviceType::F32, heads * self.head_state())?;
            let mut arguments = |tiles: &Tiles| {
                [
                    q.into(),
                    k.into(),
                    v.into(),
                    d_o.into(),
                    Arg::optional(drem),
                    sticks,
                    Arg::from(&mut sums.as_mut()),
                    Arg::optional(first_blocks),
                    Arg::from(&mut dq),
                    Arg::from(&mut dk),
                    Arg::from(&mut dv),
                    tiles.list().into(),
                    a,
                    b,
                    c,
                    d,
                    e,
                    f,
                    g,
                    h,
                    i,
                    j,
                    factor,
                    Arg::from(spec.scale as f32),
                ]
            };
            let [dq_arguments, dkdv_arguments] = [&self.dq_tiles, &self.key_tiles].map(&mut arguments);
            run("dq", &mut || {
                let launch = self.dq_tiles.launch(heads, 32 * Shape::WARPS, self.shape.dq_shared());
                queue.launch(&self.dq, launch, &dq_arguments)
            })?;
            run("dk, dv", &mut || {
                let launch = self.key_tiles.launch(kv_heads, 32 * Shape::WARPS, self.shape.dkdv_shared());
                queue.launch(&self.dkdv, launch, &dkdv_arguments)
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_with_the_most_work_come_first() {
        let shape = Shape::new(64, usize::MAX).unwrap();
        let documents = [0..0, 0..130, 130..131];
        let queries = shape.tiles(&documents, 128, false);
        assert_eq!(queries, [[0, 130, 128, 0, 0], [0, 130, 0, 0, 0], [130, 1, 0, 6, 3]]);
        let keys = shape.tiles(&documents, 64, true);
        assert_eq!(keys, [[0, 130, 0, 0, 0], [0, 130, 64, 0, 0], [0, 130, 128, 0, 0], [130, 1, 0, 6, 3]]);
        assert_eq!((shape.entries(130), shape.entries(0)), (6, 0));
    }

    #[test]
    fn shared_memory_fits_the_cards() {
        for head_dim in bf16_head_dims() {
            let hopper = Shape::new(head_dim, 227 << 10).unwrap();
            assert_eq!((hopper.stages, hopper.head_dim), (2, head_dim));
            assert!(head_dim > 128 || 2 * (hopper.dkdv_shared() + 1024) <= 228 << 10, "{head_dim}");
            assert!(Shape::new(head_dim, 163 << 10).is_ok());
            assert_eq!(Shape::new(head_dim, 99 << 10).is_ok(), head_dim <= 128);
        }
    }

    #[test]
    fn visited_tiles_are_counted_per_head() {
        let layout = AttentionLayout::contiguous(131, 2, 1, 64);
        let spec = StickBreakingSpec::new(layout);
        let shape = Shape::new(64, usize::MAX).unwrap();
        // Pieces of 64, 64 and 2 rows see 1, 2 and 3 blocks; the document of one token sees none.
        let documents = [0..130, 130..131];
        assert_eq!(shape.visited_tiles(&spec, &documents, &[]), (vec![6, 6], 6));
        assert_eq!(shape.visited_tiles(&spec, &documents, &[0, 1, 1, 0, 0, 0, 2, 0]), (vec![4, 4], 6));
    }
}
