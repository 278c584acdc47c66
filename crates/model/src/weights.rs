//! Parameters to and from safetensors files, under Hugging Face names: one `model.safetensors`, or shards with
//! `model.safetensors.index.json`.

use crate::error::{ModelError, Result};
use crate::transformer::Transformer;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use stickbreak_autograd::ParameterId;
use stickbreak_tensor::io::{self, NamedTensors};

/// File name of weights in one piece.
pub const SINGLE_FILE: &str = "model.safetensors";
/// File name of the index of weights in several pieces.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// Which shard holds which tensor, as Hugging Face writes it.
#[derive(Debug, Serialize, Deserialize)]
struct ShardIndex {
    #[serde(default)]
    metadata: BTreeMap<String, serde_json::Value>,
    weight_map: BTreeMap<String, String>,
}

/// One file to write: its name and its tensors.
pub struct WeightFile {
    /// Name inside the model's folder.
    pub name: String,
    /// Contents.
    pub bytes: Vec<u8>,
}

/// Weight files of parameters by name. More than one, with an index, if the weights exceed `shard_bytes`.
///
/// # Errors
/// If the tensors cannot be serialised.
pub fn weight_files(parameters: &NamedTensors, shard_bytes: usize) -> Result<Vec<WeightFile>> {
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut shards = vec![(0, NamedTensors::new())];
    for (name, tensor) in parameters {
        let bytes = tensor.elements() * tensor.dtype().size();
        let (filled, _) = shards.last().expect("starts with one");
        if *filled > 0 && filled + bytes > shard_bytes {
            shards.push((0, NamedTensors::new()));
        }
        let (filled, tensors) = shards.last_mut().expect("starts with one");
        *filled += bytes;
        tensors.insert(name.clone(), tensor.clone());
    }
    if let [(_, tensors)] = &shards[..] {
        return Ok(vec![WeightFile { name: SINGLE_FILE.into(), bytes: io::serialize(tensors, &metadata)? }]);
    }
    let mut files = Vec::new();
    let mut index = ShardIndex { metadata: BTreeMap::new(), weight_map: BTreeMap::new() };
    let total: usize = shards.iter().map(|(bytes, _)| bytes).sum();
    index.metadata.insert("total_size".into(), total.into());
    for (number, (_, tensors)) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", number + 1, shards.len());
        index.weight_map.extend(tensors.keys().map(|tensor| (tensor.clone(), name.clone())));
        files.push(WeightFile { name, bytes: io::serialize(tensors, &metadata)? });
    }
    let bytes = serde_json::to_vec_pretty(&index).expect("strings and numbers are always JSON");
    files.push(WeightFile { name: INDEX_FILE.into(), bytes });
    Ok(files)
}

impl Transformer {
    /// The parameters by name, as views of the arena's master values, or of the values where no master is kept.
    pub fn named_parameters(&self) -> NamedTensors {
        if self.arena().keeps_master() {
            return self.named_masters();
        }
        self.arena().iter().map(|(entry, parameter)| (entry.name.clone(), parameter.value)).collect()
    }

    fn named_masters(&self) -> NamedTensors {
        let arena = self.arena();
        let master = |id| arena.master_of(ParameterId(id)).expect("an entry's own id");
        arena.entries().iter().enumerate().map(|(id, entry)| (entry.name.clone(), master(id))).collect()
    }

    /// The model's weight files: [`weight_files`] of its parameters.
    ///
    /// # Errors
    /// If the tensors cannot be serialised.
    pub fn weight_files(&self, shard_bytes: usize) -> Result<Vec<WeightFile>> {
        weight_files(&self.named_parameters(), shard_bytes)
    }

    /// Reads all parameters from a model folder (or one safetensors file), converting to the model's dtype. A head that is
    /// stored beside the embedding that it is tied to is passed over.
    ///
    /// # Errors
    /// If a file is broken, or a name or shape is missing, unexpected or different; nothing is changed then.
    pub fn load_weights(&self, path: &Path) -> Result<()> {
        let tensors = read_tensors(path)?;
        let wrong = |what: String| ModelError::Weights { path: path.to_owned(), what };
        let expected = self.named_masters();
        let missing: Vec<_> = expected.keys().filter(|name| !tensors.contains_key(*name)).collect();
        let unexpected: Vec<_> = tensors.keys().filter(|name| !expected.contains_key(*name)).collect();
        // A tied head is sometimes stored twice.
        let unexpected: Vec<_> = unexpected
            .into_iter()
            .filter(|name| !(self.config().tie_word_embeddings && *name == "lm_head.weight"))
            .collect();
        if !missing.is_empty() || !unexpected.is_empty() {
            return Err(wrong(format!("tensors missing: {missing:?}; not part of the model: {unexpected:?}")));
        }
        for (name, parameter) in &expected {
            if parameter.shape() != tensors[name].shape() {
                let (model, file) = (parameter.shape(), tensors[name].shape());
                return Err(wrong(format!("tensor {name:?} has shape {file}, the model {model}")));
            }
            if !tensors[name].dtype().is_float() {
                return Err(wrong(format!("tensor {name:?} has dtype {}, expected a float", tensors[name].dtype())));
            }
        }
        for (name, parameter) in &expected {
            parameter.transfer_assign(&tensors[name].to_dtype(parameter.dtype())?)?;
        }
        Ok(self.arena().publish()?)
    }
}

/// All tensors of a safetensors file or of a folder with one file or an index.
fn read_tensors(path: &Path) -> Result<NamedTensors> {
    if !path.is_dir() {
        return Ok(io::load(path)?.tensors);
    }
    let single = path.join(SINGLE_FILE);
    let index_path = path.join(INDEX_FILE);
    if !index_path.exists() {
        return Ok(io::load(&single)?.tensors);
    }
    let text = std::fs::read(&index_path).map_err(|source| ModelError::Io { path: index_path.clone(), source })?;
    let wrong = |what: String| ModelError::Weights { path: index_path.clone(), what };
    let index: ShardIndex = serde_json::from_slice(&text).map_err(|e| wrong(format!("not a valid index: {e}")))?;
    let mut tensors = NamedTensors::new();
    let mut shards: Vec<&String> = index.weight_map.values().collect();
    shards.sort_unstable();
    shards.dedup();
    for shard in shards {
        // An index is data from elsewhere: its shards must be files beside it.
        if shard.contains(['/', '\\']) || shard.starts_with('.') {
            return Err(wrong(format!("shard name {shard:?} is not a plain file name")));
        }
        for (name, tensor) in io::load(&path.join(shard))?.tensors {
            // Otherwise the order of the shards would decide which of two tensors of one name is taken.
            if index.weight_map.get(&name) != Some(shard) {
                return Err(wrong(format!("{shard} holds tensor {name:?}, which the index does not put there")));
            }
            tensors.insert(name, tensor);
        }
    }
    for (name, shard) in &index.weight_map {
        if !tensors.contains_key(name) {
            return Err(wrong(format!("tensor {name:?} is not in {shard}, where the index puts it")));
        }
    }
    Ok(tensors)
}
