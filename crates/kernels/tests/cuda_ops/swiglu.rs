use half::bf16;
use stickbreak_kernels::cuda::Queue;
use stickbreak_kernels::swiglu::{cpu, cuda};

use crate::support::*;

fn flat<T: Number>(queue: &Queue) {
    for length in [0, 1, 13, 4096, 70_001] {
        for shift in [0, 1] {
            let what = |part: &str| format!("{part} {} {length} shift {shift}", T::NAME);
            let (gate, up, dout) = (random(1, length), random(2, length), random(3, length));
            let gate: Vec<f64> = gate.iter().map(|x| 4.0 * x).collect();
            let [mut out, mut dgate, mut dup] = [(); 3].map(|()| vec![0.0; length]);
            cpu::forward(&gate, &up, &mut out).unwrap();
            cpu::backward(&gate, &up, &dout, Some(&mut dgate), Some(&mut dup)).unwrap();
            let [g, u, d] = [&gate, &up, &dout].map(|x| Buffer::new::<T>(queue, x, shift));
            let mut device_out = Buffer::poisoned::<T>(queue, length, shift);
            cuda::forward(queue, g.get(), u.get(), &mut device_out.get_mut()).unwrap();
            assert_within(&what("out"), T::BOUNDS, &device_out.read::<T>(queue), &out, 8);
            for (wants_gate, wants_up) in [(true, true), (true, false), (false, true)] {
                let [mut dg, mut du] = [(); 2].map(|()| Buffer::poisoned::<T>(queue, length, shift));
                let gradients = (wants_gate.then_some(dg.get_mut()), wants_up.then_some(du.get_mut()));
                let (mut for_gate, mut for_up) = gradients;
                cuda::backward(queue, g.get(), u.get(), d.get(), for_gate.as_mut(), for_up.as_mut()).unwrap();
                if wants_gate {
                    assert_within(&what("dgate"), T::BOUNDS, &dg.read::<T>(queue), &dgate, 8);
                }
                if wants_up {
                    assert_within(&what("dup"), T::BOUNDS, &du.read::<T>(queue), &dup, 8);
                }
            }
        }
    }
}

fn packed<T: Number>(queue: &Queue) {
    for (rows, width) in [(0, 8), (1, 1), (5, 37), (33, 64), (100, 2816), (3, 12)] {
        for shift in [0, 1] {
            let what = |part: &str| format!("{part} {} {rows}x{width} shift {shift}", T::NAME);
            let (x, dout) = (random(1, 2 * rows * width), random(2, rows * width));
            let half = |x: &[f64], second: usize| -> Vec<f64> {
                x.chunks(2 * width).flat_map(|row| row[second * width..][..width].to_vec()).collect()
            };
            let (gate, up) = (half(&x, 0), half(&x, 1));
            let [mut out, mut dgate, mut dup] = [(); 3].map(|()| vec![0.0; rows * width]);
            cpu::forward(&gate, &up, &mut out).unwrap();
            cpu::backward(&gate, &up, &dout, Some(&mut dgate), Some(&mut dup)).unwrap();
            let (device_x, device_dout) = (Buffer::new::<T>(queue, &x, shift), Buffer::new::<T>(queue, &dout, shift));
            let mut device_out = Buffer::poisoned::<T>(queue, rows * width, shift);
            cuda::forward_packed(queue, rows, width, device_x.get(), &mut device_out.get_mut()).unwrap();
            assert_within(&what("out"), T::BOUNDS, &device_out.read::<T>(queue), &out, width);
            let mut dx = Buffer::poisoned::<T>(queue, 2 * rows * width, shift);
            cuda::backward_packed(queue, rows, width, device_x.get(), device_dout.get(), &mut dx.get_mut()).unwrap();
            let dx = dx.read::<T>(queue);
            assert_within(&what("dgate"), T::BOUNDS, &half(&dx, 0), &dgate, width);
            assert_within(&what("dup"), T::BOUNDS, &half(&dx, 1), &dup, width);
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn swiglu_and_its_gradients_agree_with_float64() {
    let queue = queue();
    flat::<f32>(&queue);
    flat::<bf16>(&queue);
    packed::<f32>(&queue);
    packed::<bf16>(&queue);
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn swiglu_refuses_what_does_not_fit() {
    let queue = queue();
    let (x, y) = (Buffer::new::<f32>(&queue, &[1.0; 6], 0), Buffer::new::<bf16>(&queue, &[1.0; 6], 0));
    let mut out = Buffer::poisoned::<f32>(&queue, 6, 0);
    assert_refused(cuda::forward(&queue, x.get(), x.get().slice(0..5), &mut out.get_mut()), &["up", "6", "5"]);
    assert_refused(cuda::forward(&queue, x.get(), y.get(), &mut out.get_mut()), &["up", "bf16"]);
    assert_refused(cuda::forward_packed(&queue, 2, 2, x.get(), &mut out.get_mut()), &["packed", "8", "6"]);
}
