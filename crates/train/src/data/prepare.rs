//! Text to a prepared folder: `manifest.json`, shards, `tokenizer.json` where there is one, and `prepare.json`.
//!
//! Documents are read in a fixed order, tokenized in parallel and written in that order, so the same inputs give the
//! same bytes. After an interruption the same call continues: shards that are finished are not made again.

use super::dataset::{Dataset, SplitName};
use super::files;
use super::journal::Journal;
use super::manifest::{FORMAT_VERSION, Manifest, ShardEntry, SplitEntry, TokenizerEntry};
use super::shard::{MAX_SHARD_TOKENS, ShardWriter};
use super::source::{Document, Documents, FileList, Input, find_files};
use super::tokenizer::{Tokenizer, line_pieces};
use super::tokens::TokenWidth;
use super::{DataError, Result};
use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;
use serde::Serialize;
use std::collections::HashSet;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Name of the tokenizer in the output folder.
const TOKENIZER_FILE: &str = "tokenizer.json";

/// Documents are tokenized together until they have this many bytes, or this many are together.
const BATCH_BYTES: usize = 16 << 20;
const BATCH_DOCUMENTS: usize = 4096;

/// Training a tokenizer reads texts in pieces of this many bytes.
const TRAINING_PIECE_BYTES: usize = 64 << 10;

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

/// Prepares a folder, or continues, or (when all is there already) only reads its manifest.
pub fn prepare(options: &PrepareOptions, progress: &mut Progress) -> Result<Manifest> {
    check_options(options)?;
    fs::create_dir_all(&options.output).map_err(DataError::io(&options.output, "create"))?;
    check_output(options)?;
    let passes = find_passes(options)?;
    let lists: Vec<_> = passes.iter().map(|pass| &pass.list).collect();
    let mut journal = Journal::open(options, &lists)?;
    if journal.complete {
        return Ok(Dataset::open(&options.output)?.manifest().clone());
    }
    let tokenizer = make_tokenizer(options, &passes, &mut journal, progress)?;
    let vocabulary_size = match options.tokenizer {
        TokenizerChoice::File { vocabulary_size: Some(size), .. } => size,
        _ => tokenizer.vocab_size(),
    };

    let width = TokenWidth::for_vocabulary(vocabulary_size);
    let mut writing = Writing { options, tokenizer, journal, progress, empty_documents: 0, replaced_documents: 0 };
    let mut train = SplitWriter::new(SplitName::Train, width, &writing.journal.train);
    let mut valid = SplitWriter::new(SplitName::Valid, width, &writing.journal.valid);
    for pass in &passes {
        writing.run(pass, &mut train, &mut valid)?;
    }
    for split in [&mut train, &mut valid] {
        writing.finish_shard(split)?;
    }
    writing.finish(&lists, vocabulary_size)
}

fn check_options(options: &PrepareOptions) -> Result<()> {
    if options.shard_tokens == 0 || options.shard_tokens > MAX_SHARD_TOKENS {
        return Err(DataError::Input(format!(
            "shard_tokens is {}, allowed is 1..={MAX_SHARD_TOKENS}",
            options.shard_tokens
        )));
    }
    match options.validation {
        Validation::Fraction(f) if !(f > 0.0 && f < 1.0) => {
            Err(DataError::Input(format!("the validation fraction is {f}, it must lie between 0 and 1")))
        }
        _ => Ok(()),
    }
}

/// An output folder within an input folder would be read by the next run.
fn check_output(options: &PrepareOptions) -> Result<()> {
    let canonical = |path: &Path| path.canonicalize().map_err(DataError::io(path, "open"));
    let output = canonical(&options.output)?;
    let validation = if let Validation::Inputs(inputs) = &options.validation { &inputs[..] } else { &[] };
    for input in options.inputs.iter().chain(validation) {
        if let Input::Path(input) = input
            && output.starts_with(canonical(input)?)
        {
            let (output, input) = (options.output.display(), input.display());
            return Err(DataError::Input(format!("the output folder {output} lies within the input folder {input}")));
        }
    }
    Ok(())
}

/// Some files and the rule by which their documents are split.
struct Pass {
    list: FileList,
    rule: Rule,
}

#[derive(Clone, Copy)]
enum Rule {
    All(SplitName),
    Fraction(f64),
    First(u64),
}

impl Rule {
    fn split(self, index: u64, name: &str) -> SplitName {
        let held_out = match self {
            Self::All(split) => return split,
            Self::First(n) => index < n,
            Self::Fraction(fraction) => {
                let hash = blake3::hash(name.as_bytes());
                let hash = u64::from_le_bytes(std::array::from_fn(|i| hash.as_bytes()[i]));
                (hash as f64) < fraction * 2f64.powi(64)
            }
        };
        if held_out { SplitName::Valid } else { SplitName::Train }
    }
}

fn find_passes(options: &PrepareOptions) -> Result<Vec<Pass>> {
    let list = find_files(&options.inputs, &options.extensions)?;
    let rule = match &options.validation {
        Validation::None | Validation::Inputs(_) => Rule::All(SplitName::Train),
        Validation::Fraction(fraction) => Rule::Fraction(*fraction),
        Validation::FirstDocuments(n) => Rule::First(*n),
    };
    let mut passes = vec![Pass { list, rule }];
    if let Validation::Inputs(inputs) = &options.validation {
        let list = find_files(inputs, &options.extensions)?;
        let inputs: HashSet<_> = passes[0].list.files.iter().map(|file| &file.path).collect();
        let both = list.files.iter().find(|file| inputs.contains(&file.path));
        if let Some(file) = both {
            return Err(DataError::Input(format!("{}: both an input and a validation input", file.path.display())));
        }
        passes.push(Pass { list, rule: Rule::All(SplitName::Valid) });
    }
    Ok(passes)
}

fn list_bytes(list: &FileList) -> u64 {
    list.files.iter().map(|file| file.bytes).sum()
}

fn tell(progress: &mut Progress, event: PrepareEvent) -> Result<()> {
    match progress(event) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(reason) => Err(DataError::Stopped(reason)),
    }
}

/// Loads or trains the tokenizer and puts it into the folder, unless it is there since an earlier attempt.
fn make_tokenizer(
    options: &PrepareOptions,
    passes: &[Pass],
    journal: &mut Journal,
    progress: &mut Progress,
) -> Result<Tokenizer> {
    let path = options.output.join(TOKENIZER_FILE);
    let tokenizer = match (&options.tokenizer, &journal.tokenizer) {
        (TokenizerChoice::Bytes, _) => Tokenizer::Bytes,
        (TokenizerChoice::TrainBpe { .. }, Some(_)) => Tokenizer::from_file(&path, None, None)?,
        (TokenizerChoice::TrainBpe { vocabulary_size, sample_bytes }, None) => {
            let bytes = list_bytes(&passes[0].list).min(*sample_bytes);
            tell(progress, PrepareEvent::Phase { name: "training the tokenizer on", bytes })?;
            let mut failure = None;
            let texts = TrainingTexts::new(&passes[0], *sample_bytes, progress, &mut failure);
            let trained = Tokenizer::train_bpe(texts, *vocabulary_size);
            // The trainer takes texts and not errors: it saw the end of the texts where an error was.
            failure.map_or(Ok(()), Err)?;
            trained?
        }
        (TokenizerChoice::File { path, end_of_text, vocabulary_size }, _) => {
            Tokenizer::from_file(path, end_of_text.as_deref(), *vocabulary_size)?
        }
    };
    journal.tokenizer = Some(match tokenizer.json() {
        None => TokenizerEntry::Bytes {},
        Some(json) => {
            files::write_atomically(&path, json)?;
            TokenizerEntry::File { file: TOKENIZER_FILE.into(), blake3: blake3::hash(json).to_hex().to_string() }
        }
    });
    journal.write(&options.output)?;
    Ok(tokenizer)
}

/// Texts for the tokenizer's training, in pieces.
struct TrainingTexts<'a, 'p> {
    documents: Documents<'a>,
    rule: Rule,
    index: u64,
    left: u64,
    pieces: std::vec::IntoIter<String>,
    progress: &'a mut Progress<'p>,
    failure: &'a mut Option<DataError>,
}

impl<'a, 'p> TrainingTexts<'a, 'p> {
    fn new(pass: &'a Pass, left: u64, progress: &'a mut Progress<'p>, failure: &'a mut Option<DataError>) -> Self {
        let documents = Documents::new(&pass.list.files);
        Self { documents, rule: pass.rule, index: 0, left, pieces: Vec::new().into_iter(), progress, failure }
    }

    fn next_document(&mut self) -> Result<Option<Document>> {
        while let Some(document) = self.documents.next().transpose()? {
            tell(self.progress, PrepareEvent::Read { bytes: self.documents.bytes_read() })?;
            self.index += 1;
            if self.rule.split(self.index - 1, &document.name) == SplitName::Train {
                return Ok(Some(document));
            }
        }
        Ok(None)
    }
}

impl Iterator for TrainingTexts<'_, '_> {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        loop {
            if self.left == 0 || self.failure.is_some() {
                return None;
            }
            if let Some(piece) = self.pieces.next() {
                self.left = self.left.saturating_sub(piece.len() as u64);
                return Some(piece);
            }
            match self.next_document() {
                Ok(document) => {
                    let text = document?.text;
                    let text = String::from_utf8_lossy(&text);
                    let pieces: Vec<_> =
                        line_pieces(&text, TRAINING_PIECE_BYTES).into_iter().map(String::from).collect();
                    self.pieces = pieces.into_iter();
                }
                Err(error) => *self.failure = Some(error),
            }
        }
    }
}

/// A preparation under way.
struct Writing<'a, 'p> {
    options: &'a PrepareOptions,
    tokenizer: Tokenizer,
    journal: Journal,
    progress: &'a mut Progress<'p>,
    empty_documents: u64,
    replaced_documents: u64,
}

impl Writing<'_, '_> {
    /// Reads the documents of one pass, tokenizes them in batches and hands them to their splits in order.
    fn run(&mut self, pass: &Pass, train: &mut SplitWriter, valid: &mut SplitWriter) -> Result<()> {
        tell(self.progress, PrepareEvent::Phase { name: "tokenizing", bytes: list_bytes(&pass.list) })?;
        let mut documents = Documents::new(&pass.list.files);
        let (mut index, mut batch, mut batch_bytes) = (0, Vec::new(), 0);
        loop {
            let document = documents.next().transpose()?;
            let last = document.is_none();
            if let Some(mut document) = document {
                let split = pass.rule.split(index, &document.name);
                index += 1;
                self.make_utf8(&mut document);
                let writer = if split == SplitName::Train { &mut *train } else { &mut *valid };
                if writer.done_documents > 0 {
                    writer.done_documents -= 1; // in a shard that was finished before the interruption
                } else {
                    batch_bytes += document.text.len();
                    batch.push((split, document));
                }
            }
            if last || batch_bytes >= BATCH_BYTES || batch.len() >= BATCH_DOCUMENTS {
                self.write_batch(&batch, train, valid)?;
                tell(self.progress, PrepareEvent::Read { bytes: documents.bytes_read() })?;
                batch.clear();
                batch_bytes = 0;
            }
            if last {
                self.empty_documents += documents.empty_documents();
                return Ok(());
            }
        }
    }

    /// Text for a Hugging Face tokenizer is made UTF-8; for bytes it stays as it is.
    fn make_utf8(&mut self, document: &mut Document) {
        if self.tokenizer.json().is_some() && std::str::from_utf8(&document.text).is_err() {
            document.text = String::from_utf8_lossy(&document.text).into_owned().into_bytes();
            self.replaced_documents += 1;
        }
    }

    fn write_batch(
        &mut self,
        batch: &[(SplitName, Document)],
        train: &mut SplitWriter,
        valid: &mut SplitWriter,
    ) -> Result<()> {
        let tokenizer = &self.tokenizer;
        let encoded: Vec<_> = batch.par_iter().map(|(_, d)| tokenizer.encode(&d.text)).collect::<Result<_>>()?;
        for ((split, document), tokens) in batch.iter().zip(encoded) {
            let writer = if *split == SplitName::Train { &mut *train } else { &mut *valid };
            let open = writer.shard.as_ref().map_or(0, ShardWriter::tokens);
            if open > 0 && open + 1 + tokens.len() as u64 > self.options.shard_tokens {
                self.finish_shard(writer)?;
            }
            writer.push(&self.options.output, self.tokenizer.end_of_text(), &tokens, document.text.len())?;
        }
        Ok(())
    }

    fn finish_shard(&mut self, split: &mut SplitWriter) -> Result<()> {
        let Some(entry) = split.finish_shard()? else { return Ok(()) };
        let shards = match split.name {
            SplitName::Train => &mut self.journal.train,
            SplitName::Valid => &mut self.journal.valid,
        };
        shards.push(entry.clone());
        self.journal.write(&self.options.output)?;
        tell(self.progress, PrepareEvent::Shard { split: split.name, shard: &entry })
    }

    fn finish(mut self, lists: &[&FileList], vocabulary_size: u32) -> Result<Manifest> {
        let manifest = Manifest {
            format_version: FORMAT_VERSION,
            vocabulary_size,
            end_of_text: self.tokenizer.end_of_text(),
            tokenizer: self.journal.tokenizer.clone().expect("set by make_tokenizer"),
            train: SplitEntry::from_shards(self.journal.train.clone()),
            valid: SplitEntry::from_shards(self.journal.valid.clone()),
            source_files: lists.iter().map(|list| list.files.len() as u64).sum(),
            binary_files: lists.iter().map(|list| list.binary_files).sum(),
            empty_documents: self.empty_documents,
            replaced_documents: self.replaced_documents,
        };
        let (train, valid) = (manifest.train.documents, manifest.valid.documents);
        if train == 0 || (valid == 0 && self.options.validation != Validation::None) {
            return Err(DataError::Input(format!(
                "{train} documents to train on and {valid} to validate on: hold out another fraction or number of \
                 documents, give validation inputs, or hold out none"
            )));
        }
        if manifest.replaced_documents > 0 {
            tracing::warn!("{} documents had invalid UTF-8, replaced by U+FFFD", manifest.replaced_documents);
        }
        if manifest.empty_documents > 0 || manifest.binary_files > 0 {
            tracing::info!(
                "left out: {} empty documents, {} binary files",
                manifest.empty_documents,
                manifest.binary_files
            );
        }
        manifest.write(&self.options.output)?;
        self.journal.complete = true;
        self.journal.write(&self.options.output)?;
        Ok(manifest)
    }
}

/// The shards of one split as they are written.
struct SplitWriter {
    name: SplitName,
    width: TokenWidth,
    /// Documents that finished shards hold already and that still come by in the input.
    done_documents: u64,
    next_shard: usize,
    shard: Option<ShardWriter>,
    /// Of the open shard.
    text_bytes: u64,
    documents: u64,
}

impl SplitWriter {
    fn new(name: SplitName, width: TokenWidth, finished: &[ShardEntry]) -> Self {
        let done_documents = finished.iter().map(|shard| shard.documents).sum();
        Self { name, width, done_documents, next_shard: finished.len(), shard: None, text_bytes: 0, documents: 0 }
    }

    fn file_name(&self) -> String {
        format!("{}_{:06}.bin", self.name, self.next_shard)
    }

    fn push(&mut self, folder: &Path, end_of_text: u32, tokens: &[u32], text_bytes: usize) -> Result<()> {
        let shard = match &mut self.shard {
            Some(shard) => shard,
            None => {
                let shard = ShardWriter::create(&folder.join(self.file_name()), self.width)?;
                self.shard.insert(shard)
            }
        };
        shard.push(&[end_of_text])?;
        shard.push(tokens)?;
        self.text_bytes += text_bytes as u64;
        self.documents += 1;
        Ok(())
    }

    fn finish_shard(&mut self) -> Result<Option<ShardEntry>> {
        let Some(shard) = self.shard.take() else { return Ok(None) };
        let (header, blake3) = shard.finish()?;
        let entry = ShardEntry {
            file: self.file_name(),
            file_bytes: header.file_bytes(),
            tokens: header.tokens,
            text_bytes: std::mem::take(&mut self.text_bytes),
            documents: std::mem::take(&mut self.documents),
            blake3,
        };
        self.next_shard += 1;
        Ok(Some(entry))
    }
}
