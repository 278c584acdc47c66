//! Sum over dimensions, which stay as size 1: every summed element gets the gradient of its sum.

use crate::error::Result;
use crate::gradcheck::Case;
use crate::tape::{Op, OutputGradients, Sink};
use crate::var::Var;
use stickbreak_tensor::{Shape, Tensor};

struct Sum {
    input: Shape,
}

impl<'t> Var<'t> {
    /// Sum over the given dimensions, which stay as size 1.
    pub fn sum(&self, axes: &[usize]) -> Result<Var<'t>> {
        let value: Tensor = self.value.sum(axes)?;
        let [y] = self.tape.record(Sum { input: self.shape().clone() }, &[self], [value]);
        Ok(y)
    }

    /// Sum of all elements, as a scalar.
    pub fn sum_all(&self) -> Result<Var<'t>> {
        self.sum(&(0..self.value.rank()).collect::<Vec<_>>())?.reshape([])
    }

    /// Mean of all elements, as a scalar.
    pub fn mean_all(&self) -> Result<Var<'t>> {
        self.sum_all()?.scale(1.0 / self.value.elements() as f64)
    }
}

impl Op for Sum {
    fn name(&self) -> &'static str {
        "sum"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        sink.add(0, outputs.single().broadcast_to(&self.input)?)
    }
}

pub(crate) fn cases(seed: u64) -> Vec<Case> {
    vec![
        Case::new("inner dimension", seed, &[&[2, 3, 4]], |_, v| v[0].sum(&[1])),
        Case::new("two dimensions", seed, &[&[2, 3, 4]], |_, v| v[0].sum(&[0, 2])),
        Case::new("mean of the squares", seed, &[&[3, 4]], |_, v| v[0].mul(&v[0])?.mean_all()),
    ]
}
