//! What must be the same to the last bit with several ranks: a sharded optimizer and one that is not, the same run twice,
//! a run that was stopped, and one that saves while it trains.

mod loop_support;

use std::path::PathBuf;
use std::sync::Arc;

use loop_support::{TIMEOUT, Workspace, assert_same_run, checkpoints, steps};
use stickbreak_model::Transformer;
use stickbreak_tensor::{DType, Device, Tensor};
use stickbreak_train::config::{DistributedConfig, OptimizerConfig};
use stickbreak_train::distributed::local::LocalGroup;
use stickbreak_train::distributed::shards::ShardLayout;
use stickbreak_train::optimizer::Optimizer;
use stickbreak_train::signal::StopFlag;
use stickbreak_train::trainer::{Outcome, TrainerOptions};

/// Twelve sequences a step, which 1, 2, 3 and 4 ranks can share, and buckets that cut parameters.
const SHARED: [&str; 3] = ["train.batch_tokens=384", "train.micro_batch=1", "distributed.bucket_bytes=8192"];

fn changes(more: &[&'static str]) -> Vec<&'static str> {
    SHARED.iter().chain(more).copied().collect()
}

/// What a rank's optimizer leaves behind after three updates: all values, and its shard of both moments.
struct Updated {
    layout: ShardLayout,
    values: Vec<f64>,
    moments: [Vec<f64>; 2],
}

fn update(dtype: DType, ranks: usize) -> Vec<Updated> {
    let workspace = Workspace::new();
    // Under muP hidden matrices have a learning rate of their own; norms do not decay.
    let model = workspace.config(&["model.init=mup", "model.mup_base_width=16"]).model;
    let config = OptimizerConfig::default();
    let distributed = DistributedConfig { bucket_bytes: Some(8192), ..DistributedConfig::default() };
    let results = LocalGroup::run(ranks, TIMEOUT, |communicator| {
        let model = Transformer::new_with(model.clone(), dtype, Device::Cpu, ShardLayout::arena(ranks)).unwrap();
        model.initialise(7).unwrap();
        let optimizer = Optimizer::with_ranks(config.clone(), &distributed, &model, communicator).unwrap();
        for step in 1..=3 {
            for (index, (entry, parameter)) in model.arena().iter().enumerate() {
                let gradient = Tensor::randn(0.0, 1e-2, &entry.shape, dtype, 100 * step + index as u64).unwrap();
                parameter.gradient.copy_assign(&gradient).unwrap();
            }
            optimizer.step(&model, step, 1e-2, 0.7).unwrap();
        }
        optimizer.weights().settle().unwrap();
        let (first, second) = optimizer.moments();
        let moments = [first, second].map(|moment| moment.to_f64_vec().unwrap());
        let values = model.arena().values().to_f64_vec().unwrap();
        Updated { layout: optimizer.layout().clone(), values, moments }
    });
    results.into_iter().map(Result::unwrap).collect()
}

#[test]
fn a_sharded_optimizer_is_the_whole_one_cut_in_pieces() {
    for dtype in [DType::F32, DType::F64] {
        let whole = update(dtype, 1).remove(0);
        let length = whole.values.len();
        for ranks in [2, 3, 4] {
            for Updated { layout, values, moments } in update(dtype, ranks) {
                assert!(layout.buckets() > 3, "{} buckets", layout.buckets());
                assert!(values[..length] == whole.values, "{dtype}, rank {} of {ranks}", layout.rank());
                for (moment, whole) in std::iter::zip(moments, &whole.moments) {
                    let pieces = layout.ranges_of(layout.rank()).into_iter().flatten();
                    let of_whole = pieces.map(|element| whole.get(element).copied().unwrap_or(0.0));
                    assert!(moment == of_whole.collect::<Vec<_>>(), "{dtype}, rank {} of {ranks}", layout.rank());
                }
            }
        }
    }
}

#[test]
fn the_same_run_twice_has_the_same_bits_with_any_number_of_ranks() {
    let workspace = Workspace::new();
    for ranks in [2, 3] {
        let run = |name: &str| workspace.train_together(&format!("{name}-{ranks}"), &changes(&[]), ranks);
        assert_same_run(&run("once"), &run("twice"), 12);
        // Once more there is nothing to do, and nothing is added.
        assert_same_run(&run("once"), &workspace.path(&format!("twice-{ranks}")), 12);
    }
}

/// Trains with two ranks until `rank` is asked to stop, after its first write of a checkpoint's file.
fn stop_in_save(workspace: &Workspace, name: &str, changes: &[&str], rank: usize) -> PathBuf {
    let results = workspace.train_ranks_with(name, changes, 2, TIMEOUT, |communicator| {
        let stop = StopFlag::new();
        let options = TrainerOptions::default();
        if communicator.rank() != rank {
            return (stop, options);
        }
        let disk = Arc::new(loop_support::StopInSave(stop.clone()));
        (stop, TrainerOptions { disk, ..options })
    });
    assert_eq!(results, [Ok(Outcome::Stopped), Ok(Outcome::Stopped)], "a signal to rank {rank} stops both");
    workspace.path(name)
}

#[test]
fn stopped_by_a_signal_to_any_rank_and_resumed_is_the_run_that_was_not_stopped() {
    let workspace = Workspace::new();
    let changes = changes(&["checkpoint.every=5"]);
    let whole = workspace.train_together("whole", &changes, 2);
    for rank in [0, 1] {
        let name = format!("stopped-{rank}");
        let run = stop_in_save(&workspace, &name, &changes, rank);
        // The signal comes in the save of step 5, the ranks agree at the end of step 6.
        assert_eq!(checkpoints(&run), ["step-00000005", "step-00000006"]);
        assert_eq!(steps(&run, "train"), (1..=6).collect::<Vec<_>>());
        workspace.train_together(&name, &changes, 2);
        assert_same_run(&whole, &run, 12);
        assert_eq!(steps(&run, "valid"), [0, 3, 6, 9, 12]);
    }
}

#[test]
fn saving_while_training_goes_on_changes_no_bit() {
    let workspace = Workspace::new();
    for ranks in [1, 2] {
        let run = |name: &str, asynchronous: &'static str| {
            let changes = changes(&["checkpoint.every=2", "checkpoint.keep_last=3", asynchronous]);
            workspace.train_together(&format!("{name}-{ranks}"), &changes, ranks)
        };
        let waiting = run("waiting", "checkpoint.asynchronous=false");
        let going_on = run("going-on", "checkpoint.asynchronous=true");
        assert_eq!(checkpoints(&going_on), ["step-00000008", "step-00000010", "step-00000012"]);
        for step in [8, 10, 12] {
            assert_same_run(&waiting, &going_on, step);
        }
    }
}
