//! The same elements in another shape; the gradient goes back to the old shape.

use crate::error::Result;
use crate::gradcheck::Case;
use crate::tape::{Op, OutputGradients, Sink};
use crate::var::Var;
use stickbreak_tensor::{Shape, Tensor};

struct Reshape {
    input: Shape,
}

impl<'t> Var<'t> {
    /// The same elements, row-major, in another shape.
    pub fn reshape(&self, shape: impl Into<Shape>) -> Result<Var<'t>> {
        let value: Tensor = self.value.reshape(shape)?;
        let [y] = self.tape.record(Reshape { input: self.shape().clone() }, &[self], [value]);
        Ok(y)
    }
}

impl Op for Reshape {
    fn name(&self) -> &'static str {
        "reshape"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        sink.add(0, outputs.single().reshape(&self.input)?)
    }
}

pub(crate) fn cases(seed: u64) -> Vec<Case> {
    vec![
        Case::new("split a dimension", seed, &[&[6, 4]], |_, v| v[0].reshape([3, 2, 4])),
        Case::new("of a transposed view", seed, &[&[3, 4]], |_, v| v[0].transpose(0, 1)?.reshape([12])),
    ]
}
