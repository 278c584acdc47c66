//! A small run for the tests of the whole loop: text, configuration, and what a finished run leaves behind.

#![allow(dead_code)] // Each test file uses a part.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use stickbreak_train::checkpoint::{Disk, RealDisk};
use stickbreak_train::config::RunConfig;
use stickbreak_train::distributed::Communicator;
use stickbreak_train::distributed::local::LocalGroup;
use stickbreak_train::metrics::{Record, read_records};
use stickbreak_train::signal::StopFlag;
use stickbreak_train::trainer::{Outcome, Trainer, TrainerOptions};
use tempfile::TempDir;

/// 2 layers, 257 ids; about 21 windows of 32 tokens, of which a step takes 4 in two micro-batches: an epoch ends in
/// the middle of a step, and twelve steps cross two ends.
const CONFIG: &str = r#"
name = "loop"
seed = 3

[model]
vocab_size = 257
hidden_size = 32
intermediate_size = 48
num_layers = 2
num_heads = 2

[data]
inputs = ["@/text"]
validation_inputs = ["@/held-out.txt"]
folder = "@/data"

[train]
steps = 12
sequence_length = 32
batch_tokens = 128
micro_batch = 2
log_every = 1

[optimizer]
learning_rate = 1e-2

[schedule]
warmup_steps = 2

[evaluation]
every = 3
tokens = 256
lengths = [32, 64]
length_tokens = 128

[sample]
every = 6
prompt = "the "
tokens = 8

[checkpoint]
every = 4
"#;

/// How long ranks wait for each other.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// Text that is easy to learn and never quite the same.
pub fn sentences(bytes: usize, mut seed: u32) -> String {
    const SUBJECTS: [&str; 4] = ["the cat", "a small dog", "the old man", "one bird"];
    const VERBS: [&str; 4] = ["sees", "likes", "hears", "follows"];
    let mut text = String::new();
    while text.len() < bytes {
        let mut pick = || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 24) as usize % 4
        };
        text.push_str(&format!("{} {} {}. ", SUBJECTS[pick()], VERBS[pick()], SUBJECTS[pick()]));
    }
    text.truncate(bytes);
    text
}

/// A folder with text, a configuration, and room for runs; gone when dropped.
pub struct Workspace {
    folder: TempDir,
}

impl Workspace {
    pub fn new() -> Self {
        Self::with_validation_bytes(600)
    }

    /// With a held-out text of this size.
    pub fn with_validation_bytes(bytes: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        fs::create_dir(root.join("text")).unwrap();
        // Documents of very different lengths: windows differ in how many tokens they predict.
        for (index, length) in [1, 300, 3, 7, 120, 40, 2, 2, 2, 195].into_iter().enumerate() {
            let text = sentences(length, index as u32);
            fs::write(root.join(format!("text/{index}.txt")), text).unwrap();
        }
        fs::write(root.join("held-out.txt"), sentences(bytes, 99)).unwrap();
        fs::write(root.join("run.toml"), CONFIG.replace('@', root.to_str().unwrap())).unwrap();
        Self { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn config(&self, changes: &[&str]) -> RunConfig {
        let changes: Vec<String> = changes.iter().map(|&change| change.to_owned()).collect();
        RunConfig::load(&self.path("run.toml"), &changes).unwrap()
    }

    /// A run to its end in this process; its folder.
    pub fn train(&self, name: &str, changes: &[&str]) -> PathBuf {
        let folder = self.path(name);
        let mut trainer = Trainer::open(self.config(changes), &folder, StopFlag::new()).unwrap();
        assert_eq!(trainer.run().unwrap(), Outcome::Finished);
        folder
    }

    pub fn train_on(
        &self,
        name: &str,
        changes: &[&str],
        stop: StopFlag,
        disk: Arc<dyn Disk>,
    ) -> Result<Outcome, String> {
        let opened = Trainer::open_on(self.config(changes), &self.path(name), stop, disk);
        opened.and_then(|mut trainer| trainer.run()).map_err(|error| format!("{error:#}"))
    }

    /// A run by ranks as threads: what each gave, by rank.
    pub fn train_ranks(&self, name: &str, changes: &[&str], ranks: usize) -> Vec<Result<Outcome, String>> {
        self.train_ranks_with(name, changes, ranks, TIMEOUT, |_| (StopFlag::new(), TrainerOptions::default()))
    }

    /// [`Self::train_ranks`] with a stop flag and options of its own for each rank, which may also replace the
    /// communicator that it is given.
    pub fn train_ranks_with(
        &self,
        name: &str,
        changes: &[&str],
        ranks: usize,
        timeout: Duration,
        prepare: impl Fn(Arc<dyn Communicator>) -> (StopFlag, TrainerOptions) + Sync,
    ) -> Vec<Result<Outcome, String>> {
        let run = |communicator: Arc<dyn Communicator>| {
            let (stop, options) = prepare(Arc::clone(&communicator));
            let replaced = options.communicator.ranks() == communicator.ranks();
            let communicator = if replaced { Arc::clone(&options.communicator) } else { communicator };
            let options = TrainerOptions { communicator, ..options };
            let opened = Trainer::open_with(self.config(changes), &self.path(name), stop, options);
            opened.and_then(|mut trainer| trainer.run()).map_err(|error| format!("{error:#}"))
        };
        let results = LocalGroup::run(ranks, timeout, run);
        results.into_iter().map(|result| result.unwrap_or_else(|_| Err("panicked".into()))).collect()
    }

    /// A run by ranks that must all finish; its folder.
    pub fn train_together(&self, name: &str, changes: &[&str], ranks: usize) -> PathBuf {
        for result in self.train_ranks(name, changes, ranks) {
            assert_eq!(result, Ok(Outcome::Finished));
        }
        self.path(name)
    }

    /// The error of a run that must fail.
    pub fn error(&self, name: &str, changes: &[&str]) -> String {
        let opened = Trainer::open(self.config(changes), &self.path(name), StopFlag::new());
        format!("{:#}", opened.and_then(|mut trainer| trainer.run()).expect_err("must fail"))
    }

    /// `stickbreak train` on this configuration, on the CPU.
    pub fn command(&self, name: &str, changes: &[&str]) -> Command {
        // Also where there is a GPU: these tests compare bits with runs of this process.
        self.command_on("cpu", name, changes)
    }

    /// [`Self::command`] on a device.
    pub fn command_on(&self, device: &str, name: &str, changes: &[&str]) -> Command {
        let mut command = stickbreak();
        command.arg("train").arg(self.path("run.toml")).arg("--out").arg(self.path(name));
        command.args(["--threads", "1", "--device", device]);
        for change in changes {
            command.args(["--set", change]);
        }
        command
    }
}

/// The program: where cargo built it, or beside the folder of tests on a machine without Rust.
pub fn stickbreak() -> Command {
    let built = Path::new(env!("CARGO_BIN_EXE_stickbreak"));
    if built.exists() {
        return Command::new(built);
    }
    let test = std::env::current_exe().unwrap();
    Command::new(test.ancestors().nth(2).unwrap().join("stickbreak"))
}

/// Standard output and standard error of a command that must succeed.
pub fn succeed(command: &mut Command) -> (String, String) {
    let (code, out, err) = outcome(command);
    assert_eq!(code, Some(0), "{out}\n{err}");
    (out, err)
}

/// Standard error of a command that must fail in order: exit code 1, a message, no panic.
pub fn refused(command: &mut Command) -> String {
    let (code, out, err) = outcome(command);
    assert_eq!(code, Some(1), "{out}\n{err}");
    assert!(err.contains("error: "), "{err}");
    err
}

fn outcome(command: &mut Command) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&stdout).into_owned(), String::from_utf8_lossy(&stderr).into_owned());
    assert!(!err.contains("panicked"), "{err}");
    (status.code(), out, err)
}

/// A training process whose log is read as it comes.
pub struct Running {
    pub child: Child,
    log: BufReader<ChildStderr>,
}

impl Running {
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        Self { child, log }
    }

    /// Reads the log to the first line with this text.
    pub fn wait_for(&mut self, text: &str) {
        let mut line = String::new();
        while !line.contains(text) {
            line.clear();
            assert!(self.log.read_line(&mut line).unwrap() > 0, "the log ended before {text:?}");
        }
    }

    pub fn signal(&self, name: &str) {
        let command = format!("kill -{name} {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &command]).status().unwrap().success());
    }

    /// Exit code and the rest of the log.
    pub fn end(mut self) -> (Option<i32>, String) {
        let mut rest = String::new();
        self.log.read_to_string(&mut rest).unwrap();
        assert!(!rest.contains("panicked"), "{rest}");
        (self.child.wait().unwrap().code(), rest)
    }
}

/// The process of a launcher's rank.
pub fn process_of_rank(launcher: u32, rank: usize) -> u32 {
    let children = fs::read_to_string(format!("/proc/{launcher}/task/{launcher}/children")).unwrap();
    let is_it = |child: &&str| {
        let environment = fs::read(format!("/proc/{child}/environ")).unwrap_or_default();
        environment.split(|&byte| byte == 0).any(|variable| variable == format!("RANK={rank}").as_bytes())
    };
    children.split_whitespace().find(is_it).expect("the launcher has a process of this rank").parse().unwrap()
}

/// Asks the run to stop while it writes the first file of a checkpoint.
pub struct StopInSave(pub StopFlag);

impl Disk for StopInSave {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.create_dir(path)
    }
    fn create_file(&self, path: &Path) -> io::Result<File> {
        self.0.trigger();
        RealDisk.create_file(path)
    }
    fn write(&self, path: &Path, file: &mut File, bytes: &[u8]) -> io::Result<usize> {
        RealDisk.write(path, file, bytes)
    }
    fn sync_file(&self, path: &Path, file: &File) -> io::Result<()> {
        RealDisk.sync_file(path, file)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.sync_dir(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealDisk.rename(from, to)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove_file(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove_dir(path)
    }
}

/// Every line of a run's metrics, without times and memory.
pub fn records(run: &Path) -> Vec<Record> {
    let mut records = read_records(&run.join("metrics.jsonl")).unwrap();
    records.retain(|record| !matches!(record, Record::Memory(_)));
    for record in &mut records {
        if let Record::Train(train) = record {
            (train.tokens_per_second, train.milliseconds, train.peak_memory_bytes) = (0.0, 0.0, None);
            (train.device_milliseconds, train.host_milliseconds, train.exposed_milliseconds) = (None, None, None);
            train.mfu = None;
        }
    }
    records
}

/// Steps with a line of this kind, in the order of the file.
pub fn steps(run: &Path, kind: &str) -> Vec<u64> {
    records(run).iter().filter(|record| record.kind() == kind).map(Record::step).collect()
}

/// Steps that have a checkpoint.
pub fn checkpoints(run: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(run.join("checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// All files under a folder with their bytes.
pub fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(contents(&path));
        } else {
            files.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    files
}

/// Flips a bit in the middle of a file.
pub fn damage(file: &Path) {
    let mut bytes = fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(file, bytes).unwrap();
}

/// The same weights, moments, state and metrics to the last bit.
pub fn assert_same_run(a: &Path, b: &Path, step: u64) {
    let folder = format!("checkpoints/step-{step:08}");
    let (a_step, b_step) = (a.join(&folder), b.join(&folder));
    let tensors = |folder: &Path| {
        let mut files = contents(folder);
        files.retain(|path, _| path.extension().is_some_and(|extension| extension == "safetensors"));
        files.into_iter().map(|(path, bytes)| (path.file_name().unwrap().to_owned(), bytes)).collect::<Vec<_>>()
    };
    let (of_a, of_b) = (tensors(&a_step), tensors(&b_step));
    assert!(of_a.len() > 1 && of_a.len() == of_b.len(), "{} and {} files", of_a.len(), of_b.len());
    for ((name, a), (other, b)) in std::iter::zip(of_a, of_b) {
        assert!(name == other && a == b, "{name:?} differs");
    }
    let state = |folder: &Path| {
        let mut state: serde_json::Value =
            serde_json::from_slice(&fs::read(folder.join("state.json")).unwrap()).unwrap();
        assert!(state.as_object_mut().unwrap().remove("training_seconds").is_some());
        state
    };
    assert_eq!(state(&a_step), state(&b_step));
    // Debug prints floats exactly, and equal NaNs alike.
    let print = |run: &Path| records(run).iter().map(|record| format!("{record:?}")).collect::<Vec<_>>();
    let (a, b) = (print(a), print(b));
    assert!(a == b, "metrics differ:\n{}\n---\n{}", a.join("\n"), b.join("\n"));
}
