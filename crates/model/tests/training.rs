//! The training forward: documents do not see each other, recompute changes nothing, and a fresh model knows nothing.

mod support;

use serde_json::{Value, json};
use stickbreak_autograd::Tape;
use stickbreak_model::init::{learning_rate_factor, standard_deviation};
use stickbreak_model::{Packing, Transformer};
use stickbreak_tensor::DType;
use support::{VOCABULARY, config, ids, kinds, labels, model, tensor};

#[test]
fn a_document_does_not_depend_on_its_neighbours() {
    let lengths = [13usize, 70, 1, 30];
    let cu: Vec<i32> = lengths
        .iter()
        .scan(0, |end, &n| {
            *end += n as i32;
            Some(*end)
        })
        .collect();
    let packing = Packing::new(&[&[0], &cu[..]].concat()).unwrap();
    let tokens = lengths.iter().sum();
    let first = ids(1, tokens);
    for changes in kinds() {
        for dtype in [DType::F32, DType::F64] {
            let model = model(changes.clone(), dtype);
            let losses = |ids: &[u32]| {
                model.token_losses(&tensor(ids), &labels(ids, &packing), &packing).unwrap().to_f64_vec().unwrap()
            };
            let before = losses(&first);
            for changed in 0..lengths.len() {
                let start = if changed == 0 { 0 } else { cu[changed - 1] as usize };
                let range = start..start + lengths[changed];
                let mut other = first.clone();
                other[range.clone()].copy_from_slice(&ids(99, range.len()));
                let after = losses(&other);
                for t in (0..tokens).filter(|t| !range.contains(t)) {
                    assert_eq!(before[t].to_bits(), after[t].to_bits(), "{changes}, {dtype}, token {t}");
                }
                assert!(range.len() == 1 || before[range.clone()] != after[range], "{changes}: nothing changed");
            }
        }
    }
}

#[test]
fn a_packed_document_loses_what_it_loses_alone() {
    let packing = Packing::new(&[0, 9, 9, 40]).unwrap();
    let text = ids(5, 40);
    for changes in kinds() {
        let model = model(changes.clone(), DType::F64);
        let packed =
            model.token_losses(&tensor(&text), &labels(&text, &packing), &packing).unwrap().to_f64_vec().unwrap();
        for range in [0..9, 9..40] {
            let (part, single) = (&text[range.clone()], Packing::single(range.len()).unwrap());
            let alone =
                model.token_losses(&tensor(part), &labels(part, &single), &single).unwrap().to_f64_vec().unwrap();
            for (a, b) in alone.iter().zip(&packed[range]) {
                assert!((a - b).abs() < 1e-10, "{changes}: {a} alone, {b} packed");
            }
        }
    }
}

/// Loss and gradients of a step, as bits of float64.
fn step(model: &Transformer, recompute: bool) -> (u64, Vec<u64>, Vec<usize>) {
    let packing = Packing::new(&[0, 21, 50]).unwrap();
    let text = ids(8, 50);
    model.arena().zero_gradients().unwrap();
    let tape = Tape::new();
    let loss = model.loss(&tape, &tensor(&text), &labels(&text, &packing), &packing, 1.0 / 48.0, recompute).unwrap();
    let mut announced = Vec::new();
    tape.backward_with(&loss, 1.0, &mut |id| announced.push(id.0)).unwrap();
    announced.sort_unstable();
    let gradients = model.arena().gradients().to_f64_vec().unwrap().into_iter().map(f64::to_bits).collect();
    (loss.value().to_scalar().unwrap().to_bits(), gradients, announced)
}

#[test]
fn recompute_changes_no_bit_of_loss_or_gradients() {
    for changes in kinds() {
        for dtype in [DType::F32, DType::F64] {
            let model = model(changes.clone(), dtype);
            let (kept, recomputed) = (step(&model, false), step(&model, true));
            assert!(kept == recomputed, "{changes}, {dtype}");
            let all: Vec<usize> = (0..model.arena().entries().len()).collect();
            assert_eq!(kept.2, all, "every parameter is announced once: {changes}");
            assert!(kept.1.iter().any(|&bits| bits != 0));
        }
    }
}

#[test]
fn a_fresh_model_loses_about_ln_of_the_vocabulary() {
    let text = ids(8, 200);
    let packing = Packing::single(200).unwrap();
    for changes in kinds() {
        let config = stickbreak_model::ModelConfig { init_std: 0.02, ..config(changes.clone()) };
        let model = Transformer::new(config, DType::F32).unwrap();
        model.initialise(1).unwrap();
        let losses = model.token_losses(&tensor(&text), &labels(&text, &packing), &packing).unwrap();
        let mean = losses.to_f64_vec().unwrap().iter().sum::<f64>() / 199.0;
        assert!((mean - (VOCABULARY as f64).ln()).abs() < 0.05, "{changes}: {mean}");
    }
}

#[test]
fn the_loss_is_the_scaled_sum_of_the_tokens_losses() {
    let model = model(json!({"tie_word_embeddings": true}), DType::F64);
    let (text, packing) = (ids(4, 30), Packing::new(&[0, 12, 30]).unwrap());
    let (ids, labels) = (tensor(&text), labels(&text, &packing));
    let losses = model.token_losses(&ids, &labels, &packing).unwrap().to_f64_vec().unwrap();
    assert_eq!((losses[11], losses[29]), (0.0, 0.0));
    let tape = Tape::without_gradients();
    let loss = model.loss(&tape, &ids, &labels, &packing, 0.25, false).unwrap().value().to_scalar().unwrap();
    assert!((loss - 0.25 * losses.iter().sum::<f64>()).abs() < 1e-12);
}

#[test]
fn impossible_rows_are_refused() {
    let model = model(json!({}), DType::F32);
    let tape = Tape::new();
    for cu in [&[0, 4, 3][..], &[1, 4], &[]] {
        assert!(Packing::new(cu).unwrap_err().to_string().contains("cu_seqlens"));
    }
    assert!(Packing::single(1 << 32).is_err() && Packing::single(usize::MAX).is_err());
    let five = Packing::single(5).unwrap();
    for wrong in [4, 6] {
        assert!(model.hidden(&tape, &tensor(&ids(1, wrong)), &five, false).is_err(), "{wrong} ids for 5 tokens");
    }
    assert!(model.hidden(&tape, &tensor(&[0, 1, 2, 3, VOCABULARY as u32]), &five, false).is_err());
    let label = stickbreak_tensor::Tensor::from_vec(vec![0i32, 1, 2, 3, VOCABULARY as i32], [5]).unwrap();
    assert!(model.token_losses(&tensor(&ids(1, 5)), &label, &five).is_err());
}

// ------------------------------------------------------------------------------------------------ initialisation

fn fresh(changes: Value) -> Transformer {
    let sizes = json!({"hidden_size": 128, "intermediate_size": 192, "vocab_size": 500, "init_std": 0.02});
    let mut all = sizes.as_object().unwrap().clone();
    all.extend(changes.as_object().unwrap().clone());
    let model = Transformer::new(config(Value::Object(all)), DType::F32).unwrap();
    model.initialise(11).unwrap();
    model
}

#[test]
fn initial_weights_have_the_documented_spread() {
    for (changes, hidden, written) in
        [(json!({}), 0.02, 0.02 / 2.0), (json!({"init": "mup", "mup_base_width": 32}), 0.02 / 2.0, 0.02 / 4.0)]
    {
        let model = fresh(changes.clone());
        for (entry, parameter) in model.arena().iter() {
            let values = parameter.value.to_f64_vec().unwrap();
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            let std = (values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt();
            let name = &entry.name;
            let expected = match name {
                n if n.contains("norm") => {
                    assert!(values.iter().all(|&x| x == 1.0), "{name}");
                    continue;
                }
                n if n == "lm_head.weight" || n == "model.embed_tokens.weight" => 0.02,
                n if n.ends_with("o_proj.weight") || n.ends_with("down_proj.weight") => written,
                _ => hidden,
            };
            assert_eq!(standard_deviation(model.config(), name), Some(expected), "{name}");
            assert!((std / expected - 1.0).abs() < 0.03 && mean.abs() < 0.05 * expected, "{name}: {mean} +- {std}");
        }
    }
}

#[test]
fn baselines_start_from_the_same_projections() {
    let stick = fresh(json!({"remainder": "bias", "head_norm": true}));
    for other in
        [json!({"attention": "softmax-rope"}), json!({"attention": "softmax-alibi", "num_layers": 2}), json!({})]
    {
        let other = fresh(other).named_parameters();
        let own = stick.named_parameters();
        for (name, tensor) in &other {
            assert_eq!(tensor.to_f64_vec().unwrap(), own[name].to_f64_vec().unwrap(), "{name}");
        }
        assert!(own["model.layers.0.self_attn.head_bias"].to_f64_vec().unwrap().iter().all(|&x| x == 0.0));
        assert!(own["model.layers.1.self_attn.norm.bias"].to_f64_vec().unwrap().iter().all(|&x| x == 0.0));
    }
    let reseeded = fresh(json!({}));
    reseeded.initialise(12).unwrap();
    let name = "model.layers.0.self_attn.q_proj.weight";
    assert_ne!(
        reseeded.named_parameters()[name].to_f64_vec().unwrap(),
        stick.named_parameters()[name].to_f64_vec().unwrap()
    );
    let own = stick.named_parameters();
    let layer = |i: usize| own[&format!("model.layers.{i}.self_attn.q_proj.weight")].to_f64_vec().unwrap();
    assert_ne!(layer(0), layer(1), "every layer draws its own");
}

#[test]
fn mup_scales_steps_logits_and_attention() {
    let config = config(json!({"init": "mup", "mup_base_width": 8}));
    assert_eq!((config.width_ratio(), config.logit_scale(), config.attention_scale()), (4.0, 0.25, 1.0 / 8.0));
    for (name, factor) in [
        ("model.layers.0.self_attn.q_proj.weight", 0.25),
        ("model.layers.1.mlp.down_proj.weight", 0.25),
        ("model.embed_tokens.weight", 1.0),
        ("lm_head.weight", 1.0),
        ("model.norm.weight", 1.0),
        ("model.layers.0.input_layernorm.weight", 1.0),
    ] {
        assert_eq!(learning_rate_factor(&config, name), factor, "{name}");
        assert_eq!(learning_rate_factor(&support::config(json!({})), name), 1.0, "{name} without muP");
    }
}
