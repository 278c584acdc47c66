//! A folder to copy to a machine without Rust: the program, the GPU tests, the configs, and how to use them.

use crate::{build, cargo, check, commit, root};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What a copy over a slow line should stay below.
const COMFORTABLE_BYTES: u64 = 64 << 20;

const README: &str = "\
stickbreak for a machine without Rust
=====================================

The machine needs an x86-64 Linux with a C library as new as that of the machine which built this folder, an NVIDIA
driver (580 or newer), and two libraries of CUDA 13: libnvrtc.so.13 (with libnvrtc-builtins.so.13.0 beside it) and
libcublasLt.so.13; several GPUs also need libnccl.so.2. They are looked for in the loader's path, in lib/ here, in
$CUDA_HOME, in an active Python environment (pip install nvidia-cuda-nvrtc nvidia-cublas nvidia-nccl-cu13) and in
/usr/local/cuda. Without them everything runs on the CPU.

    ./stickbreak doctor                     says whether everything was found, and what training would use
    ./stickbreak train configs/350m.toml    trains; each config says how to point it at your text
    ./stickbreak train configs/quickstart.toml --set 'data.inputs=[\"my-texts\"]' --steps 20
    ./stickbreak bench attention            times the kernels
    ./stickbreak verify DIR                 checks golden vectors, if you have a copy of them
    ./stickbreak --help

    ./run-gpu-tests.sh                      the GPU tests; arguments are passed on, such as a test's name

Kernels are compiled at their first use and kept in ~/.cache/stickbreak (or $STICKBREAK_CACHE).
";

const RUN_TESTS: &str = "\
#!/bin/sh
# Runs every GPU test, one at a time: they share the card's memory.
cd \"$(dirname \"$0\")\" || exit 1
export LD_LIBRARY_PATH=\"$PWD/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}\"
failed=0
gpus=$(nvidia-smi -L | grep -c '^GPU')
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
for test in tests/*; do
  needs=
  case \"$test\" in
    */cuda_nccl | */cuda_distributed) [ \"$gpus\" -ge 2 ] || needs=\"two GPUs, and there are $gpus\" ;;
    */cuda_hopper) [ \"$capability\" = 9.0 ] || needs=\"compute capability 9.0, and this card has $capability\" ;;
  esac
  if [ -n \"$needs\" ]; then
    echo \"== $test NOT RUN: it needs $needs\"
    continue
  fi
  echo \"== $test\"
  \"$test\" --ignored --test-threads 1 \"$@\" || failed=1
done
exit $failed
";

/// `cargo xtask dist [--out DIR]`.
pub fn dist(arguments: &[OsString]) -> Result<()> {
    let out = match arguments {
        [] => root().join("target").join("dist"),
        [flag, folder] if flag == "--out" => PathBuf::from(folder),
        _ => bail!("cargo xtask dist takes --out DIR and nothing else"),
    };
    if out.exists() {
        // Only what was made here is replaced: a wrong --out must not cost anything.
        let ours = out.join("run-gpu-tests.sh").exists() || fs::read_dir(&out)?.next().is_none();
        if !ours {
            bail!("{} exists and was not made by `cargo xtask dist`; give another --out", out.display());
        }
        fs::remove_dir_all(&out).with_context(|| format!("cannot replace {}", out.display()))?;
    }
    let program = build()?;
    let tests = build_gpu_tests()?;
    for folder in ["tests", "configs"] {
        let folder = out.join(folder);
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    copy_stripped(&program, &out.join("stickbreak"))?;
    for (name, path) in &tests {
        copy_stripped(path, &out.join("tests").join(name))?;
    }
    for config in fs::read_dir(root().join("configs"))? {
        let config = config?;
        fs::copy(config.path(), out.join("configs").join(config.file_name()))?;
    }
    let version = commit().map_or(String::new(), |commit| format!("\nBuilt from commit {commit}.\n"));
    fs::write(out.join("README.txt"), format!("{README}{version}"))?;
    write_script(&out.join("run-gpu-tests.sh"), RUN_TESTS)?;
    let bytes = size(&out)?;
    println!("{}: {:.1} MiB, {} GPU test programs", out.display(), bytes as f64 / (1 << 20) as f64, tests.len());
    if bytes > COMFORTABLE_BYTES {
        println!("that is more than {} MiB: leave tests/ out if it is too much", COMFORTABLE_BYTES >> 20);
    }
    Ok(())
}

/// The test programs of the workspace that need a GPU: those of files called `cuda_*`. Name and path of each.
fn build_gpu_tests() -> Result<Vec<(String, PathBuf)>> {
    let mut command = cargo();
    command.args(["test", "--release", "--workspace", "--test", "cuda_*", "--no-run", "--message-format", "json"]);
    eprintln!("$ {}", format!("{command:?}").replace('"', ""));
    let output = command.stderr(Stdio::inherit()).output().context("cannot start cargo")?;
    if !output.status.success() {
        bail!("the GPU tests do not build: {}", output.status);
    }
    let tests: Vec<_> = String::from_utf8_lossy(&output.stdout).lines().filter_map(test_program).collect();
    if tests.is_empty() {
        bail!("cargo built no test called cuda_*");
    }
    Ok(tests)
}

/// A test's name and path out of one line of cargo's messages.
fn test_program(line: &str) -> Option<(String, PathBuf)> {
    let message: Value = serde_json::from_str(line).ok()?;
    let name = message["target"]["name"].as_str().filter(|name| name.starts_with("cuda_"))?;
    Some((name.to_owned(), message["executable"].as_str()?.into()))
}

fn copy_stripped(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    check(Command::new("strip").arg(to)).context("strip comes with the C compiler (binutils)")
}

fn write_script(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// Bytes of all files below a folder.
fn size(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += if metadata.is_dir() { size(&entry.path())? } else { metadata.len() };
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_programs_of_gpu_tests_are_taken_from_cargos_messages() {
        let line = |name: &str, executable: &str| {
            format!(r#"{{"reason":"compiler-artifact","target":{{"name":"{name}"}},"executable":{executable}}}"#)
        };
        assert_eq!(
            test_program(&line("cuda_matmul", "\"/t/cuda_matmul-12\"")),
            Some(("cuda_matmul".into(), "/t/cuda_matmul-12".into()))
        );
        assert_eq!(test_program(&line("matmul", "\"/t/matmul-12\"")), None);
        assert_eq!(test_program(&line("cuda_matmul", "null")), None);
        assert_eq!(test_program("warning: not json"), None);
    }
}
