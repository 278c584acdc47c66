//! Which device a command computes on, and why.

use crate::distributed::launch::Launch;
use anyhow::{Context, Result, bail};
use clap::Args;
use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use stickbreak_kernels::cuda::library::{Library, require};
use stickbreak_kernels::cuda::{Gpu, Queue, Source, Span, all_sources};
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

    /// The device of one rank: of several on a machine each has a GPU of its own.
    ///
    /// # Errors
    /// As [`choose`](Self::choose), if there are fewer GPUs than ranks here, or a certain one is asked for by all.
    pub fn choose_for(self, launch: &Launch) -> Result<(Device, String)> {
        let (ranks, rank) = (launch.ranks, launch.rank);
        if ranks == 1 {
            return self.choose();
        }
        // GPUs are counted, not opened: every rank opens its own and no other, which would take memory there.
        let gpus = match self.device {
            Some(device @ Device::Cuda(1..)) => bail!(
                "--device {device} names one GPU, but each of the {ranks} ranks takes its own: leave it out, or --device cuda"
            ),
            Some(Device::Cpu) => return Ok((Device::Cpu, "device cpu, as asked".to_owned())),
            Some(device) => Gpu::count().with_context(|| format!("--device {device} was asked for"))?,
            None => Gpu::count().unwrap_or(0),
        };
        if gpus == 0 && self.device.is_none() {
            return Ok(best());
        }
        let device = Device::Cuda(launch.device(gpus)?);
        device.check_available().with_context(|| format!("rank {rank} takes {device}"))?;
        Ok((device, format!("device {device}{} for rank {rank} of {ranks}", name_of(device))))
    }

    /// [`choose`](Self::choose), with the choice told on standard error.
    ///
    /// # Errors
    /// As [`choose`](Self::choose).
    pub fn announce(self) -> Result<Device> {
        self.announce_for(&Launch::alone())
    }

    /// [`choose_for`](Self::choose_for), with the choice told on standard error.
    ///
    /// # Errors
    /// As [`choose_for`](Self::choose_for).
    pub fn announce_for(self, launch: &Launch) -> Result<Device> {
        let (device, why) = self.choose_for(launch)?;
        // At once, so that lines of several ranks do not mix.
        let _ = std::io::stderr().write_all(format!("{why}\n").as_bytes());
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

/// Stretches in which a GPU's queue waited for something outside of it, such as a collective.
#[derive(Debug)]
pub struct Waits {
    queue: Option<Queue>,
    spans: Vec<Span>,
}

impl Waits {
    /// None yet. On a CPU there are none: whoever waits there is the host.
    pub fn new(device: Device) -> Self {
        // A GPU that cannot be used fails where it is used.
        Self { queue: queue(device).ok().flatten(), spans: Vec::new() }
    }

    /// None yet, on the same device.
    pub(crate) fn fresh(&self) -> Self {
        Self { queue: self.queue.clone(), spans: Vec::new() }
    }

    /// Runs `wait`, which orders the queue behind something, and notes how long the queue stands still for it.
    ///
    /// # Errors
    /// Those of `wait`, or if the driver fails.
    pub fn measure(&mut self, wait: impl FnOnce() -> Result<()>) -> Result<()> {
        let timer = self.queue.as_ref().map(Queue::timer).transpose()?;
        wait()?;
        self.spans.extend(timer.map(|timer| timer.stop()).transpose()?);
        Ok(())
    }

    /// Their sum in milliseconds, `None` on a CPU. Waits for the last one to be over.
    ///
    /// # Errors
    /// If work failed.
    pub fn milliseconds(&self) -> Result<Option<f64>> {
        let sum = || self.spans.iter().try_fold(0.0, |sum, span| Ok(sum + span.milliseconds()?));
        self.queue.as_ref().map(|_| sum()).transpose()
    }
}

/// Compiles and loads, in parallel, the kernels that a model will use, so that no step waits for a compiler. Does nothing
/// on a CPU; quick where the cache on disk has them all.
///
/// # Errors
/// If one does not compile, with the compiler's log.
pub fn prepare_kernels(config: &ModelConfig, dtype: DType, device: Device, tell: impl Fn(&str) + Sync) -> Result<()> {
    let Some(queue) = queue(device)? else { return Ok(()) };
    let all = all_sources(&queue.gpu().architecture());
    let sources: Vec<Source> = all.into_iter().filter(|source| is_used(source, config, dtype)).collect();
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
    // Attention on tensor cores is for bf16, and has a file of its own for float32; tiles are counted alike.
    let other_type = match dtype {
        DType::F32 if source.file == "stick_breaking_tiles.cu" => false,
        DType::F32 => source.file.starts_with("softmax") || source.file.starts_with("stick"),
        _ => source.file.contains("f32"),
    };
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
        for dtype in [DType::F32, DType::BF16] {
            assert!(is_used(&Source { file: "stick_breaking_tiles.cu", parts: &[], defines: vec![] }, &config, dtype));
        }
        assert!(is_used(&Source { file: "adamw.cu", parts: &[], defines: vec![] }, &config, DType::F32));
        prepare_kernels(&config, DType::F32, Device::Cpu, |line| panic!("{line}")).unwrap();
    }

    #[test]
    fn ranks_share_the_cpu_and_none_takes_a_gpu_that_all_were_told_to_take() {
        use crate::distributed::launch::detect;
        let variables = [("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")];
        let variables = variables.into_iter().chain([("MASTER_ADDR", "localhost"), ("MASTER_PORT", "7")]);
        let launch = detect(&variables.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()).unwrap();
        let asked = |text: &str| DeviceOption { device: Some(text.parse().unwrap()) }.choose_for(&launch);
        assert_eq!(asked("cpu").unwrap(), (Device::Cpu, "device cpu, as asked".into()));
        let error = asked("cuda:1").unwrap_err().to_string();
        assert!(error.contains("cuda:1") && error.contains("2 ranks"), "{error}");
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
