//! `stickbreak train`.

use crate::config::RunConfig;
use crate::data::DataError;
use crate::device::DeviceOption;
use crate::distributed::{Timeouts, connect_unless, launch, spawn};
use crate::signal::StopFlag;
use crate::trainer::{Trainer, TrainerOptions, program_version};
use anyhow::Result;
use clap::Args;
use std::path::{Path, PathBuf};
use std::time::Duration;
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
    /// Record some steps: where the time goes, as a table and as a trace in the run's folder.
    #[arg(long)]
    profile: bool,
    /// Start so many processes on this machine, each with a GPU of its own. Under torchrun, srun or mpirun, which start
    /// them themselves, leave it out.
    #[arg(long, value_name = "N")]
    gpus: Option<usize>,
    #[command(flatten)]
    device: DeviceOption,
}

pub(super) fn run(args: TrainArgs) -> Result<()> {
    let mut changes = args.changes;
    changes.extend(args.steps.map(|steps| format!("train.steps={steps}")));
    let config = RunConfig::load(&args.config, &changes)?;
    let folder = args.out.unwrap_or_else(|| Path::new("runs").join(&config.name));
    let launch = launch::detect_here()?;
    if let Some(gpus) = args.gpus.filter(|_| !spawn::is_spawned()) {
        return Ok(spawn::run_self(&launch, gpus)?);
    }
    spawn::end_with_launcher()?;
    let stop = StopFlag::on_signals()?;
    if launch.ranks > 1 && launch.rank == 0 {
        eprintln!("{launch}");
    }
    let device = args.device.announce_for(&launch)?;
    let collective = Duration::from_secs(config.distributed.timeout_seconds);
    let timeouts = Timeouts { collective, ..Timeouts::default() };
    let communicator = match connect_unless(&launch, device, &identity(&config, device), timeouts, &stop) {
        // Nothing has begun: an end in order.
        Err(error) if stop.is_set() => {
            eprintln!("{error}");
            return Ok(());
        }
        communicator => communicator?,
    };
    let options = TrainerOptions { device, profile: args.profile, communicator, ..TrainerOptions::default() };
    match Trainer::open_with(config, &folder, stop, options) {
        // What is prepared is kept, and the same command goes on: for a single process this is an end in order.
        Err(error) if launch.ranks == 1 && is_stopped(&error) => {
            eprintln!("{error:#}");
            Ok(())
        }
        trainer => trainer?.run().map(drop),
    }
}

/// Whether a preparation of data was stopped by a signal, rather than failed.
fn is_stopped(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| matches!(cause.downcast_ref(), Some(DataError::Stopped(_))))
}

/// What has to be the same for all ranks, whose commands may have been typed on different machines.
fn identity(config: &RunConfig, device: Device) -> Vec<(String, String)> {
    let device = if device == Device::Cpu { "CPU" } else { "GPU" };
    let config = blake3::hash(config.to_toml().as_bytes()).to_hex();
    let entries =
        [("program", program_version()), ("device", device.to_owned()), ("configuration", config.to_string())];
    entries.map(|(name, value)| (name.to_owned(), value)).into()
}
