//! `stickbreak bench`: the same shapes every time, as a table and as JSON.
//!
//! On a CPU times are wall times; on a GPU they are the device's own, after a warm-up. Inputs are random with a fixed
//! seed. Figures with early exit on random data flatter: the stick is used up after some dozens of keys there, a trained
//! model skips less. "dense" is early exit off.

mod attention;
mod gemm;
mod gpu_step;
mod step;

use crate::device::{self, DeviceOption};
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use gpu_step::Shape;
use serde::Serialize;
use std::path::PathBuf;
use std::time::Instant;
use stickbreak_tensor::{DType, Device, Tensor};

/// What to time.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// One part; default: all of them.
    part: Option<Part>,
    /// On a GPU, one training shape; default: all of them.
    #[arg(long, value_enum)]
    shape: Option<Shape>,
    /// Only with early exit off.
    #[arg(long)]
    dense: bool,
    /// Also write the figures to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Repetitions of each measurement, of which the median counts; default: 5 on a CPU, 20 on a GPU.
    #[arg(long)]
    repeats: Option<usize>,
    #[command(flatten)]
    device: DeviceOption,
}

/// A part of the stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// Attention, forward and backward.
    Attention,
    /// A whole training step.
    Train,
    /// Matrix products.
    Gemm,
}

/// One measurement.
#[derive(Debug, Clone, Serialize)]
struct Row {
    part: &'static str,
    name: String,
    shape: String,
    /// Median over the repetitions.
    milliseconds: f64,
    /// Fastest repetition.
    fastest_milliseconds: f64,
    /// Rate of useful arithmetic; attention is counted causal-half, its backward as 2.5 forwards.
    gflops_per_second: f64,
    /// Where it means something.
    tokens_per_second: Option<f64>,
    /// Of a training step on a GPU.
    #[serde(flatten)]
    step: Option<StepFigures>,
}

/// What a training step on a GPU shows beside its time.
#[derive(Debug, Clone, Copy, Serialize)]
struct StepFigures {
    mfu: Option<f64>,
    host_milliseconds: f64,
    device_milliseconds: f64,
    peak_memory_bytes: u64,
}

/// What every part is told.
#[derive(Debug, Clone, Copy)]
struct Settings {
    device: Device,
    repeats: usize,
    dense_only: bool,
    shape: Option<Shape>,
}

/// Runs the parts and prints a table.
///
/// # Errors
/// If the device or a part cannot run, or the JSON file cannot be written.
pub fn run(args: &BenchArgs) -> Result<()> {
    let device = args.device.announce()?;
    let gpu = device != Device::Cpu;
    if args.shape.is_some() && !gpu {
        bail!("--shape chooses among the GPU's training shapes, and the device is {device}");
    }
    let repeats = args.repeats.unwrap_or(if gpu { 20 } else { 5 }).max(1);
    let settings = Settings { device, repeats, dense_only: args.dense, shape: args.shape };
    match device::gpu_name(device) {
        Some(name) => println!("{name}, bf16, device time, median of {repeats}"),
        None => println!("{} threads, f32, median of {repeats}", rayon::current_num_threads()),
    }
    println!(
        "{:<10} {:<44} {:<28} {:>9} {:>9} {:>9} {:>9}",
        "part",
        "what",
        "shape",
        "ms",
        "best ms",
        if gpu { "TFLOP/s" } else { "GFLOP/s" },
        "tok/s"
    );
    let mut rows = Vec::new();
    for (part, measure) in [
        (Part::Gemm, gemm::measure as fn(&Settings, &mut dyn FnMut(Row)) -> Result<()>),
        (Part::Attention, attention::measure),
        (Part::Train, if gpu { gpu_step::measure } else { step::measure }),
    ] {
        if args.part.is_none_or(|wanted| wanted == part) {
            measure(&settings, &mut |row| {
                println!("{}", row.line(gpu));
                rows.push(row);
            })?;
        }
    }
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&rows)?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

impl Row {
    fn new(
        part: &'static str,
        name: impl Into<String>,
        shape: impl Into<String>,
        (median, fastest): (f64, f64),
        flops: f64,
        tokens: Option<usize>,
    ) -> Self {
        Self {
            part,
            name: name.into(),
            shape: shape.into(),
            milliseconds: 1e3 * median,
            fastest_milliseconds: 1e3 * fastest,
            gflops_per_second: flops / median / 1e9,
            tokens_per_second: tokens.map(|tokens| tokens as f64 / median),
            step: None,
        }
    }

    /// A line of the table.
    fn line(&self, gpu: bool) -> String {
        let tokens = self.tokens_per_second.map_or(String::new(), |rate| format!("{rate:.0}"));
        let rate = if gpu { self.gflops_per_second / 1e3 } else { self.gflops_per_second };
        let Self { part, name, shape, milliseconds, fastest_milliseconds, .. } = self;
        let mut line = format!(
            "{part:<10} {name:<44} {shape:<28} {milliseconds:>9.3} {fastest_milliseconds:>9.3} {rate:>9.1} {tokens:>9}"
        );
        if let Some(step) = self.step {
            let mfu = step.mfu.map_or("n/a".to_owned(), |mfu| format!("{:.1}%", 100.0 * mfu));
            line += &format!(
                "  MFU {mfu}, host {:.1} ms, device {:.1} ms, peak {:.1} GiB",
                step.host_milliseconds,
                step.device_milliseconds,
                step.peak_memory_bytes as f64 / (1u64 << 30) as f64
            );
        }
        line
    }
}

/// Runs of `body` that warm up before it is timed.
const WARM_UP: usize = 3;

/// Median and minimum of the seconds that `body` takes on a device.
fn time(settings: &Settings, mut body: impl FnMut() -> Result<()>) -> Result<(f64, f64)> {
    let queue = device::queue(settings.device)?;
    for _ in 0..if queue.is_some() { WARM_UP } else { 1 } {
        body()?;
    }
    let mut seconds = Vec::with_capacity(settings.repeats);
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
    fn a_line_of_a_gpu_step_has_all_its_figures() {
        let mut row = Row::new("train", "dense", "16 x 2048 tokens", (0.25, 0.2), 1e14, Some(32768));
        assert!(row.line(true).contains("400.0") && row.line(true).contains("131072"), "{}", row.line(true));
        row.step = Some(StepFigures {
            mfu: Some(0.404),
            host_milliseconds: 40.0,
            device_milliseconds: 249.0,
            peak_memory_bytes: 3 << 30,
        });
        let line = row.line(true);
        assert!(line.ends_with("MFU 40.4%, host 40.0 ms, device 249.0 ms, peak 3.0 GiB"), "{line}");
        let json = serde_json::to_value(&row).unwrap();
        assert_eq!(json["device_milliseconds"], 249.0);
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
    }
}
