//! Product with broadcasting: `y = a b`, so `da = dy b` and `db = dy a`, summed where repeated. Each factor is
//! saved only if the other one needs a gradient.

use crate::error::Result;
use crate::gradcheck::Case;
use crate::tape::{Op, OutputGradients, Sink};
use crate::var::Var;
use stickbreak_tensor::{Shape, Tensor};

struct Mul {
    left_shape: Shape,
    right_shape: Shape,
    left: Option<Tensor>,
    right: Option<Tensor>,
}

impl<'t> Var<'t> {
    /// `self * other`, element by element, with broadcasting.
    pub fn mul(&self, other: &Var<'t>) -> Result<Var<'t>> {
        let value = self.value.mul(&other.value)?;
        let op = Mul {
            left_shape: self.shape().clone(),
            right_shape: other.shape().clone(),
            left: other.is_tracked().then(|| self.value.clone()),
            right: self.is_tracked().then(|| other.value.clone()),
        };
        let [y] = self.tape.record(op, &[self, other], [value]);
        Ok(y)
    }
}

impl Op for Mul {
    fn name(&self) -> &'static str {
        "mul"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        let dy = outputs.single();
        if let Some(right) = &self.right {
            sink.add(0, dy.mul(right)?.sum_to(&self.left_shape)?)?;
        }
        if let Some(left) = &self.left {
            sink.add(1, dy.mul(left)?.sum_to(&self.right_shape)?)?;
        }
        Ok(())
    }
}

pub(crate) fn cases(seed: u64) -> Vec<Case> {
    vec![
        Case::new("same shape", seed, &[&[3, 4], &[3, 4]], |_, v| v[0].mul(&v[1])),
        Case::new("broadcast", seed, &[&[2, 3, 1], &[3, 4]], |_, v| v[0].mul(&v[1])),
        Case::new("square", seed, &[&[7]], |_, v| v[0].mul(&v[0])),
    ]
}
