//! Which device a command computes on, and why.

use anyhow::{Context, Result};
use clap::Args;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use stickbreak_kernels::cuda::library::{Library, require};
use stickbreak_kernels::cuda::{Queue, Source, all_sources};
use stickbreak_model::{AttentionKind, ModelConfig};
use stickbreak_tensor::{DType, Device};

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

/// Compiles and loads, in parallel, the kernels that a model will use, so that no step waits for a compiler. Does nothing
/// on a CPU; quick where the cache on disk has them all.
///
/// # Errors
/// If one does not compile, with the compiler's log.
pub fn prepare_kernels(config: &ModelConfig, dtype: DType, device: Device, tell: impl Fn(&str) + Sync) -> Result<()> {
    let Some(queue) = queue(device)? else { return Ok(()) };
    let sources = all_sources(&queue.gpu().architecture());
    let sources: Vec<Source> = sources.into_iter().filter(|source| is_used(source, config, dtype)).collect();
    let started = Instant::now();
    let last = Mutex::new(Instant::now());
    queue.gpu().prepare(&sources, |done| {
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        // Silent if all comes from the cache.
        if last.elapsed() >= Duration::from_secs(2) {
            *last = Instant::now();
            tell(&format!("compiling kernels for {}: {done} of {}", queue.gpu().architecture(), sources.len()));
        }
    })?;
    let seconds = started.elapsed().as_secs_f64();
    tell(&format!("{} kernel files ready for {} in {seconds:.1} s", sources.len(), queue.gpu().architecture()));
    Ok(())
}

/// The smallest head size that a kernel of padded heads is made for.
const SMALLEST_WIDTH: usize = 32;

/// Whether a model asks for a source: not if it is another attention's, another dtype's or another head size's.
fn is_used(source: &Source, config: &ModelConfig, dtype: DType) -> bool {
    let stick = config.attention == AttentionKind::StickBreaking;
    let head_dim = config.head_dim().to_string();
    let other_attention = match source.file {
        file if file.starts_with("softmax") => stick,
        file if file.starts_with("stick") => !stick,
        _ => false,
    };
    let other_type = dtype != DType::F32 && source.file.contains("f32");
    // WIDTH is the size up to which smaller heads are padded.
    let other_size = source.defines.iter().any(|(name, value)| match *name {
        "HEAD_DIM" => *value != head_dim,
        "WIDTH" => value.parse() != Ok(config.head_dim().next_power_of_two().max(SMALLEST_WIDTH)),
        _ => false,
    });
    !(other_attention || other_type || other_size)
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
    fn only_the_kernels_of_a_model_are_prepared() {
        let config: ModelConfig = serde_json::from_str(
            r#"{"vocab_size": 31, "hidden_size": 128, "intermediate_size": 40, "num_layers": 1, "num_heads": 2}"#,
        )
        .unwrap();
        let used = |file, head_dim: &str, dtype| {
            let defines = vec![("HEAD_DIM", head_dim.to_owned())];
            is_used(&Source { file, parts: &[], defines }, &config, dtype)
        };
        assert!(used("stick_breaking.cu", "64", DType::BF16));
        assert!(!used("stick_breaking.cu", "128", DType::BF16));
        assert!(!used("softmax.cu", "64", DType::BF16));
        assert!(used("attention_f32.cu", "64", DType::F32) && !used("attention_f32.cu", "64", DType::BF16));
        assert!(is_used(&Source { file: "adamw.cu", parts: &[], defines: vec![] }, &config, DType::F32));
        prepare_kernels(&config, DType::F32, Device::Cpu, |line| panic!("{line}")).unwrap();
    }

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
