//! Device memory as the ops see it: a pointer, a length and an element type.

#![allow(unsafe_code)]

use crate::{KernelError, Result};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use half::bf16;
use std::marker::PhantomData;
use std::ops::Range;

/// Element types of device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceType {
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
    /// 32-bit unsigned integers.
    U32,
    /// 32-bit signed integers.
    I32,
}

impl DeviceType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DeviceType::Bf16 => 2,
            DeviceType::F32 | DeviceType::U32 | DeviceType::I32 => 4,
        }
    }

    /// Lower-case name, as in the names of kernels.
    pub fn name(self) -> &'static str {
        match self {
            DeviceType::F32 => "f32",
            DeviceType::Bf16 => "bf16",
            DeviceType::U32 => "u32",
            DeviceType::I32 => "i32",
        }
    }
}

/// A Rust type with a [`DeviceType`].
pub trait DeviceElement: Copy + Default + cudarc::driver::DeviceRepr + 'static {
    /// The matching type.
    const TYPE: DeviceType;
}

macro_rules! device_element {
    ($($t:ty => $variant:ident),*) => {
        $(impl DeviceElement for $t {
            const TYPE: DeviceType = DeviceType::$variant;
        })*
    };
}
device_element!(f32 => F32, bf16 => Bf16, u32 => U32, i32 => I32);

/// Device memory to read: `len` elements without gaps.
#[derive(Debug, Clone, Copy)]
pub struct DeviceRef<'a> {
    pointer: u64,
    len: usize,
    dtype: DeviceType,
    memory: PhantomData<&'a ()>,
}

/// Device memory to write (and read): `len` elements without gaps.
#[derive(Debug)]
pub struct DeviceMut<'a> {
    pointer: u64,
    len: usize,
    dtype: DeviceType,
    memory: PhantomData<&'a mut ()>,
}

fn part(pointer: u64, len: usize, dtype: DeviceType, range: &Range<usize>) -> (u64, usize) {
    assert!(range.start <= range.end && range.end <= len, "range {range:?} of {len} elements of device memory");
    (pointer + (range.start * dtype.size()) as u64, range.len())
}

impl<'a> DeviceRef<'a> {
    /// All of a cudarc slice. `stream` is the stream on which the memory will be used.
    pub fn new<T: DeviceElement>(slice: &'a CudaSlice<T>, stream: &CudaStream) -> Self {
        let (pointer, _guard) = slice.device_ptr(stream);
        Self { pointer, len: slice.len(), dtype: T::TYPE, memory: PhantomData }
    }

    /// Memory by its address.
    ///
    /// # Safety
    /// `pointer` must be the address of `len` elements of device memory that stay allocated, and are not written by
    /// anyone else, until all work that was given this view is done.
    pub unsafe fn from_raw(pointer: u64, len: usize, dtype: DeviceType) -> Self {
        Self { pointer, len, dtype, memory: PhantomData }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Element type.
    pub fn dtype(&self) -> DeviceType {
        self.dtype
    }

    /// Address of the first element.
    pub fn pointer(&self) -> u64 {
        self.pointer
    }

    /// Some of the elements.
    ///
    /// # Panics
    /// If the range reaches past the end.
    pub fn slice(&self, range: Range<usize>) -> Self {
        let (pointer, len) = part(self.pointer, self.len, self.dtype, &range);
        Self { pointer, len, ..*self }
    }
}

impl<'a> DeviceMut<'a> {
    /// All of a cudarc slice. `stream` is the stream on which the memory will be used.
    pub fn new<T: DeviceElement>(slice: &'a mut CudaSlice<T>, stream: &CudaStream) -> Self {
        let len = slice.len();
        let (pointer, _guard) = slice.device_ptr_mut(stream);
        Self { pointer, len, dtype: T::TYPE, memory: PhantomData }
    }

    /// Memory by its address.
    ///
    /// # Safety
    /// As [`DeviceRef::from_raw`], and nobody else may read the memory either until the work is done.
    pub unsafe fn from_raw(pointer: u64, len: usize, dtype: DeviceType) -> Self {
        Self { pointer, len, dtype, memory: PhantomData }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Element type.
    pub fn dtype(&self) -> DeviceType {
        self.dtype
    }

    /// Address of the first element.
    pub fn pointer(&self) -> u64 {
        self.pointer
    }

    /// The same memory to read.
    pub fn as_ref(&self) -> DeviceRef<'_> {
        DeviceRef { pointer: self.pointer, len: self.len, dtype: self.dtype, memory: PhantomData }
    }

    /// The same memory for a shorter time.
    pub fn reborrow(&mut self) -> DeviceMut<'_> {
        DeviceMut { pointer: self.pointer, len: self.len, dtype: self.dtype, memory: PhantomData }
    }

    /// Some of the elements, for as long as the whole view lasts.
    ///
    /// # Panics
    /// If the range reaches past the end.
    pub fn into_slice(self, range: Range<usize>) -> DeviceMut<'a> {
        let (pointer, len) = part(self.pointer, self.len, self.dtype, &range);
        DeviceMut { pointer, len, ..self }
    }

    /// Some of the elements.
    ///
    /// # Panics
    /// If the range reaches past the end.
    pub fn slice_mut(&mut self, range: Range<usize>) -> DeviceMut<'_> {
        let (pointer, len) = part(self.pointer, self.len, self.dtype, &range);
        DeviceMut { pointer, len, dtype: self.dtype, memory: PhantomData }
    }
}

/// Refuses memory of the wrong length or of a type that is not `allowed`.
///
/// # Errors
/// Naming the op, the argument and both values.
pub fn check(
    op: &'static str,
    argument: &'static str,
    (found, dtype): (usize, DeviceType),
    expected: usize,
    allowed: &[DeviceType],
) -> Result<()> {
    if !allowed.contains(&dtype) {
        let names: Vec<_> = allowed.iter().map(|d| d.name()).collect();
        return Err(KernelError::Size {
            op,
            what: "the element type of an argument",
            expected: format!("{} for {argument}", names.join(" or ")),
            found: dtype.name().to_owned(),
        });
    }
    if found != expected {
        return Err(KernelError::Length { op, argument, expected, found });
    }
    Ok(())
}
