//! Writing `metrics.jsonl` so that no step is there twice and none is missing, whatever interrupted the run.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use thiserror::Error;

use super::record::Record;
use super::tensorboard::EventWriter;
use crate::checkpoint::write_atomically;

/// Name of the file in a run's folder.
pub const METRICS_NAME: &str = "metrics.jsonl";

/// What can be wrong with a metrics file.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MetricsError {
    /// The operating system refused.
    #[error("cannot {action} {}: {cause}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        cause: io::Error,
    },
    /// A line that no interrupted run leaves: not the last, and not a record.
    #[error("{} line {line}: {problem}", path.display())]
    Line {
        /// The metrics file.
        path: PathBuf,
        /// Its damaged line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// A step that is there already.
    #[error("{}: a line of kind {kind} for step {step} after one for step {last}", path.display())]
    Order {
        /// The metrics file.
        path: PathBuf,
        /// Kind of both lines.
        kind: String,
        /// The refused step.
        step: u64,
        /// The step before it in the file.
        last: u64,
    },
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> MetricsError {
    let path = path.to_owned();
    move |cause| MetricsError::Io { action, path, cause }
}

/// What every line has, of whatever kind.
#[derive(Deserialize)]
struct Head {
    kind: String,
    step: u64,
}

/// `metrics.jsonl`, open for appending.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
    last_steps: HashMap<String, u64>,
}

impl MetricsLog {
    /// Opens the file to go on after `step` (0 for a new run): lines of later steps are dropped, and a last line
    /// that was cut short is repaired or dropped, in one atomic rewrite. The file is made if there is none.
    ///
    /// # Errors
    /// [`MetricsError::Line`] for a damaged line before the last: that is not what a crash leaves, and nothing is
    /// changed; [`MetricsError::Io`] with the path.
    pub fn resume(path: impl Into<PathBuf>, step: u64) -> Result<Self, MetricsError> {
        let path = path.into();
        let old = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(io_error("read", &path)(error)),
        };
        let mut kept = Vec::with_capacity(old.len());
        let mut last_steps = HashMap::new();
        for line in parse_lines::<Head>(&path, &old)? {
            let (bytes, Head { kind, step: at }) = line;
            if at <= step {
                kept.extend_from_slice(bytes);
                kept.push(b'\n');
                last_steps.insert(kind, at);
            }
        }
        if kept != old {
            write_atomically(&path, &kept).map_err(io_error("rewrite", &path))?;
        }
        let file =
            OpenOptions::new().create(true).append(true).open(&path).map_err(io_error("open for appending", &path))?;
        Ok(Self { path, file, last_steps })
    }

    /// Appends one line; it is with the operating system when this returns, so a killed process loses nothing.
    ///
    /// # Errors
    /// [`MetricsError::Order`] for a step of kind `train` or `valid` that is not later than the one before;
    /// [`MetricsError::Io`] with the path.
    pub fn append(&mut self, record: &Record) -> Result<(), MetricsError> {
        let (kind, step) = (record.kind(), record.step());
        if let (Record::Train(_) | Record::Valid(_), Some(last)) = (record, self.last_step(kind))
            && step <= last
        {
            return Err(MetricsError::Order { path: self.path.clone(), kind: kind.to_owned(), step, last });
        }
        let mut line = serde_json::to_vec(record).expect("plain structs can always be written as JSON");
        line.push(b'\n');
        self.file.write_all(&line).map_err(io_error("append to", &self.path))?;
        self.last_steps.insert(kind.to_owned(), step);
        Ok(())
    }

    /// The step of the last line of this kind. After a resume it tells whether the evaluation that follows a save was
    /// done before the run ended, or still has to be.
    pub fn last_step(&self, kind: &str) -> Option<u64> {
        self.last_steps.get(kind).copied()
    }

    /// Returns once all lines are on the disk. Call before a checkpoint is saved: the lines up to a checkpoint's step
    /// must not be younger than the checkpoint.
    ///
    /// # Errors
    /// [`MetricsError::Io`] with the path.
    pub fn sync(&self) -> Result<(), MetricsError> {
        self.file.sync_data().map_err(io_error("sync", &self.path))
    }
}

/// All lines of a metrics file, in order; empty if there is no file. A last line cut short is left out, and so are
/// kinds that this version does not know.
///
/// # Errors
/// [`MetricsError::Line`] with the number of a damaged line; [`MetricsError::Io`] with the path.
pub fn read_records(path: &Path) -> Result<Vec<Record>, MetricsError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io_error("read", path)(error)),
    };
    let records = parse_lines(path, &bytes)?.into_iter().map(|(_, record)| record);
    Ok(records.filter(|record| *record != Record::Unknown).collect())
}

/// Lines end at a newline byte and nowhere else. The last one may be damaged, wherever a crash cut it.
fn parse_lines<'a, T: for<'de> Deserialize<'de>>(
    path: &Path,
    bytes: &'a [u8],
) -> Result<Vec<(&'a [u8], T)>, MetricsError> {
    let lines: Vec<&[u8]> = bytes.strip_suffix(b"\n").unwrap_or(bytes).split(|&byte| byte == b'\n').collect();
    let mut parsed = Vec::with_capacity(lines.len());
    for (index, &line) in lines.iter().enumerate() {
        match serde_json::from_slice(line) {
            Ok(value) => parsed.push((line, value)),
            Err(_) if bytes.is_empty() => {}
            Err(error) if index + 1 == lines.len() => {
                let (path, line_number) = (path.display(), index + 1);
                tracing::warn!("{path} line {line_number}: dropped, it was cut short at {} bytes: {error}", line.len());
            }
            Err(error) => {
                return Err(MetricsError::Line { path: path.to_owned(), line: index + 1, problem: error.to_string() });
            }
        }
    }
    Ok(parsed)
}

/// Both files of a run: every record goes to `metrics.jsonl` and, as far as it has numbers or text, to TensorBoard.
#[derive(Debug)]
pub struct RunMetrics {
    log: MetricsLog,
    events: EventWriter,
}

impl RunMetrics {
    /// Opens both in a run's folder, to go on after `step` (0 for a new run).
    ///
    /// # Errors
    /// As [`MetricsLog::resume`]; [`MetricsError::Io`] for the event file.
    pub fn resume(run_folder: &Path, step: u64) -> Result<Self, MetricsError> {
        fs::create_dir_all(run_folder).map_err(io_error("create folder", run_folder))?;
        let log = MetricsLog::resume(run_folder.join(METRICS_NAME), step)?;
        let events = EventWriter::resume(run_folder, step).map_err(io_error("start an event file in", run_folder))?;
        Ok(Self { log, events })
    }

    /// Writes one record to both. Errors as [`MetricsLog::append`].
    pub fn append(&mut self, record: &Record) -> Result<(), MetricsError> {
        self.log.append(record)?;
        self.events.record(record).map_err(io_error("write", self.events.path()))
    }

    /// As [`MetricsLog::last_step`].
    pub fn last_step(&self, kind: &str) -> Option<u64> {
        self.log.last_step(kind)
    }

    /// As [`MetricsLog::sync`].
    pub fn sync(&self) -> Result<(), MetricsError> {
        self.log.sync()
    }
}
