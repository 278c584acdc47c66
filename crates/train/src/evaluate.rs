//! Losses without gradients: validation, perplexity, and the length-extrapolation curve.

use crate::data::loader::bits_per_byte;
use crate::data::{Batch, Loader};
use crate::distributed::Communicator;
use crate::distributed::single::Single;
use crate::metrics::{LengthMetrics, PositionLoss, ValidMetrics};
use crate::signal::StopFlag;
use anyhow::{Result, bail};
use stickbreak_model::{Packing, Transformer};
use stickbreak_tensor::{Device, Tensor};

/// Sum of losses over tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LossSum {
    /// Sum in nats.
    pub nats: f64,
    /// Predicted tokens.
    pub tokens: u64,
    /// Bytes of text that they stand for, where the tokenizer is known.
    pub text_bytes: Option<u64>,
}

impl LossSum {
    /// Mean loss per predicted token in nats.
    pub fn mean(&self) -> f64 {
        self.nats / self.tokens.max(1) as f64
    }

    /// e to the mean loss.
    pub fn perplexity(&self) -> f64 {
        self.mean().exp()
    }

    /// Bits per byte of text; the measure that does not depend on the tokenizer.
    pub fn bits_per_byte(&self) -> Option<f64> {
        self.text_bytes.filter(|&bytes| bytes > 0).map(|bytes| bits_per_byte(self.nats, bytes))
    }

    /// As a line of `metrics.jsonl`.
    pub fn metrics(&self, step: u64) -> ValidMetrics {
        ValidMetrics {
            step,
            loss: self.mean(),
            perplexity: self.perplexity(),
            bits_per_byte: self.bits_per_byte(),
            tokens: self.tokens,
        }
    }
}

/// A batch's tensors.
#[derive(Debug, Clone)]
pub struct BatchTensors {
    /// u32 `[T]`.
    pub ids: Tensor,
    /// i32 `[T]`.
    pub labels: Tensor,
    /// Where documents start.
    pub packing: Packing,
}

impl BatchTensors {
    /// Moves a batch into tensors on a device.
    ///
    /// # Errors
    /// If the device has not the memory; never for a batch of the loader on a CPU.
    pub fn new(batch: &Batch, device: Device) -> Result<Self> {
        let tokens = batch.ids.len();
        Ok(Self {
            ids: Tensor::from_slice(&batch.ids, [tokens])?.to_device(device)?,
            labels: Tensor::from_slice(&batch.labels, [tokens])?.to_device(device)?,
            packing: Packing::new(&batch.cu_seqlens)?.to_device(device)?,
        })
    }
}

/// Tokens that go through the model at once in an evaluation, unless one window is longer.
pub(crate) const TOKENS_AT_ONCE: usize = 8192;

/// The loss on a fixed sample of `max_tokens` tokens, spread over the stream (or on the whole stream), in windows of the
/// loader's length; `None` if `stop` was set meanwhile.
///
/// # Errors
/// If tokens cannot be read or the model cannot run.
pub fn loss(model: &Transformer, loader: &Loader, max_tokens: Option<u64>, stop: &StopFlag) -> Result<Option<LossSum>> {
    shared_loss(model, loader, max_tokens, stop, &Single)
}

/// [`loss()`] by ranks that share the work and have the same model: the same sum on each, bit for bit that of one rank.
/// `None` if `stop` was set on any of them meanwhile. Every rank calls it.
///
/// # Errors
/// As [`loss()`], or if another rank is lost.
pub fn shared_loss(
    model: &Transformer,
    loader: &Loader,
    max_tokens: Option<u64>,
    stop: &StopFlag,
    communicator: &dyn Communicator,
) -> Result<Option<LossSum>> {
    let batches: Batches<'_> = match max_tokens.filter(|&tokens| tokens < loader.stream().len()) {
        Some(tokens) => Box::new(loader.spread(windows_at_once(loader), loader.sequence_length(), tokens)?),
        None => Box::new(loader.sequential(windows_at_once(loader), None)),
    };
    let (rank, ranks) = (communicator.rank(), communicator.ranks());
    let mine = Box::new(batches.skip(rank).step_by(ranks));
    let mut values = vec![0.0];
    let finished = for_each_loss(model, mine, stop, |batch, losses| {
        let text_bytes = batch.text_bytes.map_or(-1.0, |bytes| bytes as f64);
        values.extend([losses.iter().sum::<f64>(), batch.valid_tokens as f64, text_bytes]);
    })?;
    values[0] = f64::from(finished);
    let told = communicator.gather_values("validation loss", &values)?;
    if told.iter().any(|values| values[0] == 0.0) {
        return Ok(None);
    }
    // In the order of the batches, whoever had them: sums of floats depend on it.
    let by_rank: Vec<Vec<&[f64]>> = told.iter().map(|values| values[1..].chunks(3).collect()).collect();
    let count: usize = by_rank.iter().map(Vec::len).sum();
    let mut sum = LossSum { text_bytes: Some(0), ..LossSum::default() };
    for batch in 0..count {
        let [nats, tokens, text_bytes] = by_rank[batch % ranks][batch / ranks] else { unreachable!("chunks of three") };
        sum.nats += nats;
        sum.tokens += *tokens as u64;
        sum.text_bytes = sum.text_bytes.filter(|_| *text_bytes >= 0.0).map(|sum| sum + *text_bytes as u64);
    }
    Ok(Some(sum))
}

type Batches<'a> = Box<dyn Iterator<Item = crate::data::Result<Batch>> + 'a>;

pub(crate) fn windows_at_once(loader: &Loader) -> usize {
    (TOKENS_AT_ONCE / loader.sequence_length()).max(1)
}

/// Calls `each` with every batch and its tokens' losses; false if stopped before the end.
fn for_each_loss(
    model: &Transformer,
    batches: Batches<'_>,
    stop: &StopFlag,
    mut each: impl FnMut(&Batch, &[f64]),
) -> Result<bool> {
    for batch in batches {
        if stop.is_set() {
            return Ok(false);
        }
        let batch = batch?;
        let tensors = BatchTensors::new(&batch, model.device())?;
        let losses = model.token_losses(&tensors.ids, &tensors.labels, &tensors.packing)?.to_f64_vec()?;
        each(&batch, &losses);
    }
    Ok(true)
}

/// Length extrapolation: the loss on the same text at each context length, and the loss by position at the longest.
/// `open` gives the text in windows of a length; `None` if `stop` was set meanwhile.
///
/// # Errors
/// If a length is longer than the text, tokens cannot be read or the model cannot run.
pub fn length_extrapolation(
    model: &Transformer,
    open: impl Fn(usize) -> Result<Loader>,
    lengths: &[usize],
    max_tokens: u64,
    trained_length: usize,
    step: u64,
    stop: &StopFlag,
) -> Result<Option<LengthMetrics>> {
    let Some(&longest) = lengths.iter().max() else { bail!("no context lengths given") };
    let mut metrics = LengthMetrics {
        step,
        trained_length,
        lengths: lengths.to_vec(),
        loss: Vec::new(),
        loss_by_position: Vec::new(),
    };
    let buckets = position_buckets(longest);
    let mut sums = vec![LossSum::default(); buckets.len()];
    for &length in lengths {
        let loader = open(length)?;
        let mut total = LossSum::default();
        // The same tokens for every length: blocks of the longest, spread over the text.
        let batches: Batches<'_> = if longest.is_multiple_of(length) {
            Box::new(loader.spread(windows_at_once(&loader), longest, max_tokens)?)
        } else {
            bail!("context length {length} does not divide the longest one, {longest}, so the texts would differ");
        };
        let finished = for_each_loss(model, batches, stop, |batch, losses| {
            total.nats += losses.iter().sum::<f64>();
            total.tokens += batch.valid_tokens as u64;
            if length == longest {
                add_by_position(batch, losses, &buckets, &mut sums);
            }
        })?;
        if !finished {
            return Ok(None);
        }
        metrics.loss.push(total.mean());
    }
    metrics.loss_by_position = std::iter::zip(&buckets, &sums)
        .filter(|(_, sum)| sum.tokens > 0)
        .map(|(&(start, end), sum)| PositionLoss { start, end, loss: sum.mean() })
        .collect();
    Ok(Some(metrics))
}

/// Ranges of positions that double in width: [0, 16), [16, 32), [32, 64), ...
fn position_buckets(length: usize) -> Vec<(usize, usize)> {
    let mut buckets = vec![(0, 16.min(length))];
    while let Some(&(_, end)) = buckets.last().filter(|&&(_, end)| end < length) {
        buckets.push((end, (2 * end).min(length)));
    }
    buckets
}

/// Adds the losses of a batch to the buckets of their positions within their documents.
fn add_by_position(batch: &Batch, losses: &[f64], buckets: &[(usize, usize)], sums: &mut [LossSum]) {
    for document in batch.cu_seqlens.windows(2) {
        let (start, end) = (document[0] as usize, document[1] as usize);
        for token in start..end {
            if batch.labels[token] < 0 {
                continue;
            }
            let bucket = buckets.partition_point(|&(_, end)| end <= token - start);
            if let Some(sum) = sums.get_mut(bucket) {
                sum.nats += losses[token];
                sum.tokens += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn position_buckets_cover_every_position_once() {
        for length in [1, 15, 16, 17, 100, 4096] {
            let buckets = position_buckets(length);
            assert_eq!(buckets[0].0, 0);
            assert_eq!(buckets.last().unwrap().1, length);
            assert!(buckets.windows(2).all(|w| w[0].1 == w[1].0));
        }
    }
}
