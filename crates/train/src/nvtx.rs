//! NVTX ranges: names on the time line of an external profiler (Nsight Systems, Nsight Compute).
//!
//! The one `unsafe` of this crate: two C functions of a library that such a profiler brings or the CUDA toolkit has. The
//! library is looked for only when a profiler says that it is attached; without it every call does nothing.

#![allow(unsafe_code)]

use libloading::Library;
use std::ffi::{CString, c_char, c_int};
use std::sync::LazyLock;

/// Libraries that export NVTX' C functions, the current one first.
const FILES: [&str; 3] = ["libnvtx3interop.so.1", "libnvToolsExt.so.1", "libnvToolsExt.so"];
/// Set by the profilers for the programs that they start.
const ATTACHED: [&str; 2] = ["NVTX_INJECTION64_PATH", "NSYS_PROFILING_SESSION_ID"];

struct Nvtx {
    push: unsafe extern "C" fn(*const c_char) -> c_int,
    pop: unsafe extern "C" fn() -> c_int,
}

static NVTX: LazyLock<Option<Nvtx>> = LazyLock::new(|| {
    if ATTACHED.iter().all(|variable| std::env::var_os(variable).is_none()) {
        return None;
    }
    let found = FILES.iter().find_map(|file| open(file));
    if found.is_none() {
        tracing::warn!("a profiler is attached, but none of {} was found: no NVTX ranges", FILES.join(", "));
    }
    found
});

fn open(file: &str) -> Option<Nvtx> {
    // SAFETY: opening a library runs its initialisers; these are NVIDIA's own, which are made to be opened.
    let library = unsafe { Library::new(file) }.ok()?;
    // SAFETY: the signatures are those of nvToolsExt.h.
    let (push, pop) = unsafe { (*library.get(b"nvtxRangePushA\0").ok()?, *library.get(b"nvtxRangePop\0").ok()?) };
    // Never closed, so the two pointers stay good.
    std::mem::forget(library);
    Some(Nvtx { push, pop })
}

/// Opens a range on this thread; [`pop`] closes the newest one.
pub(crate) fn push(name: &'static str) {
    if let (Some(nvtx), Ok(name)) = (&*NVTX, CString::new(name)) {
        // SAFETY: the library copies the text before it returns.
        unsafe { (nvtx.push)(name.as_ptr()) };
    }
}

/// Closes the newest range of this thread.
pub(crate) fn pop() {
    if let Some(nvtx) = &*NVTX {
        // SAFETY: no arguments; a pop without a push is an error code, not a fault.
        unsafe { (nvtx.pop)() };
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn without_a_profiler_ranges_do_nothing() {
        super::push("nothing");
        super::pop();
        super::pop();
    }
}
