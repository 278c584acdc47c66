//! `stickbreak bench`: the same shapes every time, as a table and as JSON.

mod attention;
mod gemm;
mod step;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use serde::Serialize;
use std::path::PathBuf;
use std::time::Instant;

/// What to time.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// One part; default: all of them.
    part: Option<Part>,
    /// Also write the figures to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Repetitions of each measurement; the median counts.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
}

/// A part of the stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// Attention, forward and backward.
    Attention,
    /// A whole training step.
    Train,
    /// Matrix products.
    Gemm,
}

/// One measurement.
#[derive(Debug, Clone, Serialize)]
struct Row {
    part: &'static str,
    name: String,
    shape: String,
    /// Median over the repetitions.
    milliseconds: f64,
    /// Fastest repetition.
    fastest_milliseconds: f64,
    /// Rate of useful arithmetic; attention is counted causal-half, its backward as 2.5 forwards.
    gflops_per_second: f64,
    /// Where it means something.
    tokens_per_second: Option<f64>,
}

/// Runs the parts and prints a table.
///
/// # Errors
/// If a part cannot run, or the JSON file cannot be written.
pub fn run(args: &BenchArgs) -> Result<()> {
    println!("{} threads, f32, median of {}", rayon::current_num_threads(), args.repeats);
    println!(
        "{:<10} {:<30} {:<28} {:>9} {:>9} {:>9} {:>9}",
        "part", "what", "shape", "ms", "best ms", "GFLOP/s", "tok/s"
    );
    let mut rows = Vec::new();
    for (part, measure) in [
        (Part::Gemm, gemm::measure as fn(usize) -> Result<Vec<Row>>),
        (Part::Attention, attention::measure),
        (Part::Train, step::measure),
    ] {
        if args.part.is_none_or(|wanted| wanted == part) {
            for row in measure(args.repeats.max(1))? {
                let tokens = row.tokens_per_second.map_or(String::new(), |rate| format!("{rate:.0}"));
                println!(
                    "{:<10} {:<30} {:<28} {:>9.2} {:>9.2} {:>9.1} {tokens:>9}",
                    row.part, row.name, row.shape, row.milliseconds, row.fastest_milliseconds, row.gflops_per_second
                );
                rows.push(row);
            }
        }
    }
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&rows)?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Median and minimum of the seconds that `body` takes, after one run that warms up.
fn time(repeats: usize, mut body: impl FnMut() -> Result<()>) -> Result<(f64, f64)> {
    body()?;
    let mut seconds = Vec::with_capacity(repeats);
    for _ in 0..repeats {
        let start = Instant::now();
        body()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok((seconds[seconds.len() / 2], seconds[0]))
}

fn row(
    part: &'static str,
    name: impl Into<String>,
    shape: impl Into<String>,
    (median, fastest): (f64, f64),
    flops: f64,
    tokens: Option<usize>,
) -> Row {
    Row {
        part,
        name: name.into(),
        shape: shape.into(),
        milliseconds: 1e3 * median,
        fastest_milliseconds: 1e3 * fastest,
        gflops_per_second: flops / median / 1e9,
        tokens_per_second: tokens.map(|tokens| tokens as f64 / median),
    }
}
