//! A trained model from a run, a checkpoint, or a Hugging Face folder.

use crate::checkpoint::{CheckpointStore, KeepPolicy};
use crate::config::ComputeType;
use crate::data::{Dataset, SplitName, TokenStream, Tokenizer};
use crate::device::{self, DeviceOption};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::path::{Path, PathBuf};
use stickbreak_model::{ModelConfig, Transformer};
use stickbreak_tensor::{DType, Device};

/// Where a trained model computes, and in which number type.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct ComputeOptions {
    #[command(flatten)]
    device: DeviceOption,
    /// Number type of the arithmetic.
    #[arg(long, value_enum, default_value = "auto")]
    dtype: ComputeType,
}

/// A model and what is known of its training.
pub(crate) struct LoadedModel {
    pub(crate) model: Transformer,
    pub(crate) tokenizer: Tokenizer,
    /// Context that it was trained at.
    pub(crate) trained_length: usize,
    /// Optimizer steps; 0 if unknown.
    pub(crate) step: u64,
    /// Where its files are.
    folder: PathBuf,
}

impl LoadedModel {
    /// Opens a model where the options say, with the choice told on standard error.
    pub(crate) fn open(path: &Path, options: ComputeOptions) -> Result<Self> {
        let device = options.device.announce()?;
        Self::open_on(path, device, options.dtype.resolve(device)?)
    }

    pub(crate) fn open_on(path: &Path, device: Device, dtype: DType) -> Result<Self> {
        let (folder, step) = find_weights(path)?;
        let config_path = folder.join("config.json");
        let text = std::fs::read(&config_path).with_context(|| {
            format!("{} is neither a run, nor a checkpoint, nor a model folder: no config.json", path.display())
        })?;
        let value: serde_json::Value =
            serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", config_path.display()))?;
        let config = ModelConfig::from_hugging_face(&config_path, &value)?;
        let trained_length = value["max_position_embeddings"].as_u64().unwrap_or(2048) as usize;
        let tokenizer_path = folder.join("tokenizer.json");
        let tokenizer = if tokenizer_path.exists() {
            Tokenizer::from_file(&tokenizer_path, None, Some(config.vocab_size as u32))?
        } else {
            Tokenizer::Bytes
        };
        let (ids, vocabulary) = (tokenizer.vocab_size() as usize, config.vocab_size);
        if ids > vocabulary {
            bail!("{}: the tokenizer has {ids} ids, but the model has {vocabulary}", folder.display());
        }
        device::prepare_kernels(&config, dtype, device, |line| eprintln!("{line}"))?;
        let model = Transformer::new_on(config, dtype, device)?;
        model.load_weights(&folder)?;
        Ok(Self { model, tokenizer, trained_length, step, folder })
    }

    /// The same weights with another early exit; 0 bits switch it off.
    pub(crate) fn with_early_exit(&self, bits: u32) -> Result<Transformer> {
        let config = ModelConfig { early_exit_bits: bits, ..self.model.config().clone() };
        let dtype = self.model.arena().values().dtype();
        let model = Transformer::new_on(config, dtype, self.model.device())?;
        model.load_weights(&self.folder)?;
        Ok(model)
    }

    /// A text file, or the validation split of a folder that `prepare` wrote, in the model's tokens.
    pub(crate) fn open_text(&self, path: &Path) -> Result<TokenStream> {
        let stream = if path.is_dir() {
            let dataset = Dataset::open(path)?;
            dataset.verify_checksums()?;
            dataset.split(SplitName::Valid)?
        } else {
            let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            TokenStream::from_text(path.display().to_string(), &text, &self.tokenizer)?
        };
        self.check_vocabulary(&stream, path)?;
        Ok(stream)
    }

    /// Refuses tokens that the model does not know.
    pub(crate) fn check_vocabulary(&self, stream: &TokenStream, path: &Path) -> Result<()> {
        let (ids, vocabulary) = (stream.vocabulary() as usize, self.model.config().vocab_size);
        if ids > vocabulary {
            bail!("{}: {ids} token ids, but the model has {vocabulary}", path.display());
        }
        Ok(())
    }
}

/// The folder with the weights, and the step if it is a checkpoint.
fn find_weights(path: &Path) -> Result<(PathBuf, u64)> {
    let checkpoints = path.join("checkpoints");
    if checkpoints.is_dir() {
        let store = CheckpointStore::open(&checkpoints, KeepPolicy { last: 2, every: None })?;
        let checkpoint =
            store.latest_valid()?.with_context(|| format!("{} has no valid checkpoint yet", path.display()))?;
        return Ok((checkpoint.folder().to_owned(), checkpoint.step()));
    }
    let step = path.file_name().and_then(|name| name.to_str()?.strip_prefix("step-")?.parse().ok());
    Ok((path.to_owned(), step.unwrap_or(0)))
}
