//! The training loop.
//!
//! A step: read the batch, forward and backward for each micro-batch (gradients add up in the arena, normalised by the
//! number of predicted tokens of the whole batch), global norm, update. The order of work around it is fixed: a save
//! comes before an evaluation, so that an evaluation that dies loses nothing.

mod memory;
mod snapshot;
mod text;

use crate::checkpoint::{CheckpointStore, Disk, KeepPolicy, RealDisk};
use crate::config::{ComputeType, NonFinite, RunConfig};
use crate::console::Console;
use crate::data::{Batch, Cursor, Prefetch};
use crate::device;
use crate::evaluate::{self, BatchTensors};
use crate::metrics::{MemoryMetrics, Record, RunMetrics, SampleMetrics, TrainMetrics};
use crate::mfu;
use crate::optimizer::Optimizer;
use crate::profile::{Profiler, range};
use crate::report::write_report;
use crate::schedule::learning_rate_factor;
use crate::signal::StopFlag;
use crate::step::{self, StepOutcome, StepSettings};
use anyhow::{Context, Result, bail};
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use stickbreak_autograd::ParameterId;
use stickbreak_model::{Sampling, Transformer, count};
use stickbreak_tensor::{DType, Device, Tensor};

pub(crate) use memory::available_memory;
pub use snapshot::program_version;
pub use text::{Text, tokenizer_choice};

/// A run: model, optimizer, data, and their place in time.
pub struct Trainer {
    config: RunConfig,
    folder: PathBuf,
    device: Device,
    dtype: DType,
    /// Peak rate of the device in the run's dtype, in flop/s, where it is known.
    peak_flops: Option<f64>,
    profiler: Option<Profiler>,
    model: Transformer,
    optimizer: Optimizer,
    text: Text,
    store: CheckpointStore,
    metrics: RunMetrics,
    stop: StopFlag,
    console: Console,
    step: u64,
    cursor: Cursor,
    tokens_seen: u64,
    training_seconds: f64,
    skipped_in_a_row: u32,
    /// Held as long as the run is open; the system lets go of it when the process ends, however it ends.
    _lock: File,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All steps were taken.
    Finished,
    /// It was asked to stop; the state is saved.
    Stopped,
}

/// How a run is carried out; nothing here belongs to what it computes.
pub struct TrainerOptions {
    /// Where to compute.
    pub device: Device,
    /// What checkpoints are written through.
    pub disk: Arc<dyn Disk>,
    /// Whether some steps are recorded: see [`crate::profile`].
    pub profile: bool,
}

impl Default for TrainerOptions {
    fn default() -> Self {
        Self { device: Device::Cpu, disk: Arc::new(RealDisk), profile: false }
    }
}

/// Batches skipped in a row that end a run even with `non_finite = "skip"`.
const MOST_SKIPPED: u32 = 10;

impl Trainer {
    /// Opens the data, builds the model on the CPU, and continues from the newest valid checkpoint in `folder` if there
    /// is one.
    ///
    /// # Errors
    /// If the configuration, the data or a checkpoint is not usable; see [`Text::open`].
    pub fn open(config: RunConfig, folder: &Path, stop: StopFlag) -> Result<Self> {
        Self::open_with(config, folder, stop, TrainerOptions::default())
    }

    /// [`open`](Self::open) with checkpoints written through `disk`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_on(config: RunConfig, folder: &Path, stop: StopFlag, disk: Arc<dyn Disk>) -> Result<Self> {
        Self::open_with(config, folder, stop, TrainerOptions { disk, ..TrainerOptions::default() })
    }

    /// [`open`](Self::open) on any device. The configuration's `dtype` becomes what it means on that device.
    ///
    /// # Errors
    /// As [`open`](Self::open), or if the device does not compute in the dtype or cannot hold the run.
    pub fn open_with(mut config: RunConfig, folder: &Path, stop: StopFlag, options: TrainerOptions) -> Result<Self> {
        let TrainerOptions { device, disk, profile } = options;
        let dtype = config.dtype.resolve(device)?;
        config.dtype = ComputeType::of(dtype);
        if device != Device::Cpu {
            // Before the weights and moments are there: their allocation would be the first to fail.
            memory::estimate(&config, device, dtype).check_fits(&config, device, dtype)?;
        }
        let text = Text::open(&config)?;
        std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let lock = lock(folder)?;
        let keep = KeepPolicy {
            last: config.checkpoint.keep_last,
            every: (config.checkpoint.keep_every > 0).then_some(config.checkpoint.keep_every),
        };
        let store = CheckpointStore::open_on(folder.join("checkpoints"), keep, disk)?;
        let model = Transformer::new_on(config.model.clone(), dtype, device)?;
        let optimizer = Optimizer::new(config.optimizer.clone(), &model)?;
        let checkpoint = store.latest_valid()?;
        if let (None, Some(step)) = (&checkpoint, store.steps()?.last()) {
            bail!(
                "{} has checkpoints up to step {step}, but none of them is valid (see the warnings above); \
                 move them away to start from the beginning",
                store.root().display()
            );
        }
        let step = checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.step());
        if let Some(checkpoint) = &checkpoint {
            // Before the metrics are cut back to the checkpoint's step: a mistaken command must lose nothing.
            snapshot::check_identity(checkpoint, &config, &text.fingerprint)?;
        }
        let mut trainer = Self {
            metrics: RunMetrics::resume(folder, step)?,
            console: Console::new(config.train.steps),
            folder: folder.to_owned(),
            device,
            dtype,
            // The table's rates are those of bf16.
            peak_flops: device::gpu_name(device).filter(|_| dtype == DType::BF16).and_then(|n| mfu::peak_flops(&n)),
            profiler: profile.then(|| Profiler::start(folder, device)).transpose()?,
            config,
            model,
            optimizer,
            text,
            store,
            stop,
            step: 0,
            cursor: Cursor::default(),
            tokens_seen: 0,
            training_seconds: 0.0,
            skipped_in_a_row: 0,
            _lock: lock,
        };
        match checkpoint {
            Some(checkpoint) => {
                trainer.restore(&checkpoint)?;
                trainer.console.line(&format!("resuming {} at step {}", folder.display(), trainer.step));
            }
            None => trainer.model.initialise(trainer.config.seed)?,
        }
        let resolved = format!("# {}\n{}", program_version(), trainer.config.to_toml());
        crate::checkpoint::write_atomically(&folder.join("config.toml"), resolved.as_bytes())
            .with_context(|| format!("cannot write {}", folder.join("config.toml").display()))?;
        Ok(trainer)
    }

    /// Optimizer steps taken so far.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The model as it is now.
    pub fn model(&self) -> &Transformer {
        &self.model
    }

    /// Trains to the last step, or until a signal; then saves, evaluates, samples and writes the report.
    ///
    /// # Errors
    /// If data, model or disk fail. What is saved stays valid.
    pub fn run(&mut self) -> Result<Outcome> {
        let steps = self.config.train.steps;
        if self.step >= steps {
            self.console.line(&format!("nothing to train: step {} of {steps} is reached", self.step));
            return self.finish();
        }
        self.announce();
        device::prepare_kernels(&self.config.model, self.dtype, self.device, |line| self.console.line(line))?;
        self.preflight()?;
        // What an earlier process was stopped in, after its save.
        self.measure()?;
        let per_step = self.config.sequences_per_step();
        let micro = self.config.micro_batch();
        let first = self.cursor.position;
        let requests = (0..).map(move |i: u64| (first + i * micro as u64, micro));
        let mut batches = Prefetch::start(self.text.train.clone(), requests)?;
        while self.step < steps && !self.stop.is_set() {
            if let Some(profiler) = &mut self.profiler {
                profiler.begin_step();
            }
            let step = range("step");
            let data = range("data");
            let Some(batch) = self.next_step_batches(&mut batches, per_step / micro)? else { break };
            drop(data);
            let started = Instant::now();
            let outcome = self.train_step(&batch)?;
            let elapsed = started.elapsed();
            drop(step);
            if let Some(table) = self.profiler.as_mut().map(Profiler::end_step).transpose()?.flatten() {
                self.console.line(&table);
            }
            self.finish_step(&batch, outcome, elapsed)?;
            self.periodic_work()?;
        }
        drop(batches);
        if let Some(table) = self.profiler.as_mut().map(Profiler::finish).transpose()?.flatten() {
            self.console.line(&table);
        }
        self.save()?;
        if self.stop.is_set() {
            return self.stopped();
        }
        self.finish()
    }

    /// The micro-batches of one step; `None` if asked to stop while waiting.
    fn next_step_batches(&self, batches: &mut Prefetch, count: usize) -> Result<Option<Vec<Batch>>> {
        let mut out = Vec::with_capacity(count);
        while out.len() < count {
            if self.stop.is_set() {
                return Ok(None);
            }
            out.extend(batches.wait(Duration::from_millis(200))?);
        }
        Ok(Some(out))
    }

    /// Forward and backward of all micro-batches, and the update.
    fn train_step(&mut self, batches: &[Batch]) -> Result<StepOutcome> {
        let valid_tokens: usize = batches.iter().map(|batch| batch.valid_tokens).sum();
        let settings = StepSettings {
            number: self.step + 1,
            learning_rate: self.learning_rate(),
            loss_scale: 1.0 / valid_tokens.max(1) as f64,
            recompute: self.config.train.recompute,
        };
        let tensors = batches.iter().map(|batch| {
            let _upload = range("upload");
            BatchTensors::new(batch, self.device)
        });
        let outcome = step::take_step(&self.model, &self.optimizer, tensors, &settings)?;
        self.cursor.position += self.config.sequences_per_step() as u64;
        self.tokens_seen += self.config.train.batch_tokens as u64;
        if outcome.is_finite() {
            self.skipped_in_a_row = 0;
        } else {
            self.non_finite(outcome.loss)?;
        }
        self.step += 1;
        Ok(outcome)
    }

    /// No update is made with a loss or gradient that is not finite: names the tensor, then stops or skips.
    fn non_finite(&mut self, loss: f64) -> Result<()> {
        let step = self.step + 1;
        let gradient = || {
            let broken = |gradient: &Tensor| !gradient.sum_of_squares().is_ok_and(f64::is_finite);
            self.model.arena().iter().find(|(_, parameter)| broken(&parameter.gradient))
        };
        let culprit = if let Some(name) = self.non_finite_parameter() {
            format!("the parameter {name}, hence the loss ({loss}),")
        } else if let Some((entry, _)) = gradient() {
            format!("the gradient of {}, with a loss of {loss},", entry.name)
        } else {
            format!("the loss ({loss}) or the sum of the squared gradients")
        };
        self.skipped_in_a_row += 1;
        if self.config.train.non_finite == NonFinite::Skip && self.skipped_in_a_row < MOST_SKIPPED {
            self.console.line(&format!("step {step}: {culprit} is not finite; this batch is skipped"));
            return Ok(());
        }
        bail!(
            "step {step}, rank 0: {culprit} is not finite; the parameters were not updated. The last checkpoint is \
             intact; a lower optimizer.learning_rate or a longer schedule.warmup_steps usually helps"
        );
    }

    /// The first parameter with an infinity or a NaN in it.
    fn non_finite_parameter(&self) -> Option<String> {
        let arena = self.model.arena();
        let finite = |tensor: &Tensor| tensor.sum_of_squares().is_ok_and(f64::is_finite);
        if finite(arena.master()) {
            return None;
        }
        let of = |index| arena.master_of(ParameterId(index)).is_ok_and(|master| finite(&master));
        let broken = arena.entries().iter().enumerate().find(|&(index, _)| !of(index));
        Some(broken.map_or("arena", |(_, entry)| &entry.name).to_owned())
    }

    fn learning_rate(&self) -> f64 {
        let factor = learning_rate_factor(&self.config.schedule, self.step, self.config.train.steps);
        self.config.optimizer.learning_rate * factor
    }

    /// Metrics and log line of a step.
    fn finish_step(&mut self, batches: &[Batch], outcome: StepOutcome, elapsed: Duration) -> Result<()> {
        let seconds = elapsed.as_secs_f64();
        self.training_seconds += seconds;
        let taken = self.step - 1;
        let factor = learning_rate_factor(&self.config.schedule, taken, self.config.train.steps);
        let flops: f64 = batches.iter().map(|batch| batch_flops(&self.config, batch)).sum();
        let metrics = TrainMetrics {
            step: self.step,
            loss: outcome.loss,
            grad_norm: outcome.gradient_norm,
            learning_rate: self.config.optimizer.learning_rate * factor,
            tokens_per_second: self.config.train.batch_tokens as f64 / seconds,
            milliseconds: 1e3 * seconds,
            device_milliseconds: outcome.device_milliseconds,
            host_milliseconds: outcome.host_milliseconds,
            tokens_seen: self.tokens_seen,
            mfu: mfu::utilisation(flops, seconds, self.peak_flops),
            peak_memory_bytes: Some(self.device.memory_use()?.peak as u64),
        };
        self.metrics.append(&Record::Train(metrics.clone()))?;
        self.console.step(&metrics, flops / seconds, self.step.is_multiple_of(self.config.train.log_every));
        Ok(())
    }

    /// Saves, evaluates and samples when their steps have come; a save first.
    fn periodic_work(&mut self) -> Result<()> {
        if self.is_due(self.config.checkpoint.every) {
            self.save()?;
        }
        self.measure()
    }

    /// Whether something done every so many steps is due after this one; the last step has its own order.
    fn is_due(&self, every: u64) -> bool {
        every > 0 && self.step > 0 && self.step < self.config.train.steps && self.step.is_multiple_of(every)
    }

    /// Evaluates and samples if this step asks for it and it is not in the metrics yet.
    fn measure(&mut self) -> Result<()> {
        if self.step == 0 || self.is_due(self.config.evaluation.every) {
            self.validate()?;
        }
        if self.is_due(self.config.sample.every) {
            self.sample()?;
        }
        Ok(())
    }

    /// Whether the metrics have a line of this kind for this step.
    fn is_measured(&self, kind: &str) -> bool {
        self.metrics.last_step(kind) == Some(self.step)
    }

    fn save(&mut self) -> Result<()> {
        if self.step == 0 || self.store.open_step(self.step).is_ok() {
            return Ok(());
        }
        // An update can overflow although its gradients were finite; such weights must not push out good ones.
        if let Some(name) = self.non_finite_parameter() {
            bail!(
                "step {}, rank 0: the parameter {name} is not finite after the update, so this step is not saved. The \
                 last checkpoint is intact; a lower optimizer.learning_rate usually helps",
                self.step
            );
        }
        let _save = range("save");
        self.metrics.sync()?;
        let checkpoint = self.store.save(self.step, |writer| self.write_checkpoint(writer))?;
        self.console.line(&format!("saved {}", checkpoint.folder().display()));
        Ok(())
    }

    /// The loss on the validation tokens; does nothing if it is known, if there are none, or if a signal comes.
    fn validate(&mut self) -> Result<()> {
        let Some(valid) = self.text.valid.as_ref().filter(|_| !self.is_measured("valid")) else { return Ok(()) };
        let _evaluate = range("evaluate");
        let Some(sum) = evaluate::loss(&self.model, valid, Some(self.config.evaluation.tokens), &self.stop)? else {
            return Ok(());
        };
        let metrics = sum.metrics(self.step);
        self.console.validation(&metrics);
        self.metrics.append(&Record::Valid(metrics))?;
        Ok(())
    }

    /// A continued prompt; nothing if it is known, or if a signal comes meanwhile.
    fn sample(&mut self) -> Result<()> {
        let options = &self.config.sample;
        let Some(tokenizer) = self.text.tokenizer.as_ref().filter(|_| options.tokens > 0) else { return Ok(()) };
        if self.stop.is_set() || self.is_measured("sample") {
            return Ok(());
        }
        let mut prompt = vec![tokenizer.end_of_text()];
        prompt.extend(tokenizer.encode(&options.prompt)?);
        let sampling = Sampling {
            temperature: options.temperature,
            top_k: 0,
            top_p: options.top_p,
            vocabulary: Some(tokenizer.vocab_size()),
            seed: self.config.seed,
        };
        let end = Some(tokenizer.end_of_text());
        let stop = &self.stop;
        let tokens = self.model.generate(&prompt, options.tokens, &sampling, end, |_| !stop.is_set())?;
        if self.stop.is_set() {
            // Cut short: it is made anew after the resume.
            return Ok(());
        }
        let text = tokenizer.decode(&tokens)?;
        self.console.line(&format!("sample at step {}:\n{}{text}\n", self.step, options.prompt));
        let metrics = SampleMetrics { step: self.step, prompt: options.prompt.clone(), text };
        self.metrics.append(&Record::Sample(metrics))?;
        Ok(())
    }

    fn stopped(&mut self) -> Result<Outcome> {
        let cause = self.stop.cause().unwrap_or("request");
        self.metrics.sync()?;
        self.console.finish();
        self.console.line(&format!("stopped by {cause} at step {}; the same command goes on from there", self.step));
        Ok(Outcome::Stopped)
    }

    /// After the last step: evaluation, length extrapolation, attention, a sample, the report.
    fn finish(&mut self) -> Result<Outcome> {
        self.validate()?;
        self.extrapolate()?;
        self.inspect()?;
        self.sample()?;
        self.metrics.sync()?;
        if self.stop.is_set() {
            return self.stopped();
        }
        self.console.finish();
        let report = write_report(&self.folder)?;
        self.console.line(&format!(
            "{} steps, {} tokens in {:.0} s of training; report: {}",
            self.step,
            self.tokens_seen,
            self.training_seconds,
            report.display()
        ));
        Ok(Outcome::Finished)
    }

    fn extrapolate(&mut self) -> Result<()> {
        let evaluation = &self.config.evaluation;
        let Some(valid) = &self.text.valid else { return Ok(()) };
        let available = valid.stream().len() as usize;
        let (lengths, too_long): (Vec<usize>, Vec<usize>) =
            evaluation.lengths.iter().partition(|&&length| length <= available);
        if !too_long.is_empty() {
            self.console.line(&format!("evaluation.lengths {too_long:?} exceed the {available} validation tokens"));
        }
        if lengths.is_empty() || self.is_measured("length") {
            return Ok(());
        }
        let open = |length| self.text.validation_windows(length);
        let (tokens, trained) = (evaluation.length_tokens, self.config.train.sequence_length);
        let metrics =
            evaluate::length_extrapolation(&self.model, open, &lengths, tokens, trained, self.step, &self.stop)?;
        if let Some(metrics) = metrics {
            self.console.lengths(&metrics);
            self.metrics.append(&Record::Length(metrics))?;
        }
        Ok(())
    }

    /// How far the stick reaches in each head, and where the heads look.
    fn inspect(&mut self) -> Result<()> {
        let Some(valid) = &self.text.valid else { return Ok(()) };
        if self.stop.is_set() || self.is_measured("attention") {
            return Ok(());
        }
        let batch = valid.batch(0, 1)?;
        let ids = BatchTensors::new(&batch, self.device)?.ids;
        if let Some(metrics) = crate::inspect::attention_metrics(&self.model, &ids, self.step)? {
            self.metrics.append(&Record::Attention(metrics))?;
        }
        Ok(())
    }

    /// What is trained on what, printed once.
    fn announce(&self) {
        let config = &self.config;
        let parameters = count::parameters(&config.model);
        let epoch = self.text.train.windows() as f64 * config.train.sequence_length as f64;
        self.console.line(&format!(
            "{}: {:.2}M parameters, {} attention, {} on {}, {} tokens a step ({} x {}), {} training tokens, {} threads",
            config.name,
            parameters.total as f64 / 1e6,
            attention_name(config),
            self.dtype,
            self.device,
            config.train.batch_tokens,
            config.sequences_per_step(),
            config.train.sequence_length,
            epoch,
            rayon::current_num_threads(),
        ));
        self.console.line(&mfu::formula(device::gpu_name(self.device).as_deref(), self.peak_flops));
    }

    /// An estimate of the memory, then one real step at full shape whose result is thrown away: weights, moments and the
    /// place in the data stay as they are.
    fn preflight(&mut self) -> Result<()> {
        let estimate = memory::estimate(&self.config, self.device, self.dtype);
        if self.device == Device::Cpu {
            estimate.check_fits(&self.config, self.device, self.dtype)?;
        }
        let batch = self.text.train.batch(self.cursor.position, self.config.micro_batch())?;
        let settings = StepSettings {
            number: self.step + 1,
            learning_rate: 0.0,
            loss_scale: 1.0 / batch.valid_tokens.max(1) as f64,
            recompute: self.config.train.recompute,
        };
        BatchTensors::new(&batch, self.device)
            .and_then(|tensors| step::rehearse(&self.model, &self.optimizer, &tensors, &settings))
            .map_err(|error| estimate.explain_out_of_memory(error, &self.config))?;
        let peak = self.device.memory_use()?.peak as u64;
        self.console.line(&format!("memory: estimated {}, one step took {}", mib(estimate.total()), mib(peak)));
        let metrics = MemoryMetrics { step: self.step, peak_bytes: peak, parts: estimate.parts };
        if !self.is_measured("memory") {
            self.metrics.append(&Record::Memory(metrics))?;
        }
        Ok(())
    }
}

/// Two processes in one folder would tear each other's metrics and checkpoints.
fn lock(folder: &Path) -> Result<File> {
    let path = folder.join(".lock");
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!("another process is training in {}", folder.display()),
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
}

fn attention_name(config: &RunConfig) -> String {
    match serde_json::to_value(config.model.attention) {
        Ok(serde_json::Value::String(name)) => name,
        _ => String::new(),
    }
}

fn mib(bytes: u64) -> String {
    format!("{:.0} MiB", bytes as f64 / (1 << 20) as f64)
}

fn batch_flops(config: &RunConfig, batch: &Batch) -> f64 {
    let squared: f64 = batch.cu_seqlens.windows(2).map(|w| f64::from(w[1] - w[0]).powi(2)).sum();
    count::training_flops(&config.model, batch.ids.len(), squared)
}
