//! A whole training step (forward, backward, clipping, AdamW) of a small byte model: 4 layers, 256 wide, 4 heads of 64,
//! feed-forward 704, 8 x 512 tokens. The step with early exit off is the one to compare with other stacks: at
//! initialisation almost every tile could be skipped.

use super::row::Row;
use super::{Settings, time};
use crate::config::OptimizerConfig;
use crate::evaluate::BatchTensors;
use crate::optimizer::Optimizer;
use crate::step::{StepSettings, no_notes, take_step};
use anyhow::Result;
use stickbreak_model::{AttentionKind, ModelConfig, Packing, Transformer, count};
use stickbreak_tensor::{DType, Tensor};

const SEQUENCES: usize = 8;
const LENGTH: usize = 512;
const VOCABULARY: u32 = 257;

pub(super) fn measure(settings: &Settings, each: &mut dyn FnMut(Row)) -> Result<()> {
    for (name, attention, early_exit_bits) in [
        ("stick-breaking dense", AttentionKind::StickBreaking, 0),
        ("stick-breaking early exit (flatters)", AttentionKind::StickBreaking, 24),
        ("softmax-rope", AttentionKind::SoftmaxRope, 0),
    ] {
        if settings.dense_only && early_exit_bits > 0 {
            continue;
        }
        let config: ModelConfig = serde_json::from_value(serde_json::json!({
            "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 704, "num_layers": 4, "num_heads": 4,
            "attention": attention, "early_exit_bits": early_exit_bits,
        }))?;
        let tokens = SEQUENCES * LENGTH;
        let ids: Vec<u32> = (0..tokens as u32).map(|i| i.wrapping_mul(2_654_435_761) % VOCABULARY).collect();
        let labels: Vec<i32> =
            (1..=tokens as u32).map(|i| (i.wrapping_mul(2_654_435_761) % VOCABULARY) as i32).collect();
        let batch = BatchTensors {
            ids: Tensor::from_vec(ids, [tokens])?,
            labels: Tensor::from_vec(labels, [tokens])?,
            packing: Packing::new(&(0..=SEQUENCES).map(|i| (i * LENGTH) as i32).collect::<Vec<_>>())?,
        };
        let model = Transformer::new(config.clone(), DType::F32)?;
        model.initialise(1)?;
        let optimizer = Optimizer::new(OptimizerConfig::default(), &model)?;
        let mut step =
            StepSettings { number: 0, learning_rate: 1e-3, loss_scale: 1.0 / tokens as f64, recompute: false };
        let seconds = time(settings, || {
            step.number += 1;
            take_step(&model, &optimizer, [Ok(batch.clone())], &step, no_notes).map(drop)
        })?;
        let flops = count::training_flops(&config, tokens, (SEQUENCES * LENGTH * LENGTH) as f64);
        each(Row::new("train", name, format!("{SEQUENCES} x {LENGTH} tokens"), seconds, flops, Some(tokens)));
    }
    Ok(())
}
