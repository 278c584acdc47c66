//! `stickbreak eval`.

use crate::data::Loader;
use crate::evaluate;
use crate::load::{ComputeOptions, LoadedModel};
use crate::metrics::{LengthMetrics, Record, RunMetrics};
use crate::signal::StopFlag;
use anyhow::{Context, Result, bail};
use clap::Args;
use std::path::{Path, PathBuf};

#[derive(Args)]
pub(super) struct EvalArgs {
    /// A run's folder, one of its checkpoints, or a model folder in the Hugging Face layout.
    model: PathBuf,
    /// A text file, or a folder that `prepare` wrote (its validation split).
    #[arg(long)]
    data: PathBuf,
    /// Context length; default: the trained length.
    #[arg(long)]
    length: Option<usize>,
    /// Context lengths of a length-extrapolation curve, separated by commas.
    #[arg(long, value_delimiter = ',')]
    lengths: Vec<usize>,
    /// At most this many tokens.
    #[arg(long)]
    tokens: Option<u64>,
    /// Also write the figures to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Add the length curve to the run's metrics, for its report (the model must be a run's folder).
    #[arg(long)]
    record: bool,
    #[command(flatten)]
    compute: ComputeOptions,
}

/// Tokens of a length-extrapolation curve unless given.
const DEFAULT_LENGTH_TOKENS: u64 = 262_144;

pub(super) fn run(args: EvalArgs) -> Result<()> {
    let loaded = LoadedModel::open(&args.model, args.compute)?;
    let open = |length: usize| -> Result<Loader> { Ok(Loader::new(loaded.open_text(&args.data)?, length, None)?) };
    let stop = StopFlag::on_signals()?;
    let interrupted = || bail!("interrupted");
    if !args.lengths.is_empty() {
        let tokens = args.tokens.unwrap_or(DEFAULT_LENGTH_TOKENS);
        let (lengths, trained) = (&args.lengths, loaded.trained_length);
        let metrics =
            evaluate::length_extrapolation(&loaded.model, open, lengths, tokens, trained, loaded.step, &stop)?;
        let Some(metrics) = metrics else { return interrupted() };
        if metrics.loss_by_position.is_empty() {
            bail!("{} has no token to predict", args.data.display());
        }
        print_lengths(&metrics);
        write_json(args.json.as_deref(), &metrics)?;
        if args.record {
            RunMetrics::resume(&args.model, loaded.step)?.append(&Record::Length(metrics))?;
        }
        return Ok(());
    }
    let length = args.length.unwrap_or(loaded.trained_length);
    let Some(sum) = evaluate::loss(&loaded.model, &open(length)?, args.tokens, &stop)? else { return interrupted() };
    if sum.tokens == 0 {
        bail!("{} has no token to predict at a context of {length}", args.data.display());
    }
    let metrics = sum.metrics(loaded.step);
    let bits = metrics.bits_per_byte.map_or("n/a".into(), |bits| format!("{bits:.4}"));
    println!("context {length}, {} predicted tokens of {}", metrics.tokens, args.data.display());
    println!("loss {:.4} nats, perplexity {:.3}, bits per byte {bits}", metrics.loss, metrics.perplexity);
    write_json(args.json.as_deref(), &metrics)
}

fn print_lengths(metrics: &LengthMetrics) {
    println!("{:>9}  {:>8}  {:>10}", "context", "loss", "perplexity");
    for (length, loss) in std::iter::zip(&metrics.lengths, &metrics.loss) {
        let mark = if *length == metrics.trained_length { "  trained length" } else { "" };
        println!("{length:>9}  {loss:>8.4}  {:>10.3}{mark}", loss.exp());
    }
    println!("loss by position at the longest context:");
    for position in &metrics.loss_by_position {
        println!("{:>7} - {:<7}  {:.4}", position.start, position.end, position.loss);
    }
}

fn write_json(path: Option<&Path>, value: &impl serde::Serialize) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    let text = serde_json::to_string_pretty(value)?;
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
