//! Ops on tensors: each validates its shapes, allocates its output and dispatches to a kernel.

pub mod attention;
mod elementwise;
mod matmul;
pub mod nn;
mod reduce;

pub use stickbreak_kernels::elementwise::{BinaryOp, UnaryOp};
pub use stickbreak_kernels::reduce::Reduction;

use crate::{DType, Result, Shape, Tensor, TensorError};

/// Refuses tensors of different dtypes.
pub(crate) fn same_dtype(op: &'static str, argument: &'static str, expected: DType, tensor: &Tensor) -> Result<()> {
    if tensor.dtype() == expected {
        Ok(())
    } else {
        Err(TensorError::DType { op, argument, expected: expected.name().into(), found: tensor.dtype() })
    }
}

/// Refuses a tensor that has not exactly this shape.
pub(crate) fn expect_shape(
    op: &'static str,
    argument: &'static str,
    tensor: &Tensor,
    expected: &[usize],
) -> Result<()> {
    if tensor.shape()[..] == *expected {
        Ok(())
    } else {
        let expected = Shape::from(expected).to_string();
        Err(TensorError::Shape { op, argument, expected, found: tensor.shape().clone() })
    }
}

/// Refuses to write into memory that is also read.
pub(crate) fn not_aliased(op: &'static str, argument: &'static str, out: &Tensor, input: &Tensor) -> Result<()> {
    if out.shares_storage(input) { Err(TensorError::Aliased { op, argument }) } else { Ok(()) }
}

/// The type of sums and statistics over values of a type: never less than float32.
pub(crate) fn statistics(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// Refuses a tensor that is not on the same device as the others.
pub(crate) fn same_device(op: &'static str, argument: &'static str, expected: &Tensor, tensor: &Tensor) -> Result<()> {
    let (expected, found) = (expected.device(), tensor.device());
    if expected == found { Ok(()) } else { Err(TensorError::WrongDevice { op, argument, expected, found }) }
}
