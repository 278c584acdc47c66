//! The training loop.
//!
//! A step: read the batch, forward and backward for each micro-batch (gradients add up in the arena, normalised by the
//! number of predicted tokens of the whole batch), global norm, update. The order of work around it is fixed: a save
//! comes before an evaluation, so that an evaluation that dies loses nothing.

mod memory;
mod notes;
mod opening;
mod ranks;
mod saving;
mod snapshot;
mod text;

use crate::checkpoint::{CheckpointStore, Disk, RealDisk};
use crate::config::{ComputeType, NonFinite, RunConfig};
use crate::console::Console;
use crate::data::{Batch, Cursor, Prefetch, Share};
use crate::device;
use crate::distributed::Communicator;
use crate::distributed::shards::ShardLayout;
use crate::distributed::single::Single;
use crate::evaluate::{self, BatchTensors};
use crate::metrics::{MemoryMetrics, Record, RunMetrics, SampleMetrics, TrainMetrics, mean_share};
use crate::mfu;
use crate::optimizer::Optimizer;
use crate::profile::{Profiler, range};
use crate::report::write_report;
use crate::schedule::learning_rate_factor;
use crate::signal::StopFlag;
use crate::step::{self, StepOutcome, StepSettings};
use anyhow::{Context, Result, bail};
use notes::{HeardNotes, Notes, valid_tokens};
use opening::{make_folder, measured_steps, open_store, open_text};
use saving::Save;
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use stickbreak_model::{Sampling, Transformer, count};
use stickbreak_tensor::{DType, Device};

pub(crate) use memory::{NCCL_BYTES, available_memory, gpu_memory_terms};
pub use snapshot::program_version;
pub use text::{Text, held_out, tokenizer_choice};

/// A run: model, optimizer, data, and their place in time.
pub struct Trainer {
    config: RunConfig,
    folder: PathBuf,
    device: Device,
    dtype: DType,
    communicator: Arc<dyn Communicator>,
    /// Peak rate of all ranks' devices together in the run's dtype, in flop/s, where it is known.
    peak_flops: Option<f64>,
    profiler: Option<Profiler>,
    model: Transformer,
    optimizer: Optimizer,
    text: Text,
    store: CheckpointStore,
    /// A checkpoint that is being written.
    save: Option<Save>,
    /// Of the leading rank alone.
    metrics: Option<RunMetrics>,
    /// By kind: the last step with a line in the metrics, as all ranks know it.
    measured: HashMap<&'static str, u64>,
    /// Set by signals to this process.
    signal: StopFlag,
    /// Set once the ranks have agreed to stop; of a rank that is alone, `signal` itself.
    stop: StopFlag,
    /// The first rank that was asked to stop.
    stopped_rank: Option<usize>,
    console: Console,
    step: u64,
    cursor: Cursor,
    tokens_seen: u64,
    training_seconds: f64,
    skipped_in_a_row: u32,
    /// Held by the leading rank as long as the run is open; the system lets go of it when the process ends, however it
    /// ends.
    _lock: Option<File>,
}

/// The micro-batches of a step that this rank takes.
struct StepBatches {
    batches: Vec<Batch>,
    /// Predicted tokens of the whole step, over all ranks.
    valid_tokens: f64,
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
    /// The ranks that train together.
    pub communicator: Arc<dyn Communicator>,
}

impl Default for TrainerOptions {
    fn default() -> Self {
        Self { device: Device::Cpu, disk: Arc::new(RealDisk), profile: false, communicator: Arc::new(Single) }
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

    /// [`open`](Self::open) on any device, and by any number of ranks, each of which opens the run with the same
    /// configuration and a communicator of its own. The configuration's `dtype` becomes what it means on that device.
    ///
    /// # Errors
    /// As [`open`](Self::open), or if the device does not compute in the dtype or cannot hold the run, the ranks cannot
    /// share the batch or have other data, or another rank is lost. The other ranks are told of an error.
    pub fn open_with(config: RunConfig, folder: &Path, stop: StopFlag, options: TrainerOptions) -> Result<Self> {
        let communicator = Arc::clone(&options.communicator);
        Self::open_rank(config, folder, stop, options).inspect_err(|error| communicator.abort(&format!("{error:#}")))
    }

    fn open_rank(mut config: RunConfig, folder: &Path, signal: StopFlag, options: TrainerOptions) -> Result<Self> {
        let TrainerOptions { device, disk, profile, communicator } = options;
        let (rank, ranks) = (communicator.rank(), communicator.ranks());
        let leads = rank == 0;
        let dtype = config.dtype.resolve(device)?;
        config.dtype = ComputeType::of(dtype);
        config.check_ranks(ranks)?;
        if device != Device::Cpu {
            // Before the weights and moments are there: their allocation would be the first to fail.
            memory::estimate(&config, device, dtype, ranks).check_fits(&config, device, dtype)?;
        }
        let text = open_text(&config, &*communicator, &signal)?;
        let lock = if leads { Some(make_folder(folder)?) } else { None };
        let (store, checkpoint) = open_store(&config, folder, disk, &*communicator)?;
        if let Some(checkpoint) = &checkpoint {
            // Before the metrics are cut back to the checkpoint's step: a mistaken command must lose nothing.
            snapshot::check_identity(checkpoint, &config, &text.fingerprint)?;
        }
        let (windows, shares) = (config.distributed.windows, communicator.shares_memory());
        let mut layout = ShardLayout::arena(ranks);
        layout.shares_values = shares && windows.of_weights();
        layout.shares_gradients = shares && windows.of_gradients();
        let model = Transformer::new_with(config.model.clone(), dtype, device, layout)?;
        let optimizer =
            Optimizer::with_ranks(config.optimizer.clone(), &config.distributed, &model, Arc::clone(&communicator))?;
        let step = checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.step());
        let metrics = if leads { Some(RunMetrics::resume(folder, step)?) } else { None };
        let peak = device::gpu_name(device).filter(|_| dtype == DType::BF16).and_then(|n| mfu::peak_flops(&n));
        let mut trainer = Self {
            measured: measured_steps(metrics.as_ref(), &*communicator)?,
            metrics,
            console: if leads { Console::new(config.train.steps) } else { Console::silent() },
            folder: folder.to_owned(),
            device,
            dtype,
            // The table's rates are those of bf16.
            peak_flops: peak.map(|peak| peak * ranks as f64),
            profiler: (profile && leads).then(|| Profiler::start(folder, device)).transpose()?,
            config,
            model,
            optimizer,
            text,
            store,
            save: None,
            stop: if ranks == 1 { signal.clone() } else { StopFlag::new() },
            signal,
            stopped_rank: None,
            step: 0,
            cursor: Cursor::default(),
            tokens_seen: 0,
            training_seconds: 0.0,
            skipped_in_a_row: 0,
            _lock: lock,
            communicator,
        };
        match checkpoint {
            Some(checkpoint) => {
                trainer.restore(&checkpoint)?;
                trainer.console.line(&format!("resuming {} at step {}", folder.display(), trainer.step));
            }
            None => {
                trainer.model.initialise(trainer.config.seed)?;
                trainer.optimizer.take_master(&trainer.model)?;
            }
        }
        ranks::agree_on_weights(&*trainer.communicator, &trainer.model)?;
        if leads {
            let resolved = format!("# {}\n{}", program_version(), trainer.config.to_toml());
            crate::checkpoint::write_atomically(&folder.join("config.toml"), resolved.as_bytes())
                .with_context(|| format!("cannot write {}", folder.join("config.toml").display()))?;
        }
        Ok(trainer)
    }

    /// Optimizer steps taken so far.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The optimizer, and with it this rank's shard.
    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// The model as it is now.
    pub fn model(&self) -> &Transformer {
        &self.model
    }

    /// Trains to the last step, or until a signal to any rank; then saves, evaluates, samples and writes the report.
    ///
    /// # Errors
    /// If data, model or disk fail, here or on another rank. What is saved stays valid, and the other ranks are told.
    pub fn run(&mut self) -> Result<Outcome> {
        let result = self.train();
        if let Err(error) = &result {
            self.communicator.abort(&format!("{error:#}"));
            self.give_up_save();
        }
        result
    }

    fn train(&mut self) -> Result<Outcome> {
        let steps = self.config.train.steps;
        if self.step >= steps {
            self.console.line(&format!("nothing to train: step {} of {steps} is reached", self.step));
            return self.finish();
        }
        self.announce();
        self.prepare_kernels()?;
        self.preflight()?;
        // What an earlier process was stopped in, after its save.
        self.measure()?;
        let requests = self.share().requests(self.cursor);
        let mut source = Prefetch::start(self.text.train.clone(), requests)?;
        let mut next = self.first_batches(&mut source)?;
        while self.step < steps && !self.stop.is_set() {
            let Some(batches) = next.take() else { break };
            if let Some(profiler) = &mut self.profiler {
                profiler.begin_step();
            }
            let step = range("step");
            let started = Instant::now();
            let outcome;
            (outcome, next) = self.train_step(&batches, &mut source)?;
            let elapsed = started.elapsed();
            drop(step);
            if let Some(table) = self.profiler.as_mut().map(Profiler::end_step).transpose()?.flatten() {
                self.console.line(&table);
            }
            self.finish_step(&outcome, elapsed)?;
            self.periodic_work()?;
        }
        drop(source);
        if let Some(table) = self.profiler.as_mut().map(Profiler::finish).transpose()?.flatten() {
            self.console.line(&table);
        }
        self.save(true)?;
        if self.stop.is_set() {
            return self.stopped();
        }
        self.finish()
    }

    /// This rank's share of every step's windows.
    fn share(&self) -> Share {
        let (sequences, ranks) = (self.config.sequences_per_step(), self.ranks());
        Share { sequences, rank: self.rank(), ranks, at_once: self.config.micro_batch(ranks) }
    }

    /// Compiles and loads what the model needs: the leading rank first, so that those who share its cache find it there. The
    /// host waits for the slowest, which would count as hanging once collectives have begun.
    fn prepare_kernels(&self) -> Result<()> {
        let console = &self.console;
        let prepare =
            || device::prepare_kernels(&self.config.model, self.dtype, self.device, |line| console.line(line));
        if self.leads() {
            prepare()?;
        }
        self.communicator.barrier("kernels of rank 0")?;
        if !self.leads() {
            prepare()?;
        }
        Ok(self.communicator.barrier("kernels of all ranks")?)
    }

    /// This rank's micro-batches of one step; `None` if this process was asked to stop while waiting.
    fn next_batches(&self, source: &mut Prefetch) -> Result<Option<Vec<Batch>>> {
        let _data = range("data");
        let count = self.share().batches();
        let mut out = Vec::with_capacity(count);
        while out.len() < count {
            if self.signal.is_set() {
                return Ok(None);
            }
            out.extend(source.wait(Duration::from_millis(200))?);
        }
        Ok(Some(out))
    }

    /// The batches of the first step; those of all others are counted in the step before them.
    fn first_batches(&mut self, source: &mut Prefetch) -> Result<Option<StepBatches>> {
        let batches = self.next_batches(source)?;
        let mine = [valid_tokens(batches.as_deref()), self.wants_to_stop()];
        let told = self.communicator.gather_values("tokens of the first step", &mine)?;
        self.hear_stop(told.iter().map(|values| values[1]));
        let valid_tokens = told.iter().map(|values| values[0]).sum();
        Ok(batches.map(|batches| StepBatches { batches, valid_tokens }))
    }

    /// Forward and backward of all micro-batches, and the update; with the outcome, the batches of the next step.
    fn train_step(
        &mut self,
        StepBatches { batches, valid_tokens: count }: &StepBatches,
        source: &mut Prefetch,
    ) -> Result<(StepOutcome, Option<StepBatches>)> {
        let settings = StepSettings {
            number: self.step + 1,
            learning_rate: self.learning_rate(),
            loss_scale: 1.0 / count.max(1.0),
            recompute: self.config.train.recompute,
        };
        let progress = self.save_progress();
        let mut next = None;
        // What the ranks tell each other with this step's loss, so that they need no exchange of its own.
        let notes = || {
            if self.step + 1 < self.config.train.steps {
                next = self.next_batches(source)?;
            }
            let flops: f64 = batches.iter().map(|batch| batch_flops(&self.config, batch)).sum();
            Ok(Notes { next_tokens: valid_tokens(next.as_deref()), stop: self.wants_to_stop(), progress, flops }
                .to_values())
        };
        let tensors = batches.iter().map(|batch| {
            let _upload = range("upload");
            BatchTensors::new(batch, self.device)
        });
        let logged = self.leads() && (self.step + 1).is_multiple_of(self.config.train.log_every);
        self.model.watch_tiles(logged);
        let outcome = step::take_step(&self.model, &self.optimizer, tensors, &settings, notes)?;
        let told: Vec<HeardNotes> = outcome.told.iter().map(|told| HeardNotes::new(&told.notes)).collect();
        self.hear_stop(told.iter().map(|notes| notes.stop));
        self.advance_save(&told.iter().map(|notes| notes.progress).collect::<Vec<_>>())?;
        let valid_tokens = told.iter().map(|notes| notes.next_tokens).sum();
        self.cursor.position += self.config.sequences_per_step() as u64;
        self.tokens_seen += self.config.train.batch_tokens as u64;
        if outcome.is_finite() {
            self.skipped_in_a_row = 0;
        } else {
            self.non_finite(&outcome)?;
        }
        self.step += 1;
        Ok((outcome, next.map(|batches| StepBatches { batches, valid_tokens })))
    }

    /// No update is made with a loss or gradient that is not finite: names the rank and the tensor, then stops or skips.
    fn non_finite(&mut self, outcome: &StepOutcome) -> Result<()> {
        let step = self.step + 1;
        let losses: Vec<f64> = outcome.told.iter().map(|told| told.loss).collect();
        let (rank, culprit) = self.non_finite_culprit(&losses, outcome.loss)?;
        self.skipped_in_a_row += 1;
        if self.config.train.non_finite == NonFinite::Skip && self.skipped_in_a_row < MOST_SKIPPED {
            self.console.line(&format!("step {step}, rank {rank}: {culprit} is not finite; this batch is skipped"));
            return Ok(());
        }
        bail!(
            "step {step}, rank {rank}: {culprit} is not finite; the parameters were not updated. The last checkpoint is \
             intact; a lower optimizer.learning_rate or a longer schedule.warmup_steps usually helps"
        );
    }

    fn learning_rate(&self) -> f64 {
        let factor = learning_rate_factor(&self.config.schedule, self.step, self.config.train.steps);
        self.config.optimizer.learning_rate * factor
    }

    /// Metrics and log line of a step.
    fn finish_step(&mut self, outcome: &StepOutcome, elapsed: Duration) -> Result<()> {
        let seconds = elapsed.as_secs_f64();
        self.training_seconds += seconds;
        let taken = self.step - 1;
        let factor = learning_rate_factor(&self.config.schedule, taken, self.config.train.steps);
        let flops: f64 = outcome.told.iter().map(|told| HeardNotes::new(&told.notes).flops).sum();
        let ranks = self.ranks();
        let metrics = TrainMetrics {
            step: self.step,
            loss: outcome.loss,
            grad_norm: outcome.gradient_norm,
            learning_rate: self.config.optimizer.learning_rate * factor,
            tokens_per_second: self.config.train.batch_tokens as f64 / seconds,
            milliseconds: 1e3 * seconds,
            device_milliseconds: outcome.device_milliseconds,
            host_milliseconds: outcome.host_milliseconds,
            exposed_milliseconds: outcome.exposed_milliseconds,
            ranks: (ranks > 1).then_some(ranks),
            tokens_seen: self.tokens_seen,
            mfu: mfu::utilisation(flops, seconds, self.peak_flops),
            peak_memory_bytes: Some(self.device.memory_use()?.peak as u64),
            // The device is idle: it was waited for.
            tiles_skipped: self.model.take_skipped_tiles()?.map(|shares| mean_share(&shares)),
        };
        self.record(Record::Train(metrics.clone()))?;
        self.console.step(&metrics, flops / seconds, self.step.is_multiple_of(self.config.train.log_every));
        Ok(())
    }

    /// Appends a line to the metrics, on the leading rank.
    fn record(&mut self, record: Record) -> Result<()> {
        self.metrics.as_mut().map_or(Ok(()), |metrics| Ok(metrics.append(&record)?))
    }

    /// Saves, evaluates and samples when their steps have come; a save first.
    fn periodic_work(&mut self) -> Result<()> {
        if self.is_due(self.config.checkpoint.every) {
            self.save(false)?;
        }
        if self.ranks() > 1 && (self.is_due(self.config.evaluation.every) || self.is_due(self.config.sample.every)) {
            // Other ranks' parts are agreed on between steps, and an evaluation may take long, or die.
            self.finish_save()?;
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
            self.count_tiles()?;
        }
        if self.is_due(self.config.sample.every) && !self.is_measured("sample") {
            self.optimizer.weights().settle()?;
            if self.leads() {
                self.sample()?;
            }
            self.measured.insert("sample", self.step);
            // Cut short by a signal, it is made anew after the resume: the run stops before the next step.
            self.agree_on_stop("sample")?;
        }
        Ok(())
    }

    /// Whether the metrics have a line of this kind for this step.
    fn is_measured(&self, kind: &str) -> bool {
        self.measured.get(kind) == Some(&self.step)
    }

    /// The loss on the validation tokens, by all ranks; does nothing if it is known, if there are none, or if a signal
    /// comes.
    fn validate(&mut self) -> Result<()> {
        let Some(valid) = self.text.valid.as_ref().filter(|_| !self.is_measured("valid")) else { return Ok(()) };
        let _evaluate = range("evaluate");
        self.optimizer.weights().settle()?;
        let tokens = Some(self.config.evaluation.tokens);
        let sum = evaluate::shared_loss(&self.model, valid, tokens, &self.signal, &*self.communicator)?;
        let Some(sum) = sum else { return self.agree_on_stop("validation").map(drop) };
        self.measured.insert("valid", self.step);
        let metrics = sum.metrics(self.step);
        self.console.validation(&metrics);
        self.record(Record::Valid(metrics))
    }

    /// The tiles that early exit leaves out in each head, by the leading rank: little work beside a validation.
    fn count_tiles(&mut self) -> Result<()> {
        let Some(valid) = self.text.valid.as_ref().filter(|_| self.leads() && !self.is_measured("tiles")) else {
            return Ok(());
        };
        if self.signal.is_set() {
            return Ok(());
        }
        if let Some(metrics) = crate::inspect::tiles_metrics(&self.model, valid, self.step)? {
            self.measured.insert("tiles", self.step);
            self.record(Record::Tiles(metrics))?;
        }
        Ok(())
    }

    /// A continued prompt; nothing if a signal comes meanwhile: it is made anew after the resume.
    fn sample(&mut self) -> Result<()> {
        let options = &self.config.sample;
        let Some(tokenizer) = self.text.tokenizer.as_ref().filter(|_| options.tokens > 0) else { return Ok(()) };
        if self.signal.is_set() {
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
        let signal = &self.signal;
        let tokens = self.model.generate(&prompt, options.tokens, &sampling, end, |_| !signal.is_set())?;
        if self.signal.is_set() {
            return Ok(());
        }
        let text = tokenizer.decode(&tokens)?;
        self.console.line(&format!("sample at step {}:\n{}{text}\n", self.step, options.prompt));
        self.record(Record::Sample(SampleMetrics { step: self.step, prompt: options.prompt.clone(), text }))
    }

    fn sync_metrics(&self) -> Result<()> {
        self.metrics.as_ref().map_or(Ok(()), |metrics| Ok(metrics.sync()?))
    }

    fn stopped(&mut self) -> Result<Outcome> {
        let cause = self.stop_cause();
        self.sync_metrics()?;
        self.console.finish();
        self.console.line(&format!("stopped by {cause} at step {}; the same command goes on from there", self.step));
        Ok(Outcome::Stopped)
    }

    /// After the last step: evaluation, length extrapolation, attention, a sample, the report.
    fn finish(&mut self) -> Result<Outcome> {
        self.optimizer.weights().settle()?;
        self.validate()?;
        self.count_tiles()?;
        if self.leads() {
            self.extrapolate()?;
            self.inspect()?;
            if !self.is_measured("sample") {
                self.sample()?;
            }
            self.sync_metrics()?;
        }
        if self.agree_on_stop("end of the run")? {
            return self.stopped();
        }
        self.console.finish();
        if self.leads() {
            let report = write_report(&self.folder)?;
            self.console.line(&format!(
                "{} steps, {} tokens in {:.0} s of training; report: {}",
                self.step,
                self.tokens_seen,
                self.training_seconds,
                report.display()
            ));
        }
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
            evaluate::length_extrapolation(&self.model, open, &lengths, tokens, trained, self.step, &self.signal)?;
        if let Some(metrics) = metrics {
            self.console.lengths(&metrics);
            self.record(Record::Length(metrics))?;
        }
        Ok(())
    }

    /// How far the stick reaches in each head, and where the heads look.
    fn inspect(&mut self) -> Result<()> {
        let Some(valid) = &self.text.valid else { return Ok(()) };
        if self.signal.is_set() || self.is_measured("attention") {
            return Ok(());
        }
        let batch = valid.batch(0, 1)?;
        let ids = BatchTensors::new(&batch, self.device)?.ids;
        if let Some(metrics) = crate::inspect::attention_metrics(&self.model, &ids, self.step)? {
            self.record(Record::Attention(metrics))?;
        }
        Ok(())
    }

    /// What is trained on what, printed once.
    fn announce(&self) {
        let config = &self.config;
        let parameters = count::parameters(&config.model);
        let epoch = self.text.train.windows() as f64 * config.train.sequence_length as f64;
        self.console.line(&format!(
            "{}: {:.2}M parameters, {} attention, {} on {}{}, {} tokens a step ({} x {}), {} training tokens, {} threads",
            config.name,
            parameters.total as f64 / 1e6,
            attention_name(config),
            self.dtype,
            self.device,
            if self.ranks() == 1 { String::new() } else { format!(" by each of {} ranks", self.ranks()) },
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
        let estimate = memory::estimate(&self.config, self.device, self.dtype, self.ranks());
        if self.device == Device::Cpu {
            estimate.check_fits(&self.config, self.device, self.dtype)?;
        }
        let (position, windows) = self.share().batch(self.cursor.position, 0);
        let batch = self.text.train.batch(position, windows)?;
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
            self.record(Record::Memory(metrics))?;
        }
        Ok(())
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
