//! Generation with a cache computes what the training forward computes, and sampling does what its options say.

mod support;

use serde_json::json;
use stickbreak_autograd::Tape;
use stickbreak_model::{Generator, ModelError, Packing, Sampling, Transformer};
use stickbreak_tensor::DType;
use support::{VOCABULARY, ids, kinds, model, tensor};

/// Logits of every token by the training forward.
fn forward_logits(model: &Transformer, ids: &[u32]) -> Vec<Vec<f64>> {
    let tape = Tape::without_gradients();
    let packing = Packing::single(ids.len()).unwrap();
    let hidden = model.hidden(&tape, &tensor(ids), &packing, false).unwrap();
    let logits = model.logits(hidden.value()).unwrap().to_f64_vec().unwrap();
    logits.chunks(VOCABULARY).map(<[f64]>::to_vec).collect()
}

/// The largest difference, relative to the largest logit.
fn apart(a: &[f64], b: &[f64]) -> f64 {
    let largest = a.iter().chain(b).fold(0.0, |m: f64, x| m.max(x.abs()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / largest
}

#[test]
fn the_cache_agrees_with_the_training_forward_at_every_position() {
    // Longer than the cache's first capacity of 64, so that it grows on the way.
    let text = ids(3, 70);
    for changes in kinds() {
        for (dtype, bound) in [(DType::F64, 1e-12), (DType::F32, 5e-5)] {
            let model = model(changes.clone(), dtype);
            let expected = forward_logits(&model, &text);
            for prompt in [1, 63, 64] {
                let mut generator = Generator::new(&model, &text[..prompt]).unwrap();
                for position in prompt..text.len() {
                    let error = apart(generator.logits(), &expected[position - 1]);
                    assert!(error <= bound, "{changes}, {dtype}, prompt {prompt}, position {position}: {error:e}");
                    generator.push(text[position]).unwrap();
                }
                assert_eq!(generator.len(), text.len());
                let error = apart(generator.logits(), expected.last().unwrap());
                assert!(error <= bound, "{changes}, {dtype}, prompt {prompt}, the end: {error:e}");
            }
        }
    }
}

#[test]
fn a_prompt_in_chunks_agrees_with_the_training_forward() {
    // More than one tile of keys, and chunks that end inside of one.
    let text = ids(8, 230);
    for mut changes in kinds() {
        changes["early_exit_bits"] = json!(0);
        let model = model(changes.clone(), DType::F64);
        let expected = forward_logits(&model, &text);
        for (tokens, chunk) in [(230, 230), (230, 100), (230, 33), (192, 96), (7, 1)] {
            let mut generator = Generator::in_chunks(&model, &text[..tokens], chunk).unwrap();
            assert_eq!(generator.len(), tokens);
            let error = apart(generator.logits(), &expected[tokens - 1]);
            assert!(error <= 1e-12, "{changes}, {tokens} tokens in chunks of {chunk}: {error:e}");
            // The cache is that of the whole prompt, and goes on from there.
            if tokens < text.len() {
                generator.push(text[tokens]).unwrap();
                let error = apart(generator.logits(), &expected[tokens]);
                assert!(error <= 1e-12, "{changes}, after {tokens} tokens in chunks of {chunk}: {error:e}");
            }
        }
    }
}

#[test]
fn early_exit_in_chunks_stays_within_its_bound() {
    let text = ids(9, 600);
    let exact = forward_logits(&model(json!({"early_exit_bits": 0}), DType::F64), &text).pop().unwrap();
    for (bits, bound) in [(30, 1e-6), (10, 1e-1)] {
        let model = model(json!({"early_exit_bits": bits}), DType::F64);
        let chunked = Generator::in_chunks(&model, &text, 130).unwrap();
        let error = apart(chunked.logits(), &exact);
        // Something was left out, or the bound would say nothing.
        assert!(error > 0.0 && error <= bound, "{bits} bits: {error:e}");
    }
}

fn argmax(logits: &[f64]) -> u32 {
    (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32
}

#[test]
fn greedy_choices_are_the_most_likely_tokens() {
    let model = model(json!({}), DType::F32);
    let prompt = ids(1, 5);
    let mut text = prompt.clone();
    for _ in 0..12 {
        text.push(argmax(forward_logits(&model, &text).last().unwrap()));
    }
    let default = Sampling::default();
    for sampling in [
        Sampling { temperature: 0.0, ..default },
        Sampling { temperature: 0.0, top_k: 5, top_p: 0.5, seed: 9, ..default },
        Sampling { top_k: 1, ..default },
        Sampling { top_p: 1e-9, seed: 4, ..default },
        Sampling { temperature: 1e-9, ..default },
    ] {
        let out = model.generate(&prompt, 12, &sampling, None, |_| true).unwrap();
        assert_eq!(out, text[5..], "{sampling:?}");
    }
}

#[test]
fn a_seed_decides_the_text() {
    let model = model(json!({}), DType::F32);
    let run = |seed| {
        let sampling = Sampling { temperature: 3.0, seed, ..Sampling::default() };
        model.generate(&ids(1, 5), 20, &sampling, None, |_| true).unwrap()
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

#[test]
fn top_k_and_top_p_draw_from_the_most_likely_tokens_alone() {
    let model = model(json!({}), DType::F32);
    let prompt = ids(2, 6);
    let logits = forward_logits(&model, &prompt).pop().unwrap();
    let mut order: Vec<u32> = (0..VOCABULARY as u32).collect();
    order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
    let draws = |sampling: Sampling| -> std::collections::BTreeSet<u32> {
        let draw = |seed| model.generate(&prompt, 1, &Sampling { seed, ..sampling }, None, |_| true).unwrap()[0];
        (0..200).map(draw).collect()
    };
    let hot = Sampling { temperature: 100.0, ..Sampling::default() };
    let three = draws(Sampling { top_k: 3, ..hot });
    assert_eq!(three, order[..3].iter().copied().collect());
    // At this temperature all tokens are about equally likely: 5.5 of 37 is a share of 0.149.
    let share = draws(Sampling { top_p: 5.5 / VOCABULARY as f64, ..hot });
    assert!(share.is_subset(&order[..6].iter().copied().collect()) && share.len() >= 5, "{share:?}");
    assert!(draws(hot).len() > 30);
    assert_eq!(draws(Sampling { top_k: 10_000, ..hot }), draws(hot));
    // Ids that stand for no text are never drawn, even as the most likely ones.
    let below = |limit| order.iter().copied().filter(move |&id| id < limit);
    assert_eq!(draws(Sampling { vocabulary: Some(4), ..hot }), below(4).collect());
    let limit = order[0];
    let greedy = Sampling { temperature: 0.0, vocabulary: Some(limit), ..hot };
    assert!(limit == 0 || draws(greedy).into_iter().eq(below(limit).take(1)));
}

#[test]
fn a_text_ends_at_the_stop_token_the_limit_or_the_callers_wish() {
    let model = model(json!({}), DType::F32);
    let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
    let text = model.generate(&[1, 2, 3], 8, &greedy, None, |_| true).unwrap();
    let stop = text[3];
    let first = text.iter().position(|&t| t == stop).unwrap();
    assert_eq!(model.generate(&[1, 2, 3], 8, &greedy, Some(stop), |_| true).unwrap(), text[..first]);
    assert!(model.generate(&[1, 2, 3], 0, &greedy, None, |_| true).unwrap().is_empty());
    let mut seen = 0;
    let two = |_| {
        seen += 1;
        seen < 2
    };
    assert_eq!(model.generate(&[1, 2, 3], 8, &greedy, None, two).unwrap(), text[..2]);
}

#[test]
fn what_cannot_be_generated_is_refused() {
    let model = model(json!({}), DType::F32);
    let default = Sampling::default();
    for (sampling, named) in [
        (Sampling { temperature: -1.0, ..default }, "temperature = -1"),
        (Sampling { temperature: f64::NAN, ..default }, "temperature = NaN"),
        (Sampling { temperature: f64::INFINITY, ..default }, "temperature = inf"),
        (Sampling { top_p: 0.0, ..default }, "top_p = 0"),
        (Sampling { top_p: 1.5, ..default }, "top_p = 1.5"),
        (Sampling { top_p: f64::NAN, ..default }, "top_p = NaN"),
        (Sampling { vocabulary: Some(0), ..default }, "vocabulary = 0"),
    ] {
        let error = model.generate(&[1], 4, &sampling, None, |_| true).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
    let error = model.generate(&[], 4, &default, None, |_| true).unwrap_err().to_string();
    assert!(error.contains("prompt is empty"), "{error}");
    assert!(model.generate(&[VOCABULARY as u32], 4, &default, None, |_| true).is_err());

    let error = Generator::in_chunks(&model, &[1], 0).err().unwrap().to_string();
    assert!(error.contains("chunk = 0"), "{error}");
    assert!(Generator::in_chunks(&model, &[1, 2, VOCABULARY as u32], 2).is_err());

    let mut generator = Generator::new(&model, &[1, 2]).unwrap();
    let before = generator.logits().to_vec();
    assert!(generator.push(VOCABULARY as u32).is_err());
    assert_eq!((generator.len(), generator.logits()), (2, &before[..]), "a refused token leaves no trace");
    generator.push(3).unwrap();
    assert!(apart(generator.logits(), forward_logits(&model, &[1, 2, 3]).last().unwrap()) < 5e-5);
}

#[test]
fn logits_that_are_not_finite_are_an_error_not_a_text() {
    let model = model(json!({}), DType::F32);
    model.arena().values().fill_assign(f64::NAN).unwrap();
    for temperature in [0.0, 1.0] {
        let sampling = Sampling { temperature, ..Sampling::default() };
        let error = model.generate(&[1], 4, &sampling, None, |_| true).unwrap_err();
        assert!(matches!(&error, ModelError::Generate(what) if what.contains("NaN")), "{error}");
    }
}
