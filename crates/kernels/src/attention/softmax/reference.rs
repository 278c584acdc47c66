//! Dense softmax attention that reads like the formula. For tests and gradient checks.

use super::SoftmaxSpec;
use crate::attention::AttentionInputs;
use crate::{Float, Result};

const OP: &str = "softmax attention (dense)";

/// Output of the dense forward pass, contiguous.
#[derive(Debug, Clone, PartialEq)]
pub struct DenseOutput<T> {
    /// `[tokens, query_heads, head_dim]`
    pub o: Vec<T>,
    /// `[tokens, query_heads]`
    pub logsumexp: Vec<T>,
}

/// Gradients of the dense backward pass, contiguous.
#[derive(Debug, Clone, PartialEq)]
pub struct DenseGradients<T> {
    /// `[tokens, query_heads, head_dim]`
    pub dq: Vec<T>,
    /// `[tokens, kv_heads, head_dim]`
    pub dk: Vec<T>,
    /// `[tokens, kv_heads, head_dim]`
    pub dv: Vec<T>,
}

fn dot<T: Float>(a: &[T], b: &[T]) -> T {
    a.iter().zip(b).map(|(&a, &b)| a * b).sum()
}

/// One query's weights of the keys `start..=start + row`, and its logsumexp.
fn weights<T: Float>(
    spec: &SoftmaxSpec,
    inputs: &AttentionInputs<'_, T>,
    start: usize,
    row: usize,
    head: usize,
) -> (Vec<T>, T) {
    let layout = &spec.layout;
    let (kv_head, width) = (layout.kv_head(head), layout.head_dim);
    let query = &inputs.q[(start + row) * layout.query_stride + head * width..][..width];
    let z: Vec<T> = (0..=row)
        .map(|key| {
            let key_row = &inputs.k[(start + key) * layout.key_stride + kv_head * width..][..width];
            T::from_f64(spec.scale) * dot(query, key_row) - T::from_f64(spec.slope(head) * (row - key) as f64)
        })
        .collect();
    let largest = z.iter().fold(T::NEG_INFINITY, |largest, &z| largest.max(z));
    let logsumexp = largest + z.iter().map(|&z| (z - largest).exp()).sum::<T>().ln();
    (z.iter().map(|&z| (z - logsumexp).exp()).collect(), logsumexp)
}

/// o and logsumexp.
///
/// # Errors
/// Sizes that do not fit the layout, or wrong document offsets.
pub fn forward<T: Float>(spec: &SoftmaxSpec, inputs: &AttentionInputs<'_, T>) -> Result<DenseOutput<T>> {
    let documents = spec.validate(OP, inputs)?;
    let layout = &spec.layout;
    let (heads, width) = (layout.query_heads, layout.head_dim);
    let mut o = vec![T::ZERO; layout.tokens * heads * width];
    let mut logsumexp = vec![T::ZERO; layout.tokens * heads];
    for document in documents {
        for (row, token) in document.clone().enumerate() {
            for head in 0..heads {
                let (weights, lse) = weights(spec, inputs, document.start, row, head);
                let out = &mut o[(token * heads + head) * width..][..width];
                for (key, &weight) in weights.iter().enumerate() {
                    let from = (document.start + key) * layout.value_stride + layout.kv_head(head) * width;
                    for (out, &value) in out.iter_mut().zip(&inputs.v[from..from + width]) {
                        *out += weight * value;
                    }
                }
                logsumexp[token * heads + head] = lse;
            }
        }
    }
    Ok(DenseOutput { o, logsumexp })
}

/// Gradients of `sum(o * output_gradient)`; `output_gradient` has the layout of o.
///
/// # Errors
/// Sizes that do not fit the layout, or wrong document offsets.
pub fn backward<T: Float>(
    spec: &SoftmaxSpec,
    inputs: &AttentionInputs<'_, T>,
    output_gradient: &[T],
) -> Result<DenseGradients<T>> {
    let documents = spec.validate(OP, inputs)?;
    let layout = &spec.layout;
    layout.check_output(OP, "output_gradient", output_gradient)?;
    let (heads, width) = (layout.query_heads, layout.head_dim);
    let scale = T::from_f64(spec.scale);
    let mut dq = vec![T::ZERO; layout.tokens * heads * width];
    let mut dk = vec![T::ZERO; layout.tokens * layout.kv_heads * width];
    let mut dv = dk.clone();
    for document in documents {
        for (row, token) in document.clone().enumerate() {
            for head in 0..heads {
                let kv_head = layout.kv_head(head);
                let (weights, _) = weights(spec, inputs, document.start, row, head);
                let d_o = &output_gradient[token * layout.output_stride + head * width..][..width];
                let query = &inputs.q[token * layout.query_stride + head * width..][..width];
                let value =
                    |key: usize| &inputs.v[(document.start + key) * layout.value_stride + kv_head * width..][..width];
                let mean: T = weights.iter().enumerate().map(|(key, &weight)| weight * dot(d_o, value(key))).sum();
                for (key, &weight) in weights.iter().enumerate() {
                    let key_token = document.start + key;
                    let dz = scale * weight * (dot(d_o, value(key)) - mean);
                    for dim in 0..width {
                        let at = (key_token * layout.kv_heads + kv_head) * width + dim;
                        dv[at] += weight * d_o[dim];
                        dk[at] += dz * query[dim];
                        dq[(token * heads + head) * width + dim] +=
                            dz * inputs.k[key_token * layout.key_stride + kv_head * width + dim];
                    }
                }
            }
        }
    }
    Ok(DenseGradients { dq, dk, dv })
}
