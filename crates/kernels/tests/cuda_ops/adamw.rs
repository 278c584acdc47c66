use half::bf16;
use stickbreak_kernels::adamw::cuda::Guard;
use stickbreak_kernels::adamw::{AdamW, cpu, cuda};
use stickbreak_kernels::cuda::Queue;

use crate::support::*;

const SPEC: AdamW =
    AdamW { learning_rate: 3e-2, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1, step: 1, grad_scale: 0.5 };

/// A few steps on the CPU in float64 and on the device, with and without a clip that bites.
fn steps<G: Number>(queue: &Queue, length: usize, shift: usize, clip: f64) {
    let (mut p, mut m, mut v) = (random(1, length), vec![0.0; length], vec![0.0; length]);
    let mut device: Vec<Buffer> = [&p, &m, &v].map(|x| Buffer::new::<f32>(queue, x, shift)).into();
    for step in 1..=3 {
        let grads = random(10 + step, length);
        let squares: f64 = grads.iter().map(|g| g * g).sum();
        let factor = if clip > 0.0 { (clip / (SPEC.grad_scale * squares.sqrt() + 1e-6)).min(1.0) } else { 1.0 };
        let spec = AdamW { step, ..SPEC };
        let scaled = AdamW { grad_scale: SPEC.grad_scale * factor, ..spec };
        cpu::step(&scaled, &mut p, &grads, &mut m, &mut v).unwrap();

        let device_grads = Buffer::new::<G>(queue, &grads, shift);
        let device_squares = queue.upload(&[squares as f32]).unwrap();
        let loss = queue.upload(&[2.5f32]).unwrap();
        let guard = Guard { sum_of_squares: Some(device_squares.as_ref()), clip, finite: Some(loss.as_ref()) };
        let mut copy = Buffer::poisoned::<bf16>(queue, length, shift);
        let [dp, dm, dv] = &mut device[..] else { unreachable!() };
        let (gp, gm, gv) = (&mut dp.get_mut(), &mut dm.get_mut(), &mut dv.get_mut());
        cuda::step(queue, &spec, &guard, gp, device_grads.get(), gm, gv, Some(&mut copy.get_mut())).unwrap();
        let what = |part: &str| format!("{part} {} {length} shift {shift} clip {clip} step {step}", G::NAME);
        for (name, buffer, expected) in [("p", &device[0], &p), ("m", &device[1], &m), ("v", &device[2], &v)] {
            assert_within(&what(name), (2e-6, 1e-5), &buffer.read::<f32>(queue), expected, 8);
        }
        assert_same(&what("copy"), &copy.read::<bf16>(queue), &rounded::<bf16>(&device[0].read::<f32>(queue)));
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn updates_agree_with_float64() {
    let queue = queue();
    for length in [0, 1, 7, 4096, 100_003] {
        for shift in [0, 1] {
            for clip in [0.0, 1.0, 1e9] {
                steps::<f32>(&queue, length, shift, clip);
                steps::<bf16>(&queue, length, shift, clip);
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn nothing_is_updated_if_a_scalar_is_not_finite() {
    let queue = queue();
    let x = random(1, 1000);
    for (squares, loss) in
        [(f32::NAN, 1.0), (f32::INFINITY, 1.0), (1.0, f32::NAN), (1.0, f32::NEG_INFINITY), (1.0, 1.0)]
    {
        let [mut p, mut m, mut v] =
            [(); 3].map(|()| Buffer::new::<f32>(&queue, &x.iter().map(|x| x.abs()).collect::<Vec<_>>(), 0));
        let grads = Buffer::new::<f32>(&queue, &x, 0);
        let mut copy = Buffer::new::<bf16>(&queue, &x, 0);
        let before = [p.bits::<f32>(&queue), m.bits::<f32>(&queue), v.bits::<f32>(&queue), copy.bits::<bf16>(&queue)];
        let (device_squares, device_loss) = (queue.upload(&[squares]).unwrap(), queue.upload(&[loss]).unwrap());
        let guard =
            Guard { sum_of_squares: Some(device_squares.as_ref()), clip: 1.0, finite: Some(device_loss.as_ref()) };
        let (dp, dm, dv) = (&mut p.get_mut(), &mut m.get_mut(), &mut v.get_mut());
        cuda::step(&queue, &SPEC, &guard, dp, grads.get(), dm, dv, Some(&mut copy.get_mut())).unwrap();
        let after = [p.bits::<f32>(&queue), m.bits::<f32>(&queue), v.bits::<f32>(&queue), copy.bits::<bf16>(&queue)];
        let finite = squares.is_finite() && loss.is_finite();
        assert_eq!(before == after, !finite, "sum of squares {squares}, loss {loss}");
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn adamw_refuses_what_does_not_fit() {
    let queue = queue();
    let [mut p, mut m, mut v] = [(); 3].map(|()| Buffer::new::<f32>(&queue, &[1.0; 8], 0));
    let grads = Buffer::new::<f32>(&queue, &[1.0; 8], 0);
    let mut run = |spec: &AdamW, guard: &Guard<'_>, grads| {
        let (dp, dm, dv) = (&mut p.get_mut(), &mut m.get_mut(), &mut v.get_mut());
        cuda::step(&queue, spec, guard, dp, grads, dm, dv, None)
    };
    let none = Guard::default();
    assert_refused(run(&AdamW { step: 0, ..SPEC }, &none, grads.get()), &["step", "0"]);
    assert_refused(run(&SPEC, &none, grads.get().slice(0..7)), &["grads", "8", "7"]);
    assert_refused(run(&SPEC, &Guard { clip: 1.0, ..none }, grads.get()), &["clip"]);
    let scalars = Guard { sum_of_squares: Some(grads.get()), ..none };
    assert_refused(run(&SPEC, &scalars, grads.get()), &["guard", "1", "8"]);
    assert_eq!(p.read::<f32>(&queue), [1.0; 8]);
}
