//! What may go wrong on one rank: all others end soon with a message that names it, and the same command goes on later.

mod loop_support;

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use loop_support::{TIMEOUT, Workspace, assert_same_run, checkpoints, contents, steps};
use stickbreak_tensor::Tensor;
use stickbreak_train::checkpoint::fault::{Failure, FaultyDisk, When};
use stickbreak_train::checkpoint::{CheckpointStore, Disk, KeepPolicy, RealDisk};
use stickbreak_train::distributed::local::LocalGroup;
use stickbreak_train::distributed::{Communicator, Reduction, Result, Ticket};
use stickbreak_train::signal::StopFlag;
use stickbreak_train::trainer::{Outcome, Trainer, TrainerOptions};

/// Twelve sequences a step, which 1, 2, 3 and 4 ranks can share, and buckets that cut parameters.
const SHARED: [&str; 3] = ["train.batch_tokens=384", "train.micro_batch=1", "distributed.bucket_bytes=8192"];

fn changes<'a>(more: &[&'a str]) -> Vec<&'a str> {
    SHARED.iter().chain(more).copied().collect()
}

fn latest_valid(run: &Path) -> Option<u64> {
    let store = CheckpointStore::open(run.join("checkpoints"), KeepPolicy::default()).unwrap();
    store.latest_valid().unwrap().map(|checkpoint| checkpoint.step())
}

/// Stops working at one of its reduce-scatters.
#[derive(Debug)]
struct Saboteur {
    inner: Arc<dyn Communicator>,
    left: AtomicU64,
    how: How,
}

#[derive(Debug, Clone, Copy)]
enum How {
    Panic,
    Hang(Duration),
}

impl Saboteur {
    fn new(inner: Arc<dyn Communicator>, calls: u64, how: How) -> Arc<Self> {
        Arc::new(Self { inner, left: AtomicU64::new(calls), how })
    }
}

impl Communicator for Saboteur {
    fn rank(&self) -> usize {
        self.inner.rank()
    }
    fn ranks(&self) -> usize {
        self.inner.ranks()
    }
    fn all_reduce(&self, what: &str, tensor: &Tensor, reduction: Reduction) -> Result<Ticket> {
        self.inner.all_reduce(what, tensor, reduction)
    }
    fn reduce_scatter(&self, what: &str, from: &Tensor, to: &Tensor) -> Result<Ticket> {
        if self.left.fetch_sub(1, Ordering::Relaxed) == 0 {
            match self.how {
                How::Panic => panic!("as asked"),
                How::Hang(time) => std::thread::sleep(time),
            }
        }
        self.inner.reduce_scatter(what, from, to)
    }
    fn all_gather(&self, what: &str, from: &Tensor, to: &Tensor) -> Result<Ticket> {
        self.inner.all_gather(what, from, to)
    }
    fn broadcast(&self, what: &str, tensor: &Tensor, root: usize) -> Result<Ticket> {
        self.inner.broadcast(what, tensor, root)
    }
    fn gather_values(&self, what: &str, values: &[f64]) -> Result<Vec<Vec<f64>>> {
        self.inner.gather_values(what, values)
    }
    fn abort(&self, reason: &str) {
        self.inner.abort(reason);
    }
}

/// Runs with a saboteur in the place of the last rank; what the others gave.
fn sabotaged(workspace: &Workspace, name: &str, ranks: usize, timeout: Duration, how: How) -> Vec<String> {
    let results = workspace.train_ranks_with(name, &changes(&[]), ranks, timeout, |communicator| {
        let is_last = communicator.rank() + 1 == ranks;
        // Some steps have fewer buckets to send than this, all of them together many more.
        let communicator = if is_last { Saboteur::new(communicator, 95, how) } else { communicator };
        (StopFlag::new(), TrainerOptions { communicator, ..TrainerOptions::default() })
    });
    results.into_iter().take(ranks - 1).map(|result| result.unwrap_err()).collect()
}

#[test]
fn a_rank_that_dies_ends_all_others_with_its_name_and_the_run_goes_on_later() {
    let workspace = Workspace::new();
    for ranks in [2, 3, 4] {
        let name = format!("dies-{ranks}");
        let started = Instant::now();
        for error in sabotaged(&workspace, &name, ranks, TIMEOUT, How::Panic) {
            assert!(error.contains(&format!("rank {} panicked", ranks - 1)), "{error}");
            assert!(error.contains("reduce_scatter \"gradients of bucket"), "{error}");
        }
        assert!(started.elapsed() < TIMEOUT / 2, "nobody waits for the dead");
        let whole = workspace.train_together(&format!("whole-{ranks}"), &changes(&[]), ranks);
        let run = workspace.train_together(&name, &changes(&[]), ranks);
        assert_same_run(&whole, &run, 12);
    }
}

#[test]
fn a_rank_that_hangs_ends_all_others_after_the_timeout_with_its_name() {
    let workspace = Workspace::new();
    let timeout = Duration::from_secs(4);
    let errors = sabotaged(&workspace, "hangs", 3, timeout, How::Hang(2 * timeout));
    for error in errors {
        assert!(error.contains("rank 2 did not come within 4.0 s"), "{error}");
        assert!(error.contains("reduce_scatter \"gradients of bucket"), "{error}");
    }
}

/// The values of all parameters, bit by bit.
fn bits(trainer: &Trainer) -> Vec<u32> {
    trainer.model().arena().values().to_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

#[test]
fn a_nan_on_one_rank_keeps_all_from_updating_and_names_rank_and_tensor() {
    let workspace = Workspace::new();
    let all = changes(&[]);
    workspace.train_together("run", &changes(&["train.steps=4"]), 3);
    let name = "model.layers.1.mlp.up_proj.weight";
    let run = |communicator: Arc<dyn Communicator>| {
        let rank = communicator.rank();
        let options = TrainerOptions { communicator, ..TrainerOptions::default() };
        let opened = Trainer::open_with(workspace.config(&all), &workspace.path("run"), StopFlag::new(), options);
        let mut trainer = opened.unwrap();
        if rank == 1 {
            let (_, parameter) = trainer.model().arena().iter().find(|(entry, _)| entry.name == name).unwrap();
            parameter.value.narrow(0, 0, 1).unwrap().fill_assign(f64::NAN).unwrap();
        }
        let before = bits(&trainer);
        let error = format!("{:#}", trainer.run().unwrap_err());
        assert!(bits(&trainer) == before, "rank {rank}: the parameters are as they were");
        error
    };
    for error in LocalGroup::run(3, TIMEOUT, run).into_iter().map(std::result::Result::unwrap) {
        for part in ["step 5, rank 1", name, "NaN", "not updated"] {
            assert!(error.contains(part), "{part} in {error}");
        }
    }
    assert_eq!(latest_valid(&workspace.path("run")), Some(4));
    workspace.train_together("run", &all, 3);
}

#[test]
fn weights_that_overflow_are_not_saved_by_anyone() {
    let workspace = Workspace::new();
    let changes = changes(&["optimizer.learning_rate=1e300", "checkpoint.every=1"]);
    for result in workspace.train_ranks("run", &changes, 2) {
        let error = result.unwrap_err();
        assert!(error.contains("is not finite after the update") && error.contains("rank 0"), "{error}");
    }
    assert_eq!(checkpoints(&workspace.path("run")).len(), 0);
}

/// Runs in which the disk of one rank fails in the second save.
fn with_full_disk(workspace: &Workspace, name: &str, changes: &[&str], failing: usize, bytes: u64) -> Vec<String> {
    let results = workspace.train_ranks_with(name, changes, 2, TIMEOUT, |communicator| {
        let options = TrainerOptions::default();
        if communicator.rank() != failing {
            return (StopFlag::new(), options);
        }
        let disk = Arc::new(FaultyDisk::new(When::Bytes(bytes), Failure::DiskFull));
        (StopFlag::new(), TrainerOptions { disk, ..options })
    });
    results.into_iter().map(|result| result.unwrap_err()).collect()
}

#[test]
fn a_full_disk_of_one_rank_is_named_by_all_and_the_checkpoint_before_stays() {
    let workspace = Workspace::new();
    let all = changes(&[]);
    let whole = workspace.train_together("whole", &all, 2);
    let folder = whole.join("checkpoints/step-00000012");
    let part = "optimizer-00001-of-00002.safetensors";
    let size = fs::metadata(folder.join(part)).unwrap().len();
    let save: u64 = contents(&folder).values().map(|bytes| bytes.len() as u64).sum();
    for (failing, bytes, file) in [(1, size + size / 2, part), (0, (save - size) * 3 / 2, "write ")] {
        for asynchronous in ["checkpoint.asynchronous=false", "checkpoint.asynchronous=true"] {
            let all = changes(&[asynchronous]);
            let name = format!("full-{failing}-{asynchronous}");
            let errors = with_full_disk(&workspace, &name, &all, failing, bytes);
            let own = &errors[failing];
            assert!(own.contains(file) && own.contains("no space left"), "{own}");
            let other = &errors[1 - failing];
            assert!(other.contains(&format!("rank {failing}")) && other.contains("checkpoint"), "{other}");
            let run = workspace.path(&name);
            assert_eq!(latest_valid(&run), Some(4));
            assert_eq!(checkpoints(&run), ["step-00000004"], "nothing half-written stays");
            workspace.train_together(&name, &all, 2);
            assert_same_run(&whole, &run, 12);
        }
    }
}

/// Lets a file be made only once training has gone on to a step.
struct WaitsForStep {
    metrics: std::path::PathBuf,
    file: &'static str,
    step: u64,
}

impl Disk for WaitsForStep {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.create_dir(path)
    }
    fn create_file(&self, path: &Path) -> io::Result<File> {
        let begun = Instant::now();
        let line = format!("\"kind\":\"train\",\"step\":{}", self.step);
        let is_it = path.ends_with(self.file) && path.to_string_lossy().contains("step-00000004");
        while is_it && !fs::read_to_string(&self.metrics)?.contains(&line) {
            if begun.elapsed() > TIMEOUT / 2 {
                return Err(io::Error::other(format!("step {} did not come", self.step)));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
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

#[test]
fn training_goes_on_while_a_checkpoint_is_written() {
    let workspace = Workspace::new();
    for ranks in [1, 2] {
        let whole = workspace.train_together(&format!("whole-{ranks}"), &changes(&[]), ranks);
        let all = changes(&["checkpoint.asynchronous=true"]);
        // The file of step 4 is made only when step 5 is done: a save that training waits for would never end. That of
        // the other rank, too. (Before the sample of step 6 several ranks finish the save.)
        let name = format!("run-{ranks}");
        let run = workspace.path(&name);
        let results = workspace.train_ranks_with(&name, &all, ranks, TIMEOUT, |communicator| {
            let file =
                if communicator.rank() == 0 { "model.safetensors" } else { "optimizer-00001-of-00002.safetensors" };
            let disk = Arc::new(WaitsForStep { metrics: run.join("metrics.jsonl"), file, step: 5 });
            (StopFlag::new(), TrainerOptions { disk, ..TrainerOptions::default() })
        });
        assert!(results.iter().all(|result| *result == Ok(Outcome::Finished)), "{results:?}");
        assert_same_run(&whole, &run, 12);
        assert_eq!(checkpoints(&run), ["step-00000008", "step-00000012"]);
    }
}

#[test]
fn damage_to_one_ranks_part_is_found_and_the_checkpoint_before_is_used() {
    let workspace = Workspace::new();
    let all = changes(&[]);
    let whole = workspace.train_together("whole", &all, 2);
    let run = workspace.train_together("run", &all, 2);
    loop_support::damage(&run.join("checkpoints/step-00000012/optimizer-00001-of-00002.safetensors"));
    assert_eq!(latest_valid(&run), Some(8));
    workspace.train_together("run", &all, 2);
    assert_same_run(&whole, &run, 12);
}

#[test]
fn a_signal_before_the_first_step_stops_all_without_a_step() {
    let workspace = Workspace::new();
    let results = workspace.train_ranks_with("run", &changes(&[]), 3, TIMEOUT, |communicator| {
        let stop = StopFlag::new();
        if communicator.rank() == 2 {
            stop.trigger();
        }
        (stop, TrainerOptions::default())
    });
    assert_eq!(results, [Ok(Outcome::Stopped), Ok(Outcome::Stopped), Ok(Outcome::Stopped)]);
    assert_eq!(steps(&workspace.path("run"), "train").len(), 0);
    let whole = workspace.train_together("whole", &changes(&[]), 3);
    assert_same_run(&whole, &workspace.train_together("run", &changes(&[]), 3), 12);
}
