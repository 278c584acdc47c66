//! One model case: loss, logits, every gradient, and a training trajectory against float64.

use super::error_norm::tensor_error;
use super::{Comparison, ModelBounds, digest_results};
use crate::config::OptimizerConfig;
use crate::evaluate::BatchTensors;
use crate::optimizer::Optimizer;
use crate::step::{StepSettings, accumulate_gradients, no_notes, take_step};
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::path::Path;
use stickbreak_autograd::Tape;
use stickbreak_model::{ModelConfig, Packing, Transformer};
use stickbreak_tensor::{DType, Device, io};

#[derive(Deserialize)]
struct Trajectory {
    hyper: Hyper,
    loss: Vec<f64>,
    grad_norm: Vec<f64>,
    final_loss: f64,
    final_param_norm: f64,
}

#[derive(Deserialize)]
struct Hyper {
    lr: f64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
    clip: f64,
}

struct Case {
    model: Transformer,
    batch: BatchTensors,
    loss_scale: f64,
}

impl Case {
    fn load(folder: &Path, dtype: DType, device: Device) -> Result<Self> {
        let batch_path = folder.join("batch.safetensors");
        let batch = io::load(&batch_path)?;
        let labels = batch.tensor(&batch_path, "labels")?.clone();
        let predicted = labels.to_f64_vec()?.iter().filter(|&&label| label >= 0.0).count();
        let model = Transformer::new_on(read_config(&folder.join("config.json"))?, dtype, device)?;
        model.load_weights(&folder.join("model.safetensors"))?;
        let ids = batch.tensor(&batch_path, "input_ids")?.to_dtype(DType::U32)?;
        let packing = Packing::new(&batch.tensor(&batch_path, "cu_seqlens")?.to_vec::<i32>()?)?;
        Ok(Self {
            model,
            batch: BatchTensors {
                ids: ids.to_device(device)?,
                labels: labels.to_device(device)?,
                packing: packing.to_device(device)?,
            },
            loss_scale: 1.0 / predicted.max(1) as f64,
        })
    }

    fn settings(&self, number: u64, learning_rate: f64) -> StepSettings {
        StepSettings { number, learning_rate, loss_scale: self.loss_scale, recompute: false }
    }

    /// The loss; its gradients are in the arena afterwards.
    fn loss_and_gradients(&self) -> Result<f64> {
        self.model.arena().zero_gradients()?;
        Ok(accumulate_gradients(&self.model, &self.batch, &self.settings(1, 0.0))?.to_scalar()?)
    }
}

fn read_config(path: &Path) -> Result<ModelConfig> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut value: serde_json::Value = serde_json::from_slice(&text)?;
    if let Some(object) = value.as_object_mut() {
        object.remove("name");
        // The reference skips nothing.
        object.insert("early_exit_bits".into(), 0.into());
    }
    serde_json::from_value(value).with_context(|| format!("in {}", path.display()))
}

pub(super) fn compare(
    folder: &Path,
    dtype: DType,
    device: Device,
    digest: &mut blake3::Hasher,
) -> Result<Vec<Comparison>> {
    let bounds = ModelBounds::of(dtype);
    let case = Case::load(folder, dtype, device)?;
    let expected_path = folder.join("expected.safetensors");
    let expected = io::load(&expected_path)?;
    let mut comparisons = Vec::new();
    let mut compare = |name: &str, x: Vec<f64>, bound: f64| -> Result<()> {
        digest_results(digest, &x);
        let reference = expected.tensor(&expected_path, name)?.to_f64_vec()?;
        comparisons.push(Comparison::new(name, tensor_error(&x, &reference), bound));
        Ok(())
    };
    compare("loss", vec![case.loss_and_gradients()?], bounds.loss)?;
    for (entry, parameter) in case.model.arena().iter() {
        compare(&format!("grad.{}", entry.name), parameter.gradient.to_f64_vec()?, bounds.gradient)?;
    }
    let tape = Tape::without_gradients();
    let hidden = case.model.hidden(&tape, &case.batch.ids, &case.batch.packing, false)?;
    compare("logits", case.model.logits(hidden.value())?.to_f64_vec()?, bounds.logits)?;
    let compared = comparisons.len();
    if compared != expected.tensors.len() {
        bail!("{} has {} quantities, {compared} were compared", expected_path.display(), expected.tensors.len());
    }
    comparisons.extend(trajectory(&case, folder, bounds, digest)?);
    Ok(comparisons)
}

fn trajectory(case: &Case, folder: &Path, bounds: ModelBounds, digest: &mut blake3::Hasher) -> Result<Vec<Comparison>> {
    let path = folder.join("trajectory.json");
    let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let reference: Trajectory =
        serde_json::from_slice(&text).with_context(|| format!("{} is not a trajectory", path.display()))?;
    let hyper = &reference.hyper;
    let config = OptimizerConfig {
        learning_rate: hyper.lr,
        beta1: hyper.beta1,
        beta2: hyper.beta2,
        epsilon: hyper.eps,
        weight_decay: hyper.weight_decay,
        clip_norm: hyper.clip,
    };
    let optimizer = Optimizer::new(config, &case.model)?;
    let absolute = |found: f64, reference: f64| (found - reference).abs() / reference.abs().max(1.0);
    let (mut loss_error, mut norm_error) = (0.0f64, 0.0f64);
    for (step, (&loss, &norm)) in std::iter::zip(&reference.loss, &reference.grad_norm).enumerate() {
        let settings = case.settings(step as u64 + 1, hyper.lr);
        let found = take_step(&case.model, &optimizer, [Ok(case.batch.clone())], &settings, no_notes)?;
        digest_results(digest, &[found.loss, found.gradient_norm]);
        loss_error = worse(loss_error, absolute(found.loss, loss));
        norm_error = worse(norm_error, (found.gradient_norm - norm).abs() / norm);
    }
    digest_results(digest, &case.model.arena().master().to_f64_vec()?);
    let final_norm = case.model.arena().master().sum_of_squares()?.sqrt();
    let final_norm_error = (final_norm - reference.final_param_norm).abs() / reference.final_param_norm;
    let final_loss_error = absolute(case.loss_and_gradients()?, reference.final_loss);
    Ok(vec![
        Comparison::new(format!("loss over {} steps", reference.loss.len()), loss_error, bounds.trajectory),
        Comparison::new("gradient norm over the steps", norm_error, bounds.trajectory_norm),
        Comparison::new("loss after the steps", final_loss_error, bounds.trajectory),
        Comparison::new("parameter norm after the steps", final_norm_error, bounds.trajectory),
    ])
}

/// The larger one; NaN stays.
fn worse(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}
