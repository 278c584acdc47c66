//! Parameter and flop counts, by the rules that published figures use.

use crate::config::{ModelConfig, Remainder};

/// Number of parameters of a model by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParameterCount {
    /// All parameters; a tied embedding counts once.
    pub total: usize,
    /// Weights that take part in matrix products for each token: all but the norms and, unless tied, the embedding.
    pub matrix: usize,
}

/// Counts a model's parameters without building it.
pub fn parameters(config: &ModelConfig) -> ParameterCount {
    let (c, f, d) = (config.hidden_size, config.intermediate_size, config.head_dim());
    let (q, kv) = (config.num_heads * d, config.kv_heads() * d);
    let table = config.vocab_size * c;
    let layer_matrix = 2 * c * q + 2 * c * kv + 3 * c * f;
    let head_bias = if config.remainder == Remainder::Bias { q } else { 0 };
    let layer_other = 2 * c + head_bias + if config.head_norm { 2 * q } else { 0 };
    let matrix = config.num_layers * layer_matrix + table;
    let untied = if config.tie_word_embeddings { 0 } else { table };
    ParameterCount { total: matrix + untied + config.num_layers * layer_other + c, matrix }
}

/// Floating-point operations of a training step (forward and backward), as used for MFU:
/// `6 * matrix parameters * tokens` for the matrix products and, for attention, three times its forward's
/// `4 * Hq * D * sum(length^2) / 2` a layer: the *causal half* of the square. `squared_lengths` is the sum of the squares
/// of the documents' lengths.
pub fn training_flops(config: &ModelConfig, tokens: usize, squared_lengths: f64) -> f64 {
    let products = 6.0 * parameters(config).matrix as f64 * tokens as f64;
    let width = (config.num_heads * config.head_dim()) as f64;
    products + 3.0 * config.num_layers as f64 * attention_forward_flops(width, squared_lengths)
}

/// Causal-half flops of one attention forward: `width` is heads times head size.
pub fn attention_forward_flops(width: f64, squared_lengths: f64) -> f64 {
    4.0 * width * squared_lengths / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Transformer;
    use stickbreak_tensor::DType;

    #[test]
    fn counts_match_the_built_model() {
        for extra in
            ["", r#", "tie_word_embeddings": true"#, r#", "remainder": "bias", "head_norm": true, "num_kv_heads": 2"#]
        {
            let text = format!(
                r#"{{"vocab_size": 31, "hidden_size": 24, "intermediate_size": 40, "num_layers": 3, "num_heads": 4, "head_dim": 8{extra}}}"#
            );
            let config: ModelConfig = serde_json::from_str(&text).unwrap();
            let model = Transformer::new(config.clone(), DType::F32).unwrap();
            assert_eq!(parameters(&config).total, model.arena().parameter_count(), "{extra}");
        }
    }
}
