//! Natural logarithm: `y = ln x`, so `dx = dy / x`.

use crate::error::Result;
use crate::gradcheck::Case;
use crate::tape::{Op, OutputGradients, Sink};
use crate::var::Var;
use stickbreak_tensor::Tensor;
use stickbreak_tensor::ops::UnaryOp;

struct Log {
    input: Tensor,
}

impl<'t> Var<'t> {
    /// `ln self`, element by element.
    pub fn log(&self) -> Result<Var<'t>> {
        let value = self.value.unary(UnaryOp::Log)?;
        let op = Log { input: self.value.clone() };
        let [y] = self.tape.record(op, &[self], [value]);
        Ok(y)
    }
}

impl Op for Log {
    fn name(&self) -> &'static str {
        "log"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        let dy = outputs.single();
        sink.add(0, dy.div(&self.input)?)
    }
}

pub(crate) fn cases(seed: u64) -> Vec<Case> {
    vec![
        Case::new("matrix", seed, &[&[3, 4]], |_, v| v[0].log()).map_inputs(|x| x.abs() + 0.5),
        Case::new("a transposed view", seed, &[&[2, 3, 4]], |_, v| v[0].permute(&[2, 0, 1])?.log())
            .map_inputs(|x| x.abs() + 0.5),
    ]
}
