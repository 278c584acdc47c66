//! Every kernel, compiled for every architecture that is supported. Needs NVRTC, no GPU.

use stickbreak_kernels::attention::stick_breaking::hopper::{forward::Tuning, probe};
use stickbreak_kernels::cuda::{all_sources, compile::problems};

/// Ampere, Hopper with its own instructions, Blackwell.
const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_90a", "sm_100"];

#[test]
#[ignore = "needs NVRTC (the PyPI package nvidia-cuda-nvrtc is enough); no GPU"]
fn every_kernel_compiles_without_spills_or_warnings() {
    let mut complaints = Vec::new();
    for architecture in ARCHITECTURES {
        let mut sources = all_sources(architecture);
        assert!(!sources.is_empty());
        if architecture == "sm_90a" {
            sources.extend([64, 128].map(|head_dim| probe::source(head_dim, &Tuning::new(head_dim))));
        }
        for source in &sources {
            match source.compile_uncached(architecture) {
                Ok(compiled) => {
                    let found = problems(&compiled.log);
                    complaints.extend(found.into_iter().map(|p| format!("{} {architecture}: {p}", source.describe())));
                }
                Err(error) => complaints.push(error.to_string()),
            }
        }
        println!("{} sources for {architecture}", sources.len());
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}
