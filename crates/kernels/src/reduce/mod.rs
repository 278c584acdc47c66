//! Reductions of a view over some of its axes, and the sum of squares of a flat slice.
//!
//! `reduce`: `out[kept indices] = op over the reduced indices of x`; `out` is contiguous, of the view's shape without the
//! axes (or with 1 in their place, which is the same memory). Without an element to reduce, `Sum` is 0 and `Max` is
//! negative infinity. `Max` is NaN if an element is.
//!
//! `sum_of_squares`: float64 partial sums over fixed pieces, added in order: the kernel of the global gradient norm.
//! NaN and infinity propagate.
//!
//! Backward of `Sum`: the output's gradient broadcast over the axes (stride 0); nothing is saved.

pub mod cpu;
pub mod cuda;

/// How the elements along the axes are combined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduction {
    /// Sum; 0 over nothing.
    Sum,
    /// Largest; negative infinity over nothing, NaN if an element is NaN.
    Max,
}
