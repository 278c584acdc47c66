//! Linear layer and cross-entropy in one: `loss[t] = -ln softmax(logits[t])[labels[t]]`, `logits = logit_scale * hidden W^T`.
//!
//! `hidden` `[tokens, width]`, `weight` `[vocabulary, width]`, `labels` and `loss` `[tokens]`; the loss is in nats, and 0
//! where the label is [`IGNORE_INDEX`]. Logits exist for `chunk` tokens at a time only: memory is `chunk * vocabulary`
//! instead of `tokens * vocabulary`, and the gradients come out of the same pass, so nothing is saved.
//!
//! Gradients (overwritten) are those of the *sum* over tokens of `loss[t]`. With `p = softmax(logits)`:
//! `dlogits[t] = p[t] - onehot(labels[t])` (0 where ignored), `dhidden = logit_scale * dlogits W`,
//! `dweight = logit_scale * dlogits^T hidden`.

pub mod cpu;
pub mod cuda;

/// The label of a token that takes no part in the loss.
pub const IGNORE_INDEX: i32 = -100;

/// Sizes and options of the fused linear layer and cross-entropy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinearCrossEntropySpec {
    /// Number of tokens.
    pub tokens: usize,
    /// Elements of one hidden vector.
    pub width: usize,
    /// Number of classes.
    pub vocabulary: usize,
    /// Factor on the logits.
    pub logit_scale: f64,
    /// Tokens whose logits exist at the same time, at least 1. Results depend on it only by rounding.
    pub chunk: usize,
}
