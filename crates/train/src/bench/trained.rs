//! A trained model and held-out text of its run: what figures with early exit have to be measured on.

use super::Settings;
use crate::config::{ComputeType, RunConfig};
use crate::data::{Batch, Loader, TokenStream};
use crate::load::LoadedModel;
use crate::report::CONFIG_NAME;
use crate::trainer::held_out;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use stickbreak_model::{AttentionKind, Packing};
use stickbreak_tensor::{Device, Tensor};

/// Early exit of a model that has none, where one is to be measured.
const DEFAULT_BITS: u32 = 24;

/// A run, opened for measurements.
pub(super) struct Trained {
    pub(super) loaded: LoadedModel,
    /// For rows: the run's name and step.
    pub(super) name: String,
    run: PathBuf,
    data: Option<PathBuf>,
}

impl Trained {
    /// `data` is a text file or a prepared folder; without one the run's own validation split is read.
    pub(super) fn open(run: &Path, data: Option<&Path>, device: Device) -> Result<Self> {
        let loaded = LoadedModel::open_on(run, device, ComputeType::Auto.resolve(device)?)?;
        let full = run.canonicalize().with_context(|| format!("cannot open {}", run.display()))?;
        // A checkpoint's folder stands in the run's, under `checkpoints`.
        let is_run = |folder: &&Path| folder.join(CONFIG_NAME).is_file();
        let run = [full.as_path()].into_iter().chain(full.ancestors().nth(2)).find(is_run).unwrap_or(&full);
        let name = run.file_name().map_or("model".into(), |name| name.to_string_lossy().into_owned());
        let name = format!("{name} step {}", loaded.step);
        Ok(Self { loaded, name, run: run.to_owned(), data: data.map(Path::to_owned) })
    }

    /// The bits of the model's early exit, or usual ones where it is off.
    pub(super) fn early_exit_bits(&self) -> u32 {
        match self.loaded.model.config().early_exit_bits {
            0 => DEFAULT_BITS,
            bits => bits,
        }
    }

    /// What stick-breaking is measured with: names of early exit and of none, and their bits.
    pub(super) fn kinds(&self) -> [(String, u32); 2] {
        let bits = self.early_exit_bits();
        [(format!("early exit 2^-{bits}"), bits), ("dense".to_owned(), 0)]
    }

    /// Whether its attention is stick-breaking.
    pub(super) fn skips_tiles(&self) -> bool {
        self.loaded.model.config().attention == AttentionKind::StickBreaking
    }

    /// Refuses a softmax model, which skips nothing.
    pub(super) fn expect_stick_breaking(&self) -> Result<()> {
        if self.skips_tiles() {
            return Ok(());
        }
        let other = self.loaded.model.config().attention;
        bail!("{}: its attention is {other:?}, and only stick-breaking skips tiles", self.run.display())
    }

    /// How the run was configured.
    pub(super) fn config(&self) -> Result<RunConfig> {
        RunConfig::load(&self.run.join(CONFIG_NAME), &[])
            .with_context(|| format!("{} is not a run's folder", self.run.display()))
    }

    fn stream(&self) -> Result<TokenStream> {
        if let Some(data) = &self.data {
            return self.loaded.open_text(data);
        }
        let stream = self
            .config()
            .and_then(|config| held_out(&config))
            .context("the run's held-out text cannot be opened; --data names another one")?;
        if stream.is_empty() {
            bail!("{} holds out no text; --data names another one", self.run.display());
        }
        self.loaded.check_vocabulary(&stream, &self.run)?;
        Ok(stream)
    }

    /// The text in windows of a length.
    pub(super) fn windows(&self, length: usize) -> Result<Loader> {
        Ok(Loader::new(self.stream()?, length, None)?)
    }

    /// Of these lengths those that the text has a window of; if nobody chose them, others are left out and told.
    pub(super) fn available(&self, settings: &Settings, defaults: &[usize]) -> Result<Vec<usize>> {
        let tokens = self.stream()?.len();
        if let Some(chosen) = &settings.lengths {
            if let Some(length) = chosen.iter().find(|&&length| length as u64 > tokens || length < 2) {
                bail!("--lengths has {length}, but the text has {tokens} tokens and a window at least 2");
            }
            return Ok(chosen.clone());
        }
        let (available, long): (Vec<usize>, Vec<usize>) = defaults.iter().partition(|&&length| length as u64 <= tokens);
        if let (true, Some(shortest)) = (available.is_empty(), long.iter().min()) {
            bail!(
                "the held-out text has {tokens} tokens, fewer than the shortest window, {shortest}: --lengths has shorter ones"
            );
        }
        if !long.is_empty() {
            println!("the held-out text has {tokens} tokens: no windows of {long:?}");
        }
        Ok(available)
    }

    /// Windows of a length, at most so many tokens and at least one window, spread over the text, one document each.
    pub(super) fn row(&self, length: usize, tokens: usize) -> Result<(Tensor, Packing)> {
        let windows = self.windows(length)?;
        let count = (tokens / length).clamp(1, windows.windows() as usize);
        let mut batches = windows.spread(count, length, (count * length) as u64)?;
        let Batch { ids, .. } = batches.next().transpose()?.context("the text has no window")?;
        let offsets: Vec<i32> = (0..=ids.len() / length).map(|window| (window * length) as i32).collect();
        Ok((Tensor::from_slice(&ids, [ids.len()])?, Packing::new(&offsets)?))
    }
}
