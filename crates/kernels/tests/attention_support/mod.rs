//! Random problems and comparisons shared by the attention tests.
#![allow(dead_code, reason = "each test crate uses its own part")]

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use stickbreak_kernels::Float;
use stickbreak_kernels::attention::{AttentionInputs, AttentionLayout};

/// Inputs and output gradients of one attention call, in the layout's strides.
#[derive(Clone)]
pub struct Problem<T> {
    pub layout: AttentionLayout,
    pub q: Vec<T>,
    pub k: Vec<T>,
    pub v: Vec<T>,
    pub d_o: Vec<T>,
    pub d_rem: Vec<T>,
    pub cu_seqlens: Vec<i32>,
}

impl<T: Float> Problem<T> {
    /// Standard normal inputs for documents of these lengths; q is multiplied by `spread`.
    pub fn random(lengths: &[usize], query_heads: usize, kv_heads: usize, head_dim: usize, spread: f64) -> Self {
        let tokens = lengths.iter().sum();
        let layout = AttentionLayout::contiguous(tokens, query_heads, kv_heads, head_dim);
        let mut generator = ChaCha8Rng::seed_from_u64((tokens * 31 + head_dim) as u64);
        let mut normal = |count: usize, factor: f64| -> Vec<T> {
            let mut draw = || (0..12).map(|_| generator.random::<f64>()).sum::<f64>() - 6.0;
            (0..count).map(|_| T::from_f64(draw() * factor)).collect()
        };
        let mut cu_seqlens = vec![0];
        for &length in lengths {
            cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + length as i32);
        }
        Self {
            layout,
            q: normal(tokens * query_heads * head_dim, spread),
            k: normal(tokens * kv_heads * head_dim, 1.0),
            v: normal(tokens * kv_heads * head_dim, 1.0),
            d_o: normal(tokens * query_heads * head_dim, 1.0),
            d_rem: normal(tokens * query_heads, 1.0),
            cu_seqlens,
        }
    }

    pub fn inputs(&self) -> AttentionInputs<'_, T> {
        AttentionInputs { q: &self.q, k: &self.k, v: &self.v, cu_seqlens: &self.cu_seqlens }
    }

    pub fn to_f64(&self) -> Problem<f64> {
        Problem {
            layout: self.layout,
            q: to_f64(&self.q),
            k: to_f64(&self.k),
            v: to_f64(&self.v),
            d_o: to_f64(&self.d_o),
            d_rem: to_f64(&self.d_rem),
            cu_seqlens: self.cu_seqlens.clone(),
        }
    }
}

pub fn to_f64<T: Float>(values: &[T]) -> Vec<f64> {
    values.iter().map(|x| x.to_f64()).collect()
}

/// Largest of the tensor error |x - ref| / |ref| (absolute if the reference is zero) and the row error, which is the
/// largest error norm of one row over max(norm of that row, root mean square row norm).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Errors {
    pub tensor: f64,
    pub row: f64,
}

pub fn errors<T: Float>(found: &[T], expected: &[f64], width: usize) -> Errors {
    assert_eq!(found.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference: Vec<f64> = found.iter().zip(expected).map(|(x, y)| x.to_f64() - y).collect();
    let total = norm(&mut expected.iter().copied());
    let error = norm(&mut difference.iter().copied());
    let rows = (expected.len() / width.max(1)).max(1);
    let root_mean_square = total / (rows as f64).sqrt();
    let row = difference
        .chunks(width.max(1))
        .zip(expected.chunks(width.max(1)))
        .map(|(difference, expected)| {
            let scale = norm(&mut expected.iter().copied()).max(root_mean_square);
            let error = norm(&mut difference.iter().copied());
            if scale == 0.0 { error } else { error / scale }
        })
        .fold(0.0, |worst: f64, x| if x.is_nan() { f64::INFINITY } else { worst.max(x) });
    let tensor = if total == 0.0 { error } else { error / total };
    Errors { tensor: if tensor.is_nan() { f64::INFINITY } else { tensor }, row }
}

/// Panics unless both errors are within the limits.
pub fn assert_close<T: Float>(what: &str, found: &[T], expected: &[f64], width: usize, tensor: f64, row: f64) {
    let errors = errors(found, expected, width);
    assert!(errors.tensor <= tensor && errors.row <= row, "{what} ({}): {errors:?}", T::NAME);
}
