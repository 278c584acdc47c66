//! Gradients of all ranks, added up while the backward pass goes on.

use super::shards::ShardLayout;
use super::{Communicator, Ticket};
use crate::device::Waits;
use anyhow::{Error, Result};
use std::ops::Range;
use std::sync::Arc;
use stickbreak_autograd::{ParameterArena, ParameterId};
use stickbreak_tensor::{DType, Tensor};

/// Sends the buckets of the gradient arena off once the gradients in them are complete; every rank is left with the sums of
/// its own part of each.
///
/// Backward passes complete parameters roughly from the last registered to the first, so buckets go in that order; always
/// in that order, whatever is complete first, because ranks must agree on it.
///
/// A collective takes multiprocessors from what is computed beside it. A matrix product whose blocks just fill the device
/// takes twice as long then, attention a sixth longer: so a bucket waits for the next backward pass of attention, less than a
/// layer away, and leaves as that begins.
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
    /// By parameter: whether buckets leave when its gradient is complete.
    departures: Vec<bool>,
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
    /// For one backward pass, the last one of a step. `wire`: the type that gradients are sent in. `departures`: the
    /// parameters behind whose gradients attention's backward pass begins.
    pub fn new(
        communicator: Arc<dyn Communicator>,
        layout: &ShardLayout,
        arena: &ParameterArena,
        wire: Option<DType>,
        departures: impl IntoIterator<Item = ParameterId>,
    ) -> Self {
        let buckets: Vec<_> = arena.entries().iter().map(|entry| layout.buckets_of(&entry.range)).collect();
        let mut incomplete = vec![0; layout.buckets()];
        buckets.iter().cloned().flatten().for_each(|bucket| incomplete[bucket] += 1);
        let mut leave = vec![false; buckets.len()];
        departures.into_iter().for_each(|parameter| leave[parameter.0] = true);
        Self {
            communicator,
            layout: layout.clone(),
            gradients: arena.gradients().clone(),
            // One rank sends nothing, so nothing is rounded.
            wire: wire.filter(|&wire| layout.ranks() > 1 && wire != arena.gradients().dtype()),
            buckets,
            incomplete,
            departures: leave,
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
        if !self.departures[parameter.0] {
            return;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DistributedConfig, OptimizerConfig};
    use crate::distributed::{Reduction, Result};
    use crate::evaluate::BatchTensors;
    use crate::optimizer::Optimizer;
    use crate::step::{StepSettings, no_notes, take_step};
    use std::sync::Mutex;
    use stickbreak_autograd::ArenaBuilder;
    use stickbreak_model::{Packing, Transformer};
    use stickbreak_tensor::Device;

    /// The first of two ranks, whose other one has nothing but zeros: keeps a list of what is called.
    #[derive(Debug, Default)]
    struct Recorder(Mutex<Vec<String>>);

    impl Recorder {
        fn note(&self, collective: &str, what: &str) -> Result<Ticket> {
            self.0.lock().unwrap().push(format!("{collective} {what}"));
            Ok(Ticket::done())
        }

        fn take(&self) -> Vec<String> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    impl Communicator for Recorder {
        fn rank(&self) -> usize {
            0
        }
        fn ranks(&self) -> usize {
            2
        }
        fn all_reduce(&self, what: &str, _: &Tensor, _: Reduction) -> Result<Ticket> {
            self.note("all_reduce", what)
        }
        fn reduce_scatter(&self, what: &str, _: &Tensor, _: &Tensor) -> Result<Ticket> {
            self.note("sum", what)
        }
        fn all_gather(&self, what: &str, _: &Tensor, _: &Tensor) -> Result<Ticket> {
            self.note("gather", what)
        }
        fn broadcast(&self, what: &str, _: &Tensor, _: usize) -> Result<Ticket> {
            self.note("broadcast", what)
        }
        fn gather_values(&self, what: &str, values: &[f64]) -> Result<Vec<Vec<f64>>> {
            self.note("values", what).map(|_| vec![values.to_vec(), vec![0.0; values.len()]])
        }
        fn abort(&self, reason: &str) {
            panic!("{reason}");
        }
    }

    #[test]
    fn a_bucket_leaves_with_attention_once_all_in_it_is_complete_and_the_ones_behind_it_have_left() {
        let mut builder = ArenaBuilder::default();
        // Buckets of 128 elements: a | a b | b c, d | padding.
        let [a, b, c, d] = [("a", 200), ("b", 100), ("c", 20), ("d", 10)].map(|(name, n)| builder.add(name, [n]));
        let arena = builder.build_with(DType::F32, Device::Cpu, ShardLayout::arena(2)).unwrap();
        let layout = ShardLayout::new(arena.values().elements(), 0, 2, 512);
        assert_eq!((arena.values().elements(), layout.buckets()), (512, 4));
        let recorder = Arc::new(Recorder::default());
        let mut reducer = GradientReducer::new(recorder.clone(), &layout, &arena, None, [b, c]);
        let bucket = |index: usize| format!("sum gradients of bucket {index}");
        reducer.ready(b);
        assert!(recorder.take().is_empty(), "c, d and half of a are not complete");
        reducer.ready(d);
        assert!(recorder.take().is_empty(), "the padding's bucket is complete, but attention is not next");
        reducer.ready(c);
        assert_eq!(recorder.take(), [bucket(3), bucket(2)]);
        reducer.ready(a);
        assert!(recorder.take().is_empty(), "all is complete, and what is left leaves at the end");
        let mut order = Vec::new();
        let each = |bucket| {
            order.push(bucket);
            Ok(())
        };
        reducer.finish(&mut Waits::new(Device::Cpu), each).unwrap();
        assert_eq!((order, recorder.take()), (vec![3, 2, 1, 0], vec![bucket(1), bucket(0)]));
    }

    #[test]
    fn a_step_communicates_once_however_many_micro_batches_it_has() {
        let config =
            r#"{"vocab_size": 31, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 2}"#;
        let config = serde_json::from_str(config).unwrap();
        let model = Transformer::new_with(config, DType::F32, Device::Cpu, ShardLayout::arena(2)).unwrap();
        model.initialise(1).unwrap();
        let recorder = Arc::new(Recorder::default());
        let distributed = DistributedConfig { bucket_bytes: Some(16384), ..DistributedConfig::default() };
        let optimizer = OptimizerConfig::default();
        let optimizer = Optimizer::with_ranks(optimizer, &distributed, &model, recorder.clone()).unwrap();
        let tensors = BatchTensors {
            ids: Tensor::from_vec(vec![1u32, 2, 3, 4], [4]).unwrap(),
            labels: Tensor::from_vec(vec![2i32, 3, 4, 5], [4]).unwrap(),
            packing: Packing::new(&[0, 4]).unwrap(),
        };
        let settings = StepSettings { number: 1, learning_rate: 1e-3, loss_scale: 0.125, recompute: false };
        let batches = || (0..2).map(|_| Ok(tensors.clone()));
        take_step(&model, &optimizer, batches(), &settings, no_notes).unwrap();
        let buckets = optimizer.layout().buckets();
        assert!(buckets > 3);
        // Sums from the arena's end, one round, and weights from its start, which the next forward pass reads first.
        let sums = (0..buckets).rev().map(|bucket| format!("sum gradients of bucket {bucket}"));
        let weights = (0..buckets).map(|bucket| format!("gather weights of bucket {bucket}"));
        let round = std::iter::once("values loss and gradient norm".to_owned());
        assert_eq!(recorder.take(), sums.chain(round).chain(weights).collect::<Vec<_>>());
    }
}
