//! Softmax attention of one new query per sequence against cached keys and values.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::attention::decode::{DecodeInputs, DecodeLayout, DecodeTask, add_values, tile_scores};
use crate::attention::tile::TILE_KEYS;
use crate::{Float, Result};

const OP: &str = "softmax attention, decode";

/// Keys that one task reads at most: pieces are computed in parallel and joined in order.
const PIECE: usize = 12 * TILE_KEYS;

/// What to compute. The cache holds the query's own key as its last one.
#[derive(Debug, Clone, PartialEq)]
pub struct SoftmaxDecodeSpec {
    /// Sizes and strides.
    pub layout: DecodeLayout,
    /// Factor of q . k; 1 / sqrt(head_dim) by default.
    pub scale: f64,
    /// One slope per query head; None: no position bias.
    pub alibi: Option<Vec<f64>>,
}

impl SoftmaxDecodeSpec {
    /// Scale 1 / sqrt(head_dim), no position bias.
    pub fn new(layout: DecodeLayout) -> Self {
        Self { layout, scale: 1.0 / (layout.head_dim.max(1) as f64).sqrt(), alibi: None }
    }
}

/// Writes o `[sequences, query_heads, head_dim]`, contiguous. A sequence of length 0 gets zeros.
///
/// # Errors
/// Sizes that do not fit the layout, or a length beyond the capacity; nothing is written then.
pub fn decode<T: Float>(spec: &SoftmaxDecodeSpec, inputs: &DecodeInputs<'_, T>, o: &mut [T]) -> Result<()> {
    let layout = &spec.layout;
    super::check_scores(OP, spec.scale, spec.alibi.as_deref(), layout.query_heads)?;
    let lengths = layout.check(OP, inputs, o)?;
    let tasks = layout.tasks(&lengths, PIECE);
    let parts: Vec<Vec<Partial<T>>> =
        tasks.par_iter().with_max_len(1).map(|task| Arch::new().dispatch(Part { spec, inputs, task })).collect();
    let mut whole: Vec<Option<Partial<T>>> = Vec::new();
    whole.resize_with(layout.sequences * layout.query_heads, || None);
    for (task, parts) in tasks.iter().zip(parts) {
        let first = task.sequence * layout.query_heads + task.kv_head * layout.group();
        for (whole, part) in whole[first..].iter_mut().zip(parts) {
            match whole {
                Some(whole) => whole.join(&part),
                None => *whole = Some(part),
            }
        }
    }
    for (o, whole) in o.chunks_exact_mut(layout.head_dim).zip(&whole) {
        match whole {
            Some(whole) => o.iter_mut().zip(&whole.o).for_each(|(o, &sum)| *o = sum / whole.sum),
            None => o.fill(T::ZERO),
        }
    }
    Ok(())
}

/// Sums over some keys, relative to the largest score among them.
struct Partial<T> {
    largest: T,
    sum: T,
    o: Vec<T>,
}

impl<T: Float> Partial<T> {
    #[inline(always)]
    fn raise(&mut self, largest: T) {
        if largest > self.largest {
            let shrink = (self.largest - largest).exp();
            self.sum *= shrink;
            self.o.iter_mut().for_each(|o| *o *= shrink);
            self.largest = largest;
        }
    }

    fn join(&mut self, other: &Self) {
        self.raise(other.largest);
        let factor = (other.largest - self.largest).exp();
        self.sum += other.sum * factor;
        self.o.iter_mut().zip(&other.o).for_each(|(o, &other)| *o = other.mul_add(factor, *o));
    }
}

struct Part<'a, T> {
    spec: &'a SoftmaxDecodeSpec,
    inputs: &'a DecodeInputs<'a, T>,
    task: &'a DecodeTask,
}

impl<T: Float> WithSimd for Part<'_, T> {
    /// One per query head of the group.
    type Output = Vec<Partial<T>>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Self::Output {
        let Self { spec, inputs, task } = self;
        let layout = &spec.layout;
        let length = inputs.lengths[task.sequence];
        let mut parts: Vec<Partial<T>> = Vec::with_capacity(layout.group());
        for _ in 0..layout.group() {
            parts.push(Partial { largest: T::NEG_INFINITY, sum: T::ZERO, o: vec![T::ZERO; layout.head_dim] });
        }
        for tile in task.tiles() {
            for (member, part) in parts.iter_mut().enumerate() {
                let query = layout.query(inputs.q, task, member);
                let mut z = tile_scores(layout, task, tile.clone(), query, inputs.k, T::from_f64(spec.scale));
                if let Some(slopes) = &spec.alibi {
                    let slope = T::from_f64(slopes[task.kv_head * layout.group() + member]);
                    for (z, key) in z.as_flattened_mut().iter_mut().zip(tile.clone()) {
                        *z = slope.mul_add(T::from_f64(key as f64 - f64::from(length - 1)), *z);
                    }
                }
                part.raise(z.as_flattened().iter().fold(T::NEG_INFINITY, |largest, &z| largest.max(z)));
                for z in z.as_flattened_mut() {
                    *z = (*z - part.largest).exp();
                }
                part.sum += z.as_flattened().iter().copied().sum::<T>();
                add_values(layout, task, tile.clone(), &z, inputs.v, &mut part.o);
            }
        }
        parts
    }
}
