//! A run's configuration: one TOML file, changed by `--set key=value`.

use crate::data::TokenFormat;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use stickbreak_model::ModelConfig;
use stickbreak_tensor::{DType, Device};

/// Everything that decides a run. Unknown keys are refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Name of the run; its default folders are `runs/<name>` and `data/<name>`.
    pub name: String,
    /// Seed of the initial weights, the order of the data and the samples.
    #[serde(default = "defaults::seed")]
    pub seed: u64,
    /// Number type of the arithmetic; `auto` is f32 on a CPU and bf16 on a GPU.
    #[serde(default)]
    pub dtype: ComputeType,
    /// The model.
    pub model: ModelConfig,
    /// The text.
    pub data: DataConfig,
    /// Length of the run and shape of a step.
    pub train: TrainConfig,
    /// AdamW and clipping.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// Learning rate over time.
    #[serde(default)]
    pub schedule: ScheduleConfig,
    /// Validation and length extrapolation.
    #[serde(default)]
    pub evaluation: EvaluationConfig,
    /// Samples of text during training.
    #[serde(default)]
    pub sample: SampleConfig,
    /// Checkpoints.
    #[serde(default)]
    pub checkpoint: CheckpointConfig,
    /// How ranks share the work, where there are several.
    #[serde(default)]
    pub distributed: DistributedConfig,
}

/// Number type of a run's arithmetic. Weights, moments and gradient sums are float32 beside bf16, else of this type too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ComputeType {
    /// What the device is best at: f32 on a CPU, bf16 on a GPU. A run keeps what it resolved to.
    #[default]
    Auto,
    /// 32-bit.
    F32,
    /// 64-bit, for studies; on a CPU only.
    F64,
    /// bfloat16 with float32 sums; on a GPU only.
    Bf16,
}

impl ComputeType {
    /// The number type on a device.
    ///
    /// # Errors
    /// If the device does not compute in it.
    pub fn resolve(self, device: Device) -> Result<DType> {
        let cpu = device == Device::Cpu;
        match self {
            Self::Auto if cpu => Ok(DType::F32),
            Self::Auto => Ok(DType::BF16),
            Self::F32 => Ok(DType::F32),
            Self::F64 if cpu => Ok(DType::F64),
            Self::Bf16 if !cpu => Ok(DType::BF16),
            Self::F64 => {
                bail!("dtype = \"f64\" needs a CPU, the device is {device}: take f32 or bf16, or --device cpu")
            }
            Self::Bf16 => {
                bail!("dtype = \"bf16\" needs a GPU, the device is {device}: take f32 or f64, or --device cuda")
            }
        }
    }

    /// The name of a number type that [`resolve`](Self::resolve) gave.
    pub(crate) fn of(dtype: DType) -> Self {
        match dtype {
            DType::F64 => Self::F64,
            DType::BF16 => Self::Bf16,
            _ => Self::F32,
        }
    }
}

/// Where the tokens come from: a folder that `prepare` wrote; if it is not there yet, it is made from `inputs` first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// The prepared folder; default `data/<name>`.
    #[serde(default)]
    pub folder: Option<PathBuf>,
    /// Files and folders of text, or `cargo-registry`; empty if the folder must exist already.
    #[serde(default)]
    pub inputs: Vec<String>,
    /// Of folders, only files with these extensions; empty for all.
    #[serde(default)]
    pub extensions: Vec<String>,
    /// `bytes`, `bpe:SIZE` to train one, or the path of a `tokenizer.json`.
    #[serde(default = "defaults::tokenizer")]
    pub tokenizer: String,
    /// Share of the documents held out for validation.
    #[serde(default = "defaults::validation_fraction")]
    pub validation_fraction: f64,
    /// Files or folders held out for validation instead of a share.
    #[serde(default)]
    pub validation_inputs: Vec<String>,
    /// Token files made by other programs, instead of a prepared folder.
    #[serde(default)]
    pub token_files: Option<TokenFiles>,
    /// Whether the shards' checksums are compared before a run.
    #[serde(default = "defaults::yes")]
    pub verify_checksums: bool,
}

/// Token files made by other programs: llm.c shards, nanoGPT's raw `.bin`, Megatron's `.idx` with its `.bin`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenFiles {
    /// `llmc`, `nanogpt` or `megatron`; never guessed.
    pub format: TokenFormat,
    /// Files to train on, in this order.
    pub train: Vec<PathBuf>,
    /// Files to validate on.
    #[serde(default)]
    pub valid: Vec<PathBuf>,
    /// The id between documents; without it the whole stream is one document.
    #[serde(default)]
    pub end_of_text: Option<u32>,
    /// The `tokenizer.json` of these files, for samples and bits per byte.
    #[serde(default)]
    pub tokenizer: Option<PathBuf>,
}

/// Length of the run and shape of a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Optimizer steps.
    pub steps: u64,
    /// Tokens of one sequence: the context that the model is trained at.
    pub sequence_length: usize,
    /// Tokens of one optimizer step over all micro-batches.
    pub batch_tokens: usize,
    /// Sequences that go through the model at once; the rest of a batch is accumulated. Default: all of them.
    #[serde(default)]
    pub micro_batch: Option<usize>,
    /// Whether each block's activations are computed again in the backward pass instead of kept.
    #[serde(default)]
    pub recompute: bool,
    /// What happens when the loss or a gradient is infinite or not a number.
    #[serde(default)]
    pub non_finite: NonFinite,
    /// Every so many steps a log line is printed; each step is in `metrics.jsonl` regardless.
    #[serde(default = "defaults::log_every")]
    pub log_every: u64,
}

/// What happens at a non-finite loss or gradient; the parameters are never updated with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NonFinite {
    /// The run ends with an error that names the step and the tensor.
    #[default]
    Stop,
    /// The batch is skipped with a warning; ten in a row end the run.
    Skip,
}

/// AdamW (arXiv 1711.05101) and clipping by the global norm.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay, on parameters of two dimensions or more.
    pub weight_decay: f64,
    /// Gradients are scaled down to this global norm; 0 switches it off.
    pub clip_norm: f64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self { learning_rate: 1e-3, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1, clip_norm: 1.0 }
    }
}

/// Learning rate over the steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScheduleConfig {
    /// Shape after the warm-up.
    pub kind: ScheduleKind,
    /// Steps over which the rate rises linearly from 0.
    pub warmup_steps: u64,
    /// Rate at the end, as a fraction of the peak.
    pub final_fraction: f64,
    /// `wsd`: share of the run, at its end, over which the rate falls.
    pub decay_fraction: f64,
    /// `power`: the rate falls as `((step + warmup) / warmup)^-exponent`.
    pub exponent: f64,
}

/// Shape of the learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleKind {
    /// Half a cosine down to the final fraction.
    Cosine,
    /// A straight line down to the final fraction.
    Linear,
    /// The peak rate.
    Constant,
    /// Warm-up, stable, decay (arXiv 2404.06395).
    Wsd,
    /// A power of the step.
    Power,
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self { kind: ScheduleKind::Cosine, warmup_steps: 100, final_fraction: 0.1, decay_fraction: 0.2, exponent: 0.5 }
    }
}

/// Validation and length extrapolation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvaluationConfig {
    /// Steps between validations; 0: only before the first and after the last step.
    pub every: u64,
    /// Tokens of the validation split that are used: always the same ones.
    pub tokens: u64,
    /// Context lengths of the length-extrapolation curve after the last step; empty for none.
    pub lengths: Vec<usize>,
    /// Tokens used at each of these lengths.
    pub length_tokens: u64,
}

impl Default for EvaluationConfig {
    fn default() -> Self {
        Self { every: 0, tokens: 65_536, lengths: Vec::new(), length_tokens: 65_536 }
    }
}

/// Samples of text during training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SampleConfig {
    /// Steps between samples; 0: only after the last step.
    pub every: u64,
    /// What the model continues.
    pub prompt: String,
    /// Tokens generated; 0 for no samples.
    pub tokens: usize,
    /// Divides the logits.
    pub temperature: f64,
    /// Only the most likely tokens that together reach this probability.
    pub top_p: f64,
}

impl Default for SampleConfig {
    fn default() -> Self {
        Self { every: 0, prompt: String::new(), tokens: 200, temperature: 0.8, top_p: 0.95 }
    }
}

/// Checkpoints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Steps between checkpoints; 0: only at the end or when stopped.
    pub every: u64,
    /// Newest ones kept, 2 or more.
    pub keep_last: usize,
    /// Also kept: those of steps divisible by this; 0 for none.
    pub keep_every: u64,
    /// Whether training goes on while a thread writes; the last one of a run is always waited for. Default: on a GPU, where
    /// training needs neither the processors nor the memory that writing takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub asynchronous: Option<bool>,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { every: 500, keep_last: 2, keep_every: 0, asynchronous: None }
    }
}

/// How ranks share the work of a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DistributedConfig {
    /// Gradients sent at once, in bytes of float32. Default: what [`bucket_bytes`](Self::bucket_bytes) says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bucket_bytes: Option<usize>,
    /// Type that gradients are sent in.
    pub gradient_dtype: GradientType,
    /// Arenas that GPUs of one host reach in each other's memory, where NCCL can do that.
    pub windows: Windows,
    /// A collective that takes longer has hung: all ranks end, and name those that did not come.
    pub timeout_seconds: u64,
}

impl Default for DistributedConfig {
    fn default() -> Self {
        Self { bucket_bytes: None, gradient_dtype: GradientType::F32, windows: Windows::Weights, timeout_seconds: 600 }
    }
}

impl DistributedConfig {
    /// Bytes of float32 of a bucket when there are so many gradients: as configured, or a sixth of them within 64 and
    /// 256 MiB.
    ///
    /// Large, because each collective costs beside its bytes: the rank that comes first waits on multiprocessors that its
    /// products need, and the host is busy for 0.6 ms. On two H100 with NVLink a step of 1.34 billion parameters took
    /// 268.5 ms with 256 MiB and 273.1 ms with 64 MiB. Not larger, because on slower links the last bucket, which nothing
    /// hides, would be too large a part of all: hence the sixth. Buckets are parts of the arena and cost no memory.
    pub fn bucket_bytes(&self, gradients: usize) -> usize {
        const MIB: usize = 1 << 20;
        // In whole MiB, and more than a sixth: no seventh bucket for what rounding to the ranks' unit leaves.
        let sixth = (gradients * DType::F32.size() / 6 / MIB + 1) * MIB;
        self.bucket_bytes.unwrap_or(sixth.clamp(64 * MIB, 256 * MIB))
    }
}

/// Type that gradients are sent in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GradientType {
    /// As they are summed on each rank: float32 (float64 in a study of that type).
    #[default]
    F32,
    /// Rounded to bfloat16: half the volume, and sums with its errors.
    Bf16,
}

impl GradientType {
    /// What gradients are rounded to before they are sent, if they are.
    pub fn on_the_wire(self) -> Option<DType> {
        match self {
            Self::F32 => None,
            Self::Bf16 => Some(DType::BF16),
        }
    }
}

/// What GPUs of one host reach in each other's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Windows {
    /// Nothing: kernels of NCCL pass all on.
    None,
    /// Weights, which copy engines gather then: no multiprocessor is taken from the products beside it.
    #[default]
    Weights,
    /// Gradients, too, which NCCL sums by kernels of fewer blocks then. With more than two ranks their sums are taken in
    /// another order.
    All,
}

impl Windows {
    /// Whether the weights are one.
    pub(crate) fn of_weights(self) -> bool {
        self != Self::None
    }

    /// Whether the gradients are one.
    pub(crate) fn of_gradients(self) -> bool {
        self == Self::All
    }
}

mod defaults {
    pub(super) fn seed() -> u64 {
        1
    }
    pub(super) fn tokenizer() -> String {
        "bytes".into()
    }
    pub(super) fn validation_fraction() -> f64 {
        0.05
    }
    pub(super) fn yes() -> bool {
        true
    }
    pub(super) fn log_every() -> u64 {
        10
    }
}

impl RunConfig {
    /// Reads a TOML file and applies `key=value` changes (dotted keys; a value that is not TOML is taken as a string).
    ///
    /// # Errors
    /// If the file cannot be read, is not TOML, or has an unknown or ill-typed key (named, with the nearest known one),
    /// or a value makes no run.
    pub fn load(path: &Path, changes: &[String]) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text, changes).with_context(|| format!("in {}", path.display()))
    }

    /// [`load`](Self::load) of a text.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn parse(text: &str, changes: &[String]) -> Result<Self> {
        // The text alone first: its errors have a line and a column, which are lost once changes are mixed in.
        let mut config: RunConfig = if changes.is_empty() {
            toml::from_str(text).map_err(explain_unknown_key)?
        } else {
            let mut table: toml::Table = toml::from_str(text)?;
            for change in changes {
                apply_change(&mut table, change)?;
            }
            table.try_into().map_err(explain_unknown_key)?
        };
        config.data.folder.get_or_insert_with(|| PathBuf::from("data").join(&config.name));
        config.validate()?;
        Ok(config)
    }

    /// The resolved configuration, every default spelled out, as TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("a config of numbers, strings and lists")
    }

    /// The prepared folder.
    pub fn data_folder(&self) -> PathBuf {
        self.data.folder.clone().unwrap_or_else(|| PathBuf::from("data").join(&self.name))
    }

    /// Sequences that go through the model at once on each of so many ranks.
    pub fn micro_batch(&self, ranks: usize) -> usize {
        self.train.micro_batch.unwrap_or(self.sequences_per_rank(ranks))
    }

    /// Sequences of an optimizer step that each rank takes.
    pub fn sequences_per_rank(&self, ranks: usize) -> usize {
        self.sequences_per_step() / ranks
    }

    /// Refuses a batch that so many ranks cannot share evenly.
    ///
    /// # Errors
    /// Just that, with the numbers.
    pub fn check_ranks(&self, ranks: usize) -> Result<()> {
        let (sequences, length) = (self.sequences_per_step(), self.train.sequence_length);
        if !sequences.is_multiple_of(ranks) {
            bail!(
                "the {sequences} sequences of a step cannot be shared evenly by {ranks} ranks: train.batch_tokens = {} \
                 must be a multiple of {ranks} x train.sequence_length = {}",
                self.train.batch_tokens,
                ranks * length
            );
        }
        let (mine, micro) = (self.sequences_per_rank(ranks), self.micro_batch(ranks));
        if micro == 0 || !mine.is_multiple_of(micro) {
            bail!("train.micro_batch = {micro} must divide the {mine} sequences of a step on each of {ranks} ranks");
        }
        Ok(())
    }

    /// Sequences of an optimizer step.
    pub fn sequences_per_step(&self) -> usize {
        self.train.batch_tokens / self.train.sequence_length.max(1)
    }

    fn validate(&self) -> Result<()> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if self.name.is_empty() || self.name.starts_with('.') || !self.name.chars().all(plain) {
            bail!("name = {:?} must be letters, digits, '.', '_' and '-', for it names folders", self.name);
        }
        self.model.validate()?;
        let train = &self.train;
        if train.sequence_length == 0
            || train.batch_tokens == 0
            || !train.batch_tokens.is_multiple_of(train.sequence_length)
        {
            bail!(
                "train.batch_tokens = {} must be a positive multiple of train.sequence_length = {}",
                train.batch_tokens,
                train.sequence_length
            );
        }
        let (sequences, micro) = (self.sequences_per_step(), self.micro_batch(1));
        if micro == 0 || !sequences.is_multiple_of(micro) {
            bail!("train.micro_batch = {micro} must divide the {sequences} sequences of a step");
        }
        if self.checkpoint.keep_last < 2 {
            bail!(
                "checkpoint.keep_last = {} must be 2 or more: the newest one may be damaged",
                self.checkpoint.keep_last
            );
        }
        if train.log_every == 0 {
            bail!("train.log_every = 0 must be 1 or more");
        }
        if self.distributed.timeout_seconds == 0 {
            bail!("distributed.timeout_seconds = 0 must be 1 or more");
        }
        let fractions = [
            ("schedule.final_fraction", self.schedule.final_fraction),
            ("schedule.decay_fraction", self.schedule.decay_fraction),
            ("data.validation_fraction", self.data.validation_fraction),
        ];
        for (key, value) in fractions {
            if !(0.0..=1.0).contains(&value) {
                bail!("{key} = {value} must be between 0 and 1");
            }
        }
        // At 1 the bias correction divides by 0.
        for (key, value) in [("optimizer.beta1", self.optimizer.beta1), ("optimizer.beta2", self.optimizer.beta2)] {
            if !(0.0..1.0).contains(&value) {
                bail!("{key} = {value} must be 0 or more and below 1");
            }
        }
        // A gradient that is always 0 would be divided by 0.
        if !(self.optimizer.epsilon.is_finite() && self.optimizer.epsilon > 0.0) {
            bail!("optimizer.epsilon = {} must be above 0", self.optimizer.epsilon);
        }
        if !(self.sample.top_p > 0.0 && self.sample.top_p <= 1.0) {
            bail!("sample.top_p = {} must be above 0 and at most 1", self.sample.top_p);
        }
        if self.evaluation.tokens < 2 {
            bail!("evaluation.tokens = {} must be 2 or more: the first one is not predicted", self.evaluation.tokens);
        }
        if self.evaluation.lengths.contains(&0) {
            bail!("evaluation.lengths = {:?} must be 1 or more", self.evaluation.lengths);
        }
        let longest = self.evaluation.lengths.iter().max().copied().unwrap_or(0);
        if let Some(length) = self.evaluation.lengths.iter().find(|&&length| !longest.is_multiple_of(length)) {
            bail!(
                "evaluation.lengths: {length} must divide the longest one, {longest}, to be measured on the same text"
            );
        }
        let non_negative = [
            ("optimizer.learning_rate", self.optimizer.learning_rate),
            ("optimizer.weight_decay", self.optimizer.weight_decay),
            ("optimizer.clip_norm", self.optimizer.clip_norm),
            ("schedule.exponent", self.schedule.exponent),
            ("sample.temperature", self.sample.temperature),
        ];
        for (key, value) in non_negative {
            if !(value.is_finite() && value >= 0.0) {
                bail!("{key} = {value} must be 0 or more");
            }
        }
        Ok(())
    }
}

/// `a.b.c=value` into nested tables.
fn apply_change(table: &mut toml::Table, change: &str) -> Result<()> {
    let (key, value) = change
        .split_once('=')
        .with_context(|| format!("--set {change:?} is not key=value, such as train.steps=100"))?;
    // A value is TOML (numbers, booleans, lists, quoted strings); anything else is a string without quotes.
    let value = match toml::from_str::<toml::Table>(&format!("v = {value}")) {
        Ok(mut parsed) => parsed.remove("v").expect("just parsed"),
        Err(_) => toml::Value::String(value.to_owned()),
    };
    let mut parts: Vec<&str> = key.trim().split('.').collect();
    let last = parts.pop().expect("split gives at least one part");
    let mut at = table;
    for part in parts {
        let entry = at.entry(part).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        at = entry.as_table_mut().with_context(|| format!("--set {change:?}: {part} is not a table"))?;
    }
    at.insert(last.to_owned(), value);
    Ok(())
}

/// Adds the nearest known key to serde's "unknown field" message.
fn explain_unknown_key(error: toml::de::Error) -> anyhow::Error {
    let message = error.message().to_owned();
    let mut quoted = message.split('`').skip(1).step_by(2);
    let suggestion = message.starts_with("unknown field").then(|| {
        let unknown = quoted.next()?;
        let nearest =
            quoted.max_by(|a, b| strsim::jaro_winkler(unknown, a).total_cmp(&strsim::jaro_winkler(unknown, b)))?;
        Some(format!("unknown key `{unknown}`; did you mean `{nearest}`?"))
    });
    match suggestion.flatten() {
        Some(hint) => anyhow::Error::new(error).context(hint),
        None => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = r#"
        name = "small"
        [model]
        vocab_size = 257
        hidden_size = 32
        intermediate_size = 64
        num_layers = 2
        num_heads = 2
        [data]
        inputs = ["text"]
        [train]
        steps = 10
        sequence_length = 16
        batch_tokens = 64
    "#;

    fn error(text: &str, changes: &[&str]) -> String {
        let changes: Vec<String> = changes.iter().map(|&c| c.to_owned()).collect();
        format!("{:#}", RunConfig::parse(text, &changes).unwrap_err())
    }

    #[test]
    fn a_resolved_config_reads_back_as_itself() {
        let config = RunConfig::parse(SMALL, &["train.steps=7".into(), "schedule.kind=wsd".into()]).unwrap();
        assert_eq!((config.train.steps, config.schedule.kind), (7, ScheduleKind::Wsd));
        assert_eq!(RunConfig::parse(&config.to_toml(), &[]).unwrap(), config);
    }

    #[test]
    fn a_bucket_is_a_sixth_of_the_gradients_within_bounds_or_as_configured() {
        let mib = |config: &DistributedConfig, gradients| config.bucket_bytes(gradients) as f64 / f64::from(1 << 20);
        let rule = DistributedConfig::default();
        assert_eq!([0, 1 << 20, 359_840_000, 1_336_250_000].map(|n| mib(&rule, n)), [64.0, 64.0, 229.0, 256.0]);
        // No seventh for what rounding leaves, whatever a bucket is a multiple of.
        for (gradients, ranks) in [(100 << 20, 2), (359_847_936, 2), (100_663_296, 3)] {
            let layout =
                crate::distributed::shards::ShardLayout::new(gradients, 0, ranks, rule.bucket_bytes(gradients));
            assert_eq!(layout.buckets(), 6, "{gradients} gradients, {ranks} ranks");
        }
        let config = RunConfig::parse(SMALL, &["distributed.bucket_bytes=8192".into()]).unwrap();
        assert_eq!(config.distributed.bucket_bytes(1 << 30), 8192);
        assert_eq!(RunConfig::parse(&config.to_toml(), &[]).unwrap(), config);
    }

    #[test]
    fn windows_are_chosen_by_name() {
        let windows = |name: &str| RunConfig::parse(SMALL, &[format!("distributed.windows={name}")]);
        for (name, expected) in [("none", Windows::None), ("weights", Windows::Weights), ("all", Windows::All)] {
            let config = windows(name).unwrap();
            assert_eq!(config.distributed.windows, expected);
            assert_eq!(RunConfig::parse(&config.to_toml(), &[]).unwrap(), config);
        }
        assert_eq!(RunConfig::parse(SMALL, &[]).unwrap().distributed.windows, Windows::Weights);
        let message = format!("{:#}", windows("some").unwrap_err());
        assert!(message.contains("some") && message.contains("weights"), "{message}");
    }

    #[test]
    fn unknown_and_ill_typed_keys_are_named() {
        let unknown = error(&SMALL.replace("num_layers", "num_layer"), &[]);
        assert!(unknown.contains("`num_layer`") && unknown.contains("`num_layers`"), "{unknown}");
        let unknown = error(SMALL, &["optimizer.learning_rat=1"]);
        assert!(unknown.contains("learning_rat`; did you mean `learning_rate`"), "{unknown}");
        let typed = error(SMALL, &["train.steps=many"]);
        assert!(typed.contains("many") && typed.contains("steps"), "{typed}");
        assert!(error(SMALL, &["train.steps"]).contains("key=value"));
    }

    #[test]
    fn values_that_make_no_run_are_refused_with_both_numbers() {
        let message = error(SMALL, &["train.batch_tokens=50"]);
        assert!(message.contains("50") && message.contains("16"), "{message}");
        let message = error(SMALL, &["train.micro_batch=3"]);
        assert!(message.contains('3') && message.contains("4 sequences"), "{message}");
        assert!(error(SMALL, &["name=../escape"]).contains("names folders"));
        assert!(error(SMALL, &["checkpoint.keep_last=1"]).contains("keep_last"));
    }

    #[test]
    fn the_dtype_follows_the_device_and_what_it_cannot_do_is_refused() {
        let (cpu, cuda) = (Device::Cpu, Device::Cuda(1));
        assert_eq!(RunConfig::parse(SMALL, &[]).unwrap().dtype, ComputeType::Auto);
        for (asked, on_cpu, on_cuda) in [
            ("auto", Some(DType::F32), Some(DType::BF16)),
            ("f32", Some(DType::F32), Some(DType::F32)),
            ("f64", Some(DType::F64), None),
            ("bf16", None, Some(DType::BF16)),
        ] {
            let dtype = RunConfig::parse(SMALL, &[format!("dtype={asked}")]).unwrap().dtype;
            for (device, expected) in [(cpu, on_cpu), (cuda, on_cuda)] {
                match (dtype.resolve(device), expected) {
                    (Ok(found), Some(expected)) => {
                        assert_eq!(found, expected);
                        assert_eq!(ComputeType::of(found).resolve(device).unwrap(), found, "a resolved type stays");
                    }
                    (Err(error), None) => {
                        let message = error.to_string();
                        assert!(message.contains(asked) && message.contains(&device.to_string()), "{message}");
                    }
                    (found, _) => panic!("{asked} on {device}: {found:?}"),
                }
            }
        }
        assert!(error(SMALL, &["dtype=f16"]).contains("bf16"));
    }
}
