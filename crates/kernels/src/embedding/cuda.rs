//! Embedding on a CUDA device. The backward pass sorts the tokens by id, so that each row of the table is added to once.
//!
//! The ids are on the device and are not read by the host: one outside of the vocabulary gives a row of NaN, and its gradient
//! is dropped. A caller that wants an error checks them where they come from.

use super::EmbeddingSpec;
use crate::cuda::units::*;
use crate::cuda::{Arg, DeviceMut, DeviceRef, DeviceType, Launch, Queue, Source, check};
use crate::error::Result;

const OP: &str = "embedding";
const SOURCE: Source = source("embedding.cu", &[UNITS, include_str!("../../cuda/embedding.cu")]);

/// Sources of this op.
pub(crate) fn sources() -> Vec<Source> {
    vec![SOURCE]
}

/// Neighbours that a block sorts (`TILE` in embedding.cu).
const TILE: usize = 2048;
/// Bits and values of a digit of the sort.
const DIGIT_BITS: u32 = 8;
const DIGITS: usize = 1 << DIGIT_BITS;

/// Gathers rows of the table; f32 or bf16.
///
/// # Errors
/// Memory whose length is not that of the spec, or of another type.
pub fn forward(
    queue: &Queue,
    spec: &EmbeddingSpec,
    ids: DeviceRef<'_>,
    table: DeviceRef<'_>,
    out: &mut DeviceMut<'_>,
) -> Result<()> {
    let EmbeddingSpec { tokens, vocabulary, width } = *spec;
    let dtype = table.dtype();
    check(OP, "ids", (ids.len(), ids.dtype()), tokens, &[DeviceType::U32])?;
    check(OP, "table", (table.len(), dtype), vocabulary.saturating_mul(width), FLOATS)?;
    check(OP, "out", (out.len(), out.dtype()), tokens.saturating_mul(width), &[dtype])?;
    let sizes = [small(OP, "tokens", tokens)?, small(OP, "vocabulary", vocabulary)?, small(OP, "width", width)?];
    let unit = unit_of(dtype);
    let wide = width.is_multiple_of(unit) && is_aligned(table, unit) && is_aligned(out.as_ref(), unit);
    let entry = if wide { by_type!(dtype, "embedding_forward") } else { by_type!(dtype, "embedding_forward_narrow") };
    let kernel = queue.gpu().kernel(&SOURCE, entry)?;
    let mut arguments: Vec<Arg> = vec![ids.into(), table.into(), out.into()];
    arguments.extend(sizes.map(Arg::from));
    // A warp a token, 8 warps a block.
    let blocks = tokens.div_ceil(8).min(queue.gpu().multiprocessors() as usize * 32);
    queue.launch(&kernel, Launch { grid: [blocks as u32, 1, 1], block: 256, shared: 0 }, &arguments)
}

/// Adds the gradient of every token to its row of `dtable`: f32 or bf16 `dout` into f32, bf16 into bf16. The gradients of
/// equal ids are added up in fp32, in an order that depends on the ids alone, and rounded once.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    queue: &Queue,
    spec: &EmbeddingSpec,
    ids: DeviceRef<'_>,
    dout: DeviceRef<'_>,
    dtable: &mut DeviceMut<'_>,
) -> Result<()> {
    let EmbeddingSpec { tokens, vocabulary, width } = *spec;
    let table_type = dtable.dtype();
    check(OP, "ids", (ids.len(), ids.dtype()), tokens, &[DeviceType::U32])?;
    check(OP, "dtable", (dtable.len(), table_type), vocabulary.saturating_mul(width), FLOATS)?;
    let allowed = if table_type == DeviceType::F32 { FLOATS } else { &[DeviceType::Bf16] };
    check(OP, "dout", (dout.len(), dout.dtype()), tokens.saturating_mul(width), allowed)?;
    let items = small(OP, "tokens", tokens)?;
    let (vocabulary_u32, width_u32) = (small(OP, "vocabulary", vocabulary)?, small(OP, "width", width)?);
    if tokens == 0 || vocabulary == 0 || width == 0 {
        return Ok(());
    }

    // The sort: every pass moves (key, token) from one pair of buffers to the other.
    let gpu = queue.gpu();
    let count = gpu.kernel(&SOURCE, "embedding_sort_count")?;
    let scan = gpu.kernel(&SOURCE, "embedding_sort_scan")?;
    let scatter = gpu.kernel(&SOURCE, "embedding_sort_scatter")?;
    let tiles = tokens.div_ceil(TILE);
    let mut totals = queue.scratch(DeviceType::U32, tiles * DIGITS)?;
    let mut buffers = queue.scratch(DeviceType::U32, 4 * tokens)?;
    let per_tile = Launch { grid: [tiles as u32, 1, 1], block: 256, shared: 0 };
    let one_block = Launch { grid: [1, 1, 1], block: 1024, shared: 0 };
    let total_count = small(OP, "tokens", tiles * DIGITS)?;
    // Keys go up to the vocabulary itself, which stands for every id outside of it.
    let bits = usize::BITS - vocabulary.leading_zeros();
    let passes = bits.div_ceil(DIGIT_BITS);
    let pair = |pass: u32| {
        let start = if pass.is_multiple_of(2) { 0 } else { 2 * tokens };
        (start..start + tokens, start + tokens..start + 2 * tokens)
    };
    for pass in 0..passes {
        let shift = pass * DIGIT_BITS;
        // Both borrows of the buffers end with the launch; from and to are different halves.
        let (from_keys, from_tokens) = pair(pass + 1);
        let (to_keys, to_tokens) = pair(pass);
        let keys: Arg = if pass == 0 { ids.into() } else { buffers.as_ref().slice(from_keys).into() };
        let from_tokens = Arg::optional((pass > 0).then(|| buffers.as_ref().slice(from_tokens)));
        let to_keys = Arg::from(&mut buffers.as_mut().slice_mut(to_keys));
        let to_tokens = Arg::from(&mut buffers.as_mut().slice_mut(to_tokens));
        let tail = [items, shift, vocabulary_u32].map(Arg::from);
        queue.launch(&count, per_tile, &[keys, (&mut totals.as_mut()).into(), tail[0], tail[1], tail[2]])?;
        queue.launch(&scan, one_block, &[(&mut totals.as_mut()).into(), total_count.into()])?;
        let starts = totals.as_ref().into();
        let arguments = [keys, from_tokens, starts, to_keys, to_tokens, tail[0], tail[1], tail[2]];
        queue.launch(&scatter, per_tile, &arguments)?;
    }
    let (keys, sorted) = pair(passes - 1);
    let (keys, sorted): (Arg, Arg) = (buffers.as_ref().slice(keys).into(), buffers.as_ref().slice(sorted).into());

    // The sums. At most 2048 chunks, so that the longest run is joined from few pieces.
    let chunk = tokens.div_ceil(2048).max(32);
    let chunks = tokens.div_ceil(chunk);
    let unit = unit_of(dout.dtype());
    let wide = width.is_multiple_of(unit) && is_aligned(dout, unit) && is_aligned(dtable.as_ref(), unit);
    let (sum, join) = match wide {
        true => (
            by_types!(dout.dtype(), table_type, "embedding_backward_chunks", "_"),
            by_types!(dout.dtype(), table_type, "embedding_backward_join", "_"),
        ),
        false => (
            by_types!(dout.dtype(), table_type, "embedding_backward_chunks_narrow", "_"),
            by_types!(dout.dtype(), table_type, "embedding_backward_join_narrow", "_"),
        ),
    };
    let (sum, join) = (gpu.kernel(&SOURCE, sum)?, gpu.kernel(&SOURCE, join)?);
    let columns = width.div_ceil(128 * if wide { unit } else { 1 });
    let launch = Launch { grid: [chunks as u32, columns as u32, 1], block: 128, shared: 0 };
    let mut edges = queue.scratch(DeviceType::F32, chunks * 2 * width)?;
    let tail = [items, chunk as u32, vocabulary_u32, width_u32].map(Arg::from);
    let mut arguments: Vec<Arg> = vec![keys, sorted, dout.into(), (&mut *dtable).into(), (&mut edges.as_mut()).into()];
    arguments.extend(tail);
    queue.launch(&sum, launch, &arguments)?;
    let mut arguments: Vec<Arg> = vec![keys, edges.as_ref().into(), dtable.into()];
    arguments.extend(tail);
    queue.launch(&join, launch, &arguments)
}
