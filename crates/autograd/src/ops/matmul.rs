//! Matrix product over the last two dimensions: `C = A B`, so `dA = dC B^T` and `dB = A^T dC`, summed over broadcast
//! leading dimensions. Each factor is saved only if the other one needs a gradient.

use crate::error::Result;
use crate::gradcheck::Case;
use crate::tape::{Op, OutputGradients, Sink};
use crate::var::Var;
use stickbreak_tensor::{Shape, Tensor};

struct Matmul {
    left_shape: Shape,
    right_shape: Shape,
    left: Option<Tensor>,
    right: Option<Tensor>,
}

impl<'t> Var<'t> {
    /// `[.., m, k] x [.., k, n] -> [.., m, n]`, leading dimensions broadcast.
    pub fn matmul(&self, other: &Var<'t>) -> Result<Var<'t>> {
        let value = self.value.matmul(&other.value)?;
        let op = Matmul {
            left_shape: self.shape().clone(),
            right_shape: other.shape().clone(),
            left: other.is_tracked().then(|| self.value.clone()),
            right: self.is_tracked().then(|| other.value.clone()),
        };
        let [y] = self.tape.record(op, &[self, other], [value]);
        Ok(y)
    }
}

fn transposed(matrix: &Tensor) -> Result<Tensor> {
    Ok(matrix.transpose(matrix.rank() - 2, matrix.rank() - 1)?)
}

impl Op for Matmul {
    fn name(&self) -> &'static str {
        "matmul"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        let dc = outputs.single();
        if let Some(right) = &self.right {
            sink.add(0, dc.matmul(&transposed(right)?)?.sum_to(&self.left_shape)?)?;
        }
        if let Some(left) = &self.left {
            sink.add(1, transposed(left)?.matmul(&dc)?.sum_to(&self.right_shape)?)?;
        }
        Ok(())
    }
}

pub(crate) fn cases(seed: u64) -> Vec<Case> {
    vec![
        Case::new("matrices", seed, &[&[3, 4], &[4, 2]], |_, v| v[0].matmul(&v[1])),
        Case::new("a transposed factor", seed, &[&[4, 3], &[4, 2]], |_, v| v[0].transpose(0, 1)?.matmul(&v[1])),
        Case::new("batched", seed, &[&[2, 3, 4], &[2, 4, 2]], |_, v| v[0].matmul(&v[1])),
        Case::new("broadcast batch", seed, &[&[2, 1, 3, 4], &[3, 4, 2]], |_, v| v[0].matmul(&v[1])),
        Case::new("one matrix for a batch", seed, &[&[2, 3, 4], &[4, 5]], |_, v| v[0].matmul(&v[1])),
    ]
}
