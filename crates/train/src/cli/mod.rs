//! The command line: `stickbreak prepare | train | eval | generate | verify | bench | doctor | report`.

mod eval;
mod generate;
mod prepare;
mod train;

use crate::device::DeviceOption;
use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

/// Train, evaluate and study stick-breaking transformers.
#[derive(Parser)]
#[command(name = "stickbreak", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Worker threads; default: one for each processor.
    #[arg(long, global = true)]
    threads: Option<usize>,
}

#[derive(Subcommand)]
enum Command {
    /// Turn text into shards of tokens.
    Prepare(prepare::PrepareArgs),
    /// Train a model; the same command goes on where a stopped run was.
    Train(train::TrainArgs),
    /// Loss, perplexity and bits per byte on a text or on prepared data; the length-extrapolation curve.
    Eval(eval::EvalArgs),
    /// Continue a prompt.
    Generate(generate::GenerateArgs),
    /// Check this build against golden vectors.
    Verify {
        /// Folder with attention/ and model/.
        folder: PathBuf,
        #[command(flatten)]
        device: DeviceOption,
    },
    /// Time the parts.
    Bench(crate::bench::BenchArgs),
    /// Say what this machine has and what will be used; or what a run on many GPUs will need and how fast it may be.
    Doctor(crate::doctor::DoctorArgs),
    /// Write a run's report.html, or a chart: length-extrapolation curves of several runs, or a step's time line.
    Report {
        /// The run's folder, or several.
        #[arg(required = true)]
        runs: Vec<PathBuf>,
        /// Write the runs' length-extrapolation curves to this SVG file instead.
        #[arg(long, value_name = "SVG")]
        length_curves: Option<PathBuf>,
        /// Write the time line of a step that `train --profile` recorded on a GPU to this SVG file instead.
        #[arg(long, value_name = "SVG", conflicts_with = "length_curves")]
        time_line: Option<PathBuf>,
    },
}

/// Runs the command line; errors go to standard error with all their causes.
pub fn main() -> ExitCode {
    let filter = EnvFilter::try_from_env("STICKBREAK_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_target(false).with_writer(std::io::stderr).init();
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // At once, so that lines of several ranks do not mix.
            let _ = std::io::stderr().write_all(format!("error: {error:#}\n").as_bytes());
            crate::distributed::exit_code(&error).into()
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    if let Some(threads) = cli.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    // What these two make is in files, and they only print to standard error, whose end must not be theirs.
    if !matches!(cli.command, Command::Train(_) | Command::Prepare(_)) {
        crate::signal::end_on_closed_output()?;
    }
    match cli.command {
        Command::Prepare(args) => prepare::run(args),
        Command::Train(args) => train::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Verify { folder, device } => crate::verify::verify(&folder, device.announce()?).map(drop),
        Command::Bench(args) => crate::bench::run(&args),
        Command::Doctor(args) => crate::doctor::run(&args),
        Command::Report { runs, length_curves: Some(path), .. } => crate::report::write_length_curves(&runs, &path),
        Command::Report { runs, time_line: Some(path), .. } => {
            ensure!(runs.len() == 1, "--time-line shows one run, but {} are given", runs.len());
            crate::report::write_time_line(&runs[0], &path)
        }
        Command::Report { runs, .. } => {
            for run in runs {
                println!("{}", crate::report::write_report(&run)?.display());
            }
            Ok(())
        }
    }
}
