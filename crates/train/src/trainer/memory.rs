//! What a run will need of memory, term by term, before it starts.

use crate::config::RunConfig;
use anyhow::{Result, bail};
use std::collections::BTreeMap;
use stickbreak_model::count;
use stickbreak_tensor::DType;

/// Bytes by purpose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Estimate {
    pub(super) parts: BTreeMap<String, u64>,
}

/// The memory of a step at full shape.
pub(super) fn estimate(config: &RunConfig) -> Estimate {
    let model = &config.model;
    let size = DType::from(config.dtype).size() as u64;
    let parameters = count::parameters(model).total as u64;
    let tokens = (config.micro_batch() * config.train.sequence_length) as u64;
    let (c, f) = (model.hidden_size as u64, model.intermediate_size as u64);
    let (q, kv) = ((model.num_heads * model.head_dim()) as u64, (model.kv_heads() * model.head_dim()) as u64);
    // Saved by a block: x twice, its norms, q, k, v, o; gate, up and their product.
    let block = tokens * (4 * c + 2 * q + 2 * kv + 3 * f);
    let layers = model.num_layers as u64;
    let activations = if config.train.recompute { layers * tokens * c + block } else { layers * block };
    let head = tokens * c + 2 * (model.vocab_size as u64 * c) + 512 * model.vocab_size as u64;
    // Gradients in flight: a block's widest values and their gradients.
    let in_flight = tokens * (2 * c + 3 * f.max(q + 2 * kv));
    let parts = [
        ("parameters and gradients", 2 * parameters * size),
        ("optimizer moments", 2 * parameters * size),
        ("activations", activations * size),
        ("output projection and loss", head * size),
        ("gradients of activations", in_flight * size),
    ];
    Estimate { parts: parts.map(|(name, bytes)| (name.to_owned(), bytes)).into() }
}

impl Estimate {
    pub(super) fn total(&self) -> u64 {
        self.parts.values().sum()
    }

    /// Refuses a run that this machine's free memory cannot hold, naming the largest term and a batch that fits.
    pub(super) fn check_fits(&self, config: &RunConfig) -> Result<()> {
        match available_memory() {
            Some(available) => self.check_within(config, available),
            None => Ok(()),
        }
    }

    fn check_within(&self, config: &RunConfig, available: u64) -> Result<()> {
        if self.total() <= available {
            return Ok(());
        }
        let (largest, bytes) = self.parts.iter().max_by_key(|(_, bytes)| **bytes).expect("has parts");
        let fitting = (1..config.micro_batch()).rev().find(|&micro| {
            let mut smaller = config.clone();
            smaller.train.micro_batch = Some(micro);
            config.sequences_per_step().is_multiple_of(micro) && estimate(&smaller).total() <= available
        });
        let advice = match fitting {
            Some(micro) => format!("train.micro_batch = {micro} fits"),
            None => "no micro-batch fits; train.recompute = true or a smaller model may".to_owned(),
        };
        bail!(
            "this run needs about {}, but {} are free; the largest term is {largest} with {}. {advice}",
            super::mib(self.total()),
            super::mib(available),
            super::mib(*bytes)
        );
    }
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

    #[test]
    fn a_run_too_large_names_its_largest_term_and_a_batch_that_fits() {
        let config = RunConfig::parse(
            "name = 'm'\n[model]\nvocab_size = 257\nhidden_size = 64\nintermediate_size = 128\nnum_layers = 4\n\
             num_heads = 4\n[data]\n[train]\nsteps = 1\nsequence_length = 512\nbatch_tokens = 32768\n",
            &[],
        )
        .unwrap();
        let all = estimate(&config);
        all.check_within(&config, all.total()).unwrap();
        let message = all.check_within(&config, all.total() / 3).unwrap_err().to_string();
        assert!(message.contains("activations") && message.contains("train.micro_batch = 16 fits"), "{message}");
    }
}
