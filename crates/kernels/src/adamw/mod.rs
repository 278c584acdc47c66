//! AdamW with decoupled weight decay, over a contiguous range of a flat parameter arena.
//!
//! With `g = grad_scale * grad` (the clip factor, and the mean over tokens if gradients are sums):
//!
//! ```text
//! p = p (1 - learning_rate * weight_decay)
//! m = beta1 m + (1 - beta1) g
//! v = beta2 v + (1 - beta2) g^2
//! p = p - learning_rate / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + epsilon)
//! ```

pub mod cpu;
pub mod cuda;

/// Hyperparameters of one update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay; multiplied by the learning rate.
    pub weight_decay: f64,
    /// Number of this update, from 1.
    pub step: u64,
    /// Factor on the gradients.
    pub grad_scale: f64,
}
