//! Exponential: `y = e^x`, so `dx = dy y`. The output is saved, not the input.

use crate::error::Result;
use crate::gradcheck::Case;
use crate::tape::{Op, OutputGradients, Sink};
use crate::var::Var;
use stickbreak_tensor::Tensor;
use stickbreak_tensor::ops::UnaryOp;

struct Exp {
    output: Tensor,
}

impl<'t> Var<'t> {
    /// `e^self`, element by element.
    pub fn exp(&self) -> Result<Var<'t>> {
        let value = self.value.unary(UnaryOp::Exp)?;
        let op = Exp { output: value.clone() };
        let [y] = self.tape.record(op, &[self], [value]);
        Ok(y)
    }
}

impl Op for Exp {
    fn name(&self) -> &'static str {
        "exp"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        let dy = outputs.single();
        sink.add(0, dy.mul(&self.output)?)
    }
}

pub(crate) fn cases(seed: u64) -> Vec<Case> {
    vec![
        Case::new("matrix", seed, &[&[3, 4]], |_, v| v[0].exp()),
        Case::new("a transposed view", seed, &[&[2, 3, 4]], |_, v| v[0].permute(&[2, 0, 1])?.exp()),
    ]
}
