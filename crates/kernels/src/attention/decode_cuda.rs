//! One query per sequence against a cache, on the GPU (`cuda/decode.cu`): what both attentions share.

use super::AttentionLayout;
use super::decode::DecodeLayout;
use super::device::View;
use crate::cuda::{Arg, DeviceMut, DeviceRef, DeviceType, Launch, Queue, Source, check};
use crate::{KernelError, Result};

const WIDTHS: [usize; 4] = [32, 64, 128, 256];
/// Query heads that one block takes: one, or up to four of a group.
const HEADS: [usize; 2] = [1, 4];
const THREADS: u32 = 128;
/// Keys of one tile; a piece is a number of tiles.
const TILE: usize = 64;
/// Blocks that are made if the caches can be long enough: some per multiprocessor of a large card. A constant, so that the
/// result depends on the shape alone.
const BLOCKS: usize = 512;
/// A block reads at least so many keys, or the second kernel costs more than the first gains.
const SHORTEST_PIECE: usize = 128;

/// All that can be asked for.
pub(crate) fn sources() -> Vec<Source> {
    WIDTHS.iter().flat_map(|&width| HEADS.map(|heads| source(width, heads))).collect()
}

fn source(width: usize, heads: usize) -> Source {
    let parts = &[include_str!("../../cuda/decode.cu")];
    let defines = vec![("WIDTH", width.to_string()), ("HEADS", heads.to_string())];
    Source { file: "decode.cu", parts, defines }
}

/// One call of either attention.
pub(crate) struct Call<'a> {
    pub op: &'static str,
    /// f32 and bf16 entry of the first kernel, then of the second.
    pub entries: [[&'static str; 2]; 2],
    pub layout: &'a DecodeLayout,
    pub scale: f64,
    /// Sticks below this are used up.
    pub threshold: f64,
    pub slopes: Option<DeviceRef<'a>>,
    pub q: DeviceRef<'a>,
    pub k: DeviceRef<'a>,
    pub v: DeviceRef<'a>,
    /// One i32 per sequence.
    pub lengths: DeviceRef<'a>,
}

impl Call<'_> {
    fn check(&self, o: &DeviceMut<'_>, rem: Option<&DeviceMut<'_>>) -> Result<DeviceType> {
        let (op, layout) = (self.op, self.layout);
        // A decode step is one token per sequence of a packed layout, as far as queries and heads are concerned.
        let packed = AttentionLayout {
            query_stride: layout.query_stride,
            key_stride: layout.cache_stride,
            value_stride: layout.cache_stride,
            ..AttentionLayout::contiguous(layout.sequences, layout.query_heads, layout.kv_heads, layout.head_dim)
        };
        packed.validate(op)?;
        for (what, size, most) in [("head_dim", layout.head_dim, 256), ("sequences", layout.sequences, 65535)] {
            if size > most {
                return Err(KernelError::size(op, what, format!("at most {most} on CUDA"), size));
            }
        }
        let allowed = &[DeviceType::F32, DeviceType::Bf16];
        let dtype = self.q.dtype();
        check(op, "q", (self.q.len(), dtype), self.q.len(), allowed)?;
        let width = layout.query_heads * layout.head_dim;
        let rows =
            |count: usize, stride: usize, width: usize| if count == 0 { 0 } else { (count - 1) * stride + width };
        let last_tokens = layout.capacity.saturating_sub(1) * layout.cache_stride + layout.kv_heads * layout.head_dim;
        let cache = if layout.capacity == 0 { 0 } else { rows(layout.sequences, layout.sequence_stride, last_tokens) };
        let queries = rows(layout.sequences, layout.query_stride, width);
        for (argument, view, expected) in [("q", self.q, queries), ("k", self.k, cache), ("v", self.v, cache)] {
            check(op, argument, (view.len(), view.dtype()), view.len(), &[dtype])?;
            if view.len() < expected {
                return Err(KernelError::Length { op, argument, expected, found: view.len() });
            }
        }
        check(op, "o", (o.len(), o.dtype()), layout.sequences * width, &[dtype])?;
        if let Some(rem) = rem {
            check(op, "rem", (rem.len(), rem.dtype()), layout.sequences * layout.query_heads, &[DeviceType::F32])?;
        }
        let lengths = (self.lengths.len(), self.lengths.dtype());
        check(op, "lengths", lengths, layout.sequences, &[DeviceType::I32])?;
        Ok(dtype)
    }

    /// Whether cached rows may be read 16 bytes at a time.
    fn vectors(&self, dtype: DeviceType) -> bool {
        let layout = self.layout;
        [layout.head_dim, layout.cache_stride, layout.sequence_stride]
            .iter()
            .all(|size| size.is_multiple_of(16 / dtype.size()))
            && [self.k, self.v].iter().all(|view| view.parts().2.is_multiple_of(16))
    }

    /// Checks, then launches both kernels.
    pub fn run(&self, queue: &Queue, o: &mut DeviceMut<'_>, rem: Option<&mut DeviceMut<'_>>) -> Result<()> {
        let dtype = self.check(o, rem.as_deref())?;
        let layout = self.layout;
        let rows = layout.sequences * layout.query_heads;
        if rows == 0 {
            return Ok(());
        }
        let heads = if layout.group() == 1 { 1 } else { 4 };
        let blocks = layout.kv_heads * layout.group().div_ceil(heads);
        let piece = piece(layout.capacity, blocks * layout.sequences);
        let pieces = layout.capacity.div_ceil(piece);
        let mut part_o = queue.scratch(DeviceType::F32, rows * pieces * layout.head_dim)?;
        let mut part_rows = queue.scratch(DeviceType::F32, rows * pieces * 2)?;
        let width = WIDTHS.into_iter().find(|&width| width >= layout.head_dim).unwrap_or(256);
        let source = source(width, heads);
        let [decode, join] = self.entries.map(|entries| entries[usize::from(dtype == DeviceType::Bf16)]);

        let shape = Launch { grid: [pieces as u32, blocks as u32, layout.sequences as u32], block: THREADS, shared: 0 };
        let size = |size: usize| Arg::from(size as i32);
        let arguments = [
            self.q.into(),
            self.k.into(),
            self.v.into(),
            Arg::optional(self.slopes),
            self.lengths.into(),
            (&mut part_o.as_mut()).into(),
            (&mut part_rows.as_mut()).into(),
            size(layout.capacity),
            size(layout.query_heads),
            size(layout.kv_heads),
            size(layout.head_dim),
            size(layout.query_stride),
            size(layout.cache_stride),
            (layout.sequence_stride as i64).into(),
            size(piece),
            (self.scale as f32).into(),
            (self.threshold as f32).into(),
            i32::from(self.vectors(dtype)).into(),
        ];
        queue.launch(&queue.gpu().kernel(&source, decode)?, shape, &arguments)?;
        let shape = Launch { grid: [layout.query_heads as u32, layout.sequences as u32, 1], block: THREADS, shared: 0 };
        let arguments = [
            part_o.as_ref().into(),
            part_rows.as_ref().into(),
            self.lengths.into(),
            o.into(),
            Arg::optional_mut(rem),
            size(layout.capacity),
            size(layout.query_heads),
            size(layout.head_dim),
            size(pieces),
            size(piece),
        ];
        queue.launch(&queue.gpu().kernel(&source, join)?, shape, &arguments)
    }
}

/// Keys per piece: a power of two, so that a growing cache seldom cuts differently.
fn piece(capacity: usize, blocks: usize) -> usize {
    (capacity * blocks).div_ceil(BLOCKS).next_power_of_two().max(SHORTEST_PIECE)
}

const _: () = assert!(SHORTEST_PIECE.is_multiple_of(TILE));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_whole_tiles_and_few_blocks_are_made_of_many_sequences() {
        assert_eq!(piece(0, 16), 128);
        assert_eq!(piece(4096, 16), 128);
        assert_eq!(piece(16384, 16), 512);
        assert_eq!(piece(16384, 512), 16384);
        assert!((1..40).all(|n| piece(n * 1000, n).is_multiple_of(TILE)));
    }
}
