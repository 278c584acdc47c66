//! What can be asked of a preparation, and what it tells meanwhile.

use crate::data::dataset::SplitName;
use crate::data::manifest::ShardEntry;
use crate::data::source::Input;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::ops::ControlFlow;
use std::path::PathBuf;

/// What to prepare.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PrepareOptions {
    /// Where the text is.
    pub inputs: Vec<Input>,
    /// Of folders, only files with these extensions; empty for all.
    pub extensions: Vec<String>,
    /// How text becomes ids.
    pub tokenizer: TokenizerChoice,
    /// What is held out.
    pub validation: Validation,
    /// Most tokens of a shard (a longer document has a longer shard of its own).
    pub shard_tokens: u64,
    /// The folder to write.
    #[serde(skip)]
    pub output: PathBuf,
}

impl PrepareOptions {
    /// Bytes as tokens, 5 % of the documents held out, shards of 100 million tokens.
    pub fn new(inputs: Vec<Input>, output: impl Into<PathBuf>) -> Self {
        Self {
            inputs,
            extensions: Vec::new(),
            tokenizer: TokenizerChoice::Bytes,
            validation: Validation::Fraction(0.05),
            shard_tokens: 100_000_000,
            output: output.into(),
        }
    }
}

/// How text becomes ids.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TokenizerChoice {
    /// One id per byte.
    Bytes,
    /// An existing `tokenizer.json`.
    File {
        /// The file.
        path: PathBuf,
        /// Name of its end-of-text token; without it the usual names are tried.
        end_of_text: Option<String>,
        /// Vocabulary size of the model, when it is larger than the tokenizer's.
        vocabulary_size: Option<u32>,
    },
    /// A byte-level BPE trained on the texts that are not held out.
    TrainBpe {
        /// Its size, bytes and `<|endoftext|>` included.
        vocabulary_size: u32,
        /// It is trained on about this many bytes from the beginning.
        sample_bytes: u64,
    },
}

/// What is held out.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Validation {
    /// Nothing.
    None,
    /// About this fraction of the documents, chosen by a hash of their names: a document stays where it is when others
    /// are added.
    Fraction(f64),
    /// The first so many documents.
    FirstDocuments(u64),
    /// Texts of their own.
    Inputs(Vec<Input>),
}

/// What happens during a preparation.
#[derive(Debug, Clone, Copy)]
pub enum PrepareEvent<'a> {
    /// A pass over the inputs begins.
    Phase {
        /// What it does.
        name: &'static str,
        /// Bytes of files that it reads at most.
        bytes: u64,
    },
    /// So many bytes of this pass have been read.
    Read {
        /// In all.
        bytes: u64,
    },
    /// A shard is finished, on disk and in the journal.
    Shard {
        /// Its split.
        split: SplitName,
        /// Its entry in the manifest.
        shard: &'a ShardEntry,
    },
}

/// Hears of events; a break with a reason stops the preparation, which can be continued later.
pub type Progress<'a> = dyn FnMut(PrepareEvent<'_>) -> ControlFlow<String> + Send + 'a;

/// Shows a progress bar on standard error (nothing when that is not a terminal).
pub fn progress_bar() -> impl FnMut(PrepareEvent<'_>) -> ControlFlow<String> + Send {
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    bar.set_style(style.expect("a valid template"));
    move |event| {
        match event {
            PrepareEvent::Phase { name, bytes } => {
                bar.reset();
                bar.set_length(bytes);
                bar.set_message(name);
            }
            PrepareEvent::Read { bytes } => bar.set_position(bytes),
            PrepareEvent::Shard { split, shard } => {
                bar.println(format!("{split}: {} ({} tokens)", shard.file, shard.tokens))
            }
        }
        ControlFlow::Continue(())
    }
}
