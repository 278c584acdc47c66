//! Every kernel, compiled for every architecture that is supported. Needs NVRTC, no GPU.

use std::sync::atomic::{AtomicUsize, Ordering};

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
        // One compiler a processor.
        let next = AtomicUsize::new(0);
        let work = || {
            let mut found = Vec::new();
            while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
                match source.compile_uncached(architecture) {
                    Ok(compiled) => {
                        let named = |problem| format!("{} {architecture}: {problem}", source.describe());
                        found.extend(problems(&compiled.log).into_iter().map(named));
                    }
                    Err(error) => found.push(error.to_string()),
                }
            }
            found
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            complaints.extend(threads.into_iter().flat_map(|thread| thread.join().expect("no compiler panics")));
        });
        println!("{} sources for {architecture}", sources.len());
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}
