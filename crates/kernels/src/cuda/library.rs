//! Finding the CUDA libraries at run time.
//!
//! cudarc opens libraries by name and panics if the system's loader does not find them. So each one is opened here first,
//! also from the places where it commonly lies outside of the loader's path; once a library is loaded, opening it again
//! by its name finds the loaded one.

#![allow(unsafe_code)]

use crate::{KernelError, Result};
use libloading::os::unix::{Library as Handle, RTLD_GLOBAL, RTLD_NOW};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

/// A library that is looked for at run time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Library {
    /// The driver, part of every NVIDIA driver installation.
    Driver,
    /// The run-time compiler, part of the CUDA toolkit.
    Nvrtc,
    /// Matrix products, part of the CUDA toolkit.
    CublasLt,
    /// Communication between GPUs, a package of its own. Needed only where several ranks train together.
    Nccl,
}

impl Library {
    /// All of them.
    pub const ALL: [Library; 4] = [Library::Driver, Library::Nvrtc, Library::CublasLt, Library::Nccl];

    /// The file name that is looked for.
    pub fn file(self) -> &'static str {
        match self {
            Library::Driver => "libcuda.so.1",
            Library::Nvrtc => "libnvrtc.so.13",
            Library::CublasLt => "libcublasLt.so.13",
            Library::Nccl => "libnccl.so.2",
        }
    }

    /// What to install if it is missing.
    fn origin(self) -> &'static str {
        match self {
            Library::Driver => "it comes with the NVIDIA driver (580 or newer)",
            Library::Nccl => {
                "it comes with the system's package libnccl2 or the PyPI package nvidia-nccl-cu13; set NCCL_HOME or \
                 LD_LIBRARY_PATH to where it is"
            }
            Library::Nvrtc | Library::CublasLt => {
                "it comes with the CUDA toolkit 13 (or the PyPI packages nvidia-cuda-nvrtc and nvidia-cublas); set \
                 CUDA_HOME or LD_LIBRARY_PATH to where it is"
            }
        }
    }

    /// A file that must be loaded with it, because it looks for that one by name.
    fn companion(self) -> Option<&'static str> {
        (self == Library::Nvrtc).then_some("libnvrtc-builtins.so.13.0")
    }
}

/// Folders outside of the loader's own path that are looked into, in this order.
fn folders(library: Library) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    // Beside the program: a folder to copy to a cluster may bring its own.
    if let Some(folder) = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.to_owned())) {
        folders.extend([folder.join("lib"), folder]);
    }
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    if library == Library::Nccl {
        for root in ["NCCL_HOME", "NCCL_ROOT"].into_iter().filter_map(variable) {
            folders.extend([root.join("lib"), root.join("build/lib")]);
        }
    }
    for root in ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"].into_iter().filter_map(variable) {
        folders.extend([root.join("lib64"), root.join("targets/x86_64-linux/lib"), root.join("lib")]);
    }
    // Python's packages bring libraries, too: those of an environment that is active go before the system's toolkit.
    let package = if library == Library::Nccl { "nvidia/nccl/lib" } else { "nvidia/cu13/lib" };
    let of_python = |root: PathBuf| {
        let pythons = std::fs::read_dir(root.join("lib")).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut pythons: Vec<PathBuf> = pythons
            .filter(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("python")))
            .collect();
        pythons.sort();
        let packages = |python: PathBuf| ["site-packages", "dist-packages"].map(|packages| python.join(packages));
        pythons.into_iter().flat_map(packages).filter(|folder| folder.exists()).map(|folder| folder.join(package))
    };
    folders.extend(["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(variable).flat_map(of_python));
    folders.extend(["/usr/local/cuda/lib64", "/usr/local/cuda-13/lib64", "/opt/cuda/lib64"].map(PathBuf::from));
    let user = variable("HOME").map(|home| home.join(".local"));
    folders.extend(user.into_iter().chain(["/usr/local", "/usr"].map(PathBuf::from)).flat_map(of_python));
    if library == Library::Nccl {
        let system = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/local/lib"];
        folders.extend(system.map(PathBuf::from));
    }
    folders
}

/// What was loaded, and from where. The handles are never closed: cudarc keeps pointers into the libraries.
static LOADED: Mutex<Vec<(Library, String)>> = Mutex::new(Vec::new());

fn open(path: &std::ffi::OsStr) -> std::result::Result<(), String> {
    // SAFETY: opening a library runs its initialisers; these are NVIDIA's own libraries, which are made to be opened.
    let handle = unsafe { Handle::open(Some(path), RTLD_NOW | RTLD_GLOBAL) };
    handle.map(std::mem::forget).map_err(|e| e.to_string())
}

/// Loads a library if it is not loaded yet; returns where it was found.
///
/// # Errors
/// If it is nowhere, naming every place that was looked into.
pub fn require(library: Library) -> Result<String> {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, place)) = loaded.iter().find(|(known, _)| *known == library) {
        return Ok(place.clone());
    }
    let found = |place: String, folder: Option<&PathBuf>| {
        if let Some(companion) = library.companion() {
            // Only needed where the library itself cannot find it; that shows when something is compiled.
            let beside = folder.map_or_else(|| PathBuf::from(companion), |folder| folder.join(companion));
            let _ = open(beside.as_os_str());
        }
        place
    };
    let mut reasons = Vec::new();
    let place = match open(library.file().as_ref()) {
        Ok(()) => Some(found("the system's loader path".into(), None)),
        Err(reason) => {
            let path = std::env::var("LD_LIBRARY_PATH").map_or("not set".to_owned(), |path| format!("{path:?}"));
            reasons.push(format!("the loader's path (LD_LIBRARY_PATH is {path}; {reason})"));
            folders(library).into_iter().find_map(|folder| {
                let path = folder.join(library.file());
                if !path.exists() {
                    reasons.push(folder.display().to_string());
                    return None;
                }
                match open(path.as_os_str()) {
                    Ok(()) => Some(found(path.display().to_string(), Some(&folder))),
                    Err(reason) => {
                        reasons.push(format!("{} ({reason})", path.display()));
                        None
                    }
                }
            })
        }
    };
    match place {
        Some(place) => {
            loaded.push((library, place.clone()));
            Ok(place)
        }
        None => Err(KernelError::Library {
            library: library.file(),
            why: format!("looked for in {}; {}", reasons.join(", "), library.origin()),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_names_the_file_and_every_place() {
        // Whatever this machine has, a library under another name is not there.
        for library in Library::ALL {
            if let Err(error) = require(library) {
                let message = error.to_string();
                assert!(message.contains(library.file()), "{message}");
                assert!(message.contains("/usr/local/cuda/lib64") && message.contains("comes with"), "{message}");
                assert!(message.contains("LD_LIBRARY_PATH is "), "{message}");
            }
        }
    }

    #[test]
    fn nccl_is_looked_for_where_systems_and_python_put_it() {
        let nccl: Vec<String> = folders(Library::Nccl).iter().map(|folder| folder.display().to_string()).collect();
        assert!(nccl.iter().any(|folder| folder == "/usr/lib/x86_64-linux-gnu"), "{nccl:?}");
        for python in std::fs::read_dir("/usr/local/lib").into_iter().flatten().flatten() {
            let packages = python.path().join("dist-packages");
            let is_python = python.file_name().to_string_lossy().starts_with("python") && packages.exists();
            let package = packages.join("nvidia/nccl/lib").display().to_string();
            assert_eq!(nccl.contains(&package), is_python, "{package}: {nccl:?}");
        }
        assert!(!folders(Library::CublasLt).iter().any(|folder| folder.ends_with("nccl/lib")));
    }
}
