//! Updated weights on their way from the ranks that own them, while the next forward pass begins.

use super::Ticket;
use crate::device::Waits;
use anyhow::{Error, Result};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use stickbreak_autograd::{BeforeUse, ParameterId};
use stickbreak_tensor::Device;

/// The buckets of weights that are under way. Whoever reads weights waits for their buckets first.
#[derive(Debug)]
pub struct ArrivingWeights {
    /// By parameter: the buckets that it lies in.
    buckets: Vec<Range<usize>>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// By bucket.
    tickets: Vec<Option<Ticket>>,
    /// A hook has no result; [`ArrivingWeights::check`] has.
    failure: Option<Error>,
    waits: Waits,
}

impl ArrivingWeights {
    /// None under way; `buckets`: for each parameter those that it lies in.
    pub fn new(buckets: Vec<Range<usize>>, device: Device) -> Arc<Self> {
        let count = buckets.iter().map(|range| range.end).max().unwrap_or(0);
        let tickets = (0..count).map(|_| None).collect();
        let state = State { tickets, failure: None, waits: Waits::new(device) };
        Arc::new(Self { buckets, state: Mutex::new(state) })
    }

    /// Takes note that a bucket is under way.
    pub fn sent(&self, bucket: usize, ticket: Ticket) {
        let mut state = self.state();
        // Padding after the last parameter may fill a bucket that nobody reads; it is waited for all the same.
        if state.tickets.len() <= bucket {
            state.tickets.resize_with(bucket + 1, || None);
        }
        state.tickets[bucket] = Some(ticket);
    }

    /// The hook that lets a forward pass wait for each parameter just before it is used.
    pub fn before_use(self: &Arc<Self>) -> BeforeUse {
        let weights = Arc::clone(self);
        BeforeUse::new(move |ParameterId(parameter)| {
            let buckets = weights.buckets.get(parameter).cloned().unwrap_or_default();
            weights.state().join(buckets);
        })
    }

    /// Waits for everything under way: before weights are read in other ways than by a training step.
    ///
    /// # Errors
    /// If a collective failed.
    pub fn settle(&self) -> Result<()> {
        let mut state = self.state();
        let all = 0..state.tickets.len();
        state.join(all);
        state.failure.take().map_or(Ok(()), Err)
    }

    /// What went wrong in the hook.
    ///
    /// # Errors
    /// Just that.
    pub fn check(&self) -> Result<()> {
        self.state().failure.take().map_or(Ok(()), Err)
    }

    /// The waits of the device since the last call.
    pub fn take_waits(&self) -> Waits {
        let mut state = self.state();
        let fresh = state.waits.fresh();
        std::mem::replace(&mut state.waits, fresh)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn join(&mut self, buckets: Range<usize>) {
        for bucket in buckets {
            if let Some(ticket) = self.tickets.get_mut(bucket).and_then(Option::take)
                && let Err(error) = self.waits.measure(|| Ok(ticket.join()?))
            {
                self.failure.get_or_insert(error);
            }
        }
    }
}
