//! What may go wrong in the loop, and that nothing is lost by it.

mod loop_support;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use loop_support::{Workspace, assert_same_run, checkpoints, contents, damage, records, sentences, steps};
use stickbreak_train::checkpoint::fault::{Failure, FaultyDisk, When};
use stickbreak_train::checkpoint::{CheckpointStore, KeepPolicy};
use stickbreak_train::metrics::Record;
use stickbreak_train::signal::StopFlag;
use stickbreak_train::trainer::Trainer;

fn latest_valid(run: &Path) -> Option<u64> {
    let store = CheckpointStore::open(run.join("checkpoints"), KeepPolicy::default()).unwrap();
    store.latest_valid().unwrap().map(|checkpoint| checkpoint.step())
}

#[test]
fn a_full_disk_names_the_file_and_the_same_command_goes_on_later() {
    let workspace = Workspace::new();
    let whole = workspace.train("whole", &[]);
    let folder = whole.join("checkpoints/step-00000012");
    let length = |name: &str| fs::metadata(folder.join(name)).unwrap().len();
    let save: u64 = contents(&folder).values().map(|bytes| bytes.len() as u64).sum();
    let config = length("config.json");
    let in_moments = config + length("model.safetensors") + 100;
    let points = [
        (save + config + 100, "model.safetensors", Some(4)),
        (save + in_moments, "optimizer.safetensors", Some(4)),
        (in_moments, "optimizer.safetensors", None),
    ];
    for (index, (at, file, kept)) in points.into_iter().enumerate() {
        let name = format!("full-{index}");
        let disk = Arc::new(FaultyDisk::new(When::Bytes(at), Failure::DiskFull));
        let error = workspace.train_on(&name, &[], StopFlag::new(), disk).unwrap_err();
        assert!(error.contains(file) && error.contains("no space left"), "{error}");
        let run = workspace.path(&name);
        assert_eq!(latest_valid(&run), kept);
        assert_eq!(checkpoints(&run).len(), kept.iter().count(), "nothing half-written stays");
        workspace.train(&name, &[]);
        assert_same_run(&whole, &run, 12);
    }
}

/// The values of all parameters, bit by bit.
fn bits(trainer: &Trainer) -> Vec<u32> {
    trainer.model().arena().values().to_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// Overwrites `count` rows of a parameter, from `row` on, with NaN.
fn poison(trainer: &Trainer, name: &str, row: usize, count: usize) {
    let (_, parameter) = trainer.model().arena().iter().find(|(entry, _)| entry.name == name).unwrap();
    parameter.value.narrow(0, row, count).unwrap().fill_assign(f64::NAN).unwrap();
}

#[test]
fn a_nan_stops_the_run_before_any_update() {
    let workspace = Workspace::new();
    let whole = workspace.train("whole", &[]);
    let run = workspace.train("nan", &["train.steps=4"]);
    let name = "model.layers.1.mlp.up_proj.weight";

    let mut trainer = Trainer::open(workspace.config(&[]), &run, StopFlag::new()).unwrap();
    poison(&trainer, name, 0, 1);
    let before = bits(&trainer);
    let error = format!("{:#}", trainer.run().unwrap_err());
    for part in ["step 5", "rank 0", name, "not updated"] {
        assert!(error.contains(part), "{part} in {error}");
    }
    assert!(bits(&trainer) == before, "the parameters are as they were");
    drop(trainer);
    assert_eq!(latest_valid(&run), Some(4));
    // The schedule of the first four steps had another end, so only what the resume does is compared.
    workspace.train("nan", &[]);
    assert_eq!(steps(&run, "train"), steps(&whole, "train"));
}

#[test]
fn a_learning_rate_that_explodes_leaves_the_last_good_checkpoint() {
    let workspace = Workspace::new();
    let whole = workspace.train("whole", &[]);
    for (name, changes, expected) in [
        // Finite weights that are too large: the next loss or gradient is not finite.
        ("explodes", &["optimizer.learning_rate=1e30"][..], "rank 0"),
        // Weights that overflow in the update: they are not saved over good ones.
        ("overflows", &["optimizer.learning_rate=1e300", "checkpoint.every=1"][..], "is not finite after the update"),
    ] {
        let run = workspace.path(name);
        let stop = FaultyDisk::new(When::Bytes(kill_in_second_save(&whole)), Failure::Killed);
        workspace.train_on(name, &[], StopFlag::new(), Arc::new(stop)).unwrap_err();
        assert_eq!(latest_valid(&run), Some(4));
        let error = workspace.error(name, changes);
        assert!(error.contains(expected) && error.contains("intact"), "{error}");
        assert_eq!(latest_valid(&run), Some(4));
        workspace.train(name, &[]);
        assert_same_run(&whole, &run, 12);
    }
}

/// What is saved while training goes on is safe before anything after it can fail.
#[test]
fn an_evaluation_that_fails_costs_no_checkpoint() {
    let workspace = Workspace::new();
    let changes = ["checkpoint.asynchronous=true", "checkpoint.every=5", "evaluation.every=5", "train.steps=12"];
    workspace.train("run", &["train.steps=3", "checkpoint.asynchronous=true"]);
    let config = workspace.config(&changes);
    let run = workspace.path("run");
    let mut trainer = Trainer::open(config.clone(), &run, StopFlag::new()).unwrap();
    let held_out = config.data_folder().join("valid_000000.bin");
    let whole = fs::read(&held_out).unwrap();
    fs::OpenOptions::new().write(true).open(&held_out).unwrap().set_len(1100).unwrap();
    let error = format!("{:#}", trainer.run().unwrap_err());
    assert!(error.contains("valid_000000.bin"), "{error}");
    drop(trainer);
    assert_eq!(latest_valid(&run), Some(5));
    fs::write(&held_out, whole).unwrap();
    workspace.train("run", &changes);
    assert_eq!(steps(&run, "train"), (1..=12).collect::<Vec<_>>());
}

/// Bytes after which the second save of a run like `whole` is half done.
fn kill_in_second_save(whole: &Path) -> u64 {
    contents(&whole.join("checkpoints/step-00000012")).values().map(|bytes| bytes.len() as u64).sum::<u64>() * 3 / 2
}

#[test]
fn skipping_gives_up_after_ten_in_a_row() {
    let workspace = Workspace::new();
    let changes = ["train.non_finite=skip", "checkpoint.every=0", "sample.every=0", "train.steps=30"];
    let config = workspace.config(&changes);
    let run = workspace.path("run");
    let mut trainer = Trainer::open(config, &run, StopFlag::new()).unwrap();
    poison(&trainer, "model.embed_tokens.weight", 0, 257);
    let before = bits(&trainer);
    let error = format!("{:#}", trainer.run().unwrap_err());
    assert!(error.contains("step 10, rank 0") && error.contains("model.embed_tokens.weight"), "{error}");
    assert!(bits(&trainer) == before);
    assert_eq!(steps(&run, "train"), (1..10).collect::<Vec<_>>(), "nine were skipped, the tenth ended it");
    assert_eq!(checkpoints(&run).len(), 0);
}

#[test]
fn a_skipped_batch_is_not_counted_once_a_good_one_came() {
    let workspace = Workspace::new();
    // One byte that is in few windows only.
    fs::write(workspace.path("text/5.txt"), "the cat likes Zoe and a small dog hears it").unwrap();
    let config = workspace.config(&["train.non_finite=skip", "checkpoint.every=0", "train.steps=100"]);
    let run = workspace.path("run");
    let mut trainer = Trainer::open(config, &run, StopFlag::new()).unwrap();
    poison(&trainer, "model.embed_tokens.weight", b'Z'.into(), 1);
    let error = format!("{:#}", trainer.run().unwrap_err());
    assert!(error.contains("step 100") && error.contains("not saved"), "only the save refuses the weights: {error}");
    let losses: Vec<f64> = records(&run)
        .iter()
        .filter_map(|record| if let Record::Train(train) = record { Some(train.loss) } else { None })
        .collect();
    let skipped = losses.iter().filter(|loss| !loss.is_finite()).count();
    assert!(losses.len() == 100 && (11..50).contains(&skipped), "{skipped} of {}", losses.len());
    let last = losses.iter().rfind(|loss| loss.is_finite()).unwrap();
    assert!(*last < 2.5, "the other batches are learned from: {last}");
}

#[test]
fn only_damaged_checkpoints_are_refused_and_nothing_is_overwritten() {
    let workspace = Workspace::new();
    let run = workspace.train("run", &[]);
    damage(&run.join("checkpoints/step-00000008/model.safetensors"));
    damage(&run.join("checkpoints/step-00000012/state.json"));
    let before = contents(&run);
    let error = workspace.error("run", &["train.steps=20"]);
    assert!(error.contains("none of them is valid") && error.contains("step 12"), "{error}");
    assert!(contents(&run) == before);
}

#[test]
fn a_damaged_newest_checkpoint_is_made_again_from_the_one_before() {
    let workspace = Workspace::new();
    let whole = workspace.train("whole", &[]);
    let run = workspace.train("run", &[]);
    for file in ["model.safetensors", "optimizer.safetensors", "manifest.json"] {
        damage(&run.join("checkpoints/step-00000012").join(file));
        workspace.train("run", &[]);
        assert_same_run(&whole, &run, 12);
        assert_eq!(latest_valid(&run), Some(12));
    }
}

#[test]
fn another_architecture_or_other_data_is_refused_with_both_values() {
    let workspace = Workspace::new();
    let run = workspace.train("run", &[]);
    let before = contents(&run);
    let error =
        workspace.error("run", &["model.num_layers=3", "model.attention=softmax-rope", "train.steps=20", "seed=4"]);
    for part in [
        "model.num_layers: 2 in the checkpoint, 3 now",
        "model.attention: \"stick-breaking\" in the checkpoint, \"softmax-rope\" now",
        "seed: 3 in the checkpoint, 4 now",
        "step-00000012",
    ] {
        assert!(error.contains(part), "{part} in {error}");
    }
    assert!(!error.contains("hidden_size"), "only differences: {error}");
    assert!(contents(&run) == before);

    let other = workspace.path("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("text.txt"), sentences(900, 7)).unwrap();
    let inputs = format!("data.inputs=[{other:?}]");
    let folder = format!("data.folder={:?}", workspace.path("other-data"));
    let error = workspace.error("run", &[&inputs, &folder, "train.steps=20"]);
    assert!(error.contains("  data: \"") && error.contains("in the checkpoint"), "{error}");
    assert!(contents(&run) == before);

    // What may change goes on.
    workspace.train("run", &["train.steps=14", "optimizer.learning_rate=1e-3", "train.micro_batch=1"]);
    assert_eq!(steps(&run, "train"), (1..=14).collect::<Vec<_>>());
}
