//! Sigmoid-weighted linear unit (arXiv 1702.03118): `y = x s` with `s = sigmoid(x)`, so `dx = dy (s + y (1 - s))`.

use crate::error::Result;
use crate::gradcheck::Case;
use crate::tape::{Op, OutputGradients, Sink};
use crate::var::Var;
use stickbreak_tensor::Tensor;
use stickbreak_tensor::ops::UnaryOp;

struct Silu {
    input: Tensor,
}

impl<'t> Var<'t> {
    /// `self * sigmoid(self)`, element by element.
    pub fn silu(&self) -> Result<Var<'t>> {
        let value = self.value.unary(UnaryOp::Silu)?;
        let op = Silu { input: self.value.clone() };
        let [y] = self.tape.record(op, &[self], [value]);
        Ok(y)
    }
}

impl Op for Silu {
    fn name(&self) -> &'static str {
        "silu"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        let dy = outputs.single();
        let s = self.input.unary(UnaryOp::Sigmoid)?;
        let slope = s.add(&self.input.mul(&s)?.mul(&s.affine(-1.0, 1.0)?)?)?;
        sink.add(0, dy.mul(&slope)?)
    }
}

pub(crate) fn cases(seed: u64) -> Vec<Case> {
    vec![
        Case::new("matrix", seed, &[&[3, 4]], |_, v| v[0].silu()),
        Case::new("a transposed view", seed, &[&[2, 3, 4]], |_, v| v[0].permute(&[2, 0, 1])?.silu()),
    ]
}
