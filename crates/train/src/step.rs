//! One optimizer step: forward and backward of its micro-batches, the global norm, clipping, AdamW.
//!
//! Every rank has micro-batches of its own. While the last of them runs backward, gradients are summed over the ranks;
//! loss, norm and the caller's notes are exchanged in one small round; updated weights travel while the next step begins.
//!
//! On a GPU the host only asks for the work: losses are added, the norm taken, the clip factor chosen and a non-finite
//! step left out on the device. The host waits once, at the end, for the loss and the norm together.

use crate::device::{self, Waits};
use crate::evaluate::BatchTensors;
use crate::optimizer::Optimizer;
use crate::profile::range;
use anyhow::Result;
use std::time::Instant;
use stickbreak_autograd::{ParameterId, Tape};
use stickbreak_model::Transformer;
use stickbreak_tensor::{DType, Device, Tensor};

/// What a step did.
#[derive(Debug, Clone, PartialEq)]
pub struct StepOutcome {
    /// Sum of all micro-batches' losses.
    pub loss: f64,
    /// Global norm of the gradients, before clipping.
    pub gradient_norm: f64,
    /// What each rank told the others, by rank.
    pub told: Vec<Told>,
    /// On a GPU: how long its work took, from its first to its last kernel and all gaps between.
    pub device_milliseconds: Option<f64>,
    /// On a GPU: how long the host was busy asking for the work, before it waited. As the driver's queue takes about a
    /// thousand launches, a host that is far ahead waits in a launch: this is an upper bound.
    pub host_milliseconds: Option<f64>,
    /// On a GPU of several: how long it stood still for other ranks, that is, communication that nothing hid.
    pub exposed_milliseconds: Option<f64>,
}

/// What a rank tells the others at the end of a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Told {
    /// Its share of the loss.
    pub loss: f64,
    /// The sum of the squares of the gradients in its shard.
    pub sum_of_squares: f64,
    /// The caller's notes. On a GPU they travel as float32.
    pub notes: Vec<f64>,
}

impl Told {
    fn new(values: &[f64]) -> Self {
        Self { loss: values[0], sum_of_squares: values[1], notes: values[2..].to_vec() }
    }
}

impl StepOutcome {
    /// Whether the parameters were updated.
    pub fn is_finite(&self) -> bool {
        self.loss.is_finite() && self.gradient_norm.is_finite()
    }
}

/// The part of a step that is the same for all its batches.
#[derive(Debug, Clone, Copy)]
pub struct StepSettings {
    /// Number of the update, from 1: AdamW's bias correction.
    pub number: u64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Factor of every token's loss: one over the number of predicted tokens of the whole step, over all ranks.
    pub loss_scale: f64,
    /// Whether blocks are computed again in the backward pass.
    pub recompute: bool,
}

/// Forward and backward of one micro-batch: adds its gradients to the arena's. Returns its share of the loss, a scalar
/// on the model's device that nobody has waited for.
///
/// # Errors
/// If the batch does not fit the model, or the device fails.
pub fn accumulate_gradients(model: &Transformer, batch: &BatchTensors, settings: &StepSettings) -> Result<Tensor> {
    run_batch(&Tape::new(), model, batch, settings, &mut |_| {})
}

fn run_batch(
    tape: &Tape,
    model: &Transformer,
    batch: &BatchTensors,
    settings: &StepSettings,
    ready: &mut dyn FnMut(ParameterId),
) -> Result<Tensor> {
    let BatchTensors { ids, labels, packing } = batch;
    let forward = range("forward");
    let loss = model.loss(tape, ids, labels, packing, settings.loss_scale, settings.recompute)?;
    drop(forward);
    let _backward = range("backward");
    tape.backward_with(&loss, 1.0, ready)?;
    Ok(loss.value().clone())
}

/// Forward and backward of all micro-batches of this rank, whose gradients are summed over all ranks; `loss` gets the
/// share of each, `reduced` every bucket of which this rank has its part of the sums.
fn sum_gradients(
    model: &Transformer,
    optimizer: &Optimizer,
    batches: impl IntoIterator<Item = Result<BatchTensors>>,
    settings: &StepSettings,
    waits: &mut Waits,
    mut loss: impl FnMut(Tensor) -> Result<()>,
    mut reduced: impl FnMut(Tensor) -> Result<()>,
) -> Result<()> {
    model.arena().zero_gradients()?;
    let weights = optimizer.weights();
    let mut reducer = optimizer.reducer(model);
    let mut batches = batches.into_iter().peekable();
    while let Some(batch) = batches.next() {
        // Gradients are complete in the last micro-batch only.
        let is_last = batches.peek().is_none();
        let tape = Tape::new().with_before_use(Some(weights.before_use()));
        let share = run_batch(&tape, model, &batch?, settings, &mut |parameter| {
            if is_last {
                reducer.ready(parameter);
            }
        });
        // A failed wait for weights is the cause of whatever came after.
        weights.check()?;
        loss(share?)?;
    }
    let _reduce = range("reduce");
    reducer.finish(waits, |bucket| reduced(optimizer.gradients(model, bucket)?))
}

/// A whole step over this rank's micro-batches, the update included unless loss or norm are not finite. Every rank calls
/// it, and tells the others what `notes` returns, which is asked for when the backward passes have been.
///
/// # Errors
/// As [`accumulate_gradients`], what `batches` or `notes` give, or if another rank is lost.
pub fn take_step(
    model: &Transformer,
    optimizer: &Optimizer,
    batches: impl IntoIterator<Item = Result<BatchTensors>>,
    settings: &StepSettings,
    notes: impl FnOnce() -> Result<Vec<f64>>,
) -> Result<StepOutcome> {
    match model.device() {
        Device::Cpu => on_host(model, optimizer, batches, settings, notes),
        gpu => on_gpu(gpu, model, optimizer, batches, settings, notes),
    }
}

/// For a caller with nothing to tell.
///
/// # Errors
/// Never.
pub fn no_notes() -> Result<Vec<f64>> {
    Ok(Vec::new())
}

/// What the exchange at the end of a step is called in errors.
const ROUND: &str = "loss and gradient norm";

fn on_host(
    model: &Transformer,
    optimizer: &Optimizer,
    batches: impl IntoIterator<Item = Result<BatchTensors>>,
    settings: &StepSettings,
    notes: impl FnOnce() -> Result<Vec<f64>>,
) -> Result<StepOutcome> {
    let (mut loss, mut squares) = (0.0, 0.0);
    let add_loss = |share: Tensor| {
        loss += share.to_scalar()?;
        Ok(())
    };
    let add_squares = |gradients: Tensor| {
        squares += gradients.sum_of_squares()?;
        Ok(())
    };
    sum_gradients(model, optimizer, batches, settings, &mut Waits::new(Device::Cpu), add_loss, add_squares)?;
    let mut mine = vec![loss, squares];
    mine.extend(notes()?);
    let told = optimizer.communicator().gather_values(ROUND, &mine)?;
    let told: Vec<Told> = told.iter().map(|values| Told::new(values)).collect();
    let loss = told.iter().fold(0.0, |sum, told| sum + told.loss);
    let gradient_norm = told.iter().fold(0.0, |sum, told| sum + told.sum_of_squares).sqrt();
    let outcome = StepOutcome {
        loss,
        gradient_norm,
        told,
        device_milliseconds: None,
        host_milliseconds: None,
        exposed_milliseconds: None,
    };
    let _optimizer = range("optimizer");
    if outcome.is_finite() {
        let clip = optimizer.clip_factor(gradient_norm);
        optimizer.step(model, settings.number, settings.learning_rate, clip)?;
    }
    Ok(outcome)
}

fn on_gpu(
    gpu: Device,
    model: &Transformer,
    optimizer: &Optimizer,
    batches: impl IntoIterator<Item = Result<BatchTensors>>,
    settings: &StepSettings,
    notes: impl FnOnce() -> Result<Vec<f64>>,
) -> Result<StepOutcome> {
    let timer = device::queue(gpu)?.map(|queue| queue.timer()).transpose()?;
    let started = Instant::now();
    let mut waits = Waits::new(gpu);
    let (mut loss, mut squares): (Option<Tensor>, Option<Tensor>) = (None, None);
    let add_loss = |share| add(&mut loss, share);
    let add_squares = |gradients: Tensor| add(&mut squares, gradients.sum_of_squares_tensor()?);
    sum_gradients(model, optimizer, batches, settings, &mut waits, add_loss, add_squares)?;
    let zero = || Tensor::zeros_on([], DType::F32, gpu);
    let mine = [loss.map_or_else(zero, Ok)?, squares.map_or_else(zero, Ok)?];
    let asked = Instant::now();
    let notes = notes()?;
    // The caller may wait for data there, while the device is busy.
    let elsewhere = asked.elapsed();
    let report = {
        let _optimizer = range("optimizer");
        let Round { report, loss, squares } = exchange(optimizer, mine, &notes, &mut waits)?;
        optimizer.step_guarded(model, settings.number, settings.learning_rate, &squares, &loss)?;
        report
    };
    let host_milliseconds = 1e3 * (started.elapsed() - elsewhere).as_secs_f64();
    let _read = range("wait");
    // Waits for weights before this step's first use of them, and those of this step. They are over before the update is:
    // read now, while the device is busy with that, they cost no time.
    let exposed = [optimizer.weights().take_waits().milliseconds()?, waits.milliseconds()?];
    let device_milliseconds = timer.map(|timer| timer.milliseconds()).transpose()?;
    let values = report.to_f64_vec()?;
    // A collective that was broken off leaves anything.
    optimizer.communicator().check(ROUND)?;
    let told: Vec<Told> = values.chunks(values.len() / optimizer.layout().ranks()).map(Told::new).collect();
    // In float32, as the device did it: both must agree on whether the step was finite.
    let sum = |of: fn(&Told) -> f64| f64::from(told.iter().fold(0.0, |sum, told| sum + of(told) as f32));
    Ok(StepOutcome {
        loss: sum(|told| told.loss),
        gradient_norm: sum(|told| told.sum_of_squares).sqrt(),
        told,
        device_milliseconds,
        host_milliseconds: Some(host_milliseconds),
        exposed_milliseconds: (optimizer.layout().ranks() > 1).then(|| exposed.into_iter().flatten().sum()),
    })
}

/// Adds a tensor to a sum that may not have begun.
fn add(sum: &mut Option<Tensor>, term: Tensor) -> Result<()> {
    *sum = Some(match sum.take() {
        Some(sum) => sum.add(&term)?,
        None => term,
    });
    Ok(())
}

/// What the ranks told each other, on the device.
struct Round {
    /// Each rank's loss, sum of squares and notes, one rank behind the other.
    report: Tensor,
    /// Sum of the losses.
    loss: Tensor,
    /// Sum of the squares of all gradients.
    squares: Tensor,
}

/// Exchanges loss, sum of squares and notes beside each other, to be read in one go. The host does not wait.
fn exchange(optimizer: &Optimizer, [loss, squares]: [Tensor; 2], notes: &[f64], waits: &mut Waits) -> Result<Round> {
    let (ranks, width) = (optimizer.layout().ranks(), 2 + notes.len());
    let mine = loss.new_empty([width], DType::F32)?;
    for (index, value) in [&loss, &squares].into_iter().enumerate() {
        mine.narrow(0, index, 1)?.copy_assign(&value.reshape([1])?)?;
    }
    let notes: Vec<f32> = notes.iter().map(|&note| note as f32).collect();
    if !notes.is_empty() {
        mine.narrow(0, 2, notes.len())?.transfer_assign(&Tensor::from_slice(&notes, [notes.len()])?)?;
    }
    if ranks == 1 {
        return Ok(Round { report: mine, loss, squares });
    }
    let report = loss.new_empty([ranks * width], DType::F32)?;
    let ticket = optimizer.communicator().all_gather(ROUND, &mine, &report)?;
    waits.measure(|| Ok(ticket.join()?))?;
    let sums = report.reshape([ranks, width])?.sum(&[0])?;
    let sum = |index| sums.narrow(1, index, 1)?.reshape([]);
    Ok(Round { loss: sum(0)?, squares: sum(1)?, report })
}

/// Runs every kernel of a step, and on a GPU the optimizer's too, without a trace: the update is refused on the device by
/// a loss that is not a number. Leaves gradients behind, which the next step clears. Every rank calls it.
///
/// # Errors
/// As [`take_step`]; memory that the device does not have.
pub fn rehearse(
    model: &Transformer,
    optimizer: &Optimizer,
    batch: &BatchTensors,
    settings: &StepSettings,
) -> Result<()> {
    let mut waits = Waits::new(model.device());
    sum_gradients(model, optimizer, [Ok(batch.clone())], settings, &mut waits, |_| Ok(()), |_| Ok(()))?;
    if let gpu @ Device::Cuda(_) = model.device() {
        let refused = Tensor::full_on(f64::NAN, [], DType::F32, gpu)?;
        optimizer.step_guarded(model, settings.number, settings.learning_rate, &refused, &refused)?;
        optimizer.weights().settle()?;
        gpu.synchronize()?;
        optimizer.weights().take_waits();
    }
    Ok(())
}
