//! Reordered dimensions; the gradient is permuted back. Views on both sides: nothing is copied.

use crate::error::Result;
use crate::gradcheck::Case;
use crate::tape::{Op, OutputGradients, Sink};
use crate::var::Var;
use stickbreak_tensor::Tensor;

struct Permute {
    inverse: Vec<usize>,
}

impl<'t> Var<'t> {
    /// Dimension `d` of the result is dimension `order[d]` of this one.
    pub fn permute(&self, order: &[usize]) -> Result<Var<'t>> {
        let value: Tensor = self.value.permute(order)?;
        let mut inverse = vec![0; order.len()];
        for (to, &from) in order.iter().enumerate() {
            inverse[from] = to;
        }
        let [y] = self.tape.record(Permute { inverse }, &[self], [value]);
        Ok(y)
    }

    /// Swaps two dimensions.
    pub fn transpose(&self, a: usize, b: usize) -> Result<Var<'t>> {
        self.value.dim(a)?;
        self.value.dim(b)?;
        let mut order: Vec<usize> = (0..self.value.rank()).collect();
        order.swap(a, b);
        self.permute(&order)
    }
}

impl Op for Permute {
    fn name(&self) -> &'static str {
        "permute"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        sink.add(0, outputs.single().permute(&self.inverse)?)
    }
}

pub(crate) fn cases(seed: u64) -> Vec<Case> {
    vec![
        Case::new("rotate three dimensions", seed, &[&[2, 3, 4]], |_, v| v[0].permute(&[1, 2, 0])),
        Case::new("transpose", seed, &[&[3, 4]], |_, v| v[0].transpose(0, 1)),
    ]
}
