//! Repetition along dimensions of size 1 (and new leading ones); the gradient is summed over the repeats.

use crate::error::Result;
use crate::gradcheck::Case;
use crate::tape::{Op, OutputGradients, Sink};
use crate::var::Var;
use stickbreak_tensor::{Shape, Tensor};

struct BroadcastTo {
    input: Shape,
}

impl<'t> Var<'t> {
    /// Repeats dimensions of size 1 and new leading ones to fill `shape`, without a copy.
    pub fn broadcast_to(&self, shape: impl Into<Shape>) -> Result<Var<'t>> {
        let value: Tensor = self.value.broadcast_to(shape)?;
        let [y] = self.tape.record(BroadcastTo { input: self.shape().clone() }, &[self], [value]);
        Ok(y)
    }
}

impl Op for BroadcastTo {
    fn name(&self) -> &'static str {
        "broadcast_to"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        sink.add(0, outputs.single().sum_to(&self.input)?)
    }
}

pub(crate) fn cases(seed: u64) -> Vec<Case> {
    vec![
        Case::new("an inner dimension", seed, &[&[3, 1, 2]], |_, v| v[0].broadcast_to([3, 4, 2])),
        Case::new("a new leading dimension", seed, &[&[3]], |_, v| v[0].broadcast_to([2, 3])),
    ]
}
