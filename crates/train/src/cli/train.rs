//! `stickbreak train`.

use crate::config::RunConfig;
use crate::device::DeviceOption;
use crate::signal::StopFlag;
use crate::trainer::{Trainer, TrainerOptions};
use anyhow::Result;
use clap::Args;
use std::path::{Path, PathBuf};

#[derive(Args)]
pub(super) struct TrainArgs {
    /// The run's TOML file.
    #[arg(default_value = "configs/quickstart.toml")]
    config: PathBuf,
    /// Change a setting: `--set train.steps=100`. Can be given many times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    changes: Vec<String>,
    /// The run's folder; default `runs/<name>`.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Stop after this many optimizer steps; as `--set train.steps=N`.
    #[arg(long)]
    steps: Option<u64>,
    /// Record some steps: where the time goes, as a table and as a trace in the run's folder.
    #[arg(long)]
    profile: bool,
    #[command(flatten)]
    device: DeviceOption,
}

pub(super) fn run(args: TrainArgs) -> Result<()> {
    let mut changes = args.changes;
    changes.extend(args.steps.map(|steps| format!("train.steps={steps}")));
    let config = RunConfig::load(&args.config, &changes)?;
    let folder = args.out.unwrap_or_else(|| Path::new("runs").join(&config.name));
    let device = args.device.announce()?;
    let stop = StopFlag::on_signals()?;
    let options = TrainerOptions { device, profile: args.profile, ..TrainerOptions::default() };
    Trainer::open_with(config, &folder, stop, options)?.run().map(drop)
}
