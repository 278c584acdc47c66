//! Rows of a table by index: `y_t = E[id_t]`, so `dE[v]` is the sum of `dy_t` over the tokens with `id_t = v`, added in
//! token order.

use crate::error::Result;
use crate::gradcheck::Case;
use crate::tape::{Op, OutputGradients, Sink};
use crate::var::Var;
use stickbreak_tensor::{Tensor, ops::nn};

struct Embedding {
    ids: Tensor,
}

/// ids u32 `[T]`, table `[V, C]`; output `[T, C]`.
pub fn embedding<'t>(ids: &Tensor, table: &Var<'t>) -> Result<Var<'t>> {
    let value = nn::embedding(ids, &table.value)?;
    let [y] = table.tape.record(Embedding { ids: ids.clone() }, &[table], [value]);
    Ok(y)
}

impl Op for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        let buffer = sink.buffer(0)?;
        if buffer.is_new {
            buffer.tensor.fill_assign(0.0)?;
        }
        Ok(nn::embedding_backward_into(&self.ids, &outputs.single(), &buffer.tensor)?)
    }
}

pub(crate) fn cases(seed: u64) -> Vec<Case> {
    let ids = || Tensor::from_vec(vec![3u32, 0, 3, 3, 1], [5]).expect("five ids");
    vec![
        Case::new("repeated and unused ids", seed, &[&[5, 3]], move |_, v| {
            embedding(&ids().to_device(v[0].value().device())?, &v[0])
        }),
        Case::new("table used twice (tied)", seed, &[&[5, 3]], move |_, v| {
            super::linear(&embedding(&ids().to_device(v[0].value().device())?, &v[0])?, &v[0])
        }),
    ]
}
