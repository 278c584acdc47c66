//! RMSNorm on a CUDA device, alone or fused with the residual add.
//!
//! Activations are f32 or bf16; the weight is f32 or, beside bf16 activations, bf16; `inverse_rms` is f32.

use super::RmsNormSpec;
use crate::cuda::units::*;
use crate::cuda::{Arg, DeviceMut, DeviceRef, DeviceType, Launch, Queue, Source, check};
use crate::elementwise::cuda::fill;
use crate::error::{KernelError, Result};
use crate::reduce::cuda::column_sums;

const OP: &str = "rms_norm";
const SOURCE: Source = source("rms_norm.cu", &[UNITS, include_str!("../../cuda/rms_norm.cu")]);

/// Sources of this op.
pub(crate) fn sources() -> Vec<Source> {
    vec![SOURCE]
}

/// Elements of a row that one thread of a wide kernel holds (`MOST` in rms_norm.cu).
const PER_THREAD: usize = 32;
/// Threads that share a row at most.
const MOST_THREADS: usize = 512;
/// Threads of a backward launch: four warps for each scheduler of an H100 or H200, which is what its registers hold.
const BACKWARD_THREADS: usize = 132 * 512;

/// Threads that share a row, threads of a block, and whether the wide kernels can be used.
fn shape(width: usize, unit: usize, aligned: bool) -> (usize, usize, bool) {
    let threads = width.div_ceil(PER_THREAD).next_multiple_of(32);
    if aligned && width.is_multiple_of(unit) && threads <= MOST_THREADS {
        (threads, threads.max(128).next_multiple_of(threads), true)
    } else {
        let threads = width.next_multiple_of(32).min(256);
        (threads, threads, false)
    }
}

fn aligned<'a>(views: impl IntoIterator<Item = Option<DeviceRef<'a>>>, unit: usize) -> bool {
    views.into_iter().flatten().all(|view| is_aligned(view, unit))
}

/// Normalises; see [`super`].
///
/// # Errors
/// Memory whose length is not that of the spec, or of another type.
pub fn forward(
    queue: &Queue,
    spec: &RmsNormSpec,
    x: DeviceRef<'_>,
    weight: DeviceRef<'_>,
    out: &mut DeviceMut<'_>,
    inverse_rms: &mut DeviceMut<'_>,
) -> Result<()> {
    forward_any(queue, spec, x, None, weight, None, out, inverse_rms)
}

/// `sum = x + residual`, rounded to the type of x, then the norm of that sum. `residual`, `sum` as x.
///
/// # Errors
/// As [`forward`].
pub fn forward_residual(
    queue: &Queue,
    spec: &RmsNormSpec,
    x: DeviceRef<'_>,
    residual: DeviceRef<'_>,
    weight: DeviceRef<'_>,
    sum: &mut DeviceMut<'_>,
    out: &mut DeviceMut<'_>,
    inverse_rms: &mut DeviceMut<'_>,
) -> Result<()> {
    forward_any(queue, spec, x, Some(residual), weight, Some(sum), out, inverse_rms)
}

fn forward_any(
    queue: &Queue,
    spec: &RmsNormSpec,
    x: DeviceRef<'_>,
    residual: Option<DeviceRef<'_>>,
    weight: DeviceRef<'_>,
    sum: Option<&mut DeviceMut<'_>>,
    out: &mut DeviceMut<'_>,
    inverse_rms: &mut DeviceMut<'_>,
) -> Result<()> {
    let RmsNormSpec { rows, width, epsilon } = *spec;
    let (dtype, elements) = (x.dtype(), rows.saturating_mul(width));
    check(OP, "x", (x.len(), dtype), elements, FLOATS)?;
    check_weight(OP, dtype, weight.dtype())?;
    check(OP, "weight", (weight.len(), weight.dtype()), width, FLOATS)?;
    check(OP, "out", (out.len(), out.dtype()), elements, &[dtype])?;
    check(OP, "inverse_rms", (inverse_rms.len(), inverse_rms.dtype()), rows, F32)?;
    if let (Some(residual), Some(sum)) = (residual, &sum) {
        check(OP, "residual", (residual.len(), residual.dtype()), elements, &[dtype])?;
        check(OP, "sum", (sum.len(), sum.dtype()), elements, &[dtype])?;
    }
    let (rows_u32, width_u32) = (small(OP, "rows", rows)?, small(OP, "width", width)?);
    if width == 0 {
        return fill(queue, 1.0 / epsilon.sqrt(), inverse_rms);
    }
    let unit = unit_of(dtype);
    let views = [Some(x), residual, Some(weight), sum.as_ref().map(|sum| sum.as_ref()), Some(out.as_ref())];
    let (group, block, wide) = shape(width, unit, aligned(views, unit));
    let entry = match (residual.is_some(), wide) {
        (false, true) => by_types!(dtype, weight.dtype(), "rms_norm_forward", "_"),
        (false, false) => by_types!(dtype, weight.dtype(), "rms_norm_forward_narrow", "_"),
        (true, true) => by_types!(dtype, weight.dtype(), "rms_norm_forward_residual", "_"),
        (true, false) => by_types!(dtype, weight.dtype(), "rms_norm_forward_residual_narrow", "_"),
    };
    let (group, block) = if wide && group > 32 { (group, group) } else { (group, block) };
    let members = if wide { block / group } else { 1 };
    let kernel = queue.gpu().kernel(&SOURCE, entry)?;
    let mut arguments: Vec<Arg> = vec![x.into()];
    arguments.extend(residual.map(Arg::from));
    arguments.push(weight.into());
    arguments.extend(sum.map(Arg::from));
    arguments.extend([
        Arg::from(out),
        inverse_rms.into(),
        rows_u32.into(),
        width_u32.into(),
        ((1.0 / width as f64) as f32).into(),
        (epsilon as f32).into(),
        (group as u32).into(),
    ]);
    let grid = [rows.div_ceil(members) as u32, 1, 1];
    queue.launch(&kernel, Launch { grid, block: block as u32, shared: 0 }, &arguments)
}

/// Overwrites the gradients that are asked for. `dresidual`, the gradient that reaches x past the norm, is added to `dx`
/// before it is rounded. `x` is what was normalised (the sum, after [`forward_residual`]); `dweight` is f32 or bf16.
///
/// # Errors
/// As [`forward`]; widths that do not fit into shared memory (above 50000 or so).
pub fn backward(
    queue: &Queue,
    spec: &RmsNormSpec,
    x: DeviceRef<'_>,
    weight: DeviceRef<'_>,
    inverse_rms: DeviceRef<'_>,
    dout: DeviceRef<'_>,
    dresidual: Option<DeviceRef<'_>>,
    dx: Option<&mut DeviceMut<'_>>,
    dweight: Option<&mut DeviceMut<'_>>,
) -> Result<()> {
    let RmsNormSpec { rows, width, .. } = *spec;
    let (dtype, elements) = (x.dtype(), rows.saturating_mul(width));
    check(OP, "x", (x.len(), dtype), elements, FLOATS)?;
    check_weight(OP, dtype, weight.dtype())?;
    check(OP, "weight", (weight.len(), weight.dtype()), width, FLOATS)?;
    check(OP, "inverse_rms", (inverse_rms.len(), inverse_rms.dtype()), rows, F32)?;
    check(OP, "dout", (dout.len(), dout.dtype()), elements, &[dtype])?;
    if let Some(dresidual) = dresidual {
        check(OP, "dresidual", (dresidual.len(), dresidual.dtype()), elements, &[dtype])?;
    }
    if let Some(dx) = &dx {
        check(OP, "dx", (dx.len(), dx.dtype()), elements, &[dtype])?;
    }
    if let Some(dweight) = &dweight {
        check(OP, "dweight", (dweight.len(), dweight.dtype()), width, FLOATS)?;
    }
    let (rows_u32, width_u32) = (small(OP, "rows", rows)?, small(OP, "width", width)?);
    if width == 0 || (dx.is_none() && dweight.is_none()) {
        return Ok(());
    }
    let unit = unit_of(dtype);
    let views = [Some(x), Some(weight), Some(dout), dresidual, dx.as_ref().map(|dx| dx.as_ref())];
    let (group, block, wide) = shape(width, unit, aligned(views, unit));
    // The f32 kernel reads in units but holds no row.
    let streamed = !wide || dtype == DeviceType::F32;
    let (group, block) = match (streamed, wide) {
        (true, true) => ((width / unit).next_multiple_of(32).min(MOST_THREADS), 0),
        _ => (group, block),
    };
    let block = if streamed || group > 32 { group } else { block };
    let members = block / group;
    let shared = if streamed || (members > 1 && dweight.is_some()) { width * 4 } else { 0 };
    if shared > queue.gpu().shared_memory_per_block() {
        let most = queue.gpu().shared_memory_per_block() / 4;
        return Err(KernelError::size(OP, "width", format!("at most {most} for this kernel on this GPU"), width));
    }
    let blocks = rows.div_ceil(members).min(BACKWARD_THREADS / block);
    let mut partials = match dweight {
        Some(_) => Some(queue.scratch(DeviceType::F32, blocks * width)?),
        None => None,
    };
    let entry = match wide {
        true => by_types!(dtype, weight.dtype(), "rms_norm_backward", "_"),
        false => by_types!(dtype, weight.dtype(), "rms_norm_backward_narrow", "_"),
    };
    let kernel = queue.gpu().kernel(&SOURCE, entry)?;
    let arguments = [
        x.into(),
        weight.into(),
        inverse_rms.into(),
        dout.into(),
        Arg::optional(dresidual),
        Arg::optional_mut(dx),
        Arg::optional_mut(partials.as_mut().map(|p| p.as_mut()).as_mut()),
        rows_u32.into(),
        width_u32.into(),
        ((1.0 / width as f64) as f32).into(),
        (group as u32).into(),
    ];
    queue.launch(&kernel, Launch { grid: [blocks as u32, 1, 1], block: block as u32, shared }, &arguments)?;
    match (dweight, &partials) {
        (Some(dweight), Some(partials)) => column_sums(queue, partials.as_ref(), blocks, dweight),
        _ => Ok(()),
    }
}
