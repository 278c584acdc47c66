//! First values of the parameters.
//!
//! Every tensor is drawn from a stream of its own (seed and name), so that its values do not depend on which other
//! parameters a model has: stick-breaking and its baselines start from the same projections.

use crate::config::{InitScheme, ModelConfig};
use crate::error::Result;
use crate::transformer::Transformer;
use rayon::prelude::*;
use stickbreak_autograd::ParameterId;
use stickbreak_tensor::{DType, Tensor};

/// Standard deviation of a weight's initial values; `None` for a constant start (norm weights 1, biases 0).
pub fn standard_deviation(config: &ModelConfig, name: &str) -> Option<f64> {
    let is_norm = name.contains("norm");
    let is_bias = name.ends_with("bias");
    if is_norm || is_bias {
        return None;
    }
    let is_table = name == "model.embed_tokens.weight" || name == "lm_head.weight";
    let width = if is_table { 1.0 } else { config.width_ratio().sqrt() };
    let writes_residual = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
    let depth = if writes_residual { (2.0 * config.num_layers as f64).sqrt() } else { 1.0 };
    Some(config.init_std / (width * depth))
}

/// Factor of the learning rate: under muP, Adam's step for hidden matrices shrinks with the width.
pub fn learning_rate_factor(config: &ModelConfig, name: &str) -> f64 {
    let hidden_matrix = name.ends_with("_proj.weight");
    if config.init == InitScheme::Mup && hidden_matrix { 1.0 / config.width_ratio() } else { 1.0 }
}

impl Transformer {
    /// Gives all parameters their first values: a function of the config, the names and `seed`.
    ///
    /// # Errors
    /// If the arena's dtype is none that the device computes in.
    pub fn initialise(&self, seed: u64) -> Result<()> {
        let arena = self.arena();
        let dtype = arena.master().dtype();
        let entries = arena.entries();
        // Every parameter has a stream of its own, so they can be drawn in parallel.
        entries.par_iter().enumerate().try_for_each(|(index, entry)| -> Result<()> {
            let first = match standard_deviation(self.config(), &entry.name) {
                // Drawn in float64 and rounded once: the same values, whatever the model's dtype and device.
                Some(std) => {
                    Tensor::randn(0.0, std, &entry.shape, DType::F64, stream(seed, &entry.name))?.to_dtype(dtype)?
                }
                None => Tensor::full(if entry.name.ends_with("bias") { 0.0 } else { 1.0 }, &entry.shape, dtype),
            };
            Ok(arena.master_of(ParameterId(index))?.transfer_assign(&first)?)
        })?;
        Ok(arena.publish()?)
    }
}

/// A seed for one name (FNV-1a over the seed's and the name's bytes).
fn stream(seed: u64, name: &str) -> u64 {
    seed.to_le_bytes()
        .iter()
        .chain(name.as_bytes())
        .fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}
