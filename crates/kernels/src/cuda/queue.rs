//! A queue of work: a device, a stream, memory in the stream's order, copies to and from the host.

#![allow(unsafe_code)]

use super::device::{Gpu, driver};
use super::mapping::Mapping;
use super::view::{DeviceElement, DeviceMut, DeviceRef, DeviceType};
use crate::matmul::cuda::Blas;
use crate::{KernelError, Result};
use cudarc::driver::{CudaEvent, CudaStream, DriverError, PinnedHostSlice, result, sys};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// A device and the stream that work is put on. Cheap to clone; clones share the stream.
#[derive(Debug, Clone)]
pub struct Queue {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    gpu: Arc<Gpu>,
    stream: Arc<CudaStream>,
    /// Made at the first matrix product.
    blas: OnceLock<Result<Blas>>,
    staging: Mutex<Staging>,
}

/// Page-locked host memory that copies go through: the host does not wait for an upload, and the parts of a large download
/// follow each other without a gap.
#[derive(Debug, Default)]
struct Staging {
    slots: Vec<(PinnedHostSlice<u8>, CudaEvent)>,
    next: usize,
}

/// Slots of a queue's staging memory, and the bytes of each. Larger copies are made in pieces.
const STAGING_SLOTS: usize = 4;
const STAGING_BYTES: usize = 4 << 20;

impl Queue {
    /// The n-th device with a stream of its own.
    ///
    /// # Errors
    /// As [`Gpu::open`].
    pub fn open(ordinal: usize) -> Result<Self> {
        let gpu = Gpu::open(ordinal)?;
        let stream = gpu.context().new_stream().map_err(driver("making a stream"))?;
        Ok(Self::new(gpu, stream))
    }

    /// On a stream that the caller has.
    pub fn new(gpu: Arc<Gpu>, stream: Arc<CudaStream>) -> Self {
        Self { inner: Arc::new(Inner { gpu, stream, blas: OnceLock::new(), staging: Mutex::default() }) }
    }

    /// The device.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.inner.gpu
    }

    /// cudarc's stream.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.inner.stream
    }

    /// Matrix products on this queue.
    pub(crate) fn blas(&self) -> Result<&Blas> {
        self.inner.blas.get_or_init(|| Blas::new(self)).as_ref().map_err(Clone::clone)
    }

    /// Waits until all work on the queue is done.
    ///
    /// # Errors
    /// If some of it failed.
    pub fn synchronize(&self) -> Result<()> {
        self.gpu().bind()?;
        self.stream().synchronize().map_err(driver("waiting for the device"))
    }

    /// Uninitialised memory in the stream's order; given back, in the stream's order, when dropped.
    ///
    /// # Errors
    /// If the device has not so much memory; the message says how much it has.
    pub fn memory(&self, bytes: usize) -> Result<Memory> {
        self.gpu().bind()?;
        // The driver refuses an allocation of nothing.
        // SAFETY: the stream is alive; Memory frees what is allocated once, on the same stream.
        let pointer = unsafe { result::malloc_async(self.stream().cu_stream(), bytes.max(1)) }
            .map_err(|error| self.no_memory(bytes, error))?;
        Ok(Memory { queue: self.clone(), pointer, bytes, mapping: None })
    }

    /// Uninitialised memory that other processes can be given to map; where there is none of that kind, as
    /// [`memory`](Self::memory) ([`Memory::is_shareable`] tells). For what stays: giving it back waits for the queue.
    ///
    /// # Errors
    /// As [`memory`](Self::memory).
    pub fn shareable_memory(&self, bytes: usize) -> Result<Memory> {
        self.gpu().bind()?;
        match Mapping::new(self.gpu(), bytes).map_err(|error| self.no_memory(bytes, error))? {
            Some(mapping) => {
                Ok(Memory { queue: self.clone(), pointer: mapping.address(), bytes, mapping: Some(mapping) })
            }
            None => self.memory(bytes),
        }
    }

    fn no_memory(&self, bytes: usize, error: DriverError) -> KernelError {
        let state = self.gpu().memory().map_or(String::new(), |m| {
            let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
            let (used, free, total) = (gib(m.used), gib(m.free), gib(m.total));
            format!("; {used:.2} GiB are in use here, {free:.2} of {total:.2} GiB are free on the device")
        });
        KernelError::cuda(format!("allocating {bytes} bytes of device memory"), format!("{}{state}", driver("")(error)))
    }

    /// Uninitialised typed memory for an op's intermediate results.
    ///
    /// # Errors
    /// As [`memory`](Self::memory).
    pub fn scratch(&self, dtype: DeviceType, len: usize) -> Result<Scratch> {
        Ok(Scratch { memory: self.memory(len * dtype.size())?, len, dtype })
    }

    /// A copy of host memory on the device.
    ///
    /// # Errors
    /// If memory or the copy fails.
    pub fn upload<T: DeviceElement>(&self, data: &[T]) -> Result<Scratch> {
        let mut scratch = self.scratch(T::TYPE, data.len())?;
        self.upload_into(data, &mut scratch.as_mut())?;
        Ok(scratch)
    }

    /// Copies host memory to device memory of the same length. The host memory is free again when this returns.
    ///
    /// # Errors
    /// If lengths or types differ, or the copy fails.
    pub fn upload_into<T: DeviceElement>(&self, data: &[T], to: &mut DeviceMut<'_>) -> Result<()> {
        super::view::check("upload", "to", (to.len(), to.dtype()), data.len(), &[T::TYPE])?;
        // SAFETY: any memory can be read as bytes; the element types have no padding.
        let bytes = unsafe { std::slice::from_raw_parts(data.as_ptr().cast::<u8>(), size_of_val(data)) };
        self.gpu().bind()?;
        let mut staging = self.inner.staging.lock().unwrap_or_else(PoisonError::into_inner);
        for (piece, start) in bytes.chunks(STAGING_BYTES).zip((0u64..).step_by(STAGING_BYTES)) {
            let (slot, event) = staging.slot(self)?;
            // The slot's last copy has to be over before its memory is written again.
            event.synchronize().map_err(driver("waiting for an upload"))?;
            slot.as_mut_slice().map_err(driver("staging an upload"))?[..piece.len()].copy_from_slice(piece);
            let host = &slot.as_slice().map_err(driver("staging an upload"))?[..piece.len()];
            // SAFETY: the destination holds `data.len()` elements (checked above); the slot is page-locked and is not
            // written before `event`, recorded behind the copy, has happened.
            unsafe { result::memcpy_htod_async(to.pointer() + start, host, self.stream().cu_stream()) }
                .map_err(driver("copying to the device"))?;
            event.record(self.stream()).map_err(driver("recording an event"))?;
        }
        Ok(())
    }

    /// A copy of device memory on the host. Waits for all work before.
    ///
    /// # Errors
    /// If the type differs, or work or copy fails.
    pub fn download<T: DeviceElement>(&self, from: DeviceRef<'_>) -> Result<Vec<T>> {
        let mut data = vec![T::default(); from.len()];
        self.download_into(from, &mut data)?;
        Ok(data)
    }

    /// Copies device memory to host memory of the same length. Waits for all work before.
    ///
    /// # Errors
    /// As [`download`](Self::download), or if lengths differ.
    pub fn download_into<T: DeviceElement>(&self, from: DeviceRef<'_>, data: &mut [T]) -> Result<()> {
        super::view::check("download", "from", (from.len(), from.dtype()), data.len(), &[T::TYPE])?;
        self.gpu().bind()?;
        if size_of_val(data) > STAGING_BYTES {
            // SAFETY: the element types have no padding and no invalid values, so any bytes are some value of theirs.
            let bytes = unsafe { std::slice::from_raw_parts_mut(data.as_mut_ptr().cast::<u8>(), size_of_val(data)) };
            self.download_in_pieces(from.pointer(), bytes)?;
        } else if !data.is_empty() {
            // SAFETY: both sides hold `data.len()` elements; the stream is waited for below, before `data` is looked at.
            unsafe { result::memcpy_dtoh_async(data, from.pointer(), self.stream().cu_stream()) }
                .map_err(driver("copying from the device"))?;
        }
        self.synchronize()
    }

    /// A download through staging memory: the device writes the next pieces while the host copies one out.
    fn download_in_pieces(&self, pointer: u64, bytes: &mut [u8]) -> Result<()> {
        let mut staging = self.inner.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let mut under_way: VecDeque<(usize, &mut [u8])> = VecDeque::new();
        for (piece, start) in bytes.chunks_mut(STAGING_BYTES).zip((0u64..).step_by(STAGING_BYTES)) {
            if under_way.len() == STAGING_SLOTS
                && let Some((slot, piece)) = under_way.pop_front()
            {
                staging.copy_out(slot, piece)?;
            }
            let index = staging.next_slot(self)?;
            let (slot, event) = &mut staging.slots[index];
            // An earlier upload out of the slot has to be over before it is written.
            event.synchronize().map_err(driver("waiting for an upload"))?;
            let host = &mut slot.as_mut_slice().map_err(driver("staging a download"))?[..piece.len()];
            // SAFETY: the source holds all of `bytes`; the slot is page-locked and is not read before `event`, recorded
            // behind the copy, has happened.
            unsafe { result::memcpy_dtoh_async(host, pointer + start, self.stream().cu_stream()) }
                .map_err(driver("copying from the device"))?;
            event.record(self.stream()).map_err(driver("recording an event"))?;
            under_way.push_back((index, piece));
        }
        under_way.into_iter().try_for_each(|(slot, piece)| staging.copy_out(slot, piece))
    }

    /// Copies between device memory of one type and length.
    ///
    /// # Errors
    /// If types or lengths differ.
    pub fn copy(&self, from: DeviceRef<'_>, to: &mut DeviceMut<'_>) -> Result<()> {
        super::view::check("copy", "to", (to.len(), to.dtype()), from.len(), &[from.dtype()])?;
        if from.is_empty() {
            return Ok(());
        }
        self.gpu().bind()?;
        let bytes = from.len() * from.dtype().size();
        // SAFETY: both sides hold `bytes` bytes, and a mutable view overlaps nothing.
        unsafe { result::memcpy_dtod_async(to.pointer(), from.pointer(), bytes, self.stream().cu_stream()) }
            .map_err(driver("copying on the device"))
    }

    /// Sets every byte to zero.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn zero(&self, memory: &mut DeviceMut<'_>) -> Result<()> {
        if memory.is_empty() {
            return Ok(());
        }
        self.gpu().bind()?;
        let bytes = memory.len() * memory.dtype().size();
        // SAFETY: the view holds `bytes` bytes.
        unsafe { result::memset_d8_async(memory.pointer(), 0, bytes, self.stream().cu_stream()) }
            .map_err(driver("clearing device memory"))
    }

    /// Starts to measure device time.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn timer(&self) -> Result<Timer> {
        self.gpu().bind()?;
        let record = || self.stream().record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
        Ok(Timer { queue: self.clone(), start: record().map_err(driver("recording an event"))? })
    }
}

impl Staging {
    /// The slot that was used longest ago.
    fn slot(&mut self, queue: &Queue) -> Result<(&mut PinnedHostSlice<u8>, &CudaEvent)> {
        let index = self.next_slot(queue)?;
        let (slot, event) = &mut self.slots[index];
        Ok((slot, event))
    }

    /// The number of that slot; the same one comes again after all others.
    fn next_slot(&mut self, queue: &Queue) -> Result<usize> {
        if self.slots.len() < STAGING_SLOTS {
            let context = queue.gpu().context();
            // SAFETY: bytes have no invalid values, and only what was written is ever read.
            let memory = unsafe { context.alloc_pinned_with_flags::<u8>(STAGING_BYTES, 0) };
            let event = context.new_event(None).map_err(driver("making an event"))?;
            self.slots.push((memory.map_err(driver("allocating page-locked memory"))?, event));
        }
        let index = self.next % self.slots.len();
        self.next = index + 1;
        Ok(index)
    }

    /// Waits for a download into a slot and copies it to where it belongs.
    fn copy_out(&mut self, index: usize, to: &mut [u8]) -> Result<()> {
        let (slot, event) = &mut self.slots[index];
        event.synchronize().map_err(driver("waiting for a download"))?;
        to.copy_from_slice(&slot.as_slice().map_err(driver("staging a download"))?[..to.len()]);
        Ok(())
    }
}

/// Device memory in the order of a queue; given back when dropped.
#[derive(Debug)]
pub struct Memory {
    queue: Queue,
    pointer: u64,
    bytes: usize,
    /// Where it is not the pool's.
    mapping: Option<Mapping>,
}

impl Memory {
    /// Address of the first byte.
    pub fn pointer(&self) -> u64 {
        self.pointer
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The queue in whose order it may be used.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Whether other processes can be given this memory to map.
    pub fn is_shareable(&self) -> bool {
        self.mapping.is_some()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.mapping.is_some() {
            // It is unmapped at once, in no stream's order.
            let _ = self.queue.synchronize();
            return;
        }
        // At the end of the process the driver may be gone before a static is dropped; the memory is gone with it.
        let _ = self.queue.gpu().bind();
        // SAFETY: not mapped, so allocated by `Queue::memory` on this stream, freed once, here, behind all work that uses it.
        let _ = unsafe { result::free_async(self.pointer, self.queue.stream().cu_stream()) };
    }
}

/// Typed device memory of an op.
#[derive(Debug)]
pub struct Scratch {
    memory: Memory,
    len: usize,
    dtype: DeviceType,
}

impl Scratch {
    /// To read.
    pub fn as_ref(&self) -> DeviceRef<'_> {
        // SAFETY: the memory was allocated for `len` elements and lives as long as self.
        unsafe { DeviceRef::from_raw(self.memory.pointer, self.len, self.dtype) }
    }

    /// To write.
    pub fn as_mut(&mut self) -> DeviceMut<'_> {
        // SAFETY: as above, and self is borrowed mutably.
        unsafe { DeviceMut::from_raw(self.memory.pointer, self.len, self.dtype) }
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.memory.bytes
    }
}

/// A measurement of device time.
#[derive(Debug)]
pub struct Timer {
    queue: Queue,
    start: CudaEvent,
}

impl Timer {
    /// Milliseconds of device time since the start; waits for the work in between.
    ///
    /// # Errors
    /// If work failed.
    pub fn milliseconds(&self) -> Result<f64> {
        self.queue.gpu().bind()?;
        let end = self.queue.stream().record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
        let end = end.map_err(driver("recording an event"))?;
        Ok(f64::from(self.start.elapsed_ms(&end).map_err(driver("measuring time"))?))
    }

    /// Ends the measurement at this point of the queue; nobody waits.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn stop(self) -> Result<Span> {
        self.queue.gpu().bind()?;
        let end = self.queue.stream().record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
        Ok(Span { end: end.map_err(driver("recording an event"))?, timer: self })
    }
}

/// A stretch of a queue's time, to be asked for later.
#[derive(Debug)]
pub struct Span {
    timer: Timer,
    end: CudaEvent,
}

impl Span {
    /// Milliseconds from its start to its end; waits for the end.
    ///
    /// # Errors
    /// If work failed.
    pub fn milliseconds(&self) -> Result<f64> {
        self.timer.queue.gpu().bind()?;
        Ok(f64::from(self.timer.start.elapsed_ms(&self.end).map_err(driver("measuring time"))?))
    }

    /// Milliseconds from the start of a timer of any queue of the device to this one's start and end; waits for the end.
    ///
    /// # Errors
    /// As [`milliseconds`](Self::milliseconds).
    pub fn since(&self, origin: &Timer) -> Result<[f64; 2]> {
        self.timer.queue.gpu().bind()?;
        let since = |event| origin.start.elapsed_ms(event).map(f64::from).map_err(driver("measuring time"));
        Ok([since(&self.timer.start)?, since(&self.end)?])
    }
}
