//! `manifest.json`: which files a checkpoint has, how long they are and what they hash to.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::{CheckpointError, io_error};

/// Name of the manifest in a checkpoint's folder.
pub const MANIFEST_NAME: &str = "manifest.json";
/// Version of the manifest that this code writes and reads.
pub const MANIFEST_VERSION: u32 = 1;

const FORMAT: &str = "stickbreak-checkpoint";

/// One file of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Length in bytes.
    pub bytes: u64,
    /// BLAKE3 checksum, 64 hexadecimal digits.
    pub blake3: String,
}

/// The contents of `manifest.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: String,
    version: u32,
    /// Optimizer steps that had been taken.
    pub step: u64,
    /// Files by name, the manifest itself excepted.
    pub files: BTreeMap<String, FileEntry>,
    /// BLAKE3 of the manifest with this field empty: it vouches for the files, so something must vouch for it.
    manifest_blake3: String,
}

impl Manifest {
    /// The manifest of these files.
    pub fn new(step: u64, files: BTreeMap<String, FileEntry>) -> Self {
        let mut manifest =
            Self { format: FORMAT.to_owned(), version: MANIFEST_VERSION, step, files, manifest_blake3: String::new() };
        manifest.manifest_blake3 = blake3::hash(&manifest.to_bytes()).to_hex().to_string();
        manifest
    }

    /// The bytes of `manifest.json`; there is one way only to write a given manifest.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("strings and integers can always be written as JSON");
        bytes.push(b'\n');
        bytes
    }

    /// Reads and checks the manifest in a checkpoint's folder. The files that it lists are not looked at.
    ///
    /// # Errors
    /// [`CheckpointError::Manifest`] if it is absent, of another format or version, or if any byte of it changed.
    pub fn read(folder: &Path) -> Result<Self, CheckpointError> {
        let path = folder.join(MANIFEST_NAME);
        let refuse = |problem: String| CheckpointError::Manifest { path: path.clone(), problem };
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(refuse("missing".to_owned())),
            Err(error) => return Err(io_error("read", &path)(error)),
        };
        /// What every version has, so that a newer one is refused by its number and not by a field it added.
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u32,
        }
        let damaged = |error| refuse(format!("damaged or truncated, {} bytes long: {error}", bytes.len()));
        let head: Head = serde_json::from_slice(&bytes).map_err(damaged)?;
        if head.format != FORMAT {
            return Err(refuse(format!("format is {:?}, expected {FORMAT:?}", head.format)));
        }
        if head.version != MANIFEST_VERSION {
            return Err(refuse(format!("version is {}, this program reads {MANIFEST_VERSION}", head.version)));
        }
        let manifest: Self = serde_json::from_slice(&bytes).map_err(damaged)?;
        let expected = Self::new(manifest.step, manifest.files.clone());
        if manifest.manifest_blake3 != expected.manifest_blake3 {
            let (found, stated) = (expected.manifest_blake3, manifest.manifest_blake3);
            return Err(refuse(format!("BLAKE3 checksum of its contents is {found}, but it says {stated}")));
        }
        let canonical = expected.to_bytes();
        if bytes != canonical {
            let (found, expected) = (bytes.len(), canonical.len());
            return Err(refuse(format!("bytes between its values changed: {found} bytes long, expected {expected}")));
        }
        Ok(manifest)
    }
}

/// Whether a file is as long as its entry says: what can be checked without reading it.
pub(super) fn check_length(path: &Path, entry: &FileEntry) -> Result<(), CheckpointError> {
    let found = match fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(CheckpointError::Missing { path: path.to_owned(), expected: entry.bytes });
        }
        Err(error) => return Err(io_error("look at", path)(error)),
    };
    if found == entry.bytes {
        Ok(())
    } else {
        Err(CheckpointError::Length { path: path.to_owned(), expected: entry.bytes, found })
    }
}

/// Whether a file has the length and the checksum of its entry; reads all of it, a piece at a time.
pub(super) fn check_contents(path: &Path, entry: &FileEntry) -> Result<(), CheckpointError> {
    check_length(path, entry)?;
    let mut file = File::open(path).map_err(io_error("open", path))?;
    let mut hasher = blake3::Hasher::new();
    let mut piece = vec![0; 1 << 20];
    loop {
        match file.read(&mut piece).map_err(io_error("read", path))? {
            0 => return check_hash(path, entry, hasher.finalize()),
            count => hasher.update(&piece[..count]),
        };
    }
}

/// Compares a computed checksum with an entry's.
pub(super) fn check_hash(path: &Path, entry: &FileEntry, hash: blake3::Hash) -> Result<(), CheckpointError> {
    let found = hash.to_hex().to_string();
    if found == entry.blake3 {
        Ok(())
    } else {
        Err(CheckpointError::Checksum { path: path.to_owned(), expected: entry.blake3.clone(), found })
    }
}
