//! What a run will need of memory, term by term, before it starts.

use crate::config::{GradientType, RunConfig};
use crate::device;
use anyhow::{Error, Result, bail};
use std::collections::BTreeMap;
use stickbreak_kernels::KernelError;
use stickbreak_model::{AttentionKind, ModelConfig, count};
use stickbreak_tensor::{DType, Device, TensorError};

/// Bytes by purpose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Estimate {
    pub(super) parts: BTreeMap<String, u64>,
    ranks: usize,
}

/// What the attention keeps of the sticks for its backward pass is at most this share of q, k, v and o; what would be
/// more is computed again.
const STICK_STATE_SHARE: u64 = 8;
/// Tokens whose logits a GPU holds at once.
const LOGITS_CHUNK: u64 = 4096;
/// Workspaces of the attention's backward pass (1 GiB at most) and of the matrix products, and what the pool rounds up.
const GPU_OVERHEAD_BYTES: u64 = 1280 << 20;

/// Elements that a step holds, by what they are.
struct Elements {
    parameters: u64,
    /// Saved between forward and backward.
    activations: u64,
    /// Values and gradients of the block at work.
    in_flight: u64,
    tokens: u64,
}

fn elements(config: &RunConfig, ranks: usize) -> Elements {
    let model = &config.model;
    let tokens = (config.micro_batch(ranks) * config.train.sequence_length) as u64;
    let (c, f) = (model.hidden_size as u64, model.intermediate_size as u64);
    let (q, kv) = ((model.num_heads * model.head_dim()) as u64, (model.kv_heads() * model.head_dim()) as u64);
    // Saved by a block: x twice, its norms, q, k, v, o; gate, up and their product.
    let block = tokens * (4 * c + 2 * q + 2 * kv + 3 * f);
    let layers = model.num_layers as u64;
    let activations = if config.train.recompute { layers * tokens * c + block } else { layers * block };
    // Gradients in flight: a block's widest values and their gradients.
    let in_flight = tokens * (2 * c + 3 * f.max(q + 2 * kv));
    Elements { parameters: count::parameters(model).total as u64, activations, in_flight, tokens }
}

/// The memory of a step at full shape on each of so many ranks.
pub(super) fn estimate(config: &RunConfig, device: Device, dtype: DType, ranks: usize) -> Estimate {
    let parts = match device {
        Device::Cpu => on_cpu(config, dtype, ranks),
        Device::Cuda(_) => on_gpu(config, dtype, ranks),
    };
    Estimate { parts: parts.into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect(), ranks }
}

fn on_cpu(config: &RunConfig, dtype: DType, ranks: usize) -> Vec<(&'static str, u64)> {
    let (model, size) = (&config.model, dtype.size() as u64);
    let Elements { parameters, activations, in_flight, tokens } = elements(config, ranks);
    let (vocabulary, c) = (model.vocab_size as u64, model.hidden_size as u64);
    let head = tokens * c + 2 * (vocabulary * c) + 512 * vocabulary;
    vec![
        ("parameters and gradients", 2 * parameters * size),
        ("optimizer moments", 2 * parameters.div_ceil(ranks as u64) * size),
        ("activations", activations * size),
        ("output projection and loss", head * size),
        ("gradients of activations", in_flight * size),
    ]
}

/// What NCCL's channels take beside the run's tensors, in bytes; measured on two H100: 843 and 862 MiB.
pub(crate) const NCCL_BYTES: u64 = 864 << 20;

fn on_gpu(config: &RunConfig, dtype: DType, ranks: usize) -> Vec<(&'static str, u64)> {
    let (model, size) = (&config.model, dtype.size() as u64);
    let Elements { parameters, activations, in_flight, tokens } = elements(config, ranks);
    let (vocabulary, c) = (model.vocab_size as u64, model.hidden_size as u64);
    // Of what the optimizer keeps each rank has a shard.
    let shard = parameters.div_ceil(ranks as u64);
    // Beside bf16 weights the optimizer keeps float32 ones.
    let weights = parameters * size + if dtype == DType::BF16 { 4 * shard } else { 0 };
    let rounded = ranks > 1 && config.distributed.gradient_dtype == GradientType::Bf16;
    let on_the_wire = if rounded { parameters * 2 } else { 0 };
    // A chunk's logits; hidden states and their gradient; the weight's in float32.
    let head = LOGITS_CHUNK.min(tokens) * vocabulary * size + 2 * tokens * c * size + 4 * vocabulary * c;
    let kept_layers = if config.train.recompute { 1 } else { model.num_layers as u64 };
    vec![
        ("weights", weights),
        ("gradients of weights", parameters * 4 + on_the_wire),
        ("optimizer moments", shard * 8),
        ("activations", activations * size),
        ("state of the attention", kept_layers * attention_state(model, tokens, size)),
        ("output projection and loss", head),
        ("gradients of activations", in_flight * size),
        ("workspaces", GPU_OVERHEAD_BYTES),
        ("communication", if ranks > 1 { NCCL_BYTES } else { 0 }),
    ]
}

/// What a run in bf16 needs of each of so many GPUs, by purpose: the terms of the check before a run.
pub(crate) fn gpu_memory_terms(config: &RunConfig, ranks: usize) -> Vec<(&'static str, u64)> {
    on_gpu(config, DType::BF16, ranks)
}

/// Bytes of one layer's attention state: a float32 a query and head, and for stick-breaking the sticks.
fn attention_state(model: &ModelConfig, tokens: u64, size: u64) -> u64 {
    let (heads, kv_heads, d) = (model.num_heads as u64, model.kv_heads() as u64, model.head_dim() as u64);
    let rows = 4 * tokens * heads;
    match model.attention {
        AttentionKind::StickBreaking => rows + tokens * 2 * (heads + kv_heads) * d * size / STICK_STATE_SHARE,
        _ => rows,
    }
}

impl Estimate {
    pub(super) fn total(&self) -> u64 {
        self.parts.values().sum()
    }

    /// Refuses a run that the device's free memory cannot hold, naming the largest term and a batch that fits.
    pub(super) fn check_fits(&self, config: &RunConfig, device: Device, dtype: DType) -> Result<()> {
        match free_memory(device)? {
            Some(available) => self.check_within(config, device, dtype, available),
            None => Ok(()),
        }
    }

    fn check_within(&self, config: &RunConfig, device: Device, dtype: DType, available: u64) -> Result<()> {
        if self.total() <= available {
            return Ok(());
        }
        let (largest, bytes) = self.largest();
        let fits = |smaller: &RunConfig| estimate(smaller, device, dtype, self.ranks).total() <= available;
        bail!(
            "this run needs about {}, but {} are free on {device}; the largest term is {largest} with {}. {}",
            super::mib(self.total()),
            super::mib(available),
            super::mib(bytes),
            advice(config, self.ranks, fits)
        );
    }

    fn largest(&self) -> (&str, u64) {
        let (name, bytes) = self.parts.iter().max_by_key(|(_, bytes)| **bytes).expect("has parts");
        (name, *bytes)
    }

    /// A trial step's error; if memory ran out although the estimate fitted, with the largest term and what may fit.
    pub(super) fn explain_out_of_memory(&self, error: Error, config: &RunConfig) -> Error {
        if !is_out_of_memory(&error) {
            return error;
        }
        let (largest, bytes) = self.largest();
        // The estimate was too low, so nothing but a smaller batch is known to help.
        error.context(format!(
            "out of memory in a trial step at full shape, although {} were estimated; the largest term is {largest} with \
             {}. {}",
            super::mib(self.total()),
            super::mib(bytes),
            advice(config, self.ranks, |smaller| smaller.micro_batch(self.ranks) <= config.micro_batch(self.ranks) / 2)
        ))
    }
}

/// The largest smaller micro-batch that `fits`, in words.
fn advice(config: &RunConfig, ranks: usize, fits: impl Fn(&RunConfig) -> bool) -> String {
    let fitting = (1..config.micro_batch(ranks)).rev().find(|&micro| {
        let mut smaller = config.clone();
        smaller.train.micro_batch = Some(micro);
        config.sequences_per_rank(ranks).is_multiple_of(micro) && fits(&smaller)
    });
    match fitting {
        Some(micro) => format!("train.micro_batch = {micro} fits"),
        None if config.train.recompute => "no micro-batch fits; a smaller model may".to_owned(),
        None => "no micro-batch fits; train.recompute = true or a smaller model may".to_owned(),
    }
}

/// Whether an error is the device's refusal of memory.
fn is_out_of_memory(error: &Error) -> bool {
    let refused = |kernel: &KernelError| {
        matches!(kernel, KernelError::Cuda { doing, why } if doing.starts_with("allocating")
            || why.to_ascii_lowercase().contains("out of memory"))
    };
    // A transparent error is not in the chain of causes itself.
    error.chain().any(|cause| match cause.downcast_ref::<TensorError>() {
        Some(TensorError::Kernel(kernel)) => refused(kernel),
        _ => cause.downcast_ref::<KernelError>().is_some_and(refused) || cause.to_string().contains("allocating "),
    })
}

/// Bytes that this process can have on a device, what its pool holds included; `None` if nobody says so.
fn free_memory(device: Device) -> Result<Option<u64>> {
    Ok(match device::queue(device)? {
        None => available_memory(),
        Some(queue) => {
            let memory = queue.gpu().memory()?;
            Some(memory.free + memory.reserved)
        }
    })
}

/// Bytes that the system can still hand out, where it says so.
pub(crate) fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CUDA: Device = Device::Cuda(0);

    fn config(changes: &[&str]) -> RunConfig {
        let changes: Vec<String> = changes.iter().map(|&change| change.to_owned()).collect();
        RunConfig::parse(
            "name = 'm'\n[model]\nvocab_size = 257\nhidden_size = 64\nintermediate_size = 128\nnum_layers = 4\n\
             num_heads = 4\n[data]\n[train]\nsteps = 1\nsequence_length = 512\nbatch_tokens = 32768\n",
            &changes,
        )
        .unwrap()
    }

    #[test]
    fn a_run_too_large_names_its_largest_term_and_a_batch_that_fits() {
        let config = config(&[]);
        let all = estimate(&config, Device::Cpu, DType::F32, 1);
        all.check_within(&config, Device::Cpu, DType::F32, all.total()).unwrap();
        let message = all.check_within(&config, Device::Cpu, DType::F32, all.total() / 3).unwrap_err().to_string();
        assert!(message.contains("activations") && message.contains("train.micro_batch = 16 fits"), "{message}");
    }

    #[test]
    fn a_gpus_terms_are_those_of_bf16_with_float32_masters() {
        let config = config(&[]);
        let n = count::parameters(&config.model).total as u64;
        let parts = estimate(&config, CUDA, DType::BF16, 1).parts;
        assert_eq!(parts["weights"], 6 * n);
        assert_eq!(parts["gradients of weights"], 4 * n);
        assert_eq!(parts["optimizer moments"], 8 * n);
        // 4 layers, 32768 tokens, 4 heads of 16: the remainder, and an eighth of q, k, v and o.
        assert_eq!(parts["state of the attention"], 4 * (32768 * 4 * 4 + 32768 * 4 * 64 * 2 / 8));
        let of_f32 = estimate(&config, CUDA, DType::F32, 1).parts;
        assert_eq!(of_f32["weights"], 4 * n);
        assert_eq!(of_f32["activations"], 2 * parts["activations"]);
        // Two ranks share moments and masters.
        let shared = estimate(&config, CUDA, DType::BF16, 2).parts;
        assert_eq!((shared["weights"], shared["optimizer moments"]), (2 * n + 2 * n, 4 * n));
        let rounded = estimate(&self::config(&["distributed.gradient_dtype=bf16"]), CUDA, DType::BF16, 2).parts;
        assert_eq!(rounded["gradients of weights"], shared["gradients of weights"] + 2 * n);
        let cpu = estimate(&config, Device::Cpu, DType::F32, 1).parts;
        assert_eq!(cpu["activations"], of_f32["activations"], "the same tensors are saved everywhere");
    }

    #[test]
    fn recomputing_keeps_one_block_and_a_smaller_batch_fits_less_memory() {
        let (kept, recomputed) = (config(&[]), config(&["train.recompute=true"]));
        let bytes = |config: &RunConfig, part: &str| estimate(config, CUDA, DType::BF16, 1).parts[part];
        assert!(bytes(&recomputed, "activations") < bytes(&kept, "activations") / 2);
        assert_eq!(bytes(&recomputed, "state of the attention"), bytes(&kept, "state of the attention") / 4);
        let all = estimate(&kept, CUDA, DType::BF16, 1);
        let available = GPU_OVERHEAD_BYTES + (all.total() - GPU_OVERHEAD_BYTES) / 3;
        let message = all.check_within(&kept, CUDA, DType::BF16, available).unwrap_err().to_string();
        assert!(message.contains("free on cuda:0") && message.contains("train.micro_batch = 16 fits"), "{message}");
        let message = all.check_within(&kept, CUDA, DType::BF16, 1 << 20).unwrap_err().to_string();
        assert!(message.contains("no micro-batch fits; train.recompute"), "{message}");
    }

    #[test]
    fn a_failed_allocation_of_the_trial_step_is_explained_and_other_errors_are_not() {
        let config = config(&[]);
        let all = estimate(&config, CUDA, DType::BF16, 1);
        let refused = KernelError::Cuda { doing: "allocating 12 bytes of device memory".into(), why: "no".into() };
        for error in [Error::from(refused.clone()), Error::from(TensorError::from(refused))] {
            let message = format!("{:#}", all.explain_out_of_memory(error, &config));
            assert!(message.contains("the largest term is") && message.contains("train.micro_batch = 32"), "{message}");
            assert!(message.contains("allocating 12 bytes"), "{message}");
        }
        let other = all.explain_out_of_memory(Error::msg("a broken disk"), &config);
        assert_eq!(format!("{other:#}"), "a broken disk");
    }

    #[test]
    fn the_configs_for_one_card_fit_80_gb() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
        for name in ["125m.toml", "350m.toml", "1b.toml", "books-110m.toml"] {
            let config = RunConfig::load(&folder.join(name), &[]).unwrap();
            let total = estimate(&config, CUDA, DType::BF16, 1).total();
            assert!(total < 76_000_000_000, "{name} needs {}", super::super::mib(total));
        }
    }
}
