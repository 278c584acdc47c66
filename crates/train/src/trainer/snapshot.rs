//! What a checkpoint holds, and how a run goes on from it.
//!
//! | file | content |
//! |---|---|
//! | `config.json`, `model.safetensors` | the model in the Hugging Face layout: the folder opens as a model |
//! | `tokenizer.json` | if the tokenizer is not bytes |
//! | `optimizer.safetensors` | AdamW's moments, flat, parallel to the arena |
//! | `state.json` | step, position in the data, and what must be the same on resuming |
//! | `run.toml` | the resolved configuration |
//! | `manifest.json` | length and checksum of each file, written last |

use super::Trainer;
use crate::checkpoint::{Checkpoint, CheckpointWriter};
use crate::config::RunConfig;
use crate::data::Cursor;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use stickbreak_tensor::Device;
use stickbreak_tensor::io::{self, NamedTensors};

/// Weights above this many bytes are split into several files, as Hugging Face does.
const SHARD_BYTES: usize = 5_000_000_000;

/// The state of a run that is not a tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    /// Optimizer steps taken.
    pub step: u64,
    /// Place in the training data.
    pub cursor: Cursor,
    /// Tokens seen.
    pub tokens_seen: u64,
    /// Seconds of training so far, over all restarts.
    pub training_seconds: f64,
    /// What must be the same on resuming; see [`identity`].
    pub identity: BTreeMap<String, Value>,
    /// Version and, if known, commit of the program that wrote it.
    pub program: String,
}

/// Everything that a continued run must share with its beginning: the architecture and the order of the data. What may
/// change (the number of steps, the learning rate, how often to log) is not in it.
pub(super) fn identity(config: &RunConfig, data_fingerprint: &str) -> BTreeMap<String, Value> {
    let mut identity = BTreeMap::new();
    let Ok(Value::Object(model)) = serde_json::to_value(&config.model) else {
        unreachable!("a struct serialises to an object")
    };
    for (key, value) in model {
        identity.insert(format!("model.{key}"), value);
    }
    identity.insert("seed".into(), config.seed.into());
    identity.insert("dtype".into(), serde_json::to_value(config.dtype).expect("a name"));
    identity.insert("train.sequence_length".into(), config.train.sequence_length.into());
    identity.insert("data".into(), data_fingerprint.into());
    identity
}

/// Refuses to continue a run with another architecture or other data, listing the differences.
pub(super) fn check_identity(checkpoint: &Checkpoint, config: &RunConfig, data_fingerprint: &str) -> Result<()> {
    let folder = checkpoint.folder().display();
    let state: State = checkpoint.json("state.json")?;
    let differences: Vec<String> = identity(config, data_fingerprint)
        .iter()
        .filter(|(key, value)| state.identity.get(*key) != Some(value))
        .map(|(key, value)| {
            let before = state.identity.get(key).map_or("absent".to_owned(), Value::to_string);
            format!("  {key}: {before} in the checkpoint, {value} now")
        })
        .collect();
    if differences.is_empty() {
        return Ok(());
    }
    bail!(
        "{folder} belongs to another run; these settings differ:\n{}\nGive another --out, or the old settings.",
        differences.join("\n")
    );
}

/// Version and commit of this program.
pub fn program_version() -> String {
    let version = env!("CARGO_PKG_VERSION");
    // Set by `cargo xtask`, which knows the checkout; compiling it in would rebuild the program at every commit.
    match std::env::var("STICKBREAK_COMMIT") {
        Ok(commit) => format!("stickbreak {version} ({commit})"),
        Err(_) => format!("stickbreak {version}"),
    }
}

impl Trainer {
    /// Writes the files of a checkpoint.
    pub(super) fn write_checkpoint(&self, writer: &mut CheckpointWriter<'_>) -> Result<()> {
        writer.json("config.json", &self.config.model.to_hugging_face(self.config.train.sequence_length))?;
        for file in self.model.weight_files(SHARD_BYTES)? {
            writer.bytes(&file.name, &file.bytes)?;
        }
        if let Some(json) = self.text.tokenizer.as_ref().and_then(|tokenizer| tokenizer.json()) {
            writer.bytes("tokenizer.json", json)?;
        }
        let (first, second) = self.optimizer.moments();
        let moments = NamedTensors::from([
            ("first_moment".to_owned(), first.to_device(Device::Cpu)?),
            ("second_moment".to_owned(), second.to_device(Device::Cpu)?),
        ]);
        writer.bytes("optimizer.safetensors", &io::serialize(&moments, &BTreeMap::new())?)?;
        let state = State {
            step: self.step,
            cursor: self.cursor,
            tokens_seen: self.tokens_seen,
            training_seconds: self.training_seconds,
            identity: identity(&self.config, &self.text.fingerprint),
            program: program_version(),
        };
        writer.json("state.json", &state)?;
        writer.bytes("run.toml", self.config.to_toml().as_bytes())
    }

    /// Continues from a checkpoint.
    pub(super) fn restore(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let folder = checkpoint.folder().display();
        let state: State = checkpoint.json("state.json")?;
        self.model.load_weights(checkpoint.folder()).with_context(|| format!("in {folder}"))?;
        let path = checkpoint.path("optimizer.safetensors")?;
        let moments = io::parse(&path, &checkpoint.read("optimizer.safetensors")?)?;
        let (first, second) = self.optimizer.moments();
        first.transfer_assign(moments.tensor(&path, "first_moment")?)?;
        second.transfer_assign(moments.tensor(&path, "second_moment")?)?;
        (self.step, self.cursor, self.tokens_seen) = (state.step, state.cursor, state.tokens_seen);
        self.training_seconds = state.training_seconds;
        Ok(())
    }
}
