//! What a model is, as a run's TOML or a checkpoint's JSON spells it.

use crate::error::{ModelError, Result};
use serde::{Deserialize, Serialize};
use std::fmt::Display;

/// How a token attends to the tokens before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttentionKind {
    /// Stick-breaking (arXiv 2410.17980): no position embedding, a token does not attend to itself.
    #[default]
    StickBreaking,
    /// Softmax with rotary position embedding (arXiv 2104.09864).
    SoftmaxRope,
    /// Softmax without position information.
    SoftmaxNope,
    /// Softmax with linear biases (arXiv 2108.12409).
    SoftmaxAlibi,
}

/// What a block does with the part of the stick that no key took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Remainder {
    /// Nothing.
    #[default]
    None,
    /// `o_i += rem_i * v_i`.
    Value,
    /// `o_i += rem_i * head_bias[h]`, learned.
    Bias,
}

/// How parameters get their first values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InitScheme {
    /// Normal with `init_std`; output projections divided by sqrt(2 layers), as GPT-2 does.
    #[default]
    Normal,
    /// Maximal-update parametrisation (arXiv 2203.03466) relative to `mup_base_width`: hidden matrices get std and
    /// learning rate scaled for the width, logits are divided by the width ratio and attention scales by 1/D.
    Mup,
}

/// Everything that decides a model's shape and function. Unknown keys are refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward block.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads; query head h reads key/value head h / (num_heads / num_kv_heads). Default: num_heads.
    #[serde(default)]
    pub num_kv_heads: Option<usize>,
    /// Size of a head; need not be hidden_size / num_heads, which is the default.
    #[serde(default)]
    pub head_dim: Option<usize>,
    /// The attention.
    #[serde(default)]
    pub attention: AttentionKind,
    /// Factor of q.k; default 1/sqrt(head_dim), or 1/head_dim with muP.
    #[serde(default)]
    pub attention_scale: Option<f64>,
    /// Stick-breaking: whether a token sees itself too.
    #[serde(default)]
    pub attend_current: bool,
    /// Stick-breaking: use of the remainder.
    #[serde(default)]
    pub remainder: Remainder,
    /// GroupNorm over each head's output, before the output projection.
    #[serde(default)]
    pub head_norm: bool,
    /// Stick-breaking: keys are skipped once every row of a tile has less than 2^-k of its stick left; 0 never skips.
    /// The default, 24, is below float32's rounding.
    #[serde(default = "default_early_exit_bits")]
    pub early_exit_bits: u32,
    /// Epsilon of all norms.
    #[serde(default = "default_norm_eps")]
    pub norm_eps: f64,
    /// Base of the rotary angles.
    #[serde(default = "default_rope_theta")]
    pub rope_theta: f64,
    /// Whether the output projection is the embedding table.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Factor of the embeddings.
    #[serde(default = "one")]
    pub embedding_multiplier: f64,
    /// Factor of each block's two contributions to the residual stream.
    #[serde(default = "one")]
    pub residual_multiplier: f64,
    /// Divisor of the logits.
    #[serde(default = "one")]
    pub logits_scaling: f64,
    /// How parameters get their first values.
    #[serde(default)]
    pub init: InitScheme,
    /// Standard deviation of the initial weights.
    #[serde(default = "default_init_std")]
    pub init_std: f64,
    /// Width at which muP and the plain parametrisation agree, but for the attention scale, which muP always takes as 1/D.
    #[serde(default)]
    pub mup_base_width: Option<usize>,
}

fn default_early_exit_bits() -> u32 {
    24
}
fn default_norm_eps() -> f64 {
    1e-5
}
fn default_rope_theta() -> f64 {
    10_000.0
}
fn default_init_std() -> f64 {
    0.02
}
fn one() -> f64 {
    1.0
}

impl ModelConfig {
    /// Key/value heads.
    pub fn kv_heads(&self) -> usize {
        self.num_kv_heads.unwrap_or(self.num_heads)
    }

    /// Size of a head.
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or_else(|| self.hidden_size / self.num_heads.max(1))
    }

    /// Factor of q.k.
    pub fn attention_scale(&self) -> f64 {
        let d = self.head_dim() as f64;
        self.attention_scale.unwrap_or(if self.init == InitScheme::Mup { 1.0 / d } else { 1.0 / d.sqrt() })
    }

    /// How much wider than muP's base width the model is; 1 without muP.
    pub fn width_ratio(&self) -> f64 {
        match (self.init, self.mup_base_width) {
            (InitScheme::Mup, Some(base)) => self.hidden_size as f64 / base as f64,
            _ => 1.0,
        }
    }

    /// Factor of the logits.
    pub fn logit_scale(&self) -> f64 {
        1.0 / (self.logits_scaling * self.width_ratio())
    }

    /// Refuses values that make no model, naming the field.
    ///
    /// # Errors
    /// [`ModelError::Config`].
    pub fn validate(&self) -> Result<()> {
        let refuse =
            |field, value: &dyn Display, why: String| Err(ModelError::Config { field, value: value.to_string(), why });
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_layers", self.num_layers),
            ("num_heads", self.num_heads),
            ("num_kv_heads", self.kv_heads()),
            ("head_dim", self.head_dim()),
        ];
        for (field, value) in sizes {
            if value == 0 {
                return refuse(field, &value, "must be at least 1".into());
            }
        }
        if self.head_dim.is_none() && !self.hidden_size.is_multiple_of(self.num_heads) {
            let why = format!("must be a multiple of num_heads = {} when head_dim is not given", self.num_heads);
            return refuse("hidden_size", &self.hidden_size, why);
        }
        if !self.num_heads.is_multiple_of(self.kv_heads()) {
            return refuse(
                "num_heads",
                &self.num_heads,
                format!("must be a multiple of num_kv_heads = {}", self.kv_heads()),
            );
        }
        if self.attention == AttentionKind::SoftmaxRope && !self.head_dim().is_multiple_of(2) {
            return refuse("head_dim", &self.head_dim(), "must be even for softmax-rope".into());
        }
        if self.attention != AttentionKind::StickBreaking {
            if self.remainder != Remainder::None {
                return refuse(
                    "remainder",
                    &format!("{:?}", self.remainder),
                    "only stick-breaking has a remainder".into(),
                );
            }
            if self.attend_current {
                return refuse("attend_current", &true, "only stick-breaking has this choice".into());
            }
        }
        let positive = [
            ("attention_scale", self.attention_scale()),
            ("norm_eps", self.norm_eps),
            ("rope_theta", self.rope_theta),
            ("embedding_multiplier", self.embedding_multiplier),
            ("residual_multiplier", self.residual_multiplier),
            ("logits_scaling", self.logits_scaling),
            ("init_std", self.init_std),
        ];
        for (field, value) in positive {
            if !(value.is_finite() && value > 0.0) {
                return refuse(field, &value, "must be a positive number".into());
            }
        }
        match (self.init, self.mup_base_width) {
            (InitScheme::Mup, None | Some(0)) => refuse("mup_base_width", &"none", "init = \"mup\" needs it".into()),
            (InitScheme::Normal, Some(base)) => refuse("mup_base_width", &base, "needs init = \"mup\"".into()),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> serde_json::Result<ModelConfig> {
        serde_json::from_str(text)
    }

    const SMALL: &str =
        r#""vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 4"#;

    #[test]
    fn defaults_follow_the_best_known_setting() {
        let config = parse(&format!("{{{SMALL}}}")).unwrap();
        config.validate().unwrap();
        assert_eq!(config.attention, AttentionKind::StickBreaking);
        assert_eq!((config.remainder, config.head_norm, config.attend_current), (Remainder::None, false, false));
        assert_eq!((config.kv_heads(), config.head_dim(), config.attention_scale()), (4, 16, 0.25));
    }

    #[test]
    fn unknown_keys_and_impossible_values_are_refused_by_name() {
        let unknown = parse(&format!("{{{SMALL}, \"num_layer\": 3}}")).unwrap_err().to_string();
        assert!(unknown.contains("num_layer"), "{unknown}");
        for (extra, field) in [
            (r#""num_kv_heads": 3"#, "num_heads"),
            (r#""norm_eps": 0"#, "norm_eps"),
            (r#""attention": "softmax-rope", "remainder": "bias""#, "remainder"),
            (r#""attention": "softmax-rope", "head_dim": 7"#, "head_dim"),
            (r#""init": "mup""#, "mup_base_width"),
        ] {
            let error = parse(&format!("{{{SMALL}, {extra}}}")).unwrap().validate().unwrap_err().to_string();
            assert!(error.contains(field), "{extra}: {error}");
        }
    }
}
