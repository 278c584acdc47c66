//! RMSNorm over the last dimension: `y = x / sqrt(mean(x^2) + epsilon) * weight`.
//!
//! `x`, `out` `[rows, width]`, `weight` `[width]`, `inverse_rms` `[rows]`: `r = 1 / sqrt(mean(x^2) + epsilon)`, saved for
//! the backward pass beside `x` and `weight`.
//!
//! Backward, with `g = dout * weight`: `dx = r (g - x r^2 mean(g x))`, `dweight = sum over rows of dout * x * r`.
//! Both gradients are overwritten.

pub mod cpu;
pub mod cuda;

/// Sizes of an RMSNorm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RmsNormSpec {
    /// Number of vectors.
    pub rows: usize,
    /// Elements of one vector.
    pub width: usize,
    /// Added to the mean square.
    pub epsilon: f64,
}
