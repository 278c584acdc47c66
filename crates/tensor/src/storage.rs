//! The memory behind tensors: shared by reference, recycled by size.
//!
//! A training step asks for the same sizes again and again, and fresh pages from the system cost more than the
//! arithmetic on them. So a dropped CPU buffer goes to a pool, and [`Buffer::uninitialised`] hands it out again *with
//! its old contents*; ops write their outputs in full. Debug builds fill it with NaN first, so that a kernel that
//! leaves a hole fails its test.

use crate::cuda::CudaStorage;
use crate::dtype::Element;
use half::bf16;
use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{LazyLock, Mutex, RwLock};

/// A tensor's memory. One variant a kind of device.
#[derive(Debug)]
pub enum Storage {
    /// Host memory. The lock lets views of one arena be written in place while others are read.
    Cpu(RwLock<CpuStorage>),
    /// Memory of a CUDA device, used in the order of its queue.
    Cuda(CudaStorage),
}

/// Host memory of one element type.
#[derive(Debug)]
pub enum CpuStorage {
    /// 32-bit floats.
    F32(Buffer<f32>),
    /// 64-bit floats.
    F64(Buffer<f64>),
    /// bfloat16.
    BF16(Buffer<bf16>),
    /// 32-bit unsigned integers.
    U32(Buffer<u32>),
    /// 32-bit signed integers.
    I32(Buffer<i32>),
}

/// Bytes that tensors of this process hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUse {
    /// Bytes held by live tensors.
    pub live: usize,
    /// The most that was ever live since the start or [`reset_peak_memory`].
    pub peak: usize,
    /// Bytes kept in the pool for reuse.
    pub pooled: usize,
}

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static POOLED: AtomicUsize = AtomicUsize::new(0);
/// Beyond this the pool gives memory back to the system instead of keeping it.
const POOL_LIMIT_BYTES: usize = 4 << 30;
/// Smaller buffers are not worth the pool's lock.
const SMALLEST_POOLED_BYTES: usize = 16 << 10;

type Shelf = HashMap<(TypeId, usize), Vec<Box<dyn Any + Send>>>;
static POOL: LazyLock<Mutex<Shelf>> = LazyLock::new(Mutex::default);

/// Bytes in use by tensors on the CPU.
pub fn memory_use() -> MemoryUse {
    MemoryUse { live: LIVE.load(Relaxed), peak: PEAK.load(Relaxed), pooled: POOLED.load(Relaxed) }
}

/// Starts a new measurement of the peak at what is live now.
pub fn reset_peak_memory() {
    PEAK.store(LIVE.load(Relaxed), Relaxed);
}

/// A host buffer that returns to the pool when dropped.
#[derive(Debug)]
pub struct Buffer<T: Element> {
    data: Vec<T>,
    len: usize,
}

/// The pool's size classes: eight steps between powers of two, so at most an eighth of a buffer is unused.
fn size_class(len: usize) -> usize {
    let step = (len.next_power_of_two() / 16).max(1);
    len.div_ceil(step) * step
}

impl<T: Element> Buffer<T> {
    /// `len` elements with unspecified contents, for an op that writes them all.
    pub fn uninitialised(len: usize) -> Self {
        let capacity = size_class(len);
        let bytes = capacity * size_of::<T>();
        let recycled = (bytes >= SMALLEST_POOLED_BYTES)
            .then(|| POOL.lock().unwrap_or_else(|e| e.into_inner()).get_mut(&(TypeId::of::<T>(), capacity))?.pop())
            .flatten()
            .and_then(|data| data.downcast::<Vec<T>>().ok());
        let mut data = match recycled {
            Some(data) => {
                POOLED.fetch_sub(bytes, Relaxed);
                *data
            }
            None => vec![T::default(); capacity],
        };
        if cfg!(debug_assertions) {
            data.fill(T::from_f64(f64::NAN));
        }
        Self::track(data, len)
    }

    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        let mut buffer = Self::uninitialised(len);
        buffer.fill(T::default());
        buffer
    }

    fn track(data: Vec<T>, len: usize) -> Self {
        let bytes = data.len() * size_of::<T>();
        let live = LIVE.fetch_add(bytes, Relaxed) + bytes;
        PEAK.fetch_max(live, Relaxed);
        Self { data, len }
    }
}

impl<T: Element> From<Vec<T>> for Buffer<T> {
    fn from(data: Vec<T>) -> Self {
        let len = data.len();
        Self::track(data, len)
    }
}

impl<T: Element> Drop for Buffer<T> {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.data);
        let bytes = data.len() * size_of::<T>();
        LIVE.fetch_sub(bytes, Relaxed);
        let keep = bytes >= SMALLEST_POOLED_BYTES
            && data.len() == size_class(data.len())
            && POOLED.load(Relaxed) + bytes <= POOL_LIMIT_BYTES;
        if keep {
            POOLED.fetch_add(bytes, Relaxed);
            let mut pool = POOL.lock().unwrap_or_else(|e| e.into_inner());
            pool.entry((TypeId::of::<T>(), data.len())).or_default().push(Box::new(data));
        }
    }
}

impl<T: Element> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.data[..self.len]
    }
}

impl<T: Element> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.data[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_classes_waste_at_most_an_eighth_and_are_their_own_class() {
        for len in (1..5000).chain([1 << 20, (1 << 20) + 1, 123_456_789]) {
            let class = size_class(len);
            assert!(class >= len && (class - len) * 8 <= len.max(8), "{len} -> {class}");
            assert_eq!(size_class(class), class);
        }
    }

    #[test]
    fn a_dropped_buffer_is_handed_out_again() {
        let buffer = Buffer::<f64>::zeros(100_003);
        let address = buffer.as_ptr();
        drop(buffer);
        assert_eq!(Buffer::<f64>::uninitialised(100_001).as_ptr(), address);
    }
}
