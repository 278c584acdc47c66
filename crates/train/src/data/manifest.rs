//! `manifest.json`: what a prepared folder holds. It is written last, so a folder with a manifest is complete.

use super::files;
use super::{DataError, FormatError, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Name of the file in the folder.
pub const MANIFEST_FILE: &str = "manifest.json";

/// The version written and read here.
pub const FORMAT_VERSION: u32 = 1;

/// Description of a prepared folder. Unknown keys are refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT_VERSION`].
    pub format_version: u32,
    /// Every token id is below it.
    pub vocabulary_size: u32,
    /// The id that precedes each document.
    pub end_of_text: u32,
    /// How text became ids.
    pub tokenizer: TokenizerEntry,
    /// What is trained on.
    pub train: SplitEntry,
    /// What is held out.
    pub valid: SplitEntry,
    /// Files that documents were read from.
    pub source_files: u64,
    /// Files left out because they are binary.
    pub binary_files: u64,
    /// Documents left out because they are empty.
    pub empty_documents: u64,
    /// Documents in which invalid UTF-8 was replaced by U+FFFD (never with the byte vocabulary).
    pub replaced_documents: u64,
}

/// How text became ids.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum TokenizerEntry {
    /// One id per byte, and 256 for end of text.
    Bytes {},
    /// A Hugging Face tokenizer.
    File {
        /// Its name in this folder.
        file: String,
        /// Its checksum.
        blake3: String,
    },
}

/// One split.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitEntry {
    /// Tokens of all shards, end-of-text tokens included.
    pub tokens: u64,
    /// Bytes of the text that they stand for, end-of-text tokens not included.
    pub text_bytes: u64,
    /// Documents, hence end-of-text tokens.
    pub documents: u64,
    /// The shards, in order.
    pub shards: Vec<ShardEntry>,
}

/// One shard; it holds whole documents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEntry {
    /// Its name in this folder.
    pub file: String,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Its tokens, end-of-text tokens included.
    pub tokens: u64,
    /// Bytes of its text.
    pub text_bytes: u64,
    /// Its documents.
    pub documents: u64,
    /// Checksum of the file.
    pub blake3: String,
}

impl SplitEntry {
    /// A split of these shards.
    pub fn from_shards(shards: Vec<ShardEntry>) -> Self {
        let sum = |field: fn(&ShardEntry) -> u64| shards.iter().map(field).sum();
        Self { tokens: sum(|s| s.tokens), text_bytes: sum(|s| s.text_bytes), documents: sum(|s| s.documents), shards }
    }
}

/// Reads and checks the text of a manifest: version, keys, names that stay in the folder, sums that add up.
pub fn parse_manifest(bytes: &[u8]) -> Result<Manifest, FormatError> {
    let json = |error: serde_json::Error| FormatError::Json(error.to_string());
    // The version first: of a later format it should be said that it is later, not that a key is unknown.
    #[derive(Deserialize)]
    struct Version {
        format_version: i64,
    }
    let version: Version = serde_json::from_slice(bytes).map_err(json)?;
    if version.format_version != i64::from(FORMAT_VERSION) {
        let (found, expected) = (version.format_version.into(), FORMAT_VERSION.into());
        return Err(FormatError::Version { found, expected });
    }
    let manifest: Manifest = serde_json::from_slice(bytes).map_err(json)?;
    if manifest.end_of_text >= manifest.vocabulary_size {
        let allowed = format!("below the vocabulary size {}", manifest.vocabulary_size);
        return Err(FormatError::Range { what: "end_of_text".into(), found: manifest.end_of_text.into(), allowed });
    }
    if let TokenizerEntry::File { file, .. } = &manifest.tokenizer {
        check_name(file)?;
    }
    check_split("train", &manifest.train)?;
    check_split("valid", &manifest.valid)?;
    Ok(manifest)
}

fn check_split(name: &str, split: &SplitEntry) -> Result<(), FormatError> {
    split.shards.iter().try_for_each(|shard| check_name(&shard.file))?;
    // In 128 bits, so that absurd numbers are compared rather than overflow.
    let sum = |of_shard: fn(&ShardEntry) -> u64| split.shards.iter().map(|s| u128::from(of_shard(s))).sum::<u128>();
    for (field, total, sum) in [
        ("tokens", split.tokens, sum(|s| s.tokens)),
        ("text_bytes", split.text_bytes, sum(|s| s.text_bytes)),
        ("documents", split.documents, sum(|s| s.documents)),
    ] {
        if u128::from(total) != sum {
            let what = format!("{field} of {name}");
            return Err(FormatError::Contradiction {
                what,
                left: total.to_string(),
                right: format!("{sum} by its shards"),
            });
        }
    }
    Ok(())
}

/// A manifest may come from anywhere: it must not lead out of its folder.
fn check_name(name: &str) -> Result<(), FormatError> {
    if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\\', '\0']) {
        return Err(FormatError::Json(format!("`{name}` is not the name of a file in this folder")));
    }
    Ok(())
}

impl Manifest {
    /// Reads the manifest of a folder.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(MANIFEST_FILE);
        parse_manifest(&files::read(&path)?).map_err(DataError::format(&path))
    }

    /// The text of the file.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("plain data has a JSON form") + "\n"
    }

    /// Writes it, replacing an older one at once or not at all.
    pub fn write(&self, folder: &Path) -> Result<()> {
        files::write_atomically(&folder.join(MANIFEST_FILE), self.to_json().as_bytes())
    }
}
