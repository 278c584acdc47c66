//! The folder `checkpoints/` of a run.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::DeserializeOwned;

use super::disk::{Disk, RealDisk};
use super::error::{CheckpointError, io_error};
use super::manifest::{FileEntry, Manifest, check_contents, check_hash, check_length};
use super::writer::CheckpointWriter;

/// Which checkpoints stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeepPolicy {
    /// The newest `last` sound ones stay; at least 2, so that there is one to fall back to.
    pub last: usize,
    /// Besides, every checkpoint whose step is a multiple of this stays for good.
    pub every: Option<u64>,
}

impl Default for KeepPolicy {
    fn default() -> Self {
        Self { last: 2, every: None }
    }
}

/// The checkpoints of one run.
#[derive(Clone)]
pub struct CheckpointStore {
    root: PathBuf,
    keep: KeepPolicy,
    disk: Arc<dyn Disk>,
}

/// A checkpoint whose manifest and checksums were all found right when it was opened.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    folder: PathBuf,
    manifest: Manifest,
}

impl CheckpointStore {
    /// Opens the store in the folder `root`, making the folder if need be, and removes what dead processes left
    /// half-written there.
    ///
    /// # Errors
    /// [`CheckpointError::Policy`] for `last < 2` or `every = 0`; [`CheckpointError::Io`] with the path.
    pub fn open(root: impl Into<PathBuf>, keep: KeepPolicy) -> Result<Self, CheckpointError> {
        Self::open_on(root, keep, Arc::new(RealDisk))
    }

    /// [`Self::open`] with every change made through `disk`.
    pub fn open_on(root: impl Into<PathBuf>, keep: KeepPolicy, disk: Arc<dyn Disk>) -> Result<Self, CheckpointError> {
        if keep.last < 2 {
            return Err(CheckpointError::Policy { name: "last", least: 2, found: keep.last as u64 });
        }
        if keep.every == Some(0) {
            return Err(CheckpointError::Policy { name: "every", least: 1, found: 0 });
        }
        let store = Self::attach(root, keep, disk);
        if !store.root.is_dir() {
            fs::create_dir_all(&store.root).map_err(io_error("create folder", &store.root))?;
            if let Some(parent) = store.root.parent().filter(|parent| parent.is_dir()) {
                RealDisk.sync_dir(parent).map_err(io_error("sync folder", parent))?;
            }
        }
        for (path, owner) in store.leftovers()? {
            if !is_other_live_process(owner) {
                tracing::info!("removing {}, which process {owner} left unfinished", path.display());
                store.remove_folder(&path).map_err(io_error("remove", &path))?;
            }
        }
        Ok(store)
    }

    /// The store that another process has opened, for reading and for taking part in its saves; changes nothing.
    pub fn attach(root: impl Into<PathBuf>, keep: KeepPolicy, disk: Arc<dyn Disk>) -> Self {
        Self { root: root.into(), keep, disk }
    }

    /// The store's folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder in which the checkpoint of `step` is, or would be.
    pub fn step_folder(&self, step: u64) -> PathBuf {
        self.root.join(step_name(step))
    }

    /// Steps that have a folder, ascending, whether what is in it is valid or not.
    ///
    /// A store with steps of which [`Self::latest_valid`] finds none valid has lost state: a run must not start from
    /// scratch over it.
    pub fn steps(&self) -> Result<Vec<u64>, CheckpointError> {
        let mut steps: Vec<u64> = self.names()?.iter().filter_map(|name| parse_step_name(name)).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// Saves the checkpoint of `step`; `contents` writes its files. Returns when it is on the disk, checked, and old
    /// ones are gone. A damaged checkpoint of the same step is replaced.
    ///
    /// # Errors
    /// [`CheckpointError::Exists`] if a valid one of this step is there; [`CheckpointError::Contents`] with the cause
    /// if anything failed before the end: the store is then as it was before the call. That an old checkpoint could
    /// not be deleted is a warning, not an error.
    pub fn save(
        &self,
        step: u64,
        contents: impl FnOnce(&mut CheckpointWriter<'_>) -> anyhow::Result<()>,
    ) -> Result<Checkpoint, CheckpointError> {
        let folder = self.step_folder(step);
        if folder.exists() && Checkpoint::open(&folder).is_ok() {
            return Err(CheckpointError::Exists { path: folder, step });
        }
        let temporary = self.temporary_folder(step, std::process::id());
        let manifest = match self.write(step, &temporary, &folder, contents) {
            Ok(manifest) => manifest,
            Err(source) => {
                if let Err(error) = self.remove_folder(&temporary) {
                    tracing::warn!("cannot remove {}: {error}", temporary.display());
                }
                return Err(CheckpointError::Contents { step, source });
            }
        };
        if let Err(error) = self.delete_old(step) {
            tracing::warn!("step {step} is saved, but an old checkpoint could not be deleted: {error}");
        }
        Ok(Checkpoint { folder, manifest })
    }

    /// Where the process with this number writes the checkpoint of `step`.
    fn temporary_folder(&self, step: u64, process: u32) -> PathBuf {
        self.root.join(format!(".tmp-{}-{process}", step_name(step)))
    }

    /// Writes files into a checkpoint that the process `saver` is saving ([`Self::save`]) and checks them. Their entries
    /// have to get to that process, which takes them with [`CheckpointWriter::adopt`].
    ///
    /// # Errors
    /// [`CheckpointError::Contents`] with the cause.
    pub fn write_part(
        &self,
        step: u64,
        saver: u32,
        contents: impl FnOnce(&mut CheckpointWriter<'_>) -> anyhow::Result<()>,
    ) -> Result<BTreeMap<String, FileEntry>, CheckpointError> {
        let folder = self.temporary_folder(step, saver);
        let write = || -> anyhow::Result<_> {
            let mut writer = CheckpointWriter::new(&*self.disk, folder.clone());
            contents(&mut writer)?;
            let entries = writer.into_entries();
            for (name, entry) in &entries {
                check_contents(&folder.join(name), entry)?;
            }
            Ok(entries)
        };
        write().map_err(|source| CheckpointError::Contents { step, source })
    }

    /// Steps 1 to 4 of a save, as the module's doc numbers them.
    fn write(
        &self,
        step: u64,
        temporary: &Path,
        folder: &Path,
        contents: impl FnOnce(&mut CheckpointWriter<'_>) -> anyhow::Result<()>,
    ) -> anyhow::Result<Manifest> {
        let disk = &*self.disk;
        self.remove_folder(temporary).map_err(io_error("remove", temporary))?;
        disk.create_dir(temporary).map_err(io_error("create folder", temporary))?;
        let mut writer = CheckpointWriter::new(disk, temporary.to_owned());
        contents(&mut writer)?;
        let (manifest, adopted) = writer.finish(step)?;
        for (name, entry) in &manifest.files {
            // Who wrote the others has read them back.
            let path = temporary.join(name);
            if adopted.contains(name) { check_length(&path, entry) } else { check_contents(&path, entry) }?;
        }
        if folder.exists() {
            self.discard(step)?; // Damaged, or `save` would have refused.
        }
        disk.rename(temporary, folder).map_err(io_error("rename into place as", folder))?;
        if let Err(error) = disk.sync_dir(&self.root) {
            // It may vanish at a power cut, so it must not count as saved.
            let _ = disk.rename(folder, temporary);
            return Err(io_error("sync folder", &self.root)(error).into());
        }
        Ok(manifest)
    }

    /// The newest checkpoint whose manifest and files are all right; damaged ones are reported by a warning that names
    /// the file with both values, and skipped. Reads every byte of what it returns.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] if the store's folder cannot be listed.
    pub fn latest_valid(&self) -> Result<Option<Checkpoint>, CheckpointError> {
        for &step in self.steps()?.iter().rev() {
            match self.open_step(step) {
                Ok(checkpoint) => return Ok(Some(checkpoint)),
                Err(error) => tracing::warn!("skipping the damaged checkpoint of step {step}: {error}"),
            }
        }
        Ok(None)
    }

    /// The checkpoint of `step`, fully checked.
    ///
    /// # Errors
    /// [`CheckpointError::NoSuchStep`] with the steps that exist, or what is wrong with which file.
    pub fn open_step(&self, step: u64) -> Result<Checkpoint, CheckpointError> {
        Checkpoint::open(&self.existing_folder(step)?)
    }

    /// The checkpoint of `step`, of which only the lengths of the files are checked: for a rank that another one has told
    /// that it is valid.
    ///
    /// # Errors
    /// As [`Self::open_step`].
    pub fn open_step_unread(&self, step: u64) -> Result<Checkpoint, CheckpointError> {
        Checkpoint::open_unread(&self.existing_folder(step)?)
    }

    fn existing_folder(&self, step: u64) -> Result<PathBuf, CheckpointError> {
        let folder = self.step_folder(step);
        if folder.is_dir() {
            return Ok(folder);
        }
        Err(CheckpointError::NoSuchStep { root: self.root.clone(), step, available: self.steps()? })
    }

    /// Deletes the checkpoint of `step`, valid or not; nothing happens if there is none. For going back: a run that
    /// continues from an older step first discards the newer ones.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] with the path.
    pub fn discard(&self, step: u64) -> Result<(), CheckpointError> {
        let folder = self.step_folder(step);
        if !folder.exists() {
            return Ok(());
        }
        let trash = self.root.join(format!(".trash-{}-{}", step_name(step), std::process::id()));
        self.remove_folder(&trash).map_err(io_error("remove", &trash))?;
        self.disk.rename(&folder, &trash).map_err(io_error("rename", &folder))?;
        self.remove_folder(&trash).map_err(io_error("remove", &trash))
    }

    /// Applies the policy after `saved` became durable. Never touches `saved` itself, nor anything newer (which is
    /// damaged, or belongs to a run that went back).
    fn delete_old(&self, saved: u64) -> Result<(), CheckpointError> {
        let older: Vec<u64> = self.steps()?.into_iter().filter(|&step| step < saved).collect();
        // A damaged folder does not count as one of the `last`. Lengths are enough here: the one just saved was
        // read back in full, and reading all others at each save would take longer than writing.
        let sound = |step: &&u64| Checkpoint::open_unread(&self.step_folder(**step)).is_ok();
        let Some(&oldest_kept) = older.iter().rev().filter(sound).nth(self.keep.last - 2) else {
            return Ok(());
        };
        for step in older {
            let milestone = self.keep.every.is_some_and(|every| step % every == 0);
            if step < oldest_kept && !milestone {
                self.discard(step)?;
            }
        }
        Ok(())
    }

    /// Deletes a folder of plain files; fine if it is not there.
    fn remove_folder(&self, folder: &Path) -> io::Result<()> {
        let entries = match fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        for entry in entries {
            self.disk.remove_file(&entry?.path())?;
        }
        self.disk.remove_dir(folder)
    }

    /// Unfinished saves and deletions with the process that they belong to.
    fn leftovers(&self) -> Result<Vec<(PathBuf, u32)>, CheckpointError> {
        let owner = |name: &str| {
            let rest = name.strip_prefix(".tmp-").or_else(|| name.strip_prefix(".trash-"))?;
            let (step, process) = rest.rsplit_once('-')?;
            parse_step_name(step)?;
            process.parse().ok()
        };
        Ok(self.names()?.iter().filter_map(|name| Some((self.root.join(name), owner(name)?))).collect())
    }

    fn names(&self) -> Result<Vec<String>, CheckpointError> {
        let listed = || fs::read_dir(&self.root)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>();
        let names = listed().map_err(io_error("list", &self.root))?;
        Ok(names.into_iter().filter_map(|name| name.into_string().ok()).collect())
    }
}

impl Checkpoint {
    /// Opens a checkpoint's folder and checks its manifest and every file against it.
    ///
    /// # Errors
    /// What is wrong with which file: [`CheckpointError::Manifest`], [`CheckpointError::Missing`],
    /// [`CheckpointError::Length`], [`CheckpointError::Checksum`] or [`CheckpointError::Io`].
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let checkpoint = Self::open_unread(folder)?;
        Self::verify(folder, &checkpoint.manifest)?;
        Ok(checkpoint)
    }

    /// As [`Self::open`], but of the files only the lengths are checked.
    fn open_unread(folder: &Path) -> Result<Self, CheckpointError> {
        let manifest = Manifest::read(folder)?;
        let named = folder.file_name().and_then(|name| parse_step_name(name.to_str()?));
        if let Some(step) = named.filter(|&step| step != manifest.step) {
            return Err(CheckpointError::Manifest {
                path: folder.join(super::MANIFEST_NAME),
                problem: format!("it is of step {}, but the folder's name says {step}", manifest.step),
            });
        }
        for (name, entry) in &manifest.files {
            check_length(&folder.join(name), entry)?;
        }
        Ok(Self { folder: folder.to_owned(), manifest })
    }

    fn verify(folder: &Path, manifest: &Manifest) -> Result<(), CheckpointError> {
        manifest.files.iter().try_for_each(|(name, entry)| check_contents(&folder.join(name), entry))
    }

    /// Optimizer steps that had been taken.
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// The checkpoint's folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Names and entries of the files, in order of name; the manifest is not among them.
    pub fn files(&self) -> impl Iterator<Item = (&str, &FileEntry)> {
        self.manifest.files.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    /// Where the file `name` is.
    ///
    /// # Errors
    /// [`CheckpointError::NoSuchFile`] with the names that there are.
    pub fn path(&self, name: &str) -> Result<PathBuf, CheckpointError> {
        self.entry(name).map(|_| self.folder.join(name))
    }

    /// The bytes of the file `name`, checked once more: what is returned is what was saved.
    ///
    /// # Errors
    /// As [`Self::path`], and [`CheckpointError::Length`], [`CheckpointError::Checksum`] or [`CheckpointError::Io`].
    pub fn read(&self, name: &str) -> Result<Vec<u8>, CheckpointError> {
        let entry = self.entry(name)?;
        let path = self.folder.join(name);
        check_length(&path, entry)?;
        let bytes = fs::read(&path).map_err(io_error("read", &path))?;
        check_hash(&path, entry, blake3::hash(&bytes))?;
        Ok(bytes)
    }

    /// The file `name` as the JSON that [`CheckpointWriter::json`] wrote.
    ///
    /// # Errors
    /// As [`Self::read`]; JSON that does not fit `T` is [`CheckpointError::Io`] with the place in the file.
    pub fn json<T: DeserializeOwned>(&self, name: &str) -> Result<T, CheckpointError> {
        let bytes = self.read(name)?;
        serde_json::from_slice(&bytes)
            .map_err(|error| io_error("understand", &self.folder.join(name))(io::Error::other(error)))
    }

    fn entry(&self, name: &str) -> Result<&FileEntry, CheckpointError> {
        self.manifest.files.get(name).ok_or_else(|| CheckpointError::NoSuchFile {
            folder: self.folder.clone(),
            name: name.to_owned(),
            available: self.manifest.files.keys().cloned().collect(),
        })
    }
}

/// Eight digits sort by name as by number for the first hundred million steps; more digits are fine.
fn step_name(step: u64) -> String {
    format!("step-{step:08}")
}

fn parse_step_name(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (step_name(step) == name).then_some(step)
}

/// Whether `process` runs and is not this one. Our own number on a leftover is that of an earlier process: in a
/// container the same program often gets the same number again. Where processes cannot be looked up, none counts as
/// alive: a store has one writer.
fn is_other_live_process(process: u32) -> bool {
    process != std::process::id() && Path::new("/proc/self").exists() && Path::new(&format!("/proc/{process}")).exists()
}
