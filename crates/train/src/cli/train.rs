//! `stickbreak train`.

use crate::config::RunConfig;
use crate::signal::StopFlag;
use crate::trainer::Trainer;
use anyhow::Result;
use clap::Args;
use std::path::{Path, PathBuf};
use stickbreak_tensor::Device;

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
    /// Where to compute.
    #[arg(long, default_value = "cpu")]
    device: Device,
}

pub(super) fn run(args: TrainArgs) -> Result<()> {
    args.device.check_available()?;
    let mut changes = args.changes;
    changes.extend(args.steps.map(|steps| format!("train.steps={steps}")));
    let config = RunConfig::load(&args.config, &changes)?;
    let folder = args.out.unwrap_or_else(|| Path::new("runs").join(&config.name));
    let stop = StopFlag::on_signals()?;
    Trainer::open(config, &folder, stop)?.run().map(drop)
}
