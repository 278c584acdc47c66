//! Softmax attention on the GPU: bf16 on tensor cores (`cuda/softmax.cu`), float32 by `cuda/attention_f32.cu`.

use std::ops::Range;

use super::SoftmaxSpec;
use crate::Result;
use crate::attention::device::{
    bf16_head_dims, check_flat, check_gradients, check_inputs, check_layout, check_output, check_rows,
};
use crate::attention::{AttentionLayout, documents, f32_cuda};
use crate::cuda::{Arg, DeviceMut, DeviceRef, DeviceType, Kernel, Launch, Queue, Scratch, Source};

const FORWARD: &str = "softmax attention on CUDA";
const BACKWARD: &str = "softmax attention on CUDA, backward";

/// Everything that calls with one spec and the same documents share: tile lists on the device and loaded kernels. Made once
/// per batch, used by every layer.
#[derive(Debug)]
pub struct Plan {
    layout: AttentionLayout,
    scale: f64,
    dtype: DeviceType,
    /// Slopes in float32, if there are any.
    slopes: Option<Scratch>,
    path: Path,
}

#[derive(Debug)]
enum Path {
    Float(f32_cuda::Plan),
    TensorCores(TensorCores),
}

/// All sources that a plan can ask for in bf16.
pub(crate) fn sources() -> Vec<Source> {
    bf16_head_dims().map(source).collect()
}

fn source(head_dim: usize) -> Source {
    let parts = &[include_str!("../../../cuda/attention.cuh"), include_str!("../../../cuda/softmax.cu")];
    Source { file: "softmax.cu", parts, defines: vec![("HEAD_DIM", head_dim.to_string())] }
}

impl Plan {
    /// Checks the spec and the documents, and loads (compiles, the first time) the kernels. `dtype` is that of q, k, v and
    /// the outputs: f32 (head_dim up to 256) or bf16 (head_dim a multiple of 8 up to 128, or 256).
    ///
    /// # Errors
    /// A spec or offsets that are wrong or have no kernel, or a failure of the device.
    pub fn new(queue: &Queue, spec: &SoftmaxSpec, cu_seqlens: &[i32], dtype: DeviceType) -> Result<Self> {
        let layout = spec.layout;
        super::check_scores(FORWARD, spec.scale, spec.alibi.as_deref(), layout.query_heads)?;
        check_layout(FORWARD, &layout, dtype)?;
        let documents = documents(FORWARD, cu_seqlens, layout.tokens)?;
        let path = if dtype == DeviceType::F32 {
            Path::Float(f32_cuda::Plan::new(queue, FORWARD, f32_cuda::Kind::Softmax, &layout, &documents)?)
        } else {
            Path::TensorCores(TensorCores::new(queue, &layout, &documents)?)
        };
        let slopes = spec.alibi.as_ref().map(|slopes| slopes.iter().map(|&slope| slope as f32).collect::<Vec<_>>());
        let slopes = slopes.map(|slopes| queue.upload(&slopes)).transpose()?;
        Ok(Self { layout, scale: spec.scale, dtype, slopes, path })
    }

    /// Writes o (with `output_stride`) and lse, the logsumexp of the scores, f32 `[tokens, query_heads]`.
    ///
    /// # Errors
    /// Views that do not fit the layout (nothing is launched then), or a failure of the device.
    pub fn forward(
        &self,
        queue: &Queue,
        q: DeviceRef<'_>,
        k: DeviceRef<'_>,
        v: DeviceRef<'_>,
        o: &mut DeviceMut<'_>,
        lse: &mut DeviceMut<'_>,
    ) -> Result<()> {
        let layout = &self.layout;
        check_inputs(FORWARD, layout, self.dtype, [q, k, v])?;
        check_output(FORWARD, "o", layout, self.dtype, o)?;
        check_flat(FORWARD, "lse", lse, DeviceType::F32, layout.tokens * layout.query_heads)?;
        let slopes = self.slopes.as_ref().map(Scratch::as_ref);
        match &self.path {
            Path::Float(plan) => plan.softmax_forward(queue, self.scale, slopes, [q, k, v], o, lse),
            Path::TensorCores(kernels) => kernels.forward(queue, layout, self.scale, slopes, [q, k, v], o, lse),
        }
    }

    /// Writes the gradients of `sum(o * d_o)`, contiguous, whatever the strides of the inputs. `o` and `lse` are what
    /// [`forward`](Self::forward) wrote; d_o has the layout of o.
    ///
    /// # Errors
    /// Views that do not fit the layout (nothing is launched then), or a failure of the device.
    pub fn backward(
        &self,
        queue: &Queue,
        q: DeviceRef<'_>,
        k: DeviceRef<'_>,
        v: DeviceRef<'_>,
        o: DeviceRef<'_>,
        lse: DeviceRef<'_>,
        d_o: DeviceRef<'_>,
        dq: &mut DeviceMut<'_>,
        dk: &mut DeviceMut<'_>,
        dv: &mut DeviceMut<'_>,
    ) -> Result<()> {
        let layout = &self.layout;
        check_inputs(BACKWARD, layout, self.dtype, [q, k, v])?;
        check_output(BACKWARD, "o", layout, self.dtype, &o)?;
        check_output(BACKWARD, "d_o", layout, self.dtype, &d_o)?;
        check_rows(BACKWARD, "lse", &lse, DeviceType::F32, (layout.tokens, layout.query_heads, layout.query_heads))?;
        check_gradients(BACKWARD, layout, self.dtype, [dq, dk, dv])?;
        let slopes = self.slopes.as_ref().map(Scratch::as_ref);
        let gradients = [dq.reborrow(), dk.reborrow(), dv.reborrow()];
        match &self.path {
            Path::Float(plan) => plan.softmax_backward(queue, self.scale, slopes, [q, k, v], o, lse, d_o, gradients),
            Path::TensorCores(kernels) => {
                kernels.backward(queue, layout, self.scale, slopes, [q, k, v], o, lse, d_o, gradients)
            }
        }
    }
}

/// A list of tiles, int4 each: first token of the document, its length, the tile's first row in it, 0.
#[derive(Debug)]
struct Tiles {
    list: Scratch,
    count: u32,
}

impl Tiles {
    fn new(queue: &Queue, documents: &[Range<usize>], rows: usize) -> Result<Self> {
        let list = tile_list(documents, rows);
        Ok(Self { count: (list.len() / 4) as u32, list: queue.upload(&list)? })
    }
}

fn tile_list(documents: &[Range<usize>], rows: usize) -> Vec<i32> {
    let tiles = documents.iter().flat_map(|document| {
        (0..document.len()).step_by(rows).map(|first| [document.start, document.len(), first, 0].map(|x| x as i32))
    });
    tiles.flatten().collect()
}

#[derive(Debug)]
struct TensorCores {
    sizes: Sizes,
    /// Tiles of queries in forward and dq, of keys in dkv.
    forward_tiles: Tiles,
    dq_tiles: Tiles,
    dkv_tiles: Tiles,
    forward: Kernel,
    means: Kernel,
    dq: Kernel,
    dkv: Kernel,
}

/// The constants at the top of `softmax.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sizes {
    row_bytes: usize,
    forward_rows: usize,
    forward_keys: usize,
    dq_rows: usize,
    dq_keys: usize,
    dkv_keys: usize,
    dkv_queries: usize,
    dkv_parts: u32,
    /// Lanes per row in the kernel of the means.
    mean_lanes: usize,
}

const THREADS: u32 = 128;
const MEAN_THREADS: u32 = 256;

impl Sizes {
    fn new(head_dim: usize) -> Self {
        let query_rows = if head_dim > 128 { 64 } else { 128 };
        Self {
            row_bytes: (head_dim.next_multiple_of(16) / 8 + 1) * 16,
            forward_rows: query_rows,
            forward_keys: if (113..=128).contains(&head_dim) { 32 } else { 64 },
            dq_rows: query_rows,
            dq_keys: match head_dim {
                ..=48 => 64,
                49..=64 => 48,
                _ => 32,
            },
            dkv_keys: if head_dim > 64 { 64 } else { 128 },
            dkv_queries: if (65..=128).contains(&head_dim) { 64 } else { 32 },
            dkv_parts: if head_dim > 128 { 2 } else { 1 },
            mean_lanes: (head_dim / 8).next_power_of_two(),
        }
    }
}

impl TensorCores {
    fn new(queue: &Queue, layout: &AttentionLayout, documents: &[Range<usize>]) -> Result<Self> {
        let sizes = Sizes::new(layout.head_dim);
        let source = source(layout.head_dim);
        let kernel = |entry| queue.gpu().kernel(&source, entry);
        Ok(Self {
            sizes,
            forward_tiles: Tiles::new(queue, documents, sizes.forward_rows)?,
            dq_tiles: Tiles::new(queue, documents, sizes.dq_rows)?,
            dkv_tiles: Tiles::new(queue, documents, sizes.dkv_keys)?,
            forward: kernel("softmax_forward_bf16")?,
            means: kernel("softmax_means_bf16")?,
            dq: kernel("softmax_dq_bf16")?,
            dkv: kernel("softmax_dkv_bf16")?,
        })
    }

    fn forward(
        &self,
        queue: &Queue,
        layout: &AttentionLayout,
        scale: f64,
        slopes: Option<DeviceRef<'_>>,
        [q, k, v]: [DeviceRef<'_>; 3],
        o: &mut DeviceMut<'_>,
        lse: &mut DeviceMut<'_>,
    ) -> Result<()> {
        let sizes = &self.sizes;
        let shape = Launch {
            grid: [self.forward_tiles.count, layout.query_heads as u32, 1],
            block: THREADS,
            shared: (sizes.forward_rows + 2 * sizes.forward_keys) * sizes.row_bytes,
        };
        let [heads, group, query, key, value, output] = layout_arguments(layout);
        let list = self.forward_tiles.list.as_ref().into();
        let arguments = [
            q.into(),
            k.into(),
            v.into(),
            Arg::optional(slopes),
            o.into(),
            lse.into(),
            list,
            heads,
            group,
            query,
            key,
            value,
            output,
            factor(scale),
        ];
        queue.launch(&self.forward, shape, &arguments)
    }

    fn backward(
        &self,
        queue: &Queue,
        layout: &AttentionLayout,
        scale: f64,
        slopes: Option<DeviceRef<'_>>,
        [q, k, v]: [DeviceRef<'_>; 3],
        o: DeviceRef<'_>,
        lse: DeviceRef<'_>,
        d_o: DeviceRef<'_>,
        [mut dq, mut dk, mut dv]: f32_cuda::Gradients<'_>,
    ) -> Result<()> {
        let sizes = &self.sizes;
        let rows = layout.tokens * layout.query_heads;
        let mut means = queue.scratch(DeviceType::F32, rows)?;
        let [heads, group, query, key, value, output] = layout_arguments(layout);
        let row_blocks = rows.div_ceil(MEAN_THREADS as usize / sizes.mean_lanes);
        let shape = Launch { grid: [row_blocks as u32, 1, 1], block: MEAN_THREADS, shared: 0 };
        let arguments = [o.into(), d_o.into(), (&mut means.as_mut()).into(), (rows as i64).into(), heads, output];
        queue.launch(&self.means, shape, &arguments)?;

        let shape = Launch {
            grid: [self.dq_tiles.count, layout.query_heads as u32, 1],
            block: THREADS,
            shared: (2 * sizes.dq_rows + 4 * sizes.dq_keys) * sizes.row_bytes,
        };
        let inputs: [Arg; 7] =
            [q.into(), k.into(), v.into(), Arg::optional(slopes), lse.into(), means.as_ref().into(), d_o.into()];
        let tail = [heads, group, query, key, value, output, factor(scale), (scale as f32).into()];
        let mut arguments: Vec<Arg> = Vec::with_capacity(18);
        arguments.extend(inputs);
        arguments.push((&mut dq).into());
        arguments.push(self.dq_tiles.list.as_ref().into());
        arguments.extend(tail);
        queue.launch(&self.dq, shape, &arguments)?;

        let shape = Launch {
            grid: [self.dkv_tiles.count, layout.kv_heads as u32, sizes.dkv_parts],
            block: THREADS,
            shared: (2 * sizes.dkv_keys + 4 * sizes.dkv_queries) * sizes.row_bytes
                + 4 * sizes.dkv_queries * size_of::<f32>(),
        };
        arguments.clear();
        arguments.extend(inputs);
        arguments.extend([Arg::from(&mut dk), Arg::from(&mut dv), self.dkv_tiles.list.as_ref().into()]);
        arguments.extend(tail);
        queue.launch(&self.dkv, shape, &arguments)
    }
}

/// heads, group and the strides, as the kernels take them.
fn layout_arguments(layout: &AttentionLayout) -> [Arg; 6] {
    [
        layout.query_heads,
        layout.group(),
        layout.query_stride,
        layout.key_stride,
        layout.value_stride,
        layout.output_stride,
    ]
    .map(|size| Arg::from(size as i32))
}

/// Scores in units of log2.
fn factor(scale: f64) -> Arg {
    ((scale * std::f64::consts::LOG2_E) as f32).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_can_be_shared_between_threads() {
        fn shared<T: Send + Sync>() {}
        shared::<Plan>();
    }

    #[test]
    fn tiles_cover_documents_one_after_another() {
        let expected: [[i32; 4]; 4] = [[0, 130, 0, 0], [0, 130, 64, 0], [0, 130, 128, 0], [130, 1, 0, 0]];
        assert_eq!(tile_list(&[0..0, 0..130, 130..131], 64), expected.as_flattened());
        assert!(tile_list(&[], 64).is_empty());
    }

    /// Two blocks per multiprocessor of a Hopper card (228 KB, 1 KB of each block is the system's); any block fits an A100.
    #[test]
    fn shared_memory_fits() {
        for head_dim in bf16_head_dims() {
            let sizes = Sizes::new(head_dim);
            let rows = [
                sizes.forward_rows + 2 * sizes.forward_keys,
                2 * sizes.dq_rows + 4 * sizes.dq_keys,
                2 * sizes.dkv_keys + 4 * sizes.dkv_queries,
            ];
            let bytes = rows.map(|rows| rows * sizes.row_bytes + 4 * sizes.dkv_queries * size_of::<f32>() + 1024);
            assert!(
                bytes.iter().all(|&bytes| bytes <= if head_dim > 128 { 163 } else { 114 } << 10),
                "{head_dim}: {bytes:?}"
            );
        }
    }
}
