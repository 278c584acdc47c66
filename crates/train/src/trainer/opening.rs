//! What the ranks of a run open together: the data, the run's folder, the checkpoint to go on from.

use super::ranks::agree_on_data;
use super::text::Text;
use crate::checkpoint::{Checkpoint, CheckpointStore, Disk, KeepPolicy};
use crate::config::RunConfig;
use crate::distributed::Communicator;
use crate::metrics::RunMetrics;
use crate::signal::StopFlag;
use anyhow::{Context, Result, bail};
use std::collections::HashMap;
use std::fs::{File, TryLockError};
use std::path::Path;
use std::sync::Arc;

/// Kinds of metrics that are made once for a step and not again after a resume.
const MEASURED_ONCE: [&str; 6] = ["valid", "tiles", "sample", "length", "attention", "memory"];

/// The run's data, which the leading rank prepares before the others open it.
pub(super) fn open_text(config: &RunConfig, communicator: &dyn Communicator, stop: &StopFlag) -> Result<Text> {
    let leads = communicator.rank() == 0;
    let first = leads.then(|| Text::open_unless(config, stop)).transpose()?;
    communicator.barrier("rank 0 opens or prepares the data")?;
    let text = first.map_or_else(|| Text::open(config), Ok)?;
    agree_on_data(communicator, &text.fingerprint)?;
    Ok(text)
}

pub(super) fn make_folder(folder: &Path) -> Result<File> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    lock(folder)
}

/// The run's checkpoints, and the one to go on from, which the leading rank looks for.
pub(super) fn open_store(
    config: &RunConfig,
    folder: &Path,
    disk: Arc<dyn Disk>,
    communicator: &dyn Communicator,
) -> Result<(CheckpointStore, Option<Checkpoint>)> {
    let keep = KeepPolicy {
        last: config.checkpoint.keep_last,
        every: (config.checkpoint.keep_every > 0).then_some(config.checkpoint.keep_every),
    };
    let root = folder.join("checkpoints");
    let rank = communicator.rank();
    if rank > 0 {
        let told = communicator.gather_values("the checkpoint to go on from", &[])?;
        let store = CheckpointStore::attach(root, keep, disk);
        let step = told[0].first().map(|&step| step as u64);
        let checkpoint = step.map(|step| store.open_step_unread(step)).transpose().with_context(|| {
            format!(
                "rank 0 goes on from a checkpoint that rank {rank} cannot read: all ranks need the same {}",
                folder.display()
            )
        })?;
        return Ok((store, checkpoint));
    }
    let store = CheckpointStore::open_on(root, keep, disk)?;
    let checkpoint = store.latest_valid()?;
    if let (None, Some(step)) = (&checkpoint, store.steps()?.last()) {
        bail!(
            "{} has checkpoints up to step {step}, but none of them is valid (see the warnings above); \
             move them away to start from the beginning",
            store.root().display()
        );
    }
    let step: Vec<f64> = checkpoint.iter().map(|checkpoint| checkpoint.step() as f64).collect();
    communicator.gather_values("the checkpoint to go on from", &step)?;
    Ok((store, checkpoint))
}

/// What the metrics have already, as the leading rank knows.
pub(super) fn measured_steps(
    metrics: Option<&RunMetrics>,
    communicator: &dyn Communicator,
) -> Result<HashMap<&'static str, u64>> {
    let last = |kind: &str| metrics.and_then(|metrics| metrics.last_step(kind)).map_or(-1.0, |step| step as f64);
    let told = communicator.gather_values("what is measured already", &MEASURED_ONCE.map(last))?;
    let known = std::iter::zip(MEASURED_ONCE, &told[0]).filter(|(_, step)| **step >= 0.0);
    Ok(known.map(|(kind, &step)| (kind, step as u64)).collect())
}

/// Two processes in one folder would tear each other's metrics and checkpoints.
fn lock(folder: &Path) -> Result<File> {
    let path = folder.join(".lock");
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!("another process is training in {}", folder.display()),
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
}
