//! What a run tells of the tiles that early exit skips.

mod loop_support;

use std::path::Path;
use std::sync::Arc;

use loop_support::{StopInSave, Workspace, assert_same_run, records, steps};
use stickbreak_train::metrics::{Record, TilesMetrics};
use stickbreak_train::signal::StopFlag;
use stickbreak_train::trainer::Outcome;

/// Windows of three tiles of keys, and an exit that untrained sticks reach at once.
const LONG: [&str; 6] = [
    "train.sequence_length=256",
    "train.batch_tokens=512",
    "train.log_every=3",
    "evaluation.every=4",
    "evaluation.lengths=[]",
    "model.early_exit_bits=8",
];

/// Step and share of the training lines that have one.
fn trained(run: &Path) -> Vec<(u64, f64)> {
    let share = |record| match record {
        Record::Train(train) => train.tiles_skipped.map(|share| (train.step, share)),
        _ => None,
    };
    records(run).into_iter().filter_map(share).collect()
}

fn held_out(run: &Path) -> Vec<TilesMetrics> {
    let tiles = |record| match record {
        Record::Tiles(tiles) => Some(tiles),
        _ => None,
    };
    records(run).into_iter().filter_map(tiles).collect()
}

#[test]
fn skipped_tiles_are_told_at_log_steps_and_by_head_at_evaluations() {
    let workspace = Workspace::with_validation_bytes(3000);
    let run = workspace.train("run", &LONG);
    let trained = trained(&run);
    assert_eq!(trained.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [3, 6, 9, 12]);
    assert!(trained.iter().all(|(_, share)| *share > 0.0 && *share < 1.0), "{trained:?}");
    let held_out = held_out(&run);
    assert_eq!(held_out.iter().map(|tiles| tiles.step).collect::<Vec<_>>(), [0, 4, 8, 12]);
    for tiles in &held_out {
        // Of three query tiles, which see 1, 2 and 3 key tiles, each has to visit its own.
        assert!((tiles.context, tiles.tokens) == (256, 2816), "{tiles:?}");
        assert!(tiles.skipped.len() == 2 && tiles.skipped.iter().all(|heads| heads.len() == 2));
        assert!(tiles.skipped.iter().flatten().all(|&share| (0.0..=0.5).contains(&share)), "{tiles:?}");
    }
    assert!(held_out[0].mean() > 0.0, "an untrained stick is used up soon");
    let page = std::fs::read_to_string(run.join("report.html")).unwrap();
    assert!(page.contains("Skipped by each head at step 12, on 2816 held-out tokens in windows of 256"));
}

#[test]
fn a_run_that_is_stopped_and_resumed_tells_the_same() {
    let workspace = Workspace::with_validation_bytes(3000);
    let changes = [&LONG[..], &["checkpoint.every=4"]].concat();
    let whole = workspace.train("whole", &changes);
    // Stopped in the save of step 4, before what is measured there.
    let stop = StopFlag::new();
    let outcome = workspace.train_on("halves", &changes, stop.clone(), Arc::new(StopInSave(stop)));
    assert_eq!(outcome, Ok(Outcome::Stopped));
    let halves = workspace.path("halves");
    assert_eq!(steps(&halves, "tiles"), [0]);
    workspace.train("halves", &changes);
    assert_same_run(&whole, &halves, 12);
    assert_eq!(steps(&halves, "tiles"), [0, 4, 8, 12]);
}

#[test]
fn attention_that_skips_nothing_tells_nothing() {
    let workspace = Workspace::with_validation_bytes(3000);
    for (name, change) in [("dense", "model.early_exit_bits=0"), ("softmax", "model.attention=softmax-rope")] {
        let run = workspace.train(name, &[&LONG[..], &[change]].concat());
        assert!(trained(&run).is_empty() && held_out(&run).is_empty(), "{name}");
        assert!(
            std::fs::read_to_string(run.join("report.html")).unwrap().contains("softmax and dense attention skip none")
        );
    }
}
