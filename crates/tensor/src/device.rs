//! Where a tensor's memory is.

use crate::error::{Result, TensorError};
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
    /// Says why a device cannot be used, if it cannot.
    pub fn check_available(self) -> Result<()> {
        match self {
            Device::Cpu => Ok(()),
            Device::Cuda(_) => Err(TensorError::DeviceUnavailable {
                device: self,
                reason: "this version has no CUDA kernels yet; use the device `cpu`".into(),
            }),
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
