//! A run's tokens: opens the prepared folder, or makes it first.

use crate::config::{DataConfig, RunConfig};
use crate::data::{Dataset, Input, Loader, PrepareOptions, SplitName, Tokenizer, TokenizerChoice, Validation, prepare};
use anyhow::{Context, Result, bail};
use std::sync::Arc;

/// What a run trains and validates on.
pub struct Text {
    /// Training windows, shuffled.
    pub train: Arc<Loader>,
    /// Windows of the validation split in order; `None` if nothing is held out.
    pub valid: Option<Loader>,
    /// Ids to text and back.
    pub tokenizer: Tokenizer,
    dataset: Dataset,
    /// Checksum of the manifest: resuming with other data is refused.
    pub fingerprint: String,
}

/// Tokens of a BPE are chosen by the counts in this much of the text.
const BPE_SAMPLE_BYTES: u64 = 64 << 20;

/// How `tokenizer = "..."` in a config or on the command line is meant.
///
/// # Errors
/// If the size of a BPE is not a number.
pub fn tokenizer_choice(text: &str) -> Result<TokenizerChoice> {
    if text == "bytes" {
        return Ok(TokenizerChoice::Bytes);
    }
    if let Some(size) = text.strip_prefix("bpe:") {
        let vocabulary_size = size.parse().with_context(|| format!("tokenizer {text:?}: {size:?} is not a size"))?;
        return Ok(TokenizerChoice::TrainBpe { vocabulary_size, sample_bytes: BPE_SAMPLE_BYTES });
    }
    Ok(TokenizerChoice::File { path: text.into(), end_of_text: None, vocabulary_size: None })
}

fn options(config: &RunConfig) -> Result<PrepareOptions> {
    let DataConfig { inputs, extensions, tokenizer, validation_fraction, validation_inputs, .. } = &config.data;
    let inputs = inputs.iter().map(|input| Input::parse(input)).collect();
    let validation = if validation_inputs.is_empty() {
        Validation::Fraction(*validation_fraction)
    } else {
        Validation::Inputs(validation_inputs.iter().map(|input| Input::parse(input)).collect())
    };
    let mut options = PrepareOptions::new(inputs, config.data_folder());
    options.extensions = extensions.clone();
    options.tokenizer = tokenizer_choice(tokenizer)?;
    options.validation = validation;
    Ok(options)
}

impl Text {
    /// Opens the run's data and checks it against the model.
    ///
    /// # Errors
    /// If there is no data, a file is damaged, the tokenizer has more ids than the model, or a sequence is longer than
    /// the data.
    pub fn open(config: &RunConfig) -> Result<Self> {
        let folder = config.data_folder();
        if !folder.join(crate::data::manifest::MANIFEST_FILE).exists() {
            if config.data.inputs.is_empty() {
                bail!(
                    "{} holds no prepared data; give data.inputs, or run `prepare --out {}`",
                    folder.display(),
                    folder.display()
                );
            }
            tracing::info!("preparing {} from {}", folder.display(), config.data.inputs.join(", "));
            prepare(&options(config)?, &mut crate::data::prepare::progress_bar())?;
        }
        let dataset = Dataset::open(&folder)?;
        if config.data.verify_checksums {
            dataset.verify_checksums()?;
        }
        let manifest = dataset.manifest();
        let (ids, vocabulary) = (manifest.vocabulary_size as usize, config.model.vocab_size);
        if ids > vocabulary {
            bail!("{}: the data has {ids} token ids, but model.vocab_size is {vocabulary}", folder.display());
        }
        let manifest_bytes = serde_json::to_vec(manifest)?;
        let length = config.train.sequence_length;
        let train = Loader::new(dataset.split(SplitName::Train)?, length, Some(config.seed))?;
        let mut text = Self {
            train: Arc::new(train),
            valid: None,
            tokenizer: dataset.tokenizer()?,
            fingerprint: blake3::hash(&manifest_bytes).to_hex().to_string(),
            dataset,
        };
        if text.dataset.entry(SplitName::Valid).tokens == 0 {
            tracing::warn!("nothing is held out: there will be no validation loss");
        } else {
            text.valid = Some(text.validation_windows(length).context("the validation split is too short")?);
        }
        Ok(text)
    }

    /// The validation split in windows of this length, in order.
    ///
    /// # Errors
    /// If it has not that many tokens.
    pub fn validation_windows(&self, length: usize) -> Result<Loader> {
        Ok(Loader::new(self.dataset.split(SplitName::Valid)?, length, None)?)
    }
}
