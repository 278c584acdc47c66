//! Stick-breaking attention (arXiv 2410.17980). With `z_ij = scale q_i.k_j` and `b = sigmoid(z)`, newest key first:
//! `A_ij = b_ij prod_{j<k<i} (1 - b_ik)`, `o_i = sum_j A_ij v_j`, `rem_i = prod_j (1 - b_ij)`. Its gradients, with
//! `a_ij = A_ij do_i.v_j`: `dz_ij = (1 - b_ij) a_ij - b_ij (sum over older l of a_il + drem_i rem_i)`.
//! Saves its inputs and one number per query tile; every weight is computed again in the backward pass.

use crate::error::Result;
use crate::gradcheck::Case;
use crate::tape::{Op, OutputGradients, Sink};
use crate::var::Var;
use std::sync::Arc;

use stickbreak_tensor::Tensor;
use stickbreak_tensor::ops::attention::{self, StickBreakingSaved, StickBreakingSettings, StickBreakingWanted};

struct StickBreakingAttention {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Vec<i32>,
    settings: StickBreakingSettings,
    saved: Arc<StickBreakingSaved>,
}

/// What [`stick_breaking_attention`] returns.
pub struct StickBreakingOutput<'t> {
    /// Output, `[T, Hq, D]`.
    pub o: Var<'t>,
    /// What is left of each query's stick, `[T, Hq]`; differentiable.
    pub rem: Var<'t>,
    /// How much of the keys was visited.
    pub saved: Arc<StickBreakingSaved>,
}

/// q `[T, Hq, D]`, k and v `[T, Hkv, D]`, packed documents by `cu_seqlens`.
pub fn stick_breaking_attention<'t>(
    q: &Var<'t>,
    k: &Var<'t>,
    v: &Var<'t>,
    cu_seqlens: &[i32],
    settings: StickBreakingSettings,
) -> Result<StickBreakingOutput<'t>> {
    let wanted = StickBreakingWanted { log2_rem: false, backward: [q, k, v].iter().any(|v| v.is_tracked()) };
    let result = attention::stick_breaking(&q.value, &k.value, &v.value, cu_seqlens, settings, wanted)?;
    let op = StickBreakingAttention {
        q: q.value.clone(),
        k: k.value.clone(),
        v: v.value.clone(),
        cu_seqlens: cu_seqlens.to_vec(),
        settings,
        saved: Arc::clone(&result.saved),
    };
    // The kernel gives the remainder in float32 whatever the type of q; what is computed from it is of q's type.
    let rem = result.rem.to_dtype(q.value.dtype())?;
    let [o, rem] = q.tape.record(op, &[q, k, v], [result.o, rem]);
    Ok(StickBreakingOutput { o, rem, saved: result.saved })
}

impl Op for StickBreakingAttention {
    fn name(&self) -> &'static str {
        "stick_breaking_attention"
    }

    fn backward(self: Box<Self>, mut outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        let d_o = match outputs.take(0) {
            Some(gradient) => gradient,
            None => Tensor::zeros_on(self.q.shape(), self.q.dtype(), self.q.device())?,
        };
        let drem = outputs
            .take(1)
            .map(|gradient| gradient.to_dtype(StickBreakingSaved::remainder_type(self.q.dtype())))
            .transpose()?;
        let gradients = attention::stick_breaking_backward(
            &self.q,
            &self.k,
            &self.v,
            &self.cu_seqlens,
            self.settings,
            &self.saved,
            &d_o,
            drem.as_ref(),
        )?;
        for (input, gradient) in gradients.into_iter().enumerate() {
            sink.add(input, gradient)?;
        }
        Ok(())
    }
}

pub(crate) fn cases(seed: u64) -> Vec<Case> {
    let settings = |attend_current| StickBreakingSettings { scale: 0.3, attend_current, early_exit_bits: 0 };
    let case = |name: &str, heads: [usize; 2], current: bool, use_o: bool, use_rem: bool| {
        let (q, kv): ([usize; 3], [usize; 3]) = ([7, heads[0], 16], [7, heads[1], 16]);
        Case::new(name, seed, &[&q, &kv, &kv], move |_, x| {
            let out = stick_breaking_attention(&x[0], &x[1], &x[2], &[0, 3, 3, 7], settings(current))?;
            let rem = out.rem.reshape([7, heads[0], 1])?;
            match (use_o, use_rem) {
                (true, true) => out.o.add(&rem),
                (true, false) => Ok(out.o),
                _ => Ok(rem),
            }
        })
    };
    vec![
        case("packed documents", [2, 2], false, true, true),
        case("grouped queries", [4, 2], false, true, true),
        case("attend to the current token", [2, 1], true, true, true),
        case("output alone", [1, 1], false, true, false),
        case("remainder alone", [2, 2], false, false, true),
    ]
}
