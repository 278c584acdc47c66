//! The tensor itself: construction, access to its memory, and views.

use crate::cuda::CudaStorage;
use crate::dtype::{DType, Element};
use crate::error::{Result, TensorError};
use crate::storage::{Buffer, CpuStorage, Storage};
use crate::{Device, Shape};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};
use stickbreak_kernels::cuda::Queue;
use stickbreak_kernels::elementwise;

/// An n-dimensional view of shared storage.
///
/// Cloning copies the view, not the data. Elements are at `offset + sum(index[d] * strides[d])`; a stride of 0 repeats
/// one element (broadcasting).
#[derive(Clone)]
pub struct Tensor {
    storage: Arc<Storage>,
    dtype: DType,
    shape: Shape,
    strides: Vec<usize>,
    offset: usize,
}

/// Read access to a tensor's memory, from its first element on.
pub struct ReadGuard<'a, T> {
    guard: RwLockReadGuard<'a, CpuStorage>,
    offset: usize,
    element: PhantomData<T>,
}

impl<T: Element> Deref for ReadGuard<'_, T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        let buffer = T::buffer(&self.guard).expect("the dtype was compared when the guard was made");
        &buffer[self.offset..]
    }
}

/// Write access to a contiguous tensor's elements.
pub struct WriteGuard<'a, T> {
    guard: RwLockWriteGuard<'a, CpuStorage>,
    offset: usize,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Element> Deref for WriteGuard<'_, T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        let buffer = T::buffer(&self.guard).expect("the dtype was compared when the guard was made");
        &buffer[self.offset..self.offset + self.len]
    }
}

impl<T: Element> DerefMut for WriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let buffer = T::buffer_mut(&mut self.guard).expect("the dtype was compared when the guard was made");
        &mut buffer[self.offset..self.offset + self.len]
    }
}

/// Runs `$body` with `$t` bound to the Rust type of a floating-point `$dtype` that CPU kernels compute in.
macro_rules! for_float {
    ($op:expr, $dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $t = f32;
                $body
            }
            $crate::DType::F64 => {
                type $t = f64;
                $body
            }
            found => {
                Err($crate::TensorError::DType { op: $op, argument: "input", expected: "f32 or f64".into(), found })
            }
        }
    };
}
pub(crate) use for_float;

/// Runs `$body` with `$t` bound to the Rust type of any `$dtype`.
macro_rules! for_any {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $t = f32;
                $body
            }
            $crate::DType::F64 => {
                type $t = f64;
                $body
            }
            $crate::DType::BF16 => {
                type $t = half::bf16;
                $body
            }
            $crate::DType::U32 => {
                type $t = u32;
                $body
            }
            $crate::DType::I32 => {
                type $t = i32;
                $body
            }
        }
    };
}
pub(crate) use for_any;

/// Runs `$body`, a copy between devices, with `$t` bound to the Rust type of a `$dtype` that devices hold.
macro_rules! transfer {
    ($op:expr, $dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            DType::F32 => {
                type $t = f32;
                Ok($body?)
            }
            DType::BF16 => {
                type $t = half::bf16;
                Ok($body?)
            }
            DType::U32 => {
                type $t = u32;
                Ok($body?)
            }
            DType::I32 => {
                type $t = i32;
                Ok($body?)
            }
            DType::F64 => crate::cuda::device_type($op, $dtype).map(drop),
        }
    };
}

// ---------------------------------------------------------------------------------------------- construction

impl Tensor {
    fn from_buffer<T: Element>(buffer: Buffer<T>, shape: Shape) -> Self {
        debug_assert_eq!(buffer.len(), shape.elements());
        let strides = shape.contiguous_strides();
        let storage = Arc::new(Storage::Cpu(RwLock::new(T::wrap(buffer))));
        Self { storage, dtype: T::DTYPE, shape, strides, offset: 0 }
    }

    /// A tensor that takes over `data`, row-major.
    ///
    /// # Errors
    /// If `data` has not as many elements as `shape`.
    pub fn from_vec<T: Element>(data: Vec<T>, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        if data.len() != shape.elements() {
            let expected = format!("a shape of {} elements", data.len());
            return Err(TensorError::Shape { op: "from_vec", argument: "shape", expected, found: shape });
        }
        Ok(Self::from_buffer(Buffer::from(data), shape))
    }

    /// A copy of `data`, row-major.
    pub fn from_slice<T: Element>(data: &[T], shape: impl Into<Shape>) -> Result<Self> {
        Self::from_vec(data.to_vec(), shape)
    }

    /// A scalar (shape `[]`).
    pub fn scalar<T: Element>(value: T) -> Self {
        Self::from_buffer(Buffer::from(vec![value]), Shape::default())
    }

    /// Zeros.
    pub fn zeros(shape: impl Into<Shape>, dtype: DType) -> Self {
        let shape = shape.into();
        for_any!(dtype, T => Self::from_buffer(Buffer::<T>::zeros(shape.elements()), shape))
    }

    /// One value everywhere.
    pub fn full(value: f64, shape: impl Into<Shape>, dtype: DType) -> Self {
        let tensor = Self::zeros(shape, dtype);
        for_any!(dtype, T => tensor.expect_write::<T>().fill(<T as Element>::from_f64(value)));
        tensor
    }

    /// Ones.
    pub fn ones(shape: impl Into<Shape>, dtype: DType) -> Self {
        Self::full(1.0, shape, dtype)
    }

    /// Independent normal samples (Box-Muller over ChaCha8): the same bits for the same seed on one platform, the same up
    /// to the rounding of `ln`, `sin` and `cos` on all.
    ///
    /// # Errors
    /// If `dtype` is not a floating-point type.
    pub fn randn(mean: f64, std: f64, shape: impl Into<Shape>, dtype: DType, seed: u64) -> Result<Self> {
        if !dtype.is_float() {
            return Err(TensorError::DType {
                op: "randn",
                argument: "dtype",
                expected: "a float".into(),
                found: dtype,
            });
        }
        let shape = shape.into();
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        // 53 random bits, never 0, so that the logarithm is finite.
        let mut uniform = || ((rng.next_u64() >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        let mut samples = Vec::with_capacity(shape.elements() + 1);
        while samples.len() < shape.elements() {
            let radius = (-2.0 * uniform().ln()).sqrt();
            let (sin, cos) = (std::f64::consts::TAU * uniform()).sin_cos();
            samples.extend([mean + std * radius * cos, mean + std * radius * sin]);
        }
        samples.truncate(shape.elements());
        Ok(for_any!(dtype, T => {
            Self::from_buffer(Buffer::from(samples.into_iter().map(<T as Element>::from_f64).collect::<Vec<_>>()), shape)
        }))
    }

    /// A tensor on a device with unspecified contents, for a caller that writes every element.
    ///
    /// # Errors
    /// If the device cannot be used, has not the memory, or does not compute in `dtype`.
    pub fn empty_on(shape: impl Into<Shape>, dtype: DType, device: Device) -> Result<Self> {
        Self::empty_of_kind(shape.into(), dtype, device, false)
    }

    fn empty_of_kind(shape: Shape, dtype: DType, device: Device, shareable: bool) -> Result<Self> {
        match device {
            Device::Cpu => Ok(Self::empty(shape, dtype)),
            Device::Cuda(ordinal) => {
                let storage = Arc::new(Storage::Cuda(CudaStorage::new(ordinal, shape.elements(), dtype, shareable)?));
                let strides = shape.contiguous_strides();
                Ok(Self { storage, dtype, shape, strides, offset: 0 })
            }
        }
    }

    /// Zeros on a device.
    ///
    /// # Errors
    /// As [`empty_on`](Self::empty_on).
    pub fn zeros_on(shape: impl Into<Shape>, dtype: DType, device: Device) -> Result<Self> {
        let tensor = Self::empty_on(shape, dtype, device)?;
        tensor.zero_assign()?;
        Ok(tensor)
    }

    /// Zeros in memory of a device that other processes can be given to map, for GPUs that reach each other's; as
    /// [`zeros_on`](Self::zeros_on) where there is none of that kind. For what stays: giving it back waits for the device.
    ///
    /// # Errors
    /// As [`empty_on`](Self::empty_on).
    pub fn zeros_shareable_on(shape: impl Into<Shape>, dtype: DType, device: Device) -> Result<Self> {
        let tensor = Self::empty_of_kind(shape.into(), dtype, device, true)?;
        tensor.zero_assign()?;
        Ok(tensor)
    }

    /// One value everywhere, on a device.
    ///
    /// # Errors
    /// As [`empty_on`](Self::empty_on).
    pub fn full_on(value: f64, shape: impl Into<Shape>, dtype: DType, device: Device) -> Result<Self> {
        Self::full(value, shape, dtype).to_device(device)
    }

    /// [`empty_on`](Self::empty_on) this tensor's device.
    ///
    /// # Errors
    /// As [`empty_on`](Self::empty_on).
    pub fn new_empty(&self, shape: impl Into<Shape>, dtype: DType) -> Result<Self> {
        Self::empty_on(shape, dtype, self.device())
    }

    /// A tensor with unspecified contents, for a caller that writes every element; see [`crate::storage`].
    pub fn empty(shape: impl Into<Shape>, dtype: DType) -> Self {
        let shape = shape.into();
        for_any!(dtype, T => Self::from_buffer(Buffer::<T>::uninitialised(shape.elements()), shape))
    }
}

// ---------------------------------------------------------------------------------------------- properties

impl Tensor {
    /// The sizes of the dimensions.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The size of one dimension.
    ///
    /// # Errors
    /// If there is no such dimension.
    pub fn dim(&self, dimension: usize) -> Result<usize> {
        self.shape.get(dimension).copied().ok_or_else(|| self.no_dimension("dim", dimension))
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.shape.rank()
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.elements()
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the memory is.
    pub fn device(&self) -> Device {
        match &*self.storage {
            Storage::Cpu(_) => Device::Cpu,
            Storage::Cuda(storage) => Device::Cuda(storage.ordinal()),
        }
    }

    pub(crate) fn cuda_storage(&self) -> Option<&CudaStorage> {
        match &*self.storage {
            Storage::Cpu(_) => None,
            Storage::Cuda(storage) => Some(storage),
        }
    }

    /// The queue of the tensor's device if that is a CUDA device: what ops dispatch by.
    pub(crate) fn queue(&self) -> Option<&Queue> {
        self.cuda_storage().map(CudaStorage::queue)
    }

    /// Elements from the start of the storage to this view's first element.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Elements to step over in the storage for one step in each dimension.
    pub fn strides(&self) -> &[usize] {
        &self.strides
    }

    /// Whether the elements lie row-major and without gaps.
    pub fn is_contiguous(&self) -> bool {
        let mut step = 1;
        for (&size, &stride) in self.shape.iter().zip(&self.strides).rev() {
            if size != 1 && stride != step {
                return false;
            }
            step = usize::saturating_mul(step, size);
        }
        true
    }

    /// Whether no other tensor shares this one's storage.
    pub fn is_unique(&self) -> bool {
        Arc::strong_count(&self.storage) == 1
    }

    /// Whether two tensors are views of one storage.
    pub fn shares_storage(&self, other: &Tensor) -> bool {
        Arc::ptr_eq(&self.storage, &other.storage)
    }

    fn no_dimension(&self, op: &'static str, dimension: usize) -> TensorError {
        TensorError::OutOfRange { op, what: format!("dimension {dimension}"), shape: self.shape.clone() }
    }
}

// ---------------------------------------------------------------------------------------------- access

impl Tensor {
    /// The memory from this view's first element on; index it with [`strides`](Self::strides).
    ///
    /// # Errors
    /// If the tensor's dtype is not `T`.
    pub fn read<T: Element>(&self) -> Result<ReadGuard<'_, T>> {
        self.check_element_type::<T>("read")?;
        let lock = self.cpu_lock("read")?;
        // A poisoned lock means that a kernel panicked in another thread; its output is never looked at again.
        let guard = lock.read().unwrap_or_else(|e| e.into_inner());
        Ok(ReadGuard { guard, offset: self.offset, element: PhantomData })
    }

    /// The elements of a contiguous tensor, for writing in place. Every view of the storage sees the change.
    ///
    /// # Errors
    /// If the tensor's dtype is not `T` or it is not contiguous.
    pub fn write<T: Element>(&self) -> Result<WriteGuard<'_, T>> {
        self.check_element_type::<T>("write")?;
        self.cpu_lock("write")?;
        self.require_contiguous("write")?;
        Ok(self.expect_write())
    }

    /// [`write`](Self::write) for a tensor whose dtype and layout are known.
    pub(crate) fn expect_write<T: Element>(&self) -> WriteGuard<'_, T> {
        let lock = self.cpu_lock("write").expect("an op dispatches by device");
        let guard = lock.write().unwrap_or_else(|e| e.into_inner());
        WriteGuard { guard, offset: self.offset, len: self.elements(), element: PhantomData }
    }

    /// The whole storage from this view's first element on, for kernels that write through strides.
    pub(crate) fn write_strided<T: Element>(&self) -> WriteGuard<'_, T> {
        let lock = self.cpu_lock("write").expect("an op dispatches by device");
        let guard = lock.write().unwrap_or_else(|e| e.into_inner());
        let last: usize = self.shape.iter().zip(&self.strides).map(|(&size, &stride)| (size.max(1) - 1) * stride).sum();
        let len = if self.elements() == 0 { 0 } else { last + 1 };
        WriteGuard { guard, offset: self.offset, len, element: PhantomData }
    }

    fn cpu_lock(&self, op: &'static str) -> Result<&RwLock<CpuStorage>> {
        match &*self.storage {
            Storage::Cpu(lock) => Ok(lock),
            Storage::Cuda(_) => {
                let (expected, found) = (Device::Cpu, self.device());
                Err(TensorError::WrongDevice { op, argument: "tensor", expected, found })
            }
        }
    }

    fn check_element_type<T: Element>(&self, op: &'static str) -> Result<()> {
        if self.dtype == T::DTYPE {
            Ok(())
        } else {
            let expected = T::DTYPE.name().to_owned();
            Err(TensorError::DType { op, argument: "tensor", expected, found: self.dtype })
        }
    }

    /// The elements in row-major order.
    ///
    /// # Errors
    /// If the tensor's dtype is not `T`.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        self.check_element_type::<T>("to_vec")?;
        let tensor = self.contiguous()?.to_device(Device::Cpu)?;
        let data = tensor.read::<T>()?;
        Ok(data[..self.elements()].to_vec())
    }

    /// The elements in row-major order, as float64, whatever the dtype. Waits for the device.
    ///
    /// # Errors
    /// If the device fails.
    pub fn to_f64_vec(&self) -> Result<Vec<f64>> {
        for_any!(self.dtype, T => Ok(self.to_vec::<T>()?.into_iter().map(Element::to_f64).collect()))
    }

    /// The same tensor on a device: itself if it is there, else a contiguous copy.
    ///
    /// # Errors
    /// If the device cannot be used, has not the memory, or does not compute in this dtype.
    pub fn to_device(&self, device: Device) -> Result<Tensor> {
        if self.device() == device {
            return Ok(self.clone());
        }
        let source = self.contiguous()?;
        let out = Tensor::empty_on(&self.shape, self.dtype, device)?;
        out.transfer_assign(&source)?;
        Ok(out)
    }

    /// Copies the elements of a tensor on any device into this contiguous one.
    ///
    /// # Errors
    /// If shapes or dtypes differ, this tensor is not contiguous, or `from` shares its storage.
    pub fn transfer_assign(&self, from: &Tensor) -> Result<()> {
        const OP: &str = "transfer_assign";
        crate::ops::expect_shape(OP, "from", from, &self.shape)?;
        crate::ops::same_dtype(OP, "from", self.dtype, from)?;
        match (self.queue(), from.queue()) {
            (None, None) => self.copy_assign(from),
            (Some(_), Some(_)) if self.device() == from.device() => self.copy_assign(from),
            (Some(queue), None) => {
                let (from, n) = (from.contiguous()?, self.elements());
                self.require_contiguous(OP)?;
                transfer!(OP, self.dtype, T => queue.upload_into(&from.read::<T>()?[..n], &mut self.device_mut()))
            }
            (None, Some(queue)) => {
                let from = from.contiguous()?;
                transfer!(OP, self.dtype, T => queue.download_into(from.device_ref(), &mut self.write::<T>()?))
            }
            (Some(_), Some(_)) => self.transfer_assign(&from.to_device(Device::Cpu)?),
        }
    }

    pub(crate) fn require_contiguous(&self, op: &'static str) -> Result<()> {
        if self.is_contiguous() {
            return Ok(());
        }
        Err(TensorError::Shape {
            op,
            argument: "tensor",
            expected: format!("contiguous memory, found strides {:?}", self.strides),
            found: self.shape.clone(),
        })
    }

    /// The only element of a tensor, as float64.
    ///
    /// # Errors
    /// If there is not exactly one element.
    pub fn to_scalar(&self) -> Result<f64> {
        match self.to_f64_vec()?[..] {
            [value] => Ok(value),
            _ => Err(TensorError::Shape {
                op: "to_scalar",
                argument: "tensor",
                expected: "one element".into(),
                found: self.shape.clone(),
            }),
        }
    }
}

// ---------------------------------------------------------------------------------------------- views

impl Tensor {
    fn view(&self, shape: impl Into<Shape>, strides: Vec<usize>, offset: usize) -> Tensor {
        let shape = shape.into();
        debug_assert_eq!(shape.rank(), strides.len());
        Tensor { storage: Arc::clone(&self.storage), dtype: self.dtype, shape, strides, offset }
    }

    /// The same elements, row-major, in another shape: a view of a contiguous tensor, a copy of any other.
    ///
    /// # Errors
    /// If the number of elements differs.
    pub fn reshape(&self, shape: impl Into<Shape>) -> Result<Tensor> {
        let shape = shape.into();
        if shape.elements() != self.elements() {
            return Err(TensorError::ShapePair {
                op: "reshape",
                why: format!("{} elements cannot become {}", self.elements(), shape.elements()),
                left: self.shape.clone(),
                right: shape,
            });
        }
        let source = self.contiguous()?;
        let strides = shape.contiguous_strides();
        Ok(source.view(shape, strides, source.offset))
    }

    /// Swaps two dimensions. A view.
    ///
    /// # Errors
    /// If a dimension does not exist.
    pub fn transpose(&self, a: usize, b: usize) -> Result<Tensor> {
        self.dim(a)?;
        self.dim(b)?;
        let mut order: Vec<usize> = (0..self.rank()).collect();
        order.swap(a, b);
        self.permute(&order)
    }

    /// Reorders the dimensions: dimension `d` of the result is dimension `order[d]` of this tensor. A view.
    ///
    /// # Errors
    /// If `order` does not name every dimension once.
    pub fn permute(&self, order: &[usize]) -> Result<Tensor> {
        let mut sorted = order.to_vec();
        sorted.sort_unstable();
        if !sorted.into_iter().eq(0..self.rank()) {
            let what = format!("order {order:?}");
            return Err(TensorError::OutOfRange { op: "permute", what, shape: self.shape.clone() });
        }
        let sizes: Vec<usize> = order.iter().map(|&d| self.shape[d]).collect();
        Ok(self.view(sizes, order.iter().map(|&d| self.strides[d]).collect(), self.offset))
    }

    /// `len` indices of one dimension, from `start` on. A view.
    ///
    /// # Errors
    /// If the range does not lie inside the dimension.
    pub fn narrow(&self, dimension: usize, start: usize, len: usize) -> Result<Tensor> {
        let size = self.dim(dimension)?;
        if start.checked_add(len).is_none_or(|end| end > size) {
            let what = format!("range {start}..{start}+{len} of dimension {dimension}");
            return Err(TensorError::OutOfRange { op: "narrow", what, shape: self.shape.clone() });
        }
        let mut sizes = self.shape.to_vec();
        sizes[dimension] = len;
        let narrowed = self.view(sizes, self.strides.clone(), self.offset + start * self.strides[dimension]);
        // An empty view may start anywhere, past the end of its storage too.
        Ok(if narrowed.elements() == 0 { Tensor { offset: self.offset, ..narrowed } } else { narrowed })
    }

    /// Inserts a dimension of size 1. A view.
    ///
    /// # Errors
    /// If `dimension` is more than the rank.
    pub fn unsqueeze(&self, dimension: usize) -> Result<Tensor> {
        if dimension > self.rank() {
            return Err(self.no_dimension("unsqueeze", dimension));
        }
        let (mut sizes, mut strides) = (self.shape.to_vec(), self.strides.clone());
        sizes.insert(dimension, 1);
        strides.insert(dimension, 0);
        Ok(self.view(sizes, strides, self.offset))
    }

    /// Repeats dimensions of size 1 (and new leading ones) to fill `shape`. A view with strides of 0.
    ///
    /// # Errors
    /// If the tensor does not broadcast to `shape`.
    pub fn broadcast_to(&self, shape: impl Into<Shape>) -> Result<Tensor> {
        let shape = shape.into();
        if self.shape.broadcast(&shape, "broadcast_to")? != shape {
            return Err(TensorError::ShapePair {
                op: "broadcast_to",
                left: self.shape.clone(),
                right: shape,
                why: "the left one has a dimension that the right one lacks".into(),
            });
        }
        let strides = self.broadcast_strides(&shape);
        Ok(self.view(shape, strides, self.offset))
    }

    /// Strides that make this tensor look like `shape`, to which it is known to broadcast.
    pub(crate) fn broadcast_strides(&self, shape: &Shape) -> Vec<usize> {
        let missing = shape.rank() - self.rank();
        let mut strides = vec![0; shape.rank()];
        for d in 0..self.rank() {
            if self.shape[d] == shape[missing + d] {
                strides[missing + d] = self.strides[d];
            }
        }
        strides
    }

    /// The same elements row-major and without gaps: this tensor itself if it is so already, else a copy.
    ///
    /// # Errors
    /// If the device has not the memory.
    pub fn contiguous(&self) -> Result<Tensor> {
        if self.is_contiguous() { Ok(self.clone()) } else { self.copy() }
    }

    /// A contiguous copy in storage of its own.
    ///
    /// # Errors
    /// If the device has not the memory.
    pub fn copy(&self) -> Result<Tensor> {
        let out = self.new_empty(&self.shape, self.dtype)?;
        out.copy_assign(self)?;
        Ok(out)
    }

    /// A copy with another element type, rounded to nearest even (this tensor itself if the type is the same).
    ///
    /// # Errors
    /// If the device has not the memory or does not compute in one of the types.
    pub fn to_dtype(&self, dtype: DType) -> Result<Tensor> {
        if self.dtype == dtype {
            return Ok(self.clone());
        }
        let source = self.contiguous()?;
        let out = self.new_empty(&self.shape, dtype)?;
        if let Some(queue) = self.queue() {
            elementwise::cuda::cast(queue, &self.shape, source.device_view(), &mut out.device_mut())?;
            return Ok(out);
        }
        for_any!(self.dtype, S => for_any!(dtype, T => {
            let from = source.read::<S>()?;
            for (to, from) in out.expect_write::<T>().iter_mut().zip(from.iter()) {
                // Not `T::from_f64`: here T is a name for bf16, whose own method of that name rounds ties wrongly.
                *to = <T as Element>::from_f64(Element::to_f64(*from));
            }
        }));
        Ok(out)
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor {} {} ", self.dtype, self.shape)?;
        match self.cuda_storage() {
            // Values would have to be waited for.
            Some(_) => write!(f, "on {}", self.device()),
            None => {
                let values = self.to_f64_vec().map_err(|_| fmt::Error)?;
                let (shown, more) = if values.len() > 8 { (&values[..8], ", ...") } else { (&values[..], "") };
                write!(f, "{shown:?}{more}")
            }
        }
    }
}
