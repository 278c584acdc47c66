//! Batched matrix product `C[b] = alpha * A[b] B[b] + beta * C[b]`.
//!
//! A is `[m, k]`, B is `[k, n]`, C is `[m, n]`, each with any strides: a transposed operand is one whose row and column
//! strides are swapped, and a batch stride of 0 uses one matrix for the whole batch. With `beta = 0` C is not read, so
//! what it held (NaN included) does not survive. Every size may be 0; with `k = 0` the product is 0.
//!
//! Backward: `dA = dC B^T` and `dB = A^T dC`, the same product with strides swapped; nothing but the inputs is saved.

pub mod cpu;
pub mod cuda;

use crate::error::Result;
use crate::strided::{check_no_overlap, check_view};

/// Distances, in elements, between neighbouring rows, columns and matrices of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatrixStrides {
    /// From one row to the next.
    pub row: usize,
    /// From one column to the next.
    pub column: usize,
    /// From one matrix of the batch to the next.
    pub batch: usize,
}

impl MatrixStrides {
    /// A contiguous batch of row-major matrices `[rows, columns]`.
    pub fn row_major(rows: usize, columns: usize) -> Self {
        Self { row: columns, column: 1, batch: rows * columns }
    }

    /// The same memory read as transposed matrices.
    pub fn transposed(self) -> Self {
        Self { row: self.column, column: self.row, batch: self.batch }
    }
}

/// Sizes and strides of a batched matrix product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatmulSpec {
    /// Number of products.
    pub batch: usize,
    /// Rows of A and C.
    pub m: usize,
    /// Columns of B and C.
    pub n: usize,
    /// Columns of A, rows of B.
    pub k: usize,
    /// Strides of A, `[m, k]`.
    pub a: MatrixStrides,
    /// Strides of B, `[k, n]`.
    pub b: MatrixStrides,
    /// Strides of C, `[m, n]`; no two elements may share memory.
    pub c: MatrixStrides,
}

impl MatmulSpec {
    /// The spec of `C^T = B^T A^T` (with the operands exchanged).
    fn swapped(&self) -> Self {
        Self { m: self.n, n: self.m, a: self.b.transposed(), b: self.a.transposed(), c: self.c.transposed(), ..*self }
    }

    /// Refuses operands that are too short for their strides and a C whose elements overlap.
    pub fn validate(&self, a_len: usize, b_len: usize, c_len: usize) -> Result<()> {
        let Self { batch, m, n, k, a, b, c } = *self;
        let op = "matmul";
        check_view(op, "a", &[batch, m, k], &[a.batch, a.row, a.column], a_len)?;
        check_view(op, "b", &[batch, k, n], &[b.batch, b.row, b.column], b_len)?;
        check_view(op, "c", &[batch, m, n], &[c.batch, c.row, c.column], c_len)?;
        check_no_overlap(op, &[batch, m, n], &[c.batch, c.row, c.column])
    }
}
