//! Golden vectors: does this build, on this machine, compute what it should?
//!
//! A folder of vectors has `attention/*.safetensors` and `model/<name>/`, float64 results of an independent
//! implementation. Every case is computed and compared, on a CPU in f64 and f32, on a GPU in f32 and bf16; a line a case,
//! and an error if one misses. The last line has a digest of all results: the same command twice gives the same bits, or
//! the digest shows it.

mod attention;
mod error_norm;
mod model;

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use stickbreak_tensor::{DType, Device};

/// The largest relative errors that are accepted of attention, by dtype.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    /// Of a whole tensor, in the Frobenius norm.
    tensor: f64,
    /// Of one (token, head) vector.
    row: f64,
}

impl Bounds {
    fn of(dtype: DType) -> Self {
        match dtype {
            DType::F64 => Self { tensor: 1e-9, row: 1e-9 },
            DType::BF16 => Self { tensor: 1e-2, row: 3e-2 },
            _ => Self { tensor: 2e-5, row: 1e-4 },
        }
    }

    /// Of the remainder, which bf16 kernels compute and return in float32.
    fn of_remainder(dtype: DType) -> Self {
        Self::of(if dtype == DType::BF16 { DType::F32 } else { dtype })
    }
}

/// The largest relative errors that are accepted of a model, by dtype.
#[derive(Debug, Clone, Copy)]
struct ModelBounds {
    loss: f64,
    logits: f64,
    /// Of each parameter.
    gradient: f64,
    /// Of the loss along a training trajectory and after it, and of the final norm of all parameters.
    trajectory: f64,
    /// Of the gradient norm along it.
    trajectory_norm: f64,
}

impl ModelBounds {
    fn of(dtype: DType) -> Self {
        let all = |bound, trajectory_norm| Self {
            loss: bound,
            logits: bound,
            gradient: bound,
            trajectory: bound,
            trajectory_norm,
        };
        match dtype {
            DType::F64 => all(1e-9, 1e-9),
            // The norm is made of the gradients, whose own bound it gets.
            DType::BF16 => Self { loss: 2e-3, logits: 3e-2, gradient: 8e-2, trajectory: 2e-2, trajectory_norm: 8e-2 },
            _ => all(2e-5, 1e-4),
        }
    }
}

/// One compared quantity.
#[derive(Debug, Clone)]
struct Comparison {
    what: String,
    error: f64,
    bound: f64,
}

impl Comparison {
    fn new(what: impl Into<String>, error: f64, bound: f64) -> Self {
        Self { what: what.into(), error, bound }
    }

    /// NaN fails.
    fn passes(&self) -> bool {
        self.error <= self.bound
    }

    /// How much of the bound is used.
    fn share(&self) -> f64 {
        if self.error.is_nan() { f64::INFINITY } else { self.error / self.bound }
    }
}

/// Runs all cases below `folder` and prints a line each to standard output; returns how many passed.
///
/// # Errors
/// If there are no cases, a file cannot be read, or a case misses its bound.
pub fn verify(folder: &Path, device: Device) -> Result<usize> {
    let mut digest = blake3::Hasher::new();
    let mut failed = Vec::new();
    let mut passed = 0;
    let attention_files = list(&folder.join("attention"), |path| path.extension().is_some_and(|e| e == "safetensors"))?;
    let model_folders = list(&folder.join("model"), Path::is_dir)?;
    if attention_files.is_empty() && model_folders.is_empty() {
        bail!("{} has neither attention/*.safetensors nor model/*/", folder.display());
    }
    let dtypes = if device == Device::Cpu { [DType::F64, DType::F32] } else { [DType::F32, DType::BF16] };
    for dtype in dtypes {
        let cases =
            attention_files.iter().map(|path| ("attention", path)).chain(model_folders.iter().map(|p| ("model", p)));
        for (kind, path) in cases {
            let name = path.file_stem().unwrap_or_default().to_string_lossy();
            let run = if kind == "attention" { attention::compare } else { model::compare };
            let comparisons = match run(path, dtype, device, &mut digest) {
                Ok(comparisons) => comparisons,
                // A case that cannot run has failed; the others still say what they have to say.
                Err(error) => {
                    println!("FAIL {dtype:<4} {kind:<9} {name:<26} in {}: {error:#}", path.display());
                    failed.push(format!("{name} ({dtype})"));
                    continue;
                }
            };
            let worst =
                comparisons.iter().max_by(|a, b| a.share().total_cmp(&b.share())).context("nothing compared")?;
            let ok = comparisons.iter().all(Comparison::passes);
            println!(
                "{} {dtype:<4} {kind:<9} {name:<26} worst {:<34} error {:.1e}  bound {:.0e}  ({} quantities)",
                if ok { "ok  " } else { "FAIL" },
                worst.what,
                worst.error,
                worst.bound,
                comparisons.len(),
            );
            for miss in comparisons.iter().filter(|c| !c.passes()) {
                println!("       {} has error {:.3e}, bound {:.0e}", miss.what, miss.error, miss.bound);
            }
            if ok {
                passed += 1;
            } else {
                failed.push(format!("{name} ({dtype})"));
            }
        }
    }
    println!("{passed} passed, {} failed on {device}; digest {}", failed.len(), &digest.finalize().to_hex()[..16]);
    if !failed.is_empty() {
        bail!("golden vectors missed: {}", failed.join(", "));
    }
    Ok(passed)
}

/// Entries of a folder that `wanted` takes, sorted; none if there is no such folder.
fn list(folder: &Path, wanted: impl Fn(&Path) -> bool) -> Result<Vec<PathBuf>> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let entries = std::fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.retain(|path| wanted(path));
    paths.sort();
    Ok(paths)
}

/// Adds results to the digest, bit by bit.
fn digest_results(digest: &mut blake3::Hasher, values: &[f64]) {
    for value in values {
        digest.update(&value.to_bits().to_le_bytes());
    }
}
