//! The binary `stickbreak`.

use std::process::ExitCode;

/// Keeps freed pages. The system's allocator returns the kernels' scratch memory after each call and maps it anew,
/// which costs a tenth of attention's time in page faults.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    stickbreak_train::cli::main()
}
