//! Recompute instead of remember (activation checkpointing, arXiv 1604.06174).

use crate::error::{AutogradError, Result};
use crate::parameter::Parameter;
use crate::tape::{Op, OutputGradients, Sink, Tape};
use crate::var::Var;
use stickbreak_tensor::Tensor;

/// A function of variables that can be run again.
trait Segment: for<'t> Fn(&'t Tape, &[Var<'t>]) -> Result<Var<'t>> {}
impl<F: for<'t> Fn(&'t Tape, &[Var<'t>]) -> Result<Var<'t>>> Segment for F {}

/// Runs `segment` without recording it; its backward pass runs it again, recorded, from the saved inputs. Costs one
/// more forward pass, saves all of the segment's activations, and gives the same gradients bit for bit.
///
/// `segment` must compute the same function each time, of `inputs` and parameters alone.
///
/// # Errors
/// If the segment fails.
pub fn checkpoint<'t>(
    tape: &'t Tape,
    inputs: &[&Var<'t>],
    segment: impl for<'i> Fn(&'i Tape, &[Var<'i>]) -> Result<Var<'i>> + 'static,
) -> Result<Var<'t>> {
    let scratch = Tape::without_gradients();
    let constants: Vec<Var<'_>> = inputs.iter().map(|v| scratch.constant(v.value().clone())).collect();
    let output = segment(&scratch, &constants)?.value().clone();
    // The parameters are inputs of the op too: the tape counts uses to know when a gradient is complete.
    let parameters: Vec<Var<'t>> = scratch.used_parameters().iter().map(|p: &Parameter| tape.parameter(p)).collect();
    let all: Vec<&Var<'t>> = inputs.iter().copied().chain(&parameters).collect();
    let op = Checkpoint {
        tracked: inputs.iter().map(|v| v.is_tracked()).collect(),
        inputs: inputs.iter().map(|v| v.value().clone()).collect(),
        segment: Box::new(segment),
    };
    let [output] = tape.record(op, &all, [output]);
    Ok(output)
}

struct Checkpoint {
    inputs: Vec<Tensor>,
    tracked: Vec<bool>,
    segment: Box<dyn Segment>,
}

impl Op for Checkpoint {
    fn name(&self) -> &'static str {
        "checkpoint"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        let tape = Tape::new();
        let inputs: Vec<Var<'_>> = std::iter::zip(self.inputs, &self.tracked)
            .map(|(value, &tracked)| if tracked { tape.input(value) } else { tape.constant(value) })
            .collect();
        let output = (self.segment)(&tape, &inputs)?;
        // Parameters add to their arena right here; the outer tape announces them when this op is done.
        let gradients = match tape.backward_from(&[(&output, outputs.single())], &mut |_| {}) {
            Err(AutogradError::Untracked) => return Ok(()),
            other => other?,
        };
        for (index, input) in inputs.iter().enumerate() {
            sink.add_option(index, gradients.get(input).cloned())?;
        }
        Ok(())
    }
}

pub(crate) mod cases {
    use crate::gradcheck::Case;

    pub(crate) fn cases(seed: u64) -> Vec<Case> {
        vec![
            Case::new("used twice inside", seed, &[&[3, 4], &[3, 4]], |tape, v| {
                super::checkpoint(tape, &[&v[0], &v[1]], |_, v| v[0].mul(&v[1])?.tanh()?.add(&v[0]))
            }),
            Case::new("nested, and used again outside", seed, &[&[5]], |tape, v| {
                let inner = super::checkpoint(tape, &[&v[0]], |tape, v| {
                    let y = super::checkpoint(tape, &[&v[0]], |_, v| v[0].sigmoid())?;
                    y.mul(&v[0])
                })?;
                inner.add(&v[0])
            }),
        ]
    }
}
