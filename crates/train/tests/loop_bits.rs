//! The same bits: stopped and resumed or not, with any number of threads, with recompute on and off.

mod loop_support;

use std::sync::Arc;

use loop_support::{StopInSave, Workspace, assert_same_run, checkpoints, steps};
use stickbreak_train::checkpoint::RealDisk;
use stickbreak_train::checkpoint::fault::{Failure, FaultyDisk, When};
use stickbreak_train::metrics::{Record, read_records};
use stickbreak_train::signal::StopFlag;
use stickbreak_train::trainer::{Outcome, Text, Trainer};

#[test]
fn stopped_half_way_and_resumed_is_the_run_that_was_not_stopped() {
    let workspace = Workspace::new();
    // Saved at step 6, where a validation and a sample are due, too: the resumed run has to make up for them.
    let changes = ["checkpoint.every=6"];
    let whole = workspace.train("whole", &changes);
    let windows = Text::open(&workspace.config(&[])).unwrap().train.windows();
    assert!(
        (12..24).contains(&windows) && !windows.is_multiple_of(4),
        "{windows} windows: an epoch ends within both halves"
    );

    let stop = StopFlag::new();
    let outcome = workspace.train_on("halves", &changes, stop.clone(), Arc::new(StopInSave(stop)));
    assert_eq!(outcome, Ok(Outcome::Stopped));
    let halves = workspace.path("halves");
    assert_eq!(checkpoints(&halves), ["step-00000006"]);
    assert_eq!(steps(&halves, "train"), [1, 2, 3, 4, 5, 6]);
    assert_eq!(steps(&halves, "valid"), [0, 3], "the stop comes before the validation of step 6");

    workspace.train("halves", &changes);
    assert_same_run(&whole, &halves, 12);
    assert_eq!(steps(&halves, "train"), (1..=12).collect::<Vec<_>>());
    assert_eq!(steps(&halves, "valid"), [0, 3, 6, 9, 12]);
    assert_eq!(steps(&halves, "sample"), [6, 12]);

    // The same command once more finds nothing to do and adds nothing.
    workspace.train("halves", &changes);
    assert_same_run(&whole, &halves, 12);
}

#[test]
fn a_stop_before_the_first_step_or_in_the_last_save_loses_nothing() {
    let workspace = Workspace::new();
    let whole = workspace.train("whole", &["checkpoint.every=0"]);

    let stop = StopFlag::new();
    stop.trigger();
    let outcome = workspace.train_on("early", &["checkpoint.every=0"], stop, Arc::new(RealDisk));
    assert_eq!(outcome, Ok(Outcome::Stopped));
    workspace.train("early", &["checkpoint.every=0"]);
    assert_same_run(&whole, &workspace.path("early"), 12);

    // All steps taken and saved, but nothing of what follows them.
    let stop = StopFlag::new();
    let disk = Arc::new(StopInSave(stop.clone()));
    assert_eq!(workspace.train_on("late", &["checkpoint.every=0"], stop, disk), Ok(Outcome::Stopped));
    let late = workspace.path("late");
    assert_eq!((steps(&late, "valid"), late.join("report.html").exists()), (vec![0, 3, 6, 9], false));
    workspace.train("late", &["checkpoint.every=0"]);
    assert_same_run(&whole, &late, 12);
    assert!(late.join("report.html").exists());
}

#[test]
fn killed_in_a_save_and_resumed_is_the_run_that_was_not_killed() {
    let workspace = Workspace::new();
    let whole = workspace.train("whole", &[]);
    let disk = Arc::new(FaultyDisk::new(When::Never, Failure::Killed));
    workspace.train_on("counted", &[], StopFlag::new(), disk.clone()).unwrap();
    let bytes = disk.bytes() / 3;
    // In the second save: in its first file, in the middle, and with the last byte missing.
    for (index, at) in [bytes + 10, bytes * 3 / 2, 2 * bytes - 20].into_iter().enumerate() {
        let name = format!("killed-{index}");
        let disk = Arc::new(FaultyDisk::new(When::Bytes(at), Failure::Killed));
        let error = workspace.train_on(&name, &[], StopFlag::new(), disk).unwrap_err();
        assert!(error.contains("killed"), "{error}");
        let run = workspace.path(&name);
        assert_eq!(steps(&run, "train").last(), Some(&8));
        workspace.train(&name, &[]);
        assert_same_run(&whole, &run, 12);
        assert_eq!(steps(&run, "train"), (1..=12).collect::<Vec<_>>());
        assert_eq!(checkpoints(&run), ["step-00000008", "step-00000012"], "nothing half-written is left");
    }
}

#[test]
fn threads_and_recompute_do_not_change_a_bit() {
    let workspace = Workspace::new();
    // Wide enough that its products are split over threads.
    let shape = [
        "model.hidden_size=96",
        "model.intermediate_size=256",
        "model.num_heads=3",
        "train.batch_tokens=512",
        "train.micro_batch=8",
        "train.steps=4",
        "sample.every=2",
    ];
    let run = |name: &str, threads: usize, more: &[&str]| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let changes: Vec<&str> = shape.iter().chain(more).copied().collect();
        pool.install(|| workspace.train(name, &changes))
    };
    let one = run("one", 1, &[]);
    assert_same_run(&one, &run("again", 1, &[]), 4);
    assert_same_run(&one, &run("two", 2, &[]), 4);
    assert_same_run(&one, &run("three", 3, &[]), 4);
    assert_same_run(&one, &run("recompute", 2, &["train.recompute=true"]), 4);
}

/// Loss, norm and gradients of the first step.
fn first_step(workspace: &Workspace, dtype: &str, micro_batch: usize) -> (f64, f64, Vec<f64>) {
    let name = format!("{dtype}-{micro_batch}");
    let (dtype, micro) = (format!("dtype={dtype}"), format!("train.micro_batch={micro_batch}"));
    let config = workspace.config(&["train.steps=1", &dtype, &micro]);
    let mut trainer = Trainer::open(config, &workspace.path(&name), StopFlag::new()).unwrap();
    trainer.run().unwrap();
    let records = read_records(&workspace.path(&name).join("metrics.jsonl")).unwrap();
    let step = records.iter().find_map(|record| match record {
        Record::Train(train) => Some((train.loss, train.grad_norm)),
        _ => None,
    });
    let (loss, norm) = step.unwrap();
    (loss, norm, trainer.model().arena().gradients().to_f64_vec().unwrap())
}

#[test]
fn accumulation_gives_the_gradient_of_the_whole_batch() {
    let workspace = Workspace::new();
    let train = Text::open(&workspace.config(&[])).unwrap().train;
    let valid: Vec<usize> = (0..4).map(|i| train.batch(i, 1).unwrap().valid_tokens).collect();
    assert!(valid.iter().any(|&tokens| tokens != valid[0]), "{valid:?}: a mean of means would be another number");
    // The sums of some hundred terms are taken in another order; the bound is some hundred roundings of the largest.
    for (dtype, bound) in [("f64", 1e-13), ("f32", 2e-5)] {
        let (loss, norm, whole) = first_step(&workspace, dtype, 4);
        let largest = whole.iter().fold(0.0f64, |largest, gradient| largest.max(gradient.abs()));
        for micro_batch in [1, 2] {
            let (other_loss, other_norm, parts) = first_step(&workspace, dtype, micro_batch);
            let error = std::iter::zip(&whole, &parts).fold(0.0f64, |error, (a, b)| error.max((a - b).abs()));
            assert!((loss - other_loss).abs() <= bound * loss, "{dtype}, {micro_batch}: {loss} and {other_loss}");
            assert!((norm - other_norm).abs() <= bound * norm, "{dtype}, {micro_batch}: {norm} and {other_norm}");
            assert!(error <= bound * largest, "{dtype}, {micro_batch}: {error} of {largest}");
        }
    }
}
