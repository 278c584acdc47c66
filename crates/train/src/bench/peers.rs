//! Other implementations' attention, timed by a Python program (`peers.py`) just before ours, on the same device and at
//! the same shapes. Whatever keeps one from being timed is told and ends nothing.

use super::Settings;
use super::attention::{AttentionShape, BACKWARD, FORWARD, pass_row};
use super::row::Row;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

/// Found on the path, as a virtual environment puts it there.
const PYTHON: &str = "python3";

#[derive(Serialize)]
struct Request<'a> {
    device: String,
    warm_up: usize,
    repeats: usize,
    shapes: &'a [AttentionShape],
}

/// A line that the program writes.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
enum Line {
    Time(PeerTime),
    Failed { name: String, shape: AttentionShape, error: String },
    Unavailable { unavailable: String },
    Note { note: String },
}

/// One pass of one implementation.
#[derive(Debug, Clone, PartialEq, Deserialize)]
struct PeerTime {
    name: String,
    pass: Pass,
    shape: AttentionShape,
    milliseconds: f64,
    fastest_milliseconds: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Pass {
    Forward,
    Backward,
}

/// What was timed; nothing, if nobody asked or nothing can be.
#[derive(Debug, Default)]
pub(super) struct Peers {
    times: Vec<PeerTime>,
    /// What could not be timed, and why; printed as it came.
    notes: Vec<String>,
}

impl Peers {
    pub(super) fn measure_if_wanted(settings: &Settings, shapes: &[AttentionShape]) -> Result<Self> {
        if !settings.peers {
            return Ok(Self::default());
        }
        let request = Request {
            device: settings.device.to_string(),
            warm_up: settings.warm_up,
            repeats: settings.repeats,
            shapes,
        };
        Self::measure(PYTHON, &request)
    }

    fn measure(python: &str, request: &Request<'_>) -> Result<Self> {
        let mut peers = Self::default();
        let mut command = Command::new(python);
        command.args(["-c", include_str!("peers.py")]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => {
                peers.note(format!("none are timed, {python} cannot be started: {error}"));
                return Ok(peers);
            }
        };
        if let Some(mut input) = child.stdin.take() {
            // A program that ends before it reads says why by its exit.
            let _ = input.write_all(&serde_json::to_vec(request)?);
        }
        let output = child.stdout.take().context("the output of python was not piped")?;
        for line in BufReader::new(output).split(b'\n') {
            let line = line.with_context(|| format!("cannot read what {python} writes"))?;
            peers.take(&String::from_utf8_lossy(&line));
        }
        let status = child.wait().with_context(|| format!("cannot wait for {python}"))?;
        if !status.success() {
            peers.note(format!("{python} ended with {status}"));
        }
        Ok(peers)
    }

    fn take(&mut self, line: &str) {
        match serde_json::from_str(line) {
            Ok(Line::Time(time)) => self.times.push(time),
            Ok(Line::Failed { name, shape, error }) => self.note(format!("{name} cannot run {shape}: {error}")),
            Ok(Line::Unavailable { unavailable }) => {
                self.note(format!("none are timed, {PYTHON} cannot use torch: {unavailable}"));
            }
            Ok(Line::Note { note }) => self.note(note),
            // Libraries print what they like.
            Err(_) => self.note(line.to_owned()),
        }
    }

    fn note(&mut self, note: String) {
        println!("peers: {note}");
        self.notes.push(note);
    }

    /// The rows of a shape, as of so many layers of it.
    pub(super) fn rows(&self, shape: AttentionShape, layers: usize) -> Vec<Row> {
        let of_shape = self.times.iter().filter(|time| time.shape == shape);
        of_shape.map(|time| time.row(layers)).collect()
    }

    /// Milliseconds of both passes of so many layers of the first implementation whose name has `part` in it.
    pub(super) fn milliseconds(&self, part: &str, shape: AttentionShape, layers: usize) -> Option<[f64; 2]> {
        let pass = |pass| {
            let time = self.times.iter().find(|t| t.shape == shape && t.pass == pass && t.name.contains(part))?;
            Some(time.milliseconds * layers as f64)
        };
        Some([pass(Pass::Forward)?, pass(Pass::Backward)?])
    }
}

impl PeerTime {
    fn row(&self, layers: usize) -> Row {
        let (pass, forwards) = match self.pass {
            Pass::Forward => ("forward", FORWARD),
            Pass::Backward => ("backward", BACKWARD),
        };
        let count = layers as f64;
        let seconds = (count * self.milliseconds / 1e3, count * self.fastest_milliseconds / 1e3);
        pass_row(&self.name, pass, self.shape, layers, seconds, forwards)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: AttentionShape = AttentionShape { batch: 1, heads: 4, kv_heads: 2, length: 64, head_dim: 16 };

    fn request(shapes: &[AttentionShape]) -> Request<'_> {
        Request { device: "cpu".into(), warm_up: 1, repeats: 3, shapes }
    }

    #[test]
    fn a_time_becomes_a_row_and_nothing_else_ends_the_benchmark() {
        let mut peers = Peers::default();
        let shape = serde_json::to_string(&SHAPE).unwrap();
        for (pass, milliseconds) in [("forward", 2.0), ("backward", 4.0)] {
            peers.take(&format!(
                r#"{{"name": "softmax, X 1", "pass": "{pass}", "shape": {shape}, "milliseconds": {milliseconds}, "fastest_milliseconds": 1.5}}"#
            ));
        }
        peers.take(&format!(r#"{{"name": "other", "shape": {shape}, "error": "RuntimeError: no kernel"}}"#));
        peers.take(r#"{"unavailable": "ModuleNotFoundError: No module named 'torch'"}"#);
        peers.take(r#"{"note": "no reference op"}"#);
        peers.take("UserWarning: something else");
        assert_eq!(
            peers.notes,
            [
                "other cannot run B1 H4/2 L64 D16: RuntimeError: no kernel",
                "none are timed, python3 cannot use torch: ModuleNotFoundError: No module named 'torch'",
                "no reference op",
                "UserWarning: something else",
            ]
        );
        let rows = peers.rows(SHAPE, 3);
        let names: Vec<_> = rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names, ["softmax, X 1, forward", "softmax, X 1, backward"]);
        assert_eq!((rows[0].milliseconds, rows[0].fastest_milliseconds), (6.0, 4.5));
        // 4 H D L^2 / 2 flops in 2 ms, and 2.5 times as many in 4 ms.
        let rate = 4.0 * 64.0 * 64.0 * 64.0 / 2.0 / 2e-3 / 1e9;
        assert!((rows[0].gflops_per_second - rate).abs() < 1e-9);
        assert!((rows[1].gflops_per_second - 1.25 * rate).abs() < 1e-9);
        assert_eq!(peers.milliseconds("X", SHAPE, 2), Some([4.0, 8.0]));
        assert_eq!(peers.milliseconds("cuDNN", SHAPE, 2), None);
        assert!(peers.rows(AttentionShape { length: 65, ..SHAPE }, 1).is_empty());
    }

    #[test]
    fn a_machine_without_python_times_nothing() {
        let peers = Peers::measure("no-such-python", &request(&[SHAPE])).unwrap();
        assert!(peers.times.is_empty() && peers.notes[0].contains("no-such-python cannot be started"));
    }

    /// Runs the program as it is; what it can time depends on the machine.
    #[test]
    fn the_program_times_every_shape_or_says_why_not() {
        let shapes = [SHAPE, AttentionShape { kv_heads: 4, length: 100, ..SHAPE }];
        let peers = Peers::measure(PYTHON, &request(&shapes)).unwrap();
        if let [note] = &peers.notes[..] {
            assert!(note.contains("cannot be started") || note.contains("cannot use torch: Module"), "{note}");
            return;
        }
        for shape in shapes {
            let [forward, backward] = peers.milliseconds("softmax, PyTorch", shape, 1).unwrap();
            assert!(forward > 0.0 && backward > 0.0);
        }
    }
}
