//! AdamW over the model's flat arena.

use crate::config::OptimizerConfig;
use anyhow::Result;
use std::ops::Range;
use stickbreak_model::{Transformer, init};
use stickbreak_tensor::Tensor;
use stickbreak_tensor::ops::nn::{self, AdamW};

/// A range of the arena whose parameters share weight decay and learning-rate factor.
#[derive(Debug, Clone, PartialEq)]
struct Segment {
    range: Range<usize>,
    decays: bool,
    learning_rate_factor: f64,
}

/// AdamW's state: both moments, parallel to the arena.
#[derive(Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    first_moment: Tensor,
    second_moment: Tensor,
    segments: Vec<Segment>,
}

impl Optimizer {
    /// A fresh state for a model.
    pub fn new(config: OptimizerConfig, model: &Transformer) -> Self {
        let arena = model.arena();
        let mut segments: Vec<Segment> = Vec::new();
        for entry in arena.entries() {
            let decays = entry.shape.rank() >= 2;
            let learning_rate_factor = init::learning_rate_factor(model.config(), &entry.name);
            match segments.last_mut() {
                // Neighbours that are treated alike are one range, the zero gap between them included.
                Some(s) if s.decays == decays && s.learning_rate_factor == learning_rate_factor => {
                    s.range.end = entry.range.end;
                }
                _ => segments.push(Segment { range: entry.range.clone(), decays, learning_rate_factor }),
            }
        }
        let zeros = || Tensor::zeros(arena.values().shape(), arena.values().dtype());
        Self { config, first_moment: zeros(), second_moment: zeros(), segments }
    }

    /// The moments, for a checkpoint.
    pub fn moments(&self) -> (&Tensor, &Tensor) {
        (&self.first_moment, &self.second_moment)
    }

    /// The factor that brings a gradient of this global norm down to the clip norm.
    pub fn clip_factor(&self, gradient_norm: f64) -> f64 {
        if self.config.clip_norm == 0.0 { 1.0 } else { (self.config.clip_norm / (gradient_norm + 1e-6)).min(1.0) }
    }

    /// Update number `step` (1-based) with the gradients in the arena times `gradient_scale`.
    ///
    /// # Errors
    /// Only if model and state do not belong together.
    pub fn step(&self, model: &Transformer, step: u64, learning_rate: f64, gradient_scale: f64) -> Result<()> {
        let (values, gradients) = (model.arena().values(), model.arena().gradients());
        for Segment { range, decays, learning_rate_factor } in &self.segments {
            let spec = AdamW {
                learning_rate: learning_rate * learning_rate_factor,
                beta1: self.config.beta1,
                beta2: self.config.beta2,
                epsilon: self.config.epsilon,
                weight_decay: if *decays { self.config.weight_decay } else { 0.0 },
                step,
                grad_scale: gradient_scale,
            };
            let part = |tensor: &Tensor| tensor.narrow(0, range.start, range.len());
            nn::adamw_step(
                &spec,
                &part(values)?,
                &part(gradients)?,
                &part(&self.first_moment)?,
                &part(&self.second_moment)?,
            )?;
        }
        Ok(())
    }
}
