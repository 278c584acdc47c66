use stickbreak_kernels::adamw::AdamW;
use stickbreak_kernels::adamw::cpu::step;

use crate::support::*;

#[test]
fn twenty_steps_match_the_formula() {
    let n = 10_000;
    let mut p = random(1, n);
    let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
    let (mut params, mut first, mut second) = (p.clone(), m.clone(), v.clone());
    let (mut params32, mut first32, mut second32) = (single(&p), single(&m), single(&v));
    for t in 1..=20 {
        let g = random(100 + t, n);
        let spec = AdamW {
            learning_rate: 1e-2 / t as f64,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            step: t,
            grad_scale: 0.3,
        };
        for i in 0..n {
            let g = 0.3 * g[i];
            p[i] *= 1.0 - spec.learning_rate * 0.1;
            m[i] = 0.9 * m[i] + (1.0 - 0.9) * g;
            v[i] = 0.95 * v[i] + (1.0 - 0.95) * g * g;
            let (correction1, correction2) = (1.0 - 0.9f64.powi(t as i32), 1.0 - 0.95f64.powi(t as i32));
            p[i] -= spec.learning_rate / correction1 * m[i] / (v[i].sqrt() / correction2.sqrt() + 1e-8);
        }
        step(&spec, &mut params, &g, &mut first, &mut second).unwrap();
        step(&spec, &mut params32, &single(&g), &mut first32, &mut second32).unwrap();
    }
    assert_close("p", &params, &p, 1e-14);
    assert_close("m", &first, &m, 1e-14);
    assert_close("v", &second, &v, 1e-14);
    assert_close("p in f32", &double(&params32), &p, 5e-7);
}

#[test]
fn wrong_lengths_and_step_zero_are_refused() {
    let spec = AdamW {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.0,
        step: 1,
        grad_scale: 1.0,
    };
    let (mut p, mut m, mut v) = ([1f32; 4], [0f32; 4], [0f32; 4]);
    assert_length_error(step(&spec, &mut p, &[0.0; 3], &mut m, &mut v), 4, 3);
    assert_length_error(step(&spec, &mut p, &[0.0; 4], &mut m[1..], &mut v), 4, 3);
    assert!(step(&AdamW { step: 0, ..spec }, &mut p, &[0.0; 4], &mut m, &mut v).is_err());
    assert_eq!(p, [1.0; 4]);
}
