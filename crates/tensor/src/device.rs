//! Where a tensor's memory is.

use crate::error::{Result, TensorError};
use crate::storage::{MemoryUse, memory_use};
use std::fmt;
use std::str::FromStr;

/// The device that holds a tensor and runs its ops.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Device {
    /// The host's memory and processors.
    #[default]
    Cpu,
    /// The n-th CUDA device.
    Cuda(usize),
}

impl Device {
    /// The first CUDA device if it can be used, else the CPU.
    pub fn best_available() -> Self {
        let cuda = Device::Cuda(0);
        if cuda.check_available().is_ok() { cuda } else { Device::Cpu }
    }

    /// Waits until all work on the device is done; returns at once on a CPU.
    ///
    /// # Errors
    /// If some of the work failed.
    pub fn synchronize(self) -> Result<()> {
        match self {
            Device::Cpu => Ok(()),
            Device::Cuda(ordinal) => Ok(crate::cuda::queue(ordinal)?.synchronize()?),
        }
    }

    /// Bytes in use by tensors on this device.
    ///
    /// # Errors
    /// If the device cannot be asked.
    pub fn memory_use(self) -> Result<MemoryUse> {
        match self {
            Device::Cpu => Ok(memory_use()),
            Device::Cuda(ordinal) => {
                let memory = crate::cuda::queue(ordinal)?.gpu().memory()?;
                let (live, peak, held) = (memory.used, memory.peak, memory.reserved);
                Ok(MemoryUse { live: live as usize, peak: peak as usize, pooled: (held - live.min(held)) as usize })
            }
        }
    }

    /// Says why a device cannot be used, if it cannot.
    pub fn check_available(self) -> Result<()> {
        match self {
            Device::Cpu => Ok(()),
            Device::Cuda(ordinal) => crate::cuda::queue(ordinal).map(drop),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl FromStr for Device {
    type Err = TensorError;

    fn from_str(text: &str) -> Result<Self> {
        let unknown = || TensorError::UnknownDevice { text: text.to_owned() };
        match text {
            "cpu" => Ok(Device::Cpu),
            "cuda" => Ok(Device::Cuda(0)),
            _ => {
                let index = text.strip_prefix("cuda:").ok_or_else(unknown)?;
                Ok(Device::Cuda(index.parse().map_err(|_| unknown())?))
            }
        }
    }
}
