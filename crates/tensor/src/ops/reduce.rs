//! Sums and maxima over dimensions.

use super::Reduction;
use crate::tensor::for_float;
use crate::{Result, Shape, Tensor, TensorError};
use stickbreak_kernels::elementwise::Strided;
use stickbreak_kernels::reduce::{cpu, cuda};

impl Tensor {
    /// Reduces the given dimensions, which stay as size 1.
    ///
    /// # Errors
    /// If a dimension does not exist.
    pub fn reduce(&self, op: Reduction, axes: &[usize]) -> Result<Tensor> {
        let mut sizes = self.shape().to_vec();
        for &axis in axes {
            self.dim(axis)?;
            sizes[axis] = 1;
        }
        let out = self.new_empty(sizes, self.dtype())?;
        if let Some(queue) = self.queue() {
            cuda::reduce(queue, op, self.shape(), self.device_view(), axes, &mut out.device_mut())?;
            return Ok(out);
        }
        for_float!("reduce", self.dtype(), T => {
            let data = self.read::<T>()?;
            let x = Strided { data: &data, strides: self.strides() };
            Ok(cpu::reduce(op, self.shape(), x, axes, &mut out.expect_write::<T>())?)
        })?;
        Ok(out)
    }

    /// Sum over the given dimensions, which stay as size 1.
    pub fn sum(&self, axes: &[usize]) -> Result<Tensor> {
        self.reduce(Reduction::Sum, axes)
    }

    /// Sum of all elements, as a scalar.
    pub fn sum_all(&self) -> Result<Tensor> {
        self.sum(&(0..self.rank()).collect::<Vec<_>>())?.reshape([])
    }

    /// Maximum over the given dimensions, which stay as size 1.
    pub fn max(&self, axes: &[usize]) -> Result<Tensor> {
        self.reduce(Reduction::Max, axes)
    }

    /// The inverse of broadcasting: sums this tensor down to `shape`, which must broadcast to this tensor's shape.
    ///
    /// # Errors
    /// If it does not.
    pub fn sum_to(&self, shape: &Shape) -> Result<Tensor> {
        if self.shape() == shape {
            return Ok(self.clone());
        }
        if shape.broadcast(self.shape(), "sum_to")? != *self.shape() {
            return Err(TensorError::ShapePair {
                op: "sum_to",
                left: self.shape().clone(),
                right: shape.clone(),
                why: "the right one does not broadcast to the left one".into(),
            });
        }
        let missing = self.rank() - shape.rank();
        let axes: Vec<usize> =
            (0..self.rank()).filter(|&d| d < missing || (shape[d - missing] == 1 && self.shape()[d] != 1)).collect();
        self.sum(&axes)?.reshape(shape)
    }

    /// Sum of the squares of all elements, summed in float64. Waits for the device.
    pub fn sum_of_squares(&self) -> Result<f64> {
        if self.queue().is_some() {
            return self.sum_of_squares_tensor()?.to_scalar();
        }
        let tensor = self.contiguous()?;
        for_float!("sum_of_squares", self.dtype(), T => {
            Ok(cpu::sum_of_squares(&tensor.read::<T>()?[..self.elements()]))
        })
    }

    /// [`sum_of_squares`](Self::sum_of_squares) as a scalar on this tensor's device, float32 unless this is float64:
    /// nobody waits for its value.
    ///
    /// # Errors
    /// If the dtype is not a float.
    pub fn sum_of_squares_tensor(&self) -> Result<Tensor> {
        let Some(queue) = self.queue() else {
            return Ok(Tensor::full(self.sum_of_squares()?, [], super::statistics(self.dtype())));
        };
        let tensor = self.contiguous()?;
        let out = self.new_empty([], crate::DType::F32)?;
        cuda::sum_of_squares(queue, tensor.device_ref(), &mut out.device_mut())?;
        Ok(out)
    }
}
