//! Fused linear layer and cross-entropy on the CPU.

use rayon::prelude::*;

use super::{IGNORE_INDEX, LinearCrossEntropySpec};
use crate::error::{KernelError, Result, check_len};
use crate::float::Float;
use crate::matmul::cpu::matmul;
use crate::matmul::{MatmulSpec, MatrixStrides};
use crate::parallel::{max_of, rows_per_task, sum_by};
use crate::simd::vectorize;

const OP: &str = "linear_cross_entropy";

/// Writes the loss of every token and the gradients that are asked for.
///
/// # Errors
/// A label that is neither [`IGNORE_INDEX`] nor a class, a `chunk` of 0, or a slice whose length is not that of the spec.
pub fn forward<T: Float>(
    spec: &LinearCrossEntropySpec,
    hidden: &[T],
    weight: &[T],
    labels: &[i32],
    loss: &mut [T],
    mut dhidden: Option<&mut [T]>,
    mut dweight: Option<&mut [T]>,
) -> Result<()> {
    let LinearCrossEntropySpec { tokens, width, vocabulary, logit_scale, chunk } = *spec;
    check_len(OP, "hidden", hidden, tokens.saturating_mul(width))?;
    check_len(OP, "weight", weight, vocabulary.saturating_mul(width))?;
    check_len(OP, "labels", labels, tokens)?;
    check_len(OP, "loss", loss, tokens)?;
    if let Some(dhidden) = &dhidden {
        check_len(OP, "dhidden", dhidden, tokens.saturating_mul(width))?;
    }
    if let Some(dweight) = &dweight {
        check_len(OP, "dweight", dweight, vocabulary.saturating_mul(width))?;
    }
    if chunk == 0 {
        return Err(KernelError::size(OP, "chunk", "at least 1", chunk));
    }
    let is_class = |label: i32| usize::try_from(label).is_ok_and(|label| label < vocabulary);
    if let Some(position) = labels.iter().position(|&label| label != IGNORE_INDEX && !is_class(label)) {
        return Err(KernelError::Index {
            op: OP,
            what: "labels",
            position,
            value: i64::from(labels[position]),
            allowed: format!("{IGNORE_INDEX} or below the vocabulary of {vocabulary}"),
        });
    }
    if tokens == 0 || vocabulary == 0 {
        // Without a class every label is ignored.
        loss.fill(T::ZERO);
        dhidden.into_iter().chain(dweight).for_each(|gradient| gradient.fill(T::ZERO));
        return Ok(());
    }

    let wants_gradient = dhidden.is_some() || dweight.is_some();
    let scale = T::from_f64(logit_scale);
    let mut buffer = vec![T::ZERO; chunk.min(tokens) * vocabulary];
    let mut dweight_kept = T::ZERO;
    for start in (0..tokens).step_by(chunk) {
        let rows = chunk.min(tokens - start);
        let hidden = &hidden[start * width..(start + rows) * width];
        let logits = &mut buffer[..rows * vocabulary];
        let row_major = MatrixStrides::row_major;

        let product = MatmulSpec {
            batch: 1,
            m: rows,
            n: vocabulary,
            k: width,
            a: row_major(rows, width),
            b: row_major(vocabulary, width).transposed(),
            c: row_major(rows, vocabulary),
        };
        matmul(&product, scale, hidden, weight, T::ZERO, logits)?;

        let block = rows_per_task(vocabulary);
        (
            logits.par_chunks_mut(block * vocabulary),
            labels[start..start + rows].par_chunks(block),
            loss[start..start + rows].par_chunks_mut(block),
        )
            .into_par_iter()
            .for_each(|(logits, labels, loss)| {
                vectorize(
                    #[inline(always)]
                    || {
                        for ((logits, &label), loss) in logits.chunks_exact_mut(vocabulary).zip(labels).zip(loss) {
                            *loss = if label == IGNORE_INDEX {
                                logits.fill(T::ZERO);
                                T::ZERO
                            } else if wants_gradient {
                                loss_and_gradient(logits, label as usize)
                            } else {
                                loss_of(logits, label as usize)
                            };
                        }
                    },
                );
            });
        let dlogits = &*logits;

        if let Some(dhidden) = &mut dhidden {
            let product = MatmulSpec {
                batch: 1,
                m: rows,
                n: width,
                k: vocabulary,
                a: row_major(rows, vocabulary),
                b: row_major(vocabulary, width),
                c: row_major(rows, width),
            };
            let dhidden = &mut dhidden[start * width..(start + rows) * width];
            matmul(&product, scale, dlogits, weight, T::ZERO, dhidden)?;
        }
        if let Some(dweight) = &mut dweight {
            let product = MatmulSpec {
                batch: 1,
                m: vocabulary,
                n: width,
                k: rows,
                a: row_major(rows, vocabulary).transposed(),
                b: row_major(rows, width),
                c: row_major(vocabulary, width),
            };
            matmul(&product, scale, dlogits, hidden, dweight_kept, dweight)?;
            dweight_kept = T::ONE;
        }
    }
    Ok(())
}

/// `-ln softmax(logits)[label]`.
#[inline(always)]
fn loss_of<T: Float>(logits: &[T], label: usize) -> T {
    let largest = max_of(logits);
    let sum = sum_by(
        logits,
        #[inline(always)]
        |logit| (logit - largest).exp(),
    );
    sum.ln() + (largest - logits[label])
}

/// `-ln softmax(logits)[label]`; leaves `softmax(logits) - onehot(label)` in `logits`.
#[inline(always)]
fn loss_and_gradient<T: Float>(logits: &mut [T], label: usize) -> T {
    let largest = max_of(logits);
    let margin = largest - logits[label];
    for logit in logits.iter_mut() {
        *logit = (*logit - largest).exp();
    }
    let sum = sum_by(logits, |weight| weight);
    let inverse = T::ONE / sum;
    for weight in logits.iter_mut() {
        *weight *= inverse;
    }
    logits[label] -= T::ONE;
    sum.ln() + margin
}
