//! The binary `stickbreak`.

use std::process::ExitCode;

fn main() -> ExitCode {
    stickbreak_train::cli::main()
}
