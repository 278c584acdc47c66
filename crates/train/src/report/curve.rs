//! The length-extrapolation curves of several runs in one standalone chart.

use super::chart::{ChartLabels, Scale, Series, line_chart_svg};
use crate::checkpoint::write_atomically;
use crate::metrics::{LengthMetrics, METRICS_NAME, Record, read_records};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// Writes the last length-extrapolation curve of each run into one SVG file, which follows light and dark.
///
/// # Errors
/// If a run has no such curve (the message says how to make it), or a file cannot be read or written.
pub fn write_length_curves(runs: &[PathBuf], path: &Path) -> Result<()> {
    let curves = runs.iter().map(|run| last_curve(run)).collect::<Result<Vec<_>>>()?;
    let series: Vec<Series> = std::iter::zip(runs, &curves)
        .map(|(run, curve)| Series {
            name: run.file_name().map_or("run".into(), |name| name.to_string_lossy().into_owned()),
            points: curve.lengths.iter().zip(&curve.loss).map(|(&length, &loss)| (length as f64, loss)).collect(),
            dots: true,
            ..Series::default()
        })
        .collect();
    let mut trained: Vec<usize> = curves.iter().map(|curve| curve.trained_length).collect();
    trained.dedup();
    let labels = ChartLabels {
        title: "Loss by context length".into(),
        x: "context length, tokens".into(),
        y: "nats per token".into(),
        x_scale: Scale::Log2,
        marks: trained.into_iter().map(|length| (length as f64, "trained length".into())).collect(),
        ..ChartLabels::default()
    };
    write_atomically(path, line_chart_svg(&series, &labels).as_bytes())
        .with_context(|| format!("cannot write {}", path.display()))
}

fn last_curve(run: &Path) -> Result<LengthMetrics> {
    let records = read_records(&run.join(METRICS_NAME))?;
    let last = records.into_iter().rev().find_map(|record| match record {
        Record::Length(metrics) => Some(metrics),
        _ => None,
    });
    last.with_context(|| {
        format!(
            "{0} has no length curve; `eval {0} --data DATA --lengths 512,1024,2048 --record` adds one",
            run.display()
        )
    })
}
