use half::bf16;
use stickbreak_kernels::cuda::Queue;
use stickbreak_kernels::rope::{RopeSpec, cpu, cuda};

use crate::support::*;

fn rope_case<T: Number>(queue: &Queue, spec: &RopeSpec, gap: usize, shift: usize) {
    let RopeSpec { tokens, heads, head_dim, .. } = *spec;
    let (width, stride) = (heads * head_dim, heads * head_dim + gap);
    let what = |part: &str| format!("{part} {} {spec:?} gap {gap} shift {shift}", T::NAME);
    let x = random(1, tokens * width);
    let mut positions = random_ids(2, tokens, 1_000_000);
    // Far beyond what float32 angles can hold.
    positions.iter_mut().step_by(7).for_each(|p| *p = 999_999);
    for inverse in [false, true] {
        let mut expected = vec![0.0; x.len()];
        cpu::rotate(spec, &positions, inverse, &x, &mut expected).unwrap();
        let mut spaced = vec![f64::NAN; if tokens == 0 { 0 } else { (tokens - 1) * stride + width }];
        for token in 0..tokens {
            spaced[token * stride..][..width].copy_from_slice(&x[token * width..][..width]);
        }
        let gather = |spaced: Vec<f64>| -> Vec<f64> {
            // What lies between the rows was NaN and must still be.
            let gaps = (0..spaced.len()).filter(|i| i % stride >= width);
            assert!(gaps.into_iter().all(|i| spaced[i].is_nan()), "{}", what("a gap was written"));
            (0..tokens).flat_map(|token| spaced[token * stride..][..width].to_vec()).collect()
        };
        let device_positions = queue.upload(&positions).unwrap();
        let p = device_positions.as_ref();
        let device_x = Buffer::new::<T>(queue, &spaced, shift);
        let mut out = Buffer::poisoned::<T>(queue, spaced.len(), shift);
        cuda::rotate(queue, spec, p, inverse, device_x.get(), stride, &mut out.get_mut(), stride).unwrap();
        assert_within(&what("out"), T::BOUNDS, &gather(out.read::<T>(queue)), &expected, head_dim);
        let mut dense = Buffer::poisoned::<T>(queue, tokens * width, 0);
        cuda::rotate(queue, spec, p, inverse, device_x.get(), stride, &mut dense.get_mut(), width).unwrap();
        assert_within(&what("dense"), T::BOUNDS, &dense.read::<T>(queue), &expected, head_dim);
        let mut in_place = Buffer::new::<T>(queue, &spaced, shift);
        cuda::rotate_in_place(queue, spec, p, inverse, &mut in_place.get_mut(), stride).unwrap();
        assert_same(&what("in place"), &gather(in_place.read::<T>(queue)), &gather(out.read::<T>(queue)));
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn rotation_agrees_with_float64_at_large_positions() {
    let queue = queue();
    for (tokens, heads, head_dim) in
        [(0, 2, 8), (1, 1, 2), (9, 3, 64), (5, 2, 24), (7, 1, 6), (3, 16, 128), (1000, 5, 32), (2, 4, 256)]
    {
        for theta in [10_000.0, 500_000.0] {
            let spec = RopeSpec { tokens, heads, head_dim, theta };
            for (gap, shift) in [(0, 0), (0, 1), (16, 0), (3, 0)] {
                rope_case::<f32>(&queue, &spec, gap, shift);
                rope_case::<bf16>(&queue, &spec, gap, shift);
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn rotation_refuses_what_does_not_fit() {
    let queue = queue();
    let x = Buffer::new::<f32>(&queue, &[1.0; 12], 0);
    let mut out = Buffer::poisoned::<f32>(&queue, 12, 0);
    let positions = queue.upload(&[0u32, 1]).unwrap();
    let mut run = |head_dim, stride| {
        let spec = RopeSpec { tokens: 2, heads: 1, head_dim, theta: 1e4 };
        cuda::rotate(&queue, &spec, positions.as_ref(), false, x.get(), stride, &mut out.get_mut(), stride)
    };
    assert_refused(run(5, 6), &["head_dim", "even", "5"]);
    assert_refused(run(8, 8), &["16", "12"]);
    assert_refused(run(6, 4), &["stride"]);
}
