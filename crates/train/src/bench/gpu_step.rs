//! Whole training steps (forward, backward, clipping, AdamW) of models that fill a card, in bf16 with float32 master
//! weights, on random tokens that are different in every step. Untrained: see [`super`] on early exit.

use super::row::{Row, StepFigures};
use super::{Seconds, Settings, median};
use crate::config::OptimizerConfig;
use crate::data::Batch;
use crate::device;
use crate::evaluate::BatchTensors;
use crate::mfu;
use crate::optimizer::Optimizer;
use crate::step::{StepSettings, no_notes, take_step};
use anyhow::{Result, ensure};
use clap::ValueEnum;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::time::Instant;
use stickbreak_model::{AttentionKind, ModelConfig, Transformer, count};
use stickbreak_tensor::{DType, Device};

/// A model and its batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    /// 12 layers, 768 wide, vocabulary 16384, 32 x 2048 tokens.
    #[value(name = "110m")]
    M110,
    /// 24 layers, 1024 wide, vocabulary 50304 (tied), 16 x 2048 tokens.
    #[value(name = "360m")]
    M360,
    /// 24 layers, 2048 wide, vocabulary 50304 (tied), 4 x 4096 tokens.
    #[value(name = "1.3b")]
    B1,
}

impl Shape {
    /// Sequences and tokens of each.
    fn batch(self) -> (usize, usize) {
        match self {
            Self::M110 => (32, 2048),
            Self::M360 => (16, 2048),
            Self::B1 => (4, 4096),
        }
    }

    fn model(self, attention: AttentionKind, early_exit_bits: u32) -> Result<ModelConfig> {
        let (layers, width, heads, feed_forward, vocabulary, tied) = match self {
            Self::M110 => (12, 768, 12, 2048, 16384, false),
            Self::M360 => (24, 1024, 16, 2816, 50304, true),
            Self::B1 => (24, 2048, 32, 5632, 50304, true),
        };
        Ok(serde_json::from_value(serde_json::json!({
            "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": feed_forward, "num_layers": layers,
            "num_heads": heads, "tie_word_embeddings": tied, "attention": attention, "early_exit_bits": early_exit_bits,
        }))?)
    }
}

/// What is timed of each model.
const VARIANTS: [(&str, AttentionKind, u32); 3] = [
    ("stick-breaking dense", AttentionKind::StickBreaking, 0),
    ("stick-breaking early exit (flatters)", AttentionKind::StickBreaking, 24),
    ("softmax-rope", AttentionKind::SoftmaxRope, 0),
];

pub(super) fn measure(settings: &Settings, each: &mut dyn FnMut(Row)) -> Result<()> {
    for shape in Shape::value_variants().iter().filter(|shape| settings.shape.is_none_or(|wanted| wanted == **shape)) {
        for (name, attention, early_exit_bits) in VARIANTS {
            if settings.dense_only && name != VARIANTS[0].0 {
                continue;
            }
            let config = shape.model(attention, early_exit_bits)?;
            let millions = count::parameters(&config).total as f64 / 1e6;
            each(measure_one(settings, &config, shape.batch(), format!("{millions:.0}M {name}"))?);
        }
    }
    Ok(())
}

fn measure_one(
    settings: &Settings,
    config: &ModelConfig,
    (sequences, length): (usize, usize),
    name: String,
) -> Result<Row> {
    let gpu = settings.device;
    device::prepare_kernels(config, DType::BF16, gpu, |line| eprintln!("{line}"))?;
    let model = Transformer::new_on(config.clone(), DType::BF16, gpu)?;
    model.initialise(1)?;
    let optimizer = Optimizer::new(OptimizerConfig::default(), &model)?;
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let next = || Ok(vec![random_batch(&mut rng, config.vocab_size as u32, sequences, length)]);
    let times = time_steps(settings, &model, &optimizer, (1e-4, false), &name, next)?;
    Ok(times.row(name, format!("{sequences} x {length} tokens")))
}

/// What was measured of a model's steps.
pub(super) struct StepTimes {
    wall: Seconds,
    /// Of each step.
    tokens: usize,
    flops: f64,
    /// On a GPU.
    figures: Option<StepFigures>,
    /// Mean over the timed steps, in nats per predicted token.
    pub(super) loss: f64,
}

/// Times steps, each over the micro-batches that `next` gives.
pub(super) fn time_steps(
    settings: &Settings,
    model: &Transformer,
    optimizer: &Optimizer,
    (learning_rate, recompute): (f64, bool),
    name: &str,
    mut next: impl FnMut() -> Result<Vec<Batch>>,
) -> Result<StepTimes> {
    let device = settings.device;
    if let Some(queue) = device::queue(device)? {
        queue.gpu().reset_peak_memory()?;
    }
    let (mut wall, mut on_device, mut on_host) = (Vec::new(), Vec::new(), Vec::new());
    let (mut loss, mut tokens, mut flops) = (0.0, 0, 0.0);
    for number in 1..=(settings.warm_up + settings.repeats) as u64 {
        let batches = next()?;
        let predicted: usize = batches.iter().map(|batch| batch.valid_tokens).sum();
        let step = StepSettings { number, learning_rate, loss_scale: 1.0 / predicted.max(1) as f64, recompute };
        let started = Instant::now();
        let tensors = batches.iter().map(|batch| BatchTensors::new(batch, device));
        let outcome = take_step(model, optimizer, tensors, &step, no_notes)?;
        let seconds = started.elapsed().as_secs_f64();
        ensure!(outcome.is_finite(), "{name}: step {number} has a loss of {}", outcome.loss);
        if number > settings.warm_up as u64 {
            wall.push(seconds);
            on_device.extend(outcome.device_milliseconds);
            on_host.extend(outcome.host_milliseconds);
            loss += outcome.loss / settings.repeats as f64;
        }
        tokens = batches.iter().map(|batch| batch.ids.len()).sum();
        let squared =
            |batch: &Batch| -> f64 { batch.cu_seqlens.windows(2).map(|w| f64::from(w[1] - w[0]).powi(2)).sum() };
        flops = count::training_flops(model.config(), tokens, batches.iter().map(squared).sum());
    }
    let wall = (median(&mut wall), wall[0]);
    let peak = device::gpu_name(device).and_then(|name| mfu::peak_flops(&name));
    let figures = match device {
        Device::Cpu => None,
        Device::Cuda(_) => Some(StepFigures {
            mfu: mfu::utilisation(flops, wall.0, peak),
            host_milliseconds: median(&mut on_host),
            device_milliseconds: median(&mut on_device),
            peak_memory_bytes: device.memory_use()?.peak as u64,
        }),
    };
    Ok(StepTimes { wall, tokens, flops, figures, loss })
}

impl StepTimes {
    pub(super) fn row(&self, name: String, shape: String) -> Row {
        Row { step: self.figures, ..Row::new("train", name, shape, self.wall, self.flops, Some(self.tokens)) }
    }
}

/// Sequences of random tokens, one document each; every token but the last of each predicts its successor.
fn random_batch(rng: &mut ChaCha8Rng, vocabulary: u32, sequences: usize, length: usize) -> Batch {
    let ids: Vec<u32> = (0..sequences * length).map(|_| rng.next_u32() % vocabulary).collect();
    let labels = (1..=ids.len()).map(|next| if next % length == 0 { -100 } else { ids[next] as i32 }).collect();
    let cu_seqlens = (0..=sequences).map(|i| (i * length) as i32).collect();
    Batch { labels, cu_seqlens, valid_tokens: sequences * (length - 1), text_bytes: None, ids }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shapes_are_the_models_that_peers_are_timed_on() {
        for (shape, millions, tokens) in
            [(Shape::M110, 110.1, 65536), (Shape::M360, 359.8, 32768), (Shape::B1, 1336.2, 16384)]
        {
            let config = shape.model(AttentionKind::StickBreaking, 0).unwrap();
            config.validate().unwrap();
            let found = count::parameters(&config).total as f64 / 1e6;
            assert!((found - millions).abs() < 0.2, "{shape:?}: {found}");
            let (sequences, length) = shape.batch();
            assert_eq!(sequences * length, tokens);
            // MFU as the peers count it: 6 N + 6 layers width length a token, N without the norms.
            let flops = count::training_flops(&config, tokens, (sequences * length * length) as f64) / tokens as f64;
            let attention = 6.0 * (config.num_layers * config.hidden_size * length) as f64;
            assert_eq!(flops, 6.0 * count::parameters(&config).matrix as f64 + attention);
        }
    }

    #[test]
    fn a_random_batch_predicts_every_token_within_its_sequence() {
        let batch = random_batch(&mut ChaCha8Rng::seed_from_u64(1), 10, 3, 4);
        assert_eq!((batch.cu_seqlens.as_slice(), batch.valid_tokens), (&[0, 4, 8, 12][..], 9));
        for token in 0..12 {
            let expected = if token % 4 == 3 { -100 } else { batch.ids[token + 1] as i32 };
            assert_eq!(batch.labels[token], expected);
        }
    }
}
