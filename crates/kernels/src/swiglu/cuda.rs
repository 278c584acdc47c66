//! SwiGLU on a CUDA device, f32 or bf16; gate and up apart, or packed in one row.

use crate::cuda::units::*;
use crate::cuda::{Arg, DeviceMut, DeviceRef, Queue, Source, check};
use crate::error::Result;

const OP: &str = "swiglu";
const SOURCE: Source = source("swiglu.cu", &[UNITS, include_str!("../../cuda/swiglu.cu")]);

/// Sources of this op.
pub(crate) fn sources() -> Vec<Source> {
    vec![SOURCE]
}

/// `out = silu(gate) * up`.
///
/// # Errors
/// Memory of different lengths or types.
pub fn forward(queue: &Queue, gate: DeviceRef<'_>, up: DeviceRef<'_>, out: &mut DeviceMut<'_>) -> Result<()> {
    let (dtype, total) = (gate.dtype(), gate.len());
    check_type(OP, "gate", dtype, FLOATS)?;
    check(OP, "up", (up.len(), up.dtype()), total, &[dtype])?;
    check(OP, "out", (out.len(), out.dtype()), total, &[dtype])?;
    let unit = unit_of(dtype);
    let units = vectorized(total, unit, &[Some(gate), Some(up), Some(out.as_ref())]);
    let kernel = queue.gpu().kernel(&SOURCE, by_type!(dtype, "swiglu_forward"))?;
    let arguments = [gate.into(), up.into(), out.into(), (total as u64).into(), units.into()];
    queue.launch(&kernel, flat_launch(queue, total, unit), &arguments)
}

/// Overwrites the gradients that are asked for.
///
/// # Errors
/// Memory of different lengths or types.
pub fn backward(
    queue: &Queue,
    gate: DeviceRef<'_>,
    up: DeviceRef<'_>,
    dout: DeviceRef<'_>,
    dgate: Option<&mut DeviceMut<'_>>,
    dup: Option<&mut DeviceMut<'_>>,
) -> Result<()> {
    let (dtype, total) = (gate.dtype(), gate.len());
    check_type(OP, "gate", dtype, FLOATS)?;
    check(OP, "up", (up.len(), up.dtype()), total, &[dtype])?;
    check(OP, "dout", (dout.len(), dout.dtype()), total, &[dtype])?;
    if let Some(dgate) = &dgate {
        check(OP, "dgate", (dgate.len(), dgate.dtype()), total, &[dtype])?;
    }
    if let Some(dup) = &dup {
        check(OP, "dup", (dup.len(), dup.dtype()), total, &[dtype])?;
    }
    let unit = unit_of(dtype);
    let gradients = [dgate.as_ref().map(|d| d.as_ref()), dup.as_ref().map(|d| d.as_ref())];
    let units = vectorized(total, unit, &[Some(gate), Some(up), Some(dout), gradients[0], gradients[1]]);
    let kernel = queue.gpu().kernel(&SOURCE, by_type!(dtype, "swiglu_backward"))?;
    let arguments = [
        gate.into(),
        up.into(),
        dout.into(),
        Arg::optional_mut(dgate),
        Arg::optional_mut(dup),
        (total as u64).into(),
        units.into(),
    ];
    queue.launch(&kernel, flat_launch(queue, total, unit), &arguments)
}

/// `out[r] = silu(packed[r, ..width]) * packed[r, width..]`: `packed` `[rows, 2 width]`, `out` `[rows, width]`.
///
/// # Errors
/// Memory of the wrong length or type.
pub fn forward_packed(
    queue: &Queue,
    rows: usize,
    width: usize,
    packed: DeviceRef<'_>,
    out: &mut DeviceMut<'_>,
) -> Result<()> {
    let (dtype, total) = (packed.dtype(), rows.saturating_mul(width));
    check(OP, "packed", (packed.len(), dtype), total.saturating_mul(2), FLOATS)?;
    check(OP, "out", (out.len(), out.dtype()), total, &[dtype])?;
    small(OP, "rows * width", total)?;
    let width_u32 = small(OP, "width", width)?;
    let unit = unit_of(dtype);
    let fits = width.is_multiple_of(unit);
    let units = if fits { vectorized(total, unit, &[Some(packed), Some(out.as_ref())]) } else { 0 };
    let kernel = queue.gpu().kernel(&SOURCE, by_type!(dtype, "swiglu_forward_packed"))?;
    let arguments = [packed.into(), out.into(), (total as u64).into(), units.into(), width_u32.into()];
    queue.launch(&kernel, flat_launch(queue, total, unit), &arguments)
}

/// Overwrites `dpacked`, the gradient of `packed`, both `[rows, 2 width]`; `dout` `[rows, width]`.
///
/// # Errors
/// Memory of the wrong length or type.
pub fn backward_packed(
    queue: &Queue,
    rows: usize,
    width: usize,
    packed: DeviceRef<'_>,
    dout: DeviceRef<'_>,
    dpacked: &mut DeviceMut<'_>,
) -> Result<()> {
    let (dtype, total) = (packed.dtype(), rows.saturating_mul(width));
    check(OP, "packed", (packed.len(), dtype), total.saturating_mul(2), FLOATS)?;
    check(OP, "dout", (dout.len(), dout.dtype()), total, &[dtype])?;
    check(OP, "dpacked", (dpacked.len(), dpacked.dtype()), total.saturating_mul(2), &[dtype])?;
    small(OP, "rows * width", total)?;
    let width_u32 = small(OP, "width", width)?;
    let unit = unit_of(dtype);
    let fits = width.is_multiple_of(unit);
    let units = if fits { vectorized(total, unit, &[Some(packed), Some(dout), Some(dpacked.as_ref())]) } else { 0 };
    let kernel = queue.gpu().kernel(&SOURCE, by_type!(dtype, "swiglu_backward_packed"))?;
    let arguments = [packed.into(), dout.into(), dpacked.into(), (total as u64).into(), units.into(), width_u32.into()];
    queue.launch(&kernel, flat_launch(queue, total, unit), &arguments)
}
