//! Views of memory by shape and strides: validation, merging of dimensions, and walking through them in segments.

use crate::error::{KernelError, Result};

/// Read access to a view of any shape: element `i` lies at `data[sum of i[d] * strides[d]]`.
///
/// `data[0]` is the view's first element; a stride of 0 repeats (broadcasts) a dimension.
#[derive(Debug, Clone, Copy)]
pub struct Strided<'a, T> {
    /// Memory from the view's first element on.
    pub data: &'a [T],
    /// Distance, in elements, between neighbours along each dimension.
    pub strides: &'a [usize],
}

impl<'a, T> Strided<'a, T> {
    /// A view of memory by explicit strides.
    pub fn new(data: &'a [T], strides: &'a [usize]) -> Self {
        Self { data, strides }
    }
}

/// Row-major strides of a shape.
pub fn contiguous_strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for d in (1..shape.len()).rev() {
        strides[d - 1] = strides[d] * shape[d].max(1);
    }
    strides
}

/// Number of elements of a shape.
pub(crate) fn count(op: &'static str, shape: &[usize]) -> Result<usize> {
    if shape.contains(&0) {
        return Ok(0);
    }
    shape
        .iter()
        .try_fold(1usize, |product, &n| product.checked_mul(n))
        .ok_or_else(|| KernelError::size(op, "number of elements", "below 2^64", format!("shape {shape:?}")))
}

/// Refuses strides of the wrong number of dimensions and views that reach past the end of their memory.
pub(crate) fn check_view(
    op: &'static str,
    argument: &'static str,
    shape: &[usize],
    strides: &[usize],
    length: usize,
) -> Result<()> {
    if strides.len() != shape.len() {
        return Err(KernelError::size(op, "number of strides", shape.len(), strides.len()));
    }
    if shape.contains(&0) {
        return Ok(());
    }
    let needed = shape
        .iter()
        .zip(strides)
        .try_fold(1usize, |needed, (&n, &stride)| needed.checked_add((n - 1).checked_mul(stride)?))
        .ok_or_else(|| KernelError::size(op, "reach of the strides", "below 2^64", format!("{strides:?}")))?;
    if length < needed {
        return Err(KernelError::Length { op, argument, expected: needed, found: length });
    }
    Ok(())
}

/// Refuses strides under which two different indices share an element.
///
/// Sufficient and simple: taken from the smallest stride up, each stride must step over everything inside it.
pub(crate) fn check_no_overlap(op: &'static str, shape: &[usize], strides: &[usize]) -> Result<()> {
    if shape.contains(&0) {
        return Ok(());
    }
    let mut dims: Vec<(usize, usize)> =
        shape.iter().zip(strides).filter(|(n, _)| **n > 1).map(|(&n, &stride)| (stride, n)).collect();
    dims.sort_unstable();
    let mut extent = 1usize;
    for (stride, n) in dims {
        if stride < extent {
            return Err(KernelError::size(
                op,
                "strides of the output",
                "free of overlaps",
                format!("{strides:?} for shape {shape:?}"),
            ));
        }
        extent = (n - 1)
            .checked_mul(stride)
            .and_then(|reach| reach.checked_add(extent))
            .ok_or_else(|| KernelError::size(op, "reach of the strides", "below 2^64", format!("{strides:?}")))?;
    }
    Ok(())
}

/// The dimensions of `N` operands over one shape, with those merged that are one run in every operand.
///
/// Always has at least one dimension; the last one is the innermost.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Layout<const N: usize> {
    pub shape: Vec<usize>,
    pub strides: Vec<[usize; N]>,
}

impl<const N: usize> Layout<N> {
    /// Drops dimensions of size 1 and merges neighbours; `dims` are the dimensions to take part, outermost first.
    pub fn merged(dims: impl Iterator<Item = (usize, [usize; N])>) -> Self {
        let mut layout = Self { shape: Vec::new(), strides: Vec::new() };
        for (n, stride) in dims {
            if n == 1 {
                continue;
            }
            if let (Some(outer), Some(outer_stride)) = (layout.shape.last_mut(), layout.strides.last_mut())
                && (0..N).all(|operand| outer_stride[operand] == stride[operand].wrapping_mul(n))
            {
                *outer *= n;
                *outer_stride = stride;
                continue;
            }
            layout.shape.push(n);
            layout.strides.push(stride);
        }
        if layout.shape.is_empty() {
            layout.shape.push(1);
            layout.strides.push([0; N]);
        }
        layout
    }

    /// Size of the innermost dimension.
    pub fn inner(&self) -> usize {
        self.shape[self.shape.len() - 1]
    }

    /// Strides of the innermost dimension.
    pub fn inner_strides(&self) -> [usize; N] {
        self.strides[self.strides.len() - 1]
    }

    /// Calls `body(position, length, offsets)` for the runs along the innermost dimension that make up the flat range
    /// `start .. start + length`: `position` counts from `start`, `offsets` is where each operand's run begins.
    #[inline(always)]
    pub fn for_each_run(&self, start: usize, length: usize, mut body: impl FnMut(usize, usize, [usize; N])) {
        if length == 0 {
            return;
        }
        let (inner, inner_strides) = (self.inner(), self.inner_strides());
        let outer = self.shape.len() - 1;
        // The index of the run, as digits in mixed base, and where the operands stand for it.
        let mut digits = vec![0usize; outer];
        let mut row = start / inner;
        let mut column = start % inner;
        let mut offsets = [0usize; N];
        for d in (0..outer).rev() {
            digits[d] = row % self.shape[d];
            row /= self.shape[d];
            for operand in 0..N {
                offsets[operand] += digits[d] * self.strides[d][operand];
            }
        }
        let mut done = 0;
        loop {
            let run = (inner - column).min(length - done);
            let mut at = offsets;
            for operand in 0..N {
                at[operand] += column * inner_strides[operand];
            }
            body(done, run, at);
            done += run;
            if done == length {
                return;
            }
            column = 0;
            for d in (0..outer).rev() {
                digits[d] += 1;
                for operand in 0..N {
                    offsets[operand] += self.strides[d][operand];
                }
                if digits[d] < self.shape[d] {
                    break;
                }
                digits[d] = 0;
                for operand in 0..N {
                    offsets[operand] -= self.shape[d] * self.strides[d][operand];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contiguous_dimensions_merge_into_one() {
        let strides = contiguous_strides(&[2, 3, 1, 5]);
        assert_eq!(strides, [15, 5, 5, 1]);
        let layout = Layout::merged([2, 3, 1, 5].into_iter().zip(strides.iter().map(|&s| [s, 0])));
        // The second operand is broadcast everywhere, which merges as well.
        assert_eq!(layout, Layout { shape: vec![30], strides: vec![[1, 0]] });
    }

    #[test]
    fn runs_cover_a_transposed_view_from_the_middle() {
        // [3, 2] view of a [2, 3] matrix.
        let layout = Layout::merged([(3, [1]), (2, [3])].into_iter());
        let mut seen = Vec::new();
        layout.for_each_run(1, 4, |position, run, [offset]| {
            for i in 0..run {
                seen.push((position + i, offset + 3 * i));
            }
        });
        assert_eq!(seen, [(0, 3), (1, 1), (2, 4), (3, 2)]);
    }

    #[test]
    fn views_past_the_end_and_overlapping_outputs_are_refused() {
        assert!(check_view("op", "x", &[2, 3], &[3, 1], 6).is_ok());
        let message = check_view("op", "x", &[2, 3], &[3, 1], 5).unwrap_err().to_string();
        assert!(message.contains('5') && message.contains('6'), "{message}");
        assert!(check_view("op", "x", &[2, 3], &[3], 6).is_err());
        assert!(check_view("op", "x", &[2, 0], &[usize::MAX, 1], 0).is_ok());
        assert!(check_view("op", "x", &[3, 2], &[usize::MAX, 1], 9).is_err());
        assert!(check_no_overlap("op", &[4, 5], &[1, 4]).is_ok());
        assert!(check_no_overlap("op", &[4, 5], &[0, 1]).is_err());
        assert!(check_no_overlap("op", &[1, 5], &[0, 1]).is_ok());
        assert!(check_no_overlap("op", &[4, 5], &[2, 1]).is_err());
    }
}
