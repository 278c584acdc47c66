//! Matrix products. Transposed views go to the kernel as they are: a transposition is a pair of strides.

use super::{not_aliased, same_device, same_dtype};
use crate::tensor::for_float;
use crate::{DType, Result, Shape, Tensor, TensorError};
use stickbreak_kernels::Float;
use stickbreak_kernels::matmul::{MatmulSpec, MatrixStrides, cpu, cuda};

impl Tensor {
    /// Matrix product over the last two dimensions, `[.., m, k] x [.., k, n] -> [.., m, n]`, leading dimensions
    /// broadcast.
    ///
    /// # Errors
    /// If the inner sizes differ, or the leading dimensions do not broadcast.
    pub fn matmul(&self, other: &Tensor) -> Result<Tensor> {
        let shape = product_shape(self, other)?;
        let out = self.new_empty(shape, self.dtype())?;
        out.matmul_unchecked(1.0, self, other, 0.0)?;
        Ok(out)
    }

    /// `self = alpha * a b + beta * self`, in place: the form in which weight gradients are accumulated.
    /// This tensor must be contiguous in its last two dimensions' strides (a transposed view is fine) and have exactly
    /// the product's shape. On a CUDA device it may be float32 where the factors are bfloat16.
    ///
    /// # Errors
    /// If the shapes or dtypes do not fit, or this tensor shares storage with an input.
    pub fn matmul_assign(&self, alpha: f64, a: &Tensor, b: &Tensor, beta: f64) -> Result<()> {
        const OP: &str = "matmul_assign";
        if !(self.queue().is_some() && self.dtype() == DType::F32 && a.dtype() == DType::BF16) {
            same_dtype(OP, "output", a.dtype(), self)?;
        }
        same_device(OP, "a", self, a)?;
        same_device(OP, "b", self, b)?;
        not_aliased(OP, "a", self, a)?;
        not_aliased(OP, "b", self, b)?;
        let shape = product_shape(a, b)?;
        if shape != *self.shape() {
            let why = "the left one is the output, the right one the product".into();
            return Err(TensorError::ShapePair { op: OP, left: self.shape().clone(), right: shape, why });
        }
        self.matmul_unchecked(alpha, a, b, beta)
    }

    fn matmul_unchecked(&self, alpha: f64, a: &Tensor, b: &Tensor, beta: f64) -> Result<()> {
        let (rank_a, rank_b) = (a.rank(), b.rank());
        let (m, k, n) = (a.shape()[rank_a - 2], a.shape()[rank_a - 1], b.shape()[rank_b - 1]);
        // [.., m, k] x [k, n] with rows that follow one another is a single product of .. * m rows.
        if rank_b == 2 && rank_a > 2 && a.is_contiguous() && self.is_contiguous() {
            let rows: usize = a.shape()[..rank_a - 1].iter().product();
            return self.reshape([rows, n])?.matmul_unchecked(alpha, &a.reshape([rows, k])?, b, beta);
        }
        let batch_shape = &self.shape()[..self.rank() - 2];
        let (a, a_batch) = flatten_batch(&with_unit_stride(a)?, batch_shape)?;
        let (b, b_batch) = flatten_batch(&with_unit_stride(b)?, batch_shape)?;
        let (c, c_batch) = flatten_batch(self, batch_shape)?;
        if !c.shares_storage(self) {
            let expected = "leading dimensions without gaps".into();
            return Err(TensorError::Shape {
                op: "matmul_assign",
                argument: "output",
                expected,
                found: self.shape().clone(),
            });
        }
        let strides = |t: &Tensor, batch| {
            let s = t.strides();
            MatrixStrides { row: s[s.len() - 2], column: s[s.len() - 1], batch }
        };
        let spec = MatmulSpec {
            batch: batch_shape.iter().product(),
            m,
            n,
            k,
            a: strides(&a, a_batch),
            b: strides(&b, b_batch),
            c: strides(&c, c_batch),
        };
        if let Some(queue) = self.queue() {
            let (alpha, beta) = (alpha as f32, beta as f32);
            return Ok(cuda::matmul(queue, &spec, alpha, a.device_ref(), b.device_ref(), beta, &mut c.device_mut())?);
        }
        for_float!("matmul", self.dtype(), T => {
            let (a, b) = (a.read::<T>()?, b.read::<T>()?);
            let mut c = c.write_strided::<T>();
            Ok(cpu::matmul(&spec, T::from_f64(alpha), &a, &b, T::from_f64(beta), &mut c)?)
        })
    }
}

/// The CUDA library takes matrices whose rows or columns are contiguous; anything else is copied. The CPU takes any.
fn with_unit_stride(matrix: &Tensor) -> Result<Tensor> {
    let last = matrix.rank() - 2..matrix.rank();
    let fits = last.clone().any(|d| matrix.strides()[d] == 1 || matrix.shape()[d] == 1);
    // A broadcast matrix has rows on top of each other.
    let repeats = last.clone().any(|d| matrix.strides()[d] == 0 && matrix.shape()[d] > 1);
    if matrix.queue().is_none() || (fits && !repeats) { Ok(matrix.clone()) } else { matrix.copy() }
}

fn product_shape(a: &Tensor, b: &Tensor) -> Result<Shape> {
    same_device("matmul", "right side", a, b)?;
    same_dtype("matmul", "right side", a.dtype(), b)?;
    let wrong = |why: &str| TensorError::ShapePair {
        op: "matmul",
        left: a.shape().clone(),
        right: b.shape().clone(),
        why: why.into(),
    };
    if a.rank() < 2 || b.rank() < 2 {
        return Err(wrong("both need two dimensions or more"));
    }
    let (batch_a, matrix_a) = a.shape().split_at(a.rank() - 2);
    let (batch_b, matrix_b) = b.shape().split_at(b.rank() - 2);
    if matrix_a[1] != matrix_b[0] {
        return Err(wrong("the left one's last size must be the right one's last but one"));
    }
    let batch = Shape::from(batch_a).broadcast(&Shape::from(batch_b), "matmul")?;
    Ok([&batch[..], &[matrix_a[0], matrix_b[1]]].concat().into())
}

/// The tensor with its leading dimensions broadcast to `batch_shape`, and the one stride that walks them in order;
/// a copy if no single stride does.
fn flatten_batch(tensor: &Tensor, batch_shape: &[usize]) -> Result<(Tensor, usize)> {
    let matrix = &tensor.shape()[tensor.rank() - 2..];
    let full = tensor.broadcast_to([batch_shape, matrix].concat())?;
    let uniform = |t: &Tensor| {
        let mut walked: Option<(usize, usize)> = None; // (stride of the batch, stride expected of the next dimension)
        for d in (0..batch_shape.len()).rev().filter(|&d| batch_shape[d] != 1) {
            let stride = t.strides()[d];
            match walked {
                None => walked = Some((stride, stride * batch_shape[d])),
                Some((first, expected)) if expected == stride => walked = Some((first, stride * batch_shape[d])),
                Some(_) => return None,
            }
        }
        Some(walked.map_or(0, |(first, _)| first))
    };
    match uniform(&full) {
        Some(stride) => Ok((full, stride)),
        None => {
            let copy = full.copy()?;
            let stride = matrix.iter().product();
            Ok((copy, stride))
        }
    }
}
