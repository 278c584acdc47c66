//! Which device a command computes on, and why.

use anyhow::{Context, Result};
use clap::Args;
use stickbreak_kernels::cuda::Queue;
use stickbreak_kernels::cuda::library::{Library, require};
use stickbreak_tensor::Device;

/// The option `--device`, shared by every command that computes.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct DeviceOption {
    /// Where to compute: cpu, cuda or cuda:N; default: a GPU if one can be used, else the CPU.
    #[arg(long)]
    device: Option<Device>,
}

impl DeviceOption {
    /// The device, and in words what was chosen and why.
    ///
    /// # Errors
    /// If a device was asked for that cannot be used: there is no silent second choice.
    pub fn choose(self) -> Result<(Device, String)> {
        match self.device {
            Some(device) => {
                device.check_available().with_context(|| format!("--device {device} was asked for"))?;
                Ok((device, format!("device {device}{}, as asked", name_of(device))))
            }
            None => Ok(best()),
        }
    }

    /// [`choose`](Self::choose), with the choice told on standard error.
    ///
    /// # Errors
    /// As [`choose`](Self::choose).
    pub fn announce(self) -> Result<Device> {
        let (device, why) = self.choose()?;
        eprintln!("{why}");
        Ok(device)
    }
}

/// The first GPU if it can be used, else the CPU with the reason.
fn best() -> (Device, String) {
    let cuda = Device::Cuda(0);
    match cuda.check_available() {
        Ok(()) => (cuda, format!("device {cuda}{}: the first GPU, which can be used", name_of(cuda))),
        // Most machines without a GPU have no driver, and its many possible places are of no interest then.
        Err(_) if require(Library::Driver).is_err() => {
            (Device::Cpu, format!("device cpu: {} was not found, so there is no NVIDIA driver", Library::Driver.file()))
        }
        Err(error) => (Device::Cpu, format!("device cpu: {error}")),
    }
}

/// The queue of a GPU; `None` for the CPU.
///
/// # Errors
/// If the GPU cannot be used.
pub fn queue(device: Device) -> Result<Option<Queue>> {
    match device {
        Device::Cpu => Ok(None),
        Device::Cuda(ordinal) => Ok(Some(stickbreak_tensor::cuda::queue(ordinal)?)),
    }
}

/// The product's name of a GPU.
pub fn gpu_name(device: Device) -> Option<String> {
    queue(device).ok().flatten().map(|queue| queue.gpu().name().to_owned())
}

/// ` (name, architecture)` of a GPU.
fn name_of(device: Device) -> String {
    let queue = queue(device).ok().flatten();
    queue.map_or(String::new(), |queue| format!(" ({}, {})", queue.gpu().name(), queue.gpu().architecture()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_always_there_and_a_device_that_was_asked_for_is_never_replaced() {
        let asked = |text: &str| DeviceOption { device: Some(text.parse().unwrap()) };
        assert_eq!(asked("cpu").choose().unwrap(), (Device::Cpu, "device cpu, as asked".into()));
        // No machine has so many.
        let error = format!("{:#}", asked("cuda:4000").choose().unwrap_err());
        assert!(error.contains("cuda:4000"), "{error}");
        if require(Library::Driver).is_err() {
            assert!(error.contains("libcuda.so.1") && error.contains("/usr/local/cuda"), "{error}");
            let (device, why) = DeviceOption::default().choose().unwrap();
            assert!(device == Device::Cpu && why.contains("libcuda.so.1"), "{why}");
        }
    }
}
