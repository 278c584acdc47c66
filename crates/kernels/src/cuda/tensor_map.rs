//! Tensor maps: how the copy engine of a Hopper card (TMA) finds a box of a tensor in global memory.
//!
//! A map describes memory as a tensor of up to five dimensions, innermost first, and a box of it. A copy names the box by
//! the coordinates of its first element and writes its elements one after another to shared memory; elements outside the
//! tensor come as zeros. The strides need not grow from dimension to dimension, and elements may be reached in several
//! ways: that is how a copy permutes rows on its way.

#![allow(unsafe_code)]

use super::device::driver;
use super::library::{Library, require};
use super::view::{DeviceRef, DeviceType, check};
use crate::{KernelError, Result};
use cudarc::driver::sys;
use std::marker::PhantomData;

/// Bytes of a map as a kernel's parameter.
pub(super) const MAP_BYTES: usize = size_of::<sys::CUtensorMap>();

/// A tensor and a box of it, in elements, innermost dimension first. The innermost elements are neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Boxes<const N: usize> {
    /// Coordinates run from 0 to these, exclusive.
    pub sizes: [usize; N],
    /// From one element to the next along each dimension; the first is 1.
    pub strides: [usize; N],
    /// Elements of the box along each dimension.
    pub extents: [usize; N],
}

impl<const N: usize> Boxes<N> {
    /// Elements of memory from the first to the last one of the tensor.
    fn reach(&self) -> usize {
        if self.sizes.contains(&0) {
            return 0;
        }
        self.sizes.iter().zip(self.strides).map(|(size, stride)| (size - 1) * stride).sum::<usize>() + 1
    }

    /// What the copy engine does, one row of the box after another: the offset in memory of the row's first element, None
    /// if the row lies outside.
    #[cfg(test)]
    pub fn rows(&self, first: [usize; N]) -> Vec<Option<usize>> {
        let rows: usize = self.extents[1..].iter().product();
        let row = |mut index: usize| {
            let mut offset = first[0];
            for dimension in 1..N {
                let at = first[dimension] + index % self.extents[dimension];
                index /= self.extents[dimension];
                if at >= self.sizes[dimension] {
                    return None;
                }
                offset += at * self.strides[dimension];
            }
            Some(offset)
        };
        (0..rows).map(row).collect()
    }
}

/// A map of bf16 memory that stays borrowed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TensorMap<'a> {
    encoded: sys::CUtensorMap,
    memory: PhantomData<&'a ()>,
}

impl<'a> TensorMap<'a> {
    /// For boxes 64 elements (128 bytes) wide, whose rows lie swizzled in shared memory: `cuda/hopper.cuh` says how.
    ///
    /// # Errors
    /// If the tensor reaches past the view, or the driver refuses it.
    pub fn swizzled<const N: usize>(
        op: &'static str,
        argument: &'static str,
        view: DeviceRef<'a>,
        boxes: &Boxes<N>,
    ) -> Result<Self> {
        check(op, argument, (view.len(), view.dtype()), view.len(), &[DeviceType::Bf16])?;
        if boxes.reach() > view.len() {
            return Err(KernelError::Length { op, argument, expected: boxes.reach(), found: view.len() });
        }
        require(Library::Driver)?;
        let sizes = boxes.sizes.map(|size| size as u64);
        let strides = boxes.strides.map(|stride| (stride * DeviceType::Bf16.size()) as u64);
        let extents = boxes.extents.map(|extent| extent as u32);
        let steps = [1u32; N];
        let mut encoded = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: the arrays have N elements, N - 1 strides are read from the second on; the map only stores the address,
        // whose memory the tensor does not leave (checked above) and which stays borrowed as long as the map lives.
        let outcome = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut encoded,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                N as u32,
                view.pointer() as *mut std::ffi::c_void,
                sizes.as_ptr(),
                strides[1..].as_ptr(),
                extents.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        let doing = || format!("{op}: describing {argument} to the copy engine as {boxes:?}");
        outcome.result().map_err(|e| KernelError::cuda(doing(), driver("")(e)))?;
        Ok(Self { encoded, memory: PhantomData })
    }

    /// Address of the encoded map, for a launch.
    pub(super) fn encoded(&self) -> &sys::CUtensorMap {
        &self.encoded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_box_is_walked_innermost_first_and_bounded_per_dimension() {
        let plain = Boxes { sizes: [8, 5], strides: [1, 10], extents: [4, 3] };
        assert_eq!(plain.rows([4, 1]), [Some(14), Some(24), Some(34)]);
        assert_eq!(plain.rows([0, 3]), [Some(30), Some(40), None]);
        assert_eq!(plain.reach(), 48);
        let two = Boxes { sizes: [4, 3, 2], strides: [1, 8, 4], extents: [4, 2, 2] };
        assert_eq!(two.rows([0, 0, 0]), [Some(0), Some(8), Some(4), Some(12)]);
        assert_eq!(Boxes { sizes: [4, 0], strides: [1, 8], extents: [4, 2] }.reach(), 0);
    }
}
