//! Output projection and cross-entropy in one op: the sum over tokens of `-ln softmax(c h_t W^T)[label_t]` times a
//! constant. The gradients are computed chunk by chunk in the forward pass, where a chunk's logits are at hand, and only
//! scaled in the backward pass; the logits of all tokens never exist at once.

use crate::error::Result;
use crate::gradcheck::Case;
use crate::tape::{Op, OutputGradients, Sink};
use crate::var::Var;
use stickbreak_tensor::{Tensor, ops::nn};

struct LinearCrossEntropy {
    dhidden: Option<Tensor>,
    dweight: Option<Tensor>,
}

/// hidden `[T, C]`, weight `[V, C]`, labels i32 `[T]` (-100: not predicted, no loss). Returns the sum of the tokens'
/// losses in nats times `loss_scale` (one over the number of predicted tokens makes it the mean), as a scalar.
pub fn linear_cross_entropy<'t>(
    hidden: &Var<'t>,
    weight: &Var<'t>,
    labels: &Tensor,
    logit_scale: f64,
    loss_scale: f64,
) -> Result<Var<'t>> {
    let wanted = [hidden.is_tracked(), weight.is_tracked()];
    let result = nn::linear_cross_entropy(&hidden.value, &weight.value, labels, logit_scale, loss_scale, wanted)?;
    let value = result.losses.sum_all()?.affine(loss_scale, 0.0)?;
    let op = LinearCrossEntropy { dhidden: result.dhidden, dweight: result.dweight };
    let [loss] = hidden.tape.record(op, &[hidden, weight], [value]);
    Ok(loss)
}

impl Op for LinearCrossEntropy {
    fn name(&self) -> &'static str {
        "linear_cross_entropy"
    }

    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()> {
        let factor = outputs.single();
        for (input, gradient) in [self.dhidden, self.dweight].into_iter().enumerate() {
            if let Some(gradient) = gradient {
                // By a factor that stays on the device: nobody waits for it.
                gradient.scale_assign_by(&factor)?;
                sink.add(input, gradient)?;
            }
        }
        Ok(())
    }
}

pub(crate) fn cases(seed: u64) -> Vec<Case> {
    let labels = || Tensor::from_vec(vec![1i32, -100, 6, 0, 1], [5]).expect("five labels");
    vec![
        Case::new("ignored token", seed, &[&[5, 4], &[7, 4]], move |_, v| {
            linear_cross_entropy(&v[0], &v[1], &labels().to_device(v[0].value().device())?, 1.0, 0.25)
        }),
        Case::new("scaled logits", seed, &[&[5, 4], &[7, 4]], move |_, v| {
            linear_cross_entropy(&v[0], &v[1], &labels().to_device(v[0].value().device())?, 0.5, 1.0)?.scale(-2.0)
        }),
    ]
}
