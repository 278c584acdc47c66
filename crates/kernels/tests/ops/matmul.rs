use proptest::prelude::*;
use stickbreak_kernels::matmul::cpu::matmul;
use stickbreak_kernels::matmul::{MatmulSpec, MatrixStrides};

use crate::support::*;

fn reference(spec: &MatmulSpec, alpha: f64, a: &[f64], b: &[f64], beta: f64, c: &mut [f64]) {
    for_each_index(&[spec.batch, spec.m, spec.n], |index| {
        let [batch, i, j] = *index else { unreachable!() };
        let at = |s: MatrixStrides, row: usize, column: usize| batch * s.batch + row * s.row + column * s.column;
        let product: f64 = (0..spec.k).map(|l| a[at(spec.a, i, l)] * b[at(spec.b, l, j)]).sum();
        let c = &mut c[at(spec.c, i, j)];
        *c = alpha * product + if beta == 0.0 { 0.0 } else { beta * *c };
    });
}

/// Strides of a batch of `[rows, columns]` matrices: 0 row-major, 1 column-major, 2 rows with gaps, 3 batch between rows
/// and columns (the layout of heads).
fn strides(kind: usize, batch: usize, rows: usize, columns: usize) -> MatrixStrides {
    match kind {
        0 => MatrixStrides::row_major(rows, columns),
        1 => MatrixStrides::row_major(columns, rows).transposed(),
        2 => MatrixStrides { row: 2 * columns + 3, column: 2, batch: rows * (2 * columns + 3) },
        _ => MatrixStrides { row: batch * columns, column: 1, batch: columns },
    }
}

fn length(batch: usize, rows: usize, columns: usize, s: MatrixStrides) -> usize {
    reach(&[batch, rows, columns], &[s.batch, s.row, s.column])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn any_strides_match_the_plain_formula(
        batch in 0usize..4, m in 0usize..40, n in 0usize..40, k in 0usize..40,
        a_kind in 0usize..4, b_kind in 0usize..4, c_kind in 0usize..4, share_b: bool,
        alpha in prop::sample::select(vec![1.0, -0.5]), beta in prop::sample::select(vec![0.0, 1.0, 0.25]),
        seed: u64,
    ) {
        let mut spec = MatmulSpec {
            batch, m, n, k,
            a: strides(a_kind, batch, m, k), b: strides(b_kind, batch, k, n), c: strides(c_kind, batch, m, n),
        };
        if share_b {
            spec.b.batch = 0;
        }
        let a = random(seed, length(batch, m, k, spec.a));
        let b = random(seed ^ 1, length(batch, k, n, spec.b));
        let c = random(seed ^ 2, length(batch, m, n, spec.c));
        let mut expected = c.clone();
        reference(&spec, alpha, &a, &b, beta, &mut expected);
        let mut out = c.clone();
        matmul(&spec, alpha, &a, &b, beta, &mut out).unwrap();
        assert_close("f64", &out, &expected, 1e-14);
        let mut out = single(&c);
        matmul(&spec, alpha as f32, &single(&a), &single(&b), beta as f32, &mut out).unwrap();
        assert_close("f32", &double(&out), &expected, 1e-6);
    }
}

#[test]
fn large_products_of_every_transposition_match() {
    for (m, n, k) in [(300, 257, 520), (1, 700, 300), (700, 1, 300), (256, 256, 2), (65, 64, 1100), (16, 16, 3000)] {
        for (a_kind, b_kind, c_kind) in [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (0, 0, 1), (0, 1, 2)] {
            let spec = MatmulSpec {
                batch: 1,
                m,
                n,
                k,
                a: strides(a_kind, 1, m, k),
                b: strides(b_kind, 1, k, n),
                c: strides(c_kind, 1, m, n),
            };
            let a = single(&random(1, length(1, m, k, spec.a)));
            let b = single(&random(2, length(1, k, n, spec.b)));
            let mut out = single(&random(3, length(1, m, n, spec.c)));
            let mut expected = double(&out);
            reference(&spec, 0.5, &double(&a), &double(&b), 1.0, &mut expected);
            matmul(&spec, 0.5, &a, &b, 1.0, &mut out).unwrap();
            assert_close("f32", &double(&out), &expected, 2e-6);
        }
    }
}

#[test]
fn beta_zero_overwrites_nan() {
    for (m, n, k) in [(3, 4, 0), (3, 4, 2), (1, 33, 7), (33, 1, 7), (8, 8, 40), (70, 90, 130)] {
        let row_major = MatrixStrides::row_major;
        let spec = MatmulSpec { batch: 1, m, n, k, a: row_major(m, k), b: row_major(k, n), c: row_major(m, n) };
        let (a, b) = (random(1, m * k), random(2, k * n));
        let mut c = vec![f64::NAN; m * n];
        matmul(&spec, 1.0, &a, &b, 0.0, &mut c).unwrap();
        let mut expected = vec![0.0; m * n];
        reference(&spec, 1.0, &a, &b, 0.0, &mut expected);
        assert_close("product", &c, &expected, 1e-14);
    }
}

#[test]
fn short_operands_and_overlapping_outputs_are_refused() {
    let row_major = MatrixStrides::row_major;
    let (m, n, k) = (3, 4, 5);
    let spec = MatmulSpec { batch: 2, m, n, k, a: row_major(m, k), b: row_major(k, n), c: row_major(m, n) };
    let (a, b, mut c) = ([0f32; 30], [0f32; 40], [0f32; 24]);
    assert_length_error(matmul(&spec, 1.0, &a[1..], &b, 0.0, &mut c), 30, 29);
    assert_length_error(matmul(&spec, 1.0, &a, &b[1..], 0.0, &mut c), 40, 39);
    assert_length_error(matmul(&spec, 1.0, &a, &b, 0.0, &mut c[1..]), 24, 23);
    let overlapping = MatmulSpec { c: MatrixStrides { batch: 0, ..spec.c }, ..spec };
    assert!(matmul(&overlapping, 1.0, &a, &b, 0.0, &mut c).is_err());
    let overlapping = MatmulSpec { c: MatrixStrides { row: 3, ..spec.c }, ..spec };
    assert!(matmul(&overlapping, 1.0, &a, &b, 0.0, &mut c).is_err());
    let endless = MatmulSpec { a: MatrixStrides { row: usize::MAX, ..spec.a }, ..spec };
    assert!(matmul(&endless, 1.0, &a, &b, 0.0, &mut c).is_err());
}
