//! Causal softmax attention, the baseline: `A = softmax over j <= i of (scale q_i.k_j - slope (i - j))`, `o = A v`;
//! `dz_ij = A_ij (do_i.v_j - do_i.o_i)`. Saves its inputs, its output and one logarithm a row; the weights are computed
//! again in the backward pass (arXiv 2205.14135).

use crate::error::Result;
use crate::gradcheck::Case;
use crate::tape::{Op, OutputGradients, Sink};
use crate::var::Var;
use stickbreak_tensor::Tensor;
use stickbreak_tensor::ops::attention::{self, SoftmaxSettings};

struct SoftmaxAttention {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    log_sum_exp: Tensor,
    cu_seqlens: Vec<i32>,
    settings: SoftmaxSettings,
}

/// q `[T, Hq, D]`, k and v `[T, Hkv, D]`, packed documents by `cu_seqlens`; output `[T, Hq, D]`.
pub fn softmax_attention<'t>(
    q: &Var<'t>,
    k: &Var<'t>,
    v: &Var<'t>,
    cu_seqlens: &[i32],
    settings: &SoftmaxSettings,
) -> Result<Var<'t>> {
    let (value, log_sum_exp) = attention::softmax(&q.value, &k.value, &v.value, cu_seqlens, settings)?;
    let op = SoftmaxAttention {
        q: q.value.clone(),
        k: k.value.clone(),
        v: v.value.clone(),
        o: value.clone(),
        log_sum_exp,
        cu_seqlens: cu_seqlens.to_vec(),
        settings: settings.clone(),
    };
    let [o] = q.tape.record(op, &[q, k, v], [value]);
    Ok(o)
}

impl Op for SoftmaxAttention {
    fn name(&self) -> &'static str {
        "softmax_attention"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        let (qkv, saved) = ([&self.q, &self.k, &self.v], (&self.o, &self.log_sum_exp));
        let gradients = attention::softmax_backward(qkv, &self.cu_seqlens, &self.settings, saved, &outputs.single())?;
        for (input, gradient) in gradients.into_iter().enumerate() {
            sink.add(input, gradient)?;
        }
        Ok(())
    }
}

pub(crate) fn cases(seed: u64) -> Vec<Case> {
    let case = |name: &str, heads: [usize; 2], alibi: bool| {
        let (q, kv): ([usize; 3], [usize; 3]) = ([7, heads[0], 16], [7, heads[1], 16]);
        let alibi_slopes = alibi.then(|| attention::alibi_slopes(heads[0]));
        let settings = SoftmaxSettings { scale: 0.25, alibi_slopes };
        Case::new(name, seed, &[&q, &kv, &kv], move |_, x| {
            softmax_attention(&x[0], &x[1], &x[2], &[0, 3, 3, 7], &settings)
        })
    };
    vec![
        case("packed documents", [2, 2], false),
        case("grouped queries", [4, 2], false),
        case("linear biases", [3, 1], true),
    ]
}
