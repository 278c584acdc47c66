//! Training on two GPUs by NCCL, in bfloat16 with sharded float32 masters.

mod loop_support;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use loop_support::{Running, Workspace, assert_same_run, checkpoints, process_of_rank, steps, succeed};
use stickbreak_train::metrics::{Record, TrainMetrics, read_records};

/// Small buckets, so that a step has many; checkpoints are written while training goes on, as is usual on a GPU.
const SHARED: [&str; 3] = ["train.micro_batch=1", "distributed.bucket_bytes=8192", "checkpoint.asynchronous=true"];

fn changes<'a>(more: &[&'a str]) -> Vec<&'a str> {
    SHARED.iter().chain(more).copied().collect()
}

fn two(workspace: &Workspace, name: &str, changes: &[&str]) -> Command {
    let mut command = workspace.command_on("cuda", name, changes);
    command.args(["--gpus", "2"]);
    command
}

fn losses(run: &Path) -> Vec<TrainMetrics> {
    let train = |record| if let Record::Train(train) = record { Some(train) } else { None };
    read_records(&run.join("metrics.jsonl")).unwrap().into_iter().filter_map(train).collect()
}

#[test]
#[ignore = "needs two NVIDIA GPUs"]
fn the_same_run_twice_and_stopped_half_way_has_the_same_bits() {
    let workspace = Workspace::new();
    let changes = changes(&["train.steps=60", "checkpoint.every=20", "evaluation.every=0", "sample.every=0"]);
    for name in ["once", "twice"] {
        succeed(&mut two(&workspace, name, &changes));
    }
    assert_same_run(&workspace.path("once"), &workspace.path("twice"), 60);
    let mut run = Running::start(&mut two(&workspace, "stopped", &changes));
    run.wait_for("step     25");
    run.signal("TERM");
    let (code, log) = run.end();
    assert_eq!(code, Some(0), "{log}");
    let stopped = steps(&workspace.path("stopped"), "train").len();
    assert!((25..60).contains(&stopped), "{stopped} steps");
    assert!(checkpoints(&workspace.path("stopped")).contains(&format!("step-{stopped:08}")));
    succeed(&mut two(&workspace, "stopped", &changes));
    assert_same_run(&workspace.path("once"), &workspace.path("stopped"), 60);
}

#[test]
#[ignore = "needs two NVIDIA GPUs"]
fn two_gpus_train_as_one_does_and_one_goes_on_with_their_checkpoint() {
    let workspace = Workspace::new();
    // float32 sums in another order; in bfloat16 the first step differs as little, later ones by what rounding makes of it.
    for (dtype, first, later) in [("dtype=f32", 1e-5, 1e-3), ("dtype=bf16", 1e-5, 3e-2)] {
        let changes = changes(&[dtype]);
        let (one, both) = (format!("one-{dtype}"), format!("two-{dtype}"));
        succeed(&mut workspace.command_on("cuda", &one, &changes));
        succeed(&mut two(&workspace, &both, &changes));
        let (of_one, of_two) = (losses(&workspace.path(&one)), losses(&workspace.path(&both)));
        assert_eq!((of_one.len(), of_two.len()), (12, 12));
        for (index, (a, b)) in std::iter::zip(&of_one, &of_two).enumerate() {
            let bound = if index == 0 { first } else { later };
            assert!((a.loss - b.loss).abs() <= bound * a.loss, "{dtype}, step {}: {} and {}", a.step, a.loss, b.loss);
            assert!(b.exposed_milliseconds.is_some() && a.exposed_milliseconds.is_none());
        }
        let more = [&changes[..], &["train.steps=16"]].concat();
        succeed(&mut workspace.command_on("cuda", &both, &more));
        let last = losses(&workspace.path(&both)).pop().unwrap();
        assert!(last.step == 16 && last.ranks.is_none() && last.loss < 1.1 * of_two[11].loss, "{last:?}");
    }
}

#[test]
#[ignore = "needs two NVIDIA GPUs"]
fn a_killed_rank_ends_the_other_soon_with_its_name_and_the_same_command_goes_on() {
    let workspace = Workspace::new();
    let endless = changes(&["train.steps=100000", "checkpoint.every=20", "evaluation.every=0", "sample.every=0"]);
    for killed in [0, 1] {
        let name = format!("killed-{killed}");
        let mut run = Running::start(&mut two(&workspace, &name, &endless));
        run.wait_for("saved");
        let process = process_of_rank(run.child.id(), killed);
        let begun = Instant::now();
        assert!(Command::new("kill").args(["-9", &process.to_string()]).status().unwrap().success());
        let (code, log) = run.end();
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
        assert_eq!(code, Some(1), "{log}");
        assert!(log.contains(&format!("rank {killed} failed (signal: 9")), "{log}");
        let steps = format!("train.steps={}", steps(&workspace.path(&name), "train").len() + 3);
        let (_, err) = succeed(&mut two(&workspace, &name, &[&endless[..], &[&steps]].concat()));
        assert!(err.contains("resuming"), "{err}");
    }
}
