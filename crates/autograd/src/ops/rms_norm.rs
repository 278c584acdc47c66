//! Root-mean-square norm (arXiv 1910.07467): `y = x r w` with `r = 1 / sqrt(mean(x^2) + epsilon)`; with `g = dy w`:
//! `dx = r (g - x r^2 mean(g x))` and `dw = sum over rows of dy x r`. Saves r, one number a row, beside its inputs.

use crate::error::Result;
use crate::gradcheck::Case;
use crate::tape::{Op, OutputGradients, Sink};
use crate::var::Var;
use stickbreak_tensor::{Tensor, ops::nn};

struct RmsNorm {
    x: Tensor,
    weight: Tensor,
    inverse_rms: Tensor,
    epsilon: f64,
}

/// Norm over the last dimension: x `[.., C]`, weight `[C]`.
pub fn rms_norm<'t>(x: &Var<'t>, weight: &Var<'t>, epsilon: f64) -> Result<Var<'t>> {
    let (value, inverse_rms) = nn::rms_norm(&x.value, &weight.value, epsilon)?;
    let op = RmsNorm { x: x.value.clone(), weight: weight.value.clone(), inverse_rms, epsilon };
    let [y] = x.tape.record(op, &[x, weight], [value]);
    Ok(y)
}

impl Op for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        let dy = outputs.single();
        let Self { x, weight, inverse_rms, epsilon } = *self;
        let [dx, dweight] = nn::rms_norm_backward(&x, &weight, &inverse_rms, epsilon, &dy, sink.wanted())?;
        sink.add_option(0, dx)?;
        sink.add_option(1, dweight)
    }
}

pub(crate) fn cases(seed: u64) -> Vec<Case> {
    vec![
        Case::new("rows", seed, &[&[5, 8], &[8]], |_, v| rms_norm(&v[0], &v[1], 1e-5)),
        Case::new("three dimensions, wide epsilon", seed, &[&[2, 3, 7], &[7]], |_, v| rms_norm(&v[0], &v[1], 0.1)),
    ]
}
