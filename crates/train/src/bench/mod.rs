//! `stickbreak bench`: the same shapes every time, as a table and as JSON.
//!
//! On a CPU times are wall times; on a GPU they are the device's own, after a warm-up. Inputs are random with a fixed
//! seed. Figures with early exit on random data flatter: the stick is used up after some dozens of keys there, a trained
//! model skips less. "dense" is early exit off. `--from RUN` measures attention, decoding and training steps on a trained
//! model and its text instead.

mod attention;
mod captured;
mod decode;
mod gemm;
mod gpu_step;
mod peers;
mod row;
mod step;
mod trained;
mod trained_step;

use crate::device::{self, DeviceOption};
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use gpu_step::Shape;
use row::Row;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;
use stickbreak_tensor::{DType, Device, Tensor};
use trained::Trained;

/// What to time.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// One part; default: all of them, or with --from all that a trained model changes.
    part: Option<Part>,
    /// Measure on this run's trained weights and held-out text: attention on its q, k and v, decoding, its training step.
    #[arg(long, value_name = "RUN")]
    from: Option<PathBuf>,
    /// With --from, another text: a file, or a folder that `prepare` wrote (its validation split).
    #[arg(long, value_name = "TEXT", requires = "from")]
    data: Option<PathBuf>,
    /// Context lengths of decoding, and with --from of attention, separated by commas.
    #[arg(long, value_delimiter = ',')]
    lengths: Option<Vec<usize>>,
    /// Time other implementations of attention beside ours, by `python3` if it has PyTorch.
    #[arg(long)]
    peers: bool,
    /// On a GPU, one training shape; default: all of them.
    #[arg(long, value_enum)]
    shape: Option<Shape>,
    /// Only with early exit off.
    #[arg(long)]
    dense: bool,
    /// Also write the figures to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Repetitions of each measurement, of which the median counts; default: 5 on a CPU and with --from, else 20.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    repeats: Option<u32>,
    #[command(flatten)]
    device: DeviceOption,
}

/// A part of the stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// Attention, forward and backward.
    Attention,
    /// One query against a cache of keys and values.
    Decode,
    /// A whole training step.
    Train,
    /// Matrix products.
    Gemm,
}

/// Median and minimum of times, in seconds.
type Seconds = (f64, f64);

/// What every part is told.
#[derive(Debug, Clone)]
struct Settings {
    device: Device,
    /// Runs before those that are timed.
    warm_up: usize,
    repeats: usize,
    dense_only: bool,
    shape: Option<Shape>,
    lengths: Option<Vec<usize>>,
    peers: bool,
}

impl BenchArgs {
    /// Refuses options that what is to be measured would not hear of.
    fn check(&self, device: Device) -> Result<()> {
        let Self { part, from, .. } = self;
        if self.shape.is_some() && device == Device::Cpu {
            bail!("--shape chooses among the GPU's training shapes, and the device is {device}");
        }
        if from.is_some() && (*part == Some(Part::Gemm) || self.shape.is_some()) {
            bail!("--from measures a trained model: leave out --shape, and gemm, which no weights change");
        }
        if self.lengths.is_some() && (*part == Some(Part::Train) || from.is_none() && *part != Some(Part::Decode)) {
            bail!("--lengths are those of `bench decode`, or of attention and decoding with --from RUN");
        }
        if self.peers && part.is_some_and(|part| part != Part::Attention) {
            bail!("--peers are timed beside `bench attention`");
        }
        if self.dense && from.is_some() && *part != Some(Part::Train) {
            bail!("--dense leaves out early exit, which all parts but `bench train` measure with --from RUN");
        }
        Ok(())
    }
}

/// Runs the parts and prints a table.
///
/// # Errors
/// If the device or a part cannot run, or the JSON file cannot be written.
pub fn run(args: &BenchArgs) -> Result<()> {
    let device = args.device.announce()?;
    args.check(device)?;
    let gpu = device != Device::Cpu;
    let repeats = args.repeats.map_or(if gpu && args.from.is_none() { 20 } else { 5 }, |repeats| repeats as usize);
    let warm_up = if gpu && args.from.is_none() { WARM_UP } else { 1 };
    let (lengths, dense_only) = (args.lengths.clone(), args.dense);
    let settings = Settings { device, warm_up, repeats, dense_only, shape: args.shape, lengths, peers: args.peers };
    match device::gpu_name(device) {
        Some(name) => println!("{name}, bf16, device time, median of {repeats}"),
        None => println!("{} threads, f32, median of {repeats}", rayon::current_num_threads()),
    }
    let trained = args.from.as_deref().map(|run| Trained::open(run, args.data.as_deref(), device)).transpose()?;
    if let Some(path) = &args.json {
        // Now, and not after all has been measured.
        File::options().append(true).create(true).open(path).with_context(|| cannot_write(path))?;
    }
    println!("{}", Row::header(gpu));
    let mut rows = Vec::new();
    let parts = [Part::Gemm, Part::Attention, Part::Decode, Part::Train].into_iter();
    let wanted = |part: Part| match args.part {
        Some(asked) => asked == part,
        None => part == Part::Train || trained.as_ref().is_none_or(Trained::skips_tiles),
    };
    if let (None, Some(trained)) = (args.part, trained.as_ref().filter(|trained| !trained.skips_tiles())) {
        println!("{}: softmax attention skips nothing, so only its training step is measured", trained.name);
    }
    let measured = parts.filter(|part| wanted(*part)).try_for_each(|part| {
        measure(part, &settings, trained.as_ref(), &mut |row| {
            println!("{}", row.line(gpu));
            rows.push(row);
        })
    });
    // With a failure, too: what was measured before it.
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_string_pretty(&rows)?).with_context(|| cannot_write(path))?;
    }
    measured
}

fn cannot_write(path: &Path) -> String {
    format!("cannot write {}", path.display())
}

fn measure(part: Part, settings: &Settings, trained: Option<&Trained>, each: &mut dyn FnMut(Row)) -> Result<()> {
    match (part, trained) {
        // No weights change it.
        (Part::Gemm, Some(_)) => Ok(()),
        (Part::Gemm, None) => gemm::measure(settings, each),
        (Part::Attention, Some(trained)) => captured::measure(settings, trained, each),
        (Part::Attention, None) => attention::measure(settings, each),
        (Part::Decode, trained) => decode::measure(settings, trained, each),
        (Part::Train, Some(trained)) => trained_step::measure(settings, trained, each),
        (Part::Train, None) if settings.device == Device::Cpu => step::measure(settings, each),
        (Part::Train, None) => gpu_step::measure(settings, each),
    }
}

/// Runs that warm up on a GPU, unless the measurement is a long one.
const WARM_UP: usize = 3;

/// Median and minimum of the seconds that `body` takes on a device.
fn time(settings: &Settings, mut body: impl FnMut() -> Result<()>) -> Result<Seconds> {
    let queue = device::queue(settings.device)?;
    for _ in 0..settings.warm_up {
        body()?;
    }
    let mut seconds = Vec::new();
    for _ in 0..settings.repeats {
        seconds.push(match &queue {
            Some(queue) => {
                let timer = queue.timer()?;
                body()?;
                timer.milliseconds()? / 1e3
            }
            None => {
                let start = Instant::now();
                body()?;
                start.elapsed().as_secs_f64()
            }
        });
    }
    Ok((median(&mut seconds), seconds[0]))
}

/// The median; sorts.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Values from N(0, 1) on a device: bf16 on a GPU, f32 on a CPU. Past the first 16 million they repeat: the host takes
/// far longer to draw them than the device to use them.
fn random(settings: &Settings, shape: impl Into<stickbreak_tensor::Shape>, seed: u64) -> Result<Tensor> {
    const DRAWN: usize = 1 << 24;
    let shape = shape.into();
    let elements = shape.elements();
    let dtype = if settings.device == Device::Cpu { DType::F32 } else { DType::BF16 };
    let drawn = Tensor::randn(0.0, 1.0, [elements.min(DRAWN)], DType::F32, seed)?;
    let drawn = drawn.to_dtype(dtype)?.to_device(settings.device)?;
    let values = Tensor::empty_on([elements], dtype, settings.device)?;
    for start in (0..elements).step_by(DRAWN) {
        let part = (elements - start).min(DRAWN);
        values.narrow(0, start, part)?.copy_assign(&drawn.narrow(0, 0, part)?)?;
    }
    Ok(values.reshape(shape)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [4.0]), 4.0);
    }
}
