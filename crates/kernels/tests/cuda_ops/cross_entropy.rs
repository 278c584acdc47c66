use half::bf16;
use stickbreak_kernels::cross_entropy::IGNORE_INDEX;
use stickbreak_kernels::cross_entropy::cuda::{RowsSpec, row_gradients, row_losses};
use stickbreak_kernels::cuda::Queue;

use crate::support::*;

/// Loss and gradient of one row, by the formula.
fn row(logits: &[f64], label: i32, scale: f64, gradient_scale: f64) -> (f64, Vec<f64>) {
    if label == IGNORE_INDEX {
        return (0.0, vec![0.0; logits.len()]);
    }
    let largest = logits.iter().map(|x| scale * x).fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|x| (scale * x - largest).exp()).sum();
    let mut gradient: Vec<f64> = logits.iter().map(|x| (scale * x - largest).exp() / sum).collect();
    gradient[label as usize] -= 1.0;
    gradient.iter_mut().for_each(|x| *x *= scale * gradient_scale);
    (sum.ln() + largest - scale * logits[label as usize], gradient)
}

fn case<T: Number>(queue: &Queue, rows: usize, vocabulary: usize, stride: usize, spread: f64, shift: usize) {
    let spec = RowsSpec { rows, vocabulary, stride, logit_scale: 0.75 };
    let gradient_scale = 0.125;
    let what = |part: &str| format!("{part} {} {spec:?} spread {spread} shift {shift}", T::NAME);
    let logits: Vec<f64> = random(1, rows * vocabulary).iter().map(|x| x * spread).collect();
    let labels: Vec<i32> = random_ids(2, rows, vocabulary as u32)
        .iter()
        .enumerate()
        .map(|(r, &id)| if r % 5 == 3 { IGNORE_INDEX } else { id as i32 })
        .collect();
    let expected: Vec<(f64, Vec<f64>)> = (0..rows)
        .map(|r| row(&logits[r * vocabulary..][..vocabulary], labels[r], spec.logit_scale, gradient_scale))
        .collect();
    let losses: Vec<f64> = expected.iter().map(|(loss, _)| *loss).collect();
    let gradient: Vec<f64> = expected.iter().flat_map(|(_, gradient)| gradient.clone()).collect();

    let mut spaced = vec![f64::NAN; (rows - 1) * stride + vocabulary];
    for r in 0..rows {
        spaced[r * stride..][..vocabulary].copy_from_slice(&logits[r * vocabulary..][..vocabulary]);
    }
    let device_labels = queue.upload(&labels).unwrap();
    // Losses are fp32 whatever the logits are.
    let bounds = (2e-6, 1e-5);
    let device_logits = Buffer::new::<T>(queue, &spaced, shift);
    let mut device_losses = Buffer::poisoned::<f32>(queue, rows, 0);
    row_losses(queue, &spec, device_logits.get(), device_labels.as_ref(), &mut device_losses.get_mut()).unwrap();
    assert_within(&what("loss"), bounds, &device_losses.read::<f32>(queue), &losses, 1);

    let (found_losses, found) = twice(&what("gradient"), || {
        let mut device_logits = Buffer::new::<T>(queue, &spaced, shift);
        let mut losses = Buffer::poisoned::<f32>(queue, rows, 0);
        let (l, d) = (&mut losses.get_mut(), &mut device_logits.get_mut());
        row_gradients(queue, &spec, gradient_scale, d, device_labels.as_ref(), l).unwrap();
        (losses.raw::<f32>(queue), device_logits.bits::<T>(queue))
    });
    let found = values::<T>(&found);
    let found_losses: Vec<f64> = found_losses.into_iter().map(f64::from).collect();
    assert_within(&what("loss"), bounds, &found_losses, &losses, 1);
    assert!((0..found.len()).all(|i| i % stride < vocabulary || found[i].is_nan()), "{}", what("a gap was written"));
    let found: Vec<f64> = (0..rows).flat_map(|r| found[r * stride..][..vocabulary].to_vec()).collect();
    assert_within(&what("dlogits"), T::BOUNDS, &found, &gradient, vocabulary);
    // Without the label's large entry the rest must be right too.
    let rest = |x: &[f64]| -> Vec<f64> {
        let is_label = |i: usize| labels[i / vocabulary] == (i % vocabulary) as i32;
        x.iter().enumerate().map(|(i, &x)| if is_label(i) { 0.0 } else { x }).collect()
    };
    assert_within(&what("dlogits of the others"), T::BOUNDS, &rest(&found), &rest(&gradient), vocabulary);
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn losses_and_gradients_of_rows_agree_with_float64() {
    let queue = queue();
    for (rows, vocabulary, stride) in [
        (1, 1, 1),
        (7, 5, 5),
        (6, 1000, 1000),
        (6, 1000, 1008),
        (6, 999, 1001),
        (9, 16384, 16384),
        (5, 50257, 50304),
        (5, 50304, 50304),
    ] {
        for spread in [1.0, 16.0] {
            for shift in [0, 1] {
                case::<f32>(&queue, rows, vocabulary, stride, spread, shift);
                case::<bf16>(&queue, rows, vocabulary, stride, spread, shift);
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn labels_that_are_no_class_give_nan_and_no_gradient() {
    let queue = queue();
    let spec = RowsSpec { rows: 4, vocabulary: 10, stride: 10, logit_scale: 1.0 };
    let labels = queue.upload(&[10i32, -1, i32::MIN, 9]).unwrap();
    let mut logits = Buffer::new::<f32>(&queue, &[0.5; 40], 0);
    let mut losses = Buffer::new::<f32>(&queue, &[0.0; 4], 0);
    row_gradients(&queue, &spec, 1.0, &mut logits.get_mut(), labels.as_ref(), &mut losses.get_mut()).unwrap();
    let losses = losses.read::<f32>(&queue);
    assert!(losses[..3].iter().all(|x| x.is_nan()) && (losses[3] - 10f64.ln()).abs() < 1e-6, "{losses:?}");
    let gradient = logits.read::<f32>(&queue);
    assert!(gradient[..30].iter().all(|&x| x == 0.0) && gradient[39] < -0.89, "{gradient:?}");
    // A logit that is not finite shows in the loss.
    for bad in [f64::NAN, f64::INFINITY] {
        let mut x = [0.5; 40];
        x[33] = bad;
        let logits = Buffer::new::<f32>(&queue, &x, 0);
        let mut losses = Buffer::new::<f32>(&queue, &[0.0; 4], 0);
        row_losses(&queue, &spec, logits.get(), labels.as_ref(), &mut losses.get_mut()).unwrap();
        assert!(!losses.read::<f32>(&queue)[3].is_finite(), "{bad}");
    }
    // One that is -infinity has no weight.
    let mut x = [0.0; 40];
    x[30] = f64::NEG_INFINITY;
    let logits = Buffer::new::<f32>(&queue, &x, 0);
    let mut losses = Buffer::new::<f32>(&queue, &[0.0; 4], 0);
    row_losses(&queue, &spec, logits.get(), labels.as_ref(), &mut losses.get_mut()).unwrap();
    assert!((losses.read::<f32>(&queue)[3] - 9f64.ln()).abs() < 1e-6);
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn rows_of_logits_refuse_what_does_not_fit() {
    let queue = queue();
    let labels = queue.upload(&[0i32, 1]).unwrap();
    let logits = Buffer::new::<f32>(&queue, &[0.5; 19], 0);
    let mut losses = Buffer::poisoned::<f32>(&queue, 2, 0);
    let mut run = |vocabulary, stride, labels| {
        let spec = RowsSpec { rows: 2, vocabulary, stride, logit_scale: 1.0 };
        row_losses(&queue, &spec, logits.get(), labels, &mut losses.get_mut())
    };
    assert_refused(run(10, 10, labels.as_ref()), &["logits", "20", "19"]);
    assert_refused(run(9, 8, labels.as_ref()), &["stride", "9", "8"]);
    assert_refused(run(9, 9, labels.as_ref().slice(0..1)), &["labels", "2", "1"]);
    assert_refused(run(9, 9, logits.get().slice(0..2)), &["labels", "i32", "f32"]);
}
