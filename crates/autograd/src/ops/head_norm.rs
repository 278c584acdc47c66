//! GroupNorm with one group a head (arXiv 1803.08494): per token and head `y = (x - mean) s w + b` with
//! `s = 1 / sqrt(var + epsilon)`, biased variance over the head's D entries. Saves mean and s beside its inputs.

use crate::error::Result;
use crate::gradcheck::Case;
use crate::tape::{Op, OutputGradients, Sink};
use crate::var::Var;
use stickbreak_tensor::{Tensor, ops::nn};

struct HeadNorm {
    x: Tensor,
    weight: Tensor,
    saved: nn::HeadNormSaved,
    epsilon: f64,
}

/// x `[T, H, D]`, weight and bias `[H * D]`.
pub fn head_norm<'t>(x: &Var<'t>, weight: &Var<'t>, bias: &Var<'t>, epsilon: f64) -> Result<Var<'t>> {
    let (value, saved) = nn::head_norm(&x.value, &weight.value, &bias.value, epsilon)?;
    let op = HeadNorm { x: x.value.clone(), weight: weight.value.clone(), saved, epsilon };
    let [y] = x.tape.record(op, &[x, weight, bias], [value]);
    Ok(y)
}

impl Op for HeadNorm {
    fn name(&self) -> &'static str {
        "head_norm"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        let dy = outputs.single();
        let [dx, dweight, dbias] =
            nn::head_norm_backward(&self.x, &self.weight, &self.saved, self.epsilon, &dy, sink.wanted())?;
        sink.add_option(0, dx)?;
        sink.add_option(1, dweight)?;
        sink.add_option(2, dbias)
    }
}

pub(crate) fn cases(seed: u64) -> Vec<Case> {
    vec![
        Case::new("two heads", seed, &[&[3, 2, 5], &[10], &[10]], |_, v| head_norm(&v[0], &v[1], &v[2], 1e-5)),
        Case::new("one head of 4", seed, &[&[2, 1, 4], &[4], &[4]], |_, v| head_norm(&v[0], &v[1], &v[2], 1e-2)),
    ]
}
