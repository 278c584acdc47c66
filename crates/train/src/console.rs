//! What a person sees of a run: a progress bar on a terminal, and log lines.

use crate::metrics::{LengthMetrics, TrainMetrics, ValidMetrics};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{IsTerminal, Write};

/// The log line of a step. On a GPU it says how long the host was busy, too.
fn step_line(metrics: &TrainMetrics, flops_per_second: f64) -> String {
    let time = match (metrics.host_milliseconds, metrics.exposed_milliseconds) {
        (Some(host), Some(exposed)) => {
            format!("{:>6.1} ms (host {host:.1}, exposed communication {exposed:.1})", metrics.milliseconds)
        }
        (Some(host), None) => format!("{:>6.1} ms (host {host:.1})", metrics.milliseconds),
        (None, _) => format!("{:>6.0} ms", metrics.milliseconds),
    };
    let each = match metrics.ranks {
        Some(ranks) => format!(" ({:.0} on each of {ranks})", metrics.tokens_per_second / ranks as f64),
        None => String::new(),
    };
    let rate = match flops_per_second {
        rate if rate >= 1e12 => format!("{:>5.1} TFLOP/s", rate / 1e12),
        rate => format!("{:>5.0} GFLOP/s", rate / 1e9),
    };
    let mfu = metrics.mfu.map_or("n/a".to_owned(), |mfu| format!("{:.1}%", 100.0 * mfu));
    let memory = metrics.peak_memory_bytes.unwrap_or(0) >> 20;
    let skipped =
        metrics.tiles_skipped.map_or(String::new(), |share| format!("  {:.1}% of tiles skipped", 100.0 * share));
    format!(
        "step {:>6}  loss {:.4}  norm {:.3}  lr {:.2e}  {:>7.0} tok/s{each}  {time}  {rate}  MFU {mfu}  {memory} MiB{skipped}",
        metrics.step, metrics.loss, metrics.grad_norm, metrics.learning_rate, metrics.tokens_per_second,
    )
}

/// Prints to standard error; lines do not tear the bar.
#[derive(Debug)]
pub struct Console {
    bar: Option<ProgressBar>,
}

impl Console {
    /// A bar over so many steps; hidden if standard error is not a terminal.
    pub fn new(steps: u64) -> Self {
        let bar = if std::io::stderr().is_terminal() { ProgressBar::new(steps) } else { ProgressBar::hidden() };
        let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} {elapsed} left {eta} {msg}");
        bar.set_style(style.expect("a valid template"));
        Self { bar: Some(bar) }
    }

    /// Of a rank that has nothing to say: the first one speaks for all.
    pub fn silent() -> Self {
        Self { bar: None }
    }

    /// A line of its own.
    pub fn line(&self, text: &str) {
        let Some(bar) = &self.bar else { return };
        bar.suspend(|| {
            // A closed standard error must not end a run.
            let _ = writeln!(std::io::stderr(), "{text}");
        });
    }

    /// Moves the bar; with `print`, also a log line.
    pub fn step(&self, metrics: &TrainMetrics, flops_per_second: f64, print: bool) {
        if let Some(bar) = &self.bar {
            bar.set_position(metrics.step);
            bar.set_message(format!("loss {:.3}", metrics.loss));
        }
        if print {
            self.line(&step_line(metrics, flops_per_second));
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
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_line_has_all_of_a_steps_figures() {
        let mut metrics = TrainMetrics {
            step: 12,
            loss: 3.25,
            grad_norm: 0.5,
            learning_rate: 1e-3,
            tokens_per_second: 2345.6,
            milliseconds: 200.4,
            device_milliseconds: None,
            host_milliseconds: None,
            exposed_milliseconds: None,
            ranks: None,
            tokens_seen: 0,
            mfu: None,
            peak_memory_bytes: Some(5 << 20),
            tiles_skipped: None,
        };
        let line = step_line(&metrics, 4e10);
        assert_eq!(
            line,
            "step     12  loss 3.2500  norm 0.500  lr 1.00e-3     2346 tok/s     200 ms     40 GFLOP/s  MFU n/a  5 MiB"
        );
        (metrics.mfu, metrics.device_milliseconds, metrics.host_milliseconds) = (Some(0.4567), Some(198.0), Some(31.2));
        let line = step_line(&metrics, 4.5e14);
        assert!(line.contains("200.4 ms (host 31.2)  450.0 TFLOP/s  MFU 45.7%"), "{line}");
        (metrics.exposed_milliseconds, metrics.ranks) = (Some(1.26), Some(2));
        let line = step_line(&metrics, 4.5e14);
        assert!(line.contains("2346 tok/s (1173 on each of 2)"), "{line}");
        assert!(line.contains("200.4 ms (host 31.2, exposed communication 1.3)"), "{line}");
        metrics.tiles_skipped = Some(0.4312);
        assert!(step_line(&metrics, 4.5e14).ends_with("  5 MiB  43.1% of tiles skipped"));
    }
}
