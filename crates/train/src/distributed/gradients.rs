//! Gradients of all ranks, added up while the backward pass goes on.

use super::shards::ShardLayout;
use super::{Communicator, Ticket};
use crate::device::Waits;
use anyhow::{Error, Result};
use std::ops::Range;
use std::sync::Arc;
use stickbreak_autograd::{ParameterArena, ParameterId};
use stickbreak_tensor::{DType, Tensor};

/// Sends the buckets of the gradient arena off, each as soon as the gradients in it are complete; every rank is left with
/// the sums of its own part of each.
///
/// Backward passes complete parameters roughly from the last registered to the first, so buckets go in that order; always
/// in that order, whatever is complete first, because ranks must agree on it.
pub struct GradientReducer {
    communicator: Arc<dyn Communicator>,
    layout: ShardLayout,
    gradients: Tensor,
    /// What gradients are rounded to on their way, if they are.
    wire: Option<DType>,
    /// By parameter: the buckets that it lies in.
    buckets: Vec<Range<usize>>,
    /// By bucket: parameters in it whose gradients are not complete.
    incomplete: Vec<usize>,
    /// Buckets from this one on are under way.
    remaining: usize,
    started: Vec<Started>,
    failure: Option<Error>,
}

/// A bucket under way.
struct Started {
    bucket: usize,
    ticket: Ticket,
    /// This rank's part of what is on the wire, if that is not the arena's own memory.
    rounded: Option<Tensor>,
}

impl GradientReducer {
    /// For one backward pass, the last one of a step. `wire`: the type that gradients are sent in.
    pub fn new(
        communicator: Arc<dyn Communicator>,
        layout: &ShardLayout,
        arena: &ParameterArena,
        wire: Option<DType>,
    ) -> Self {
        let buckets: Vec<_> = arena.entries().iter().map(|entry| layout.buckets_of(&entry.range)).collect();
        let mut incomplete = vec![0; layout.buckets()];
        buckets.iter().cloned().flatten().for_each(|bucket| incomplete[bucket] += 1);
        Self {
            communicator,
            layout: layout.clone(),
            gradients: arena.gradients().clone(),
            // One rank sends nothing, so nothing is rounded.
            wire: wire.filter(|&wire| layout.ranks() > 1 && wire != arena.gradients().dtype()),
            buckets,
            incomplete,
            remaining: layout.buckets(),
            started: Vec::new(),
            failure: None,
        }
    }

    /// Takes note that a parameter's gradient is complete: what [`stickbreak_autograd::Tape::backward_with`] calls. An
    /// error comes out of [`finish`](Self::finish).
    pub fn ready(&mut self, parameter: ParameterId) {
        for bucket in self.buckets[parameter.0].clone() {
            self.incomplete[bucket] -= 1;
        }
        while self.failure.is_none() && self.remaining > 0 && self.incomplete[self.remaining - 1] == 0 {
            self.start_next();
        }
    }

    fn start_next(&mut self) {
        self.remaining -= 1;
        match self.start(self.remaining) {
            Ok(started) => self.started.push(started),
            Err(error) => self.failure = Some(error),
        }
    }

    fn start(&self, bucket: usize) -> Result<Started> {
        let range = self.layout.bucket(bucket);
        let part = self.layout.piece(bucket).arena;
        let whole = self.gradients.narrow(0, range.start, range.len())?;
        let what = format!("gradients of bucket {bucket}");
        let (whole, rounded) = match self.wire {
            Some(dtype) => (whole.to_dtype(dtype)?, true),
            None => (whole, false),
        };
        let own = whole.narrow(0, part.start - range.start, part.len())?;
        let ticket = self.communicator.reduce_scatter(&what, &whole, &own)?;
        Ok(Started { bucket, ticket, rounded: rounded.then_some(own) })
    }

    /// Sends off what is left, and calls `each` with every bucket once this rank's part of it is there, in the order in
    /// which they were sent: what `each` asks of the device runs while later buckets are under way.
    ///
    /// # Errors
    /// If a collective or `each` failed.
    pub fn finish(mut self, waits: &mut Waits, mut each: impl FnMut(usize) -> Result<()>) -> Result<()> {
        while self.failure.is_none() && self.remaining > 0 {
            self.start_next();
        }
        if let Some(error) = self.failure {
            return Err(error);
        }
        for Started { bucket, ticket, rounded } in self.started {
            waits.measure(|| Ok(ticket.join()?))?;
            if let Some(rounded) = rounded {
                let part = self.layout.piece(bucket).arena;
                let own = self.gradients.narrow(0, part.start, part.len())?;
                own.copy_assign(&rounded.to_dtype(own.dtype())?)?;
            }
            each(bucket)?;
        }
        Ok(())
    }
}
