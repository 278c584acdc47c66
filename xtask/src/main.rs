//! Chores of the workspace: builds the program and hands over to it, or checks everything. No numerics here.

mod dist;
mod nvrtc;

use anyhow::{Context, Result, bail};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const USAGE: &str = "\
cargo xtask <command>

These build the release program `stickbreak` and hand over to it (`cargo xtask <command> --help` says more):
  train [CONFIG]   train a model; without CONFIG: configs/quickstart.toml
  eval             loss and length extrapolation of a trained model
  generate         continue a prompt
  prepare          turn text into shards of tokens
  verify DIR       check this build against golden vectors
  bench [PART]     time attention, decoding, a training step, matrix products; --from RUN: on trained weights
  report RUN       write a run's report.html
  doctor           what this machine has

These check the workspace:
  test             format, lints, tests, documentation, and the main job on a few steps
  ci               what continuous integration runs: test, every CUDA kernel through the compiler (no GPU needed), and
                   golden vectors if they are beside the checkout

  dist [--out DIR] a folder to copy to a machine without Rust; default target/dist
";

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let command = arguments.next().unwrap_or_default();
    let rest: Vec<OsString> = arguments.collect();
    let result = match command.to_str().unwrap_or_default() {
        name @ ("train" | "eval" | "generate" | "prepare" | "verify" | "bench" | "report" | "doctor") => {
            launch(name, &rest)
        }
        "test" => test(),
        "ci" => ci(),
        "dist" => dist::dist(&rest),
        "" | "help" | "--help" | "-h" => {
            print!("{USAGE}");
            Ok(())
        }
        unknown => Err(anyhow::anyhow!("unknown command {unknown:?}\n\n{USAGE}")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The folder of the workspace.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace").to_owned()
}

fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// Runs a command and fails if it does.
fn check(command: &mut Command) -> Result<()> {
    let line = format!("{command:?}").replace('"', "");
    eprintln!("$ {line}");
    let status = command.status().with_context(|| format!("cannot start {line}"))?;
    if !status.success() {
        bail!("{line}: {status}");
    }
    Ok(())
}

/// Builds the release program; returns where it is.
fn build() -> Result<PathBuf> {
    let mut command = cargo();
    command.args(["build", "--release", "--package", "stickbreak-train", "--bin", "stickbreak"]);
    check(&mut command)?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    Ok(target.join("release").join("stickbreak"))
}

/// Builds the program and becomes it, so that signals reach it and its exit code is ours.
fn launch(name: &str, arguments: &[OsString]) -> Result<()> {
    let mut command = Command::new(build()?);
    command.arg(name).args(arguments);
    if let Some(commit) = commit() {
        command.env("STICKBREAK_COMMIT", commit);
    }
    replace_by(command)
}

#[cfg(unix)]
fn replace_by(mut command: Command) -> Result<()> {
    use std::os::unix::process::CommandExt;
    Err(command.exec()).with_context(|| format!("cannot start {command:?}"))
}

#[cfg(not(unix))]
fn replace_by(mut command: Command) -> Result<()> {
    check(&mut command)
}

/// The checkout's commit, with a mark if files differ from it.
fn commit() -> Option<String> {
    let output = Command::new("git").args(["describe", "--always", "--dirty"]).current_dir(root()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn test() -> Result<()> {
    check(cargo().args(["fmt", "--all", "--check"]))?;
    check(cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    check(cargo().args(["test", "--workspace"]))?;
    check(cargo().args(["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"))?;
    main_job()
}

/// The main job, cut to a few steps, in a folder of its own; then everything a user would do with its result.
fn main_job() -> Result<()> {
    let program = build()?;
    let run = root().join("target").join("main-job");
    if run.exists() {
        std::fs::remove_dir_all(&run).with_context(|| format!("cannot remove {}", run.display()))?;
    }
    let stickbreak = |arguments: &[&str]| {
        let mut command = Command::new(&program);
        command.current_dir(root()).args(arguments);
        command
    };
    let folder = run.to_string_lossy();
    let data = format!("data.folder={folder}-data");
    let small = [
        ["--steps", "6"],
        ["--set", "evaluation.tokens=8192"],
        ["--set", "evaluation.length_tokens=4096"],
        ["--set", "sample.tokens=20"],
        ["--set", &data],
    ];
    // On the CPU also where there is a GPU: what this checks must not depend on the machine.
    let cpu = ["--device", "cpu"];
    check(stickbreak(&["train", "--out", &folder]).args(cpu).args(small.concat()))?;
    check(stickbreak(&["generate", &folder, "--tokens", "20", "--prompt", "fn main"]).args(cpu))?;
    check(stickbreak(&["eval", &folder, "--data", "README.md", "--length", "128"]).args(cpu))?;
    check(&mut stickbreak(&["report", &folder]))?;
    let report = run.join("report.html");
    if !report.exists() {
        bail!("{} was not written", report.display());
    }
    Ok(())
}

fn ci() -> Result<()> {
    test()?;
    nvrtc::compile_kernels()?;
    let vectors = root().join("../shared/vectors");
    if vectors.exists() {
        check(Command::new(build()?).arg("verify").arg(vectors).args(["--device", "cpu"]))?;
    }
    Ok(())
}
