//! Quotient with broadcasting: `y = a / b`, so `da = dy / b` and `db = -(dy / b) y`, summed where repeated.

use crate::error::Result;
use crate::gradcheck::Case;
use crate::tape::{Op, OutputGradients, Sink};
use crate::var::Var;
use stickbreak_tensor::{Shape, Tensor};

struct Div {
    left_shape: Shape,
    denominator: Tensor,
    quotient: Option<Tensor>,
}

impl<'t> Var<'t> {
    /// `self / other`, element by element, with broadcasting.
    pub fn div(&self, other: &Var<'t>) -> Result<Var<'t>> {
        let value = self.value.div(&other.value)?;
        let op = Div {
            left_shape: self.shape().clone(),
            denominator: other.value.clone(),
            quotient: other.is_tracked().then(|| value.clone()),
        };
        let [y] = self.tape.record(op, &[self, other], [value]);
        Ok(y)
    }
}

impl Op for Div {
    fn name(&self) -> &'static str {
        "div"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        let da = outputs.single().div(&self.denominator)?;
        if sink.wants(0) {
            sink.add(0, da.sum_to(&self.left_shape)?)?;
        }
        if let Some(quotient) = &self.quotient {
            sink.add(1, da.mul(quotient)?.sum_to(self.denominator.shape())?.affine(-1.0, 0.0)?)?;
        }
        Ok(())
    }
}

pub(crate) fn cases(seed: u64) -> Vec<Case> {
    let away_from_zero = |x: f64| x + x.signum();
    vec![
        Case::new("same shape", seed, &[&[3, 4], &[3, 4]], |_, v| v[0].div(&v[1])).map_inputs(away_from_zero),
        Case::new("broadcast", seed, &[&[4], &[2, 3, 1]], |_, v| v[0].div(&v[1])).map_inputs(away_from_zero),
    ]
}
