//! Rotary embedding on a CUDA device, f32 or bf16, from one view to another or in place.

use super::RopeSpec;
use crate::cuda::units::*;
use crate::cuda::{Arg, DeviceMut, DeviceRef, DeviceType, Launch, Queue, Source, check};
use crate::error::{KernelError, Result};
use crate::strided::check_view;

const OP: &str = "rope";
const SOURCE: Source = source("rope.cu", &[UNITS, include_str!("../../cuda/rope.cu")]);

/// Sources of this op.
pub(crate) fn sources() -> Vec<Source> {
    vec![SOURCE]
}

/// Threads of a block.
const THREADS: usize = 128;
/// Blocks that fill a large GPU.
const MANY_BLOCKS: usize = 1056;

/// Rotates every head by its token's position, or back. A token's heads lie together; from one token to the next it is
/// `x_stride` and `out_stride` elements (`heads * head_dim` without gaps). What lies in the gaps of `out` is left alone.
///
/// # Errors
/// An odd head dimension, positions that are not u32 or not one a token, a view that reaches past its memory, rows of `out`
/// that overlap.
pub fn rotate(
    queue: &Queue,
    spec: &RopeSpec,
    positions: DeviceRef<'_>,
    inverse: bool,
    x: DeviceRef<'_>,
    x_stride: usize,
    out: &mut DeviceMut<'_>,
    out_stride: usize,
) -> Result<()> {
    rotate_any(queue, spec, positions, inverse, Some((x, x_stride)), out, out_stride)
}

/// [`rotate`] in place.
///
/// # Errors
/// As [`rotate`].
pub fn rotate_in_place(
    queue: &Queue,
    spec: &RopeSpec,
    positions: DeviceRef<'_>,
    inverse: bool,
    x: &mut DeviceMut<'_>,
    x_stride: usize,
) -> Result<()> {
    rotate_any(queue, spec, positions, inverse, None, x, x_stride)
}

/// Without an `x`, `out` is rotated in place.
fn rotate_any(
    queue: &Queue,
    spec: &RopeSpec,
    positions: DeviceRef<'_>,
    inverse: bool,
    x: Option<(DeviceRef<'_>, usize)>,
    out: &mut DeviceMut<'_>,
    out_stride: usize,
) -> Result<()> {
    let RopeSpec { tokens, heads, head_dim, theta } = *spec;
    if !head_dim.is_multiple_of(2) {
        return Err(KernelError::size(OP, "head_dim", "even", head_dim));
    }
    let dtype = out.dtype();
    check_type(OP, "out", dtype, FLOATS)?;
    check(OP, "positions", (positions.len(), positions.dtype()), tokens, &[DeviceType::U32])?;
    let width = heads.saturating_mul(head_dim);
    let shape = [tokens, width];
    if tokens > 1 && out_stride < width {
        return Err(KernelError::size(OP, "stride of the output's tokens", format!("at least {width}"), out_stride));
    }
    check_view(OP, "out", &shape, &[out_stride, 1], out.len())?;
    let (from, x_stride) = match x {
        Some((x, stride)) => {
            check_type(OP, "x", x.dtype(), &[dtype])?;
            check_view(OP, "x", &shape, &[stride, 1], x.len())?;
            (x.pointer(), stride)
        }
        None => (out.pointer(), out_stride),
    };
    if tokens == 0 || width == 0 {
        return Ok(());
    }
    let half = head_dim / 2;
    let fits = |unit: usize| {
        let address = (unit * dtype.size()) as u64;
        half.is_multiple_of(unit)
            && x_stride.is_multiple_of(unit)
            && out_stride.is_multiple_of(unit)
            && from.is_multiple_of(address)
            && out.pointer().is_multiple_of(address)
    };
    let (entry, unit) = match dtype {
        DeviceType::Bf16 if fits(8) => ("rope_rotate_bf16", 8),
        DeviceType::Bf16 if fits(4) => ("rope_rotate_half_bf16", 4),
        DeviceType::Bf16 => ("rope_rotate_narrow_bf16", 1),
        _ if fits(4) => ("rope_rotate_f32", 4),
        _ => ("rope_rotate_narrow_f32", 1),
    };
    let threads = small(OP, "tokens * head_dim / 2", tokens.saturating_mul(half / unit).saturating_add(THREADS))?;
    let blocks = (threads as usize - 1) / THREADS;
    let sizes = [small(OP, "tokens", tokens)?, small(OP, "heads", heads)?, small(OP, "head_dim", head_dim)?];
    let kernel = queue.gpu().kernel(&SOURCE, entry)?;
    let mut arguments: Vec<Arg> = vec![from.into(), out.into(), positions.into()];
    arguments.extend(sizes.map(Arg::from));
    arguments.extend([
        Arg::from(x_stride as u64),
        (out_stride as u64).into(),
        (-2.0 * theta.log2() / head_dim as f64).into(),
        (if inverse { -1.0f32 } else { 1.0 }).into(),
    ]);
    // Few tokens: their heads are shared out as well, and the angles computed again.
    let grid = [blocks as u32, MANY_BLOCKS.div_ceil(blocks).min(heads) as u32, 1];
    queue.launch(&kernel, Launch { grid, block: THREADS as u32, shared: 0 }, &arguments)
}
