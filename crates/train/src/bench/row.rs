//! A measurement, as a line of the table and as JSON.

use crate::metrics::mean_share;
use serde::Serialize;
use std::fmt::Display;

/// A shape of so many layers at once.
pub(super) fn of_layers(shape: impl Display, layers: usize) -> String {
    if layers == 1 { shape.to_string() } else { format!("{layers} x ({shape})") }
}

/// Query heads, and behind a stroke key heads if there are fewer.
pub(super) fn heads(query: usize, key: usize) -> String {
    if key == query { query.to_string() } else { format!("{query}/{key}") }
}

/// One measurement.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Row {
    pub(super) part: &'static str,
    pub(super) name: String,
    pub(super) shape: String,
    /// Median over the repetitions.
    pub(super) milliseconds: f64,
    /// Fastest repetition.
    pub(super) fastest_milliseconds: f64,
    /// Rate of useful arithmetic; attention is counted causal-half, its backward as 2.5 forwards, whatever is skipped.
    pub(super) gflops_per_second: f64,
    /// Where it means something.
    pub(super) tokens_per_second: Option<f64>,
    /// Of training steps on a text: mean cross-entropy in nats per token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) loss: Option<f64>,
    /// Of a training step on a GPU.
    #[serde(flatten)]
    pub(super) step: Option<StepFigures>,
    /// Of attention.
    #[serde(flatten)]
    pub(super) attention: Option<AttentionFigures>,
    /// Of decoding.
    #[serde(flatten)]
    pub(super) cache: Option<CacheFigures>,
}

/// What a training step on a GPU shows beside its time.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct StepFigures {
    pub(super) mfu: Option<f64>,
    pub(super) host_milliseconds: f64,
    pub(super) device_milliseconds: f64,
    pub(super) peak_memory_bytes: u64,
}

/// What attention shows beside its time.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct AttentionFigures {
    /// Layers that the time is the sum of.
    pub(super) layers: usize,
    /// Share of the causal tiles that early exit left out, 0 to 1, mean over layers and heads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) tiles_skipped: Option<f64>,
    /// The same for each layer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) tiles_skipped_by_layer: Vec<f64>,
    /// How far results with early exit are from those without, relative, in the Frobenius norm: o; or dq, dk and dv. The
    /// largest of all layers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) apart_from_dense: Vec<f64>,
}

impl AttentionFigures {
    /// With what early exit left out, by layer and head.
    pub(super) fn with_skipped(self, shares: &[Vec<f64>]) -> Self {
        let of_layer = |heads| mean_share(std::slice::from_ref(heads));
        Self {
            tiles_skipped: Some(mean_share(shares)),
            tiles_skipped_by_layer: shares.iter().map(of_layer).collect(),
            ..self
        }
    }
}

/// What decoding shows beside its time.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct CacheFigures {
    /// Bytes of keys and values that there are for the queries to see.
    pub(super) cache_bytes: u64,
    /// Whether all of them are read: not with early exit.
    pub(super) cache_is_read_whole: bool,
    /// Those bytes by the time, in 1e9 a second.
    pub(super) cache_gigabytes_per_second: f64,
    /// That by the device's own rate of copying, read and written bytes together.
    pub(super) share_of_copy_rate: f64,
}

impl Row {
    /// From the median and the shortest of the times, in seconds.
    pub(super) fn new(
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
            loss: None,
            step: None,
            attention: None,
            cache: None,
        }
    }

    /// The columns' names.
    pub(super) fn header(gpu: bool) -> String {
        let rate = if gpu { "TFLOP/s" } else { "GFLOP/s" };
        format!("{:<10} {:<52} {:<28} {:>9} {:>9} {rate:>9} {:>9}", "part", "what", "shape", "ms", "best ms", "tok/s")
    }

    /// A line of the table.
    pub(super) fn line(&self, gpu: bool) -> String {
        let tokens = self.tokens_per_second.map_or(String::new(), |rate| format!("{rate:.0}"));
        let rate = if gpu { self.gflops_per_second / 1e3 } else { self.gflops_per_second };
        let Self { part, name, shape, milliseconds, fastest_milliseconds, .. } = self;
        let mut line = format!(
            "{part:<10} {name:<52} {shape:<28} {milliseconds:>9.3} {fastest_milliseconds:>9.3} {rate:>9.1} {tokens:>9}"
        );
        if let Some(loss) = self.loss {
            line += &format!("  loss {loss:.4}");
        }
        if let Some(step) = self.step {
            let mfu = step.mfu.map_or("n/a".to_owned(), |mfu| format!("{:.1}%", 100.0 * mfu));
            line += &format!(
                "  MFU {mfu}, host {:.1} ms, device {:.1} ms, peak {:.1} GiB",
                step.host_milliseconds,
                step.device_milliseconds,
                step.peak_memory_bytes as f64 / (1u64 << 30) as f64
            );
        }
        if let Some(attention) = &self.attention {
            if let Some(share) = attention.tiles_skipped {
                line += &format!("  {:.1}% of tiles skipped", 100.0 * share);
            }
            if !attention.apart_from_dense.is_empty() {
                let apart: Vec<String> = attention.apart_from_dense.iter().map(|x| format!("{x:.1e}")).collect();
                line += &format!(", {} from dense", apart.join(" "));
            }
        }
        if let Some(cache) = self.cache {
            let (rate, share) = (cache.cache_gigabytes_per_second, 100.0 * cache.share_of_copy_rate);
            line += &if cache.cache_is_read_whole {
                format!("  {rate:.0} GB/s, {share:.0}% of the copy rate")
            } else {
                format!("  as if {rate:.0} GB/s")
            };
        }
        line.truncate(line.trim_end().len());
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_all_of_its_figures() {
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
        row.attention = Some(AttentionFigures {
            layers: 2,
            tiles_skipped: Some(0.413),
            tiles_skipped_by_layer: vec![0.4, 0.426],
            apart_from_dense: vec![2e-4, 3e-5],
        });
        assert!(
            row.line(true).ends_with("GiB  41.3% of tiles skipped, 2.0e-4 3.0e-5 from dense"),
            "{}",
            row.line(true)
        );
        let mut cache = CacheFigures {
            cache_bytes: 5_000_000,
            cache_is_read_whole: true,
            cache_gigabytes_per_second: 2812.4,
            share_of_copy_rate: 0.937,
        };
        let decode = |cache| Row { step: None, attention: None, cache: Some(cache), ..row.clone() }.line(true);
        assert!(decode(cache).ends_with("131072  2812 GB/s, 94% of the copy rate"), "{}", decode(cache));
        cache.cache_is_read_whole = false;
        assert!(decode(cache).ends_with("131072  as if 2812 GB/s"), "{}", decode(cache));
        let with_loss = Row { step: None, attention: None, loss: Some(3.84217), ..row.clone() };
        assert!(with_loss.line(true).ends_with("131072  loss 3.8422"), "{}", with_loss.line(true));
        let json = serde_json::to_value(&row).unwrap();
        assert_eq!((&json["device_milliseconds"], &json["tiles_skipped_by_layer"][1]), (&249.0.into(), &0.426.into()));
        assert!(json.get("cache_bytes").is_none());
    }
}
