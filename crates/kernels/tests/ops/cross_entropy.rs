use stickbreak_kernels::KernelError;
use stickbreak_kernels::cross_entropy::cpu::forward;
use stickbreak_kernels::cross_entropy::{IGNORE_INDEX, LinearCrossEntropySpec};

use crate::support::*;

fn losses(spec: &LinearCrossEntropySpec, hidden: &[f64], weight: &[f64], labels: &[i32]) -> Vec<f64> {
    let loss = |(hidden, &label): (&[f64], &i32)| {
        if label == IGNORE_INDEX {
            return 0.0;
        }
        let logits: Vec<f64> =
            weight.chunks_exact(spec.width).map(|weight| spec.logit_scale * dot(hidden, weight)).collect();
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        largest + logits.iter().map(|z| (z - largest).exp()).sum::<f64>().ln() - logits[label as usize]
    };
    hidden.chunks_exact(spec.width).zip(labels).map(loss).collect()
}

#[test]
fn loss_and_gradients_match_the_formula_for_every_chunk() {
    let (tokens, width, vocabulary) = (13, 5, 37);
    let (hidden, weight) = (random(1, tokens * width), random(2, vocabulary * width));
    let mut labels: Vec<i32> = random_ids(3, tokens, vocabulary as u32).iter().map(|&id| id as i32).collect();
    labels[4] = IGNORE_INDEX;
    labels[12] = IGNORE_INDEX;
    for chunk in [1, 4, 12, 13, 1000] {
        let spec = LinearCrossEntropySpec { tokens, width, vocabulary, logit_scale: 1.7, chunk };
        let expected = losses(&spec, &hidden, &weight, &labels);
        let mut loss = vec![f64::NAN; tokens];
        let (mut dhidden, mut dweight) = (vec![f64::NAN; hidden.len()], vec![f64::NAN; weight.len()]);
        forward(&spec, &hidden, &weight, &labels, &mut loss, Some(&mut dhidden), Some(&mut dweight)).unwrap();
        assert_close("loss", &loss, &expected, 1e-14);
        let total = |hidden: &[f64], weight: &[f64]| losses(&spec, hidden, weight, &labels).iter().sum::<f64>();
        assert_gradient("dhidden", &hidden, &dhidden, |hidden| total(hidden, &weight));
        assert_gradient("dweight", &weight, &dweight, |weight| total(&hidden, weight));

        let mut loss_alone = vec![f64::NAN; tokens];
        forward(&spec, &hidden, &weight, &labels, &mut loss_alone, None, None).unwrap();
        assert_close("loss without gradients", &loss_alone, &expected, 1e-14);

        let mut loss32 = vec![f32::NAN; tokens];
        let (mut dhidden32, mut dweight32) = (vec![f32::NAN; hidden.len()], vec![f32::NAN; weight.len()]);
        let (hidden32, weight32) = (single(&hidden), single(&weight));
        let gradients = (Some(&mut dhidden32[..]), Some(&mut dweight32[..]));
        forward(&spec, &hidden32, &weight32, &labels, &mut loss32, gradients.0, gradients.1).unwrap();
        assert_close("f32 loss", &double(&loss32), &expected, 5e-7);
        assert_close("f32 dhidden", &double(&dhidden32), &dhidden, 1e-6);
        assert_close("f32 dweight", &double(&dweight32), &dweight, 1e-6);
    }
}

#[test]
fn large_logits_do_not_overflow() {
    let spec = LinearCrossEntropySpec { tokens: 2, width: 1, vocabulary: 3, logit_scale: 1.0, chunk: 2 };
    let mut loss = [0f32; 2];
    let mut dhidden = [f32::NAN; 2];
    forward(&spec, &[1000.0, -1000.0], &[1.0, 0.0, -1.0], &[0, 0], &mut loss, Some(&mut dhidden), None).unwrap();
    assert_eq!(loss, [0.0, 2000.0]);
    assert_eq!(dhidden, [0.0, -2.0]);
}

#[test]
fn empty_and_wholly_ignored_batches_have_zero_gradients() {
    let spec = LinearCrossEntropySpec { tokens: 0, width: 2, vocabulary: 3, logit_scale: 1.0, chunk: 2 };
    let mut dweight = [f64::NAN; 6];
    forward(&spec, &[], &[1.0; 6], &[], &mut [], None, Some(&mut dweight)).unwrap();
    assert_eq!(dweight, [0.0; 6]);
    let spec = LinearCrossEntropySpec { tokens: 2, ..spec };
    let (mut loss, mut dhidden, mut dweight) = ([f64::NAN; 2], [f64::NAN; 4], [f64::NAN; 6]);
    let labels = [IGNORE_INDEX; 2];
    forward(&spec, &[1.0; 4], &[1.0; 6], &labels, &mut loss, Some(&mut dhidden), Some(&mut dweight)).unwrap();
    assert_eq!((loss, dhidden, dweight), ([0.0; 2], [0.0; 4], [0.0; 6]));
}

#[test]
fn wrong_labels_and_lengths_are_refused() {
    let spec = LinearCrossEntropySpec { tokens: 2, width: 2, vocabulary: 3, logit_scale: 1.0, chunk: 2 };
    let (hidden, weight, mut loss) = ([0f32; 4], [0f32; 6], [7f32; 2]);
    for label in [3, -1, i32::MIN] {
        let error = forward(&spec, &hidden, &weight, &[0, label], &mut loss, None, None).unwrap_err();
        assert!(matches!(error, KernelError::Index { position: 1, value, .. } if value == i64::from(label)), "{error}");
    }
    assert_eq!(loss, [7.0; 2]);
    assert_length_error(forward(&spec, &hidden[1..], &weight, &[0, 1], &mut loss, None, None), 4, 3);
    assert_length_error(forward(&spec, &hidden, &weight, &[0], &mut loss, None, None), 2, 1);
    assert_length_error(forward(&spec, &hidden, &weight, &[0, 1], &mut loss, Some(&mut [0.0; 3]), None), 4, 3);
    let no_chunk = LinearCrossEntropySpec { chunk: 0, ..spec };
    assert!(forward(&no_chunk, &hidden, &weight, &[0, 1], &mut loss, None, None).is_err());
}
