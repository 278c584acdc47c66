//! What can be wrong with a checkpoint. Every message names the file and both values.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// A checkpoint that cannot be written, or that must not be read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The operating system refused.
    #[error("cannot {action} {}: {cause}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// Why it failed; part of the message, and so not repeated as `source()`.
        cause: io::Error,
    },
    /// The manifest lists a file that is not there.
    #[error("{}: missing, but the manifest lists it with {expected} bytes", path.display())]
    Missing {
        /// The absent file.
        path: PathBuf,
        /// Its length by the manifest, in bytes.
        expected: u64,
    },
    /// A file was truncated or grew.
    #[error("{}: {found} bytes long, but the manifest says {expected}", path.display())]
    Length {
        /// The damaged file.
        path: PathBuf,
        /// Bytes by the manifest.
        expected: u64,
        /// Bytes on the disk.
        found: u64,
    },
    /// A file's bytes changed.
    #[error("{}: BLAKE3 checksum {found}, but the manifest says {expected}", path.display())]
    Checksum {
        /// The damaged file.
        path: PathBuf,
        /// Checksum by the manifest, in hexadecimal.
        expected: String,
        /// Checksum of what is on the disk.
        found: String,
    },
    /// The manifest itself is absent, damaged, of another version or of another step.
    #[error("{}: {problem}", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// There is no checkpoint of this step.
    #[error("{}: no checkpoint of step {step}; there is {available:?}", root.display())]
    NoSuchStep {
        /// Folder of the store.
        root: PathBuf,
        /// Step asked for.
        step: u64,
        /// Steps that have a folder.
        available: Vec<u64>,
    },
    /// A checkpoint has no file of this name.
    #[error("{}: no file {name:?} in this checkpoint; there is {available:?}", folder.display())]
    NoSuchFile {
        /// Folder of the checkpoint.
        folder: PathBuf,
        /// Name asked for.
        name: String,
        /// Names that the manifest lists.
        available: Vec<String>,
    },
    /// A valid checkpoint of this step exists; it is never overwritten.
    #[error("{}: a valid checkpoint of step {step} exists already", path.display())]
    Exists {
        /// Its folder.
        path: PathBuf,
        /// Its step.
        step: u64,
    },
    /// A file name that is not plain, or is taken.
    #[error("checkpoint file name {name:?} {problem}")]
    FileName {
        /// The refused name.
        name: String,
        /// Why.
        problem: &'static str,
    },
    /// A policy that could leave no checkpoint to fall back to.
    #[error("checkpoints to keep: {name} = {found}, but it must be at least {least}")]
    Policy {
        /// Which field of the policy.
        name: &'static str,
        /// Least allowed value.
        least: u64,
        /// Value given.
        found: u64,
    },
    /// The caller's part of a save failed, or a write under it.
    #[error("cannot save the checkpoint of step {step}; earlier checkpoints are untouched")]
    Contents {
        /// Step that was being saved.
        step: u64,
        /// What the caller's function returned.
        source: anyhow::Error,
    },
}

/// `map_err` for an operating system's error: says what was tried on which path.
pub(super) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CheckpointError {
    let path = path.to_owned();
    move |cause| CheckpointError::Io { action, path, cause }
}
