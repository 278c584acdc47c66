//! What this machine has, and what of it will be used; or what a run on many GPUs will need.

use crate::config::{ComputeType, RunConfig};
use crate::device::{self, DeviceOption};
use crate::distributed::cost::Cluster;
use crate::distributed::plan::plan;
use crate::distributed::{launch, nccl};
use crate::mfu;
use crate::trainer::program_version;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use stickbreak_kernels::cuda::compile;
use stickbreak_kernels::cuda::library::{Library, require};
use stickbreak_tensor::Device;

/// What to say.
#[derive(Debug, Clone, clap::Args)]
pub struct DoctorArgs {
    /// Instead: memory of each GPU by term, and predicted speed, of this run on many GPUs. Needs no GPU.
    #[arg(long, value_name = "CONFIG")]
    plan: Option<PathBuf>,
    /// Up to how many GPUs.
    #[arg(long, default_value_t = 8, requires = "plan")]
    gpus: usize,
    /// GPUs of a node.
    #[arg(long, default_value_t = 8, requires = "plan")]
    gpus_per_node: usize,
    /// Gbit/s of the network for each GPU, of which 85% are assumed to be reached.
    #[arg(long, default_value_t = 400.0, requires = "plan")]
    network_gbit: f64,
    /// Share of the peak that one GPU reaches in training, from 0 to 1: what your one-GPU run prints.
    #[arg(long, default_value_t = Cluster::default().utilisation, requires = "plan")]
    mfu: f64,
    /// Change a setting of the config: `--set train.micro_batch=1`. Can be given many times.
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "plan")]
    changes: Vec<String>,
}

/// Prints one line for each thing that matters to a run, or a plan.
///
/// # Errors
/// If the plan's config or numbers cannot be used.
pub fn run(args: &DoctorArgs) -> Result<()> {
    match &args.plan {
        None => machine(),
        Some(path) => {
            let cluster = Cluster {
                gpus_per_node: args.gpus_per_node,
                network_bandwidth: 0.85 * args.network_gbit * 1e9 / 8.0,
                utilisation: args.mfu,
                ..Cluster::default()
            };
            let config = RunConfig::load(path, &args.changes)?;
            print!("{}", plan(&config, args.gpus, &cluster)?);
            Ok(())
        }
    }
}

fn machine() -> Result<()> {
    let line = |what: &str, found: String| println!("{what:<16} {found}");
    line("program", program_version());
    line("system", format!("{} {}", std::env::consts::OS, std::env::consts::ARCH));
    line("processor", processor_name().unwrap_or_else(|| "unknown".into()));
    line("vector code", vector_instructions());
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    line("processors", format!("{processors} usable; {} worker threads will be used", rayon::current_num_threads()));
    let memory = crate::trainer::available_memory();
    line(
        "free memory",
        memory.map_or("unknown".into(), |bytes| format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64)),
    );
    cuda(&line);
    line("NCCL", nccl::version().unwrap_or_else(|_| "not usable; needed only for several GPUs".into()));
    line("launcher", launch::detect_here().map_or_else(|error| error.to_string(), |launch| launch.to_string()));
    line(
        "parquet",
        if cfg!(feature = "parquet") { "built in" } else { "not built in; build with --features parquet" }.into(),
    );
    let registry = crate::data::registry::find_files(&crate::data::RegistryOptions::default());
    line(
        "cargo registry",
        match registry {
            Ok(files) => {
                let bytes: u64 = files.iter().map(|file| file.bytes).sum();
                format!("{} source files, {:.1} MB: text for the quickstart", files.len(), bytes as f64 / 1e6)
            }
            Err(error) => error.to_string(),
        },
    );
    let here = Path::new("configs/quickstart.toml");
    let config = if here.exists() { "found" } else { "not in this folder; give `train` a config" };
    line("quickstart", config.into());
    let (device, why) = DeviceOption::default().choose()?;
    line("training", format!("will run in {}; {why}", ComputeType::Auto.resolve(device)?));
    Ok(())
}

/// Driver, libraries, compiler and cards: where each was found, or where it was looked for.
fn cuda(line: &impl Fn(&str, String)) {
    line("NVIDIA driver", driver_version().unwrap_or_else(|| "not loaded".into()));
    let found =
        |library: Library| require(library).map_or_else(|error| error.to_string(), |place| format!("in {place}"));
    for library in Library::ALL {
        line(library.file(), found(library));
    }
    if let Ok((major, minor)) = compile::nvrtc_version() {
        line("NVRTC", format!("{major}.{minor}"));
    }
    let cache = compile::cache_folder().map_or("none: set STICKBREAK_CACHE or HOME".to_owned(), |folder| {
        let files = std::fs::read_dir(&folder).map_or(0, |entries| entries.flatten().count());
        format!("{} ({files} files)", folder.display())
    });
    line("kernel cache", cache);
    for ordinal in 0.. {
        let gpu = device::queue(Device::Cuda(ordinal)).and_then(|queue| queue.context("no queue"));
        match gpu.and_then(|queue| Ok((queue.gpu().memory()?, queue))) {
            Ok((memory, queue)) => {
                let gpu = queue.gpu();
                let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
                let peak = mfu::peak_flops(gpu.name())
                    .map_or("peak not known".to_owned(), |peak| format!("{:.0} TFLOP/s in bf16", peak / 1e12));
                line(
                    &format!("device cuda:{ordinal}"),
                    format!(
                        "{}, {}, {} multiprocessors, {:.1} of {:.1} GiB free, {peak}",
                        gpu.name(),
                        gpu.architecture(),
                        gpu.multiprocessors(),
                        gib(memory.free),
                        gib(memory.total)
                    ),
                );
            }
            // The first one says why there is none; the next ones only that there are no more.
            Err(error) => {
                if ordinal == 0 {
                    line("device cuda:0", format!("{error:#}"));
                }
                return;
            }
        }
    }
}

/// The version of the loaded kernel module.
fn driver_version() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let is_version = |word: &&str| word.contains('.') && word.split('.').all(|part| part.parse::<u32>().is_ok());
    text.lines().next()?.split_whitespace().find(is_version).map(str::to_owned)
}

fn processor_name() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn vector_instructions() -> String {
    #[cfg(target_arch = "x86_64")]
    {
        let found: Vec<&str> = [
            ("AVX-512", std::arch::is_x86_feature_detected!("avx512f")),
            ("AVX2", std::arch::is_x86_feature_detected!("avx2")),
            ("FMA", std::arch::is_x86_feature_detected!("fma")),
        ]
        .into_iter()
        .filter_map(|(name, has)| has.then_some(name))
        .collect();
        if !found.contains(&"FMA") {
            return format!("{}: without FMA every kernel is slow", found.join(", "));
        }
        found.join(", ")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        "the architecture's own".into()
    }
}
