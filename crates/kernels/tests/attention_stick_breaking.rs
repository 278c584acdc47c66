//! Tiled stick-breaking attention against the dense reference, and the properties that make it what it is.

mod attention_support;

use attention_support::{Problem, assert_close, errors, to_f64};
use proptest::prelude::*;
use stickbreak_kernels::Float;
use stickbreak_kernels::attention::stick_breaking::{
    StickBreakingOutputs, StickBreakingSaved, StickBreakingSpec, cpu, reference,
};
use stickbreak_kernels::attention::{AttentionGradients, AttentionLayout};

struct Run<T> {
    o: Vec<T>,
    rem: Vec<T>,
    log2_rem: Vec<T>,
    dq: Vec<T>,
    dk: Vec<T>,
    dv: Vec<T>,
    saved: StickBreakingSaved,
}

/// Outputs start as NaN: whatever is not written shows.
fn run<T: Float>(spec: &StickBreakingSpec, problem: &Problem<T>) -> Run<T> {
    let layout = &spec.layout;
    let nan = T::from_f64(f64::NAN);
    let rows = layout.tokens * layout.query_heads;
    let kv = layout.tokens * layout.kv_heads * layout.head_dim;
    let (mut o, mut rem, mut log2_rem) =
        (vec![nan; layout.tokens * layout.output_stride], vec![nan; rows], vec![nan; rows]);
    let (mut dq, mut dk, mut dv) = (vec![nan; rows * layout.head_dim], vec![nan; kv], vec![nan; kv]);
    let inputs = problem.inputs();
    let outputs = StickBreakingOutputs { o: &mut o, rem: Some(&mut rem), log2_rem: Some(&mut log2_rem) };
    let saved = cpu::forward(spec, &inputs, outputs).unwrap();
    let gradients = AttentionGradients { dq: &mut dq, dk: &mut dk, dv: &mut dv };
    cpu::backward(spec, &inputs, &problem.d_o, Some(&problem.d_rem), &saved, gradients).unwrap();
    Run { o, rem, log2_rem, dq, dk, dv, saved }
}

fn compare<T: Float>(spec: &StickBreakingSpec, problem: &Problem<T>, tensor: f64, row: f64) {
    let exact = problem.to_f64();
    let found = run(spec, problem);
    let out = reference::forward(spec, &exact.inputs()).unwrap();
    let gradients = reference::backward(spec, &exact.inputs(), &exact.d_o, Some(&exact.d_rem)).unwrap();
    let width = spec.layout.head_dim;
    assert_close("o", &found.o, &out.o, width, tensor, row);
    assert_close("rem", &found.rem, &out.rem, 1, tensor, row);
    assert_close("log2_rem", &found.log2_rem, &out.log2_rem, 1, tensor, row);
    assert_close("dq", &found.dq, &gradients.dq, width, tensor, row);
    assert_close("dk", &found.dk, &gradients.dk, width, tensor, row);
    assert_close("dv", &found.dv, &gradients.dv, width, tensor, row);
}

/// Both masks, both number types.
fn check_with(spec: StickBreakingSpec, problem: &Problem<f32>) {
    for attend_current in [false, true] {
        let spec = StickBreakingSpec { attend_current, ..spec };
        compare(&spec, &problem.to_f64(), 1e-12, 1e-11);
        compare(&spec, problem, 5e-6, 2e-5);
    }
}

fn check(lengths: &[usize], query_heads: usize, kv_heads: usize, head_dim: usize, spread: f64) {
    let problem = Problem::<f32>::random(lengths, query_heads, kv_heads, head_dim, spread);
    check_with(StickBreakingSpec::new(problem.layout), &problem);
}

#[test]
fn single_documents_around_panel_and_tile_edges() {
    for tokens in [1, 2, 15, 16, 17, 95, 96, 97, 98, 192, 193, 300] {
        check(&[tokens], 2, 2, 16, 1.0);
    }
}

#[test]
fn every_head_dim() {
    for head_dim in [1, 5, 8, 16, 20, 64, 80, 128] {
        check(&[130], 1, 1, head_dim, 1.0);
    }
}

#[test]
fn packed_documents_some_empty() {
    check(&[1, 5, 64, 63, 65, 1, 77], 2, 2, 32, 1.0);
    check(&[0, 3, 0, 0, 120, 0], 2, 1, 8, 1.0);
    check(&[], 2, 1, 8, 1.0);
    check(&[0, 0], 2, 1, 8, 1.0);
}

#[test]
fn grouped_and_multi_query_heads() {
    check(&[150], 8, 2, 16, 1.0);
    check(&[40, 101], 4, 1, 32, 1.0);
}

#[test]
fn spread_logits() {
    check(&[250], 1, 1, 32, 6.0);
}

/// Logits that are +-`size` by key parity, or `offset` + noise: q = e_0 scale, k_0 = the logit.
fn with_logits(tokens: usize, logit: impl Fn(usize) -> f64) -> (StickBreakingSpec, Problem<f32>) {
    let mut problem = Problem::<f32>::random(&[tokens], 1, 1, 16, 0.02);
    for token in 0..tokens {
        problem.q[token * 16] = 1.0;
        problem.k[token * 16] = logit(token) as f32;
    }
    let spec = StickBreakingSpec { scale: 1.0, ..StickBreakingSpec::new(problem.layout) };
    (spec, problem)
}

#[test]
fn saturated_logits() {
    for logit in [
        (|_| 30.0) as fn(usize) -> f64,
        |_| -30.0,
        |key| if key % 2 == 0 { 16.0 } else { -16.0 },
        |key| -6.0 + (key % 5) as f64,
        |key| 15.0 + (key % 16) as f64,
        |key| -15.0 - (key % 16) as f64,
    ] {
        let (spec, problem) = with_logits(200, logit);
        check_with(spec, &problem);
    }
}

#[test]
fn logits_beyond_the_range_of_exp_stay_finite() {
    let (spec, problem) = with_logits(120, |key| if key % 3 == 0 { 300.0 } else { -300.0 });
    let found = run(&spec, &problem);
    for values in [&found.o, &found.rem, &found.log2_rem, &found.dq, &found.dk, &found.dv] {
        assert!(values.iter().all(|x| x.is_finite()));
    }
    assert!(found.log2_rem[100] < -10_000.0);
}

#[test]
fn zero_gradients_and_no_remainder_gradient() {
    let mut problem = Problem::<f32>::random(&[100], 2, 2, 16, 1.0);
    problem.d_rem.fill(0.0);
    let spec = StickBreakingSpec::new(problem.layout);
    compare(&spec, &problem, 5e-6, 2e-5);
    let with_zeros = run(&spec, &problem);
    let (mut dq, mut dk, mut dv) = (with_zeros.dq.clone(), with_zeros.dk.clone(), with_zeros.dv.clone());
    let gradients = AttentionGradients { dq: &mut dq, dk: &mut dk, dv: &mut dv };
    cpu::backward(&spec, &problem.inputs(), &problem.d_o, None, &with_zeros.saved, gradients).unwrap();
    assert_eq!((dq, dk, dv), (with_zeros.dq, with_zeros.dk, with_zeros.dv));

    let mut problem = Problem::<f32>::random(&[100], 2, 2, 16, 1.0);
    problem.d_o.fill(0.0);
    compare(&spec, &problem, 5e-6, 2e-5);
}

#[test]
fn strides_of_a_packed_projection() {
    let (tokens, query_heads, kv_heads, width) = (110, 4, 2, 20);
    let plain = Problem::<f32>::random(&[50, 60], query_heads, kv_heads, width, 1.0);
    let row = (query_heads + 2 * kv_heads) * width;
    let mut packed = vec![0.0f32; tokens * row];
    for token in 0..tokens {
        let (q, kv) = (query_heads * width, kv_heads * width);
        packed[token * row..][..q].copy_from_slice(&plain.q[token * q..][..q]);
        packed[token * row + q..][..kv].copy_from_slice(&plain.k[token * kv..][..kv]);
        packed[token * row + q + kv..][..kv].copy_from_slice(&plain.v[token * kv..][..kv]);
    }
    let output_stride = query_heads * width + 3;
    let layout =
        AttentionLayout { query_stride: row, key_stride: row, value_stride: row, output_stride, ..plain.layout };
    let mut strided = plain.clone();
    strided.layout = layout;
    strided.q = packed.clone();
    strided.k = packed[query_heads * width..].to_vec();
    strided.v = packed[(query_heads + kv_heads) * width..].to_vec();
    strided.d_o = plain.d_o.chunks(query_heads * width).flat_map(|row| [row, &[7.0; 3]].concat()).collect();
    let expected = run(&StickBreakingSpec::new(plain.layout), &plain);
    let found = run(&StickBreakingSpec::new(layout), &strided);
    for (token, row) in found.o.chunks(output_stride).enumerate() {
        let (heads, beyond) = row.split_at(query_heads * width);
        assert_eq!(heads, &expected.o[token * query_heads * width..][..query_heads * width]);
        assert!(beyond.iter().all(|x| x.is_nan()), "what lies between the rows is not ours");
    }
    assert_eq!((found.dq, found.dk, found.dv), (expected.dq, expected.dk, expected.dv));
}

#[test]
fn weights_and_remainder_sum_to_one() {
    let problem = Problem::<f64>::random(&[3, 40], 2, 1, 8, 3.0);
    let spec = StickBreakingSpec::new(problem.layout);
    let out = reference::forward(&spec, &problem.inputs()).unwrap();
    for head in 0..2 {
        let weights = reference::attention_weights(&spec, &problem.inputs(), 1, head).unwrap();
        for (row, line) in weights.chunks(40).enumerate() {
            let total: f64 = line.iter().sum::<f64>() + out.rem[(3 + row) * 2 + head];
            assert!((total - 1.0).abs() < 1e-13, "row {row}: {total}");
            assert!(line[row..].iter().all(|&weight| weight == 0.0));
        }
    }
    assert!(reference::attention_weights(&spec, &problem.inputs(), 2, 0).is_err());
    assert!(reference::attention_weights(&spec, &problem.inputs(), 0, 2).is_err());
}

#[test]
fn dense_gradients_are_finite_differences() {
    for attend_current in [false, true] {
        let problem = Problem::<f64>::random(&[4, 5], 2, 1, 3, 1.5);
        let spec = StickBreakingSpec { attend_current, ..StickBreakingSpec::new(problem.layout) };
        let loss = |problem: &Problem<f64>| {
            let out = reference::forward(&spec, &problem.inputs()).unwrap();
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            dot(&out.o, &problem.d_o) + dot(&out.rem, &problem.d_rem)
        };
        let gradients = reference::backward(&spec, &problem.inputs(), &problem.d_o, Some(&problem.d_rem)).unwrap();
        let step = 1e-5;
        for (name, gradient) in [("q", &gradients.dq), ("k", &gradients.dk), ("v", &gradients.dv)] {
            for (index, &analytic) in gradient.iter().enumerate() {
                let at = |offset: f64| {
                    let mut moved = problem.clone();
                    let target = match name {
                        "q" => &mut moved.q,
                        "k" => &mut moved.k,
                        _ => &mut moved.v,
                    };
                    target[index] += offset;
                    loss(&moved)
                };
                let numeric = (at(step) - at(-step)) / (2.0 * step);
                assert!((numeric - analytic).abs() < 1e-8, "d{name}[{index}]: {analytic} against {numeric}");
            }
        }
    }
}

#[test]
fn early_exit_stays_within_its_bound_and_visits_less() {
    let problem = Problem::<f32>::random(&[700, 90], 2, 1, 16, 2.0);
    let full = StickBreakingSpec::new(problem.layout);
    let exact = run(&full, &problem);
    assert!(exact.saved.visited_tiles().iter().all(|&visited| visited == exact.saved.causal_tiles()));
    // 8 * 9 / 2 tiles of 96 x 96 in the long document, one in the short one.
    assert_eq!(exact.saved.causal_tiles(), 37);
    let heads = problem.layout.query_heads;
    let norm = |row: &[f32]| row.iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt();
    let largest = |values: &[f32]| values.chunks(16).map(norm).fold(0.0, f64::max);
    let (max_v, max_do) = (largest(&problem.v), largest(&problem.d_o));
    let max_drem = f64::from(problem.d_rem.iter().fold(0.0f32, |worst, x| worst.max(x.abs())));
    for bits in [4, 10, 20] {
        let spec = StickBreakingSpec { early_exit_bits: bits, ..full };
        let found = run(&spec, &problem);
        let bound = (-f64::from(bits)).exp2();
        let skipped: u64 = found.saved.visited_tiles().iter().map(|visited| 37 - visited).sum();
        assert!(skipped > 10, "only {skipped} tiles skipped at {bits} bits");
        for (row, (found, exact)) in found.o.chunks(16).zip(exact.o.chunks(16)).enumerate() {
            let error: Vec<f32> = found.iter().zip(exact).map(|(x, y)| x - y).collect();
            assert!(norm(&error) <= bound * max_v + 1e-5, "o of row {row} at {bits} bits: {}", norm(&error));
        }
        for (found, exact) in found.rem.iter().zip(&exact.rem) {
            assert!(f64::from((found - exact).abs()) <= bound);
        }
        // A skipped weight is at most 2^-k in total per row; a skipped dz at most 2^-k (max|g| + |drem|), and what the
        // others miss of the older keys' sum is as small. A row of dq, dk, dv sums at most `tokens` of them.
        let max_dz = 2.0 * bound * (max_v * max_do + max_drem) * spec.scale;
        let slack = 1e-4;
        for (what, found, exact, limit) in [
            ("dq", &found.dq, &exact.dq, max_dz * 700.0 * largest(&problem.k)),
            ("dk", &found.dk, &exact.dk, max_dz * 700.0 * heads as f64 * largest(&problem.q)),
            ("dv", &found.dv, &exact.dv, bound * 700.0 * heads as f64 * max_do),
        ] {
            let worst = found.iter().zip(exact).map(|(x, y)| f64::from((x - y).abs())).fold(0.0, f64::max);
            assert!(worst <= limit + slack, "{what} at {bits} bits: {worst} above {limit}");
            if bits == 20 {
                let close = errors(found, &to_f64(exact), 16);
                assert!(close.tensor < 1e-5, "{what} at 20 bits: {close:?}");
            }
        }
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let problem = Problem::<f32>::random(&[230, 1, 97], 4, 2, 24, 1.0);
    let spec = StickBreakingSpec { early_exit_bits: 12, ..StickBreakingSpec::new(problem.layout) };
    let with = |threads: usize| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| run(&spec, &problem))
    };
    let one = with(1);
    for threads in [2, 3, 5] {
        let many = with(threads);
        assert_eq!(one.saved, many.saved);
        for (a, b) in [
            (&one.o, &many.o),
            (&one.rem, &many.rem),
            (&one.log2_rem, &many.log2_rem),
            (&one.dq, &many.dq),
            (&one.dk, &many.dk),
            (&one.dv, &many.dv),
        ] {
            assert!(a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits()), "{threads} threads");
        }
    }
}

#[test]
fn documents_do_not_see_each_other() {
    let problem = Problem::<f32>::random(&[101, 130], 2, 2, 16, 1.0);
    let spec = StickBreakingSpec::new(problem.layout);
    let mut other = problem.clone();
    for values in [&mut other.q, &mut other.k, &mut other.v, &mut other.d_o] {
        values[..101 * 32].iter_mut().for_each(|x| *x = *x * 3.0 + 1.0);
    }
    other.k[100 * 32] = f32::NAN;
    let (a, b) = (run(&spec, &problem), run(&spec, &other));
    for (a, b) in [(&a.o, &b.o), (&a.dq, &b.dq), (&a.dk, &b.dk), (&a.dv, &b.dv)] {
        assert!(a[101 * 32..].iter().zip(&b[101 * 32..]).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
    assert_eq!(a.rem[202..], b.rem[202..]);
}

#[test]
fn wrong_calls_are_refused_before_anything_is_written() {
    let problem = Problem::<f32>::random(&[10], 2, 1, 4, 1.0);
    let spec = StickBreakingSpec::new(problem.layout);
    let mut o = vec![f32::NAN; problem.q.len()];
    let mut call = |spec: &StickBreakingSpec, q: &[f32], rem: usize, cu_seqlens: &[i32]| {
        let mut inputs = problem.inputs();
        (inputs.q, inputs.cu_seqlens) = (q, cu_seqlens);
        let mut rem = vec![f32::NAN; rem];
        let outputs = StickBreakingOutputs { o: &mut o, rem: Some(&mut rem), log2_rem: None };
        let message = cpu::forward(spec, &inputs, outputs).unwrap_err().to_string();
        assert!(o.iter().chain(&rem).all(|x| x.is_nan()));
        message
    };
    assert_eq!(
        call(&spec, &problem.q[1..], 20, &[0, 10]),
        "stick-breaking attention: q has 79 elements, but the spec needs 80"
    );
    assert!(call(&spec, &problem.q, 19, &[0, 10]).contains("rem has 19 elements"));
    assert!(call(&spec, &problem.q, 20, &[0, 11]).contains("cu_seqlens[1] = 11"));
    assert!(call(&StickBreakingSpec { scale: f64::NAN, ..spec }, &problem.q, 20, &[0, 10]).contains("scale"));

    let found = run(&spec, &problem);
    let early = StickBreakingSpec { early_exit_bits: 5, ..spec };
    let (mut dq, mut dk, mut dv) = (found.dq, found.dk, found.dv);
    let gradients = AttentionGradients { dq: &mut dq, dk: &mut dk, dv: &mut dv };
    let error = cpu::backward(&early, &problem.inputs(), &problem.d_o, None, &found.saved, gradients).unwrap_err();
    assert!(error.to_string().contains("saved first key tiles has 0 elements"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_shape_matches_the_dense_reference(
        lengths in prop::collection::vec(0usize..130, 1..4),
        kv_heads in 1usize..3,
        group in 1usize..3,
        head_dim in 1usize..40,
        spread in 0.1f64..4.0,
    ) {
        check(&lengths, kv_heads * group, kv_heads, head_dim, spread);
    }
}
