//! Recompute instead of remember (activation checkpointing, arXiv 1604.06174).

use crate::error::Result;
use crate::tape::{Op, OutputGradients, Sink, Tape};
use crate::var::Var;
use stickbreak_tensor::Tensor;

/// A function of variables that can be run again.
trait Segment: for<'t> Fn(&'t Tape, &[Var<'t>]) -> Result<Var<'t>> {}
impl<F: for<'t> Fn(&'t Tape, &[Var<'t>]) -> Result<Var<'t>>> Segment for F {}

/// Runs `segment` without recording it; its backward pass runs it again, recorded, from the saved inputs. It keeps the
/// inputs instead of all that the segment's ops would save, for the price of one more forward pass. The gradients are the
/// same bit for bit, for they are added up in the same order.
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
    let scratch = Tape::without_gradients().with_before_use(tape.before_use());
    let constants: Vec<Var<'_>> = inputs.iter().map(|v| scratch.constant(v.value().clone())).collect();
    let output = segment(&scratch, &constants)?.value().clone();
    // The parameters are inputs of the op too: the tape counts uses to know when a gradient is complete.
    let parameters: Vec<Var<'t>> = scratch.used_parameters().iter().map(|p| tape.parameter(p)).collect();
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
        let mut inputs: Vec<Var<'_>> = Vec::new();
        for (index, (value, &tracked)) in std::iter::zip(self.inputs, &self.tracked).enumerate() {
            let first = sink.first_occurrence(index);
            inputs.push(if first < index {
                inputs[first].clone()
            } else if let Some(parameter) = sink.parameter(index) {
                tape.parameter(parameter)
            } else if tracked {
                // What later ops have added so far goes in and comes out again, so that the segment's own parts are
                // added to it one by one, as without recompute: sums of floats depend on their order.
                let input = tape.input(value);
                tape.start_gradient(&input, sink.take(index));
                input
            } else {
                tape.constant(value)
            });
        }
        let output = (self.segment)(&tape, &inputs)?;
        // Parameters add to their arena right here; the outer tape announces them when this op is done.
        let seeds = [(&output, outputs.single())];
        // A segment may detach its output; what was gathered for its inputs must come out all the same.
        let mut gradients = tape.backward_from_any(&seeds, &mut |_| {})?;
        for (index, input) in inputs.iter().enumerate() {
            if sink.first_occurrence(index) == index {
                sink.replace(index, gradients.take(input));
            }
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
