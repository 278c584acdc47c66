//! A run's tokens: opens the prepared folder, or makes it first.

use crate::config::{DataConfig, RunConfig, TokenFiles};
use crate::data::journal::Journal;
use crate::data::prepare::{PrepareEvent, progress_bar};
use crate::data::{
    Dataset, Input, Loader, PrepareOptions, SplitName, TokenStream, Tokenizer, TokenizerChoice, Validation, prepare,
};
use crate::signal::StopFlag;
use anyhow::{Context, Result, bail};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

/// What a run trains and validates on.
pub struct Text {
    /// Training windows, shuffled.
    pub train: Arc<Loader>,
    /// Windows of the validation split in order; `None` if nothing is held out.
    pub valid: Option<Loader>,
    /// Ids to text and back; token files of other programs may come without one.
    pub tokenizer: Option<Tokenizer>,
    source: Source,
    /// A checksum of what the data is: resuming with other data is refused.
    pub fingerprint: String,
}

/// Where the token streams come from.
enum Source {
    Prepared(Dataset),
    Files { files: TokenFiles, vocabulary: u32 },
}

impl Source {
    fn stream(&self, split: SplitName, tokenizer: Option<&Tokenizer>) -> Result<TokenStream> {
        match self {
            Self::Prepared(dataset) => Ok(dataset.split(split)?),
            Self::Files { files, vocabulary } => {
                let paths = if split == SplitName::Train { &files.train } else { &files.valid };
                let mut stream = TokenStream::open(paths, files.format, *vocabulary)?;
                if let Some(tokenizer) = tokenizer {
                    stream = stream.with_tokenizer(tokenizer);
                }
                Ok(match files.end_of_text {
                    Some(id) => stream.with_end_of_text(id),
                    None => stream,
                })
            }
        }
    }
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
        Self::open_unless(config, &StopFlag::new())
    }

    /// [`open`](Self::open), unless `stop` is set while the data is prepared: then it ends with
    /// [`DataError::Stopped`](crate::data::DataError::Stopped), and the next call goes on with the preparation.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_unless(config: &RunConfig, stop: &StopFlag) -> Result<Self> {
        let vocabulary = config.model.vocab_size;
        let (source, tokenizer, fingerprint) = match &config.data.token_files {
            Some(files) => open_token_files(files, vocabulary as u32)?,
            None => open_prepared(config, stop)?,
        };
        let length = config.train.sequence_length;
        let train = source.stream(SplitName::Train, tokenizer.as_ref())?;
        let train = Arc::new(Loader::new(train, length, Some(config.seed))?);
        let mut text = Self { train, valid: None, tokenizer, source, fingerprint };
        if text.source.stream(SplitName::Valid, None)?.is_empty() {
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
        Ok(Loader::new(self.source.stream(SplitName::Valid, self.tokenizer.as_ref())?, length, None)?)
    }
}

/// The validation split of a run's data, which is there already: nothing is prepared.
///
/// # Errors
/// If there is none, or a file is damaged.
pub fn held_out(config: &RunConfig) -> Result<TokenStream> {
    let (source, tokenizer, _) = match &config.data.token_files {
        Some(files) => open_token_files(files, config.model.vocab_size as u32)?,
        None => {
            let dataset = Dataset::open(&config.data_folder())?;
            let tokenizer = dataset.tokenizer()?;
            (Source::Prepared(dataset), Some(tokenizer), String::new())
        }
    };
    source.stream(SplitName::Valid, tokenizer.as_ref())
}

/// Opens the prepared folder, making it first if it is not there.
fn open_prepared(config: &RunConfig, stop: &StopFlag) -> Result<(Source, Option<Tokenizer>, String)> {
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
        let mut show = progress_bar();
        let mut progress = |event: PrepareEvent<'_>| match stop.cause() {
            Some(cause) => ControlFlow::Break(cause.to_owned()),
            None => show(event),
        };
        prepare(&options(config)?, &mut progress).with_context(|| {
            let inputs = config.data.inputs.join(", ");
            format!("the text of this run is {inputs}; another one: --set 'data.inputs=[\"PATH\"]'")
        })?;
    } else if !config.data.inputs.is_empty() {
        // Training on a folder that was prepared otherwise would silently ignore the config.
        Journal::check_options(&options(config)?)?;
    }
    let dataset = Dataset::open(&folder)?;
    if config.data.verify_checksums {
        dataset.verify_checksums()?;
    }
    let (ids, vocabulary) = (dataset.manifest().vocabulary_size as usize, config.model.vocab_size);
    if ids > vocabulary {
        bail!("{}: the data has {ids} token ids, but model.vocab_size is {vocabulary}", folder.display());
    }
    let fingerprint = fingerprint(&serde_json::to_vec(dataset.manifest())?);
    let tokenizer = dataset.tokenizer()?;
    Ok((Source::Prepared(dataset), Some(tokenizer), fingerprint))
}

fn open_token_files(files: &TokenFiles, vocabulary: u32) -> Result<(Source, Option<Tokenizer>, String)> {
    let load = |path: &PathBuf| Tokenizer::from_file(path, None, Some(vocabulary));
    let tokenizer = files.tokenizer.as_ref().map(load).transpose()?;
    let mut description = serde_json::to_vec(files)?;
    for path in files.train.iter().chain(&files.valid) {
        let bytes = std::fs::metadata(path).with_context(|| format!("cannot open {}", path.display()))?.len();
        description.extend(bytes.to_le_bytes());
    }
    Ok((Source::Files { files: files.clone(), vocabulary }, tokenizer, fingerprint(&description)))
}

fn fingerprint(description: &[u8]) -> String {
    blake3::hash(description).to_hex().to_string()
}
