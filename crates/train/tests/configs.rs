//! The configs of the repository: each loads, is what its header says, and fits the card that it names.

use std::path::{Path, PathBuf};
use stickbreak_model::count::parameters;
use stickbreak_train::config::{ComputeType, RunConfig};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs")
}

fn load(name: &str) -> RunConfig {
    RunConfig::load(&folder().join(name), &[]).unwrap()
}

#[test]
fn every_config_loads_and_is_named_after_its_file() {
    let mut configs = 0;
    for entry in std::fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        let config = RunConfig::load(&path, &[]).unwrap();
        assert_eq!(path.file_stem().unwrap().to_str(), Some(config.name.as_str()));
        assert_eq!(config.dtype, ComputeType::Auto, "{}: f32 on a CPU, bf16 on a GPU", config.name);
        assert!(!config.data.inputs.is_empty(), "{}: a whole run", config.name);
        configs += 1;
    }
    assert!(configs >= 6);
}

#[test]
fn the_models_have_the_sizes_of_their_names() {
    for (name, millions, layers, width, heads, feed_forward, vocabulary, tied) in [
        ("125m.toml", 123.6, 12, 768, 12, 2048, 50304, true),
        ("350m.toml", 359.8, 24, 1024, 16, 2816, 50304, true),
        ("1b.toml", 1336.2, 24, 2048, 32, 5632, 50304, true),
        ("3b.toml", 3513.5, 40, 2304, 36, 9216, 50304, true),
        ("books-110m.toml", 110.1, 12, 768, 12, 2048, 16384, false),
    ] {
        let config = load(name);
        let model = &config.model;
        let found = parameters(model).total as f64 / 1e6;
        assert!((found - millions).abs() < 0.2, "{name}: {found} million parameters");
        assert_eq!((model.num_layers, model.hidden_size, model.num_heads), (layers, width, heads), "{name}");
        assert_eq!((model.intermediate_size, model.vocab_size), (feed_forward, vocabulary), "{name}");
        assert_eq!(model.tie_word_embeddings, tied, "{name}");
        assert_eq!(model.head_dim(), 64, "{name}");
        assert_eq!(model.vocab_size % 64, 0, "{name}");
    }
}

#[test]
fn the_books_run_is_the_recipe_of_the_published_curve() {
    let config = load("books-110m.toml");
    assert_eq!((config.train.steps, config.sequences_per_step(), config.train.sequence_length), (1500, 32, 2048));
    assert_eq!((config.train.steps * config.train.batch_tokens as u64) / 1_000_000, 98, "million tokens");
    let optimizer = &config.optimizer;
    assert_eq!((optimizer.learning_rate, optimizer.beta1, optimizer.beta2), (1e-3, 0.9, 0.95));
    assert_eq!((optimizer.weight_decay, optimizer.clip_norm, config.schedule.warmup_steps), (0.1, 1.0, 100));
    assert_eq!(config.evaluation.lengths, [1024, 2048, 4096, 8192, 16384]);
    assert_eq!(config.evaluation.length_tokens % 16384, 0);
}
