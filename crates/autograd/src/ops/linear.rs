//! Projection without bias: `y = x W^T`, so `dx = dy W` and `dW = dy^T x`. Both products are accumulated in place
//! (beta = 1), the weight's straight into the arena.

use crate::error::Result;
use crate::gradcheck::Case;
use crate::tape::{Op, OutputGradients, Sink};
use crate::var::Var;
use stickbreak_tensor::Tensor;

struct Linear {
    input: Option<Tensor>,
    weight: Option<Tensor>,
}

/// x `[T, in]`, weight `[out, in]`; output `[T, out]`.
pub fn linear<'t>(x: &Var<'t>, weight: &Var<'t>) -> Result<Var<'t>> {
    let value = x.value.matmul(&weight.value.transpose(0, 1)?)?;
    let op = Linear {
        input: weight.is_tracked().then(|| x.value.clone()),
        weight: x.is_tracked().then(|| weight.value.clone()),
    };
    let [y] = x.tape.record(op, &[x, weight], [value]);
    Ok(y)
}

impl Op for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        let dy = outputs.single();
        if let Some(weight) = &self.weight {
            sink.add_matmul(0, &dy, weight)?;
        }
        if let Some(input) = &self.input {
            sink.add_matmul(1, &dy.transpose(0, 1)?, input)?;
        }
        Ok(())
    }
}

pub(crate) fn cases(seed: u64) -> Vec<Case> {
    vec![
        Case::new("projection", seed, &[&[5, 4], &[3, 4]], |_, v| linear(&v[0], &v[1])),
        Case::new("three projections of one input", seed, &[&[5, 4], &[3, 4], &[3, 4]], |_, v| {
            let (a, b) = (linear(&v[0], &v[1])?, linear(&v[0], &v[2])?);
            a.mul(&b)?.add(&linear(&v[0], &v[1])?)
        }),
    ]
}
