//! Gated activation of the feed-forward block (arXiv 2002.05202): `y = silu(gate) up` in one pass over memory.
//! With `s = sigmoid(gate)`: `dup = dy gate s` and `dgate = dy up s (1 + gate (1 - s))`.

use crate::error::Result;
use crate::gradcheck::Case;
use crate::tape::{Op, OutputGradients, Sink};
use crate::var::Var;
use stickbreak_tensor::{Tensor, ops::nn};

struct Swiglu {
    gate: Tensor,
    up: Tensor,
}

/// `silu(gate) * up` for two tensors of one shape.
pub fn swiglu<'t>(gate: &Var<'t>, up: &Var<'t>) -> Result<Var<'t>> {
    let value = nn::swiglu(&gate.value, &up.value)?;
    let op = Swiglu { gate: gate.value.clone(), up: up.value.clone() };
    let [y] = gate.tape.record(op, &[gate, up], [value]);
    Ok(y)
}

impl Op for Swiglu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        let [dgate, dup] = nn::swiglu_backward(&self.gate, &self.up, &outputs.single(), sink.wanted())?;
        sink.add_option(0, dgate)?;
        sink.add_option(1, dup)
    }
}

pub(crate) fn cases(seed: u64) -> Vec<Case> {
    vec![Case::new("matrix", seed, &[&[3, 5], &[3, 5]], |_, v| swiglu(&v[0], &v[1]))]
}
