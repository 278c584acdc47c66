//! Shapes, strides and broadcasting.

use crate::error::{Result, TensorError};
use std::fmt;
use std::ops::Deref;

/// The sizes of a tensor's dimensions, outermost first. A scalar has none.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Shape(Vec<usize>);

impl Shape {
    /// Number of elements: the product of all sizes, 1 for a scalar; `usize::MAX` if it is more than that.
    pub fn elements(&self) -> usize {
        if self.0.contains(&0) { 0 } else { self.0.iter().fold(1, |product, &size| product.saturating_mul(size)) }
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.0.len()
    }

    /// Strides, in elements, of a row-major layout without gaps.
    pub fn contiguous_strides(&self) -> Vec<usize> {
        let mut strides = vec![0; self.rank()];
        let mut step = 1;
        for (stride, &size) in strides.iter_mut().zip(&self.0).rev() {
            *stride = step;
            step = usize::saturating_mul(step, size);
        }
        strides
    }

    /// The shape both sides broadcast to (NumPy's rule: align at the last dimension; sizes agree or one of them is 1).
    ///
    /// # Errors
    /// [`TensorError::ShapePair`] in the name of `op`, if there is none.
    pub fn broadcast(&self, other: &Shape, op: &'static str) -> Result<Shape> {
        let rank = self.rank().max(other.rank());
        let mut sizes = vec![0; rank];
        for (i, size) in sizes.iter_mut().enumerate() {
            let from_end = rank - i;
            let at = |shape: &Shape| shape.rank().checked_sub(from_end).map_or(1, |d| shape.0[d]);
            *size = match (at(self), at(other)) {
                (a, b) if a == b => a,
                (1, b) => b,
                (a, 1) => a,
                (a, b) => {
                    return Err(TensorError::ShapePair {
                        op,
                        left: self.clone(),
                        right: other.clone(),
                        why: format!("dimension {i} of the broadcast shape is {a} on the left and {b} on the right"),
                    });
                }
            };
        }
        Ok(Shape(sizes))
    }
}

impl Deref for Shape {
    type Target = [usize];
    fn deref(&self) -> &[usize] {
        &self.0
    }
}

impl From<&[usize]> for Shape {
    fn from(sizes: &[usize]) -> Self {
        Shape(sizes.to_vec())
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(sizes: [usize; N]) -> Self {
        Shape(sizes.to_vec())
    }
}

impl From<Vec<usize>> for Shape {
    fn from(sizes: Vec<usize>) -> Self {
        Shape(sizes)
    }
}

impl From<&Shape> for Shape {
    fn from(shape: &Shape) -> Self {
        shape.clone()
    }
}

impl From<usize> for Shape {
    fn from(size: usize) -> Self {
        Shape(vec![size])
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}
