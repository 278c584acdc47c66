//! What is recorded, what is saved and for how long, and how gradients of one value are gathered.

use std::cell::RefCell;
use std::rc::Rc;
use stickbreak_autograd::ops::{self, linear, linear_cross_entropy};
use stickbreak_autograd::{ArenaBuilder, AutogradError, Op, OutputGradients, Result, Sink, Tape, Var, checkpoint};
use stickbreak_tensor::{DType, Shape, Tensor};

fn normal(seed: u64, shape: impl Into<Shape>) -> Tensor {
    Tensor::randn(0.0, 1.0, shape, DType::F64, seed).unwrap()
}

/// An identity that runs a closure in its backward pass, before it hands the gradient on.
struct Spy<F>(F);

impl<F: FnOnce(&Sink<'_>)> Op for Spy<F> {
    fn name(&self) -> &'static str {
        "spy"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        (self.0)(sink);
        sink.add(0, outputs.single())
    }
}

/// The value of `inputs[0]`, recorded as an op of all inputs.
fn spy<'t>(inputs: &[&Var<'t>], look: impl FnOnce(&Sink<'_>) + 'static) -> Var<'t> {
    let [y] = inputs[0].tape().record(Spy(look), inputs, [inputs[0].value().clone()]);
    y
}

// ------------------------------------------------------------------------------------------------ masks

#[test]
fn an_op_of_constants_records_nothing() {
    let tape = Tape::new();
    let (a, b) = (tape.constant(normal(1, [2, 3])), tape.constant(normal(2, [3])));
    let y = a.mul(&b).unwrap().exp().unwrap();
    assert!(!y.is_tracked() && tape.is_empty());
    assert!(matches!(tape.backward(&y.sum_all().unwrap()), Err(AutogradError::Untracked)));
}

#[test]
fn a_tape_without_gradients_saves_nothing() {
    let x = normal(1, [4, 4]);
    let tape = Tape::without_gradients();
    let input = tape.input(x.clone());
    let y = input.mul(&input).unwrap().tanh().unwrap().matmul(&input).unwrap();
    assert!(!y.is_tracked() && tape.is_empty());
    drop(input);
    assert!(x.is_unique(), "an op kept its input");
}

/// Which of two factors the op keeps: by whether anybody else still holds the tensor once the variables are gone.
fn kept(
    track: [bool; 2],
    shapes: [&[usize]; 2],
    op: impl for<'t> Fn(&Var<'t>, &Var<'t>) -> Result<Var<'t>>,
) -> [bool; 2] {
    let tensors = [normal(1, shapes[0]), normal(2, shapes[1])];
    let tape = Tape::new();
    let var = |i: usize| if track[i] { tape.input(tensors[i].clone()) } else { tape.constant(tensors[i].clone()) };
    op(&var(0), &var(1)).unwrap();
    tensors.map(|tensor| !tensor.is_unique())
}

#[test]
fn a_product_saves_a_factor_only_for_the_other_ones_gradient() {
    for (track, saved) in [([true, false], [false, true]), ([false, true], [true, false]), ([true; 2], [true; 2])] {
        assert_eq!(kept(track, [&[3, 3], &[3, 3]], |a, b| a.mul(b)), saved, "mul, tracked {track:?}");
        assert_eq!(kept(track, [&[3, 3], &[3, 3]], |a, b| a.matmul(b)), saved, "matmul, tracked {track:?}");
        assert_eq!(kept(track, [&[4, 3], &[2, 3]], linear), saved, "linear, tracked {track:?}");
    }
    // Sums and views need shapes alone, the exponential its output.
    assert_eq!(kept([true; 2], [&[3, 3], &[3]], |a, b| a.add(b)), [false; 2]);
    assert_eq!(kept([true; 2], [&[3, 3], &[3]], |a, b| a.sum(&[0])?.reshape([3])?.sub(b)), [false; 2]);
    assert_eq!(kept([true, false], [&[3, 3], &[1]], |a, _| a.exp()), [false; 2]);
}

#[test]
fn the_mask_tells_a_backward_what_is_wanted() {
    let tape = Tape::new();
    let seen = Rc::new(RefCell::new(None));
    let (x, c) = (tape.input(normal(1, [3])), tape.constant(normal(2, [3])));
    let look = Rc::clone(&seen);
    let y = spy(&[&x, &c, &x.detach()], move |sink| *look.borrow_mut() = Some(sink.wanted::<3>()));
    tape.backward(&y.sum_all().unwrap()).unwrap();
    assert_eq!(*seen.borrow(), Some([true, false, false]));
}

#[test]
fn fused_losses_compute_only_the_gradients_that_are_wanted() {
    let labels = Tensor::from_vec(vec![1i32, 0, 3], [3]).unwrap();
    for (track_hidden, track_weight) in [(true, false), (false, true)] {
        let tape = Tape::new();
        let var = |tensor: Tensor, tracked| if tracked { tape.input(tensor) } else { tape.constant(tensor) };
        let (hidden, weight) = (var(normal(1, [3, 4]), track_hidden), var(normal(2, [5, 4]), track_weight));
        let loss = linear_cross_entropy(&hidden, &weight, &labels, 1.0, 1.0).unwrap();
        let gradients = tape.backward(&loss).unwrap();
        assert_eq!(gradients.get(&hidden).is_some(), track_hidden);
        assert_eq!(gradients.get(&weight).is_some(), track_weight);
    }
}

#[test]
fn detach_cuts() {
    let tape = Tape::new();
    let x = tape.input(Tensor::scalar(3.0f64));
    // x * stop(x^2): the derivative is stop(x^2) = 9, not 3 x^2 = 27.
    let square = x.mul(&x).unwrap().detach();
    assert!(!square.is_tracked());
    let gradients = tape.backward(&x.mul(&square).unwrap()).unwrap();
    assert_eq!(gradients.get(&x).unwrap().to_scalar().unwrap(), 9.0);
}

// ------------------------------------------------------------------------------------------------ gathering

#[test]
fn a_value_used_many_times_gets_the_sum() {
    let tape = Tape::new();
    let x = tape.input(Tensor::from_vec(vec![2.0f64, -3.0], [2]).unwrap());
    // x^2 + 3 x + x + x: the derivative is 2 x + 5. The two plain additions hand one tensor to several inputs.
    let y = x.mul(&x).unwrap().add(&x.scale(3.0).unwrap()).unwrap().add(&x.add(&x).unwrap()).unwrap();
    let gradients = tape.backward(&y.sum_all().unwrap()).unwrap();
    assert_eq!(gradients.get(&x).unwrap().to_f64_vec().unwrap(), [9.0, -1.0]);
}

#[test]
fn a_gradient_shared_by_two_values_is_not_written_into() {
    let tape = Tape::new();
    let (a, b) = (tape.input(normal(1, [3])), tape.input(normal(2, [3])));
    // Both sides of the addition get the very same tensor; a gets more on top, which b must not see.
    let y = a.add(&b).unwrap().add(&a.scale(10.0).unwrap()).unwrap();
    let gradients = tape.backward(&y.sum_all().unwrap()).unwrap();
    assert_eq!(gradients.get(&a).unwrap().to_f64_vec().unwrap(), [11.0; 3]);
    assert_eq!(gradients.get(&b).unwrap().to_f64_vec().unwrap(), [1.0; 3]);
}

#[test]
fn in_place_products_leave_shared_gradients_alone() {
    let tape = Tape::new();
    let (x, w) = (tape.input(normal(1, [3, 3])), tape.input(normal(2, [3, 3])));
    // A residual connection: the gradient of the sum goes to x as it is, then the projection adds to it in place.
    let y = x.add(&linear(&x, &w).unwrap()).unwrap();
    let gradients = tape.backward(&y.sum_all().unwrap()).unwrap();
    let ones = Tensor::ones([3, 3], DType::F64);
    let expected = ones.add(&ones.matmul(w.value()).unwrap()).unwrap();
    assert_eq!(gradients.get(&x).unwrap().to_f64_vec().unwrap(), expected.to_f64_vec().unwrap());
}

#[test]
fn branches_that_do_not_reach_the_loss_change_nothing() {
    let tape = Tape::new();
    let x = tape.input(normal(1, [3]));
    let loss = x.scale(2.0).unwrap().sum_all().unwrap();
    let unused = x.exp().unwrap();
    let other = tape.input(normal(2, [3]));
    let gradients = tape.backward(&loss).unwrap();
    assert_eq!(gradients.get(&x).unwrap().to_f64_vec().unwrap(), [2.0; 3]);
    assert!(gradients.get(&other).is_none() && gradients.get(&unused).is_none());
}

#[test]
fn backward_starts_from_any_gradients() {
    let tape = Tape::new();
    let x = tape.input(Tensor::from_vec(vec![1.0f64, 2.0], [2]).unwrap());
    let (y, z) = (x.mul(&x).unwrap(), x.scale(3.0).unwrap());
    let seed = |a, b| Tensor::from_vec(vec![a, b], [2]).unwrap();
    let gradients = tape.backward_from(&[(&y, seed(1.0, 10.0)), (&z, seed(0.0, 1.0))], &mut |_| {}).unwrap();
    assert_eq!(gradients.get(&x).unwrap().to_f64_vec().unwrap(), [2.0, 43.0]);
}

// ------------------------------------------------------------------------------------------------ lifetime of what is saved

#[test]
fn saved_state_is_freed_while_backward_goes_on() {
    let tape = Tape::new();
    let saved_later = Rc::new(RefCell::new(None::<Tensor>));
    let seen = Rc::new(RefCell::new(false));
    let x = tape.input(normal(1, [8]));
    let (look, note) = (Rc::clone(&saved_later), Rc::clone(&seen));
    let x_seen = spy(&[&x], move |_| {
        let saved = look.borrow();
        assert!(saved.as_ref().unwrap().is_unique(), "an op that has run backward still holds its output");
        *note.borrow_mut() = true;
    });
    let y = x_seen.exp().unwrap();
    *saved_later.borrow_mut() = Some(y.value().clone());
    let loss = y.sum_all().unwrap();
    drop(y);
    assert!(!saved_later.borrow().as_ref().unwrap().is_unique(), "the exponential keeps its output until then");
    tape.backward(&loss).unwrap();
    assert!(*seen.borrow());
}

#[test]
fn a_checkpoint_keeps_its_inputs_and_nothing_else() {
    let inside = Rc::new(RefCell::new(Vec::new()));
    let tape = Tape::new();
    let x = tape.input(normal(1, [8]));
    let values = Rc::clone(&inside);
    let y = checkpoint(&tape, &[&x], move |_, v| {
        let a = v[0].exp()?;
        let b = a.tanh()?;
        values.borrow_mut().push(a.value().clone());
        b.mul(&a)
    });
    let loss = y.unwrap().sum_all().unwrap();
    assert!(inside.borrow()[0].is_unique(), "an activation inside the segment was kept");
    tape.backward(&loss).unwrap();
    assert_eq!(inside.borrow().len(), 2, "the segment runs once forward and once in the backward pass");
    assert_eq!(inside.borrow()[0].to_f64_vec().unwrap(), inside.borrow()[1].to_f64_vec().unwrap());
}

// ------------------------------------------------------------------------------------------------ errors

/// An op whose backward gives a gradient that does not fit its input.
struct Misfit(Tensor);

impl Op for Misfit {
    fn name(&self) -> &'static str {
        "misfit"
    }

    fn backward(self: Box<Self>, _: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        sink.add(1, self.0)
    }
}

fn misfit(gradient: Tensor) -> String {
    let tape = Tape::new();
    let (a, b) = (tape.constant(normal(1, [2])), tape.input(normal(2, [2, 3])));
    let [y] = tape.record(Misfit(gradient), &[&a, &b], [Tensor::scalar(0.0f64)]);
    tape.backward(&y).err().expect("the gradient does not fit").to_string()
}

#[test]
fn errors_say_what_is_wrong_and_where() {
    let tape = Tape::new();
    let x = tape.input(normal(1, [2, 3]));
    let message = tape.backward(&x).err().unwrap().to_string();
    assert_eq!(message, "backward needs a loss of one element, found shape [2, 3]");
    let constant = tape.constant(Tensor::scalar(1.0f64));
    let message = tape.backward(&constant).err().unwrap().to_string();
    assert_eq!(message, "backward of a value that no tracked input or parameter went into");
    let seed = [(&x, normal(2, [3, 2]))];
    let message = tape.backward_from(&seed, &mut |_| {}).err().unwrap().to_string();
    assert_eq!(message, "seed: gradient of input 0 has shape [3, 2], its value [2, 3]");

    let expected = "backward of misfit: misfit: gradient of input 1 has";
    assert_eq!(misfit(normal(1, [3, 2])), format!("{expected} shape [3, 2], its value [2, 3]"));
    assert_eq!(misfit(Tensor::zeros([2, 3], DType::F32)), format!("{expected} dtype f32, its value f64"));

    let message = x.matmul(&x).unwrap_err().to_string();
    assert!(message.contains("matmul") && message.matches("[2, 3]").count() == 2, "{message}");
    let arena = ArenaBuilder::default().build(DType::F32);
    let message = arena.parameter(stickbreak_autograd::ParameterId(7)).unwrap_err().to_string();
    assert_eq!(message, "the arena has 0 parameters, none with id 7");
}

#[test]
fn a_tape_runs_backward_once() {
    let tape = Tape::new();
    let x = tape.input(normal(1, [3]));
    let loss = x.exp().unwrap().sum_all().unwrap();
    tape.backward(&loss).unwrap();
    let error = tape.backward(&loss).err().expect("what the exponential saved is gone");
    assert!(matches!(error, AutogradError::UsedUp), "{error}");
}

#[test]
#[should_panic(expected = "mul: an input belongs to another tape")]
fn variables_of_two_tapes_do_not_mix() {
    let (a, b) = (Tape::new(), Tape::new());
    let _ = a.input(normal(1, [3])).mul(&b.input(normal(2, [3])));
}

#[test]
#[should_panic(expected = "parameter 0 of two arenas on one tape")]
fn parameters_of_two_arenas_do_not_mix() {
    let arena = |seed| {
        let mut builder = ArenaBuilder::default();
        let id = builder.add(format!("w{seed}"), [3]);
        builder.build(DType::F64).parameter(id).unwrap()
    };
    let tape = Tape::new();
    tape.parameter(&arena(1));
    tape.parameter(&arena(2));
}

// ------------------------------------------------------------------------------------------------ picture

#[test]
fn the_graph_as_dot() {
    let mut builder = ArenaBuilder::default();
    let id = builder.add("w", [2, 3]);
    let weight = builder.build(DType::F64).parameter(id).unwrap();
    let tape = Tape::new();
    let x = tape.input(normal(1, [4, 3]));
    let c = tape.constant(Tensor::scalar(2.0f64));
    let y = ops::linear(&x, &tape.parameter(&weight)).unwrap();
    let loss = y.mul(&y).unwrap().mul(&c).unwrap().sum_all().unwrap();
    let expected = r#"digraph tape {
  rankdir=TB;
  node [fontname="sans-serif"];
  leaf0 [label="input\n[4, 3]"];
  leaf1 [label="parameter 0\n[2, 3]", style=filled, fillcolor=lightgrey];
  op0 [shape=box, label="linear"];
  leaf0 -> op0 [label="[4, 3]"];
  leaf1 -> op0 [label="[2, 3]"];
  op1 [shape=box, label="mul"];
  op0 -> op1 [label="[4, 2]"];
  op0 -> op1 [label="[4, 2]"];
  op2 [shape=box, label="mul"];
  op1 -> op2 [label="[4, 2]"];
  op3 [shape=box, label="sum"];
  op2 -> op3 [label="[4, 2]"];
  op4 [shape=box, label="reshape"];
  op3 -> op4 [label="[1, 1]"];
}
"#;
    assert_eq!(tape.to_dot(), expected);
    tape.backward(&loss).unwrap();
    assert_eq!(tape.to_dot(), expected, "the picture is the same after the backward pass");
}
