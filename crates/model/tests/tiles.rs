//! The share of tiles that early exit leaves out: counted where training passes, and the same as counted on purpose.

mod support;

use serde_json::json;
use stickbreak_autograd::Tape;
use stickbreak_model::{Packing, Transformer};
use stickbreak_tensor::DType;
use support::{ids, labels, model, tensor};

fn packing_of(tokens: usize) -> Packing {
    Packing::single(tokens).unwrap()
}

fn train(model: &Transformer, text: &[u32], packing: &Packing, recompute: bool) {
    let tape = Tape::new();
    let loss = model.loss(&tape, &tensor(text), &labels(text, packing), packing, 1.0, recompute).unwrap();
    tape.backward(&loss).unwrap();
}

#[test]
fn training_passes_count_what_a_pass_on_purpose_counts() {
    let (text, other) = (ids(1, 900), ids(2, 500));
    let packing = Packing::new(&[0, 100, 900]).unwrap();
    let model = model(json!({"num_kv_heads": 2}), DType::F32);
    let expected = model.skipped_tiles(&tensor(&text), &packing).unwrap().unwrap();
    assert_eq!((expected.len(), expected[0].len()), (2, 4), "by layer and query head");
    assert!(expected.iter().flatten().all(|&share| share > 0.3 && share < 1.0), "{expected:?}");
    assert_eq!(model.take_skipped_tiles().unwrap(), None, "nobody asked");

    model.watch_tiles(true);
    for recompute in [false, true] {
        // The last pass counts.
        train(&model, &other, &packing_of(500), recompute);
        train(&model, &text, &packing, recompute);
        // Passes that are not for training do not.
        model
            .token_losses(&tensor(&other), &tensor(&[0; 500]).to_dtype(DType::I32).unwrap(), &packing_of(500))
            .unwrap();
        assert_eq!(model.take_skipped_tiles().unwrap().as_ref(), Some(&expected), "recompute {recompute}");
        assert_eq!(model.take_skipped_tiles().unwrap(), None, "it is told once");
    }
    model.watch_tiles(false);
    train(&model, &text, &packing, false);
    assert_eq!(model.take_skipped_tiles().unwrap(), None);
}

#[test]
fn shares_are_exact() {
    // Scores of nearly 0 halve the stick with every key, so that 25 keys bring it below 2^-24.
    let model = model(json!({"attention_scale": 1e-9, "early_exit_bits": 24}), DType::F64);
    let shares = |tokens: usize| model.skipped_tiles(&tensor(&ids(3, tokens)), &packing_of(tokens)).unwrap().unwrap();
    // Ten tiles of 96 queries: the first visits its own tile of keys, each other one its own and the one before, of 55.
    assert_eq!(shares(960), vec![vec![36.0 / 55.0; 4]; 2]);
    // A document of one tile has none to leave out, one of a token has none at all.
    assert_eq!(shares(96), vec![vec![0.0; 4]; 2]);
    assert_eq!(shares(1), vec![vec![0.0; 4]; 2]);
}

#[test]
fn softmax_and_dense_attention_have_nothing_to_count() {
    let packing = packing_of(300);
    for changes in [json!({"attention": "softmax-rope"}), json!({"early_exit_bits": 0})] {
        let model = model(changes.clone(), DType::F32);
        model.watch_tiles(true);
        train(&model, &ids(4, 300), &packing, false);
        assert_eq!(model.take_skipped_tiles().unwrap(), None, "{changes}");
        assert_eq!(model.skipped_tiles(&tensor(&ids(4, 300)), &packing).unwrap(), None, "{changes}");
    }
}
