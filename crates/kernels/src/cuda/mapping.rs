//! Device memory that other processes can be given to map, so that GPUs of one host reach each other's.
//!
//! The driver's pool has no such memory: a library that maps it elsewhere wants whole pages with a handle of their own.

#![allow(unsafe_code)]

use super::device::Gpu;
use cudarc::driver::DriverError;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUmemAllocationHandleType as Handles};
use std::sync::Arc;

/// Pages of a device at an address of their own, in no queue's order. Given back when dropped, which has to be after all
/// work on them.
#[derive(Debug)]
pub(super) struct Mapping {
    gpu: Arc<Gpu>,
    handle: sys::CUmemGenericAllocationHandle,
    /// Of the first byte; zero until it is reserved.
    address: u64,
    /// Whole pages.
    bytes: usize,
}

impl Mapping {
    /// Memory of at least so many bytes; `None` where the device or the system knows none of this kind.
    ///
    /// # Errors
    /// If the device has not so much memory, or cannot map it.
    pub(super) fn new(gpu: &Arc<Gpu>, bytes: usize) -> std::result::Result<Option<Self>, DriverError> {
        let has = |attribute| gpu.context().attribute(attribute).is_ok_and(|value| value != 0);
        if !has(Attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED)
            || !has(Attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED)
        {
            return Ok(None);
        }
        // Where hosts share an NVLink fabric NCCL passes on handles of that kind, which need a right that few have.
        let file = Handles::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        let fabric = has(Attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED)
            .then_some(sys::CUmemAllocationHandleType_enum(file.0 | Handles::CU_MEM_HANDLE_TYPE_FABRIC.0));
        for kind in fabric.into_iter().chain([file]) {
            match Self::allocate(gpu, bytes, kind) {
                Ok(mapping) => return mapping.map().map(Some),
                Err(error @ DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => return Err(error),
                // Such as in a sandbox that passes no handles on.
                Err(error) => tracing::debug!("no memory with handles of kind {}: {error:?}", kind.0),
            }
        }
        Ok(None)
    }

    /// Pages without an address.
    fn allocate(gpu: &Arc<Gpu>, bytes: usize, kind: Handles) -> std::result::Result<Self, DriverError> {
        let properties = sys::CUmemAllocationProp {
            type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
            requestedHandleTypes: kind,
            location: location(gpu),
            win32HandleMetaData: std::ptr::null_mut(),
            allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
                compressionType: 0,
                gpuDirectRDMACapable: 0,
                usage: 0,
                reserved: [0; 4],
            },
        };
        let (mut page, mut handle) = (0, 0);
        let recommended = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED;
        // SAFETY: the properties are complete, and one number is written.
        unsafe { sys::cuMemGetAllocationGranularity(&mut page, &properties, recommended) }.result()?;
        let bytes = bytes.max(1).next_multiple_of(page.max(1));
        // SAFETY: as above; `drop` releases the handle once.
        unsafe { sys::cuMemCreate(&mut handle, bytes, &properties, 0) }.result()?;
        gpu.count_mapped(bytes as i64);
        Ok(Self { gpu: Arc::clone(gpu), handle, address: 0, bytes })
    }

    /// Gives them an address that the device reads and writes.
    fn map(mut self) -> std::result::Result<Self, DriverError> {
        // SAFETY: one address is written; `drop` frees it.
        unsafe { sys::cuMemAddressReserve(&mut self.address, self.bytes, 0, 0, 0) }.result()?;
        let access = sys::CUmemAccessDesc {
            location: location(&self.gpu),
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: the address was reserved for so many bytes, and nothing else is mapped there; the handle has as many.
        unsafe { sys::cuMemMap(self.address, self.bytes, 0, self.handle, 0) }.result()?;
        // SAFETY: the whole of what was just mapped, for one device.
        unsafe { sys::cuMemSetAccess(self.address, self.bytes, &access, 1) }.result()?;
        Ok(self)
    }

    /// Address of the first byte.
    pub(super) fn address(&self) -> u64 {
        self.address
    }
}

fn location(gpu: &Gpu) -> sys::CUmemLocation {
    sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: gpu.context().cu_device() }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // At the end of the process the driver may be gone before; the memory is gone with it.
        let _ = self.gpu.bind();
        // SAFETY: made by `allocate` and `map`, given back once, here, and nobody uses it any more. What was not mapped, as
        // `map` failed, is an error that changes nothing.
        unsafe {
            if self.address != 0 {
                let _ = sys::cuMemUnmap(self.address, self.bytes);
                let _ = sys::cuMemAddressFree(self.address, self.bytes);
            }
            let _ = sys::cuMemRelease(self.handle);
        }
        self.gpu.count_mapped(-(self.bytes as i64));
    }
}
