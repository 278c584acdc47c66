//! Bit-identical results on 1, 2, 3 and 7 threads, for sizes that are cut into many uneven pieces.

use stickbreak_kernels::adamw::{self, AdamW};
use stickbreak_kernels::cross_entropy::{self, LinearCrossEntropySpec};
use stickbreak_kernels::elementwise::cpu::{accumulate, binary, unary};
use stickbreak_kernels::elementwise::{BinaryOp, Strided, UnaryOp};
use stickbreak_kernels::embedding::{self, EmbeddingSpec};
use stickbreak_kernels::group_norm::{self, GroupNormSpec};
use stickbreak_kernels::matmul::cpu::matmul;
use stickbreak_kernels::matmul::{MatmulSpec, MatrixStrides};
use stickbreak_kernels::reduce::Reduction;
use stickbreak_kernels::reduce::cpu::{reduce, sum_of_squares};
use stickbreak_kernels::rms_norm::{self, RmsNormSpec};
use stickbreak_kernels::rope::{self, RopeSpec};
use stickbreak_kernels::swiglu;

use crate::support::*;

fn assert_same(what: &str, body: impl Fn() -> Vec<f32> + Sync) {
    let bits = |threads| with_threads(threads, || body().iter().map(|x| x.to_bits()).collect::<Vec<_>>());
    let one = bits(1);
    for threads in [2, 3, 7] {
        assert!(bits(threads) == one, "{what}: {threads} threads change the result");
    }
}

#[test]
fn matmul_does_not_depend_on_threads() {
    // The shapes of training, a deep product, and sizes that no tile divides; A^T is the product over tokens.
    for (batch, m, n, k) in [
        (1, 1000, 256, 300),
        (1, 256, 256, 4096),
        (1, 257, 131, 1025),
        (3, 200, 90, 170),
        (40, 17, 33, 9),
        (1, 1, 999, 700),
    ] {
        for (a_is_transposed, b_is_transposed) in [(false, true), (false, false), (true, false)] {
            let side = |transposed, rows, columns| match transposed {
                false => MatrixStrides::row_major(rows, columns),
                true => MatrixStrides::row_major(columns, rows).transposed(),
            };
            let (a, b) = (side(a_is_transposed, m, k), side(b_is_transposed, k, n));
            let spec = MatmulSpec { batch, m, n, k, a, b, c: MatrixStrides::row_major(m, n) };
            let (a, b) = (single(&random(1, batch * m * k)), single(&random(2, batch * k * n)));
            let c = single(&random(3, batch * m * n));
            assert_same(&format!("{spec:?}"), || {
                let mut c = c.clone();
                matmul(&spec, 0.5, &a, &b, 1.0, &mut c).unwrap();
                c
            });
        }
    }
}

#[test]
fn reductions_do_not_depend_on_threads() {
    let x = single(&random(1, 300 * 1001));
    let reduced = |axes: &[usize], outputs: usize| {
        let mut out = vec![0f32; outputs];
        reduce(Reduction::Sum, &[300, 1001], Strided::new(&x, &[1001, 1]), axes, &mut out).unwrap();
        out
    };
    assert_same("rows", || reduced(&[1], 300));
    assert_same("columns", || reduced(&[0], 1001));
    assert_same("all", || reduced(&[0, 1], 1));
    assert_same("sum of squares", || vec![sum_of_squares(&x) as f32]);
    let (one, two) = (with_threads(1, || sum_of_squares(&x)), with_threads(2, || sum_of_squares(&x)));
    assert_eq!(one.to_bits(), two.to_bits());
}

#[test]
fn elementwise_ops_do_not_depend_on_threads() {
    let n = 50_001;
    let (x, y) = (single(&random(1, n)), single(&random(2, n)));
    fn view(x: &[f32]) -> Strided<'_, f32> {
        Strided::new(x, &[1])
    }
    assert_same("elementwise", || {
        let (mut a, mut b) = (vec![0f32; n], vec![0f32; n]);
        unary(UnaryOp::Silu, &[n], view(&x), &mut a).unwrap();
        binary(BinaryOp::Divide, &[n], view(&a), view(&y), &mut b).unwrap();
        accumulate(&[n], 0.3, view(&a), &mut b, &[1]).unwrap();
        swiglu::cpu::forward(&b, &x, &mut a).unwrap();
        let mut dup = vec![0f32; n];
        swiglu::cpu::backward(&x, &y, &a, Some(&mut b), Some(&mut dup)).unwrap();
        [a, b, dup].concat()
    });
    assert_same("adamw", || {
        let spec = AdamW {
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            step: 3,
            grad_scale: 0.7,
        };
        let (mut p, mut m, mut v) = (x.clone(), y.clone(), y.iter().map(|y| y * y).collect::<Vec<_>>());
        adamw::cpu::step(&spec, &mut p, &y, &mut m, &mut v).unwrap();
        [p, m, v].concat()
    });
}

#[test]
fn norms_do_not_depend_on_threads() {
    let (tokens, heads, head_dim) = (777, 3, 40);
    let (width, n) = (heads * head_dim, tokens * heads * head_dim);
    let (x, weight, dout) = (single(&random(1, n)), single(&random(2, width)), single(&random(3, n)));
    assert_same("rms_norm", || {
        let spec = RmsNormSpec { rows: tokens, width, epsilon: 1e-5 };
        let (mut out, mut rms) = (vec![0f32; n], vec![0f32; tokens]);
        rms_norm::cpu::forward(&spec, &x, &weight, &mut out, &mut rms).unwrap();
        let (mut dx, mut dweight) = (vec![0f32; n], vec![0f32; width]);
        rms_norm::cpu::backward(&spec, &x, &weight, &rms, &dout, Some(&mut dx), Some(&mut dweight)).unwrap();
        [out, rms, dx, dweight].concat()
    });
    assert_same("group_norm", || {
        let spec = GroupNormSpec { tokens, heads, head_dim, epsilon: 1e-5 };
        let (mut out, mut mean, mut std) = (vec![0f32; n], vec![0f32; tokens * heads], vec![0f32; tokens * heads]);
        group_norm::cpu::forward(&spec, &x, &weight, &weight, &mut out, &mut mean, &mut std).unwrap();
        let (mut dx, mut dw, mut db) = (vec![0f32; n], vec![0f32; width], vec![0f32; width]);
        let (want_dx, want_dw, want_db) = (Some(&mut dx[..]), Some(&mut dw[..]), Some(&mut db[..]));
        group_norm::cpu::backward(&spec, &x, &weight, &mean, &std, &dout, want_dx, want_dw, want_db).unwrap();
        [out, mean, std, dx, dw, db].concat()
    });
    assert_same("rope", || {
        let spec = RopeSpec { tokens, heads, head_dim, theta: 1e4 };
        let positions: Vec<u32> = (0..tokens as u32).collect();
        let mut out = vec![0f32; n];
        rope::cpu::rotate(&spec, &positions, false, &x, &mut out).unwrap();
        out
    });
}

#[test]
fn embedding_and_cross_entropy_do_not_depend_on_threads() {
    let (tokens, vocabulary, width) = (700, 300, 64);
    let ids = random_ids(1, tokens, vocabulary as u32);
    let (x, weight) = (single(&random(2, tokens * width)), single(&random(3, vocabulary * width)));
    assert_same("embedding", || {
        let spec = EmbeddingSpec { tokens, vocabulary, width };
        let mut dtable = weight.clone();
        embedding::cpu::backward(&spec, &ids, &x, &mut dtable).unwrap();
        dtable
    });
    let labels: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
    assert_same("cross_entropy", || {
        let spec = LinearCrossEntropySpec { tokens, width, vocabulary, logit_scale: 1.0, chunk: 256 };
        let (mut loss, mut dx, mut dw) = (vec![0f32; tokens], vec![0f32; x.len()], vec![0f32; weight.len()]);
        cross_entropy::cpu::forward(&spec, &x, &weight, &labels, &mut loss, Some(&mut dx), Some(&mut dw)).unwrap();
        [loss, dx, dw].concat()
    });
}
