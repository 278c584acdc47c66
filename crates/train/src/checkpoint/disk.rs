//! What the store asks of a disk, so that tests can hand it one that fails.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// Every change that the store makes goes through here, one call per change; reading does not.
pub trait Disk: Send + Sync {
    /// Makes one folder; its parent exists.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Makes an empty file for writing; it must not exist.
    fn create_file(&self, path: &Path) -> io::Result<File>;
    /// Writes some of `bytes` to the file at `path`; returns how many.
    fn write(&self, path: &Path, file: &mut File, bytes: &[u8]) -> io::Result<usize>;
    /// Returns once the file's bytes are on the disk.
    fn sync_file(&self, path: &Path, file: &File) -> io::Result<()>;
    /// Returns once the folder's list of names is on the disk.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Renames in one step: a reader sees the old name or the new one.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Deletes a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Deletes an empty folder.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
}

/// The operating system's file system.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealDisk;

impl Disk for RealDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    fn create_file(&self, path: &Path) -> io::Result<File> {
        File::create_new(path)
    }

    fn write(&self, _path: &Path, file: &mut File, bytes: &[u8]) -> io::Result<usize> {
        file.write(bytes)
    }

    fn sync_file(&self, _path: &Path, file: &File) -> io::Result<()> {
        file.sync_all()
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        // Elsewhere a folder cannot be opened as a file, and the file system orders names by itself.
        if cfg!(unix) { File::open(path)?.sync_all() } else { Ok(()) }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }
}

/// Replaces the file at `path` by `bytes` so that a reader, or a crash, finds the old contents or the new, never a mix.
///
/// # Errors
/// The operating system's error of the step that failed; the old file is then untouched.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let name = path.file_name().ok_or_else(|| io::Error::other(format!("{} names no file", path.display())))?;
    // The parent of a bare file name is the empty path, which means the current folder but cannot be opened.
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let temporary = parent.join(format!(".tmp-{}-{}", name.to_string_lossy(), std::process::id()));
    let written = File::create(&temporary)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.and_then(|()| RealDisk.sync_dir(parent))
}
