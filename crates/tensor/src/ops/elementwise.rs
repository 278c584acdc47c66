//! Element-wise ops with broadcasting.

use super::{BinaryOp, UnaryOp, expect_shape, not_aliased, same_device, same_dtype};
use crate::tensor::for_float;
use crate::{Result, Tensor};
use stickbreak_kernels::Float;
use stickbreak_kernels::cuda::DeviceView;
use stickbreak_kernels::elementwise::{Strided, cpu, cuda};

impl Tensor {
    /// Applies a function to every element.
    ///
    /// # Errors
    /// If the dtype is not a float that the device computes in.
    pub fn unary(&self, op: UnaryOp) -> Result<Tensor> {
        let out = self.new_empty(self.shape(), self.dtype())?;
        if let Some(queue) = self.queue() {
            cuda::unary(queue, op, self.shape(), self.device_view(), &mut out.device_mut())?;
            return Ok(out);
        }
        for_float!("unary", self.dtype(), T => {
            let data = self.read::<T>()?;
            let x = Strided { data: &data, strides: self.strides() };
            Ok(cpu::unary(op, self.shape(), x, &mut out.expect_write::<T>())?)
        })?;
        Ok(out)
    }

    /// Combines two tensors element by element, broadcasting both to one shape.
    ///
    /// # Errors
    /// If the shapes do not broadcast or the dtypes differ.
    pub fn binary(&self, op: BinaryOp, other: &Tensor) -> Result<Tensor> {
        let name = match op {
            BinaryOp::Add => "add",
            BinaryOp::Subtract => "sub",
            BinaryOp::Multiply => "mul",
            BinaryOp::Divide => "div",
        };
        same_dtype(name, "right side", self.dtype(), other)?;
        same_device(name, "right side", self, other)?;
        let shape = self.shape().broadcast(other.shape(), name)?;
        let (left, right) = (self.broadcast_strides(&shape), other.broadcast_strides(&shape));
        let out = self.new_empty(&shape, self.dtype())?;
        if let Some(queue) = self.queue() {
            let a = DeviceView::new(self.device_ref(), &left);
            let b = DeviceView::new(other.device_ref(), &right);
            cuda::binary(queue, op, &shape, a, b, &mut out.device_mut())?;
            return Ok(out);
        }
        for_float!(name, self.dtype(), T => {
            let (a, b) = (self.read::<T>()?, other.read::<T>()?);
            let a = Strided { data: &a, strides: &left };
            let b = Strided { data: &b, strides: &right };
            Ok(cpu::binary(op, &shape, a, b, &mut out.expect_write::<T>())?)
        })?;
        Ok(out)
    }

    /// Sum, with broadcasting.
    ///
    /// # Errors
    /// As [`binary`](Self::binary).
    pub fn add(&self, other: &Tensor) -> Result<Tensor> {
        self.binary(BinaryOp::Add, other)
    }

    /// Difference, with broadcasting.
    ///
    /// # Errors
    /// As [`binary`](Self::binary).
    pub fn sub(&self, other: &Tensor) -> Result<Tensor> {
        self.binary(BinaryOp::Subtract, other)
    }

    /// Product, with broadcasting.
    ///
    /// # Errors
    /// As [`binary`](Self::binary).
    pub fn mul(&self, other: &Tensor) -> Result<Tensor> {
        self.binary(BinaryOp::Multiply, other)
    }

    /// Quotient, with broadcasting.
    ///
    /// # Errors
    /// As [`binary`](Self::binary).
    pub fn div(&self, other: &Tensor) -> Result<Tensor> {
        self.binary(BinaryOp::Divide, other)
    }

    /// `scale * self + shift`.
    ///
    /// # Errors
    /// As [`unary`](Self::unary).
    pub fn affine(&self, scale: f64, shift: f64) -> Result<Tensor> {
        self.unary(UnaryOp::Affine { scale, shift })
    }

    /// `self += alpha * x`, in place, for an `x` of this shape. This tensor may be a strided view; on a CUDA device it may
    /// be float32 where `x` is bfloat16.
    ///
    /// # Errors
    /// If the shapes or dtypes differ, or `x` shares this tensor's storage.
    pub fn add_assign_scaled(&self, alpha: f64, x: &Tensor) -> Result<()> {
        const OP: &str = "add_assign_scaled";
        same_device(OP, "x", self, x)?;
        expect_shape(OP, "x", x, self.shape())?;
        not_aliased(OP, "x", self, x)?;
        if let Some(queue) = self.queue() {
            let (x, mut out) = (x.device_view(), self.device_mut());
            return Ok(cuda::accumulate(queue, self.shape(), alpha, x, &mut out, self.strides())?);
        }
        same_dtype(OP, "x", self.dtype(), x)?;
        for_float!(OP, self.dtype(), T => {
            let data = x.read::<T>()?;
            let view = Strided { data: &data, strides: x.strides() };
            let mut out = self.write_strided::<T>();
            Ok(cpu::accumulate(self.shape(), T::from_f64(alpha), view, &mut out, self.strides())?)
        })
    }

    /// Sets every element of a contiguous tensor, in place.
    ///
    /// # Errors
    /// If it is not contiguous or not a float.
    pub fn fill_assign(&self, value: f64) -> Result<()> {
        if let Some(queue) = self.queue() {
            self.require_contiguous("fill_assign")?;
            return Ok(cuda::fill(queue, value, &mut self.device_mut())?);
        }
        for_float!("fill_assign", self.dtype(), T => {
            self.write::<T>()?.fill(T::from_f64(value));
            Ok(())
        })
    }

    /// Sets every element of a contiguous tensor of any dtype to zero, in place.
    ///
    /// # Errors
    /// If it is not contiguous.
    pub fn zero_assign(&self) -> Result<()> {
        if let Some(queue) = self.queue() {
            self.require_contiguous("zero_assign")?;
            return Ok(queue.zero(&mut self.device_mut())?);
        }
        crate::tensor::for_any!(self.dtype(), T => {
            self.write::<T>()?.fill(<T as Default>::default());
            Ok(())
        })
    }

    /// Multiplies every element of a contiguous tensor by a number that is a tensor of one element, in place; nobody waits
    /// for its value.
    ///
    /// # Errors
    /// If this tensor is not contiguous or not a float, or `factor` has more elements or is elsewhere.
    pub fn scale_assign_by(&self, factor: &Tensor) -> Result<()> {
        const OP: &str = "scale_assign_by";
        same_device(OP, "factor", self, factor)?;
        let Some(queue) = self.queue() else {
            let factor = factor.to_scalar()?;
            return if factor == 1.0 { Ok(()) } else { self.scale_assign(factor) };
        };
        self.require_contiguous(OP)?;
        let factor = factor.to_dtype(crate::DType::F32)?;
        Ok(cuda::scale_in_place_by(queue, factor.device_ref(), &mut self.device_mut())?)
    }

    /// Multiplies every element of a contiguous tensor, in place.
    ///
    /// # Errors
    /// If it is not contiguous or not a float.
    pub fn scale_assign(&self, factor: f64) -> Result<()> {
        if let Some(queue) = self.queue() {
            self.require_contiguous("scale_assign")?;
            return Ok(cuda::scale_in_place(queue, factor, &mut self.device_mut())?);
        }
        for_float!("scale_assign", self.dtype(), T => {
            cpu::scale_in_place(T::from_f64(factor), &mut self.write::<T>()?);
            Ok(())
        })
    }

    /// Copies `x` into this contiguous tensor, in place.
    ///
    /// # Errors
    /// If the shapes or dtypes differ, this tensor is not contiguous, or `x` shares its storage.
    pub fn copy_assign(&self, x: &Tensor) -> Result<()> {
        const OP: &str = "copy_assign";
        same_dtype(OP, "x", self.dtype(), x)?;
        expect_shape(OP, "x", x, self.shape())?;
        not_aliased(OP, "x", self, x)?;
        same_device(OP, "x", self, x)?;
        if let Some(queue) = self.queue() {
            self.require_contiguous(OP)?;
            let copied = match x.is_contiguous() {
                true => queue.copy(x.device_ref(), &mut self.device_mut()),
                false => cuda::copy(queue, self.shape(), x.device_view(), &mut self.device_mut()),
            };
            return Ok(copied?);
        }
        crate::tensor::for_any!(self.dtype(), T => {
            let data = x.read::<T>()?;
            let view = Strided { data: &data, strides: x.strides() };
            Ok(cpu::copy(self.shape(), view, &mut self.write::<T>()?)?)
        })
    }
}
