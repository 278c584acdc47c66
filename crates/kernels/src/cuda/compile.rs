//! From CUDA C++ text to a cubin: NVRTC, its log, and a cache on disk.
//!
//! `nvrtcGetCUBIN` gives machine code for one architecture, so nothing is compiled a second time by the driver, and the
//! log of a *successful* compilation is where ptxas reports registers, spills and serialised wgmma; cudarc's own wrapper
//! gives PTX and reads the log only on failure.

#![allow(unsafe_code)]

use super::library::{Library, require};
use crate::{KernelError, Result};
use cudarc::nvrtc::{result, sys};
use std::ffi::CString;
use std::fmt::Write;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};

/// What every kernel file starts with.
const COMMON: &str = include_str!("../../cuda/common.cuh");

/// A kernel file with its compile-time constants.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Source {
    /// Name for messages and for the cache.
    pub file: &'static str,
    /// The text, in pieces that are put one after another behind the common part.
    pub parts: &'static [&'static str],
    /// Macros: name and value.
    pub defines: Vec<(&'static str, String)>,
}

/// Machine code and what the compiler said about it.
#[derive(Debug, Clone)]
pub struct Compiled {
    /// Code for one architecture.
    pub cubin: Vec<u8>,
    /// Warnings, and ptxas' report of registers and spills; empty if the code came from the cache.
    pub log: String,
    /// Whether it came from the cache.
    pub cached: bool,
}

impl Source {
    /// The name with its constants, for messages.
    pub fn describe(&self) -> String {
        let mut text = self.file.to_owned();
        for (name, value) in &self.defines {
            let _ = write!(text, " {name}={value}");
        }
        text
    }

    fn options(&self, architecture: &str) -> Vec<String> {
        let mut options: Vec<String> = [
            &format!("--gpu-architecture={architecture}"),
            "-std=c++17",
            "--ptxas-options=-v",
            "-lineinfo",
            // A part may hold helpers that this file has no use for.
            "-diag-suppress=177",
        ]
        .map(String::from)
        .into();
        options.extend(self.defines.iter().map(|(name, value)| format!("-D{name}={value}")));
        options
    }

    fn text(&self) -> String {
        std::iter::once(&COMMON).chain(self.parts).copied().collect::<Vec<_>>().join("\n")
    }

    /// Compiles for an architecture such as `sm_90a`, or takes the result from the cache on disk.
    ///
    /// # Errors
    /// If NVRTC is not installed, or refuses the text; the message holds its log.
    pub fn compile(&self, architecture: &str) -> Result<Compiled> {
        let version = nvrtc_version()?;
        let (text, options) = (self.text(), self.options(architecture));
        let key = format!("{} NVRTC {}.{}\n{}\n{text}", self.file, version.0, version.1, options.join(" "));
        let path = cache_folder().map(|folder| folder.join(cache_name(self.file, &key)));
        if let Some(cubin) = path.as_deref().and_then(|path| read_cached(path, &key)) {
            return Ok(Compiled { cubin, log: String::new(), cached: true });
        }
        let compiled = self.compile_uncached(architecture)?;
        if let Some(path) = path {
            // A cache that cannot be written costs time at the next start, nothing else.
            if let Err(error) = write_cached(&path, &key, &compiled.cubin) {
                tracing::debug!("{} is not cached in {}: {error}", self.describe(), path.display());
            }
        }
        Ok(compiled)
    }

    /// [`compile`](Self::compile) without a look at the cache.
    ///
    /// # Errors
    /// As [`compile`](Self::compile).
    pub fn compile_uncached(&self, architecture: &str) -> Result<Compiled> {
        require(Library::Nvrtc)?;
        let failed = |doing: &str, why: String| KernelError::cuda(format!("{doing} {}", self.describe()), why);
        let text = CString::new(self.text()).map_err(|e| failed("reading", e.to_string()))?;
        let name = CString::new(self.file).map_err(|e| failed("reading", e.to_string()))?;
        let program =
            Program(result::create_program(&text, Some(&name)).map_err(|e| failed("compiling", format!("{e:?}")))?);
        // SAFETY: the program was created above and is destroyed only when `program` is dropped.
        let outcome = unsafe { result::compile_program(program.0, &self.options(architecture)) };
        let log = program.log();
        if let Err(error) = outcome {
            return Err(failed("compiling", format!("{error:?} for {architecture}\n{log}")));
        }
        let cubin = program.cubin().map_err(|e| failed("compiling", format!("{e:?} for {architecture}")))?;
        for problem in problems(&log) {
            tracing::warn!("{} for {architecture}: {problem}", self.describe());
        }
        Ok(Compiled { cubin, log, cached: false })
    }
}

/// What in the log of a successful compilation makes a kernel slow or suspect: spills, and any warning.
pub fn problems(log: &str) -> Vec<String> {
    let spills = |line: &str| {
        let mut numbers = line.split(',').filter(|part| part.contains("spill"));
        numbers.any(|part| part.trim().split(' ').next().is_some_and(|count| count != "0"))
    };
    // What ptxas calls a loss: products of wgmma that wait for one another.
    let slow = |line: &str| line.contains("arning") || line.contains("Performance Loss");
    log.lines().filter(|line| spills(line) || slow(line)).map(|line| line.trim().to_owned()).collect()
}

/// Major and minor version of the run-time compiler.
///
/// # Errors
/// If it is not installed.
pub fn nvrtc_version() -> Result<(i32, i32)> {
    require(Library::Nvrtc)?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes the two integers that it is given.
    let outcome = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    outcome.result().map_err(|e| KernelError::cuda("asking for NVRTC's version", format!("{e:?}")))?;
    Ok((major, minor))
}

struct Program(sys::nvrtcProgram);

impl Program {
    fn log(&self) -> String {
        // SAFETY: the program lives as long as self.
        let raw = unsafe { result::get_program_log(self.0) };
        raw.map_or_else(
            |e| format!("(no log: {e:?})"),
            |raw| {
                let bytes: Vec<u8> = raw.iter().map(|&c| c as u8).take_while(|&c| c != 0).collect();
                String::from_utf8_lossy(&bytes).trim().to_owned()
            },
        )
    }

    fn cubin(&self) -> std::result::Result<Vec<u8>, result::NvrtcError> {
        let mut size = 0;
        // SAFETY: the program is alive and was compiled for a real architecture; writes one integer.
        unsafe { sys::nvrtcGetCUBINSize(self.0, &mut size) }.result()?;
        let mut cubin = vec![0u8; size];
        // SAFETY: the buffer has the size that was asked for above.
        unsafe { sys::nvrtcGetCUBIN(self.0, cubin.as_mut_ptr().cast()) }.result()?;
        Ok(cubin)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: destroyed once, here.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

// ---------------------------------------------------------------------------------------------- the cache

/// `$STICKBREAK_CACHE`, or `stickbreak` in the user's cache folder; None if there is no such place.
pub fn cache_folder() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("STICKBREAK_CACHE")
        .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("stickbreak")))
        .or_else(|| Some(variable("HOME")?.join(".cache/stickbreak")))
        .map(|folder| folder.join("cubin"))
}

const MAGIC: &[u8; 8] = b"SBCUBIN1";

fn digest(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

fn cache_name(file: &str, key: &str) -> String {
    format!("{}-{:016x}.cubin", file.trim_end_matches(".cu"), digest(key.as_bytes()))
}

/// A cached cubin: magic, length of the key, the key itself (so that a collision of hashes does no harm), checksum of the
/// code, the code. Anything else is as good as absent.
fn read_cached(path: &Path, key: &str) -> Option<Vec<u8>> {
    let bytes = std::fs::read(path).ok()?;
    let rest = bytes.strip_prefix(MAGIC)?;
    let (length, rest) = rest.split_first_chunk::<8>()?;
    let rest = rest.strip_prefix(key.as_bytes()).filter(|_| u64::from_le_bytes(*length) == key.len() as u64)?;
    let (checksum, cubin) = rest.split_first_chunk::<8>()?;
    (u64::from_le_bytes(*checksum) == digest(cubin)).then(|| cubin.to_vec())
}

/// Written beside its place and renamed, so that a reader sees all of it or nothing.
fn write_cached(path: &Path, key: &str, cubin: &[u8]) -> io::Result<()> {
    let folder = path.parent().ok_or_else(|| io::Error::other("no folder"))?;
    std::fs::create_dir_all(folder)?;
    let mut bytes = MAGIC.to_vec();
    bytes.extend((key.len() as u64).to_le_bytes());
    bytes.extend(key.as_bytes());
    bytes.extend(digest(cubin).to_le_bytes());
    bytes.extend(cubin);
    let thread = std::thread::current().id();
    let temporary = path.with_extension(format!("{}-{thread:?}.tmp", std::process::id()));
    std::fs::write(&temporary, bytes)?;
    std::fs::rename(&temporary, path).inspect_err(|_| drop(std::fs::remove_file(&temporary)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cached_cubin_is_read_back_unless_anything_is_off() {
        let folder = std::env::temp_dir().join(format!("stickbreak-cubin-{}", std::process::id()));
        let path = folder.join("x.cubin");
        write_cached(&path, "key", b"code").unwrap();
        assert_eq!(read_cached(&path, "key").unwrap(), b"code");
        assert!(read_cached(&path, "other").is_none());
        let whole = std::fs::read(&path).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(read_cached(&path, "key").is_none(), "{length} of {} bytes", whole.len());
        }
        for position in 0..whole.len() {
            let mut broken = whole.clone();
            broken[position] ^= 1;
            std::fs::write(&path, broken).unwrap();
            assert!(read_cached(&path, "key").is_none(), "byte {position}");
        }
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn spills_and_warnings_are_found_in_a_log() {
        let clean =
            "ptxas info    : Used 10 registers\n    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads";
        assert!(problems(clean).is_empty());
        assert_eq!(problems("  8 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads").len(), 1);
        assert_eq!(problems("ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async is serialized").len(), 1);
    }
}
