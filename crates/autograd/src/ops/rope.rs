//! Rotary position embedding (arXiv 2104.09864): a rotation by an angle that grows with the position, so the gradient is
//! rotated back. Nothing but the positions is saved.

use crate::error::Result;
use crate::gradcheck::Case;
use crate::tape::{Op, OutputGradients, Sink};
use crate::var::Var;
use stickbreak_tensor::{Tensor, ops::nn};

struct Rope {
    positions: Tensor,
    theta: f64,
}

/// x `[T, H, D]`, positions u32 `[T]`; dimension d is paired with d + D/2.
pub fn rope<'t>(x: &Var<'t>, positions: &Tensor, theta: f64) -> Result<Var<'t>> {
    let value = nn::rope(&x.value, positions, theta, false)?;
    let [y] = x.tape.record(Rope { positions: positions.clone(), theta }, &[x], [value]);
    Ok(y)
}

impl Op for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        sink.add(0, nn::rope(&outputs.single(), &self.positions, self.theta, true)?)
    }
}

pub(crate) fn cases(seed: u64) -> Vec<Case> {
    let positions = || Tensor::from_vec(vec![0u32, 1, 2, 0, 1000], [5]).expect("five positions");
    vec![Case::new("two documents", seed, &[&[5, 2, 6]], move |_, v| {
        rope(&v[0], &positions().to_device(v[0].value().device())?, 10_000.0)
    })]
}
