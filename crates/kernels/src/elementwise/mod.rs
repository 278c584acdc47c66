//! Elementwise ops on views of any strides.
//!
//! Inputs are [`Strided`] views over one shape, broadcast by strides of 0; outputs are contiguous (row-major) in that
//! shape, except for `accumulate`, which adds into a strided view: `out += alpha * x`.
//!
//! Nothing is saved for a backward pass beyond what the derivative names: the input (`Log`, `Square`, `Silu`), the output
//! (`Exp`, `Sqrt`, `Reciprocal`, `Sigmoid`, `Tanh`) or nothing (`Negate`, `Affine`).

pub mod cpu;
pub mod cuda;

pub use crate::strided::Strided;

/// A function of one number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum UnaryOp {
    /// -x
    Negate,
    /// e^x
    Exp,
    /// ln x
    Log,
    /// sqrt x
    Sqrt,
    /// 1 / x
    Reciprocal,
    /// x^2
    Square,
    /// 1 / (1 + e^-x)
    Sigmoid,
    /// tanh x
    Tanh,
    /// x sigmoid(x)
    Silu,
    /// scale * x + shift, in one rounding
    Affine {
        /// Factor.
        scale: f64,
        /// Summand.
        shift: f64,
    },
}

/// A function of two numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BinaryOp {
    /// a + b
    Add,
    /// a - b
    Subtract,
    /// a * b
    Multiply,
    /// a / b
    Divide,
}
