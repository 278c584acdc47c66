//! The Rust sources in the user's cargo registry: real text that is there once this workspace has been built.

use super::source::{InputFile, input_file};
use super::{DataError, Result, files};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::env;
use std::path::{Path, PathBuf};
use walkdir::WalkDir;

/// Which files of the registry are taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryOptions {
    /// Shorter files are left out: long contexts want long files. In bytes.
    pub min_file_bytes: u64,
    /// Longer files are left out: at this size they are mostly generated tables. In bytes.
    pub max_file_bytes: u64,
    /// Taking files ends before their sum exceeds this. In bytes.
    pub max_bytes: u64,
    /// Cargo's home folder; without it `$CARGO_HOME` or `~/.cargo`.
    pub cargo_home: Option<PathBuf>,
}

impl Default for RegistryOptions {
    fn default() -> Self {
        Self { min_file_bytes: 32 << 10, max_file_bytes: 512 << 10, max_bytes: 64 << 20, cargo_home: None }
    }
}

/// Finds the files, without duplicates, in an order that depends on their names only. The order is that of the names'
/// hashes: a cap on the bytes then takes something of every crate and not the crates that begin with `a`.
///
/// Fails when there is no registry or no file in it that fits.
pub fn find_files(options: &RegistryOptions) -> Result<Vec<InputFile>> {
    let home = cargo_home(options)?;
    let root = home.join("registry").join("src");
    let mut candidates = Vec::new();
    // src/<registry>/<crate>-<version>/**.rs
    for entry in WalkDir::new(&root).min_depth(3).into_iter().filter_map(Result::ok) {
        let fits = entry.metadata().is_ok_and(|m| (options.min_file_bytes..=options.max_file_bytes).contains(&m.len()));
        let path = entry.path();
        if fits && entry.file_type().is_file() && path.extension().is_some_and(|e| e == "rs") {
            candidates.push(input_file(path, &name_in_registry(&root, path))?);
        }
    }
    candidates.sort_by_cached_key(|file| (*blake3::hash(file.name.as_bytes()).as_bytes(), file.path.clone()));

    let (mut taken, mut seen, mut bytes) = (Vec::new(), HashSet::new(), 0);
    for file in candidates {
        if bytes + file.bytes > options.max_bytes {
            break;
        }
        if seen.insert(blake3::hash(&files::read(&file.path)?)) {
            bytes += file.bytes;
            taken.push(file);
        }
    }
    if taken.is_empty() {
        return Err(DataError::Input(format!(
            "{}: no Rust source file of {} to {} bytes here; build this workspace first (`cargo build`), which downloads \
             the sources of its dependencies, or name other text",
            root.display(),
            options.min_file_bytes,
            options.max_file_bytes
        )));
    }
    Ok(taken)
}

/// `<crate>-<version>/src/lib.rs`: without the registry's folder, whose name holds a hash that differs between machines.
fn name_in_registry(root: &Path, path: &Path) -> PathBuf {
    path.strip_prefix(root).unwrap_or(path).components().skip(1).collect()
}

fn cargo_home(options: &RegistryOptions) -> Result<PathBuf> {
    let from_environment = || env::var_os("CARGO_HOME").filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = options.cargo_home.clone().or_else(from_environment).or_else(|| Some(env::home_dir()?.join(".cargo")));
    home.ok_or_else(|| DataError::Input("cargo-registry: neither CARGO_HOME nor a home folder is set".into()))
}
