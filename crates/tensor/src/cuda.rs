//! Tensors on a CUDA device: where their memory comes from, and how the kernels see it.
//!
//! A device has one queue in this process, and all tensors on it are used in that queue's order. That makes sharing safe
//! without a lock: work on shared memory runs in the order in which it was asked for.

#![allow(unsafe_code)]

use crate::error::{Result, TensorError};
use crate::{DType, Device, Tensor};
use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};
use stickbreak_kernels::KernelError;
use stickbreak_kernels::cuda::{DeviceMut, DeviceRef, DeviceType, DeviceView, Memory, Queue};

/// Device memory of a tensor.
#[derive(Debug)]
pub struct CudaStorage {
    memory: Memory,
    ordinal: usize,
}

static QUEUES: LazyLock<Mutex<HashMap<usize, Queue>>> = LazyLock::new(Mutex::default);

/// The queue of the n-th device; opens the device at the first call.
///
/// # Errors
/// If CUDA or the device cannot be used, saying why.
pub fn queue(ordinal: usize) -> Result<Queue> {
    let mut queues = QUEUES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(queue) = queues.get(&ordinal) {
        return Ok(queue.clone());
    }
    let queue = Queue::open(ordinal)
        .map_err(|error| TensorError::DeviceUnavailable { device: Device::Cuda(ordinal), reason: error.to_string() })?;
    queues.insert(ordinal, queue.clone());
    Ok(queue)
}

/// The kernels' name of an element type.
///
/// # Errors
/// If no kernel computes in it.
pub(crate) fn device_type(op: &'static str, dtype: DType) -> Result<DeviceType> {
    match dtype {
        DType::F32 => Ok(DeviceType::F32),
        DType::BF16 => Ok(DeviceType::Bf16),
        DType::U32 => Ok(DeviceType::U32),
        DType::I32 => Ok(DeviceType::I32),
        DType::F64 => Err(TensorError::DType {
            op,
            argument: "a tensor on a CUDA device",
            expected: "f32, bf16, u32 or i32".into(),
            found: dtype,
        }),
    }
}

impl CudaStorage {
    /// Uninitialised. `shareable`: of the kind that other processes can be given to map, where there is such memory.
    pub(crate) fn new(ordinal: usize, elements: usize, dtype: DType, shareable: bool) -> Result<Self> {
        let bytes = elements.checked_mul(device_type("empty", dtype)?.size()).ok_or_else(|| {
            KernelError::size("empty", "bytes of a tensor", "below 2^64", format!("{elements} elements of {dtype}"))
        })?;
        let queue = queue(ordinal)?;
        let memory = if shareable { queue.shareable_memory(bytes)? } else { queue.memory(bytes)? };
        Ok(Self { memory, ordinal })
    }

    pub(crate) fn ordinal(&self) -> usize {
        self.ordinal
    }

    pub(crate) fn queue(&self) -> &Queue {
        self.memory.queue()
    }
}

impl Tensor {
    /// The view's memory from its first element to its last, for a kernel that reads it.
    ///
    /// # Panics
    /// If the tensor is not on a CUDA device.
    pub(crate) fn device_ref(&self) -> DeviceRef<'_> {
        let (pointer, len, dtype) = self.device_memory();
        // SAFETY: the range lies inside the storage (every view does), which lives as long as self; whatever else writes
        // it does so on the same queue, before or after.
        unsafe { DeviceRef::from_raw(pointer, len, dtype) }
    }

    /// The same with this view's strides.
    pub(crate) fn device_view(&self) -> DeviceView<'_> {
        DeviceView::new(self.device_ref(), self.strides())
    }

    /// The same for a kernel that writes it. Ops refuse outputs that share storage with an input.
    ///
    /// # Panics
    /// If the tensor is not on a CUDA device.
    pub(crate) fn device_mut(&self) -> DeviceMut<'_> {
        let (pointer, len, dtype) = self.device_memory();
        // SAFETY: as above; tensors share storage by reference, and the order of the queue decides who writes when.
        unsafe { DeviceMut::from_raw(pointer, len, dtype) }
    }

    /// Address of the first element, for work that is put on another queue; `None` on the CPU. Whoever uses it orders that
    /// work with [`Queue::mark`] and [`Queue::wait_for`], and keeps the tensor until it is done.
    pub fn device_address(&self) -> Option<u64> {
        self.cuda_storage().map(|_| self.device_memory().0)
    }

    /// Whether other processes can be given the tensor's device memory to map: [`Tensor::zeros_shareable_on`].
    pub fn is_shareable(&self) -> bool {
        self.cuda_storage().is_some_and(|storage| storage.memory.is_shareable())
    }

    fn device_memory(&self) -> (u64, usize, DeviceType) {
        let storage = self.cuda_storage().expect("an op dispatches by device");
        let dtype = device_type("device_memory", self.dtype()).expect("refused when the storage was made");
        let last: usize =
            self.shape().iter().zip(self.strides()).map(|(&n, &stride)| n.saturating_sub(1) * stride).sum();
        let len = if self.elements() == 0 { 0 } else { last + 1 };
        let pointer = storage.memory.pointer() + (self.offset() * dtype.size()) as u64;
        debug_assert!((self.offset() + len) * dtype.size() <= storage.memory.bytes());
        (pointer, len, dtype)
    }
}
