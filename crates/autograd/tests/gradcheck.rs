//! The checker itself: it must fail whatever is wrong.

use stickbreak_autograd::gradcheck::{Mismatch, Options, gradcheck};
use stickbreak_autograd::{AutogradError, Op, OutputGradients, Result, Sink, Var};
use stickbreak_tensor::ops::UnaryOp;
use stickbreak_tensor::{DType, Shape, Tensor};

/// `y = x^2 + 0 b` with a backward pass that a test can spoil: `dx = spoil(2 x dy)`.
struct Square {
    x: Tensor,
    spoil: fn(Vec<f64>) -> Option<Vec<f64>>,
}

impl Op for Square {
    fn name(&self) -> &'static str {
        "square"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        let dx = outputs.single().mul(&self.x)?.affine(2.0, 0.0)?;
        match (self.spoil)(dx.to_f64_vec().unwrap()) {
            Some(values) => sink.add(0, Tensor::from_vec(values, self.x.shape())?),
            None => Ok(()),
        }
    }
}

fn square<'t>(x: &Var<'t>, spoil: fn(Vec<f64>) -> Option<Vec<f64>>) -> Result<Var<'t>> {
    let value = x.value().unary(UnaryOp::Square)?;
    let [y] = x.tape().record(Square { x: x.value().contiguous().unwrap(), spoil }, &[x], [value]);
    Ok(y)
}

fn normal(seed: u64, shape: impl Into<Shape>) -> Tensor {
    Tensor::randn(0.0, 1.0, shape, DType::F64, seed).unwrap()
}

/// The mismatch that the check of a spoilt square reports.
fn mismatch(shape: impl Into<Shape>, spoil: fn(Vec<f64>) -> Option<Vec<f64>>) -> Mismatch {
    let inputs = [normal(1, [2]), normal(2, shape)];
    let options = Options::default();
    let report = gradcheck(|_, v| square(&v[1], spoil)?.add(&v[0].sum_all()?), &inputs, options);
    match report.expect_err("a wrong gradient passed") {
        AutogradError::Gradcheck(mismatch) => *mismatch,
        other => panic!("{other}"),
    }
}

#[test]
fn a_right_backward_passes() {
    for input in [normal(1, [3, 4]), normal(2, [3, 4]).transpose(0, 1).unwrap(), normal(3, []), normal(4, [0, 3])] {
        let report = gradcheck(|_, v| square(&v[0], Some), std::slice::from_ref(&input), Options::default()).unwrap();
        assert_eq!(report.elements, input.elements());
        assert!(report.worst_error < 1e-8, "{report:?}");
    }
}

#[test]
fn a_small_factor_is_noticed() {
    let wrong = mismatch([3, 4], |dx| Some(dx.iter().map(|g| g * 1.0001).collect()));
    assert_eq!(wrong.input, 1);
    let message = AutogradError::Gradcheck(Box::new(wrong)).to_string();
    assert!(message.contains("gradient of input 1 at element") && message.contains("finite difference"), "{message}");
}

#[test]
fn a_forgotten_gradient_is_noticed() {
    assert_eq!(mismatch([3, 4], |_| None).analytic, 0.0);
}

#[test]
fn one_wrong_element_is_noticed() {
    let wrong = mismatch([5, 5], |mut dx| {
        dx[17] = -dx[17];
        Some(dx)
    });
    assert_eq!(wrong.element, 17);
}

#[test]
fn one_wrong_column_of_a_large_input_is_noticed() {
    // More elements than are checked, and a width that divides an even step: all columns must be looked at.
    let wrong = mismatch([64, 8], |mut dx| {
        dx.iter_mut().skip(3).step_by(8).for_each(|g| *g += 1.0);
        Some(dx)
    });
    assert_eq!(wrong.element % 8, 3);
}

#[test]
fn nan_and_infinity_fail_on_either_side() {
    assert!(mismatch([3], |_| Some(vec![f64::NAN; 3])).error.is_nan());
    assert!(mismatch([3], |_| Some(vec![f64::INFINITY; 3])).analytic.is_infinite());
    // ln of a negative number: NaN forward, a finite gradient backward.
    let checked = gradcheck(|_, v| v[0].log(), &[Tensor::full(-1.0, [2], DType::F64)], Options::default());
    assert!(matches!(checked, Err(AutogradError::Gradcheck(wrong)) if wrong.numeric.is_nan()));
}

#[test]
fn a_function_that_cuts_the_graph_is_noticed() {
    let one = [normal(1, [3])];
    let cut = gradcheck(|_, v| Ok(v[0].tanh()?.detach()), &one, Options::default());
    assert!(matches!(cut, Err(AutogradError::Untracked)));
    let partly = gradcheck(|_, v| v[0].tanh()?.detach().mul(&v[0]), &one, Options::default());
    assert!(matches!(partly, Err(AutogradError::Gradcheck(_))));
}

#[test]
fn an_input_that_does_not_matter_passes() {
    let inputs = [normal(1, [3]), normal(2, [2])];
    let report = gradcheck(|_, v| v[0].tanh(), &inputs, Options::default()).unwrap();
    assert_eq!(report.elements, 5);
}
