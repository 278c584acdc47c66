//! The lines of `metrics.jsonl`. `step` is always the number of optimizer steps taken before the measurement ended.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// One optimizer step.
    Train(TrainMetrics),
    /// Loss on the validation tokens.
    Valid(ValidMetrics),
    /// Text that the model continued.
    Sample(SampleMetrics),
    /// Length extrapolation.
    Length(LengthMetrics),
    /// How far and where the heads look.
    Attention(AttentionMetrics),
    /// Which tiles early exit leaves out.
    Tiles(TilesMetrics),
    /// Where memory goes.
    Memory(MemoryMetrics),
    /// A kind of a later version.
    #[serde(other)]
    Unknown,
}

impl Record {
    /// The line's `kind`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Train(_) => "train",
            Self::Valid(_) => "valid",
            Self::Sample(_) => "sample",
            Self::Length(_) => "length",
            Self::Attention(_) => "attention",
            Self::Tiles(_) => "tiles",
            Self::Memory(_) => "memory",
            Self::Unknown => "unknown",
        }
    }

    /// Optimizer steps taken; 0 for [`Self::Unknown`].
    pub fn step(&self) -> u64 {
        match self {
            Self::Train(metrics) => metrics.step,
            Self::Valid(metrics) => metrics.step,
            Self::Sample(metrics) => metrics.step,
            Self::Length(metrics) => metrics.step,
            Self::Attention(metrics) => metrics.step,
            Self::Tiles(metrics) => metrics.step,
            Self::Memory(metrics) => metrics.step,
            Self::Unknown => 0,
        }
    }
}

/// One optimizer step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainMetrics {
    /// Optimizer steps taken, this one included.
    pub step: u64,
    /// Mean cross-entropy over the step's valid tokens, in nats per token.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// Global norm of the gradient, before clipping.
    #[serde(deserialize_with = "null_is_nan")]
    pub grad_norm: f64,
    /// Learning rate of this step.
    #[serde(deserialize_with = "null_is_nan")]
    pub learning_rate: f64,
    /// Tokens per second over all ranks; NaN where the step is left out of the rate (warm-up, evaluation, saving).
    #[serde(deserialize_with = "null_is_nan")]
    pub tokens_per_second: f64,
    /// Wall time of the step, in milliseconds.
    #[serde(deserialize_with = "null_is_nan")]
    pub milliseconds: f64,
    /// On a GPU: time from the step's first to its last kernel, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_milliseconds: Option<f64>,
    /// On a GPU: time that the host was busy asking for the work, before it waited, in milliseconds. As long as it is
    /// below `device_milliseconds`, the GPU is the limit and not the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_milliseconds: Option<f64>,
    /// On several GPUs: time that this one stood still for others, communication that nothing hid, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exposed_milliseconds: Option<f64>,
    /// Ranks that shared the step; absent for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ranks: Option<usize>,
    /// Tokens trained on since the start of the run.
    pub tokens_seen: u64,
    /// Share of the device's peak rate, 0 to 1; absent for a device whose peak is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// Largest memory in use so far, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_memory_bytes: Option<u64>,
    /// Share of the causal attention tiles that early exit left out in the last micro-batch of the leading rank, 0 to 1,
    /// mean over layers and heads. Only of steps with a log line, and absent without early exit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tiles_skipped: Option<f64>,
}

/// Loss on a fixed number of held-out tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ValidMetrics {
    /// Optimizer steps taken.
    pub step: u64,
    /// Mean cross-entropy in nats per token.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// `exp(loss)`.
    #[serde(deserialize_with = "null_is_nan")]
    pub perplexity: f64,
    /// Loss in bits per byte of text; absent where the number of bytes is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits_per_byte: Option<f64>,
    /// Tokens that were predicted.
    pub tokens: u64,
}

/// Text that the model continued.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SampleMetrics {
    /// Optimizer steps taken.
    pub step: u64,
    /// What the model was given.
    pub prompt: String,
    /// What it wrote, without the prompt.
    pub text: String,
}

/// Length extrapolation: the same text, read with contexts of several lengths.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LengthMetrics {
    /// Optimizer steps taken.
    pub step: u64,
    /// Context length of training, in tokens.
    pub trained_length: usize,
    /// Context lengths, in tokens, ascending.
    pub lengths: Vec<usize>,
    /// Mean cross-entropy at each of them, in nats per token.
    #[serde(deserialize_with = "nulls_are_nan")]
    pub loss: Vec<f64>,
    /// Loss by position in the context, at the longest length; in order of position.
    #[serde(default)]
    pub loss_by_position: Vec<PositionLoss>,
}

/// Mean loss over a range of positions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PositionLoss {
    /// First position, from 0.
    pub start: usize,
    /// Position after the last.
    pub end: usize,
    /// Mean cross-entropy in nats per token.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
}

/// How far and where each head looks, on one piece of validation text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AttentionMetrics {
    /// Optimizer steps taken.
    pub step: u64,
    /// Length of the text, in tokens.
    pub context: usize,
    /// One entry per layer and head.
    pub heads: Vec<AttentionHead>,
}

/// One head of [`AttentionMetrics`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AttentionHead {
    /// Layer, from 0.
    pub layer: usize,
    /// Query head, from 0.
    pub head: usize,
    /// Share of the tiles on and below the diagonal that were computed, 0 to 1: what early exit leaves.
    #[serde(deserialize_with = "null_is_nan")]
    pub tiles_visited: f64,
    /// Mean distance from a query to the keys that it takes from, weighted by attention, in keys.
    #[serde(deserialize_with = "null_is_nan")]
    pub mean_reach: f64,
    /// The weights, down-sampled; absent for heads that are not shown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map: Option<AttentionMap>,
}

/// Which share of its causal tiles each head's early exit leaves out, as the model is configured, on held-out text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TilesMetrics {
    /// Optimizer steps taken.
    pub step: u64,
    /// Tokens that were looked at.
    pub tokens: usize,
    /// Length of the windows of text, in tokens.
    pub context: usize,
    /// Shares by layer and query head, 0 to 1.
    #[serde(deserialize_with = "nulls_in_rows_are_nan")]
    pub skipped: Vec<Vec<f64>>,
}

impl TilesMetrics {
    /// Mean over layers and heads, NaN if there are none.
    pub fn mean(&self) -> f64 {
        mean_share(&self.skipped)
    }
}

/// Mean of shares by layer and head, whose layers have the same number of tiles.
pub fn mean_share(shares: &[Vec<f64>]) -> f64 {
    let (sum, count) = shares.iter().flatten().fold((0.0, 0.0), |(sum, count), share| (sum + share, count + 1.0));
    sum / count
}

/// Attention weights, down-sampled to a small square.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AttentionMap {
    /// Cells per side.
    pub size: usize,
    /// `size * size` weights, row by row: row = query, column = key. A cell holds the weight that a query of its row
    /// gives to all keys of its column together, as a mean over these queries: 0 to 1.
    #[serde(deserialize_with = "nulls_are_nan")]
    pub weights: Vec<f32>,
}

/// Where memory goes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MemoryMetrics {
    /// Optimizer steps taken.
    pub step: u64,
    /// Largest memory in use so far, in bytes.
    pub peak_bytes: u64,
    /// Bytes by use: parameters, gradients, moments, activations, ...
    #[serde(default)]
    pub parts: BTreeMap<String, u64>,
}

fn null_is_nan<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

fn nulls_in_rows_are_nan<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<Vec<f64>>, D::Error> {
    let rows: Vec<Vec<Option<f64>>> = Vec::deserialize(deserializer)?;
    Ok(rows.into_iter().map(|row| row.into_iter().map(|value| value.unwrap_or(f64::NAN)).collect()).collect())
}

fn nulls_are_nan<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de> + From<f32>,
{
    let values: Vec<Option<T>> = Vec::deserialize(deserializer)?;
    Ok(values.into_iter().map(|value| value.unwrap_or_else(|| f32::NAN.into())).collect())
}
