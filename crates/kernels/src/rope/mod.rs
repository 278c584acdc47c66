//! Rotary position embedding, "half" pairing: dimension `d` is paired with `d + D/2`.
//!
//! With `angle = position * theta^(-2d/D)`, a pair `(a, b)` becomes `(a cos - b sin, b cos + a sin)`. `x`, `out`
//! `[tokens, heads, head_dim]`, `positions` `[tokens]`. Angles are computed in float64 for every type.
//!
//! The rotation is orthogonal: `inverse = true` rotates back, which is also the backward pass (`dx` from `dout`). Nothing
//! but the positions is saved.

pub mod cpu;
pub mod cuda;

/// Sizes of a rotary embedding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeSpec {
    /// Number of tokens.
    pub tokens: usize,
    /// Heads of one token.
    pub heads: usize,
    /// Elements of one head, even.
    pub head_dim: usize,
    /// Base of the frequencies.
    pub theta: f64,
}
