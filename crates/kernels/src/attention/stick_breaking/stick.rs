//! The recurrence along the keys, in all rows of a panel at once (`[key][row]`, see `tile.rs`).
//!
//! Everything works in the product form: no logarithm is taken per key, and neither beta nor 1 - beta is ever computed
//! by a subtraction, so saturated scores lose nothing.
//!
//! What is left of a stick halves with every other key and would soon be a subnormal number, which processors take a
//! hundred times as long for. So a stick or a weight below [`nothing`] is 0.

use crate::Float;
use crate::attention::tile::{LANES, Lanes};

/// Far below what any sum feels (2^-100 in f32, about 2^-960 in f64), and far enough above the smallest normal number
/// that products with ordinary numbers stay normal.
#[inline(always)]
fn nothing<T: Float>() -> T {
    T::from_f64(if size_of::<T>() == 4 { 7.888_609_052_210_118e-31 } else { 1e-289 })
}

/// x, or 0 if x is below [`nothing`].
#[inline(always)]
fn flush<T: Float>(x: T) -> T {
    if x < nothing() { T::ZERO } else { x }
}

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

/// Replaces z by one number that holds both beta and 1 - beta, and takes the keys off the stick: the smaller of the two,
/// negative if that is 1 - beta. The larger one is recovered by a subtraction that cannot cancel. `rem` is what nearer
/// keys have left, and becomes what these keys leave.
#[inline(always)]
pub(super) fn shorten_stick<T: Float>(z: &mut [Lanes<T>], rem: &mut Lanes<T>) {
    // A zero would lose its sign; nothing else is as small, and nothing that is added up feels it.
    let least = T::from_f64(if size_of::<T>() == 4 { f64::from(f32::MIN_POSITIVE) } else { f64::MIN_POSITIVE });
    for z in z.as_flattened_mut() {
        let e = (-z.abs()).exp();
        let small = e / (T::ONE + e);
        let small = if small < least { least } else { small };
        *z = if *z >= T::ZERO { -small } else { small };
    }
    let mut left = *rem;
    for z in z.iter().rev() {
        for lane in 0..LANES {
            left[lane] = flush(left[lane] * if z[lane] < T::ZERO { -z[lane] } else { T::ONE - z[lane] });
        }
    }
    *rem = left;
}

/// Recovers beta and keep = 1 - beta from what [`shorten_stick`] left in place of z. Keys from `all + lane` on, which
/// row `lane` does not see, get exactly 0 and 1.
#[inline(always)]
pub(super) fn recover_sticks<T: Float>(packed: &[Lanes<T>], beta: &mut [Lanes<T>], keep: &mut [Lanes<T>], all: usize) {
    let sticks = beta.as_flattened_mut().iter_mut().zip(keep.as_flattened_mut());
    for (&packed, (beta, keep)) in packed.as_flattened().iter().zip(sticks) {
        let small = packed.abs();
        let large = T::ONE - small;
        let negative = packed < T::ZERO;
        *beta = if negative { large } else { small };
        *keep = if negative { small } else { large };
    }
    for (key, (beta, keep)) in beta.iter_mut().zip(keep).enumerate().skip(all) {
        for lane in 0..LANES {
            if key >= all + lane {
                (beta[lane], keep[lane]) = (T::ZERO, T::ONE);
            }
        }
    }
}

/// Writes the weights A, newest key first. `rem` is what nearer keys have left of the stick, and becomes what these keys
/// leave. (Kept apart from the elementwise loops: fused with them it no longer compiles to vector code.)
#[inline(always)]
pub(super) fn break_stick<T: Float>(
    beta: &[Lanes<T>],
    keep: &[Lanes<T>],
    weights: &mut [Lanes<T>],
    rem: &mut Lanes<T>,
) {
    let mut left = *rem;
    for ((beta, keep), weights) in beta.iter().zip(keep).zip(weights).rev() {
        for lane in 0..LANES {
            weights[lane] = flush(beta[lane] * left[lane]);
            left[lane] = flush(left[lane] * keep[lane]);
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
