//! Text to a prepared folder: `manifest.json`, shards, `tokenizer.json` where there is one, and `prepare.json`.
//!
//! Documents are read in a fixed order, tokenized in parallel and written in that order, so the same inputs give the
//! same bytes. After an interruption the same call continues: shards that are finished are not made again.

mod options;
mod passes;
mod split_writer;
mod train_tokenizer;
mod writing;

pub use options::{PrepareEvent, PrepareOptions, Progress, TokenizerChoice, Validation, progress_bar};

use super::dataset::Dataset;
use super::journal::Journal;
use super::manifest::Manifest;
use super::shard::MAX_SHARD_TOKENS;
use super::source::{FileList, Input};
use super::{DataError, Result};
use passes::find_passes;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use train_tokenizer::make_tokenizer;
use writing::write_shards;

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
    let manifest = write_shards(options, &passes, tokenizer, vocabulary_size, &mut journal, progress)?;
    manifest.write(&options.output)?;
    journal.complete = true;
    journal.write(&options.output)?;
    Ok(manifest)
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

fn list_bytes(list: &FileList) -> u64 {
    list.files.iter().map(|file| file.bytes).sum()
}

fn tell(progress: &mut Progress, event: PrepareEvent) -> Result<()> {
    match progress(event) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(reason) => Err(DataError::Stopped(reason)),
    }
}
