//! What the GPU versions of both attentions check before they launch anything.

use super::AttentionLayout;
use crate::cuda::{DeviceMut, DeviceRef, DeviceType, check};
use crate::{KernelError, Result};

/// Head dims of the tensor-core kernels.
pub(crate) fn bf16_head_dims() -> impl Iterator<Item = usize> {
    (8..=128).step_by(8).chain([256])
}

/// Refuses element types and head dims without a kernel, and bf16 strides that 16-byte copies cannot take.
pub(crate) fn check_layout(op: &'static str, layout: &AttentionLayout, dtype: DeviceType) -> Result<()> {
    layout.validate(op)?;
    match dtype {
        DeviceType::F32 if layout.head_dim > 256 => {
            Err(KernelError::size(op, "head_dim", "at most 256 on CUDA", layout.head_dim))
        }
        DeviceType::F32 => Ok(()),
        DeviceType::Bf16 => {
            if !bf16_head_dims().any(|head_dim| head_dim == layout.head_dim) {
                let expected = "a multiple of 8 up to 128, or 256, for bf16 on CUDA";
                return Err(KernelError::size(op, "head_dim", expected, layout.head_dim));
            }
            let strides = [
                ("query_stride", layout.query_stride),
                ("key_stride", layout.key_stride),
                ("value_stride", layout.value_stride),
                ("output_stride", layout.output_stride),
            ];
            match strides.into_iter().find(|(_, stride)| !stride.is_multiple_of(8)) {
                Some((what, stride)) => {
                    Err(KernelError::size(op, what, "a multiple of 8 elements for bf16 on CUDA", stride))
                }
                None => Ok(()),
            }
        }
        other => Err(KernelError::size(op, "the element type", "f32 or bf16", other.name())),
    }
}

/// What a view is, for a check.
pub(crate) trait View {
    /// Length, type, address.
    fn parts(&self) -> (usize, DeviceType, u64);
}

impl View for DeviceRef<'_> {
    fn parts(&self) -> (usize, DeviceType, u64) {
        (self.len(), self.dtype(), self.pointer())
    }
}

impl View for DeviceMut<'_> {
    fn parts(&self) -> (usize, DeviceType, u64) {
        (self.len(), self.dtype(), self.pointer())
    }
}

/// Refuses rows of another type, rows that end too early, and bf16 rows that do not start at a multiple of 16 bytes. A
/// strided view may end right after its last row, or run on into what it was cut from.
pub(crate) fn check_rows(
    op: &'static str,
    argument: &'static str,
    view: &dyn View,
    dtype: DeviceType,
    (rows, stride, width): (usize, usize, usize),
) -> Result<()> {
    let (len, found, pointer) = view.parts();
    check(op, argument, (len, found), len, &[dtype])?;
    let expected = if rows == 0 { 0 } else { (rows - 1) * stride + width };
    if len < expected {
        return Err(KernelError::Length { op, argument, expected, found: len });
    }
    check_address(op, argument, found, pointer)
}

/// Refuses another type or length, and bf16 memory that does not start at a multiple of 16 bytes.
pub(crate) fn check_flat(
    op: &'static str,
    argument: &'static str,
    view: &dyn View,
    dtype: DeviceType,
    expected: usize,
) -> Result<()> {
    let (len, found, pointer) = view.parts();
    check(op, argument, (len, found), expected, &[dtype])?;
    check_address(op, argument, found, pointer)
}

fn check_address(op: &'static str, argument: &'static str, dtype: DeviceType, pointer: u64) -> Result<()> {
    if dtype == DeviceType::Bf16 && !pointer.is_multiple_of(16) {
        let expected = format!("a multiple of 16 bytes for {argument}");
        return Err(KernelError::size(op, "an address", expected, format!("{pointer:#x}")));
    }
    Ok(())
}

/// q, k and v of a layout.
pub(crate) fn check_inputs(
    op: &'static str,
    layout: &AttentionLayout,
    dtype: DeviceType,
    [q, k, v]: [DeviceRef<'_>; 3],
) -> Result<()> {
    let (tokens, kv_width) = (layout.tokens, layout.kv_heads * layout.head_dim);
    check_rows(op, "q", &q, dtype, (tokens, layout.query_stride, layout.query_heads * layout.head_dim))?;
    check_rows(op, "k", &k, dtype, (tokens, layout.key_stride, kv_width))?;
    check_rows(op, "v", &v, dtype, (tokens, layout.value_stride, kv_width))
}

/// o, or its gradient.
pub(crate) fn check_output(
    op: &'static str,
    argument: &'static str,
    layout: &AttentionLayout,
    dtype: DeviceType,
    view: &dyn View,
) -> Result<()> {
    let width = layout.query_heads * layout.head_dim;
    check_rows(op, argument, view, dtype, (layout.tokens, layout.output_stride, width))
}

/// dq, dk and dv, contiguous.
pub(crate) fn check_gradients(
    op: &'static str,
    layout: &AttentionLayout,
    dtype: DeviceType,
    [dq, dk, dv]: [&DeviceMut<'_>; 3],
) -> Result<()> {
    let kv = layout.tokens * layout.kv_heads * layout.head_dim;
    check_flat(op, "dq", dq, dtype, layout.tokens * layout.query_heads * layout.head_dim)?;
    check_flat(op, "dk", dk, dtype, kv)?;
    check_flat(op, "dv", dv, dtype, kv)
}
