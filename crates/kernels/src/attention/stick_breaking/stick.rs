//! The recurrence along the keys, in all rows of a panel at once (`[key][row]`, see `tile.rs`).
//!
//! Everything works in the product form: no logarithm is taken per key, and neither beta nor 1 - beta is ever computed
//! by a subtraction, so saturated scores lose nothing.

use crate::Float;
use crate::attention::tile::{LANES, Lanes};

/// Replaces z by beta = sigmoid(z) and writes keep = 1 - beta = sigmoid(-z).
#[inline(always)]
pub(super) fn split_sticks<T: Float>(z: &mut [Lanes<T>], keep: &mut [Lanes<T>]) {
    for (z, keep) in z.as_flattened_mut().iter_mut().zip(keep.as_flattened_mut()) {
        let e = (-z.abs()).exp();
        let large = T::ONE / (T::ONE + e);
        let small = e * large;
        let positive = *z >= T::ZERO;
        *z = if positive { large } else { small };
        *keep = if positive { small } else { large };
    }
}

/// Replaces z by keep = 1 - beta alone.
#[inline(always)]
pub(super) fn keep_only<T: Float>(z: &mut [Lanes<T>]) {
    for z in z.as_flattened_mut() {
        let e = (-z.abs()).exp();
        let large = T::ONE / (T::ONE + e);
        *z = if *z >= T::ZERO { e * large } else { large };
    }
}

/// Replaces beta by the weights A, newest key first. `rem` is what nearer keys have left of the stick, and becomes what
/// these keys leave.
#[inline(always)]
pub(super) fn break_stick<T: Float>(beta: &mut [Lanes<T>], keep: &[Lanes<T>], rem: &mut Lanes<T>) {
    let mut left = *rem;
    for (beta, keep) in beta.iter_mut().zip(keep).rev() {
        for lane in 0..LANES {
            beta[lane] *= left[lane];
            left[lane] *= keep[lane];
        }
    }
    *rem = left;
}

/// What the keys leave of the stick.
#[inline(always)]
pub(super) fn shorten_stick<T: Float>(keep: &[Lanes<T>], rem: &mut Lanes<T>) {
    let mut left = *rem;
    for keep in keep.iter().rev() {
        for lane in 0..LANES {
            left[lane] *= keep[lane];
        }
    }
    *rem = left;
}

/// Replaces g = do . v by dz, oldest key first. `delta` is `drem * rem` plus the sum of a = A g over the older keys.
#[inline(always)]
pub(super) fn score_gradient<T: Float>(
    g: &mut [Lanes<T>],
    weights: &[Lanes<T>],
    beta: &[Lanes<T>],
    keep: &[Lanes<T>],
    delta: &mut Lanes<T>,
) {
    let mut farther = *delta;
    for (((g, weights), beta), keep) in g.iter_mut().zip(weights).zip(beta).zip(keep) {
        for lane in 0..LANES {
            let a = weights[lane] * g[lane];
            g[lane] = keep[lane].mul_add(a, -(beta[lane] * farther[lane]));
            farther[lane] += a;
        }
    }
    *delta = farther;
}

/// log2 of the remainder, which must not underflow with it: with small = min(beta, 1 - beta) and large = 1 - small,
/// log2(1 - beta) = log2(large) - max(z, 0) / ln 2. The product of the larges is kept beside its distance from 1, so
/// that both a product near 1 and a tiny one have an accurate logarithm, which is taken only now and then.
#[derive(Clone, Copy)]
pub(super) struct LogRemainder<T> {
    nats: Lanes<T>,
    product: Lanes<T>,
    missing: Lanes<T>,
}

impl<T: Float> LogRemainder<T> {
    pub const ONE: Self = Self { nats: [T::ZERO; LANES], product: [T::ONE; LANES], missing: [T::ZERO; LANES] };

    /// Takes in the positive parts of one tile's z. Summed per tile first: a long row's total would swallow them.
    #[inline(always)]
    pub fn take_scores(&mut self, z: &[Lanes<T>]) {
        let mut sum = [T::ZERO; LANES];
        for z in z {
            for lane in 0..LANES {
                sum[lane] += if z[lane] < T::ZERO { T::ZERO } else { z[lane] };
            }
        }
        for lane in 0..LANES {
            self.nats[lane] -= sum[lane];
        }
    }

    /// Takes in one tile's beta and 1 - beta.
    #[inline(always)]
    pub fn take_sticks(&mut self, beta: &[Lanes<T>], keep: &[Lanes<T>]) {
        for (beta, keep) in beta.iter().zip(keep) {
            for lane in 0..LANES {
                let small = beta[lane].min(keep[lane]);
                let large = beta[lane].max(keep[lane]);
                self.product[lane] *= large;
                self.missing[lane] = large.mul_add(self.missing[lane], small);
            }
        }
        // Each key at most halves the product: from 2^-24 one tile of 96 keys stays above the smallest float32.
        if self.product.iter().any(|&product| product < T::from_f64(1.0 / (1 << 24) as f64)) {
            self.fold();
        }
    }

    fn fold(&mut self) {
        for lane in 0..LANES {
            let (product, missing) = (self.product[lane], self.missing[lane]);
            self.nats[lane] += if missing < T::from_f64(0.5) { (-missing).ln_1p() } else { product.ln() };
        }
        self.product = [T::ONE; LANES];
        self.missing = [T::ZERO; LANES];
    }

    /// The logarithm to base 2.
    pub fn log2(mut self) -> Lanes<T> {
        self.fold();
        self.nats.map(|nats| nats * T::from_f64(std::f64::consts::LOG2_E))
    }
}
