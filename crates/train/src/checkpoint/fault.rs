//! A disk that fails on purpose, for tests of whatever saves checkpoints.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use super::disk::{Disk, RealDisk};

/// When a [`FaultyDisk`] fails. Operations are counted from 0; writing is counted in bytes instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Never: counts operations and bytes, so that a test knows how many points there are.
    Never,
    /// Instead of operation number `.0`.
    Before(u64),
    /// Just after operation number `.0` took effect, which reports an error all the same.
    After(u64),
    /// Once `.0` bytes have been written, in the middle of a write.
    Bytes(u64),
}

/// What happens then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// This and every later attempt to create, write or fsync says that no space is left; renaming and deleting work.
    DiskFull,
    /// The process is killed: this and every later operation fails without effect; what was done before stays.
    Killed,
    /// The power fails: as `Killed`, and besides all is lost that was not fsynced: bytes of files, new names in
    /// folders, renames. Deletions stay. This is the worst that a file system may do, not what one usually does.
    PowerCut,
}

/// Passes everything on to the real disk until it is time to fail; only an fsync is noted instead of done, since what
/// a power cut loses is simulated: thousands of saves then take seconds.
pub struct FaultyDisk {
    when: When,
    failure: Failure,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    operations: u64,
    bytes: u64,
    failed: bool,
    /// Durable length of each file that has bytes which are not.
    unsynced_files: HashMap<PathBuf, u64>,
    /// Changes of names that no fsync of their folder has made durable, oldest first.
    unsynced_names: Vec<NameChange>,
}

enum NameChange {
    Created(PathBuf),
    Renamed(PathBuf, PathBuf),
}

impl FaultyDisk {
    /// A disk on which `failure` happens at `when`.
    pub fn new(when: When, failure: Failure) -> Self {
        Self { when, failure, state: Mutex::default() }
    }

    /// Operations counted so far, writes excepted.
    pub fn operations(&self) -> u64 {
        self.state().operations
    }

    /// Bytes written so far.
    pub fn bytes(&self) -> u64 {
        self.state().bytes
    }

    /// Whether the failure has happened.
    pub fn failed(&self) -> bool {
        self.state().failed
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn fail<T>(&self, state: &mut State) -> io::Result<T> {
        if self.failure == Failure::PowerCut && !state.failed {
            state.lose_what_was_not_synced()?;
        }
        state.failed = true;
        Err(match self.failure {
            Failure::DiskFull => io::Error::new(io::ErrorKind::StorageFull, "no space left on device (injected)"),
            Failure::Killed => io::Error::other("the process was killed (injected)"),
            Failure::PowerCut => io::Error::other("the power failed (injected)"),
        })
    }

    /// One operation with its failure points. `needs_space`: whether a full disk keeps refusing it.
    fn operate<T>(
        &self,
        needs_space: bool,
        operation: impl FnOnce() -> io::Result<T>,
        record: impl FnOnce(&mut State),
    ) -> io::Result<T> {
        let mut state = self.state();
        if state.failed && (needs_space || self.failure != Failure::DiskFull) {
            return self.fail(&mut state);
        }
        let number = state.operations;
        state.operations += 1;
        if self.when == When::Before(number) {
            return self.fail(&mut state);
        }
        let result = operation()?;
        record(&mut state);
        if self.when == When::After(number) {
            return self.fail(&mut state);
        }
        Ok(result)
    }
}

impl State {
    fn lose_what_was_not_synced(&mut self) -> io::Result<()> {
        for (path, durable) in self.unsynced_files.drain() {
            match OpenOptions::new().write(true).open(&path) {
                Ok(file) => file.set_len(durable)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {} // Deleted since.
                Err(error) => return Err(error),
            }
        }
        // New names first: they are kept under the paths that they have now.
        let (created, renamed): (Vec<_>, Vec<_>) =
            self.unsynced_names.drain(..).rev().partition(|change| matches!(change, NameChange::Created(_)));
        for change in created.into_iter().chain(renamed) {
            match change {
                NameChange::Created(path) if path.is_dir() => fs::remove_dir_all(path)?,
                NameChange::Created(path) if path.exists() => fs::remove_file(path)?,
                NameChange::Renamed(from, to) if to.exists() => fs::rename(to, from)?,
                _ => {}
            }
        }
        Ok(())
    }
}

impl Disk for FaultyDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let record = |state: &mut State| state.unsynced_names.push(NameChange::Created(path.to_owned()));
        self.operate(true, || RealDisk.create_dir(path), record)
    }

    fn create_file(&self, path: &Path) -> io::Result<File> {
        let record = |state: &mut State| state.unsynced_names.push(NameChange::Created(path.to_owned()));
        self.operate(true, || RealDisk.create_file(path), record)
    }

    fn write(&self, path: &Path, file: &mut File, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.state();
        if state.failed {
            return self.fail(&mut state);
        }
        let room = match self.when {
            When::Bytes(limit) => limit.saturating_sub(state.bytes).min(bytes.len() as u64) as usize,
            _ => bytes.len(),
        };
        if room == 0 && !bytes.is_empty() {
            return self.fail(&mut state);
        }
        state.unsynced_files.entry(path.to_owned()).or_insert(0);
        let count = RealDisk.write(path, file, &bytes[..room])?;
        state.bytes += count as u64;
        Ok(count)
    }

    fn sync_file(&self, path: &Path, _file: &File) -> io::Result<()> {
        let record = |state: &mut State| _ = state.unsynced_files.remove(path);
        self.operate(true, || Ok(()), record)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let record = |state: &mut State| {
            state.unsynced_names.retain(|change| match change {
                NameChange::Created(name) | NameChange::Renamed(_, name) => name.parent() != Some(path),
            });
        };
        self.operate(true, || Ok(()), record)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let record = |state: &mut State| {
            // What was not durable under the old name is not durable under the new one.
            let moved = |path: PathBuf| match path.strip_prefix(from) {
                Ok(rest) if rest.as_os_str().is_empty() => to.to_owned(),
                Ok(rest) => to.join(rest),
                Err(_) => path,
            };
            state.unsynced_files = state.unsynced_files.drain().map(|(path, length)| (moved(path), length)).collect();
            for change in &mut state.unsynced_names {
                if let NameChange::Created(path) = change {
                    *path = moved(std::mem::take(path));
                }
            }
            state.unsynced_names.push(NameChange::Renamed(from.to_owned(), to.to_owned()));
        };
        self.operate(false, || RealDisk.rename(from, to), record)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.operate(false, || RealDisk.remove_file(path), |_| {})
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.operate(false, || RealDisk.remove_dir(path), |_| {})
    }
}
