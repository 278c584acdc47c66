//! The program as several processes on one machine, on the CPU: they train as threads do, stop together, and end when one
//! of them dies.

mod loop_support;

use std::process::Command;
use std::time::{Duration, Instant};

use loop_support::{Running, Workspace, assert_same_run, checkpoints, process_of_rank, refused, steps, succeed};

/// Four sequences a step, two for each rank, and buckets that cut parameters.
const SHARED: [&str; 2] = ["train.micro_batch=1", "distributed.bucket_bytes=8192"];

fn changes<'a>(more: &[&'a str]) -> Vec<&'a str> {
    SHARED.iter().chain(more).copied().collect()
}

/// `stickbreak train --gpus 2` on the CPU.
fn two(workspace: &Workspace, name: &str, changes: &[&str]) -> Command {
    let mut command = workspace.command(name, changes);
    command.args(["--gpus", "2"]);
    command
}

#[test]
fn two_processes_train_as_two_threads_do() {
    let workspace = Workspace::new();
    // The first command prepares the data, by its first rank alone.
    let (_, err) = succeed(&mut two(&workspace, "processes", &changes(&[])));
    assert!(err.contains("by each of 2 ranks"), "{err}");
    assert_eq!(err.matches("preparing").count(), 1, "{err}");
    let threads = workspace.train_together("threads", &changes(&[]), 2);
    assert_same_run(&threads, &workspace.path("processes"), 12);
}

#[test]
fn a_signal_to_the_launcher_stops_both_with_a_save_and_the_same_command_goes_on() {
    let workspace = Workspace::new();
    let changes = changes(&["train.steps=60", "checkpoint.every=0", "evaluation.every=0", "sample.every=0"]);
    let whole = workspace.train_together("whole", &changes, 2);
    let mut run = Running::start(&mut two(&workspace, "run", &changes));
    run.wait_for("step      5");
    run.signal("TERM");
    let (code, log) = run.end();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("stopped by SIGTERM"), "{log}");
    let stopped = steps(&workspace.path("run"), "train").len();
    assert!((5..60).contains(&stopped), "{stopped} steps");
    assert_eq!(checkpoints(&workspace.path("run")), [format!("step-{stopped:08}")]);
    succeed(&mut two(&workspace, "run", &changes));
    assert_same_run(&whole, &workspace.path("run"), 60);
}

#[test]
fn a_killed_rank_ends_the_others_soon_with_its_name_and_the_same_command_goes_on() {
    let workspace = Workspace::new();
    let changes = changes(&["train.steps=400", "checkpoint.every=5", "evaluation.every=0", "sample.every=0"]);
    for killed in [0, 1] {
        let name = format!("killed-{killed}");
        let mut run = Running::start(&mut two(&workspace, &name, &changes));
        run.wait_for("saved");
        let process = process_of_rank(run.child.id(), killed);
        let begun = Instant::now();
        assert!(Command::new("kill").args(["-9", &process.to_string()]).status().unwrap().success());
        let (code, log) = run.end();
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
        assert_eq!(code, Some(1), "{log}");
        assert!(log.contains(&format!("rank {killed} failed (signal: 9")), "{log}");
        // The other one has noticed by itself and says so, too.
        assert!(log.contains(&format!("rank {killed} ")) && log.contains(&format!("rank {}: ", 1 - killed)), "{log}");
        let run = workspace.path(&name);
        let taken = steps(&run, "train").len();
        assert!((5..400).contains(&taken), "{taken} steps");
        let steps_now = format!("train.steps={}", taken + 3);
        let (_, err) = succeed(&mut two(&workspace, &name, &[&changes[..], &[&steps_now]].concat()));
        assert!(err.contains("resuming"), "{err}");
        assert_eq!(steps(&run, "train"), (1..=taken as u64 + 3).collect::<Vec<_>>());
    }
}

#[test]
fn what_the_ranks_cannot_do_is_one_clear_message() {
    let workspace = Workspace::new();
    let err = refused(&mut two(&workspace, "run", &["train.batch_tokens=96", "train.micro_batch=1"]));
    assert!(err.contains("3 sequences of a step") && err.contains("2 ranks"), "{err}");
    let err = refused(workspace.command("run", &[]).args(["--gpus", "0"]));
    assert!(err.contains("--gpus 0"), "{err}");
    // torchrun's variables by halves.
    let err = refused(workspace.command("run", &[]).env("RANK", "0").env("WORLD_SIZE", "2"));
    assert!(err.contains("MASTER_ADDR"), "{err}");
}
