//! The number types that CPU kernels compute in.

use std::fmt::{Debug, Display};
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, DivAssign, Mul, MulAssign, Neg, Sub, SubAssign};

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

/// A floating-point type that CPU kernels compute in: `f32` for work, `f64` for references and gradient checks.
///
/// Sealed: kernels rely on the exact set of types.
pub trait Float:
    sealed::Sealed
    + Copy
    + Default
    + PartialOrd
    + Send
    + Sync
    + Debug
    + Display
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + SubAssign
    + MulAssign
    + DivAssign
    + Sum
    + 'static
{
    /// Zero.
    const ZERO: Self;
    /// One.
    const ONE: Self;
    /// Distance from 1 to the next larger number.
    const EPSILON: Self;
    /// Negative infinity.
    const NEG_INFINITY: Self;
    /// The type's name, as errors and tables print it.
    const NAME: &'static str;

    /// Nearest value to a float64.
    fn from_f64(x: f64) -> Self;
    /// Exact float64 value.
    fn to_f64(self) -> f64;
    /// Nearest value to an integer.
    fn from_usize(x: usize) -> Self {
        Self::from_f64(x as f64)
    }
    /// `self * a + b` in one rounding.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// Absolute value.
    fn abs(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// The larger of two; the other one if one is NaN.
    fn max(self, other: Self) -> Self;
    /// The smaller of two; the other one if one is NaN.
    fn min(self, other: Self) -> Self;
    /// e^self. The f32 version is branch-free polynomial code that vectorises, within 2 units in the last place,
    /// flushing results below 2^-126 to zero; NaN stays NaN.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// ln(1 + self), accurate near 0.
    fn ln_1p(self) -> Self;
    /// Hyperbolic tangent.
    fn tanh(self) -> Self;
    /// Sine and cosine.
    fn sin_cos(self) -> (Self, Self);
    /// Whether the value is neither infinite nor NaN.
    fn is_finite(self) -> bool;

    /// 1 / (1 + e^-self), without overflow.
    #[inline(always)]
    fn sigmoid(self) -> Self {
        // e^-x overflows to infinity for very negative x, and 1 / infinity is the right answer, 0.
        Self::ONE / (Self::ONE + (-self).exp())
    }
    /// ln(1 + e^self), without overflow.
    #[inline(always)]
    fn softplus(self) -> Self {
        self.max(Self::ZERO) + (-self.abs()).exp().ln_1p()
    }
}

macro_rules! shared_methods {
    ($t:ident) => {
        const ZERO: Self = 0.0;
        const ONE: Self = 1.0;
        const EPSILON: Self = $t::EPSILON;
        const NEG_INFINITY: Self = $t::NEG_INFINITY;
        const NAME: &'static str = stringify!($t);

        #[inline(always)]
        fn from_f64(x: f64) -> Self {
            x as $t
        }
        #[inline(always)]
        fn to_f64(self) -> f64 {
            self as f64
        }
        #[inline(always)]
        fn mul_add(self, a: Self, b: Self) -> Self {
            $t::mul_add(self, a, b)
        }
        #[inline(always)]
        fn abs(self) -> Self {
            $t::abs(self)
        }
        #[inline(always)]
        fn sqrt(self) -> Self {
            $t::sqrt(self)
        }
        #[inline(always)]
        fn max(self, other: Self) -> Self {
            $t::max(self, other)
        }
        #[inline(always)]
        fn min(self, other: Self) -> Self {
            $t::min(self, other)
        }
        #[inline(always)]
        fn ln(self) -> Self {
            $t::ln(self)
        }
        #[inline(always)]
        fn ln_1p(self) -> Self {
            $t::ln_1p(self)
        }
        #[inline(always)]
        fn tanh(self) -> Self {
            $t::tanh(self)
        }
        #[inline(always)]
        fn sin_cos(self) -> (Self, Self) {
            $t::sin_cos(self)
        }
        #[inline(always)]
        fn is_finite(self) -> bool {
            $t::is_finite(self)
        }
    };
}

impl Float for f64 {
    shared_methods!(f64);
    #[inline(always)]
    fn exp(self) -> Self {
        f64::exp(self)
    }
}

impl Float for f32 {
    shared_methods!(f32);
    #[inline(always)]
    fn exp(self) -> Self {
        // e^x = 2^n e^r with n = round(x / ln 2) and |r| <= ln 2 / 2 (Cody and Waite, two-part ln 2).
        const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer, held in the low mantissa bits
        const LN2_HIGH: f32 = 0.693_359_4;
        const LN2_LOW: f32 = -2.121_944_4e-4;
        let clamped = self.clamp(-87.33, 88.72);
        let shifted = clamped.mul_add(std::f32::consts::LOG2_E, MAGIC);
        let n = shifted - MAGIC;
        let r = (-n).mul_add(LN2_LOW, (-n).mul_add(LN2_HIGH, clamped));
        let mut p = 1.0 / 5040.0;
        p = f32::mul_add(p, r, 1.0 / 720.0);
        p = f32::mul_add(p, r, 1.0 / 120.0);
        p = f32::mul_add(p, r, 1.0 / 24.0);
        p = f32::mul_add(p, r, 1.0 / 6.0);
        p = f32::mul_add(p, r, 0.5);
        p = f32::mul_add(p, r, 1.0);
        p = f32::mul_add(p, r, 1.0);
        // 2^n in two factors, because n = 128 alone is not a float32 exponent.
        let half = ((shifted.to_bits() << 23) as i32) >> 24;
        let rest = (((shifted.to_bits() << 23) as i32) >> 23) - half;
        let scale = |e: i32| f32::from_bits(((e + 127) << 23) as u32);
        let result = p * scale(half) * scale(rest);
        let result = if self < -87.33 { 0.0 } else { result };
        let result = if self > 88.72 { f32::INFINITY } else { result };
        if self.is_nan() { self } else { result }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn float32_exp_is_within_two_units_in_the_last_place() {
        let mut worst = 0.0f64;
        let mut x = -87.3f32;
        while x < 88.7 {
            let exact = f64::from(x).exp();
            let relative = (f64::from(Float::exp(x)) - exact).abs() / exact;
            worst = worst.max(relative);
            x += 0.000_91;
        }
        assert!(worst <= 2.0 * f64::from(f32::EPSILON), "worst relative error {worst:e}");
    }

    #[test]
    fn float32_exp_saturates_and_keeps_nan() {
        assert_eq!(Float::exp(-1e30f32), 0.0);
        assert_eq!(Float::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(Float::exp(1e30f32), f32::INFINITY);
        assert!(Float::exp(f32::NAN).is_nan());
        assert_eq!(Float::exp(0.0f32), 1.0);
    }

    #[test]
    fn sigmoid_and_softplus_do_not_overflow() {
        for x in [-1000.0f64, -30.0, -1.0, 0.0, 1.0, 30.0, 1000.0] {
            assert!(Float::sigmoid(x).is_finite() && Float::softplus(x).is_finite());
            // softplus(x) - softplus(-x) = x
            assert!((Float::softplus(x) - Float::softplus(-x) - x).abs() <= 1e-12 * x.abs().max(1.0));
        }
        assert_eq!(Float::sigmoid(f32::NEG_INFINITY), 0.0);
    }
}
