use half::bf16;
use stickbreak_kernels::cuda::Queue;
use stickbreak_kernels::group_norm::{self, GroupNormSpec};
use stickbreak_kernels::rms_norm::{self, RmsNormSpec};

use crate::support::*;

fn rms_norm_case<T: Number, P: Number, G: Number>(queue: &Queue, rows: usize, width: usize, shift: usize) {
    let spec = RmsNormSpec { rows, width, epsilon: 1e-3 };
    let size = rows * width;
    let what = |part: &str| format!("{part} {rows}x{width} {} {} shift {shift}", T::NAME, P::NAME);
    let (x, residual, weight) = (random(1, size), random(2, size), random(3, width));
    let device_weight = Buffer::new::<P>(queue, &weight, shift);
    let (device_x, device_residual) = (Buffer::new::<T>(queue, &x, shift), Buffer::new::<T>(queue, &residual, shift));

    // Alone, and fused with the add: the sum is rounded, then normalised.
    let sum: Vec<f64> = rounded::<T>(&x.iter().zip(&residual).map(|(a, b)| a + b).collect::<Vec<_>>());
    for fused in [false, true] {
        let input = if fused { &sum } else { &x };
        let (mut expected, mut expected_rms) = (vec![0.0; size], vec![0.0; rows]);
        rms_norm::cpu::forward(&spec, input, &weight, &mut expected, &mut expected_rms).unwrap();
        let mut out = Buffer::poisoned::<T>(queue, size, shift);
        let mut device_sum = Buffer::poisoned::<T>(queue, size, shift);
        let mut inverse_rms = Buffer::poisoned::<f32>(queue, rows, 0);
        let (w, o, r) = (device_weight.get(), &mut out.get_mut(), &mut inverse_rms.get_mut());
        if fused {
            let s = &mut device_sum.get_mut();
            rms_norm::cuda::forward_residual(queue, &spec, device_x.get(), device_residual.get(), w, s, o, r).unwrap();
        } else {
            rms_norm::cuda::forward(queue, &spec, device_x.get(), w, o, r).unwrap();
        }
        if fused {
            assert_same(&what("sum"), &device_sum.read::<T>(queue), &sum);
        }
        assert_within(&what("out"), T::BOUNDS, &out.read::<T>(queue), &expected, width);
        assert_within(&what("inverse_rms"), f32::BOUNDS, &inverse_rms.read::<f32>(queue), &expected_rms, 1);
    }

    // Backward, with and without what comes past the norm, and each gradient alone.
    let (dout, dresidual) = (random(4, size), random(5, size));
    let (mut out, mut rms) = (vec![0.0; size], vec![0.0; rows]);
    rms_norm::cpu::forward(&spec, &x, &weight, &mut out, &mut rms).unwrap();
    let (mut dx, mut dweight) = (vec![0.0; size], vec![0.0; width]);
    rms_norm::cpu::backward(&spec, &x, &weight, &rms, &dout, Some(&mut dx), Some(&mut dweight)).unwrap();
    let device_rms = Buffer::new::<f32>(queue, &rms, 0);
    let (device_dout, device_past) =
        (Buffer::new::<T>(queue, &dout, shift), Buffer::new::<T>(queue, &dresidual, shift));
    let run = |past: bool, wants_dx: bool, wants_dweight: bool| {
        twice(&what("backward"), || {
            let mut dx = Buffer::poisoned::<T>(queue, size, shift);
            let mut dweight = Buffer::poisoned::<G>(queue, width, 0);
            rms_norm::cuda::backward(
                queue,
                &spec,
                device_x.get(),
                device_weight.get(),
                device_rms.get(),
                device_dout.get(),
                past.then(|| device_past.get()),
                wants_dx.then_some(&mut dx.get_mut()),
                wants_dweight.then_some(&mut dweight.get_mut()),
            )
            .unwrap();
            (dx.bits::<T>(queue), dweight.bits::<G>(queue))
        })
    };
    let (both_dx, both_dweight) = run(false, true, true);
    assert_within(&what("dx"), T::BOUNDS, &values::<T>(&both_dx), &dx, width);
    assert_within(&what("dweight"), G::BOUNDS, &values::<G>(&both_dweight), &dweight, width);
    assert_same(&what("dx alone"), &run(false, true, false).0, &both_dx);
    assert_same(&what("dweight alone"), &run(false, false, true).1, &both_dweight);
    let (found_dx, _) = run(true, true, true);
    let expected: Vec<f64> = dx.iter().zip(&dresidual).map(|(a, b)| a + b).collect();
    assert_within(&what("dx with residual"), T::BOUNDS, &values::<T>(&found_dx), &expected, width);
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn rms_norm_and_its_gradients_agree_with_float64() {
    let queue = queue();
    for (rows, width) in [
        // (One element a row has a gradient that float32 loses by cancellation.)
        (1, 2),
        (7, 37),
        (0, 16),
        (3, 64),
        (33, 96),
        (70, 1000),
        (2200, 1024),
        (40, 1536),
        (40, 2048),
        (5, 5000),
        (3, 16384),
        (2, 16385),
        (1100, 65),
        (700, 4096),
    ] {
        for shift in [0, 1] {
            rms_norm_case::<f32, f32, f32>(&queue, rows, width, shift);
            rms_norm_case::<bf16, f32, f32>(&queue, rows, width, shift);
            rms_norm_case::<bf16, bf16, bf16>(&queue, rows, width, shift);
        }
    }
}

fn group_norm_case<T: Number, P: Number, G: Number>(
    queue: &Queue,
    tokens: usize,
    heads: usize,
    head_dim: usize,
    shift: usize,
) {
    let spec = GroupNormSpec { tokens, heads, head_dim, epsilon: 1e-3 };
    let (size, width, groups) = (tokens * heads * head_dim, heads * head_dim, tokens * heads);
    let what = |part: &str| format!("{part} {tokens}x{heads}x{head_dim} {} {} shift {shift}", T::NAME, P::NAME);
    let (x, weight, bias, dout) = (random(1, size), random(2, width), random(3, width), random(4, size));
    let (mut expected, mut mean, mut inverse_std) = (vec![0.0; size], vec![0.0; groups], vec![0.0; groups]);
    group_norm::cpu::forward(&spec, &x, &weight, &bias, &mut expected, &mut mean, &mut inverse_std).unwrap();

    let device_x = Buffer::new::<T>(queue, &x, shift);
    let (device_weight, device_bias) = (Buffer::new::<P>(queue, &weight, shift), Buffer::new::<P>(queue, &bias, shift));
    let mut out = Buffer::poisoned::<T>(queue, size, shift);
    let mut device_mean = Buffer::poisoned::<f32>(queue, groups, 0);
    let mut device_std = Buffer::poisoned::<f32>(queue, groups, 0);
    let (w, b) = (device_weight.get(), device_bias.get());
    let (m, s) = (&mut device_mean.get_mut(), &mut device_std.get_mut());
    group_norm::cuda::forward(queue, &spec, device_x.get(), w, b, &mut out.get_mut(), m, s).unwrap();
    assert_within(&what("out"), T::BOUNDS, &out.read::<T>(queue), &expected, head_dim);
    assert_within(&what("mean"), f32::BOUNDS, &device_mean.read::<f32>(queue), &mean, 1);
    assert_within(&what("inverse_std"), f32::BOUNDS, &device_std.read::<f32>(queue), &inverse_std, 1);

    let (mut dx, mut dweight, mut dbias) = (vec![0.0; size], vec![0.0; width], vec![0.0; width]);
    let gradients = (Some(&mut dx[..]), Some(&mut dweight[..]), Some(&mut dbias[..]));
    group_norm::cpu::backward(&spec, &x, &weight, &mean, &inverse_std, &dout, gradients.0, gradients.1, gradients.2)
        .unwrap();
    let device_dout = Buffer::new::<T>(queue, &dout, shift);
    let run = |wants: [bool; 3]| {
        twice(&what("backward"), || {
            let mut dx = Buffer::poisoned::<T>(queue, size, shift);
            let (mut dweight, mut dbias) =
                (Buffer::poisoned::<G>(queue, width, 0), Buffer::poisoned::<G>(queue, width, 0));
            group_norm::cuda::backward(
                queue,
                &spec,
                device_x.get(),
                w,
                device_mean.get(),
                device_std.get(),
                device_dout.get(),
                wants[0].then_some(&mut dx.get_mut()),
                wants[1].then_some(&mut dweight.get_mut()),
                wants[2].then_some(&mut dbias.get_mut()),
            )
            .unwrap();
            [dx.bits::<T>(queue), dweight.bits::<G>(queue), dbias.bits::<G>(queue)]
        })
    };
    let all = run([true; 3]);
    assert_within(&what("dx"), T::BOUNDS, &values::<T>(&all[0]), &dx, head_dim);
    assert_within(&what("dweight"), G::BOUNDS, &values::<G>(&all[1]), &dweight, head_dim);
    assert_within(&what("dbias"), G::BOUNDS, &values::<G>(&all[2]), &dbias, head_dim);
    for alone in 0..3 {
        let wants = [0, 1, 2].map(|i| i == alone);
        assert_same(&what(&format!("gradient {alone} alone")), &run(wants)[alone], &all[alone]);
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn group_norm_and_its_gradients_agree_with_float64() {
    let queue = queue();
    for (tokens, heads, head_dim) in [
        (5, 3, 16),
        (1, 1, 1),
        (0, 2, 8),
        (130, 2, 64),
        (1100, 16, 64),
        (9, 16, 128),
        (17, 4, 80),
        (3, 2, 37),
        (4, 1, 256),
        (6, 5, 300),
        (40, 200, 8),
        (3000, 1, 24),
    ] {
        for shift in [0, 1] {
            group_norm_case::<f32, f32, f32>(&queue, tokens, heads, head_dim, shift);
            group_norm_case::<bf16, f32, f32>(&queue, tokens, heads, head_dim, shift);
            group_norm_case::<bf16, bf16, bf16>(&queue, tokens, heads, head_dim, shift);
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn norms_refuse_what_does_not_fit() {
    let queue = queue();
    let spec = RmsNormSpec { rows: 2, width: 3, epsilon: 1e-5 };
    let (x, weight) = (Buffer::new::<f32>(&queue, &[1.0; 6], 0), Buffer::new::<bf16>(&queue, &[1.0; 3], 0));
    let (mut out, mut rms) = (Buffer::poisoned::<f32>(&queue, 6, 0), Buffer::poisoned::<f32>(&queue, 2, 0));
    let mut run = |x, weight| rms_norm::cuda::forward(&queue, &spec, x, weight, &mut out.get_mut(), &mut rms.get_mut());
    assert_refused(run(x.get().slice(0..5), x.get().slice(0..3)), &["x", "6", "5"]);
    assert_refused(run(x.get(), x.get().slice(0..2)), &["weight", "3", "2"]);
    assert_refused(run(x.get(), weight.get()), &["weight", "bf16"]);
    assert!(out.read::<f32>(&queue).iter().all(|x| x.is_nan()));
    let spec = GroupNormSpec { tokens: 1, heads: 1, head_dim: 513, epsilon: 1e-5 };
    let x = Buffer::new::<f32>(&queue, &vec![1.0; 513], 0);
    let (mut out, mut mean) = (Buffer::poisoned::<f32>(&queue, 513, 0), Buffer::poisoned::<f32>(&queue, 1, 0));
    let result = group_norm::cuda::forward(
        &queue,
        &spec,
        x.get(),
        x.get(),
        x.get(),
        &mut out.get_mut(),
        &mut mean.get_mut(),
        &mut rms.get_mut().slice_mut(0..1),
    );
    assert_refused(result, &["head_dim", "513"]);
}
