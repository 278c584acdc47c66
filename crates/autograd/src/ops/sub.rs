//! Difference with broadcasting: `y = a - b`, so `da = dy` and `db = -dy`, summed where repeated.

use crate::error::Result;
use crate::gradcheck::Case;
use crate::tape::{Op, OutputGradients, Sink};
use crate::var::Var;
use stickbreak_tensor::{Shape, Tensor};

struct Sub {
    left: Shape,
    right: Shape,
}

impl<'t> Var<'t> {
    /// `self - other`, with broadcasting.
    pub fn sub(&self, other: &Var<'t>) -> Result<Var<'t>> {
        let value: Tensor = self.value.sub(&other.value)?;
        let op = Sub { left: self.shape().clone(), right: other.shape().clone() };
        let [y] = self.tape.record(op, &[self, other], [value]);
        Ok(y)
    }
}

impl Op for Sub {
    fn name(&self) -> &'static str {
        "sub"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        let dy = outputs.single();
        if sink.wants(0) {
            sink.add(0, dy.sum_to(&self.left)?)?;
        }
        if sink.wants(1) {
            sink.add(1, dy.sum_to(&self.right)?.affine(-1.0, 0.0)?)?;
        }
        Ok(())
    }
}

pub(crate) fn cases(seed: u64) -> Vec<Case> {
    vec![
        Case::new("same shape", seed, &[&[3, 4], &[3, 4]], |_, v| v[0].sub(&v[1])),
        Case::new("broadcast", seed, &[&[4], &[2, 3, 1]], |_, v| v[0].sub(&v[1])),
    ]
}
