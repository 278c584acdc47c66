//! `config.json` in the Hugging Face layout, both ways.
//!
//! A softmax + RoPE model without extras is written as a plain Llama and opens in any tool that knows Llama; every other
//! model has `model_type` "stickbreak" and our own keys beside the common ones.

use crate::config::{AttentionKind, ModelConfig};
use crate::error::{ModelError, Result};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Keys of ours that Llama has not, kept under their own names.
const OWN_KEYS: [&str; 12] = [
    "attention",
    "attention_scale",
    "attend_current",
    "remainder",
    "head_norm",
    "early_exit_bits",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "init",
    "init_std",
    "mup_base_width",
];

/// Our name and Hugging Face's name of the keys that both have.
const COMMON_KEYS: [(&str, &str); 10] = [
    ("vocab_size", "vocab_size"),
    ("hidden_size", "hidden_size"),
    ("intermediate_size", "intermediate_size"),
    ("num_layers", "num_hidden_layers"),
    ("num_heads", "num_attention_heads"),
    ("num_kv_heads", "num_key_value_heads"),
    ("head_dim", "head_dim"),
    ("norm_eps", "rms_norm_eps"),
    ("rope_theta", "rope_theta"),
    ("tie_word_embeddings", "tie_word_embeddings"),
];

/// Llama options that change the function and that we have not: the only value we can take.
fn refused_options() -> [(&'static str, Value); 5] {
    [
        ("hidden_act", json!("silu")),
        ("attention_bias", json!(false)),
        ("mlp_bias", json!(false)),
        ("rope_scaling", Value::Null),
        ("pretraining_tp", json!(1)),
    ]
}

impl ModelConfig {
    /// Whether a plain Llama computes the same function.
    pub fn is_llama(&self) -> bool {
        let standard_scale = (self.attention_scale() * (self.head_dim() as f64).sqrt() - 1.0).abs() < 1e-12;
        self.attention == AttentionKind::SoftmaxRope
            && !self.head_norm
            && standard_scale
            && self.logit_scale() == 1.0
            && self.embedding_multiplier == 1.0
            && self.residual_multiplier == 1.0
    }

    /// The config as Hugging Face's `config.json`, with the number types of ours. `max_position_embeddings` is the
    /// trained length.
    pub fn to_hugging_face(&self, max_position_embeddings: usize) -> Value {
        let Value::Object(own) = serde_json::to_value(self).expect("a config of numbers and strings") else {
            unreachable!("a struct serialises to an object");
        };
        let mut out = Map::new();
        let llama = self.is_llama();
        let (kind, class) = if llama { ("llama", "LlamaForCausalLM") } else { ("stickbreak", "StickbreakForCausalLM") };
        out.insert("model_type".into(), json!(kind));
        out.insert("architectures".into(), json!([class]));
        for (ours, theirs) in COMMON_KEYS {
            out.insert(theirs.into(), own[ours].clone());
        }
        out.insert("num_key_value_heads".into(), json!(self.kv_heads()));
        out.insert("head_dim".into(), json!(self.head_dim()));
        for (key, value) in refused_options() {
            out.insert(key.into(), value);
        }
        out.insert("max_position_embeddings".into(), json!(max_position_embeddings));
        out.insert("initializer_range".into(), json!(self.init_std));
        if !llama {
            out.extend(OWN_KEYS.iter().map(|&key| (key.to_owned(), own[key].clone())));
        }
        Value::Object(out)
    }

    /// A config from Hugging Face's `config.json`: ours, or a plain Llama.
    ///
    /// # Errors
    /// If the model type is another, a key is missing or ill-typed, or an option is set that changes the function.
    pub fn from_hugging_face(path: &Path, value: &Value) -> Result<Self> {
        let wrong = |what: String| ModelError::Weights { path: path.to_owned(), what };
        let kind = value["model_type"].as_str().unwrap_or("");
        if kind != "llama" && kind != "stickbreak" {
            return Err(wrong(format!("model_type is {kind:?}, expected \"stickbreak\" or \"llama\"")));
        }
        for (key, allowed) in refused_options() {
            let found = value.get(key).unwrap_or(&allowed);
            if *found != allowed {
                return Err(wrong(format!("{key} = {found} is not supported, only {allowed}")));
            }
        }
        let mut own = Map::new();
        for (ours, theirs) in COMMON_KEYS {
            if let Some(found) = value.get(theirs).filter(|v| !v.is_null()) {
                own.insert(ours.into(), found.clone());
            }
        }
        // Newer writers put theta into an object; any other kind of it scales the angles.
        if let Some(rope) = value.get("rope_parameters").filter(|v| !v.is_null()) {
            let kind = rope.get("rope_type").and_then(Value::as_str).unwrap_or("default");
            if kind != "default" {
                return Err(wrong(format!("rope_parameters of type {kind:?} are not supported, only \"default\"")));
            }
            if let Some(theta) = rope.get("rope_theta") {
                own.insert("rope_theta".into(), theta.clone());
            }
        }
        if kind == "llama" {
            own.insert("attention".into(), json!("softmax-rope"));
            if let Some(std) = value.get("initializer_range").filter(|v| !v.is_null()) {
                own.insert("init_std".into(), std.clone());
            }
            // Llama's own default, which is not ours.
            own.entry("norm_eps").or_insert(json!(1e-6));
        } else {
            for key in OWN_KEYS {
                if let Some(found) = value.get(key) {
                    own.insert(key.into(), found.clone());
                }
            }
        }
        let config: ModelConfig = serde_json::from_value(Value::Object(own)).map_err(|e| wrong(e.to_string()))?;
        config.validate()?;
        Ok(config)
    }

    /// Reads `config.json` of a model folder.
    ///
    /// # Errors
    /// As [`from_hugging_face`](Self::from_hugging_face), or if the file cannot be read.
    pub fn load_hugging_face(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let text = std::fs::read(&path).map_err(|source| ModelError::Io { path: path.clone(), source })?;
        let value = serde_json::from_slice(&text)
            .map_err(|e| ModelError::Weights { path: path.clone(), what: format!("not valid JSON: {e}") })?;
        Self::from_hugging_face(&path, &value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(extra: Value) -> ModelConfig {
        let mut all =
            json!({"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "num_heads": 2});
        all.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        serde_json::from_value(all).unwrap()
    }

    #[test]
    fn a_config_survives_the_way_there_and_back() {
        for extra in [
            json!({}),
            json!({"remainder": "bias", "head_norm": true, "num_kv_heads": 1, "head_dim": 6, "attention_scale": 0.1}),
            json!({"attention": "softmax-alibi", "tie_word_embeddings": true}),
            json!({"init": "mup", "mup_base_width": 8, "residual_multiplier": 0.22}),
            json!({"attention": "softmax-rope", "init_std": 0.03, "norm_eps": 1e-6, "rope_theta": 500000.0}),
        ] {
            let original = config(extra);
            let back = ModelConfig::from_hugging_face(Path::new("config.json"), &original.to_hugging_face(64)).unwrap();
            let same = ModelConfig {
                num_kv_heads: Some(original.kv_heads()),
                head_dim: Some(original.head_dim()),
                ..original
            };
            assert_eq!(back, same);
        }
    }

    #[test]
    fn softmax_rope_is_a_plain_llama() {
        let value = config(json!({"attention": "softmax-rope"})).to_hugging_face(64);
        assert_eq!(value["model_type"], "llama");
        assert!(OWN_KEYS.iter().all(|key| value.get(key).is_none()));
    }

    #[test]
    fn rope_parameters_are_read_and_scaled_angles_refused() {
        let mut value = config(json!({"attention": "softmax-rope"})).to_hugging_face(64);
        value.as_object_mut().unwrap().remove("rope_theta");
        value["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 500000.0});
        assert_eq!(ModelConfig::from_hugging_face(Path::new("config.json"), &value).unwrap().rope_theta, 500_000.0);
        value["rope_parameters"]["rope_type"] = json!("llama3");
        let error = ModelConfig::from_hugging_face(Path::new("config.json"), &value).unwrap_err().to_string();
        assert!(error.contains("llama3"), "{error}");
    }

    #[test]
    fn options_that_change_the_function_are_refused() {
        let mut value = config(json!({"attention": "softmax-rope"})).to_hugging_face(64);
        value["attention_bias"] = json!(true);
        let error = ModelConfig::from_hugging_face(Path::new("config.json"), &value).unwrap_err().to_string();
        assert!(error.contains("attention_bias") && error.contains("config.json"), "{error}");
    }
}
