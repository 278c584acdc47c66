//! Kernels and their launch: the one place where device code is started.

#![allow(unsafe_code)]

use super::device::driver;
use super::queue::Queue;
use super::tensor_map::{MAP_BYTES, TensorMap};
use super::view::{DeviceMut, DeviceRef};
use crate::{KernelError, Result};
use cudarc::driver::{CudaFunction, CudaModule, result, sys};
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The most arguments that a kernel takes.
const MAX_ARGUMENTS: usize = 48;

/// A loaded kernel. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Kernel {
    inner: Arc<Loaded>,
}

#[derive(Debug)]
struct Loaded {
    function: CudaFunction,
    entry: &'static str,
    /// Bytes of each parameter, as the compiler laid them out.
    parameters: Vec<u8>,
    /// Dynamic shared memory that the kernel is allowed so far; more than 48 KB has to be asked for.
    shared: AtomicUsize,
}

/// Shape of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Blocks in x, y and z. A launch without blocks does nothing.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory in bytes.
    pub shared: usize,
}

/// One argument: its bits, in the low bytes, and how many bytes the kernel must expect.
#[derive(Debug, Clone, Copy)]
pub struct Arg {
    bits: u64,
    bytes: u8,
}

impl Arg {
    /// A pointer, null if there is nothing.
    pub fn optional(view: Option<DeviceRef<'_>>) -> Self {
        Self { bits: view.map_or(0, |view| view.pointer()), bytes: 8 }
    }

    /// A pointer to write to, null if there is nothing.
    pub fn optional_mut(view: Option<&mut DeviceMut<'_>>) -> Self {
        Self { bits: view.map_or(0, |view| view.pointer()), bytes: 8 }
    }
}

impl From<DeviceRef<'_>> for Arg {
    fn from(view: DeviceRef<'_>) -> Self {
        Self { bits: view.pointer(), bytes: 8 }
    }
}

impl From<&mut DeviceMut<'_>> for Arg {
    fn from(view: &mut DeviceMut<'_>) -> Self {
        Self { bits: view.pointer(), bytes: 8 }
    }
}

macro_rules! scalar_argument {
    ($($t:ty => $bits:expr),*) => {
        $(impl From<$t> for Arg {
            fn from(value: $t) -> Self {
                Self { bits: $bits(value), bytes: size_of::<$t>() as u8 }
            }
        })*
    };
}
scalar_argument!(
    i32 => |x: i32| u64::from(x as u32),
    u32 => u64::from,
    i64 => |x: i64| x as u64,
    u64 => |x: u64| x,
    f32 => |x: f32| u64::from(x.to_bits()),
    f64 => f64::to_bits
);

impl Kernel {
    pub(super) fn load(module: &Arc<CudaModule>, entry: &'static str) -> Result<Self> {
        let function = module
            .load_function(entry)
            .map_err(|e| KernelError::cuda(format!("loading the kernel {entry}"), driver("")(e)))?;
        let mut parameters = Vec::new();
        loop {
            let (mut offset, mut size) = (0, 0);
            // SAFETY: the function belongs to a loaded module; writes two integers.
            let outcome =
                unsafe { sys::cuFuncGetParamInfo(function.cu_function(), parameters.len(), &mut offset, &mut size) };
            match outcome {
                sys::CUresult::CUDA_SUCCESS => parameters.push(size as u8),
                // There is no parameter of this number.
                _ => break,
            }
        }
        Ok(Self { inner: Arc::new(Loaded { function, entry, parameters, shared: AtomicUsize::new(48 << 10) }) })
    }

    /// The kernel's name.
    pub fn entry(&self) -> &'static str {
        self.inner.entry
    }

    /// Registers per thread, and bytes of static shared and of local memory (spills and stack), as loaded.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn resources(&self) -> Result<(i32, i32, i32)> {
        let f = &self.inner.function;
        let read = || Ok((f.num_regs()?, f.shared_size_bytes()?, f.local_size_bytes()?));
        read().map_err(driver("reading a kernel's resources"))
    }

    fn allow_shared(&self, bytes: usize) -> Result<()> {
        if bytes <= self.inner.shared.load(Ordering::Relaxed) {
            return Ok(());
        }
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let doing = || format!("giving {} {bytes} bytes of shared memory", self.inner.entry);
        let set = self.inner.function.set_attribute(attribute, bytes as i32);
        set.map_err(|e| KernelError::cuda(doing(), driver("")(e)))?;
        self.inner.shared.store(bytes, Ordering::Relaxed);
        Ok(())
    }
}

impl Queue {
    /// Puts a kernel on the queue. Crate-private: an op calls it after its spec has been checked against its views.
    pub(crate) fn launch(&self, kernel: &Kernel, shape: Launch, arguments: &[Arg]) -> Result<()> {
        self.launch_with_maps(kernel, shape, &[], arguments)
    }

    /// The same for a kernel whose first parameters are tensor maps.
    pub(crate) fn launch_with_maps(
        &self,
        kernel: &Kernel,
        shape: Launch,
        maps: &[TensorMap<'_>],
        arguments: &[Arg],
    ) -> Result<()> {
        let loaded = &*kernel.inner;
        let found = maps.iter().map(|_| MAP_BYTES as u8).chain(arguments.iter().map(|argument| argument.bytes));
        if !found.clone().eq(loaded.parameters.iter().copied()) || maps.len() + arguments.len() > MAX_ARGUMENTS {
            let found: Vec<u8> = found.collect();
            return Err(KernelError::cuda(
                format!("launching {}", loaded.entry),
                format!("its parameters have {:?} bytes, the arguments {found:?}", loaded.parameters),
            ));
        }
        if shape.grid.contains(&0) {
            return Ok(());
        }
        self.gpu().bind()?;
        kernel.allow_shared(shape.shared)?;
        let mut bits = [0u64; MAX_ARGUMENTS];
        let mut pointers = [std::ptr::null_mut::<c_void>(); MAX_ARGUMENTS];
        for (pointer, map) in pointers.iter_mut().zip(maps) {
            *pointer = std::ptr::from_ref(map.encoded()).cast_mut().cast();
        }
        for (index, argument) in arguments.iter().enumerate() {
            bits[index] = argument.bits;
            pointers[maps.len() + index] = (&raw mut bits[index]).cast();
        }
        let (x, y, z) = (shape.grid[0], shape.grid[1], shape.grid[2]);
        // SAFETY: the arguments agree with the kernel's parameters in number and size (checked above; the machine is
        // little-endian, so that the low bytes come first). Pointers come from views, whose lengths the calling op has
        // checked against its spec, and which by their constructors' contract stay valid until the work is done; a map's
        // memory was checked when it was made. The driver reads the arguments during the call and writes none.
        let launched = unsafe {
            result::launch_kernel(
                loaded.function.cu_function(),
                (x, y, z),
                (shape.block, 1, 1),
                shape.shared as u32,
                self.stream().cu_stream(),
                &mut pointers[..maps.len() + arguments.len()],
            )
        };
        launched.map_err(|e| KernelError::cuda(format!("launching {} with {shape:?}", loaded.entry), driver("")(e)))
    }
}
