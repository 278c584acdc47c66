//! Sum with broadcasting: `y = a + b`, so `da = dy` and `db = dy`, each summed over the dimensions it was repeated in.

use crate::error::Result;
use crate::gradcheck::Case;
use crate::tape::{Op, OutputGradients, Sink};
use crate::var::Var;
use stickbreak_tensor::{Shape, Tensor};

struct Add {
    left: Shape,
    right: Shape,
}

impl<'t> Var<'t> {
    /// `self + other`, with broadcasting.
    pub fn add(&self, other: &Var<'t>) -> Result<Var<'t>> {
        let value: Tensor = self.value.add(&other.value)?;
        let op = Add { left: self.shape().clone(), right: other.shape().clone() };
        let [y] = self.tape.record(op, &[self, other], [value]);
        Ok(y)
    }
}

impl Op for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        let dy = outputs.single();
        if sink.wants(0) {
            sink.add(0, dy.sum_to(&self.left)?)?;
        }
        if sink.wants(1) {
            sink.add(1, dy.sum_to(&self.right)?)?;
        }
        Ok(())
    }
}

pub(crate) fn cases(seed: u64) -> Vec<Case> {
    vec![
        Case::new("same shape", seed, &[&[3, 4], &[3, 4]], |_, v| v[0].add(&v[1])),
        Case::new("broadcast both ways", seed, &[&[2, 1, 4], &[3, 1]], |_, v| v[0].add(&v[1])),
        Case::new("a value added to itself", seed, &[&[5]], |_, v| v[0].add(&v[0])?.add(&v[0])),
    ]
}
