//! `prepare.json`: what is being prepared into a folder and how far it has come, so that it can be continued.

use super::files;
use super::manifest::{MANIFEST_FILE, ShardEntry, TokenizerEntry};
use super::prepare::PrepareOptions;
use super::source::FileList;
use super::{DataError, FormatError, Result, TokenizerChoice};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::time::UNIX_EPOCH;

/// Name of the file in the output folder.
pub const JOURNAL_FILE: &str = "prepare.json";

/// The progress of a preparation. It is replaced as a whole after each finished shard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Journal {
    /// What was asked for.
    pub options: Value,
    /// blake3 over names, sizes and times of the input files.
    pub inputs: String,
    /// The tokenizer, once it is in the folder.
    pub tokenizer: Option<TokenizerEntry>,
    /// Finished shards of what is trained on.
    pub train: Vec<ShardEntry>,
    /// Finished shards of what is held out.
    pub valid: Vec<ShardEntry>,
    /// Whether the manifest is written.
    pub complete: bool,
}

impl Journal {
    /// The journal in the output folder, or a new one when the folder is not used yet.
    ///
    /// Fails when the folder holds something else: other options, inputs that have changed, or a dataset of unknown
    /// origin.
    pub fn open(options: &PrepareOptions, lists: &[&FileList]) -> Result<Self> {
        let new = Self {
            options: serde_json::to_value(options).expect("plain options have a JSON form"),
            inputs: inputs_digest(options, lists)?,
            tokenizer: None,
            train: Vec::new(),
            valid: Vec::new(),
            complete: false,
        };
        let path = options.output.join(JOURNAL_FILE);
        let other = |difference: String| DataError::OtherPreparation { path: options.output.clone(), difference };
        if !path.exists() {
            let foreign = options.output.join(MANIFEST_FILE).exists();
            return if foreign { Err(other(format!("{MANIFEST_FILE} without {JOURNAL_FILE}"))) } else { Ok(new) };
        }
        let old: Self = serde_json::from_slice(&files::read(&path)?)
            .map_err(|error| DataError::format(&path)(FormatError::Json(error.to_string())))?;
        if let Some(difference) = difference(&old.options, &new.options) {
            return Err(other(difference));
        }
        if old.inputs != new.inputs {
            return Err(other("the input files have changed".into()));
        }
        old.check_shards(&options.output)?;
        Ok(old)
    }

    /// Refuses an output folder that was prepared with other options, naming the difference. What the inputs hold by now
    /// is not compared, and neither is a folder without a journal.
    pub fn check_options(options: &PrepareOptions) -> Result<()> {
        let path = options.output.join(JOURNAL_FILE);
        if !path.exists() {
            return Ok(());
        }
        let old: Self = serde_json::from_slice(&files::read(&path)?)
            .map_err(|error| DataError::format(&path)(FormatError::Json(error.to_string())))?;
        let new = serde_json::to_value(options).expect("plain options have a JSON form");
        match difference(&old.options, &new) {
            Some(difference) => Err(DataError::OtherPreparation { path: options.output.clone(), difference }),
            None => Ok(()),
        }
    }

    /// Puts the present state on disk.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).expect("plain data has a JSON form");
        files::write_atomically(&folder.join(JOURNAL_FILE), &text)
    }

    fn check_shards(&self, folder: &Path) -> Result<()> {
        self.train.iter().chain(&self.valid).try_for_each(|shard| {
            let path = folder.join(&shard.file);
            let found = fs::metadata(&path).map_err(DataError::io(&path, "open"))?.len();
            if found == shard.file_bytes {
                return Ok(());
            }
            Err(DataError::ManifestSize { path, found, expected: shard.file_bytes })
        })
    }
}

/// The first option that differs, with both values.
fn difference(old: &Value, new: &Value) -> Option<String> {
    let keys = new.as_object()?.keys();
    let key = keys.into_iter().find(|key| old[key.as_str()] != new[key.as_str()])?;
    Some(format!("{key}: {} then, {} now", old[key.as_str()], new[key.as_str()]))
}

fn inputs_digest(options: &PrepareOptions, lists: &[&FileList]) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut add = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    for file in lists.iter().flat_map(|list| &list.files) {
        let metadata = fs::metadata(&file.path).map_err(DataError::io(&file.path, "open"))?;
        let modified = metadata.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
        add(file.name.as_bytes());
        add(&metadata.len().to_le_bytes());
        add(&modified.as_nanos().to_le_bytes());
    }
    if let TokenizerChoice::File { path, .. } = &options.tokenizer {
        add(&files::read(path)?);
    }
    Ok(hasher.finalize().to_hex().to_string())
}
