//! Small file helpers: positioned reads, durable writes, checksums.

use super::{DataError, Result};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// A file open for positioned reads, which need no shared cursor and no lock.
#[derive(Debug)]
pub(crate) struct DataFile {
    pub path: PathBuf,
    pub len: u64,
    file: File,
}

impl DataFile {
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(DataError::io(path, "open"))?;
        let len = file.metadata().map_err(DataError::io(path, "read the size"))?.len();
        Ok(Self { path: path.to_path_buf(), len, file })
    }

    /// Reads `len` bytes from `offset`; fails when the file has fewer (also when it shrank since it was opened).
    pub fn read_at(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let out_of_bounds = |file_len| DataError::OutOfBounds {
            path: self.path.clone(),
            what: "bytes",
            start: offset,
            end: offset.saturating_add(len as u64),
            len: file_len,
        };
        if offset.checked_add(len as u64).is_none_or(|end| end > self.len) {
            return Err(out_of_bounds(self.len));
        }
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, offset).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => out_of_bounds(self.file.metadata().map_or(0, |m| m.len())),
            _ => DataError::io(&self.path, "read")(error),
        })?;
        Ok(bytes)
    }
}

/// The name under which `path` is written until it is complete. One fixed name, so that an interrupted write leaves
/// at most one such file, which the next attempt overwrites.
pub(crate) fn partial_path(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".partial");
    path.with_file_name(name)
}

/// Moves a complete, synced file to its final name and makes the name durable.
pub(crate) fn publish(partial: &Path, path: &Path) -> Result<()> {
    fs::rename(partial, path).map_err(DataError::io(path, "rename into place"))?;
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|f| f.sync_all()).map_err(DataError::io(folder, "sync"))
}

/// Writes a small file so that a reader sees the old contents or the new, never a part.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let partial = partial_path(path);
    let write = || {
        let mut file = File::create(&partial)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(DataError::io(&partial, "write"))?;
    publish(&partial, path)
}

/// Reads a whole small file.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(DataError::io(path, "read"))
}

/// blake3 of a file, in hexadecimal: what `b3sum` prints.
pub(crate) fn blake3_of_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(DataError::io(path, "open"))?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(&mut file).map_err(DataError::io(path, "read"))?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// Reads at most `limit` bytes from the beginning of a file.
pub(crate) fn read_beginning(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(DataError::io(path, "open"))?;
    file.take(limit).read_to_end(&mut bytes).map_err(DataError::io(path, "read"))?;
    Ok(bytes)
}
