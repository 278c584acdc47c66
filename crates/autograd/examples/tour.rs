//! The example of `docs/autograd.md`: one small layer, from the graph to gradients that can be checked by eye.
//!
//!     cargo run -p stickbreak-autograd --example tour

use stickbreak_autograd::ops::linear;
use stickbreak_autograd::{ArenaBuilder, Parameter, ParameterArena, Result, Tape, Var, checkpoint};
use stickbreak_tensor::{DType, Tensor};

/// One layer: `tanh(x W^T + b)`, x `[T, in]`, W `[out, in]`, b `[out]`.
fn layer<'t>(x: &Var<'t>, weight: &Parameter, bias: &Parameter) -> Result<Var<'t>> {
    let (weight, bias) = (x.tape().parameter(weight), x.tape().parameter(bias));
    linear(x, &weight)?.add(&bias)?.tanh()
}

/// How far the layer's output is from a target: `sum((layer(x) - target)^2)`.
fn loss<'t>(x: &Var<'t>, arena: &ParameterArena, recompute: bool) -> Result<Var<'t>> {
    let mut parameters = arena.iter().map(|(_, parameter)| parameter);
    let (weight, bias) = (parameters.next().expect("W"), parameters.next().expect("b"));
    let y = if recompute {
        checkpoint(x.tape(), &[x], move |_, inputs| layer(&inputs[0], &weight, &bias))?
    } else {
        layer(x, &weight, &bias)?
    };
    let target = x.tape().constant(Tensor::from_vec(vec![0.5, -0.5, 0.0, 1.0], [2, 2])?);
    let error = y.sub(&target)?;
    error.mul(&error)?.sum_all()
}

/// The loss alone: nothing is recorded, nothing is saved.
fn evaluate(x: &Tensor, arena: &ParameterArena) -> Result<f64> {
    let tape = Tape::without_gradients();
    Ok(loss(&tape.constant(x.clone()), arena, false)?.value().to_scalar()?)
}

/// `(f(v + step) - f(v - step)) / (2 step)` for each element v of a tensor that `f` reads, which is changed in place.
fn finite_differences(values: &Tensor, f: impl Fn() -> Result<f64>) -> Result<Vec<f64>> {
    const STEP: f64 = 1e-5;
    let mut slopes = Vec::new();
    for element in 0..values.elements() {
        let original = values.read::<f64>()?[element];
        let at = |value: f64| {
            values.write::<f64>()?[element] = value;
            f()
        };
        slopes.push((at(original + STEP)? - at(original - STEP)?) / (2.0 * STEP));
        values.write::<f64>()?[element] = original;
    }
    Ok(slopes)
}

/// One backward pass: the gradients of W, b and x.
fn gradients(x: &Tensor, arena: &ParameterArena, recompute: bool) -> Result<Vec<Tensor>> {
    arena.zero_gradients()?;
    let tape = Tape::new();
    let x = tape.input(x.clone());
    let loss = loss(&x, arena, recompute)?;
    println!("  {} ops on the tape, loss {:.6}", tape.len(), loss.value().to_scalar()?);
    let gradients = tape.backward_with(&loss, 1.0, &mut |id| {
        println!("  gradient of {} is complete", arena.entries()[id.0].name);
    })?;
    let mut all: Vec<Tensor> = arena.iter().map(|(_, parameter)| parameter.gradient.copy().unwrap()).collect();
    all.push(gradients.get(&x).expect("the loss depends on x").copy().unwrap());
    Ok(all)
}

fn main() -> Result<()> {
    let mut builder = ArenaBuilder::default();
    builder.add("W", [2, 3]);
    builder.add("b", [2]);
    let arena = builder.build(DType::F64);
    for (index, (_, parameter)) in arena.iter().enumerate() {
        parameter.value.copy_assign(&Tensor::randn(0.0, 0.5, parameter.value.shape(), DType::F64, index as u64)?)?;
    }
    let x = Tensor::from_vec(vec![1.0, 2.0, -1.0, 0.5, 0.0, 3.0], [2, 3])?;

    println!("The graph of sum((tanh(x W^T + b) - target)^2):\n");
    let tape = Tape::new();
    loss(&tape.input(x.clone()), &arena, false)?;
    println!("{}", tape.to_dot());

    println!("Backward:");
    let analytic = gradients(&x, &arena, false)?;

    println!("\nEvery gradient beside its central finite difference:\n");
    println!("  {:<10} {:>14} {:>18} {:>10}", "element", "backward", "finite difference", "apart");
    let tensors = arena.iter().map(|(entry, parameter)| (entry.name.clone(), parameter.value));
    for ((name, values), analytic) in tensors.chain([("x".to_owned(), x.clone())]).zip(&analytic) {
        let numeric = finite_differences(&values, || evaluate(&x, &arena))?;
        for (element, (a, n)) in analytic.to_f64_vec().unwrap().into_iter().zip(numeric).enumerate() {
            let index = match values.shape()[..] {
                [_, columns] => format!("{name}[{}, {}]", element / columns, element % columns),
                _ => format!("{name}[{element}]"),
            };
            println!("  {index:<10} {a:>14.10} {n:>18.10} {:>10.1e}", (a - n).abs());
        }
    }

    println!("\nThe same with the layer recomputed:");
    let recomputed = gradients(&x, &arena, true)?;
    let bits = |tensors: &[Tensor]| -> Vec<u64> {
        tensors.iter().flat_map(|t| t.to_f64_vec().unwrap()).map(f64::to_bits).collect()
    };
    let same = bits(&analytic) == bits(&recomputed);
    println!("  {} gradients, {}", bits(&analytic).len(), if same { "the same to the last bit" } else { "DIFFERENT" });
    assert!(same, "recompute changed a gradient");
    Ok(())
}
