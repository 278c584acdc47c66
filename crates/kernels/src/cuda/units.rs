//! What the elementwise and row kernels share: units of 16 bytes, grids over flat memory, views as kernel arguments.

use super::{Arg, DeviceRef, DeviceType, Launch, Queue, Source, check};
use crate::strided::Layout;
use crate::{KernelError, Result};

/// Device memory read as a view: element `i` of a shape lies at `data[sum of i[d] * strides[d]]`.
///
/// The data starts at the view's first element and covers the last one; a stride of 0 repeats (broadcasts) a dimension.
#[derive(Debug, Clone, Copy)]
pub struct DeviceView<'a> {
    /// Memory from the view's first element on.
    pub data: DeviceRef<'a>,
    /// Distance, in elements, between neighbours along each dimension.
    pub strides: &'a [usize],
}

impl<'a> DeviceView<'a> {
    /// A view of device memory by explicit strides.
    pub fn new(data: DeviceRef<'a>, strides: &'a [usize]) -> Self {
        Self { data, strides }
    }
}

/// Types that most kernels compute on.
pub(crate) const FLOATS: &[DeviceType] = &[DeviceType::F32, DeviceType::Bf16];
pub(crate) const F32: &[DeviceType] = &[DeviceType::F32];

pub(crate) const UNITS: &str = include_str!("../../cuda/units.cuh");
pub(crate) const VIEWS: &str = include_str!("../../cuda/views.cuh");

pub(crate) const fn source(file: &'static str, parts: &'static [&'static str]) -> Source {
    Source { file, parts, defines: Vec::new() }
}

/// An entry's name by the element type: `by_type!(dtype, "scale")` is `scale_f32` or `scale_bf16`.
macro_rules! by_type {
    ($dtype:expr, $name:literal) => {
        match $dtype {
            $crate::cuda::DeviceType::Bf16 => concat!($name, "_bf16"),
            _ => concat!($name, "_f32"),
        }
    };
}
/// An entry's name by two element types, joined by `$joint`; f32 with bf16 only if the kernel file has it.
macro_rules! by_types {
    ($first:expr, $second:expr, $name:literal, $joint:literal) => {{
        use $crate::cuda::DeviceType::Bf16;
        match ($first, $second) {
            (Bf16, Bf16) => concat!($name, "_bf16", $joint, "bf16"),
            (Bf16, _) => concat!($name, "_bf16", $joint, "f32"),
            (_, Bf16) => concat!($name, "_f32", $joint, "bf16"),
            _ => concat!($name, "_f32", $joint, "f32"),
        }
    }};
}
pub(crate) use {by_type, by_types};

/// Refuses an element type.
pub(crate) fn check_type(
    op: &'static str,
    argument: &'static str,
    dtype: DeviceType,
    allowed: &[DeviceType],
) -> Result<()> {
    check(op, argument, (0, dtype), 0, allowed)
}

/// Refuses a norm's weight that is bf16 beside f32 activations; every other pair of floats has a kernel.
pub(crate) fn check_weight(op: &'static str, x: DeviceType, weight: DeviceType) -> Result<()> {
    check_type(op, "weight", weight, if x == DeviceType::F32 { F32 } else { FLOATS })
}

/// A size as a kernel's 32-bit argument.
pub(crate) fn small(op: &'static str, what: &'static str, size: usize) -> Result<u32> {
    u32::try_from(size).map_err(|_| KernelError::size(op, what, "below 2^32", size))
}

/// Elements of a 16-byte unit.
pub(crate) fn unit_of(dtype: DeviceType) -> usize {
    16 / dtype.size()
}

/// Whether units of this many elements can be accessed at an address.
pub(crate) fn is_aligned(data: DeviceRef<'_>, unit: usize) -> bool {
    data.pointer().is_multiple_of((unit * data.dtype().size()).min(16) as u64)
}

/// How many of a flat array's elements go in units.
pub(crate) fn vectorized(length: usize, unit: usize, operands: &[Option<DeviceRef<'_>>]) -> u64 {
    let aligned = operands.iter().flatten().all(|&data| is_aligned(data, unit));
    if aligned { (length / unit * unit) as u64 } else { 0 }
}

/// A grid-stride loop of 256 threads over units.
pub(crate) fn flat_launch(queue: &Queue, length: usize, unit: usize) -> Launch {
    let blocks = length.div_ceil(unit * 256).min(queue.gpu().multiprocessors() as usize * 32);
    Launch { grid: [blocks as u32, 1, 1], block: 256, shared: 0 }
}

/// The most dimensions a view has for a kernel, after merging (`RANK` in views.cuh).
const RANK: usize = 6;

/// A merged layout as kernel arguments, innermost dimension first.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dims<const N: usize> {
    pub rank: u32,
    shape: [u32; RANK],
    strides: [[u64; RANK]; N],
}

impl<const N: usize> Dims<N> {
    pub fn new(op: &'static str, layout: &Layout<N>) -> Result<Self> {
        let rank = layout.shape.len();
        if rank > RANK {
            return Err(KernelError::size(op, "number of dimensions after merging", "at most 6 on a GPU", rank));
        }
        if rank > 1 {
            let total = layout.shape.iter().try_fold(1u32, |n, &size| n.checked_mul(u32::try_from(size).ok()?));
            if total.is_none() {
                let shape = format!("{:?}", layout.shape);
                return Err(KernelError::size(op, "elements of a strided view", "below 2^32 on a GPU", shape));
            }
        }
        let mut dims = Self { rank: rank as u32, shape: [1; RANK], strides: [[0; RANK]; N] };
        for (d, (&size, strides)) in layout.shape.iter().zip(&layout.strides).rev().enumerate() {
            // The kernels do not look at the size of the only dimension.
            dims.shape[d] = size as u32;
            for operand in 0..N {
                dims.strides[operand][d] = strides[operand] as u64;
            }
        }
        Ok(dims)
    }

    pub fn push(&self, arguments: &mut Vec<Arg>) {
        arguments.push(self.rank.into());
        arguments.extend(self.shape.map(Arg::from));
        for strides in self.strides {
            arguments.extend(strides.map(Arg::from));
        }
    }
}

/// Whether an operand of a merged layout can be read in units along its innermost dimension, if that is dense; an operand
/// that is not dense there is gathered element by element within a unit.
pub(crate) fn allows_units<const N: usize>(
    layout: &Layout<N>,
    operand: usize,
    data: DeviceRef<'_>,
    unit: usize,
) -> bool {
    layout.inner_strides()[operand] != 1
        || (is_aligned(data, unit)
            && layout.strides[..layout.strides.len() - 1].iter().all(|s| s[operand].is_multiple_of(unit)))
}
