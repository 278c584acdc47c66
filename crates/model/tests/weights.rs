//! Model folders in the Hugging Face layout: there and back to the bit, and what does not fit is refused by name.

mod support;

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use stickbreak_model::weights::{INDEX_FILE, SINGLE_FILE};
use stickbreak_model::{ModelConfig, Transformer};
use stickbreak_tensor::io::{self, NamedTensors};
use stickbreak_tensor::{DType, Tensor};
use support::{kinds, model};
use tempfile::TempDir;

fn save(model: &Transformer, shard_bytes: usize) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in model.weight_files(shard_bytes).unwrap() {
        fs::write(folder.path().join(&file.name), &file.bytes).unwrap();
    }
    let config = serde_json::to_vec(&model.config().to_hugging_face(128)).unwrap();
    fs::write(folder.path().join("config.json"), config).unwrap();
    folder
}

fn load(folder: &Path, dtype: DType) -> stickbreak_model::Result<Transformer> {
    let model = Transformer::new(ModelConfig::load_hugging_face(folder)?, dtype)?;
    model.load_weights(folder)?;
    Ok(model)
}

fn values(model: &Transformer) -> Vec<u64> {
    model.arena().values().to_f64_vec().unwrap().into_iter().map(f64::to_bits).collect()
}

#[test]
fn a_folder_comes_back_bit_for_bit() {
    for changes in kinds() {
        for dtype in [DType::F32, DType::F64] {
            let original = model(changes.clone(), dtype);
            for shard_bytes in [usize::MAX, 10_000, 0] {
                let folder = save(&original, shard_bytes);
                let single = folder.path().join(SINGLE_FILE).exists();
                assert_eq!((single, folder.path().join(INDEX_FILE).exists()), (shard_bytes > 1 << 30, !single));
                let back = load(folder.path(), dtype).unwrap();
                assert_eq!(values(&back), values(&original), "{changes}");
                assert_eq!(back.config().kv_heads(), original.config().kv_heads());
                assert_eq!(back.config().attention_scale(), original.config().attention_scale());
            }
        }
    }
}

#[test]
fn shards_are_no_larger_than_asked_for_and_named_as_usual() {
    let model = model(json!({}), DType::F32);
    let files = model.weight_files(10_000).unwrap();
    let index: Value = serde_json::from_slice(&files.last().unwrap().bytes).unwrap();
    let shards = files.len() - 1;
    let mut total = 0;
    for (i, file) in files[..shards].iter().enumerate() {
        assert_eq!(file.name, format!("model-{:05}-of-{shards:05}.safetensors", i + 1));
        let tensors = io::parse(Path::new(&file.name), &file.bytes).unwrap().tensors;
        let bytes: usize = tensors.values().map(|t| t.elements() * 4).sum();
        assert!(bytes <= 10_000 || tensors.len() == 1, "{}: {bytes} bytes", file.name);
        assert!(tensors.keys().all(|name| index["weight_map"][name] == file.name));
        total += bytes;
    }
    assert_eq!(index["metadata"]["total_size"], total);
    assert_eq!(total, model.arena().parameter_count() * 4);
}

#[test]
fn weights_are_converted_to_the_models_dtype() {
    let single = model(json!({}), DType::F32);
    let folder = save(&single, usize::MAX);
    assert_eq!(values(&load(folder.path(), DType::F64).unwrap()), values(&single));
    let path = folder.path().join(SINGLE_FILE);
    let tensors =
        io::load(&path).unwrap().tensors.into_iter().map(|(n, t)| (n, t.to_dtype(DType::BF16).unwrap())).collect();
    io::save(&path, &tensors, &BTreeMap::new()).unwrap();
    let halved = load(folder.path(), DType::F32).unwrap();
    let rounded: Vec<u64> = single
        .arena()
        .values()
        .to_dtype(DType::BF16)
        .unwrap()
        .to_f64_vec()
        .unwrap()
        .into_iter()
        .map(f64::to_bits)
        .collect();
    assert_eq!(values(&halved), rounded);
}

/// The error of loading a folder whose tensors were changed; the model that was to be filled must be as before.
fn refused(changes: Value, spoil: impl FnOnce(&mut NamedTensors)) -> String {
    let original = model(changes, DType::F32);
    let folder = save(&original, usize::MAX);
    let path = folder.path().join(SINGLE_FILE);
    let mut tensors = io::load(&path).unwrap().tensors;
    spoil(&mut tensors);
    io::save(&path, &tensors, &BTreeMap::new()).unwrap();
    let target = Transformer::new(original.config().clone(), DType::F32).unwrap();
    target.initialise(99).unwrap();
    let before = values(&target);
    let message = target.load_weights(folder.path()).unwrap_err().to_string();
    assert_eq!(values(&target), before, "a refused folder changed the model");
    assert!(message.contains(folder.path().to_str().unwrap()), "{message}");
    message
}

#[test]
fn tensors_that_do_not_fit_are_refused_by_name() {
    let name = "model.layers.1.mlp.up_proj.weight";
    let message = refused(json!({}), |tensors| drop(tensors.remove(name)));
    assert!(message.contains("missing") && message.contains(name), "{message}");
    let message = refused(json!({}), |tensors| {
        tensors.insert("model.layers.2.mlp.up_proj.weight".into(), Tensor::zeros([2], DType::F32));
    });
    assert!(message.contains("not part of the model: [\"model.layers.2.mlp.up_proj.weight\"]"), "{message}");
    let message = refused(json!({}), |tensors| {
        let transposed = tensors[name].transpose(0, 1).unwrap();
        tensors.insert(name.into(), transposed);
    });
    assert!(message.contains(name) && message.contains("[32, 48]") && message.contains("[48, 32]"), "{message}");
    let message = refused(json!({}), |tensors| {
        tensors.insert(name.into(), Tensor::zeros([48, 32], DType::I32));
    });
    assert!(message.contains(name) && message.contains("i32"), "{message}");
}

#[test]
fn a_tied_head_may_be_stored_twice_but_an_untied_one_must_be_there() {
    let original = model(json!({"tie_word_embeddings": true}), DType::F32);
    let folder = save(&original, usize::MAX);
    let path = folder.path().join(SINGLE_FILE);
    let mut tensors = io::load(&path).unwrap().tensors;
    tensors.insert("lm_head.weight".into(), tensors["model.embed_tokens.weight"].clone());
    io::save(&path, &tensors, &BTreeMap::new()).unwrap();
    assert_eq!(values(&load(folder.path(), DType::F32).unwrap()), values(&original));
    let message = refused(json!({}), |tensors| drop(tensors.remove("lm_head.weight")));
    assert!(message.contains("lm_head.weight"), "{message}");
}

/// Loads a sharded folder after a change to its index.
fn with_index(spoil: impl FnOnce(&mut Value, &Path)) -> stickbreak_model::Result<Transformer> {
    let folder = save(&model(json!({}), DType::F32), 10_000);
    let path = folder.path().join(INDEX_FILE);
    let mut index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    spoil(&mut index, folder.path());
    fs::write(&path, serde_json::to_vec(&index).unwrap()).unwrap();
    load(folder.path(), DType::F32)
}

#[test]
fn an_index_cannot_reach_outside_of_its_folder() {
    let name = "model.norm.weight";
    for escape in ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "..\\x", ".hidden"] {
        let message = with_index(|index, _| index["weight_map"][name] = escape.into()).unwrap_err().to_string();
        assert!(message.contains(INDEX_FILE) && message.contains("not a plain file name"), "{escape}: {message}");
    }
}

#[test]
fn an_index_that_does_not_match_its_shards_is_refused() {
    let first = |index: &Value| index["weight_map"]["lm_head.weight"].as_str().unwrap().to_owned();
    let message = with_index(|index, _| {
        let name = first(index);
        index["weight_map"]["model.norm.weight"] = name.into();
    });
    assert!(message.unwrap_err().to_string().contains("model.norm.weight"));
    let message = with_index(|index, folder| fs::remove_file(folder.join(first(index))).unwrap());
    assert!(message.unwrap_err().to_string().contains("model-00001-of-"));
    // One tensor in two shards: which one would be meant?
    let message = with_index(|index, folder| {
        let path = folder.join(index["weight_map"]["model.norm.weight"].as_str().unwrap());
        let mut tensors = io::load(&path).unwrap().tensors;
        tensors.insert("lm_head.weight".into(), Tensor::zeros([37, 32], DType::F32));
        io::save(&path, &tensors, &BTreeMap::new()).unwrap();
    });
    assert!(message.unwrap_err().to_string().contains("holds tensor \"lm_head.weight\""));
    assert!(with_index(|index, _| *index = json!([1])).unwrap_err().to_string().contains("not a valid index"));
    with_index(|index, _| drop(index.as_object_mut().unwrap().remove("metadata"))).expect("metadata is not needed");
}

#[test]
fn broken_files_are_named() {
    let folder = save(&model(json!({}), DType::F32), usize::MAX);
    let path = folder.path().join(SINGLE_FILE);
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let message = load(folder.path(), DType::F32).unwrap_err().to_string();
    assert!(message.contains(SINGLE_FILE) && message.contains("not a valid file"), "{message}");
    fs::remove_file(&path).unwrap();
    assert!(load(folder.path(), DType::F32).unwrap_err().to_string().contains(SINGLE_FILE));
    fs::write(folder.path().join("config.json"), "{").unwrap();
    assert!(load(folder.path(), DType::F32).unwrap_err().to_string().contains("config.json"));
}
