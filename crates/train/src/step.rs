//! One optimizer step: forward and backward of its micro-batches, the global norm, clipping, AdamW.
//!
//! On a GPU the host only asks for the work: losses are added, the norm taken, the clip factor chosen and a non-finite
//! step left out on the device. The host waits once, at the end, for the loss and the norm together.

use crate::device;
use crate::evaluate::BatchTensors;
use crate::optimizer::Optimizer;
use crate::profile::range;
use anyhow::Result;
use std::time::Instant;
use stickbreak_autograd::Tape;
use stickbreak_model::Transformer;
use stickbreak_tensor::{DType, Device, Tensor};

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepOutcome {
    /// Sum of the micro-batches' losses.
    pub loss: f64,
    /// Global norm of the gradients, before clipping.
    pub gradient_norm: f64,
    /// On a GPU: how long its work took, from its first to its last kernel and all gaps between.
    pub device_milliseconds: Option<f64>,
    /// On a GPU: how long the host was busy asking for the work, before it waited. As the driver's queue takes about a
    /// thousand launches, a host that is far ahead waits in a launch: this is an upper bound.
    pub host_milliseconds: Option<f64>,
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
    /// Factor of every token's loss: one over the number of predicted tokens of the whole step.
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
    let BatchTensors { ids, labels, packing } = batch;
    let tape = Tape::new();
    let forward = range("forward");
    let loss = model.loss(&tape, ids, labels, packing, settings.loss_scale, settings.recompute)?;
    drop(forward);
    let _backward = range("backward");
    tape.backward(&loss)?;
    Ok(loss.value().clone())
}

/// A whole step over its micro-batches, the update included unless loss or norm are not finite.
///
/// # Errors
/// As [`accumulate_gradients`], or what `batches` give.
pub fn take_step(
    model: &Transformer,
    optimizer: &Optimizer,
    batches: impl IntoIterator<Item = Result<BatchTensors>>,
    settings: &StepSettings,
) -> Result<StepOutcome> {
    match model.device() {
        Device::Cpu => on_host(model, optimizer, batches, settings),
        gpu => on_gpu(gpu, model, optimizer, batches, settings),
    }
}

fn on_host(
    model: &Transformer,
    optimizer: &Optimizer,
    batches: impl IntoIterator<Item = Result<BatchTensors>>,
    settings: &StepSettings,
) -> Result<StepOutcome> {
    model.arena().zero_gradients()?;
    let mut loss = 0.0;
    for batch in batches {
        loss += accumulate_gradients(model, &batch?, settings)?.to_scalar()?;
    }
    let _optimizer = range("optimizer");
    let gradient_norm = model.arena().gradients().sum_of_squares()?.sqrt();
    let outcome = StepOutcome { loss, gradient_norm, device_milliseconds: None, host_milliseconds: None };
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
) -> Result<StepOutcome> {
    let timer = device::queue(gpu)?.map(|queue| queue.timer()).transpose()?;
    let started = Instant::now();
    model.arena().zero_gradients()?;
    let mut loss: Option<Tensor> = None;
    for batch in batches {
        let share = accumulate_gradients(model, &batch?, settings)?;
        loss = Some(match loss {
            Some(loss) => loss.add(&share)?,
            None => share,
        });
    }
    let loss = loss.map_or_else(|| Tensor::zeros_on([], DType::F32, gpu), Ok)?;
    // Loss and sum of squares beside each other, to be read in one go.
    let report = Tensor::empty_on([2], DType::F32, gpu)?;
    {
        let _optimizer = range("optimizer");
        let sum_of_squares = model.arena().gradients().sum_of_squares_tensor()?;
        optimizer.step_guarded(model, settings.number, settings.learning_rate, &sum_of_squares, &loss)?;
        for (index, value) in [&loss, &sum_of_squares].into_iter().enumerate() {
            report.narrow(0, index, 1)?.copy_assign(&value.reshape([1])?)?;
        }
    }
    let host_milliseconds = 1e3 * started.elapsed().as_secs_f64();
    let _read = range("wait");
    let device_milliseconds = timer.map(|timer| timer.milliseconds()).transpose()?;
    let values = report.to_f64_vec()?;
    Ok(StepOutcome {
        loss: values[0],
        gradient_norm: values[1].sqrt(),
        device_milliseconds,
        host_milliseconds: Some(host_milliseconds),
    })
}

/// Runs every kernel of a step, the optimizer's too, without a trace: the update is refused on the device by a loss that
/// is not a number. Leaves gradients behind, which the next step clears.
///
/// # Errors
/// As [`take_step`]; memory that the device does not have.
pub fn rehearse(
    model: &Transformer,
    optimizer: &Optimizer,
    batch: &BatchTensors,
    settings: &StepSettings,
) -> Result<()> {
    model.arena().zero_gradients()?;
    accumulate_gradients(model, batch, settings)?;
    if let gpu @ Device::Cuda(_) = model.device() {
        let refused = Tensor::full_on(f64::NAN, [], DType::F32, gpu)?;
        optimizer.step_guarded(model, settings.number, settings.learning_rate, &refused, &refused)?;
        gpu.synchronize()?;
    }
    Ok(())
}
