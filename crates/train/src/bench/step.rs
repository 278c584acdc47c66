//! A whole training step (forward, backward, clipping, AdamW) of a small byte model: 4 layers, 256 wide, 4 heads of 64,
//! feed-forward 704, 8 x 512 tokens. The step with early exit off is the one to compare with other stacks: at
//! initialisation almost every tile could be skipped.

use super::{Row, row, time};
use crate::config::OptimizerConfig;
use crate::optimizer::Optimizer;
use anyhow::Result;
use stickbreak_autograd::Tape;
use stickbreak_model::{AttentionKind, ModelConfig, Packing, Transformer, count};
use stickbreak_tensor::{DType, Tensor};

const SEQUENCES: usize = 8;
const LENGTH: usize = 512;
const VOCABULARY: u32 = 257;

pub(super) fn measure(repeats: usize) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (name, attention, early_exit_bits) in [
        ("stick-breaking dense", AttentionKind::StickBreaking, 0),
        ("stick-breaking early exit", AttentionKind::StickBreaking, 24),
        ("softmax-rope", AttentionKind::SoftmaxRope, 0),
    ] {
        let config: ModelConfig = serde_json::from_value(serde_json::json!({
            "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 704, "num_layers": 4, "num_heads": 4,
            "attention": attention, "early_exit_bits": early_exit_bits,
        }))?;
        let tokens = SEQUENCES * LENGTH;
        let ids: Vec<u32> = (0..tokens as u32).map(|i| i.wrapping_mul(2_654_435_761) % VOCABULARY).collect();
        let labels: Vec<i32> =
            (1..=tokens as u32).map(|i| (i.wrapping_mul(2_654_435_761) % VOCABULARY) as i32).collect();
        let (ids, labels) = (Tensor::from_vec(ids, [tokens])?, Tensor::from_vec(labels, [tokens])?);
        let packing = Packing::new(&(0..=SEQUENCES).map(|i| (i * LENGTH) as i32).collect::<Vec<_>>())?;
        let model = Transformer::new(config.clone(), DType::F32)?;
        model.initialise(1)?;
        let optimizer = Optimizer::new(OptimizerConfig::default(), &model);
        let mut step = 0;
        let seconds = time(repeats, || {
            model.arena().zero_gradients()?;
            let tape = Tape::new();
            let loss = model.loss(&tape, &ids, &labels, &packing, 1.0 / tokens as f64, false)?;
            tape.backward(&loss)?;
            let norm = model.arena().gradients().sum_of_squares()?.sqrt();
            step += 1;
            optimizer.step(&model, step, 1e-3, optimizer.clip_factor(norm))
        })?;
        let flops = count::training_flops(&config, tokens, (SEQUENCES * LENGTH * LENGTH) as f64);
        rows.push(row("train", name, format!("{SEQUENCES} x {LENGTH} tokens"), seconds, flops, Some(tokens)));
    }
    Ok(rows)
}
