//! Writing the files of one checkpoint: streamed, hashed on the way, fsynced.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;

use super::disk::Disk;
use super::error::{CheckpointError, io_error};
use super::manifest::{FileEntry, MANIFEST_NAME, Manifest};

/// Bytes collected before they are hashed and handed to the disk.
const BUFFER_BYTES: usize = 1 << 20;

/// Takes the files of one checkpoint; handed to the function given to [`super::CheckpointStore::save`].
pub struct CheckpointWriter<'disk> {
    disk: &'disk dyn Disk,
    folder: PathBuf,
    files: BTreeMap<String, FileEntry>,
    /// Those of them that others wrote.
    adopted: BTreeSet<String>,
}

impl<'disk> CheckpointWriter<'disk> {
    pub(super) fn new(disk: &'disk dyn Disk, folder: PathBuf) -> Self {
        Self { disk, folder, files: BTreeMap::new(), adopted: BTreeSet::new() }
    }

    /// Writes the file `name`: `contents` streams its bytes, and when this returns they are on the disk.
    ///
    /// # Errors
    /// A name that is not plain (letters, digits, `.`, `_`, `-`; no leading dot) or is taken, the error of `contents`,
    /// or the disk's, with the file's name.
    pub fn file(
        &mut self,
        name: &str,
        contents: impl FnOnce(&mut FileWriter<'_>) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        self.check_new(name)?;
        let entry = self.stream(name, contents)?;
        self.files.insert(name.to_owned(), entry);
        Ok(())
    }

    /// Takes up the file `name`, which another process has written into the same folder and checked
    /// ([`super::CheckpointStore::write_part`]).
    ///
    /// # Errors
    /// A name that is not plain or is taken.
    pub fn adopt(&mut self, name: &str, entry: FileEntry) -> anyhow::Result<()> {
        self.check_new(name)?;
        self.files.insert(name.to_owned(), entry);
        self.adopted.insert(name.to_owned());
        Ok(())
    }

    fn check_new(&self, name: &str) -> anyhow::Result<()> {
        check_name(name)?;
        if self.files.contains_key(name) {
            return Err(CheckpointError::FileName { name: name.to_owned(), problem: "is written twice" }.into());
        }
        Ok(())
    }

    /// Writes the file `name` from bytes that are at hand. Errors as [`Self::file`].
    pub fn bytes(&mut self, name: &str, bytes: &[u8]) -> anyhow::Result<()> {
        self.file(name, |out| Ok(out.write_all(bytes)?))
    }

    /// Writes the file `name` as indented JSON. Errors as [`Self::file`].
    pub fn json<T: Serialize + ?Sized>(&mut self, name: &str, value: &T) -> anyhow::Result<()> {
        self.file(name, |out| {
            serde_json::to_writer_pretty(&mut *out, value)?;
            Ok(out.write_all(b"\n")?)
        })
    }

    /// Entries of the files written.
    pub(super) fn into_entries(self) -> BTreeMap<String, FileEntry> {
        self.files
    }

    /// Writes the manifest, the last file, and makes the folder's list of names durable. Returns with it the names of the
    /// files that others wrote.
    pub(super) fn finish(self, step: u64) -> anyhow::Result<(Manifest, BTreeSet<String>)> {
        let manifest = Manifest::new(step, self.files.clone());
        self.stream(MANIFEST_NAME, |out| Ok(out.write_all(&manifest.to_bytes())?))?;
        self.disk.sync_dir(&self.folder).map_err(io_error("sync folder", &self.folder))?;
        Ok((manifest, self.adopted))
    }

    fn stream(
        &self,
        name: &str,
        contents: impl FnOnce(&mut FileWriter<'_>) -> anyhow::Result<()>,
    ) -> anyhow::Result<FileEntry> {
        let path = self.folder.join(name);
        let file = self.disk.create_file(&path).map_err(io_error("create", &path))?;
        let sink = HashingFile { disk: self.disk, path: &path, file, hasher: blake3::Hasher::new(), bytes: 0 };
        let mut writer = FileWriter { out: BufWriter::with_capacity(BUFFER_BYTES, sink) };
        contents(&mut writer)
            .and_then(|()| Ok(writer.flush()?))
            .with_context(|| format!("write {}", path.display()))?;
        let sink = writer.out.get_ref();
        self.disk.sync_file(&path, &sink.file).map_err(io_error("sync", &path))?;
        Ok(FileEntry { bytes: sink.bytes, blake3: sink.hasher.finalize().to_hex().to_string() })
    }
}

/// Where the bytes of one file go; buffered.
pub struct FileWriter<'a> {
    out: BufWriter<HashingFile<'a>>,
}

impl Write for FileWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Counts and hashes exactly the bytes that the disk took.
struct HashingFile<'a> {
    disk: &'a dyn Disk,
    path: &'a Path,
    file: File,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl Write for HashingFile<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.disk.write(self.path, &mut self.file, bytes)?;
        self.hasher.update(&bytes[..count]);
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Refuses names that could leave the folder, hide, or stand for the manifest.
fn check_name(name: &str) -> Result<(), CheckpointError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let problem = if name == MANIFEST_NAME {
        "is the store's own"
    } else if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
        "is not plain: letters, digits, '.', '_' and '-' are, a leading '.' is not"
    } else {
        return Ok(());
    };
    Err(CheckpointError::FileName { name: name.to_owned(), problem })
}
