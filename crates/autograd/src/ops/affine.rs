//! A constant factor and shift: `y = scale x + shift`, so `dx = scale dy`.

use crate::error::Result;
use crate::gradcheck::Case;
use crate::tape::{Op, OutputGradients, Sink};
use crate::var::Var;

struct Affine {
    scale: f64,
}

impl<'t> Var<'t> {
    /// `scale * self + shift`.
    pub fn affine(&self, scale: f64, shift: f64) -> Result<Var<'t>> {
        let [y] = self.tape.record(Affine { scale }, &[self], [self.value.affine(scale, shift)?]);
        Ok(y)
    }

    /// `factor * self`.
    pub fn scale(&self, factor: f64) -> Result<Var<'t>> {
        self.affine(factor, 0.0)
    }
}

impl Op for Affine {
    fn name(&self) -> &'static str {
        "affine"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        sink.add(0, outputs.single().affine(self.scale, 0.0)?)
    }
}

pub(crate) fn cases(seed: u64) -> Vec<Case> {
    vec![Case::new("scale and shift", seed, &[&[3, 4]], |_, v| v[0].affine(-2.5, 0.3))]
}
