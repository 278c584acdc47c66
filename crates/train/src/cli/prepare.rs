//! `stickbreak prepare`.

use crate::data::prepare::{prepare, progress_bar};
use crate::data::{Input, PrepareOptions, Validation};
use crate::trainer::tokenizer_choice;
use anyhow::Result;
use clap::Args;
use std::io::Write;
use std::path::PathBuf;

#[derive(Args)]
pub(super) struct PrepareArgs {
    /// Texts: .txt, .md, source files, .jsonl, .jsonl.zst, .parquet, folders of these, or `cargo-registry`.
    #[arg(required = true)]
    inputs: Vec<String>,
    /// The folder to write; an interrupted preparation goes on with the same command.
    #[arg(long)]
    out: PathBuf,
    /// `bytes`, `bpe:SIZE` to train one, or the path of a tokenizer.json.
    #[arg(long, default_value = "bytes")]
    tokenizer: String,
    /// Share of the documents held out for validation.
    #[arg(long, default_value_t = 0.05)]
    validation_fraction: f64,
    /// Texts held out for validation, instead of a share. Can be given many times.
    #[arg(long = "validation", value_name = "INPUT")]
    validation_inputs: Vec<String>,
    /// Of folders, only files with this extension. Can be given many times.
    #[arg(long = "extension")]
    extensions: Vec<String>,
    /// Most tokens of a shard.
    #[arg(long)]
    shard_tokens: Option<u64>,
}

pub(super) fn run(args: PrepareArgs) -> Result<()> {
    let parse = |inputs: &[String]| inputs.iter().map(|input| Input::parse(input)).collect::<Vec<_>>();
    let mut options = PrepareOptions::new(parse(&args.inputs), args.out);
    options.extensions = args.extensions;
    options.tokenizer = tokenizer_choice(&args.tokenizer)?;
    options.validation = if args.validation_inputs.is_empty() {
        Validation::Fraction(args.validation_fraction)
    } else {
        Validation::Inputs(parse(&args.validation_inputs))
    };
    if let Some(tokens) = args.shard_tokens {
        options.shard_tokens = tokens;
    }
    let manifest = prepare(&options, &mut progress_bar())?;
    // All is on disk by now: a closed standard output is no failure.
    let _ = writeln!(
        std::io::stdout(),
        "{}: {} training and {} validation tokens in {} and {} documents, {} token ids",
        options.output.display(),
        manifest.train.tokens,
        manifest.valid.tokens,
        manifest.train.documents,
        manifest.valid.documents,
        manifest.vocabulary_size
    );
    Ok(())
}
