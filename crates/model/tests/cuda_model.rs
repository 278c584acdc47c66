//! Whole models on a GPU against the CPU in float64: loss, logits, every gradient; recompute, repetition, generation.

mod support;

use serde_json::{Value, json};
use stickbreak_autograd::Tape;
use stickbreak_model::{Generator, Packing, Sampling, Transformer};
use stickbreak_tensor::{DType, Device, Tensor};
use support::{ids, labels, model, tensor};

const CUDA: Device = Device::Cuda(0);

/// The config with heads of 16, the narrowest that tensor-core kernels have.
fn with_wide_heads(mut changes: Value) -> Value {
    changes["head_dim"] = json!(16);
    changes
}

/// The same weights on the device, after rounding them on the host to what the device computes in.
fn pair(changes: &Value, dtype: DType) -> (Transformer, Transformer) {
    let host = model(changes.clone(), DType::F64);
    let rounded = host.arena().values().to_dtype(dtype).unwrap().to_dtype(DType::F64).unwrap();
    host.arena().values().copy_assign(&rounded).unwrap();
    let device = Transformer::new_on(host.config().clone(), dtype, CUDA).unwrap();
    let master = host.arena().values().to_dtype(DType::F32).unwrap();
    device.arena().master().transfer_assign(&master).unwrap();
    device.arena().publish().unwrap();
    (host, device)
}

fn gradients(model: &Transformer, text: &[u32], packing: &Packing, recompute: bool) -> f64 {
    let device = model.device();
    let (ids, labels) = (tensor(text).to_device(device).unwrap(), labels(text, packing).to_device(device).unwrap());
    let packing = packing.to_device(device).unwrap();
    model.arena().zero_gradients().unwrap();
    let tape = Tape::new();
    let loss = model.loss(&tape, &ids, &labels, &packing, 1.0 / text.len() as f64, recompute).unwrap();
    tape.backward(&loss).unwrap();
    loss.value().to_scalar().unwrap()
}

fn error(found: &Tensor, expected: &Tensor) -> f64 {
    let (found, expected) = (found.to_f64_vec().unwrap(), expected.to_f64_vec().unwrap());
    let difference: f64 = std::iter::zip(&found, &expected).map(|(a, b)| (a - b).powi(2)).sum();
    let norm: f64 = expected.iter().map(|x| x * x).sum();
    let error = (difference / norm.max(1e-12)).sqrt();
    if error.is_nan() { f64::INFINITY } else { error }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn loss_and_every_gradient_agree_with_the_cpu() {
    let packing = Packing::new(&[0, 1, 70, 70, 200]).unwrap();
    let text = ids(3, 200);
    let mut failures = Vec::new();
    for changes in support::kinds().into_iter().map(with_wide_heads) {
        // bfloat16: the bounds of the golden vectors, loss and gradients.
        for (dtype, loss_bound, gradient_bound) in [(DType::F32, 1e-5, 2e-5), (DType::BF16, 2e-3, 8e-2)] {
            let (host, device) = pair(&changes, dtype);
            let (expected, found) =
                (gradients(&host, &text, &packing, false), gradients(&device, &text, &packing, false));
            let off = (found - expected).abs() / expected;
            if off.is_nan() || off > loss_bound {
                failures.push(format!("{changes}, {dtype}: loss {found}, expected {expected}"));
            }
            for ((entry, found), (_, expected)) in std::iter::zip(device.arena().iter(), host.arena().iter()) {
                let off = error(&found.gradient, &expected.gradient);
                if off > gradient_bound {
                    failures.push(format!("{changes}, {dtype}: gradient of {}: error {off:.1e}", entry.name));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn repeating_and_recomputing_change_no_bit() {
    let packing = Packing::new(&[0, 130, 260]).unwrap();
    let text = ids(4, 260);
    let changes = with_wide_heads(json!({"num_kv_heads": 2, "remainder": "bias", "head_norm": true}));
    for dtype in [DType::F32, DType::BF16] {
        let (_, device) = pair(&changes, dtype);
        let bits = |recompute| {
            let loss = gradients(&device, &text, &packing, recompute).to_bits();
            let gradients = device.arena().gradients().to_vec::<f32>().unwrap();
            (loss, gradients.into_iter().map(f32::to_bits).collect::<Vec<_>>())
        };
        let first = bits(false);
        assert!(first == bits(false), "{dtype}: not the same twice");
        assert!(first == bits(true), "{dtype}: recompute changes bits");
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn generation_with_a_cache_agrees_with_the_cpu() {
    let prompt = ids(5, 90);
    for changes in [json!({}), json!({"num_kv_heads": 2, "remainder": "value"}), json!({"attention": "softmax-rope"})] {
        let changes = with_wide_heads(changes);
        let (host, device) = pair(&changes, DType::F32);
        let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
        let run = |model: &Transformer| model.generate(&prompt, 40, &greedy, None, |_| true).unwrap();
        assert_eq!(run(&host), run(&device), "{changes}");
        let (_, device) = pair(&changes, DType::BF16);
        assert_eq!(run(&device).len(), 40);
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_prompt_in_chunks_agrees_with_the_cpu() {
    let text = ids(6, 700);
    let off = |found: &[f64], expected: &[f64]| {
        let largest = expected.iter().fold(0.0f64, |most, x| most.max(x.abs()));
        let difference = std::iter::zip(found, expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        if difference.is_nan() { f64::INFINITY } else { difference / largest }
    };
    for changes in [
        json!({}),
        json!({"early_exit_bits": 0, "num_kv_heads": 2, "remainder": "bias"}),
        json!({"attend_current": true, "head_norm": true, "remainder": "value"}),
        json!({"attention": "softmax-rope"}),
    ] {
        let changes = with_wide_heads(changes);
        for (dtype, bound) in [(DType::F32, 1e-4), (DType::BF16, 5e-2)] {
            let (host, device) = pair(&changes, dtype);
            let expected = Generator::new(&host, &text).unwrap();
            // Chunks that end inside of a tile of 64 and of 128 rows, and such that do not.
            for chunk in [700, 256, 100] {
                let found = Generator::in_chunks(&device, &text, chunk).unwrap();
                let error = off(found.logits(), expected.logits());
                assert!(error <= bound, "{changes}, {dtype}, chunks of {chunk}: {error:.1e}");
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn tiles_are_counted_alike_in_training_and_on_purpose() {
    let packing = Packing::new(&[0, 300, 1200]).unwrap();
    let text = ids(7, 1200);
    for dtype in [DType::F32, DType::BF16] {
        let (_, device) = pair(&with_wide_heads(json!({"num_kv_heads": 2})), dtype);
        let expected = device.skipped_tiles(&tensor(&text), &packing).unwrap().unwrap();
        assert!(expected.iter().flatten().all(|&share| share > 0.3 && share < 1.0), "{dtype}: {expected:?}");
        device.watch_tiles(true);
        for recompute in [false, true] {
            gradients(&device, &text, &packing, recompute);
            assert_eq!(device.take_skipped_tiles().unwrap().as_ref(), Some(&expected), "{dtype}, {recompute}");
        }
        device.watch_tiles(false);
        gradients(&device, &text, &packing, false);
        assert_eq!(device.take_skipped_tiles().unwrap(), None);
    }
}
