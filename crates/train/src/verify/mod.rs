//! Golden vectors: does this build, on this machine, compute what it should?
//!
//! A folder of vectors has `attention/*.safetensors` and `model/<name>/`, float64 results of an independent
//! implementation. Every case is computed in f64 and f32 and compared; a line a case, and an error if one misses.

mod attention;
mod error_norm;
mod model;

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use stickbreak_tensor::DType;

/// The largest relative errors that are accepted, by dtype.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    /// Of a whole tensor, in the Frobenius norm.
    tensor: f64,
    /// Of one (token, head) vector.
    row: f64,
    /// Of the gradient norm along a training trajectory.
    trajectory_norm: f64,
}

impl Bounds {
    fn of(dtype: DType) -> Self {
        match dtype {
            DType::F64 => Self { tensor: 1e-9, row: 1e-9, trajectory_norm: 1e-9 },
            _ => Self { tensor: 2e-5, row: 1e-4, trajectory_norm: 1e-4 },
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
pub fn verify(folder: &Path) -> Result<usize> {
    let mut failed = Vec::new();
    let mut passed = 0;
    let attention_files = list(&folder.join("attention"), |path| path.extension().is_some_and(|e| e == "safetensors"))?;
    let model_folders = list(&folder.join("model"), Path::is_dir)?;
    if attention_files.is_empty() && model_folders.is_empty() {
        bail!("{} has neither attention/*.safetensors nor model/*/", folder.display());
    }
    for dtype in [DType::F64, DType::F32] {
        let bounds = Bounds::of(dtype);
        let cases =
            attention_files.iter().map(|path| ("attention", path)).chain(model_folders.iter().map(|p| ("model", p)));
        for (kind, path) in cases {
            let name = path.file_stem().unwrap_or_default().to_string_lossy();
            let run = if kind == "attention" { attention::compare } else { model::compare };
            let comparisons = run(path, dtype, bounds).with_context(|| format!("in {}", path.display()))?;
            let worst =
                comparisons.iter().max_by(|a, b| a.share().total_cmp(&b.share())).context("nothing compared")?;
            let ok = comparisons.iter().all(Comparison::passes);
            println!(
                "{} {dtype} {kind:<9} {name:<26} worst {:<34} error {:.1e}  bound {:.0e}  ({} quantities)",
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
    println!("{passed} passed, {} failed", failed.len());
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
