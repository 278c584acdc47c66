//! Causal softmax attention, the baseline of stick-breaking attention.
//!
//! For query i and key j of one head, inside one document, with `j <= i`:
//!
//! ```text
//! z_ij   = scale * (q_i . k_j) - slope_h (i - j)      the second term only with ALiBi
//! lse_i  = ln sum_j e^z_ij
//! A_ij   = e^(z_ij - lse_i)
//! o_i    = sum_j A_ij v_j
//! ```
//!
//! Backward, with D_i = do_i . o_i:
//!
//! ```text
//! dz_ij = A_ij (do_i . v_j - D_i)
//! dv_j  = sum_i A_ij do_i      dk_j = scale * sum_i dz_ij q_i      dq_i = scale * sum_j dz_ij k_j
//! ```
//!
//! Tiled with a running maximum (Dao et al., FlashAttention, arXiv 2205.14135); lse is what the backward pass needs.
//! ALiBi: Press, Smith and Lewis, arXiv 2108.12409. A rotary embedding is applied to q and k before.

pub mod cpu;
pub mod cuda;
pub mod decode;
pub mod decode_cuda;
pub mod reference;

use std::ops::Range;

use super::{AttentionInputs, AttentionLayout};
use crate::{KernelError, Result};

/// What to compute: sizes, scale, position bias.
#[derive(Debug, Clone, PartialEq)]
pub struct SoftmaxSpec {
    /// Sizes and strides.
    pub layout: AttentionLayout,
    /// Factor of q . k; 1 / sqrt(head_dim) by default.
    pub scale: f64,
    /// One slope per query head, see [`alibi_slopes`]; None: no position bias.
    pub alibi: Option<Vec<f64>>,
}

impl SoftmaxSpec {
    /// Scale 1 / sqrt(head_dim), no position bias.
    pub fn new(layout: AttentionLayout) -> Self {
        Self { layout, scale: 1.0 / (layout.head_dim.max(1) as f64).sqrt(), alibi: None }
    }

    fn validate<T>(&self, op: &'static str, inputs: &AttentionInputs<'_, T>) -> Result<Vec<Range<usize>>> {
        check_scores(op, self.scale, self.alibi.as_deref(), self.layout.query_heads)?;
        self.layout.check_inputs(op, inputs)
    }

    fn slope(&self, head: usize) -> f64 {
        self.alibi.as_ref().map_or(0.0, |slopes| slopes[head])
    }
}

fn check_scores(op: &'static str, scale: f64, alibi: Option<&[f64]>, heads: usize) -> Result<()> {
    if !scale.is_finite() {
        return Err(KernelError::size(op, "scale", "finite", scale));
    }
    let Some(slopes) = alibi else { return Ok(()) };
    crate::error::check_len(op, "alibi", slopes, heads)?;
    match slopes.iter().find(|slope| !slope.is_finite()) {
        Some(slope) => Err(KernelError::size(op, "an ALiBi slope", "finite", slope)),
        None => Ok(()),
    }
}

/// The slopes of ALiBi: 2^(-8 (h + 1) / heads) for a power of two; otherwise those of the largest power of two p below,
/// followed by 2^(-4 (2n + 1) / p), n = 0, 1, ...
pub fn alibi_slopes(heads: usize) -> Vec<f64> {
    let power = if heads == 0 { 1 } else { 1usize << heads.ilog2() };
    let of_power = (0..power.min(heads)).map(|head| (-8.0 * (head + 1) as f64 / power as f64).exp2());
    let between = (0..heads.saturating_sub(power)).map(|n| (-4.0 * (2 * n + 1) as f64 / power as f64).exp2());
    of_power.chain(between).collect()
}

#[cfg(test)]
mod tests {
    use super::alibi_slopes;

    #[test]
    fn slopes_are_those_of_the_paper() {
        assert_eq!(alibi_slopes(8)[..3], [0.5, 0.25, 0.125]);
        assert_eq!(alibi_slopes(2), [1.0 / 16.0, 1.0 / 256.0]);
        assert_eq!(alibi_slopes(3), [1.0 / 16.0, 1.0 / 256.0, 0.25]);
        assert_eq!(alibi_slopes(12)[8..10], [(-0.5f64).exp2(), (-1.5f64).exp2()]);
        assert_eq!(alibi_slopes(1), [1.0 / 256.0]);
        assert!(alibi_slopes(0).is_empty());
    }
}
