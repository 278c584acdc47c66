//! The report of a run: one HTML page that needs no network, no fonts and, for reading, no script.
//!
//! It is made from `metrics.jsonl` and `config.toml` in the run's folder and nothing else, so it can be made at any
//! time, also of a run that is still going. A section without data says which command makes it.
//!
//! The plots are SVG by a small writer of ours ([`line_chart_svg`]) instead of a plotting crate: their colours must be
//! CSS variables, so that the page can be read in light and in dark, and a crate's backends write fixed ones.

mod chart;
mod curve;
mod heat;
mod page;
mod ticks;
mod timeline;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context;

pub use chart::{ChartLabels, Scale, Series, line_chart_svg};
pub use curve::write_length_curves;
pub use timeline::write_time_line;

use crate::checkpoint::write_atomically;
use crate::metrics::{METRICS_NAME, read_records};

/// Name of the page in a run's folder.
pub const REPORT_NAME: &str = "report.html";
/// Name of the resolved configuration in a run's folder.
pub const CONFIG_NAME: &str = "config.toml";

/// Writes `report.html` into the run's folder, replacing an older one; returns its path.
///
/// # Errors
/// If the folder does not exist, `metrics.jsonl` has a damaged line (named with its number), or the page cannot be
/// written.
pub fn write_report(run_folder: &Path) -> anyhow::Result<PathBuf> {
    let full =
        run_folder.canonicalize().with_context(|| format!("cannot open the run folder {}", run_folder.display()))?;
    let records = read_records(&run_folder.join(METRICS_NAME))?;
    let config = match fs::read(run_folder.join(CONFIG_NAME)) {
        Ok(bytes) => Some(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error).context(format!("cannot read {}", run_folder.join(CONFIG_NAME).display())),
    };
    let name = full.file_name().map_or("run".into(), |name| name.to_string_lossy().into_owned());
    let path = run_folder.join(REPORT_NAME);
    let html = page::render(&name, &records, config.as_deref());
    write_atomically(&path, html.as_bytes()).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// Text as HTML or SVG shows it: nothing in it is markup. Control characters, which XML forbids, become `U+FFFD`.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\n' | '\t' => escaped.push(character),
            control if control.is_control() => escaped.push('\u{fffd}'),
            plain => escaped.push(plain),
        }
    }
    escaped
}
