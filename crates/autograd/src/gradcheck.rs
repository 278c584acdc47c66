//! Analytic gradients against central finite differences, in float64.

use crate::error::{AutogradError, Result};
use crate::tape::Tape;
use crate::var::Var;
use std::fmt;
use stickbreak_tensor::{DType, Tensor};

/// How hard to check.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Step of the central difference, relative to `max(1, |x|)`.
    pub step: f64,
    /// Allowed difference, relative to `max(1, |analytic|, |numeric|)`.
    pub tolerance: f64,
    /// Elements checked per input, spread over all rows and columns; all of them if an input has no more.
    pub elements_per_input: usize,
}

impl Default for Options {
    /// A central difference in float64 errs by about step^2 + 1e-16 / step: 1e-5 balances the two.
    fn default() -> Self {
        Self { step: 1e-5, tolerance: 1e-7, elements_per_input: 64 }
    }
}

/// Where an analytic gradient is wrong.
#[derive(Debug, Clone, PartialEq)]
pub struct Mismatch {
    /// Index of the input.
    pub input: usize,
    /// Row-major index of the element.
    pub element: usize,
    /// What backward gave.
    pub analytic: f64,
    /// What the finite difference gave.
    pub numeric: f64,
    /// The difference, relative as in [`Options::tolerance`].
    pub error: f64,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mismatch { input, element, analytic, numeric, error } = self;
        write!(f, "gradient of input {input} at element {element}: backward gives {analytic:e}, ")?;
        write!(f, "the finite difference {numeric:e} (error {error:.1e})")
    }
}

/// What a passed check saw.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Report {
    /// The largest relative error.
    pub worst_error: f64,
    /// Number of elements compared.
    pub elements: usize,
}

/// Checks the gradients of `function` at `inputs` (float64, any layout). The function's output is reduced to one number
/// by fixed random weights, so every output element matters. An input that the output does not depend on must have a
/// finite difference of 0. A NaN on either side fails.
///
/// # Errors
/// With the first [`Mismatch`], or what the function itself reports ([`AutogradError::Untracked`] if its output depends
/// on no input).
pub fn gradcheck(
    function: impl for<'t> Fn(&'t Tape, &[Var<'t>]) -> Result<Var<'t>>,
    inputs: &[Tensor],
    options: Options,
) -> Result<Report> {
    let evaluate = |inputs: &[Tensor]| -> Result<f64> {
        let tape = Tape::without_gradients();
        let vars: Vec<_> = inputs.iter().map(|t| tape.constant(t.clone())).collect();
        let output = function(&tape, &vars)?;
        Ok(weights_like(output.value())?.mul(output.value())?.sum_all()?.to_scalar()?)
    };

    let tape = Tape::new();
    let vars: Vec<_> = inputs.iter().map(|t| tape.input(t.clone())).collect();
    let output = function(&tape, &vars)?;
    let weights = weights_like(output.value())?;
    let gradients = tape.backward_from(&[(&output, weights)], &mut |_| {})?;

    let mut report = Report { worst_error: 0.0, elements: 0 };
    for (input, tensor) in inputs.iter().enumerate() {
        let analytic = match gradients.get(&vars[input]) {
            Some(gradient) => gradient.to_f64_vec()?,
            None => vec![0.0; tensor.elements()],
        };
        let values = tensor.to_f64_vec()?;
        for element in spread(values.len(), options.elements_per_input) {
            let step = options.step * values[element].abs().max(1.0);
            let shifted = |by: f64| -> Result<f64> {
                let mut changed = values.clone();
                changed[element] += by;
                let mut inputs = inputs.to_vec();
                inputs[input] = with_layout_of(tensor, changed)?;
                evaluate(&inputs)
            };
            let numeric = (shifted(step)? - shifted(-step)?) / (2.0 * step);
            let analytic = analytic[element];
            let error = (analytic - numeric).abs() / analytic.abs().max(numeric.abs()).max(1.0);
            // A NaN compares false with everything: it must fail all the same.
            if error.is_nan() || error > options.tolerance {
                return Err(AutogradError::Gradcheck(Box::new(Mismatch { input, element, analytic, numeric, error })));
            }
            report.worst_error = report.worst_error.max(error);
            report.elements += 1;
        }
    }
    Ok(report)
}

/// Up to `count` different indices below `len`: steps of about the golden section, without a common divisor with `len`, so
/// that they do not all fall into one column.
fn spread(len: usize, count: usize) -> impl Iterator<Item = usize> {
    let coprime = |step: &usize| {
        let (mut a, mut b) = (len, *step);
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a == 1
    };
    let golden = if len <= count { 1 } else { (len as f64 * 0.618) as usize };
    let step = (golden.max(1)..=len).find(coprime).unwrap_or(1);
    (0..len.min(count)).map(move |i| i * step % len)
}

/// Fixed pseudo-random weights in [-1, 1], far from symmetric, of an output's shape.
fn weights_like(output: &Tensor) -> Result<Tensor> {
    let weights = (0..output.elements()).map(|i| (1.0 + 1.7 * i as f64 + 0.3 * (i * i) as f64).sin()).collect();
    Ok(Tensor::from_vec::<f64>(weights, output.shape())?)
}

/// A tensor with new values, transposed in memory where the original is, so that strided inputs stay strided.
fn with_layout_of(original: &Tensor, values: Vec<f64>) -> Result<Tensor> {
    let tensor = Tensor::from_vec(values, original.shape())?;
    if original.is_contiguous() || original.rank() < 2 {
        return Ok(tensor);
    }
    let last = original.rank() - 1;
    Ok(tensor.transpose(last - 1, last)?.copy()?.transpose(last - 1, last)?)
}

type Function = Box<dyn for<'t> Fn(&'t Tape, &[Var<'t>]) -> Result<Var<'t>>>;

/// One input setting at which an op's gradients are checked; an op's file lists its own.
pub struct Case {
    /// What is special about it.
    pub name: String,
    /// Float64 inputs.
    pub inputs: Vec<Tensor>,
    function: Function,
}

impl Case {
    /// A case with normal inputs of the given shapes, each a transposed view in memory when `seed` is odd.
    pub fn new(
        name: impl Into<String>,
        seed: u64,
        shapes: &[&[usize]],
        function: impl for<'t> Fn(&'t Tape, &[Var<'t>]) -> Result<Var<'t>> + 'static,
    ) -> Self {
        let inputs = shapes.iter().enumerate().map(|(i, shape)| {
            let normal = Tensor::randn(0.0, 1.0, *shape, DType::F64, seed * 101 + i as u64).expect("a float dtype");
            let rank = shape.len();
            if seed.is_multiple_of(2) || rank < 2 {
                return normal;
            }
            let swapped = |t: &Tensor| t.transpose(rank - 2, rank - 1).expect("two dimensions");
            swapped(&swapped(&normal).copy().expect("memory of the host is not refused"))
        });
        Self { name: name.into(), inputs: inputs.collect(), function: Box::new(function) }
    }

    /// The same case with inputs mapped to where the function is smooth (a logarithm needs positive ones).
    pub fn map_inputs(mut self, map: impl Fn(f64) -> f64) -> Self {
        for input in &mut self.inputs {
            let values = input.to_f64_vec().expect("memory of the host").into_iter().map(&map).collect();
            *input = with_layout_of(input, values).expect("the same number of values");
        }
        self
    }

    /// The function under test.
    pub fn run<'t>(&self, tape: &'t Tape, inputs: &[Var<'t>]) -> Result<Var<'t>> {
        (self.function)(tape, inputs)
    }

    /// Checks the case.
    ///
    /// # Errors
    /// As [`gradcheck`].
    pub fn check(&self, options: Options) -> Result<Report> {
        gradcheck(|tape, inputs| (self.function)(tape, inputs), &self.inputs, options)
    }
}
