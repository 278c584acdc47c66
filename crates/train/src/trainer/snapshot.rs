//! What a checkpoint holds, and how a run goes on from it.
//!
//! | file | content |
//! |---|---|
//! | `config.json`, `model.safetensors` | the model in the Hugging Face layout: the folder opens as a model |
//! | `tokenizer.json` | if the tokenizer is not bytes |
//! | `optimizer.safetensors` | AdamW's moments, flat, parallel to the arena |
//! | `optimizer-00000-of-00002.safetensors`, ... | instead of it, of several ranks: the moments of each rank's shard, and its float32 master values where the model's file has rounded ones; `state.json` says which ranges of the arena they are |
//! | `state.json` | step, position in the data, and what must be the same on resuming |
//! | `run.toml` | the resolved configuration |
//! | `manifest.json` | length and checksum of each file, written last |

use super::Trainer;
use crate::checkpoint::{Checkpoint, CheckpointWriter};
use crate::config::RunConfig;
use crate::data::Cursor;
use crate::distributed::shards::{ShardLayout, intersection};
use crate::optimizer::Optimizer;
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::ops::Range;
use stickbreak_model::Transformer;
use stickbreak_model::weights::weight_files;
use stickbreak_tensor::io::{self, NamedTensors};
use stickbreak_tensor::{Device, Tensor};

/// Weights above this many bytes are split into several files, as Hugging Face does.
const SHARD_BYTES: usize = 5_000_000_000;

/// The state of a run that is not a tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    /// Optimizer steps taken.
    pub step: u64,
    /// Place in the training data.
    pub cursor: Cursor,
    /// Tokens seen.
    pub tokens_seen: u64,
    /// Seconds of training so far, over all restarts.
    pub training_seconds: f64,
    /// What must be the same on resuming; see [`identity`].
    pub identity: BTreeMap<String, Value>,
    /// Version and, if known, commit of the program that wrote it.
    pub program: String,
    /// The optimizer's files if several ranks wrote one each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub optimizer_shards: Vec<OptimizerShard>,
}

/// One rank's part of the optimizer's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OptimizerShard {
    /// Its file.
    pub file: String,
    /// The ranges of the arena whose state it holds, one behind the other. What lies behind the last parameter is padding.
    pub ranges: Vec<Range<usize>>,
}

/// The only file of a rank that is alone.
const WHOLE_OPTIMIZER: &str = "optimizer.safetensors";

/// The file of a rank's part of the optimizer's state.
pub(super) fn optimizer_file(rank: usize, ranks: usize) -> String {
    match ranks {
        1 => WHOLE_OPTIMIZER.to_owned(),
        _ => format!("optimizer-{rank:05}-of-{ranks:05}.safetensors"),
    }
}

/// Everything that a continued run must share with its beginning: the architecture and the order of the data. What may
/// change (the number of steps, the learning rate, how often to log) is not in it.
pub(super) fn identity(config: &RunConfig, data_fingerprint: &str) -> BTreeMap<String, Value> {
    let mut identity = BTreeMap::new();
    let Ok(Value::Object(model)) = serde_json::to_value(&config.model) else {
        unreachable!("a struct serialises to an object")
    };
    for (key, value) in model {
        identity.insert(format!("model.{key}"), value);
    }
    identity.insert("seed".into(), config.seed.into());
    identity.insert("dtype".into(), serde_json::to_value(config.dtype).expect("a name"));
    identity.insert("train.sequence_length".into(), config.train.sequence_length.into());
    identity.insert("data".into(), data_fingerprint.into());
    identity
}

/// Refuses to continue a run with another architecture or other data, listing the differences.
pub(super) fn check_identity(checkpoint: &Checkpoint, config: &RunConfig, data_fingerprint: &str) -> Result<()> {
    let folder = checkpoint.folder().display();
    let state: State = checkpoint.json("state.json")?;
    let differences: Vec<String> = identity(config, data_fingerprint)
        .iter()
        .filter(|(key, value)| state.identity.get(*key) != Some(value))
        .map(|(key, value)| {
            let before = state.identity.get(key).map_or("absent".to_owned(), Value::to_string);
            format!("  {key}: {before} in the checkpoint, {value} now")
        })
        .collect();
    if differences.is_empty() {
        return Ok(());
    }
    bail!(
        "{folder} belongs to another run; these settings differ:\n{}\nGive another --out, or the old settings.",
        differences.join("\n")
    );
}

/// Version and commit of this program.
pub fn program_version() -> String {
    let version = env!("CARGO_PKG_VERSION");
    // Set by `cargo xtask`, which knows the checkout; compiling it in would rebuild the program at every commit.
    match std::env::var("STICKBREAK_COMMIT") {
        Ok(commit) => format!("stickbreak {version} ({commit})"),
        Err(_) => format!("stickbreak {version}"),
    }
}

/// What one rank writes into a checkpoint, taken at one moment: training may go on while it is written.
pub(super) struct Snapshot {
    /// Of the first rank alone.
    lead: Option<LeadFiles>,
    optimizer_file: String,
    optimizer: NamedTensors,
}

/// Files that are the same whoever writes them.
struct LeadFiles {
    config: Value,
    weights: NamedTensors,
    tokenizer: Option<Vec<u8>>,
    state: State,
    run: String,
}

impl Snapshot {
    /// Writes this rank's files.
    pub(super) fn write(mut self, writer: &mut CheckpointWriter<'_>) -> Result<()> {
        if let Some(lead) = &mut self.lead {
            writer.json("config.json", &lead.config)?;
            // Given back before the next large piece is made.
            let weights = std::mem::take(&mut lead.weights);
            for file in weight_files(&weights, SHARD_BYTES)? {
                writer.bytes(&file.name, &file.bytes)?;
            }
            drop(weights);
            if let Some(json) = &lead.tokenizer {
                writer.bytes("tokenizer.json", json)?;
            }
        }
        writer.bytes(&self.optimizer_file, &io::serialize(&self.optimizer, &BTreeMap::new())?)?;
        if let Some(lead) = &self.lead {
            writer.json("state.json", &lead.state)?;
            writer.bytes("run.toml", lead.run.as_bytes())?;
        }
        Ok(())
    }
}

/// The same values on the host; with `detached`, in memory that nothing else writes.
fn on_host(tensor: &Tensor, detached: bool) -> Result<Tensor> {
    Ok(if detached && tensor.device() == Device::Cpu { tensor.copy()? } else { tensor.to_device(Device::Cpu)? })
}

/// The weights as [`Transformer::named_parameters`] has them, on the host, brought there in one piece.
fn weights_on_host(model: &Transformer, detached: bool) -> Result<NamedTensors> {
    let arena = model.arena();
    let all = on_host(if arena.keeps_master() { arena.master() } else { arena.values() }, detached)?;
    let entries = arena.entries().iter();
    entries
        .map(|entry| {
            Ok((entry.name.clone(), all.narrow(0, entry.range.start, entry.range.len())?.reshape(&entry.shape)?))
        })
        .collect()
}

/// This rank's part of the optimizer's state, on the host.
fn optimizer_on_host(optimizer: &Optimizer, detached: bool) -> Result<NamedTensors> {
    let (first, second) = optimizer.moments();
    let tensors = [("first_moment", Some(first)), ("second_moment", Some(second)), ("master", optimizer.master())];
    let tensors = tensors.into_iter().filter_map(|(name, tensor)| Some((name.to_owned(), tensor?)));
    tensors.map(|(name, tensor)| Ok((name, on_host(tensor, detached)?))).collect()
}

/// The files of all ranks; none listed for one rank, which has the same file as ever.
fn optimizer_shards(layout: &ShardLayout) -> Vec<OptimizerShard> {
    let ranks = layout.ranks();
    let shard = |rank| OptimizerShard { file: optimizer_file(rank, ranks), ranges: layout.ranges_of(rank) };
    if ranks == 1 { Vec::new() } else { (0..ranks).map(shard).collect() }
}

/// Elements of an arena up to the end of its last parameter, as one rank lays it out.
fn unpadded_length(model: &Transformer) -> usize {
    let arena = model.arena();
    arena.entries().last().map_or(0, |entry| entry.range.end.next_multiple_of(stickbreak_autograd::ALIGNMENT))
}

impl Trainer {
    /// What this rank writes into a checkpoint. With `detached` training may change everything meanwhile.
    pub(super) fn snapshot(&self, detached: bool) -> Result<Snapshot> {
        let layout = self.optimizer.layout();
        let lead = || -> Result<LeadFiles> {
            Ok(LeadFiles {
                config: self.config.model.to_hugging_face(self.config.train.sequence_length),
                weights: weights_on_host(&self.model, detached)?,
                tokenizer: self.text.tokenizer.as_ref().and_then(|tokenizer| tokenizer.json()).map(<[u8]>::to_vec),
                state: State {
                    step: self.step,
                    cursor: self.cursor,
                    tokens_seen: self.tokens_seen,
                    training_seconds: self.training_seconds,
                    identity: identity(&self.config, &self.text.fingerprint),
                    program: program_version(),
                    optimizer_shards: optimizer_shards(layout),
                },
                run: self.config.to_toml(),
            })
        };
        Ok(Snapshot {
            lead: self.leads().then(lead).transpose()?,
            optimizer_file: optimizer_file(layout.rank(), layout.ranks()),
            optimizer: optimizer_on_host(&self.optimizer, detached)?,
        })
    }

    /// Continues from a checkpoint, whatever number of ranks wrote it.
    pub(super) fn restore(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let folder = checkpoint.folder().display();
        let state: State = checkpoint.json("state.json")?;
        restore_tensors(checkpoint, state.optimizer_shards, &self.model, &self.optimizer)
            .with_context(|| format!("in {folder}"))?;
        (self.step, self.cursor, self.tokens_seen) = (state.step, state.cursor, state.tokens_seen);
        self.training_seconds = state.training_seconds;
        Ok(())
    }
}

/// Weights and this rank's part of the optimizer's state, whatever number of ranks wrote them.
fn restore_tensors(
    checkpoint: &Checkpoint,
    mut shards: Vec<OptimizerShard>,
    model: &Transformer,
    optimizer: &Optimizer,
) -> Result<()> {
    model.load_weights(checkpoint.folder())?;
    optimizer.take_master(model)?;
    let length = unpadded_length(model);
    if shards.is_empty() {
        shards.push(OptimizerShard { file: WHOLE_OPTIMIZER.into(), ranges: std::iter::once(0..length).collect() });
    }
    check_complete(&shards, length).context("state.json")?;
    for shard in &shards {
        restore_shard(checkpoint, shard, length, model, optimizer)?;
    }
    if model.arena().keeps_master() {
        model.arena().publish()?;
    }
    Ok(())
}

/// Takes out of one of the optimizer's files what belongs to this rank.
fn restore_shard(
    checkpoint: &Checkpoint,
    shard: &OptimizerShard,
    length: usize,
    model: &Transformer,
    optimizer: &Optimizer,
) -> Result<()> {
    let layout = optimizer.layout();
    let pieces: Vec<_> = (0..layout.buckets()).map(|bucket| layout.piece(bucket)).collect();
    // Where it lies in the file, in this rank's shard and in the arena.
    let mut parts: Vec<(usize, usize, Range<usize>)> = Vec::new();
    let mut offset = 0;
    for range in &shard.ranges {
        for piece in &pieces {
            let common = intersection(&intersection(range, &(0..length)), &piece.arena);
            if !common.is_empty() {
                let in_file = offset + (common.start - range.start);
                parts.push((in_file, piece.shard.start + (common.start - piece.arena.start), common));
            }
        }
        offset += range.len();
    }
    if parts.is_empty() {
        return Ok(());
    }
    let path = checkpoint.path(&shard.file)?;
    let file = io::parse(&path, &checkpoint.read(&shard.file)?)?;
    let (first, second) = optimizer.moments();
    let saved_master = file.tensors.contains_key("master").then_some("master");
    let names = [Some("first_moment"), Some("second_moment"), saved_master];
    for (name, tensor) in std::iter::zip(names, [Some(first), Some(second), optimizer.master()]) {
        let Some(name) = name else { continue };
        let saved = file.tensor(&path, name)?;
        ensure!(
            saved.elements() == offset && saved.rank() == 1,
            "{}: tensor {name:?} has shape {}, but its ranges in state.json have {offset} elements",
            path.display(),
            saved.shape()
        );
        for (in_file, in_shard, in_arena) in &parts {
            let saved = saved.narrow(0, *in_file, in_arena.len())?;
            // The master is either this rank's shard or whole, in the arena.
            let to = match tensor {
                Some(shard) => shard.narrow(0, *in_shard, in_arena.len())?,
                None => model.arena().master().narrow(0, in_arena.start, in_arena.len())?,
            };
            to.transfer_assign(&saved)?;
        }
    }
    Ok(())
}

/// Refuses ranges of which one is missing, there twice, or no range.
fn check_complete(shards: &[OptimizerShard], length: usize) -> Result<()> {
    let mut ranges: Vec<(&Range<usize>, &str)> =
        shards.iter().flat_map(|shard| shard.ranges.iter().map(|range| (range, shard.file.as_str()))).collect();
    ranges.sort_by_key(|(range, _)| range.start);
    let mut end = 0;
    for (range, file) in ranges {
        ensure!(
            range.start == end && range.end >= range.start,
            "optimizer_shards: the range {range:?} of {file} should start at {end}, where the one before it ends"
        );
        end = range.end;
    }
    ensure!(end >= length, "optimizer_shards: the ranges end at {end}, but the model has {length} elements");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{CheckpointStore, KeepPolicy};
    use crate::config::{DistributedConfig, OptimizerConfig};
    use crate::distributed::local::LocalGroup;
    use std::path::Path;
    use std::sync::Arc;
    use std::time::Duration;
    use stickbreak_tensor::DType;

    /// All that a run of bfloat16 weights has: what ops read, and float32 master values and moments of this rank's shard.
    fn state(model: &Transformer, optimizer: &Optimizer) -> (Vec<f64>, ShardLayout, [Vec<f64>; 3]) {
        let (first, second) = optimizer.moments();
        let master = optimizer.master().unwrap_or(model.arena().master());
        let tensors = [master, first, second].map(|tensor| tensor.to_f64_vec().unwrap());
        (model.arena().values().to_f64_vec().unwrap(), optimizer.layout().clone(), tensors)
    }

    type States = Vec<(Vec<f64>, ShardLayout, [Vec<f64>; 3])>;

    /// Trains nothing, but updates some times, saves or restores, and tells what each rank has then.
    fn with_ranks(ranks: usize, work: impl Fn(&Transformer, &Optimizer) + Sync) -> States {
        let config = serde_json::from_str(
            r#"{"vocab_size": 31, "hidden_size": 20, "intermediate_size": 40, "num_layers": 2, "num_heads": 2}"#,
        );
        let config: stickbreak_model::ModelConfig = config.unwrap();
        let distributed = DistributedConfig { bucket_bytes: Some(4096), ..DistributedConfig::default() };
        let run = |communicator: Arc<dyn crate::distributed::Communicator>| {
            let layout = ShardLayout::arena(ranks);
            let model = Transformer::new_with(config.clone(), DType::BF16, Device::Cpu, layout).unwrap();
            let optimizer = OptimizerConfig::default();
            let optimizer = Optimizer::with_ranks(optimizer, &distributed, &model, communicator).unwrap();
            work(&model, &optimizer);
            optimizer.weights().settle().unwrap();
            state(&model, &optimizer)
        };
        LocalGroup::run(ranks, Duration::from_secs(60), run).into_iter().map(Result::unwrap).collect()
    }

    fn update(model: &Transformer, optimizer: &Optimizer) {
        model.initialise(5).unwrap();
        optimizer.take_master(model).unwrap();
        for step in 1..=3 {
            for (index, (entry, parameter)) in model.arena().iter().enumerate() {
                let gradient = Tensor::randn(0.0, 1e-2, &entry.shape, DType::F32, 50 * step + index as u64).unwrap();
                parameter.gradient.copy_assign(&gradient).unwrap();
            }
            optimizer.step(model, step, 1e-3, 1.0).unwrap();
        }
    }

    /// Puts shards together; padding that one rank does not have is left out.
    fn whole(states: &States, length: usize, which: usize) -> Vec<f64> {
        let mut whole = vec![f64::NAN; states[0].1.length()];
        for (_, layout, tensors) in states {
            for bucket in 0..layout.buckets() {
                let piece = layout.piece(bucket);
                whole[piece.arena].copy_from_slice(&tensors[which][piece.shard]);
            }
        }
        assert!(whole[length..].iter().all(|&padding| padding == 0.0));
        whole[..length].to_vec()
    }

    fn assert_same(a: &States, b: &States) {
        let length = a[0].0.len().min(b[0].0.len());
        for (values, ..) in a.iter().chain(b) {
            assert!(values[..length] == a[0].0[..length], "the weights that ops read");
        }
        for which in 0..3 {
            assert!(whole(a, length, which) == whole(b, length, which), "tensor {which}");
        }
    }

    /// Ranks write one after the other into one checkpoint, as threads of the trainer do at once.
    fn save(root: &Path, ranks: usize) -> States {
        let (entries, store) = (std::sync::Mutex::new(BTreeMap::new()), open(root));
        let shards = std::sync::Mutex::new(Vec::new());
        let weights = std::sync::Mutex::new(None);
        let states = with_ranks(ranks, |model, optimizer| {
            update(model, optimizer);
            optimizer.weights().settle().unwrap();
            let layout = optimizer.layout();
            let mine = (optimizer_file(layout.rank(), ranks), optimizer_on_host(optimizer, true).unwrap());
            entries.lock().unwrap().insert(mine.0, mine.1);
            *shards.lock().unwrap() = optimizer_shards(layout);
            if layout.rank() == 0 {
                *weights.lock().unwrap() = Some(weights_on_host(model, true).unwrap());
            }
        });
        let written = store.save(1, |writer| {
            for file in weight_files(&weights.into_inner().unwrap().unwrap(), SHARD_BYTES)? {
                writer.bytes(&file.name, &file.bytes)?;
            }
            for (name, tensors) in entries.into_inner().unwrap() {
                writer.bytes(&name, &io::serialize(&tensors, &BTreeMap::new())?)?;
            }
            writer.json("shards.json", &shards.into_inner().unwrap())
        });
        written.unwrap();
        states
    }

    fn open(root: &Path) -> CheckpointStore {
        CheckpointStore::open(root, KeepPolicy::default()).unwrap()
    }

    #[test]
    fn bfloat16_weights_with_sharded_masters_are_those_of_one_rank_and_go_on_with_any_number() {
        let folder = tempfile::tempdir().unwrap();
        let alone = save(&folder.path().join("1"), 1);
        for ranks in [2, 3] {
            assert_same(&alone, &save(&folder.path().join(ranks.to_string()), ranks));
        }
        for before in [1, 2, 3] {
            let checkpoint = open(&folder.path().join(before.to_string())).open_step(1).unwrap();
            for after in [1, 2, 3, 4] {
                let restored = with_ranks(after, |model, optimizer| {
                    let shards = checkpoint.json("shards.json").unwrap();
                    restore_tensors(&checkpoint, shards, model, optimizer).unwrap();
                });
                assert_same(&alone, &restored);
            }
        }
    }

    #[test]
    fn ranges_must_be_complete_and_disjoint() {
        let shards = |ranges: &[Range<usize>]| {
            let shard = |(index, range): (usize, &Range<usize>)| OptimizerShard {
                file: format!("{index}.safetensors"),
                ranges: std::iter::once(range.clone()).collect(),
            };
            ranges.iter().enumerate().map(shard).collect::<Vec<_>>()
        };
        check_complete(&shards(&[64..128, 0..64, 128..192]), 150).unwrap();
        for (ranges, part) in [
            (&[0..64, 65..128][..], "65..128 of 1.safetensors should start at 64"),
            (&[0..64, 63..128][..], "should start at 64"),
            (&[0..64, 64..96][..], "end at 96, but the model has 128"),
            (&[][..], "end at 0"),
        ] {
            let error = check_complete(&shards(ranges), 128).unwrap_err().to_string();
            assert!(error.contains(part), "{part} in {error}");
        }
    }
}
