//! Both attentions in float32 on the GPU (`cuda/attention_f32.cu`): true float32 arithmetic for checks and for small
//! models, with memory linear in the tokens. The plans of [`stick_breaking`](super::stick_breaking) and
//! [`softmax`](super::softmax) check the arguments and come here for float32.

use std::ops::Range;

use super::AttentionLayout;
use super::stick_breaking::StickBreakingSpec;
use crate::cuda::{Arg, DeviceMut, DeviceRef, DeviceType, Kernel, Launch, Queue, Scratch, Source};
use crate::{KernelError, Result};

const WIDTHS: [usize; 4] = [32, 64, 128, 256];
const THREADS: u32 = 256;
/// State that the backward pass of stick-breaking attention may hold at a time; longer inputs take their query tiles in
/// chunks.
const STATE_BYTES: usize = 256 << 20;

/// All that can be asked for.
pub(crate) fn sources() -> Vec<Source> {
    WIDTHS.iter().map(|&width| source(width)).collect()
}

fn source(width: usize) -> Source {
    let parts = &[include_str!("../../cuda/attention_f32.cu")];
    Source { file: "attention_f32.cu", parts, defines: vec![("WIDTH", width.to_string())] }
}

/// Which attention a plan is for, and with that which entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    StickBreaking,
    Softmax,
}

/// Tiles of a packed layout, on the device, and the kernels for its head dim.
#[derive(Debug)]
pub(crate) struct Plan {
    layout: AttentionLayout,
    width: usize,
    tile: usize,
    /// int4 per tile, see the kernels.
    list: Scratch,
    /// Key tiles that each query tile sees at most, in the order of the list.
    tiles: usize,
    chunks: Vec<Chunk>,
    forward: Kernel,
    dq: Kernel,
    dkv: Kernel,
}

/// Query tiles whose state is held at the same time.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Chunk {
    tiles: Range<usize>,
    /// Pairs of a query tile and a key tile.
    pairs: usize,
}

/// q, k, v.
pub(crate) type Inputs<'a> = [DeviceRef<'a>; 3];

/// dq, dk, dv, contiguous.
pub(crate) type Gradients<'a> = [DeviceMut<'a>; 3];

/// The tile list, and its cut into chunks of at most `most` pairs (but at least one query tile).
fn cut(documents: &[Range<usize>], tile: usize, most: usize) -> (Vec<i32>, Vec<Chunk>) {
    let (mut list, mut chunks) = (Vec::new(), vec![Chunk { tiles: 0..0, pairs: 0 }]);
    let mut count = 0;
    for document in documents {
        for number in 0..document.len().div_ceil(tile) {
            // With the own key, query tile n sees n + 1 key tiles.
            let pairs = number + 1;
            if chunks.last().is_some_and(|chunk| chunk.pairs > 0 && chunk.pairs + pairs > most) {
                chunks.push(Chunk { tiles: count..count, pairs: 0 });
            }
            if let Some(chunk) = chunks.last_mut() {
                list.extend([document.start, document.len(), number, chunk.pairs].map(|x| x as i32));
                chunk.pairs += pairs;
                count += 1;
                chunk.tiles.end = count;
            }
        }
    }
    (list, chunks)
}

impl Plan {
    /// `layout` and `documents` have been checked.
    pub fn new(
        queue: &Queue,
        op: &'static str,
        kind: Kind,
        layout: &AttentionLayout,
        documents: &[Range<usize>],
    ) -> Result<Self> {
        let Some(&width) = WIDTHS.iter().find(|&&width| width >= layout.head_dim) else {
            return Err(KernelError::size(op, "head_dim", "at most 256 on CUDA", layout.head_dim));
        };
        let tile = match width {
            32 | 64 => 64,
            128 => 32,
            _ => 16,
        };
        let bytes_per_pair = 2 * size_of::<f32>() * layout.query_heads * tile;
        let (list, chunks) = cut(documents, tile, STATE_BYTES / bytes_per_pair);
        let source = source(width);
        let kernel = |entry| queue.gpu().kernel(&source, entry);
        let [forward, dq, dkv] = match kind {
            Kind::StickBreaking => ["stick_breaking_forward_f32", "stick_breaking_dq_f32", "stick_breaking_dkv_f32"],
            Kind::Softmax => ["softmax_forward_f32", "softmax_dq_f32", "softmax_dkv_f32"],
        };
        Ok(Self {
            layout: *layout,
            width,
            tile,
            tiles: list.len() / 4,
            list: queue.upload(&list)?,
            chunks,
            forward: kernel(forward)?,
            dq: kernel(dq)?,
            dkv: kernel(dkv)?,
        })
    }

    /// Query tiles of one head. The state of an early exit is `query_heads * query_tiles()` u32.
    pub fn query_tiles(&self) -> usize {
        self.tiles
    }

    /// For each query head how many pairs of a query tile and a key tile were visited, and how many one head has, from a
    /// copy of the state of an early exit (empty: none).
    pub fn visited_tiles(
        &self,
        documents: &[Range<usize>],
        attend_current: bool,
        first_key_tiles: &[u32],
    ) -> (Vec<u64>, u64) {
        let own_key = usize::from(attend_current);
        let key_tiles: Vec<u64> = documents
            .iter()
            .flat_map(|document| {
                let ends = (0..document.len()).step_by(self.tile).map(|row| (row + self.tile).min(document.len()));
                ends.map(|end| (end - 1 + own_key).div_ceil(self.tile) as u64)
            })
            .collect();
        let causal: u64 = key_tiles.iter().sum();
        let mut visited = vec![causal; self.layout.query_heads];
        for (head, first) in first_key_tiles.chunks(self.tiles.max(1)).enumerate() {
            visited[head] -= first.iter().map(|&first| u64::from(first)).sum::<u64>();
        }
        (visited, causal)
    }

    /// Dynamic shared memory of a block that holds so many tiles of rows, and a square of weights.
    fn shared(&self, tiles: usize) -> usize {
        size_of::<f32>() * self.tile * (tiles * (self.width + 4) + self.tile + 4)
    }

    fn launch(&self, tiles: usize, heads: usize, row_tiles: usize) -> Launch {
        Launch { grid: [tiles as u32, heads as u32, 1], block: THREADS, shared: self.shared(row_tiles) }
    }

    /// heads, kv_heads, head_dim and strides, as all kernels take them.
    fn sizes(&self) -> [Arg; 7] {
        let layout = &self.layout;
        [
            layout.query_heads,
            layout.kv_heads,
            layout.head_dim,
            layout.query_stride,
            layout.key_stride,
            layout.value_stride,
            layout.output_stride,
        ]
        .map(|size| Arg::from(size as i32))
    }

    /// Whether rows may be read 16 bytes at a time.
    fn vectors(&self, views: &[DeviceRef<'_>]) -> Arg {
        let layout = &self.layout;
        let sizes =
            [layout.head_dim, layout.query_stride, layout.key_stride, layout.value_stride, layout.output_stride];
        let aligned = sizes.iter().all(|size| size.is_multiple_of(4))
            && views.iter().all(|view| view.pointer().is_multiple_of(16));
        Arg::from(i32::from(aligned))
    }

    /// o, and rem, log2_rem and the first key tiles if wanted. Nothing is skipped without `spec.early_exit_bits`.
    pub fn stick_breaking_forward(
        &self,
        queue: &Queue,
        spec: &StickBreakingSpec,
        [q, k, v]: Inputs<'_>,
        o: &mut DeviceMut<'_>,
        rem: Option<&mut DeviceMut<'_>>,
        log2_rem: Option<&mut DeviceMut<'_>>,
        first_key_tiles: Option<&mut DeviceMut<'_>>,
    ) -> Result<()> {
        let threshold = if spec.early_exit_bits == 0 { 0.0 } else { (-f64::from(spec.early_exit_bits)).exp2() };
        let mut arguments = vec![
            q.into(),
            k.into(),
            v.into(),
            o.into(),
            Arg::optional_mut(rem),
            Arg::optional_mut(log2_rem),
            Arg::optional_mut(first_key_tiles),
            self.list.as_ref().into(),
        ];
        arguments.extend(self.sizes());
        arguments.extend([
            (spec.scale as f32).into(),
            i32::from(spec.attend_current).into(),
            (threshold as f32).into(),
            self.vectors(&[q, k, v]),
        ]);
        queue.launch(&self.forward, self.launch(self.tiles, self.layout.query_heads, 3), &arguments)
    }

    /// dq, dk, dv. `first_key_tiles` is what the forward pass wrote, if it skipped anything.
    pub fn stick_breaking_backward(
        &self,
        queue: &Queue,
        spec: &StickBreakingSpec,
        [q, k, v]: Inputs<'_>,
        d_o: DeviceRef<'_>,
        d_rem: Option<DeviceRef<'_>>,
        first_key_tiles: Option<DeviceRef<'_>>,
        [mut dq, mut dk, mut dv]: Gradients<'_>,
    ) -> Result<()> {
        let layout = &self.layout;
        let pairs = self.chunks.iter().map(|chunk| chunk.pairs).max().unwrap_or(0);
        let state = pairs * layout.query_heads * self.tile;
        let (mut sticks, mut deltas) = (queue.scratch(DeviceType::F32, state)?, queue.scratch(DeviceType::F32, state)?);
        let vectors = self.vectors(&[q, k, v, d_o]);
        let own_key = Arg::from(i32::from(spec.attend_current));
        let scale = Arg::from(spec.scale as f32);
        let list = Arg::from(self.list.as_ref());
        for (number, chunk) in self.chunks.iter().enumerate() {
            let (first, end, pairs) = (chunk.tiles.start as i32, chunk.tiles.end as i32, chunk.pairs as i32);
            let mut arguments = vec![
                q.into(),
                k.into(),
                v.into(),
                d_o.into(),
                Arg::optional(d_rem),
                Arg::optional(first_key_tiles),
                (&mut sticks.as_mut()).into(),
                (&mut deltas.as_mut()).into(),
                (&mut dq).into(),
                list,
                (self.tiles as i32).into(),
                first.into(),
                pairs.into(),
            ];
            arguments.extend(self.sizes());
            arguments.extend([scale, own_key, vectors]);
            queue.launch(&self.dq, self.launch(chunk.tiles.len(), layout.query_heads, 4), &arguments)?;
            let mut arguments = vec![
                q.into(),
                k.into(),
                v.into(),
                d_o.into(),
                Arg::optional(first_key_tiles),
                sticks.as_ref().into(),
                deltas.as_ref().into(),
                (&mut dk).into(),
                (&mut dv).into(),
                list,
                (self.tiles as i32).into(),
                first.into(),
                end.into(),
                pairs.into(),
            ];
            arguments.extend(self.sizes());
            arguments.extend([scale, own_key, vectors, i32::from(number > 0).into()]);
            queue.launch(&self.dkv, self.launch(self.tiles, layout.kv_heads, 4), &arguments)?;
        }
        Ok(())
    }

    /// o and lse. `slopes`: one float per query head, or none.
    pub fn softmax_forward(
        &self,
        queue: &Queue,
        scale: f64,
        slopes: Option<DeviceRef<'_>>,
        [q, k, v]: Inputs<'_>,
        o: &mut DeviceMut<'_>,
        lse: &mut DeviceMut<'_>,
    ) -> Result<()> {
        let list = self.list.as_ref().into();
        let mut arguments = vec![q.into(), k.into(), v.into(), Arg::optional(slopes), o.into(), lse.into(), list];
        arguments.extend(self.sizes());
        arguments.extend([(scale as f32).into(), self.vectors(&[q, k, v])]);
        queue.launch(&self.forward, self.launch(self.tiles, self.layout.query_heads, 3), &arguments)
    }

    /// dq, dk, dv.
    pub fn softmax_backward(
        &self,
        queue: &Queue,
        scale: f64,
        slopes: Option<DeviceRef<'_>>,
        [q, k, v]: Inputs<'_>,
        o: DeviceRef<'_>,
        lse: DeviceRef<'_>,
        d_o: DeviceRef<'_>,
        [mut dq, mut dk, mut dv]: Gradients<'_>,
    ) -> Result<()> {
        let layout = &self.layout;
        let mut means = queue.scratch(DeviceType::F32, layout.tokens * layout.query_heads)?;
        let tail = [(scale as f32).into(), self.vectors(&[q, k, v, o, d_o])];
        let list = Arg::from(self.list.as_ref());
        let mut arguments = vec![
            q.into(),
            k.into(),
            v.into(),
            Arg::optional(slopes),
            o.into(),
            lse.into(),
            d_o.into(),
            (&mut means.as_mut()).into(),
            (&mut dq).into(),
            list,
        ];
        arguments.extend(self.sizes());
        arguments.extend(tail);
        queue.launch(&self.dq, self.launch(self.tiles, layout.query_heads, 4), &arguments)?;
        let mut arguments = vec![
            q.into(),
            k.into(),
            v.into(),
            Arg::optional(slopes),
            lse.into(),
            means.as_ref().into(),
            d_o.into(),
            (&mut dk).into(),
            (&mut dv).into(),
            list,
        ];
        arguments.extend(self.sizes());
        arguments.extend(tail);
        queue.launch(&self.dkv, self.launch(self.tiles, layout.kv_heads, 4), &arguments)
    }
}

#[cfg(test)]
#[path = "f32_cuda_tests.rs"]
mod gpu_tests;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_are_cut_into_chunks_of_few_pairs() {
        let (list, chunks) = cut(&[0..0, 0..130, 130..131], 64, 3);
        let expected: [[i32; 4]; 4] = [[0, 130, 0, 0], [0, 130, 1, 1], [0, 130, 2, 0], [130, 1, 0, 0]];
        assert_eq!(list, expected.as_flattened());
        let expected = [(0..2, 3), (2..3, 3), (3..4, 1)].map(|(tiles, pairs)| Chunk { tiles, pairs });
        assert_eq!(chunks, expected);
        assert_eq!(cut(&[], 64, 3), (vec![], vec![Chunk { tiles: 0..0, pairs: 0 }]));
    }
}
