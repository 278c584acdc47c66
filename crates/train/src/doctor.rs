//! What this machine has, and what of it will be used.

use crate::trainer::program_version;
use anyhow::Result;
use std::path::Path;
use stickbreak_tensor::Device;

/// Prints one line for each thing that matters to a run.
///
/// # Errors
/// Only if standard output cannot be written.
pub fn run() -> Result<()> {
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
    line(
        "device cuda",
        match Device::Cuda(0).check_available() {
            Ok(()) => "usable".into(),
            Err(error) => error.to_string(),
        },
    );
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
    line("training", "will run on the cpu in f32".into());
    Ok(())
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
