use proptest::prelude::*;
use stickbreak_kernels::elementwise::cpu::{accumulate, binary, copy, scale_in_place, unary};
use stickbreak_kernels::elementwise::{BinaryOp, Strided, UnaryOp};
use stickbreak_kernels::swiglu;

use crate::support::*;

/// A shape with two views of it: any order of the dimensions in memory, gaps, and broadcast dimensions.
fn views() -> impl Strategy<Value = (Vec<usize>, Vec<usize>, Vec<usize>)> {
    prop::collection::vec(0usize..6, 0..5).prop_flat_map(|mut shape| {
        if let Some(last) = shape.last_mut() {
            // Long enough to fill vectors, and tasks together with the other dimensions.
            *last *= 13;
        }
        let (a, b) = (strides(shape.clone(), true), strides(shape.clone(), true));
        (Just(shape), a, b)
    })
}

fn strides(shape: Vec<usize>, broadcast: bool) -> impl Strategy<Value = Vec<usize>> {
    let dims = shape.len();
    let order = Just((0..dims).collect::<Vec<_>>()).prop_shuffle();
    let order = prop_oneof![Just((0..dims).collect::<Vec<_>>()), order];
    let gaps = prop_oneof![Just(vec![0; dims]), prop::collection::vec(0usize..3, dims)];
    let repeated = prop::collection::vec(prop::bool::weighted(if broadcast { 0.25 } else { 0.0 }), dims);
    (order, gaps, repeated).prop_map(move |(order, gaps, repeated)| {
        let mut strides = vec![0; dims];
        let mut extent = 1;
        for &d in order.iter().rev() {
            if !repeated[d] {
                strides[d] = extent + gaps[d];
                extent = strides[d] * shape[d].max(1);
            }
        }
        strides
    })
}

fn gather(shape: &[usize], x: &[f64], strides: &[usize]) -> Vec<f64> {
    let mut values = Vec::new();
    for_each_index(shape, |index| values.push(x[offset(index, strides)]));
    values
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn any_view_matches_the_plain_formula((shape, a_strides, b_strides) in views(), seed: u64) {
        let a = random(seed, reach(&shape, &a_strides));
        let b = random(!seed, reach(&shape, &b_strides));
        let (a_values, b_values) = (gather(&shape, &a, &a_strides), gather(&shape, &b, &b_strides));
        let (a, b) = (Strided::new(&a, &a_strides), Strided::new(&b, &b_strides));
        let mut out = vec![f64::NAN; a_values.len()];

        copy(&shape, a, &mut out).unwrap();
        prop_assert_eq!(&out, &a_values);
        unary(UnaryOp::Square, &shape, a, &mut out).unwrap();
        prop_assert_eq!(&out, &a_values.iter().map(|a| a * a).collect::<Vec<_>>());
        for (op, f) in [
            (BinaryOp::Add, (|a, b| a + b) as fn(f64, f64) -> f64),
            (BinaryOp::Subtract, |a, b| a - b),
            (BinaryOp::Multiply, |a, b| a * b),
            (BinaryOp::Divide, |a, b| a / b),
        ] {
            binary(op, &shape, a, b, &mut out).unwrap();
            let expected: Vec<f64> = a_values.iter().zip(&b_values).map(|(&a, &b)| f(a, b)).collect();
            prop_assert_eq!(&out, &expected);
        }
    }

    #[test]
    fn accumulate_adds_into_any_view(
        (shape, x_strides, out_strides) in views().prop_flat_map(|(shape, x, _)| {
            let out = strides(shape.clone(), false);
            (Just(shape), Just(x), out)
        }),
        seed: u64,
    ) {
        let x = random(seed, reach(&shape, &x_strides));
        let out = random(!seed, reach(&shape, &out_strides) + 2);
        let mut expected = out.clone();
        for_each_index(&shape, |index| {
            let out = &mut expected[offset(index, &out_strides)];
            *out = (-0.5f64).mul_add(x[offset(index, &x_strides)], *out);
        });
        let mut result = out.clone();
        accumulate(&shape, -0.5, Strided::new(&x, &x_strides), &mut result, &out_strides).unwrap();
        prop_assert_eq!(result, expected);
    }
}

#[test]
fn functions_match_the_standard_library() {
    let x: Vec<f64> = random(5, 20_000).iter().map(|x| 10.0 * x).collect();
    let positive: Vec<f64> = x.iter().map(|x| x.abs() + 1e-3).collect();
    let affine = UnaryOp::Affine { scale: 1.5, shift: -0.25 };
    type Case<'a> = (UnaryOp, &'a [f64], fn(f64) -> f64);
    let cases: [Case; 10] = [
        (UnaryOp::Negate, &x, |x| -x),
        (UnaryOp::Exp, &x, f64::exp),
        (UnaryOp::Log, &positive, f64::ln),
        (UnaryOp::Sqrt, &positive, f64::sqrt),
        (UnaryOp::Reciprocal, &positive, f64::recip),
        (UnaryOp::Square, &x, |x| x * x),
        (UnaryOp::Sigmoid, &x, |x| 1.0 / (1.0 + (-x).exp())),
        (UnaryOp::Tanh, &x, f64::tanh),
        (UnaryOp::Silu, &x, |x| x / (1.0 + (-x).exp())),
        (affine, &x, |x| 1.5 * x - 0.25),
    ];
    for (op, x, f) in cases {
        let x = single(x);
        let expected: Vec<f64> = x.iter().map(|&x| f(f64::from(x))).collect();
        let mut out = vec![0f32; x.len()];
        unary(op, &[x.len()], Strided::new(&x, &[1]), &mut out).unwrap();
        for (i, (&out, &expected)) in out.iter().zip(&expected).enumerate() {
            let error = (f64::from(out) - expected).abs();
            assert!(error <= 1e-6 * expected.abs().max(1e-3), "{op:?}({}) = {out}, not {expected}", x[i]);
        }
        let mut out = vec![0f64; x.len()];
        unary(op, &[x.len()], Strided::new(&double(&x), &[1]), &mut out).unwrap();
        assert_close("f64", &out, &expected, 1e-15);
    }
    let mut scaled = x.clone();
    scale_in_place(-2.0, &mut scaled);
    assert_eq!(scaled, x.iter().map(|x| -2.0 * x).collect::<Vec<_>>());
}

#[test]
fn nan_and_saturated_inputs_keep_their_meaning() {
    let x = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1e30, 1e30];
    let mut out = [0f32; 5];
    unary(UnaryOp::Sigmoid, &[5], Strided::new(&x, &[1]), &mut out).unwrap();
    assert!(out[0].is_nan());
    assert_eq!(out[1..], [1.0, 0.0, 0.0, 1.0]);
    unary(UnaryOp::Silu, &[5], Strided::new(&x, &[1]), &mut out).unwrap();
    assert!(out[0].is_nan());
    assert_eq!((out[3], out[4]), (0.0, 1e30));
}

#[test]
fn wrong_lengths_are_refused() {
    let (x, mut out) = ([0f32; 6], [0f32; 6]);
    let contiguous = Strided::new(&x, &[3, 1]);
    assert_length_error(copy(&[2, 3], contiguous, &mut out[1..]), 6, 5);
    assert_length_error(copy(&[2, 3], Strided::new(&x[1..], &[3, 1]), &mut out), 6, 5);
    assert_length_error(unary(UnaryOp::Exp, &[2, 3], contiguous, &mut out[1..]), 6, 5);
    assert_length_error(binary(BinaryOp::Add, &[2, 3], contiguous, contiguous, &mut out[1..]), 6, 5);
    let short = Strided::new(&x[2..], &[3, 1]);
    assert_length_error(binary(BinaryOp::Add, &[2, 3], contiguous, short, &mut out), 6, 4);
    assert_length_error(accumulate(&[2, 3], 1.0, contiguous, &mut out[1..], &[3, 1]), 6, 5);
    assert!(accumulate(&[2, 3], 1.0, contiguous, &mut out, &[0, 1]).is_err());
    assert!(unary(UnaryOp::Exp, &[2, 3], Strided::new(&x, &[1]), &mut out).is_err());
}

#[test]
fn swiglu_matches_the_formula_and_its_derivative() {
    let n = 1000;
    let gate: Vec<f64> = random(1, n).iter().map(|x| 4.0 * x).collect();
    let (up, dout) = (random(2, n), random(3, n));
    let formula = |gate: &[f64], up: &[f64]| -> Vec<f64> {
        gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect()
    };
    let expected = formula(&gate, &up);
    let mut out = vec![f64::NAN; n];
    swiglu::cpu::forward(&gate, &up, &mut out).unwrap();
    assert_close("f64", &out, &expected, 1e-15);
    let mut out = vec![f32::NAN; n];
    swiglu::cpu::forward(&single(&gate), &single(&up), &mut out).unwrap();
    assert_close("f32", &double(&out), &expected, 3e-7);

    let (mut dgate, mut dup) = (vec![f64::NAN; n], vec![f64::NAN; n]);
    swiglu::cpu::backward(&gate, &up, &dout, Some(&mut dgate), Some(&mut dup)).unwrap();
    assert_gradient("dgate", &gate, &dgate, |gate| dot(&formula(gate, &up), &dout));
    assert_gradient("dup", &up, &dup, |up| dot(&formula(&gate, up), &dout));
    let (mut dgate_alone, mut dup_alone) = (vec![f64::NAN; n], vec![f64::NAN; n]);
    swiglu::cpu::backward(&gate, &up, &dout, Some(&mut dgate_alone), None).unwrap();
    swiglu::cpu::backward(&gate, &up, &dout, None, Some(&mut dup_alone)).unwrap();
    assert_eq!((dgate_alone, dup_alone), (dgate, dup));
    assert_length_error(swiglu::cpu::forward(&gate, &up[1..], &mut vec![0.0; n]), n, n - 1);
    assert_length_error(swiglu::cpu::backward(&gate, &up, &dout[1..], None, None), n, n - 1);
}
