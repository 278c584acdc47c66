//! GroupNorm with one group per head: `y = (x - mean) / sqrt(variance + epsilon) * weight + bias`.
//!
//! Mean and (biased) variance are those of the `head_dim` entries of one token and head. `x`, `out`
//! `[tokens, heads, head_dim]`, `weight`, `bias` `[heads, head_dim]`; `mean` and `inverse_std = 1 / sqrt(variance +
//! epsilon)` `[tokens, heads]` are saved for the backward pass beside `x` and `weight`.
//!
//! Backward, with `n = (x - mean) * inverse_std` and `g = dout * weight`: `dx = inverse_std (g - mean(g) - n mean(g n))`,
//! `dweight = sum over tokens of dout * n`, `dbias = sum over tokens of dout`. All three are overwritten.

pub mod cpu;
pub mod cuda;

/// Sizes of a per-head GroupNorm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupNormSpec {
    /// Number of tokens.
    pub tokens: usize,
    /// Number of groups.
    pub heads: usize,
    /// Elements of one group.
    pub head_dim: usize,
    /// Added to the variance.
    pub epsilon: f64,
}
