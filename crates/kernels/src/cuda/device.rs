//! One CUDA device: its context, its properties, and the kernels loaded on it.

#![allow(unsafe_code)]

use super::compile::Source;
use super::launch::Kernel;
use super::library::{Library, require};
use crate::{KernelError, Result};
use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::{CudaContext, CudaModule, DriverError, result, sys};
use cudarc::nvrtc::Ptx;
use rayon::prelude::*;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A device with its loaded kernels. Shared by all queues on it.
#[derive(Debug)]
pub struct Gpu {
    context: Arc<CudaContext>,
    name: String,
    compute_capability: (u32, u32),
    multiprocessors: u32,
    shared_memory_per_block: usize,
    /// Bytes outside the pool.
    mapped: AtomicI64,
    modules: Mutex<HashMap<Source, Arc<CudaModule>>>,
    /// By a hash of source and entry, so that a look-up builds no string; the list settles collisions.
    kernels: Mutex<HashMap<u64, Vec<LoadedKernel>>>,
}

/// A kernel with what it is known by.
type LoadedKernel = (Source, &'static str, Kernel);

/// Bytes of device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Free on the device, whoever uses the rest.
    pub free: u64,
    /// All of the device.
    pub total: u64,
    /// In use by this process now: in its pool, and mapped outside it.
    pub used: u64,
    /// The most of the pool in use since the start or [`Gpu::reset_peak_memory`], and what is mapped now.
    pub peak: u64,
    /// Held by the pool, in use or not, and what is mapped outside it.
    pub reserved: u64,
}

pub(super) fn driver(doing: &'static str) -> impl Fn(DriverError) -> KernelError {
    move |error| {
        let text = error.error_string().map_or_else(|_| format!("{error:?}"), |s| s.to_string_lossy().into_owned());
        KernelError::cuda(doing, text)
    }
}

impl Gpu {
    /// How many devices this process can see.
    ///
    /// # Errors
    /// If the driver is missing or does not start.
    pub fn count() -> Result<usize> {
        require(Library::Driver)?;
        result::init().map_err(driver("starting the driver"))?;
        Ok(CudaContext::device_count().map_err(driver("counting devices"))? as usize)
    }

    /// The n-th device, with its primary context.
    ///
    /// # Errors
    /// If a library is missing, the driver is too old, or there is no such device.
    pub fn open(ordinal: usize) -> Result<Arc<Self>> {
        let count = Self::count()?;
        if ordinal >= count {
            return Err(KernelError::cuda(
                format!("opening device {ordinal}"),
                format!("this machine shows {count} CUDA devices (CUDA_VISIBLE_DEVICES may hide some)"),
            ));
        }
        Self::with_context(CudaContext::new(ordinal).map_err(driver("opening the device"))?)
    }

    /// On a context that the caller has. Switches off cudarc's event tracking in it, which costs host time at every access.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn with_context(context: Arc<CudaContext>) -> Result<Arc<Self>> {
        require(Library::Nvrtc)?;
        let driver_version = driver_version()?;
        if driver_version < 13000 {
            let (major, minor) = (driver_version / 1000, driver_version % 1000 / 10);
            return Err(KernelError::Library {
                library: Library::Driver.file(),
                why: format!("it supports CUDA {major}.{minor}, and 13.0 (driver 580) or newer is needed"),
            });
        }
        // SAFETY: tracking orders accesses of cudarc's own slices between streams; here every queue has one stream, and
        // whoever uses several is told to order them with events.
        unsafe { context.disable_event_tracking() };
        let attribute = |attribute| context.attribute(attribute).map_err(driver("reading the device's properties"));
        let name = context.name().map_err(driver("reading the device's name"))?;
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? as u32;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)? as u32;
        if major < 8 {
            return Err(KernelError::cuda(
                format!("opening {name}"),
                format!("its compute capability is {major}.{minor}, and 8.0 (Ampere) or newer is needed"),
            ));
        }
        let gpu = Self {
            name,
            compute_capability: (major, minor),
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
            shared_memory_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
                as usize,
            mapped: AtomicI64::new(0),
            modules: Mutex::default(),
            kernels: Mutex::default(),
            context,
        };
        gpu.keep_freed_memory()?;
        Ok(Arc::new(gpu))
    }

    /// cudarc's context.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// The product's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The card's number, unique among all, as `nvidia-smi -L` writes it.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn uuid(&self) -> Result<String> {
        let uuid = self.context.uuid().map_err(driver("reading the device's number"))?;
        let groups = [0..4, 4..6, 6..8, 8..10, 10..16];
        let hex = |range: std::ops::Range<usize>| {
            uuid.bytes[range].iter().map(|&byte| format!("{:02x}", byte as u8)).collect::<String>()
        };
        Ok(format!("GPU-{}", groups.map(hex).join("-")))
    }

    /// Major and minor number.
    pub fn compute_capability(&self) -> (u32, u32) {
        self.compute_capability
    }

    /// The architecture that kernels are compiled for, `sm_90a` on a Hopper card.
    pub fn architecture(&self) -> String {
        match self.compute_capability {
            // The only way to wgmma and setmaxnreg.
            (9, 0) => super::HOPPER.into(),
            (major, minor) => format!("sm_{major}{minor}"),
        }
    }

    /// Number of streaming multiprocessors.
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// The most shared memory that one block can ask for, in bytes.
    pub fn shared_memory_per_block(&self) -> usize {
        self.shared_memory_per_block
    }

    /// Makes this device's context the calling thread's.
    pub(super) fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(driver("switching to the device"))
    }

    /// A kernel by its source and name, compiled and loaded at first use.
    ///
    /// # Errors
    /// If it does not compile or load.
    pub fn kernel(&self, source: &Source, entry: &'static str) -> Result<Kernel> {
        let mut hasher = DefaultHasher::new();
        (source.file, &source.defines, entry).hash(&mut hasher);
        let hash = hasher.finish();
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        let known = kernels.entry(hash).or_default();
        let same = |known: &Source| known.file == source.file && known.defines == source.defines;
        if let Some((_, _, kernel)) = known.iter().find(|(s, e, _)| *e == entry && same(s)) {
            return Ok(kernel.clone());
        }
        let kernel = Kernel::load(&self.module(source)?, entry)?;
        known.push((source.clone(), entry, kernel.clone()));
        Ok(kernel)
    }

    fn module(&self, source: &Source) -> Result<Arc<CudaModule>> {
        if let Some(module) = self.modules.lock().unwrap_or_else(PoisonError::into_inner).get(source) {
            return Ok(Arc::clone(module));
        }
        let compiled = source.compile(&self.architecture())?;
        let module =
            self.context.load_module(Ptx::from_binary(compiled.cubin)).map_err(|e| driver("loading a kernel")(e))?;
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Arc::clone(modules.entry(source.clone()).or_insert(module)))
    }

    /// Compiles and loads sources ahead of their use, in parallel; `progress` is told how many of them are done.
    ///
    /// # Errors
    /// If one does not compile.
    pub fn prepare(&self, sources: &[Source], progress: impl Fn(usize) + Sync) -> Result<()> {
        let done = AtomicUsize::new(0);
        sources.par_iter().try_for_each(|source| {
            self.module(source)?;
            progress(done.fetch_add(1, Ordering::Relaxed) + 1);
            Ok(())
        })
    }

    fn pool(&self) -> Result<sys::CUmemoryPool> {
        // SAFETY: the device belongs to a live context.
        unsafe { result::device::get_default_mem_pool(self.context.cu_device()) }
            .map_err(driver("finding the memory pool"))
    }

    /// Freed memory stays in the pool, so that the steady state of a loop asks the system for nothing.
    fn keep_freed_memory(&self) -> Result<()> {
        let mut threshold = u64::MAX;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: this attribute is a u64.
        unsafe { result::mem_pool::set_attribute(self.pool()?, attribute, (&raw mut threshold).cast()) }
            .map_err(driver("setting up the memory pool"))
    }

    /// Memory of the device and of this process' pool.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn memory(&self) -> Result<MemoryInfo> {
        self.bind()?;
        let (free, total) = self.context.mem_get_info().map_err(driver("asking for free memory"))?;
        let pool = self.pool()?;
        let mapped = self.mapped.load(Ordering::Relaxed).max(0) as u64;
        let read = |attribute| {
            let mut value = 0u64;
            // SAFETY: the attributes asked for below are u64.
            unsafe { result::mem_pool::get_attribute(pool, attribute, (&raw mut value).cast()) }
                .map(|()| value + mapped)
                .map_err(driver("asking for the pool's memory"))
        };
        Ok(MemoryInfo {
            free: free as u64,
            total: total as u64,
            used: read(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?,
            peak: read(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?,
            reserved: read(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?,
        })
    }

    /// Takes note of memory that is mapped outside the pool, or (below zero) given back.
    pub(super) fn count_mapped(&self, bytes: i64) {
        self.mapped.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Starts a new measurement of the peak at what is in use now.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn reset_peak_memory(&self) -> Result<()> {
        let mut zero = 0u64;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        // SAFETY: this attribute is a u64, and zero is the one value it takes.
        unsafe { result::mem_pool::set_attribute(self.pool()?, attribute, (&raw mut zero).cast()) }
            .map_err(driver("resetting the pool's peak"))
    }
}

/// The CUDA version that the driver supports: 1000 major + 10 minor.
///
/// # Errors
/// If the driver is missing.
pub fn driver_version() -> Result<i32> {
    require(Library::Driver)?;
    let mut version = 0;
    // SAFETY: writes one integer.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(driver("asking for the driver's version"))?;
    Ok(version)
}
