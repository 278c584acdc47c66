//! Recompute gives the same gradients to the last bit: for random programs, nested, and whatever else uses their inputs.

use proptest::prelude::*;
use stickbreak_autograd::gradcheck::{Options, gradcheck};
use stickbreak_autograd::ops::linear;
use stickbreak_autograd::{ArenaBuilder, Parameter, Result, Tape, Var, checkpoint};
use stickbreak_tensor::{DType, Tensor};

/// One line of a random program over values of shape [4, 4]; operands count back from the newest value.
#[derive(Debug, Clone)]
enum Line {
    Add(usize, usize),
    Mul(usize, usize),
    Tanh(usize),
    Transpose(usize),
    /// A projection by the parameter.
    Project(usize),
    /// The first two rows above the last two, scaled: views and overlapping gradients.
    Slide(usize),
    /// A part that is recomputed if recompute is on, with two operands as its inputs.
    Segment(usize, usize, Vec<Line>),
}

fn line(depth: u32) -> BoxedStrategy<Line> {
    let at = 0..4usize;
    let simple = prop_oneof![
        (at.clone(), at.clone()).prop_map(|(a, b)| Line::Add(a, b)),
        (at.clone(), at.clone()).prop_map(|(a, b)| Line::Mul(a, b)),
        at.clone().prop_map(Line::Tanh),
        at.clone().prop_map(Line::Transpose),
        at.clone().prop_map(Line::Project),
        at.clone().prop_map(Line::Slide),
    ];
    if depth == 0 {
        return simple.boxed();
    }
    let segment = (at.clone(), at, prop::collection::vec(line(depth - 1), 1..5))
        .prop_map(|(a, b, lines)| Line::Segment(a, b, lines));
    prop_oneof![3 => simple, 2 => segment].boxed()
}

/// Runs a program on two inputs; its result is the newest value.
fn run<'t>(lines: &[Line], inputs: [&Var<'t>; 2], weight: &Parameter, recompute: bool) -> Result<Var<'t>> {
    let tape = inputs[0].tape();
    let mut values = vec![inputs[0].clone(), inputs[1].clone()];
    for line in lines {
        let at = |back: usize| &values[values.len() - 1 - back % values.len()];
        let value = match line {
            Line::Add(a, b) => at(*a).add(at(*b))?,
            Line::Mul(a, b) => at(*a).mul(at(*b))?.tanh()?,
            Line::Tanh(a) => at(*a).tanh()?,
            Line::Transpose(a) => at(*a).transpose(0, 1)?,
            Line::Project(a) => linear(at(*a), &tape.parameter(weight))?,
            Line::Slide(a) => {
                let (top, bottom) = (at(*a).narrow(0, 0, 3)?, at(*a).narrow(0, 1, 3)?);
                at(*a).add(&top.mul(&bottom)?.sum(&[0])?.tanh()?)?
            }
            Line::Segment(a, b, lines) if recompute => {
                let (lines, weight) = (lines.clone(), weight.clone());
                checkpoint(tape, &[at(*a), at(*b)], move |_, v| run(&lines, [&v[0], &v[1]], &weight, true))?
            }
            Line::Segment(a, b, lines) => run(lines, [at(*a), at(*b)], weight, false)?,
        };
        values.push(value);
    }
    Ok(values.pop().expect("starts with two"))
}

fn parameter() -> Parameter {
    let mut builder = ArenaBuilder::default();
    let id = builder.add("w", [4, 4]);
    let parameter = builder.build(DType::F64).parameter(id).unwrap();
    parameter.value.copy_assign(&normal(9)).unwrap();
    parameter
}

fn normal(seed: u64) -> Tensor {
    Tensor::randn(0.0, 0.7, [4, 4], DType::F64, seed).unwrap()
}

/// Bits of the loss and of the gradients of both inputs and the parameter.
fn bits(lines: &[Line], recompute: bool) -> Vec<u64> {
    let weight = parameter();
    let tape = Tape::new();
    let (a, b) = (tape.input(normal(1)), tape.input(normal(2)));
    let y = run(lines, [&a, &b], &weight, recompute).unwrap();
    let y = y.add(&a).unwrap().mul(&b).unwrap();
    let loss = y.mul(&y).unwrap().sum_all().unwrap();
    let gradients = tape.backward(&loss).unwrap();
    let tensors = [Some(loss.value()), gradients.get(&a), gradients.get(&b), Some(&weight.gradient)];
    tensors.into_iter().flatten().flat_map(|t: &Tensor| t.to_f64_vec().unwrap()).map(f64::to_bits).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn recompute_changes_no_bit(lines in prop::collection::vec(line(2), 1..8)) {
        prop_assert_eq!(bits(&lines, false), bits(&lines, true));
    }

    #[test]
    fn random_programs_pass_gradcheck(lines in prop::collection::vec(line(1), 1..5)) {
        let weight = parameter();
        // A finite difference loses digits where values grow: the tolerance leaves room for that.
        let options = Options { tolerance: 1e-5, elements_per_input: 5, ..Options::default() };
        let checked = gradcheck(
            |_, v| run(&lines, [&v[0], &v[1]], &weight, true)?.add(&v[0])?.tanh(),
            &[normal(3), normal(4).transpose(0, 1).unwrap()],
            options,
        );
        prop_assert!(checked.is_ok(), "{}", checked.unwrap_err());
    }
}

#[test]
fn one_variable_given_twice_is_one_variable() {
    let twice = Line::Segment(0, 0, vec![Line::Mul(0, 1), Line::Add(0, 2), Line::Mul(0, 1)]);
    let lines = [Line::Tanh(0), twice];
    assert_eq!(bits(&lines, false), bits(&lines, true));
}

#[test]
fn a_parameter_as_input_of_a_segment_adds_to_its_arena() {
    let run = |recompute: bool| {
        let weight = parameter();
        let tape = Tape::new();
        let (x, w) = (tape.input(normal(1)), tape.parameter(&weight));
        let y = if recompute {
            checkpoint(&tape, &[&x, &w], |_, v| v[0].matmul(&v[1])?.mul(&v[1])?.tanh()).unwrap()
        } else {
            x.matmul(&w).unwrap().mul(&w).unwrap().tanh().unwrap()
        };
        let mut announced = 0;
        tape.backward_with(&y.mul(&w).unwrap().sum_all().unwrap(), 1.0, &mut |_| announced += 1).unwrap();
        assert_eq!(announced, 1);
        weight.gradient.to_f64_vec().unwrap()
    };
    assert_eq!(run(false), run(true));
    assert!(run(true).iter().all(|&g| g != 0.0));
}

#[test]
fn a_segment_without_gradient_keeps_what_others_added() {
    let tape = Tape::new();
    let x = tape.input(normal(1));
    let cut = checkpoint(&tape, &[&x], |_, v| Ok(v[0].tanh()?.detach())).unwrap();
    let gradients = tape.backward(&cut.add(&x.scale(2.0).unwrap()).unwrap().sum_all().unwrap()).unwrap();
    assert_eq!(gradients.get(&x).unwrap().to_f64_vec().unwrap(), [2.0; 16]);
}
