//! Compiles every CUDA kernel with NVRTC, which needs no GPU; fetches NVRTC if this machine has none.

use crate::{cargo, check, root};
use anyhow::{Context, Result, bail};
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

const LIBRARY: &str = "libnvrtc.so.13";
/// The compiler of CUDA 13.0, without the rest of the toolkit.
const PACKAGE: &str = "nvidia-cuda-nvrtc==13.0.88";

/// Compiles all kernels for all architectures; an error, a spill or a warning fails.
pub fn compile_kernels() -> Result<()> {
    let mut command = cargo();
    command.args(["test", "--package", "stickbreak-kernels", "--test", "cuda_sources", "--", "--ignored"]);
    if !is_installed() {
        let venv = root().join("target").join("nvrtc");
        let folder = match library_folder(&venv) {
            Some(folder) => folder,
            None => fetch(&venv)?,
        };
        let mut path = folder.into_os_string();
        if let Some(old) = env::var_os("LD_LIBRARY_PATH").filter(|old| !old.is_empty()) {
            path.push(":");
            path.push(old);
        }
        command.env("VIRTUAL_ENV", &venv).env("LD_LIBRARY_PATH", path);
    }
    check(&mut command)
}

/// Whether NVRTC lies where the program would find it.
fn is_installed() -> bool {
    let loader = Command::new("ldconfig").arg("-p").output();
    if loader.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains(LIBRARY)) {
        return true;
    }
    let mut folders: Vec<PathBuf> =
        env::var_os("LD_LIBRARY_PATH").map_or(Vec::new(), |paths| env::split_paths(&paths).collect());
    for variable in ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"] {
        if let Some(cuda) = env::var_os(variable).map(PathBuf::from) {
            folders.extend([cuda.join("lib64"), cuda.join("targets/x86_64-linux/lib"), cuda.join("lib")]);
        }
    }
    folders.extend(["/usr/local/cuda/lib64", "/usr/local/cuda-13/lib64", "/opt/cuda/lib64"].map(PathBuf::from));
    let environment = env::var_os("VIRTUAL_ENV").and_then(|venv| library_folder(Path::new(&venv)));
    environment.is_some() || folders.iter().any(|folder| folder.join(LIBRARY).exists())
}

/// Where a Python environment has NVRTC, if it has.
fn library_folder(venv: &Path) -> Option<PathBuf> {
    let versions = std::fs::read_dir(venv.join("lib")).ok()?.flatten();
    let mut folders = versions.map(|python| python.path().join("site-packages/nvidia/cu13/lib"));
    folders.find(|folder| folder.join(LIBRARY).exists())
}

/// Installs NVRTC into a Python environment of its own.
fn fetch(venv: &Path) -> Result<PathBuf> {
    eprintln!("{LIBRARY} was not found on this machine; installing {PACKAGE} from PyPI into {}", venv.display());
    let failed = || {
        format!(
            "the CUDA kernels were NOT compiled: {LIBRARY} is not installed and could not be fetched from PyPI ({PACKAGE})"
        )
    };
    check(Command::new("python3").args(["-m", "venv"]).arg(venv)).with_context(failed)?;
    let mut pip = Command::new(venv.join("bin").join("python"));
    check(pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", PACKAGE]))
        .with_context(failed)?;
    match library_folder(venv) {
        Some(folder) => Ok(folder),
        None => bail!("{PACKAGE} holds no {LIBRARY} below {}", venv.display()),
    }
}
