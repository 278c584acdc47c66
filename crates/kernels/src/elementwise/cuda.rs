//! Elementwise ops on a CUDA device.

use super::{BinaryOp, UnaryOp};
use crate::cuda::units::*;
use crate::cuda::{Arg, DeviceMut, DeviceRef, DeviceType, DeviceView, Queue, Source, check};
use crate::error::{KernelError, Result};
use crate::strided::{Layout, check_no_overlap, check_view, count};

const SOURCE: Source = source("elementwise.cu", &[UNITS, VIEWS, include_str!("../../cuda/elementwise.cu")]);

/// Sources of these ops.
pub(crate) fn sources() -> Vec<Source> {
    vec![SOURCE]
}

/// How many leading elements go in units: all, none, or, in one dimension, all but the tail.
fn in_units<const N: usize>(layout: &Layout<N>, total: usize, unit: usize, operands: [DeviceRef<'_>; N]) -> u64 {
    let rows_fit = layout.shape.len() == 1 || layout.inner().is_multiple_of(unit);
    let operands_fit = operands.iter().enumerate().all(|(k, &data)| allows_units(layout, k, data, unit));
    if rows_fit && operands_fit { (total / unit * unit) as u64 } else { 0 }
}

/// `out = op(x)`, f32 or bf16.
///
/// # Errors
/// A view that reaches past its memory, an output of the wrong length or type.
pub fn unary(queue: &Queue, op: UnaryOp, shape: &[usize], x: DeviceView<'_>, out: &mut DeviceMut<'_>) -> Result<()> {
    const OP: &str = "unary";
    let dtype = x.data.dtype();
    check_type(OP, "x", dtype, FLOATS)?;
    check_view(OP, "x", shape, x.strides, x.data.len())?;
    let total = count(OP, shape)?;
    check(OP, "out", (out.len(), out.dtype()), total, &[dtype])?;
    if total == 0 {
        return Ok(());
    }
    let (code, scale, shift) = match op {
        UnaryOp::Negate => (0u32, 0.0, 0.0),
        UnaryOp::Exp => (1, 0.0, 0.0),
        UnaryOp::Log => (2, 0.0, 0.0),
        UnaryOp::Sqrt => (3, 0.0, 0.0),
        UnaryOp::Reciprocal => (4, 0.0, 0.0),
        UnaryOp::Square => (5, 0.0, 0.0),
        UnaryOp::Sigmoid => (6, 0.0, 0.0),
        UnaryOp::Tanh => (7, 0.0, 0.0),
        UnaryOp::Silu => (8, 0.0, 0.0),
        UnaryOp::Affine { scale, shift } => (9, scale as f32, shift as f32),
    };
    let layout = Layout::merged(shape.iter().zip(x.strides).map(|(&n, &stride)| (n, [stride])));
    let dims = Dims::new(OP, &layout)?;
    let unit = unit_of(dtype);
    let units = if is_aligned(out.as_ref(), unit) { in_units(&layout, total, unit, [x.data]) } else { 0 };
    let kernel = queue.gpu().kernel(&SOURCE, by_type!(dtype, "unary"))?;
    let mut arguments: Vec<Arg> =
        vec![x.data.into(), out.into(), (total as u64).into(), units.into(), code.into(), scale.into(), shift.into()];
    dims.push(&mut arguments);
    queue.launch(&kernel, flat_launch(queue, total, unit), &arguments)
}

/// `out = op(a, b)`, f32 or bf16.
///
/// # Errors
/// A view that reaches past its memory, an output of the wrong length, different types.
pub fn binary(
    queue: &Queue,
    op: BinaryOp,
    shape: &[usize],
    a: DeviceView<'_>,
    b: DeviceView<'_>,
    out: &mut DeviceMut<'_>,
) -> Result<()> {
    const OP: &str = "binary";
    let dtype = a.data.dtype();
    check_type(OP, "a", dtype, FLOATS)?;
    check_type(OP, "b", b.data.dtype(), &[dtype])?;
    check_view(OP, "a", shape, a.strides, a.data.len())?;
    check_view(OP, "b", shape, b.strides, b.data.len())?;
    let total = count(OP, shape)?;
    check(OP, "out", (out.len(), out.dtype()), total, &[dtype])?;
    if total == 0 {
        return Ok(());
    }
    let code = match op {
        BinaryOp::Add => 0u32,
        BinaryOp::Subtract => 1,
        BinaryOp::Multiply => 2,
        BinaryOp::Divide => 3,
    };
    let strides = a.strides.iter().zip(b.strides).map(|(&a, &b)| [a, b]);
    let layout = Layout::merged(shape.iter().copied().zip(strides));
    let dims = Dims::new(OP, &layout)?;
    let unit = unit_of(dtype);
    let units = if is_aligned(out.as_ref(), unit) { in_units(&layout, total, unit, [a.data, b.data]) } else { 0 };
    let kernel = queue.gpu().kernel(&SOURCE, by_type!(dtype, "binary"))?;
    let mut arguments: Vec<Arg> =
        vec![a.data.into(), b.data.into(), out.into(), (total as u64).into(), units.into(), code.into()];
    dims.push(&mut arguments);
    queue.launch(&kernel, flat_launch(queue, total, unit), &arguments)
}

/// Gathers a view of any element type into contiguous memory; bits are moved as they are.
///
/// # Errors
/// A view that reaches past its memory, an output of the wrong length or type.
pub fn copy(queue: &Queue, shape: &[usize], x: DeviceView<'_>, out: &mut DeviceMut<'_>) -> Result<()> {
    check_type("copy", "out", out.dtype(), &[x.data.dtype()])?;
    let entry = if x.data.dtype().size() == 2 { "copy_2_bytes" } else { "copy_4_bytes" };
    gather("copy", entry, unit_of(x.data.dtype()), queue, shape, x, out)
}

/// Gathers a view into contiguous memory of the other float type, f32 to bf16 (rounded to nearest even) or back.
///
/// # Errors
/// A view that reaches past its memory, an output of the wrong length, or types that are not f32 and bf16.
pub fn cast(queue: &Queue, shape: &[usize], x: DeviceView<'_>, out: &mut DeviceMut<'_>) -> Result<()> {
    let entry = match (x.data.dtype(), out.dtype()) {
        (DeviceType::F32, DeviceType::Bf16) => "cast_f32_to_bf16",
        (DeviceType::Bf16, DeviceType::F32) => "cast_bf16_to_f32",
        (from, to) => {
            let found = format!("{} to {}", from.name(), to.name());
            return Err(KernelError::size("cast", "the element types", "f32 to bf16 or bf16 to f32", found));
        }
    };
    gather("cast", entry, 4, queue, shape, x, out)
}

fn gather(
    op: &'static str,
    entry: &'static str,
    unit: usize,
    queue: &Queue,
    shape: &[usize],
    x: DeviceView<'_>,
    out: &mut DeviceMut<'_>,
) -> Result<()> {
    check_view(op, "x", shape, x.strides, x.data.len())?;
    let total = count(op, shape)?;
    check(op, "out", (out.len(), out.dtype()), total, &[out.dtype()])?;
    if total == 0 {
        return Ok(());
    }
    let layout = Layout::merged(shape.iter().zip(x.strides).map(|(&n, &stride)| (n, [stride])));
    let dims = Dims::new(op, &layout)?;
    let units = if is_aligned(out.as_ref(), unit) { in_units(&layout, total, unit, [x.data]) } else { 0 };
    let kernel = queue.gpu().kernel(&SOURCE, entry)?;
    let mut arguments: Vec<Arg> = vec![x.data.into(), out.into(), (total as u64).into(), units.into()];
    dims.push(&mut arguments);
    queue.launch(&kernel, flat_launch(queue, total, unit), &arguments)
}

/// `out += alpha * x` into a view of strides `out_strides`: f32 or bf16 into f32, bf16 into bf16. The sum is taken in fp32
/// and rounded once.
///
/// # Errors
/// A view that reaches past its memory, strides of `out` under which two elements share memory, types as above.
pub fn accumulate(
    queue: &Queue,
    shape: &[usize],
    alpha: f64,
    x: DeviceView<'_>,
    out: &mut DeviceMut<'_>,
    out_strides: &[usize],
) -> Result<()> {
    accumulate_any(queue, shape, alpha as f32, None, x, out, out_strides)
}

/// [`accumulate`] with the factor in device memory, one f32: `out += factor[0] * x`.
///
/// # Errors
/// As [`accumulate`].
pub fn accumulate_by(
    queue: &Queue,
    shape: &[usize],
    factor: DeviceRef<'_>,
    x: DeviceView<'_>,
    out: &mut DeviceMut<'_>,
    out_strides: &[usize],
) -> Result<()> {
    accumulate_any(queue, shape, 1.0, Some(factor), x, out, out_strides)
}

fn accumulate_any(
    queue: &Queue,
    shape: &[usize],
    alpha: f32,
    factor: Option<DeviceRef<'_>>,
    x: DeviceView<'_>,
    out: &mut DeviceMut<'_>,
    out_strides: &[usize],
) -> Result<()> {
    const OP: &str = "accumulate";
    check_type(OP, "out", out.dtype(), FLOATS)?;
    check_type(OP, "x", x.data.dtype(), if out.dtype() == DeviceType::F32 { FLOATS } else { &[DeviceType::Bf16] })?;
    check_view(OP, "x", shape, x.strides, x.data.len())?;
    check_view(OP, "out", shape, out_strides, out.len())?;
    check_no_overlap(OP, shape, out_strides)?;
    if let Some(factor) = factor {
        check(OP, "factor", (factor.len(), factor.dtype()), 1, F32)?;
    }
    let total = count(OP, shape)?;
    if total == 0 {
        return Ok(());
    }
    // In the order of the output's memory.
    let mut dims: Vec<(usize, [usize; 2])> =
        shape.iter().zip(x.strides).zip(out_strides).map(|((&n, &x), &out)| (n, [x, out])).collect();
    dims.sort_by_key(|&(n, [_, out])| std::cmp::Reverse(if n == 1 { 0 } else { out }));
    let layout = Layout::merged(dims.into_iter());
    let dims = Dims::new(OP, &layout)?;
    let unit = unit_of(out.dtype());
    let units = in_units(&layout, total, unit, [x.data, out.as_ref()]);
    let entry = by_types!(x.data.dtype(), out.dtype(), "accumulate", "_into_");
    let kernel = queue.gpu().kernel(&SOURCE, entry)?;
    let mut arguments: Vec<Arg> =
        vec![x.data.into(), out.into(), (total as u64).into(), units.into(), alpha.into(), Arg::optional(factor)];
    dims.push(&mut arguments);
    queue.launch(&kernel, flat_launch(queue, total, unit), &arguments)
}

/// `x *= alpha`, f32 or bf16.
///
/// # Errors
/// Another type.
pub fn scale_in_place(queue: &Queue, alpha: f64, x: &mut DeviceMut<'_>) -> Result<()> {
    scale_any(queue, alpha as f32, None, x)
}

/// `x *= factor[0]`, with the factor in device memory, one f32.
///
/// # Errors
/// Another type, or more than one factor.
pub fn scale_in_place_by(queue: &Queue, factor: DeviceRef<'_>, x: &mut DeviceMut<'_>) -> Result<()> {
    check("scale_in_place", "factor", (factor.len(), factor.dtype()), 1, F32)?;
    scale_any(queue, 1.0, Some(factor), x)
}

fn scale_any(queue: &Queue, alpha: f32, factor: Option<DeviceRef<'_>>, x: &mut DeviceMut<'_>) -> Result<()> {
    check_type("scale_in_place", "x", x.dtype(), FLOATS)?;
    let (total, unit) = (x.len(), unit_of(x.dtype()));
    let units = vectorized(total, unit, &[Some(x.as_ref())]);
    let kernel = queue.gpu().kernel(&SOURCE, by_type!(x.dtype(), "scale"))?;
    let arguments = [x.into(), (total as u64).into(), units.into(), alpha.into(), Arg::optional(factor)];
    queue.launch(&kernel, flat_launch(queue, total, unit), &arguments)
}

/// Sets every element, rounded to the type of `x`: f32 or bf16. (`Queue::zero` clears memory of any type.)
///
/// # Errors
/// Another type.
pub fn fill(queue: &Queue, value: f64, x: &mut DeviceMut<'_>) -> Result<()> {
    check_type("fill", "x", x.dtype(), FLOATS)?;
    let (total, unit) = (x.len(), unit_of(x.dtype()));
    let units = vectorized(total, unit, &[Some(x.as_ref())]);
    let (entry, pattern) = match x.dtype() {
        DeviceType::Bf16 => ("fill_2_bytes", u32::from(half::bf16::from_f32(value as f32).to_bits()) * 0x1_0001),
        _ => ("fill_4_bytes", (value as f32).to_bits()),
    };
    let kernel = queue.gpu().kernel(&SOURCE, entry)?;
    let arguments = [x.into(), (total as u64).into(), units.into(), pattern.into()];
    queue.launch(&kernel, flat_launch(queue, total, unit), &arguments)
}
