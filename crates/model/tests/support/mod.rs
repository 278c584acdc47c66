//! Small models of every kind, and token ids for them.

#![allow(dead_code, reason = "each test file uses a part")]

use serde_json::{Value, json};
use stickbreak_model::{ModelConfig, Packing, Transformer};
use stickbreak_tensor::{DType, Tensor};

pub const VOCABULARY: usize = 37;

/// A config of two layers, four heads of 8, with some keys changed.
pub fn config(changes: Value) -> ModelConfig {
    let mut all = json!({
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4,
        "init_std": 0.2,
    });
    all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    serde_json::from_value(all).unwrap()
}

/// A model with random weights, norms and biases included, so that nothing is hidden behind a 0 or a 1.
pub fn model(changes: Value, dtype: DType) -> Transformer {
    let model = Transformer::new(config(changes), dtype).unwrap();
    model.initialise(7).unwrap();
    for (entry, parameter) in model.arena().iter() {
        if entry.name.contains("norm") || entry.name.ends_with("bias") {
            let seed = entry.name.len() as u64;
            let noise = Tensor::randn(0.0, 0.2, &entry.shape, DType::F64, seed).unwrap().to_dtype(dtype).unwrap();
            parameter.value.add_assign_scaled(1.0, &noise).unwrap();
        }
    }
    model
}

pub fn ids(seed: u64, tokens: usize) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..tokens)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % VOCABULARY as u64) as u32
        })
        .collect()
}

pub fn tensor(ids: &[u32]) -> Tensor {
    Tensor::from_slice(ids, [ids.len()]).unwrap()
}

/// The label of each token is the token after it; nothing is predicted at the end of a document.
pub fn labels(ids: &[u32], packing: &Packing) -> Tensor {
    let ends = packing.cu_seqlens();
    let label = |t: usize| if ends.contains(&(t as i32 + 1)) { -100 } else { ids[t + 1] as i32 };
    Tensor::from_vec((0..ids.len()).map(label).collect::<Vec<i32>>(), [ids.len()]).unwrap()
}

/// Every attention, remainder and option that a config can have.
pub fn kinds() -> Vec<Value> {
    let mut all = Vec::new();
    for kind in ["softmax-rope", "softmax-nope", "softmax-alibi"] {
        all.push(json!({"attention": kind}));
        all.push(json!({"attention": kind, "num_kv_heads": 2, "head_norm": true}));
    }
    for remainder in ["none", "value", "bias"] {
        for attend_current in [false, true] {
            for head_norm in [false, true] {
                for kv_heads in [4, 1, 2] {
                    all.push(json!({
                        "remainder": remainder, "attend_current": attend_current, "head_norm": head_norm,
                        "num_kv_heads": kv_heads,
                    }));
                }
            }
        }
    }
    all.push(json!({"early_exit_bits": 0, "head_dim": 5, "tie_word_embeddings": true}));
    all.push(json!({
        "init": "mup", "mup_base_width": 16, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
        "logits_scaling": 1.5,
    }));
    all
}
