//! Ranks against one rank that is alone: the same losses and gradients up to the order of sums, and a run goes on with
//! another number of ranks.

mod loop_support;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use loop_support::{TIMEOUT, Workspace, assert_same_run, records, steps};
use stickbreak_train::distributed::Communicator;
use stickbreak_train::distributed::local::LocalGroup;
use stickbreak_train::metrics::{Record, TrainMetrics, ValidMetrics};
use stickbreak_train::signal::StopFlag;
use stickbreak_train::trainer::{Trainer, TrainerOptions};

/// Twelve sequences a step, which 1, 2, 3 and 4 ranks can share, and buckets that cut parameters.
const SHARED: [&str; 3] = ["train.batch_tokens=384", "train.micro_batch=1", "distributed.bucket_bytes=8192"];

fn changes<'a>(more: &[&'a str]) -> Vec<&'a str> {
    SHARED.iter().chain(more).copied().collect()
}

fn losses(run: &Path) -> Vec<TrainMetrics> {
    let train = |record| if let Record::Train(train) = record { Some(train) } else { None };
    records(run).into_iter().filter_map(train).collect()
}

fn validations(run: &Path) -> Vec<ValidMetrics> {
    let valid = |record| if let Record::Valid(valid) = record { Some(valid) } else { None };
    records(run).into_iter().filter_map(valid).collect()
}

/// Calls `each` with every rank's trainer, opened.
fn with_trainers<T: Send>(
    workspace: &Workspace,
    name: &str,
    changes: &[&str],
    ranks: usize,
    each: impl Fn(&mut Trainer) -> T + Sync,
) -> Vec<T> {
    let run = |communicator: Arc<dyn Communicator>| {
        let options = TrainerOptions { communicator, ..TrainerOptions::default() };
        each(
            &mut Trainer::open_with(workspace.config(changes), &workspace.path(name), StopFlag::new(), options)
                .unwrap(),
        )
    };
    LocalGroup::run(ranks, TIMEOUT, run).into_iter().map(Result::unwrap).collect()
}

/// Puts the pieces that each rank has of something parallel to the arena in their places.
fn assemble(pieces: Vec<Vec<(usize, Vec<f64>)>>) -> Vec<f64> {
    let pieces: Vec<(usize, Vec<f64>)> = pieces.into_iter().flatten().collect();
    let mut whole = vec![f64::NAN; pieces.iter().map(|(start, values)| start + values.len()).max().unwrap()];
    for (start, values) in pieces {
        whole[start..start + values.len()].copy_from_slice(&values);
    }
    assert!(whole.iter().all(|value| value.is_finite()), "every element is some rank's");
    whole
}

/// The gradients of the first step, each rank's part of the sums.
fn first_gradients(workspace: &Workspace, name: &str, changes: &[&str], ranks: usize) -> Vec<f64> {
    assemble(with_trainers(workspace, name, changes, ranks, |trainer| {
        trainer.run().unwrap();
        let (layout, optimizer) = (trainer.optimizer().layout(), trainer.optimizer());
        let piece = |bucket| {
            let gradients = optimizer.gradients(trainer.model(), bucket).unwrap();
            (layout.piece(bucket).arena.start, gradients.to_f64_vec().unwrap())
        };
        (0..layout.buckets()).map(piece).collect()
    }))
}

fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |largest, value| largest.max(value.abs()))
}

fn difference(a: &[f64], b: &[f64]) -> f64 {
    std::iter::zip(a, b).fold(0.0, |largest, (a, b)| largest.max((a - b).abs()))
}

#[test]
fn the_first_step_of_any_number_of_ranks_is_that_of_one() {
    let workspace = Workspace::new();
    // Sums of some hundred terms in another order; the bound is some hundred roundings of the largest.
    for (dtype, bound) in [("dtype=f64", 1e-13), ("dtype=f32", 2e-5)] {
        for recompute in ["train.recompute=false", "train.recompute=true"] {
            let changes = changes(&["train.steps=1", dtype, recompute]);
            let name = |ranks| format!("{dtype}-{recompute}-{ranks}");
            let whole = first_gradients(&workspace, &name(1), &changes, 1);
            let alone = &losses(&workspace.path(&name(1)))[0];
            for ranks in [2, 3, 4] {
                let gradients = first_gradients(&workspace, &name(ranks), &changes, ranks);
                let step = &losses(&workspace.path(&name(ranks)))[0];
                let (loss, norm) = (step.loss - alone.loss, step.grad_norm - alone.grad_norm);
                assert!(loss.abs() <= bound * alone.loss, "{dtype}, {ranks} ranks: {} and {}", step.loss, alone.loss);
                assert!(norm.abs() <= bound * alone.grad_norm, "{dtype}, {ranks} ranks: {step:?} and {alone:?}");
                assert_eq!((step.ranks, alone.ranks), (Some(ranks), None));
                // Behind the last parameter there may be padding, which has no gradient.
                assert!(gradients[whole.len()..].iter().all(|&gradient| gradient == 0.0));
                let error = difference(&whole, &gradients);
                assert!(error <= bound * largest(&whole), "{dtype}, {ranks} ranks: {error} of {}", largest(&whole));
            }
        }
    }
}

#[test]
fn whole_runs_stay_together_and_validate_alike() {
    let workspace = Workspace::new();
    let changes = changes(&["dtype=f64", "evaluation.tokens=1000", "evaluation.lengths=[]"]);
    let alone = workspace.train("alone", &changes);
    for ranks in [2, 3, 4] {
        let together = workspace.train_together(&format!("together-{ranks}"), &changes, ranks);
        for (step, of_one) in std::iter::zip(losses(&together), losses(&alone)) {
            // Roundings of float64 that training has carried on for a dozen steps.
            assert!((step.loss - of_one.loss).abs() <= 1e-9 * of_one.loss, "step {}, {ranks} ranks", step.step);
        }
        let (of_one, of_many) = (validations(&alone), validations(&together));
        assert_eq!(of_many.len(), 5);
        assert_eq!(of_many[0], of_one[0], "before the first step the models are the same, and so is the sum");
        assert_eq!(steps(&together, "sample"), [6, 12]);
        assert!(together.join("report.html").exists());
    }
}

#[test]
fn gradients_may_be_sent_rounded() {
    let workspace = Workspace::new();
    let exact = first_gradients(&workspace, "exact", &changes(&["train.steps=1"]), 2);
    let rounded = changes(&["train.steps=1", "distributed.gradient_dtype=bf16"]);
    let gradients = first_gradients(&workspace, "rounded", &rounded, 2);
    let error = difference(&exact, &gradients);
    // Two addends and their sum, each rounded to eight bits.
    assert!(error > 0.0 && error <= 3.0 * largest(&exact) / 256.0, "{error} of {}", largest(&exact));
    // One rank sends nothing, so nothing is rounded.
    let one = first_gradients(&workspace, "one", &changes(&["train.steps=1"]), 1);
    assert!(first_gradients(&workspace, "one-rounded", &rounded, 1) == one);
}

/// Both moments of all ranks, as a run finds them when it goes on.
fn moments(workspace: &Workspace, name: &str, changes: &[&str], ranks: usize) -> [Vec<f64>; 2] {
    let of_rank = |trainer: &mut Trainer| {
        let layout = trainer.optimizer().layout();
        let (first, second) = trainer.optimizer().moments();
        [first, second].map(|moment| {
            let values = moment.to_f64_vec().unwrap();
            let piece = |bucket| layout.piece(bucket);
            let pieces = (0..layout.buckets()).map(piece);
            pieces.map(|piece| (piece.arena.start, values[piece.shard].to_vec())).collect::<Vec<_>>()
        })
    };
    let (first, second) = with_trainers(workspace, name, changes, ranks, of_rank).into_iter().map(Into::into).unzip();
    [assemble(first), assemble(second)]
}

#[test]
fn a_run_goes_on_with_another_number_of_ranks() {
    let workspace = Workspace::new();
    let all = changes(&["dtype=f64"]);
    let alone = losses(&workspace.train("alone", &all));
    for (before, after) in [(1, 2), (2, 1), (2, 3), (4, 2), (3, 4)] {
        let name = format!("{before}-{after}");
        // The schedule of a shorter run would have another end.
        let run = half(&workspace, &name, &all, before);
        let saved = moments(&workspace, &name, &all, before);
        let found = moments(&workspace, &name, &all, after);
        let length = saved[0].len().min(found[0].len());
        for (saved, found) in std::iter::zip(&saved, &found) {
            assert!(largest(&saved[..length]) > 0.0 && saved[..length] == found[..length], "{name}");
            assert!(saved[length..].iter().chain(&found[length..]).all(|&padding| padding == 0.0), "{name}");
        }
        workspace.train_together(&name, &all, after);
        for (step, of_one) in std::iter::zip(losses(&run), &alone) {
            assert!((step.loss - of_one.loss).abs() <= 1e-9 * of_one.loss, "{name}, step {}", step.step);
        }
        assert_eq!(steps(&run, "train"), (1..=12).collect::<Vec<_>>());
    }
}

/// Stops a run after the save of its eighth step.
fn half(workspace: &Workspace, name: &str, changes: &[&str], ranks: usize) -> std::path::PathBuf {
    workspace.train_together(name, changes, ranks);
    let run = workspace.path(name);
    fs::remove_dir_all(run.join("checkpoints/step-00000012")).unwrap();
    run
}

#[test]
fn two_ranks_resumed_with_two_are_the_same_to_the_bit_and_with_three_are_not_refused() {
    let workspace = Workspace::new();
    let all = changes(&[]);
    let whole = workspace.train_together("whole", &all, 2);
    let run = half(&workspace, "run", &all, 2);
    workspace.train_together("run", &all, 2);
    assert_same_run(&whole, &run, 12);
    let state = fs::read_to_string(run.join("checkpoints/step-00000012/state.json")).unwrap();
    assert!(state.contains("optimizer-00001-of-00002.safetensors"), "{state}");
}

#[test]
fn ranges_that_are_not_complete_are_refused_with_the_file() {
    let workspace = Workspace::new();
    let all = changes(&["train.steps=2"]);
    let run = workspace.train_together("run", &all, 2);
    let folder = run.join("checkpoints/step-00000002");
    let path = folder.join("state.json");
    let mut state: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    state["optimizer_shards"][1]["ranges"][0]["start"] = 7.into();
    fs::write(&path, serde_json::to_vec(&state).unwrap()).unwrap();
    rewrite_manifest(&folder);
    let more = changes(&["train.steps=4"]);
    let error = workspace.train_ranks("run", &more, 2)[0].clone().unwrap_err();
    assert!(error.contains("state.json") && error.contains("optimizer_shards") && error.contains("7.."), "{error}");
}

/// Gives a changed checkpoint a manifest that vouches for it.
fn rewrite_manifest(folder: &Path) {
    use stickbreak_train::checkpoint::{FileEntry, Manifest};
    let manifest = Manifest::read(folder).unwrap();
    let entry = |name: &String| {
        let bytes = fs::read(folder.join(name)).unwrap();
        (name.clone(), FileEntry { bytes: bytes.len() as u64, blake3: blake3::hash(&bytes).to_hex().to_string() })
    };
    let files = manifest.files.keys().map(entry).collect();
    fs::write(folder.join("manifest.json"), Manifest::new(manifest.step, files).to_bytes()).unwrap();
}

#[test]
fn ranks_that_start_from_other_weights_or_data_are_refused_by_name() {
    let workspace = Workspace::new();
    let all = changes(&["train.steps=2"]);
    workspace.train("a", &all);
    workspace.train("b", &[&all[..], &["optimizer.learning_rate=1e-3"]].concat());
    // Two machines with a folder of the same name that is not the same folder.
    let refused = |folders: [&str; 2], changes: [&[&str]; 2]| {
        let open = |communicator: Arc<dyn Communicator>| {
            let rank = communicator.rank();
            let options = TrainerOptions { communicator, ..TrainerOptions::default() };
            let (config, folder) = (workspace.config(changes[rank]), workspace.path(folders[rank]));
            format!("{:#}", Trainer::open_with(config, &folder, StopFlag::new(), options).err().unwrap())
        };
        LocalGroup::run(2, TIMEOUT, open).into_iter().map(Result::unwrap).collect::<Vec<_>>()
    };
    for error in refused(["a", "b"], [&all, &all]) {
        assert!(error.contains("rank 1 starts from other weights than rank 0"), "{error}");
    }
    let error = &refused(["a", "nowhere"], [&all, &all])[1];
    assert!(error.contains("rank 1 cannot read") && error.contains("nowhere/checkpoints"), "{error}");
    let text = workspace.path("other.txt");
    fs::write(&text, loop_support::sentences(900, 7)).unwrap();
    let (inputs, folder) =
        (format!("data.inputs=[{text:?}]"), format!("data.folder={:?}", workspace.path("other-data")));
    let other = [&all[..], &[inputs.as_str(), folder.as_str()]].concat();
    for error in refused(["c", "c"], [&all, &other]) {
        assert!(error.contains("rank 1 has other data than rank 0"), "{error}");
    }
}

#[test]
fn a_batch_that_ranks_cannot_share_is_refused_with_both_numbers() {
    let workspace = Workspace::new();
    for result in workspace.train_ranks("run", &[], 3) {
        let error = result.unwrap_err();
        assert!(error.contains("4 sequences") && error.contains("3 ranks") && error.contains("128"), "{error}");
    }
    for result in workspace.train_ranks("run", &["train.micro_batch=4"], 2) {
        let error = result.unwrap_err();
        assert!(error.contains("micro_batch = 4") && error.contains("2 sequences"), "{error}");
    }
}
