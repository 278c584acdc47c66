//! AdamW over the model's flat arena.

use crate::config::OptimizerConfig;
use anyhow::Result;
use std::ops::Range;
use stickbreak_model::{Transformer, init};
use stickbreak_tensor::Tensor;
use stickbreak_tensor::ops::nn::{self, AdamW, StepGuard};

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
    /// A fresh state for a model, on its device.
    ///
    /// # Errors
    /// If the device has not the memory.
    pub fn new(config: OptimizerConfig, model: &Transformer) -> Result<Self> {
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
        let zeros = || Tensor::zeros_on(arena.master().shape(), arena.master().dtype(), model.device());
        Ok(Self { config, first_moment: zeros()?, second_moment: zeros()?, segments })
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
        for segment in &self.segments {
            let spec = self.spec(segment, step, learning_rate, gradient_scale);
            let [values, gradients, first, second] = self.parts(segment, model)?;
            nn::adamw_step(&spec, &values, &gradients, &first, &second)?;
        }
        Ok(model.arena().publish()?)
    }

    /// [`step`](Self::step) on a GPU without a wait: the clip factor is computed there from the gradients' sum of
    /// squares, and nothing is written if that or the loss (both float32 scalars on the device) is not finite. The
    /// weights that the ops read are rounded from the master's in the same pass.
    ///
    /// # Errors
    /// If model and state do not belong together, or the device fails.
    pub fn step_guarded(
        &self,
        model: &Transformer,
        step: u64,
        learning_rate: f64,
        sum_of_squares: &Tensor,
        loss: &Tensor,
    ) -> Result<()> {
        let guard = StepGuard { sum_of_squares, loss, clip_norm: self.config.clip_norm };
        let arena = model.arena();
        let rounds = arena.values().dtype() != arena.master().dtype();
        for segment in &self.segments {
            let spec = self.spec(segment, step, learning_rate, 1.0);
            let [master, gradients, first, second] = self.parts(segment, model)?;
            let copy = rounds.then(|| segment.part(arena.values())).transpose()?;
            nn::adamw_step_guarded(&spec, &master, &gradients, &first, &second, copy.as_ref(), &guard)?;
        }
        Ok(())
    }

    fn spec(&self, segment: &Segment, step: u64, learning_rate: f64, grad_scale: f64) -> AdamW {
        AdamW {
            learning_rate: learning_rate * segment.learning_rate_factor,
            beta1: self.config.beta1,
            beta2: self.config.beta2,
            epsilon: self.config.epsilon,
            weight_decay: if segment.decays { self.config.weight_decay } else { 0.0 },
            step,
            grad_scale,
        }
    }

    /// A segment's master values, gradients and both moments.
    fn parts(&self, segment: &Segment, model: &Transformer) -> Result<[Tensor; 4]> {
        let (master, gradients) = (model.arena().master(), model.arena().gradients());
        let part = |tensor| segment.part(tensor);
        Ok([part(master)?, part(gradients)?, part(&self.first_moment)?, part(&self.second_moment)?])
    }
}

impl Segment {
    fn part(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(tensor.narrow(0, self.range.start, self.range.len())?)
    }
}
