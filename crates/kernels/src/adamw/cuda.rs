//! AdamW on a CUDA device, with the clip factor and the decision to skip a bad step taken there.

use super::AdamW;
use crate::cuda::units::*;
use crate::cuda::{Arg, DeviceMut, DeviceRef, DeviceType, Queue, Source, check};
use crate::error::{KernelError, Result};

const OP: &str = "adamw";
const SOURCE: Source = source("adamw.cu", &[UNITS, include_str!("../../cuda/adamw.cu")]);

/// Sources of this op.
pub(crate) fn sources() -> Vec<Source> {
    vec![SOURCE]
}

/// What an update depends on that only the device knows. Scalars are one f32 each in device memory.
#[derive(Debug, Clone, Copy, Default)]
pub struct Guard<'a> {
    /// Sum of the squares of all gradients, before `grad_scale`. If it is not finite nothing is updated.
    pub sum_of_squares: Option<DeviceRef<'a>>,
    /// Largest norm of the scaled gradients: they are multiplied by `min(1, clip / (norm + 1e-6))`,
    /// `norm = |grad_scale| sqrt(sum_of_squares)`. 0 does not clip.
    pub clip: f64,
    /// Another number without which, if it is not finite, nothing is updated: the loss.
    pub finite: Option<DeviceRef<'a>>,
}

/// Updates parameters and both moments (f32) in place from gradients in f32 or bf16, and writes the parameters rounded to
/// bf16 to `copy`.
///
/// # Errors
/// Memory of different lengths or types, a step of 0, or a clip without a sum of squares.
pub fn step(
    queue: &Queue,
    spec: &AdamW,
    guard: &Guard<'_>,
    params: &mut DeviceMut<'_>,
    grads: DeviceRef<'_>,
    first_moment: &mut DeviceMut<'_>,
    second_moment: &mut DeviceMut<'_>,
    copy: Option<&mut DeviceMut<'_>>,
) -> Result<()> {
    let total = params.len();
    check_type(OP, "params", params.dtype(), F32)?;
    check(OP, "grads", (grads.len(), grads.dtype()), total, FLOATS)?;
    check(OP, "first_moment", (first_moment.len(), first_moment.dtype()), total, F32)?;
    check(OP, "second_moment", (second_moment.len(), second_moment.dtype()), total, F32)?;
    if let Some(copy) = &copy {
        check(OP, "copy", (copy.len(), copy.dtype()), total, &[DeviceType::Bf16])?;
    }
    for scalar in [guard.sum_of_squares, guard.finite].into_iter().flatten() {
        check(OP, "a scalar of the guard", (scalar.len(), scalar.dtype()), 1, F32)?;
    }
    if guard.clip != 0.0 && guard.sum_of_squares.is_none() {
        return Err(KernelError::size(OP, "clip", "0 without a sum of squares", guard.clip));
    }
    if spec.step == 0 {
        return Err(KernelError::size(OP, "step", "at least 1", spec.step));
    }
    let steps = spec.step as f64;
    let constants = [
        guard.clip,
        spec.grad_scale,
        1.0 - spec.learning_rate * spec.weight_decay,
        spec.beta1,
        1.0 - spec.beta1,
        spec.beta2,
        1.0 - spec.beta2,
        spec.learning_rate / (1.0 - spec.beta1.powf(steps)),
        1.0 / (1.0 - spec.beta2.powf(steps)).sqrt(),
        spec.epsilon,
    ];
    let operands = [
        Some(params.as_ref()),
        Some(grads),
        Some(first_moment.as_ref()),
        Some(second_moment.as_ref()),
        copy.as_ref().map(|copy| copy.as_ref()),
    ];
    let units = vectorized(total, 4, &operands);
    let kernel = queue.gpu().kernel(&SOURCE, by_type!(grads.dtype(), "adamw_step"))?;
    let mut arguments: Vec<Arg> = vec![
        params.into(),
        grads.into(),
        first_moment.into(),
        second_moment.into(),
        Arg::optional_mut(copy),
        (total as u64).into(),
        units.into(),
        Arg::optional(guard.sum_of_squares),
        Arg::optional(guard.finite),
    ];
    arguments.extend(constants.map(|x| Arg::from(x as f32)));
    queue.launch(&kernel, flat_launch(queue, total, 4), &arguments)
}
