//! What a person sees of a run: a progress bar on a terminal, and log lines.

use crate::metrics::{LengthMetrics, TrainMetrics, ValidMetrics};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{IsTerminal, Write};

/// Prints to standard error; lines do not tear the bar.
#[derive(Debug)]
pub struct Console {
    bar: ProgressBar,
}

impl Console {
    /// A bar over so many steps; hidden if standard error is not a terminal.
    pub fn new(steps: u64) -> Self {
        let bar = if std::io::stderr().is_terminal() { ProgressBar::new(steps) } else { ProgressBar::hidden() };
        let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} {elapsed} left {eta} {msg}");
        bar.set_style(style.expect("a valid template"));
        Self { bar }
    }

    /// A line of its own.
    pub fn line(&self, text: &str) {
        self.bar.suspend(|| {
            // A closed standard error must not end a run.
            let _ = writeln!(std::io::stderr(), "{text}");
        });
    }

    /// Moves the bar; with `print`, also a log line.
    pub fn step(&self, metrics: &TrainMetrics, flops_per_second: f64, print: bool) {
        self.bar.set_position(metrics.step);
        self.bar.set_message(format!("loss {:.3}", metrics.loss));
        if print {
            let memory = metrics.peak_memory_bytes.unwrap_or(0) >> 20;
            self.line(&format!(
                "step {:>6}  loss {:.4}  norm {:.3}  lr {:.2e}  {:>7.0} tok/s  {:>6.0} ms  {:>5.0} GFLOP/s  MFU n/a  {memory} MiB",
                metrics.step,
                metrics.loss,
                metrics.grad_norm,
                metrics.learning_rate,
                metrics.tokens_per_second,
                metrics.milliseconds,
                flops_per_second / 1e9,
            ));
        }
    }

    /// A validation.
    pub fn validation(&self, metrics: &ValidMetrics) {
        let bits = metrics.bits_per_byte.map_or(String::new(), |bits| format!("  {bits:.4} bits per byte"));
        self.line(&format!(
            "step {:>6}  validation loss {:.4}  perplexity {:.3}{bits}  ({} tokens)",
            metrics.step, metrics.loss, metrics.perplexity, metrics.tokens
        ));
    }

    /// A length-extrapolation curve.
    pub fn lengths(&self, metrics: &LengthMetrics) {
        for (length, loss) in std::iter::zip(&metrics.lengths, &metrics.loss) {
            let mark = if *length == metrics.trained_length { "  (trained length)" } else { "" };
            self.line(&format!("context {length:>7}  loss {loss:.4}  perplexity {:.3}{mark}", loss.exp()));
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
