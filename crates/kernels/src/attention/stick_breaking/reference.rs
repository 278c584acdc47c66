//! Dense stick-breaking attention that reads like the paper: every weight of one head and document in one square.
//! For tests, attention maps and gradient checks; memory is quadratic in the length of the longest document.

use super::StickBreakingSpec;
use crate::attention::AttentionInputs;
use crate::{Float, KernelError, Result};

const OP: &str = "stick-breaking attention (dense)";

/// Output of the dense forward pass, contiguous.
#[derive(Debug, Clone, PartialEq)]
pub struct DenseOutput<T> {
    /// `[tokens, query_heads, head_dim]`
    pub o: Vec<T>,
    /// `[tokens, query_heads]`
    pub rem: Vec<T>,
    /// `[tokens, query_heads]`
    pub log2_rem: Vec<T>,
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

/// One query's row of the attention square.
struct StickRow<T> {
    beta: Vec<T>,
    /// 1 - beta, computed as sigmoid(-z): the subtraction would cancel for large z.
    keep: Vec<T>,
    weights: Vec<T>,
    rem: T,
    log2_rem: T,
}

fn dot<T: Float>(a: &[T], b: &[T]) -> T {
    a.iter().zip(b).map(|(&a, &b)| a * b).sum()
}

/// Breaks the stick along the keys `start..start + visible` for one query.
fn stick_row<T: Float>(
    spec: &StickBreakingSpec,
    inputs: &AttentionInputs<'_, T>,
    start: usize,
    row: usize,
    head: usize,
) -> StickRow<T> {
    let layout = &spec.layout;
    let (kv_head, width) = (layout.kv_head(head), layout.head_dim);
    let query = &inputs.q[(start + row) * layout.query_stride + head * width..][..width];
    let z: Vec<T> = (0..spec.visible_keys(row))
        .map(|key| {
            T::from_f64(spec.scale)
                * dot(query, &inputs.k[(start + key) * layout.key_stride + kv_head * width..][..width])
        })
        .collect();
    let beta: Vec<T> = z.iter().map(|z| z.sigmoid()).collect();
    let keep: Vec<T> = z.iter().map(|z| (-*z).sigmoid()).collect();
    let mut weights = vec![T::ZERO; z.len()];
    let mut rem = T::ONE;
    for key in (0..z.len()).rev() {
        weights[key] = beta[key] * rem;
        rem *= keep[key];
    }
    let log2_rem = -z.iter().map(|z| z.softplus()).sum::<T>() / T::from_f64(std::f64::consts::LN_2);
    StickRow { beta, keep, weights, rem, log2_rem }
}

/// o, rem and log2_rem. Early exit is not applied.
///
/// # Errors
/// Sizes that do not fit the layout, or wrong document offsets.
pub fn forward<T: Float>(spec: &StickBreakingSpec, inputs: &AttentionInputs<'_, T>) -> Result<DenseOutput<T>> {
    let documents = spec.validate(OP, inputs)?;
    let layout = &spec.layout;
    let (heads, width) = (layout.query_heads, layout.head_dim);
    let mut o = vec![T::ZERO; layout.tokens * heads * width];
    let mut rem = vec![T::ZERO; layout.tokens * heads];
    let mut log2_rem = rem.clone();
    for document in documents {
        for (row, token) in document.clone().enumerate() {
            for head in 0..heads {
                let stick = stick_row(spec, inputs, document.start, row, head);
                let out = &mut o[(token * heads + head) * width..][..width];
                for (key, &weight) in stick.weights.iter().enumerate() {
                    let from = (document.start + key) * layout.value_stride + layout.kv_head(head) * width;
                    for (out, &value) in out.iter_mut().zip(&inputs.v[from..from + width]) {
                        *out += weight * value;
                    }
                }
                rem[token * heads + head] = stick.rem;
                log2_rem[token * heads + head] = stick.log2_rem;
            }
        }
    }
    Ok(DenseOutput { o, rem, log2_rem })
}

/// Gradients of `sum(o * output_gradient) + sum(rem * rem_gradient)`. `output_gradient` has the layout of o;
/// `rem_gradient` is `[tokens, query_heads]`.
///
/// # Errors
/// Sizes that do not fit the layout, or wrong document offsets.
pub fn backward<T: Float>(
    spec: &StickBreakingSpec,
    inputs: &AttentionInputs<'_, T>,
    output_gradient: &[T],
    rem_gradient: Option<&[T]>,
) -> Result<DenseGradients<T>> {
    let documents = spec.validate(OP, inputs)?;
    let layout = &spec.layout;
    layout.check_output(OP, "output_gradient", output_gradient)?;
    if let Some(rem_gradient) = rem_gradient {
        crate::error::check_len(OP, "rem_gradient", rem_gradient, layout.tokens * layout.query_heads)?;
    }
    let (heads, width) = (layout.query_heads, layout.head_dim);
    let scale = T::from_f64(spec.scale);
    let mut dq = vec![T::ZERO; layout.tokens * heads * width];
    let mut dk = vec![T::ZERO; layout.tokens * layout.kv_heads * width];
    let mut dv = dk.clone();
    for document in documents {
        for (row, token) in document.clone().enumerate() {
            for head in 0..heads {
                let kv_head = layout.kv_head(head);
                let stick = stick_row(spec, inputs, document.start, row, head);
                let d_o = &output_gradient[token * layout.output_stride + head * width..][..width];
                let query = &inputs.q[token * layout.query_stride + head * width..][..width];
                let mut delta = rem_gradient.map_or(T::ZERO, |drem| drem[token * heads + head] * stick.rem);
                for key in 0..stick.weights.len() {
                    let key_token = document.start + key;
                    let value = &inputs.v[key_token * layout.value_stride + kv_head * width..][..width];
                    let a = stick.weights[key] * dot(d_o, value);
                    let dz = scale * (stick.keep[key] * a - stick.beta[key] * delta);
                    delta += a;
                    for dim in 0..width {
                        let at = (key_token * layout.kv_heads + kv_head) * width + dim;
                        dv[at] += stick.weights[key] * d_o[dim];
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

/// The attention weights A of one head of one document, `[length, length]`, row = query, column = key.
///
/// # Errors
/// Sizes that do not fit the layout, wrong document offsets, or a document or head that does not exist.
pub fn attention_weights<T: Float>(
    spec: &StickBreakingSpec,
    inputs: &AttentionInputs<'_, T>,
    document: usize,
    head: usize,
) -> Result<Vec<T>> {
    let documents = spec.validate(OP, inputs)?;
    let Some(range) = documents.get(document) else {
        return Err(KernelError::size(OP, "document", format!("below {}", documents.len()), document));
    };
    if head >= spec.layout.query_heads {
        return Err(KernelError::size(OP, "head", format!("below {}", spec.layout.query_heads), head));
    }
    let mut square = vec![T::ZERO; range.len() * range.len()];
    for (row, line) in square.chunks_exact_mut(range.len().max(1)).enumerate() {
        let weights = stick_row(spec, inputs, range.start, row, head).weights;
        line[..weights.len()].copy_from_slice(&weights);
    }
    Ok(square)
}
