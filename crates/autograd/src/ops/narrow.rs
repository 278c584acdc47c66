//! A range of one dimension; the gradient lands in that range of zeros.

use crate::error::Result;
use crate::gradcheck::Case;
use crate::tape::{Op, OutputGradients, Sink};
use crate::var::Var;
use stickbreak_tensor::Tensor;

struct Narrow {
    dimension: usize,
    start: usize,
}

impl<'t> Var<'t> {
    /// `len` indices of a dimension from `start` on, without a copy.
    pub fn narrow(&self, dimension: usize, start: usize, len: usize) -> Result<Var<'t>> {
        let value: Tensor = self.value.narrow(dimension, start, len)?;
        let [y] = self.tape.record(Narrow { dimension, start }, &[self], [value]);
        Ok(y)
    }
}

impl Op for Narrow {
    fn name(&self) -> &'static str {
        "narrow"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        let dy = outputs.single();
        // Straight into the gathered gradient, so that many slices of one tensor cost one buffer.
        let buffer = sink.buffer(0)?;
        if buffer.is_new {
            buffer.tensor.fill_assign(0.0)?;
        }
        let len = dy.dim(self.dimension)?;
        Ok(buffer.tensor.narrow(self.dimension, self.start, len)?.add_assign_scaled(1.0, &dy)?)
    }
}

pub(crate) fn cases(seed: u64) -> Vec<Case> {
    vec![
        Case::new("middle of a dimension", seed, &[&[3, 5]], |_, v| v[0].narrow(1, 1, 3)),
        Case::new("two overlapping slices", seed, &[&[6, 2]], |_, v| v[0].narrow(0, 0, 4)?.mul(&v[0].narrow(0, 2, 4)?)),
    ]
}
