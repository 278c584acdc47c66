//! Hyperbolic tangent: `y = tanh x`, so `dx = dy (1 - y^2)`. The output is saved, not the input.

use crate::error::Result;
use crate::gradcheck::Case;
use crate::tape::{Op, OutputGradients, Sink};
use crate::var::Var;
use stickbreak_tensor::Tensor;
use stickbreak_tensor::ops::UnaryOp;

struct Tanh {
    output: Tensor,
}

impl<'t> Var<'t> {
    /// `tanh self`, element by element.
    pub fn tanh(&self) -> Result<Var<'t>> {
        let value = self.value.unary(UnaryOp::Tanh)?;
        let op = Tanh { output: value.clone() };
        let [y] = self.tape.record(op, &[self], [value]);
        Ok(y)
    }
}

impl Op for Tanh {
    fn name(&self) -> &'static str {
        "tanh"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        let dy = outputs.single();
        let slope = self.output.unary(UnaryOp::Square)?.affine(-1.0, 1.0)?;
        sink.add(0, dy.mul(&slope)?)
    }
}

pub(crate) fn cases(seed: u64) -> Vec<Case> {
    vec![
        Case::new("matrix", seed, &[&[3, 4]], |_, v| v[0].tanh()),
        Case::new("a transposed view", seed, &[&[2, 3, 4]], |_, v| v[0].permute(&[2, 0, 1])?.tanh()),
    ]
}
