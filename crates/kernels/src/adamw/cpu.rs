//! AdamW on the CPU.

use rayon::prelude::*;

use super::AdamW;
use crate::error::{KernelError, Result, check_len};
use crate::float::Float;
use crate::parallel::TASK;
use crate::simd::vectorize;

const OP: &str = "adamw";

/// Updates parameters and both moments in place.
///
/// # Errors
/// Slices of different lengths, or a step of 0.
pub fn step<T: Float>(
    spec: &AdamW,
    params: &mut [T],
    grads: &[T],
    first_moment: &mut [T],
    second_moment: &mut [T],
) -> Result<()> {
    check_len(OP, "grads", grads, params.len())?;
    check_len(OP, "first_moment", first_moment, params.len())?;
    check_len(OP, "second_moment", second_moment, params.len())?;
    if spec.step == 0 {
        return Err(KernelError::size(OP, "step", "at least 1", spec.step));
    }
    let steps = spec.step as f64;
    let scale = T::from_f64(spec.grad_scale);
    let keep = T::from_f64(1.0 - spec.learning_rate * spec.weight_decay);
    let (beta1, gain1) = (T::from_f64(spec.beta1), T::from_f64(1.0 - spec.beta1));
    let (beta2, gain2) = (T::from_f64(spec.beta2), T::from_f64(1.0 - spec.beta2));
    let rate = T::from_f64(spec.learning_rate / (1.0 - spec.beta1.powf(steps)));
    let correction = T::from_f64(1.0 / (1.0 - spec.beta2.powf(steps)).sqrt());
    let epsilon = T::from_f64(spec.epsilon);
    (
        params.par_chunks_mut(TASK),
        grads.par_chunks(TASK),
        first_moment.par_chunks_mut(TASK),
        second_moment.par_chunks_mut(TASK),
    )
        .into_par_iter()
        .for_each(|(params, grads, first_moment, second_moment)| {
            vectorize(
                #[inline(always)]
                || {
                    for (((p, &g), m), v) in params.iter_mut().zip(grads).zip(first_moment).zip(second_moment) {
                        let g = g * scale;
                        *m = beta1.mul_add(*m, gain1 * g);
                        *v = beta2.mul_add(*v, gain2 * g * g);
                        *p = *p * keep - rate * *m / v.sqrt().mul_add(correction, epsilon);
                    }
                },
            );
        });
    Ok(())
}
