//! Every op of the registry on a GPU, in float32 and bfloat16, against the CPU in float64: values and gradients.

use stickbreak_autograd::registry::OPS;
use stickbreak_autograd::{Result, Tape};
use stickbreak_tensor::{DType, Device, Tensor};

const CUDA: Device = Device::Cuda(0);

/// The largest error of a value or gradient, relative to the reference's norm (or to 1, for what is nearly zero): a few
/// roundings of the type, which a case's few ops add up.
fn bound(dtype: DType) -> f64 {
    if dtype == DType::F32 { 1e-5 } else { 3e-2 }
}

/// A copy on the device with the same layout in memory: a transposed view stays one.
fn on_device(tensor: &Tensor, dtype: DType) -> Result<Tensor> {
    let upload = |t: &Tensor| t.to_dtype(dtype)?.to_device(CUDA);
    if tensor.is_contiguous() || tensor.rank() < 2 {
        return Ok(upload(tensor)?);
    }
    let swap = |t: &Tensor| t.transpose(t.rank() - 2, t.rank() - 1);
    Ok(swap(&upload(&swap(tensor)?)?)?)
}

fn distance(found: &Tensor, expected: &Tensor) -> Result<f64> {
    let (found, expected) = (found.to_f64_vec()?, expected.to_f64_vec()?);
    assert_eq!(found.len(), expected.len());
    let square = |x: f64| x * x;
    let difference: f64 = std::iter::zip(&found, &expected).map(|(a, b)| square(a - b)).sum();
    let norm: f64 = expected.iter().map(|&x| square(x)).sum();
    let error = (difference / norm.max(1e-3)).sqrt();
    Ok(if error.is_nan() { f64::INFINITY } else { error })
}

/// Value and input gradients of a case for given inputs.
fn run(
    case: &stickbreak_autograd::gradcheck::Case,
    inputs: &[Tensor],
    seed: &dyn Fn(&Tensor) -> Result<Tensor>,
) -> Result<Vec<Tensor>> {
    let tape = Tape::new();
    let vars: Vec<_> = inputs.iter().map(|t| tape.input(t.clone())).collect();
    let output = case.run(&tape, &vars)?;
    let gradients = tape.backward_from(&[(&output, seed(output.value())?)], &mut |_| {})?;
    let mut results = vec![output.value().clone()];
    for var in &vars {
        results.push(gradients.get(var).cloned().unwrap_or(Tensor::zeros_on(
            var.shape(),
            var.dtype(),
            var.value().device(),
        )?));
    }
    Ok(results)
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn every_op_agrees_with_the_cpu() {
    let mut failures = Vec::new();
    let mut compared = 0;
    for op in OPS {
        for dtype in [DType::F32, DType::BF16] {
            for seed in 0..2 {
                for case in (op.cases)(seed) {
                    let name = format!("{} ({}), {dtype}, seed {seed}", op.name, case.name);
                    let checked = || -> Result<f64> {
                        // The reference sees what the device sees: inputs and output gradient rounded to its type.
                        let rounded = |t: &Tensor| t.to_dtype(dtype)?.to_dtype(DType::F64);
                        let inputs = case.inputs.iter().map(|t| Ok(rounded(t)?)).collect::<Result<Vec<_>>>()?;
                        let weights = |t: &Tensor| -> Result<Tensor> {
                            let normal = Tensor::randn(0.0, 1.0, t.shape(), DType::F64, 7)?;
                            Ok(rounded(&normal)?.to_dtype(t.dtype())?.to_device(t.device())?)
                        };
                        let expected = run(&case, &inputs, &weights)?;
                        let device = case.inputs.iter().map(|t| on_device(t, dtype)).collect::<Result<Vec<_>>>()?;
                        let found = run(&case, &device, &weights)?;
                        let mut worst = 0f64;
                        for (found, expected) in std::iter::zip(&found, &expected) {
                            worst = worst.max(distance(found, expected)?);
                        }
                        Ok(worst)
                    };
                    compared += 1;
                    match checked() {
                        Ok(worst) if worst <= bound(dtype) => {}
                        Ok(worst) => failures.push(format!("{name}: error {worst:.1e}, bound {:.1e}", bound(dtype))),
                        Err(error) => failures.push(format!("{name}: {error}")),
                    }
                }
            }
        }
    }
    println!("{compared} cases compared");
    assert!(failures.is_empty(), "{} of {compared} failed:\n{}", failures.len(), failures.join("\n"));
}
