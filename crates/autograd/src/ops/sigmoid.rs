//! Logistic function: `y = 1 / (1 + e^-x)`, so `dx = dy y (1 - y)`. The output is saved, not the input.

use crate::error::Result;
use crate::gradcheck::Case;
use crate::tape::{Op, OutputGradients, Sink};
use crate::var::Var;
use stickbreak_tensor::Tensor;
use stickbreak_tensor::ops::UnaryOp;

struct Sigmoid {
    output: Tensor,
}

impl<'t> Var<'t> {
    /// `1 / (1 + e^-self)`, element by element.
    pub fn sigmoid(&self) -> Result<Var<'t>> {
        let value = self.value.unary(UnaryOp::Sigmoid)?;
        let op = Sigmoid { output: value.clone() };
        let [y] = self.tape.record(op, &[self], [value]);
        Ok(y)
    }
}

impl Op for Sigmoid {
    fn name(&self) -> &'static str {
        "sigmoid"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        let dy = outputs.single();
        let slope = self.output.mul(&self.output.affine(-1.0, 1.0)?)?;
        sink.add(0, dy.mul(&slope)?)
    }
}

pub(crate) fn cases(seed: u64) -> Vec<Case> {
    vec![
        Case::new("matrix", seed, &[&[3, 4]], |_, v| v[0].sigmoid()),
        Case::new("a transposed view", seed, &[&[2, 3, 4]], |_, v| v[0].permute(&[2, 0, 1])?.sigmoid()),
    ]
}
