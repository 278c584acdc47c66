//! Decoding: one query of each sequence against its cache, beside the rate at which the device copies memory; and, of a
//! trained model, whole tokens.
//!
//! A cache is read once for a token, so a device's memory bounds it. Calls go round through so many caches that none is
//! still in the device's own cache from the call before, as those of a model's other layers see to it.

use super::row::{self, CacheFigures, Row};
use super::trained::Trained;
use super::{Seconds, Settings, median, random, time};
use crate::trainer::available_memory;
use anyhow::{Result, bail, ensure};
use std::fmt;
use std::time::Instant;
use stickbreak_model::{Generator, Transformer, count};
use stickbreak_tensor::ops::attention::{
    SoftmaxSettings, StickBreakingSettings, softmax_decode, stick_breaking_decode,
};
use stickbreak_tensor::{DType, Device, Tensor};

/// Contexts unless given.
const GPU_CONTEXTS: [usize; 3] = [2048, 16384, 65536];
const CPU_CONTEXTS: [usize; 3] = [512, 2048, 8192];
/// Sequences, query heads, key heads, head size: one text, and many, with and without groups of heads.
const GPU_SHAPES: [[usize; 4]; 3] = [[1, 16, 16, 128], [16, 16, 16, 128], [16, 32, 8, 128]];
const CPU_SHAPES: [[usize; 4]; 1] = [[1, 8, 8, 64]];
/// Bytes of caches that calls go round through: far more than any level of a device's own cache. Of very small ones there
/// are fewer.
const COLD_BYTES: usize = 256 << 20;
const MOST_CACHES: usize = 256;
/// Bytes that are copied for the device's rate, on a GPU and on a CPU.
const COPIED_BYTES: [usize; 2] = [1 << 30, 256 << 20];

/// Queries, one of each sequence, and what they see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DecodeShape {
    sequences: usize,
    heads: usize,
    kv_heads: usize,
    context: usize,
    head_dim: usize,
}

impl DecodeShape {
    /// Bytes of keys and values.
    fn cache_bytes(&self, dtype: DType) -> usize {
        2 * self.sequences * self.context * self.kv_heads * self.head_dim * dtype.size()
    }

    fn flops(&self) -> f64 {
        4.0 * (self.sequences * self.heads * self.head_dim * self.context) as f64
    }
}

impl fmt::Display for DecodeShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sequences, heads, kv_heads, context, head_dim } = self;
        let heads = row::heads(*heads, *kv_heads);
        write!(f, "S{sequences} H{heads} L{context} D{head_dim}")
    }
}

/// Queries `[S, Hq, D]` and equal caches of keys and values `[S, L, Hkv, D]`.
struct Caches {
    shape: DecodeShape,
    q: Tensor,
    caches: Vec<[Tensor; 2]>,
}

impl Caches {
    fn new(shape: DecodeShape, q: Tensor, keys: Tensor, values: Tensor) -> Result<Self> {
        let copies = COLD_BYTES.div_ceil(shape.cache_bytes(q.dtype())).min(MOST_CACHES);
        let mut caches = vec![[keys.contiguous()?, values.contiguous()?]];
        for _ in 1..copies {
            caches.push([keys.copy()?, values.copy()?]);
        }
        Ok(Self { shape, q, caches })
    }

    fn random(settings: &Settings, shape: DecodeShape) -> Result<Self> {
        let DecodeShape { sequences, heads, kv_heads, context, head_dim } = shape;
        // A GPU says so itself.
        if let Some(free) = available_memory().filter(|_| settings.device == Device::Cpu) {
            let bytes = shape.cache_bytes(DType::F32);
            let [bytes_gib, free_gib] = [bytes as u64, free].map(|bytes| bytes as f64 / f64::from(1 << 30));
            ensure!(
                bytes as u64 <= free,
                "{shape}: a cache of {context} tokens takes {bytes_gib:.1} GiB, but {free_gib:.1} GiB are free"
            );
        }
        let cache = |seed| random(settings, [sequences, context, kv_heads, head_dim], seed);
        Self::new(shape, random(settings, [sequences, heads, head_dim], 1)?, cache(2)?, cache(3)?)
    }

    /// Seconds of one call.
    fn time(
        &self,
        settings: &Settings,
        decode: impl Fn(&Tensor, &Tensor, &Tensor) -> stickbreak_tensor::Result<()>,
    ) -> Result<Seconds> {
        let round = || Ok(self.caches.iter().try_for_each(|[keys, values]| decode(&self.q, keys, values))?);
        let (median, fastest) = time(settings, round)?;
        let calls = self.caches.len() as f64;
        Ok((median / calls, fastest / calls))
    }

    fn time_stick_breaking(&self, settings: &Settings, attention: StickBreakingSettings) -> Result<Seconds> {
        self.time(settings, |q, keys, values| stick_breaking_decode(q, keys, values, attention).map(drop))
    }
}

pub(super) fn measure(settings: &Settings, trained: Option<&Trained>, each: &mut dyn FnMut(Row)) -> Result<()> {
    let copy_rate = measure_copy(settings, each)?;
    match trained {
        Some(trained) => measure_trained(settings, trained, copy_rate, each),
        None => measure_random(settings, copy_rate, each),
    }
}

/// Bytes read and written in a second of copying.
fn measure_copy(settings: &Settings, each: &mut dyn FnMut(Row)) -> Result<f64> {
    let bytes = COPIED_BYTES[usize::from(settings.device == Device::Cpu)];
    let tensor = || Tensor::zeros_on([bytes / DType::F32.size()], DType::F32, settings.device);
    let (from, to) = (tensor()?, tensor()?);
    let seconds = time(settings, || Ok(to.copy_assign(&from)?))?;
    let rate = 2.0 * bytes as f64 / seconds.0;
    let mut row = Row::new("decode", "device copy", format!("{} MiB", bytes >> 20), seconds, 0.0, None);
    row.cache = Some(figures(2 * bytes, true, seconds, rate));
    each(row);
    Ok(rate)
}

fn figures(bytes: usize, read_whole: bool, (median, _): Seconds, copy_rate: f64) -> CacheFigures {
    let rate = bytes as f64 / median;
    CacheFigures {
        cache_bytes: bytes as u64,
        cache_is_read_whole: read_whole,
        cache_gigabytes_per_second: rate / 1e9,
        share_of_copy_rate: rate / copy_rate,
    }
}

/// What rows are made with.
#[derive(Clone, Copy)]
struct Basis {
    shape: DecodeShape,
    layers: usize,
    dtype: DType,
    copy_rate: f64,
}

impl Basis {
    fn row(&self, name: String, early_exit_bits: u32, seconds: Seconds) -> Row {
        let Self { shape, layers, dtype, copy_rate } = *self;
        let flops = layers as f64 * shape.flops();
        let bytes = layers * shape.cache_bytes(dtype);
        let row = Row::new("decode", name, row::of_layers(shape, layers), seconds, flops, Some(shape.sequences));
        Row { cache: Some(figures(bytes, early_exit_bits == 0, seconds, copy_rate)), ..row }
    }
}

fn measure_random(settings: &Settings, copy_rate: f64, each: &mut dyn FnMut(Row)) -> Result<()> {
    let (contexts, shapes) = match settings.device {
        Device::Cpu => (&CPU_CONTEXTS[..], &CPU_SHAPES[..]),
        Device::Cuda(_) => (&GPU_CONTEXTS[..], &GPU_SHAPES[..]),
    };
    for &context in settings.lengths.as_deref().unwrap_or(contexts) {
        if !(2..=i32::MAX as usize).contains(&context) {
            bail!("--lengths has {context}, but a context has 2 to {} tokens", i32::MAX);
        }
        for &[sequences, heads, kv_heads, head_dim] in shapes {
            let caches = Caches::random(settings, DecodeShape { sequences, heads, kv_heads, context, head_dim })?;
            let basis = Basis { shape: caches.shape, layers: 1, dtype: caches.q.dtype(), copy_rate };
            let scale = 1.0 / (head_dim as f64).sqrt();
            let kinds = [("stick-breaking dense", 0), ("stick-breaking early exit (flatters)", 24)];
            for (name, early_exit_bits) in kinds.into_iter().filter(|(_, bits)| *bits == 0 || !settings.dense_only) {
                let attention = StickBreakingSettings { scale, attend_current: false, early_exit_bits };
                each(basis.row(name.into(), early_exit_bits, caches.time_stick_breaking(settings, attention)?));
            }
            let softmax = SoftmaxSettings { scale, alibi_slopes: None };
            let seconds = caches.time(settings, |q, k, v| softmax_decode(q, k, v, &softmax).map(drop))?;
            each(basis.row("softmax".into(), 0, seconds));
        }
    }
    Ok(())
}

/// Each layer's attention for the last token of a text, and whole tokens.
fn measure_trained(settings: &Settings, trained: &Trained, copy_rate: f64, each: &mut dyn FnMut(Row)) -> Result<()> {
    trained.expect_stick_breaking()?;
    let kinds = trained.kinds();
    let contexts = if settings.device == Device::Cpu { &CPU_CONTEXTS } else { &GPU_CONTEXTS };
    let contexts = trained.available(settings, contexts)?;
    for &context in &contexts {
        let sums = time_layers(settings, trained, context, kinds.each_ref().map(|(_, bits)| *bits))?;
        let config = trained.loaded.model.config();
        let (heads, kv_heads, head_dim) = (config.num_heads, config.kv_heads(), config.head_dim());
        let shape = DecodeShape { sequences: 1, heads, kv_heads, context, head_dim };
        let dtype = trained.loaded.model.arena().values().dtype();
        let basis = Basis { shape, layers: config.num_layers, dtype, copy_rate };
        for ((kind, bits), seconds) in kinds.iter().zip(sums) {
            each(basis.row(format!("{}, {kind}, attention", trained.name), *bits, seconds));
        }
    }
    for (kind, bits) in kinds {
        let model = trained.loaded.with_early_exit(bits)?;
        for &context in &contexts {
            let (ids, _) = trained.row(context, context)?;
            measure_tokens(settings, &model, &ids.to_vec::<u32>()?, &format!("{}, {kind}", trained.name), each)?;
        }
    }
    Ok(())
}

/// Seconds of one token's attention, the sum of all layers, for each of some early exits.
fn time_layers(settings: &Settings, trained: &Trained, context: usize, bits: [u32; 2]) -> Result<[Seconds; 2]> {
    let model = &trained.loaded.model;
    let (ids, packing) = trained.row(context, context)?;
    let mut sums = [(0.0, 0.0); 2];
    model.visit_attention(&ids, &packing, |_, [q, k, v]| -> Result<()> {
        let &[_, heads, head_dim] = &q.shape()[..] else { bail!("q has the shape {:?}", q.shape()) };
        let kv_heads = k.dim(1)?;
        let shape = DecodeShape { sequences: 1, heads, kv_heads, context, head_dim };
        let cache = |x: &Tensor| x.reshape([1, context, kv_heads, head_dim]);
        let caches = Caches::new(shape, q.narrow(0, context - 1, 1)?.copy()?, cache(&k)?, cache(&v)?)?;
        for (sum, early_exit_bits) in sums.iter_mut().zip(bits) {
            let (scale, attend_current) = (model.config().attention_scale(), model.config().attend_current);
            let attention = StickBreakingSettings { scale, attend_current, early_exit_bits };
            let (median, fastest) = caches.time_stick_breaking(settings, attention)?;
            *sum = (sum.0 + median, sum.1 + fastest);
        }
        Ok(())
    })?;
    Ok(sums)
}

/// Whole tokens at the end of a text, and the pass over the text before them. Wall time: the host waits for each token's
/// logits, as it has to before it chooses the next one.
fn measure_tokens(
    settings: &Settings,
    model: &Transformer,
    text: &[u32],
    name: &str,
    each: &mut dyn FnMut(Row),
) -> Result<()> {
    // At least half of the text is the prompt.
    let pushed = (settings.warm_up + settings.repeats).min(text.len() / 2);
    let (prompt, rest) = text.split_at(text.len() - pushed);
    let mut prefill = Vec::new();
    let mut generator = None;
    for _ in 0..=settings.warm_up.min(1) {
        drop(generator.take());
        let started = Instant::now();
        generator = Some(Generator::new(model, prompt)?);
        prefill.push(started.elapsed().as_secs_f64());
    }
    let Some(mut generator) = generator else { return Ok(()) };
    let mut seconds = Vec::new();
    for (number, &token) in rest.iter().enumerate() {
        let started = Instant::now();
        generator.push(token)?;
        if number >= settings.warm_up.min(pushed - 1) {
            seconds.push(started.elapsed().as_secs_f64());
        }
    }
    let config = model.config();
    // A forward pass is a third of a training step; its causal half is that of the square.
    let flops = count::training_flops(config, prompt.len(), (prompt.len() as f64).powi(2)) / 3.0;
    // The last time, after a first one that made ready what it needs.
    let last = prefill[prefill.len() - 1];
    let shape = format!("{} tokens", prompt.len());
    each(Row::new("decode", format!("{name}, prompt"), shape, (last, last), flops, Some(prompt.len())));
    let width = (config.num_heads * config.head_dim() * config.num_layers) as f64;
    let flops = 2.0 * count::parameters(config).matrix as f64 + 4.0 * width * text.len() as f64;
    let times = (median(&mut seconds), seconds[0]);
    let shape = format!("after {} tokens", prompt.len());
    each(Row::new("decode", format!("{name}, token"), shape, times, flops, Some(1)));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_shares_are_those_of_the_cache() {
        let shape = DecodeShape { sequences: 2, heads: 8, kv_heads: 4, context: 1000, head_dim: 64 };
        assert_eq!(shape.to_string(), "S2 H8/4 L1000 D64");
        // Keys and values of 2 sequences x 1000 tokens x 4 heads x 64.
        assert_eq!(shape.cache_bytes(DType::BF16), 2 * 2 * 1000 * 4 * 64 * 2);
        let basis = Basis { shape, layers: 3, dtype: DType::BF16, copy_rate: 4e9 };
        let row = basis.row("dense".into(), 0, (2e-3, 1e-3));
        let cache = row.cache.unwrap();
        assert!(cache.cache_is_read_whole);
        assert!(!basis.row("early exit".into(), 24, (2e-3, 1e-3)).cache.unwrap().cache_is_read_whole);
        assert_eq!(cache.cache_bytes, 3 * 2_048_000);
        assert!((cache.cache_gigabytes_per_second - 3.072).abs() < 1e-9);
        assert!((cache.share_of_copy_rate - 0.768).abs() < 1e-9);
        assert_eq!((row.tokens_per_second, row.shape.as_str()), (Some(1000.0), "3 x (S2 H8/4 L1000 D64)"));
    }

    #[test]
    fn calls_go_round_through_more_memory_than_a_cache_holds() {
        let shape = DecodeShape { sequences: 1, heads: 2, kv_heads: 2, context: 1 << 16, head_dim: 64 };
        let [keys, values] = [1.0, 2.0].map(|x| Tensor::full(x, [1, 1 << 16, 2, 64], DType::F32));
        let caches = Caches::new(shape, Tensor::zeros([1, 2, 64], DType::F32), keys, values).unwrap();
        assert_eq!(caches.caches.len(), 4, "of 64 MiB each");
        let storage = |index: usize| caches.caches[index][1].read::<f32>().unwrap().as_ptr();
        assert!((1..4).all(|index| storage(index) != storage(0)));
        assert_eq!(caches.caches[3][1].narrow(1, 5, 1).unwrap().to_f64_vec().unwrap(), vec![2.0; 128]);
    }
}
