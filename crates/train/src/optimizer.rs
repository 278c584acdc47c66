//! AdamW over this rank's shard of the model's flat arena (ZeRO-1): one rank's shard is all of it.
//!
//! Gradients are summed over the ranks bucket by bucket ([`reducer`](Optimizer::reducer)), each rank updates its part of
//! every bucket, and the parts are gathered again ([`crate::distributed`]). Master values and moments exist for the shard
//! alone.

use crate::config::{DistributedConfig, OptimizerConfig};
use crate::distributed::gradients::GradientReducer;
use crate::distributed::shards::{ShardLayout, intersection};
use crate::distributed::single::Single;
use crate::distributed::weights::ArrivingWeights;
use crate::distributed::{Communicator, Ticket};
use anyhow::Result;
use std::ops::Range;
use std::sync::Arc;
use stickbreak_model::{Transformer, init};
use stickbreak_tensor::ops::nn::{self, AdamW, StepGuard};
use stickbreak_tensor::{DType, Tensor};

/// A range of this rank's part of a bucket whose parameters share weight decay and learning-rate factor.
#[derive(Debug, Clone, PartialEq)]
struct Segment {
    /// Elements of the arena.
    arena: Range<usize>,
    /// The first of them in the shard.
    shard: usize,
    treatment: Treatment,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Treatment {
    decays: bool,
    learning_rate_factor: f64,
}

/// AdamW's state for a shard, and the ranks that it shares the work with.
#[derive(Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    communicator: Arc<dyn Communicator>,
    layout: ShardLayout,
    /// What gradients are rounded to on their way, if they are.
    wire: Option<DType>,
    /// By bucket.
    segments: Vec<Vec<Segment>>,
    /// The shard's master values where the arena keeps none.
    master: Option<Tensor>,
    first_moment: Tensor,
    second_moment: Tensor,
    weights: Arc<ArrivingWeights>,
}

impl Optimizer {
    /// A fresh state for a model that one rank trains, on its device.
    ///
    /// # Errors
    /// If the device has not the memory.
    pub fn new(config: OptimizerConfig, model: &Transformer) -> Result<Self> {
        Self::with_ranks(config, &DistributedConfig::default(), model, Arc::new(Single))
    }

    /// A fresh state of this rank's shard. The model's arena was made as [`ShardLayout::arena`] says.
    ///
    /// # Errors
    /// If the device has not the memory, or another rank is lost.
    pub fn with_ranks(
        config: OptimizerConfig,
        distributed: &DistributedConfig,
        model: &Transformer,
        communicator: Arc<dyn Communicator>,
    ) -> Result<Self> {
        let arena = model.arena();
        let (rank, ranks) = (communicator.rank(), communicator.ranks());
        let length = arena.values().elements();
        let layout = ShardLayout::new(length, rank, ranks, distributed.bucket_bytes(length));
        if distributed.windows.of_weights() {
            communicator.share("weights", arena.values())?;
        }
        if distributed.windows.of_gradients() {
            communicator.share("gradients", arena.gradients())?;
        }
        let treated = treated_alike(model);
        let segments = (0..layout.buckets()).map(|bucket| segments(&layout, bucket, &treated)).collect();
        let zeros = || Tensor::zeros_on([layout.shard_length()], arena.master().dtype(), model.device());
        let buckets = arena.entries().iter().map(|entry| layout.buckets_of(&entry.range)).collect();
        Ok(Self {
            config,
            wire: distributed.gradient_dtype.on_the_wire(),
            segments,
            master: (!arena.keeps_master()).then(zeros).transpose()?,
            first_moment: zeros()?,
            second_moment: zeros()?,
            weights: ArrivingWeights::new(buckets, model.device()),
            layout,
            communicator,
        })
    }

    /// The moments of this rank's shard, for a checkpoint.
    pub fn moments(&self) -> (&Tensor, &Tensor) {
        (&self.first_moment, &self.second_moment)
    }

    /// The master values of this rank's shard, where the arena keeps none.
    pub fn master(&self) -> Option<&Tensor> {
        self.master.as_ref()
    }

    /// How the arena is cut.
    pub fn layout(&self) -> &ShardLayout {
        &self.layout
    }

    /// The ranks.
    pub fn communicator(&self) -> &Arc<dyn Communicator> {
        &self.communicator
    }

    /// Weights on their way from other ranks.
    pub fn weights(&self) -> &Arc<ArrivingWeights> {
        &self.weights
    }

    /// Takes this rank's part of the master values out of an arena that keeps none, once they were written there.
    ///
    /// # Errors
    /// If the device fails.
    pub fn take_master(&self, model: &Transformer) -> Result<()> {
        let Some(shard) = &self.master else { return Ok(()) };
        for bucket in 0..self.layout.buckets() {
            let piece = self.layout.piece(bucket);
            let to = shard.narrow(0, piece.shard.start, piece.shard.len())?;
            to.copy_assign(&model.arena().master().narrow(0, piece.arena.start, piece.arena.len())?)?;
        }
        Ok(())
    }

    /// What sums the gradients of the backward pass to come over the ranks.
    pub fn reducer(&self, model: &Transformer) -> GradientReducer {
        let communicator = Arc::clone(&self.communicator);
        GradientReducer::new(communicator, &self.layout, model.arena(), self.wire, model.output_projections())
    }

    /// The gradients that this rank sums up and uses: its part of a bucket.
    ///
    /// # Errors
    /// If model and state do not belong together.
    pub fn gradients(&self, model: &Transformer, bucket: usize) -> Result<Tensor> {
        let range = self.layout.piece(bucket).arena;
        Ok(model.arena().gradients().narrow(0, range.start, range.len())?)
    }

    /// The factor that brings a gradient of this global norm down to the clip norm.
    pub fn clip_factor(&self, gradient_norm: f64) -> f64 {
        if self.config.clip_norm == 0.0 { 1.0 } else { (self.config.clip_norm / (gradient_norm + 1e-6)).min(1.0) }
    }

    /// Update number `step` (1-based) with the gradients in the arena times `gradient_scale`. Every rank calls it.
    ///
    /// # Errors
    /// If model and state do not belong together, or another rank is lost.
    pub fn step(&self, model: &Transformer, step: u64, learning_rate: f64, gradient_scale: f64) -> Result<()> {
        self.each_bucket(model, |segment| {
            let spec = self.spec(segment, step, learning_rate, gradient_scale);
            let [values, gradients, first, second] = self.parts(segment, model)?;
            nn::adamw_step(&spec, &values, &gradients, &first, &second)?;
            if self.rounds(model) {
                segment.of(model.arena().values())?.copy_assign(&values.to_dtype(model.arena().values().dtype())?)?;
            }
            Ok(())
        })
    }

    /// [`step`](Self::step) on a GPU without a wait: the clip factor is computed there from the gradients' sum of
    /// squares, and nothing is written if that or the loss (both float32 scalars on the device) is not finite. The
    /// weights that the ops read are rounded from the master's in the same pass.
    ///
    /// # Errors
    /// As [`step`](Self::step), or if the device fails.
    pub fn step_guarded(
        &self,
        model: &Transformer,
        step: u64,
        learning_rate: f64,
        sum_of_squares: &Tensor,
        loss: &Tensor,
    ) -> Result<()> {
        let guard = StepGuard { sum_of_squares, loss, clip_norm: self.config.clip_norm };
        self.each_bucket(model, |segment| {
            let spec = self.spec(segment, step, learning_rate, 1.0);
            let [master, gradients, first, second] = self.parts(segment, model)?;
            let copy = self.rounds(model).then(|| segment.of(model.arena().values())).transpose()?;
            nn::adamw_step_guarded(&spec, &master, &gradients, &first, &second, copy.as_ref(), &guard)?;
            Ok(())
        })
    }

    /// Updates bucket after bucket, from the one that a forward pass reads first, and sends each to the other ranks while
    /// the next is updated.
    fn each_bucket(&self, model: &Transformer, update: impl Fn(&Segment) -> Result<()>) -> Result<()> {
        for (bucket, segments) in self.segments.iter().enumerate() {
            segments.iter().try_for_each(&update)?;
            self.weights.sent(bucket, self.gather(model, bucket)?);
        }
        Ok(())
    }

    fn gather(&self, model: &Transformer, bucket: usize) -> Result<Ticket> {
        let values = model.arena().values();
        let (whole, part) = (self.layout.bucket(bucket), self.layout.piece(bucket).arena);
        let (whole, part) = (values.narrow(0, whole.start, whole.len())?, values.narrow(0, part.start, part.len())?);
        Ok(self.communicator.all_gather(&format!("weights of bucket {bucket}"), &part, &whole)?)
    }

    /// Whether the values that ops read are rounded from master values.
    fn rounds(&self, model: &Transformer) -> bool {
        model.arena().values().dtype() != self.first_moment.dtype()
    }

    fn spec(&self, segment: &Segment, step: u64, learning_rate: f64, grad_scale: f64) -> AdamW {
        let Treatment { decays, learning_rate_factor } = segment.treatment;
        AdamW {
            learning_rate: learning_rate * learning_rate_factor,
            beta1: self.config.beta1,
            beta2: self.config.beta2,
            epsilon: self.config.epsilon,
            weight_decay: if decays { self.config.weight_decay } else { 0.0 },
            step,
            grad_scale,
        }
    }

    /// A segment's master values, gradients and both moments.
    fn parts(&self, segment: &Segment, model: &Transformer) -> Result<[Tensor; 4]> {
        let in_shard = |tensor: &Tensor| tensor.narrow(0, segment.shard, segment.arena.len());
        let master = match &self.master {
            Some(shard) => in_shard(shard)?,
            None => segment.of(model.arena().master())?,
        };
        let gradients = segment.of(model.arena().gradients())?;
        Ok([master, gradients, in_shard(&self.first_moment)?, in_shard(&self.second_moment)?])
    }
}

impl Segment {
    /// These elements of a tensor that is parallel to the arena.
    fn of(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(tensor.narrow(0, self.arena.start, self.arena.len())?)
    }
}

/// Ranges of the arena that are treated alike, in order.
fn treated_alike(model: &Transformer) -> Vec<(Range<usize>, Treatment)> {
    let mut ranges: Vec<(Range<usize>, Treatment)> = Vec::new();
    for entry in model.arena().entries() {
        let learning_rate_factor = init::learning_rate_factor(model.config(), &entry.name);
        let treatment = Treatment { decays: entry.shape.rank() >= 2, learning_rate_factor };
        match ranges.last_mut() {
            // Neighbours that are treated alike are one range, the zero gap between them included.
            Some((range, last)) if *last == treatment => range.end = entry.range.end,
            _ => ranges.push((entry.range.clone(), treatment)),
        }
    }
    ranges
}

/// What of those lies in this rank's part of a bucket.
fn segments(layout: &ShardLayout, bucket: usize, treated: &[(Range<usize>, Treatment)]) -> Vec<Segment> {
    let piece = layout.piece(bucket);
    let segment = |(range, treatment): &(Range<usize>, Treatment)| {
        let arena = intersection(range, &piece.arena);
        let shard = piece.shard.start + (arena.start - piece.arena.start);
        (!arena.is_empty()).then_some(Segment { arena, shard, treatment: *treatment })
    };
    treated.iter().filter_map(segment).collect()
}
