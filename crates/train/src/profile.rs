//! Where the time of a step goes: `train --profile`, and names for external profilers.
//!
//! The loop marks its phases with [`range`]. With `--profile` some steps are recorded, in two kinds, because a phase's
//! device time can only be known by waiting for it:
//!
//! * *host* steps run as always; their spans say how long the host took to ask for the work (and, in `wait`, to wait). Events
//!   on the device's queues say when it did that work, and when each collective ran beside it: the step's time line;
//! * *device* steps wait after every phase, which gives each its time on the device.
//!
//! Nothing of it changes a bit of the result.

use crate::nvtx;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;
use stickbreak_kernels::cuda::{Queue, Span as DeviceSpan, Timer};
use stickbreak_tensor::Device;

/// Name of the trace in a run's folder. Open it with <https://ui.perfetto.dev> or `chrome://tracing`.
pub const TRACE_NAME: &str = "profile.json";

/// Steps before the first recorded one: what is compiled or allocated once is over by then.
const WARM_UP_STEPS: u64 = 3;
/// Recorded steps of each kind.
const RECORDED_STEPS: u64 = 5;

static RECORDING: AtomicBool = AtomicBool::new(false);
static RECORDER: Mutex<Option<Recorder>> = Mutex::new(None);

fn with_recorder<T>(act: impl FnOnce(&mut Recorder) -> T) -> Option<T> {
    RECORDER.lock().unwrap_or_else(PoisonError::into_inner).as_mut().map(act)
}

/// A phase, from here until the guard is dropped.
pub fn range(name: &'static str) -> Range {
    nvtx::push(name);
    if !RECORDING.load(Ordering::Relaxed) {
        return Range { name, start: None, timer: None };
    }
    let timer = with_recorder(|recorder| recorder.queue.as_ref().and_then(|queue| queue.timer().ok())).flatten();
    Range { name, start: Some(Instant::now()), timer }
}

/// A collective on a queue of its own, from here on, if its place on the time line is wanted.
pub(crate) fn collective(queue: &Queue) -> Option<Timer> {
    let wanted = RECORDING.load(Ordering::Relaxed) && with_recorder(|recorder| recorder.kind) == Some(Kind::Host);
    wanted.then(|| queue.timer().ok()).flatten()
}

/// The end of a [`collective`] that was begun.
pub(crate) fn end_collective(name: &str, timer: Option<Timer>) {
    if let Some(Ok(span)) = timer.map(Timer::stop) {
        with_recorder(|recorder| recorder.asked.push(Asked { name: name.to_owned(), thread: COMMUNICATING, span }));
    }
}

/// See [`range`].
#[must_use = "a range ends when it is dropped"]
#[derive(Debug)]
pub struct Range {
    name: &'static str,
    start: Option<Instant>,
    timer: Option<Timer>,
}

impl Drop for Range {
    fn drop(&mut self) {
        nvtx::pop();
        let Some(start) = self.start else { return };
        let timer = self.timer.take();
        with_recorder(|recorder| {
            // A failed measurement is a missing figure; the step itself will say what failed.
            let device_ms = match recorder.kind {
                Kind::Host => {
                    recorder.ask(self.name, timer);
                    None
                }
                Kind::Device => timer.and_then(|timer| timer.milliseconds().ok()),
            };
            recorder.add(self.name, start, Instant::now(), device_ms);
        });
    }
}

/// What a recorded step does beside its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Host,
    Device,
}

/// One finished phase.
#[derive(Debug, Clone)]
struct Span {
    name: &'static str,
    kind: Kind,
    /// Since the recorder was made.
    start_us: f64,
    host_us: f64,
    device_ms: Option<f64>,
}

/// A stretch of a queue's time that nobody has waited for.
#[derive(Debug)]
struct Asked {
    name: String,
    /// Of the trace.
    thread: u64,
    span: DeviceSpan,
}

/// Threads of the trace.
const HOST: u64 = 1;
const HOST_WAITING: u64 = 2;
const DEVICE_ALONE: u64 = 3;
const COMPUTING: u64 = 4;
const COMMUNICATING: u64 = 5;
/// What the last two are called.
pub(crate) const COMPUTING_NAME: &str = "device, computing";
pub(crate) const COMMUNICATING_NAME: &str = "device, communicating";

#[derive(Debug)]
struct Recorder {
    origin: Instant,
    queue: Option<Queue>,
    /// Started when `origin` was taken.
    clock: Option<Timer>,
    kind: Kind,
    spans: Vec<Span>,
    asked: Vec<Asked>,
}

impl Recorder {
    fn new(queue: Option<Queue>) -> Self {
        Self { origin: Instant::now(), queue, clock: None, kind: Kind::Host, spans: Vec::new(), asked: Vec::new() }
    }

    /// Starts the clocks of host and device together, which are alike to some 20 us: the device is idle.
    fn start_clocks(&mut self) {
        self.clock = self.queue.as_ref().and_then(|queue| {
            let clock = queue.timer().ok()?;
            queue.synchronize().ok().map(|()| clock)
        });
        self.origin = Instant::now();
    }

    /// Ends a phase on the device's time line.
    fn ask(&mut self, name: &str, timer: Option<Timer>) {
        if let Some(Ok(span)) = timer.map(Timer::stop) {
            self.asked.push(Asked { name: name.to_owned(), thread: COMPUTING, span });
        }
    }

    fn add(&mut self, name: &'static str, start: Instant, end: Instant, device_ms: Option<f64>) {
        let us = |from: Instant, to: Instant| 1e6 * to.saturating_duration_since(from).as_secs_f64();
        let (start_us, host_us) = (us(self.origin, start), us(start, end));
        self.spans.push(Span { name, kind: self.kind, start_us, host_us, device_ms });
    }

    /// Names in the order in which they ended first.
    fn names(&self) -> Vec<&'static str> {
        let mut names = Vec::new();
        for span in &self.spans {
            if !names.contains(&span.name) {
                names.push(span.name);
            }
        }
        names
    }

    /// Milliseconds of a phase per recorded step: of the host in host steps, of the device in device steps.
    fn per_step(&self, name: &str, kind: Kind) -> Option<f64> {
        let of =
            |wanted: &str| self.spans.iter().filter(move |s| s.kind == kind && s.name == wanted).collect::<Vec<_>>();
        let (spans, steps) = (of(name), of(STEP).len());
        let milliseconds = |span: &&Span| match kind {
            Kind::Host => Some(span.host_us / 1e3),
            Kind::Device => span.device_ms,
        };
        let total: f64 = spans.iter().map(milliseconds).sum::<Option<f64>>()?;
        (steps > 0 && !spans.is_empty()).then(|| total / steps as f64)
    }

    /// One line a phase.
    fn table(&self) -> String {
        let mut text = format!("{:<12} {:>12} {:>12} {:>8}\n", "phase", "host ms", "device ms", "share");
        let on_device = self.per_step(STEP, Kind::Device).is_some();
        let whole = self.per_step(STEP, if on_device { Kind::Device } else { Kind::Host });
        for name in self.names() {
            let (host, device) = (self.per_step(name, Kind::Host), self.per_step(name, Kind::Device));
            let figure = |ms: Option<f64>| ms.map_or("-".to_owned(), |ms| format!("{ms:.3}"));
            let share = if on_device { device } else { host }.zip(whole).map(|(part, whole)| 100.0 * part / whole);
            let share = share.map_or("-".to_owned(), |share| format!("{share:.1}%"));
            let _ = writeln!(text, "{name:<12} {:>12} {:>12} {share:>8}", figure(host), figure(device));
        }
        text
    }

    /// What the device did in host steps, with start and end in milliseconds since the origin.
    fn time_line(&self) -> impl Iterator<Item = (&Asked, [f64; 2])> {
        let place = |asked: &Asked| self.clock.as_ref().and_then(|clock| asked.span.since(clock).ok());
        self.asked.iter().filter_map(move |asked| Some((asked, place(asked)?)))
    }

    /// The Chrome trace format: microseconds, complete events.
    fn trace(&self) -> Value {
        let thread = |id: u64, name: &str| json!({"ph": "M", "name": "thread_name", "pid": 1, "tid": id, "args": {"name": name}});
        let event = |name: &str, thread: u64, start: f64, duration: f64| json!({"ph": "X", "name": name, "pid": 1, "tid": thread, "ts": start, "dur": duration});
        let mut events = vec![
            thread(HOST, "host"),
            thread(HOST_WAITING, "host, waiting after each phase"),
            thread(DEVICE_ALONE, "device, waited for after each phase"),
            thread(COMPUTING, COMPUTING_NAME),
            thread(COMMUNICATING, COMMUNICATING_NAME),
        ];
        for span in &self.spans {
            let host = if span.kind == Kind::Host { HOST } else { HOST_WAITING };
            events.push(event(span.name, host, span.start_us, span.host_us));
            // The device is idle when a phase of a device step begins, so both begin together.
            events.extend(span.device_ms.map(|ms| event(span.name, DEVICE_ALONE, span.start_us, 1e3 * ms)));
        }
        for (asked, [start, end]) in self.time_line() {
            events.push(event(&asked.name, asked.thread, 1e3 * start, 1e3 * (end - start)));
        }
        json!({"displayTimeUnit": "ms", "traceEvents": events})
    }
}

/// The phase that is a whole step.
pub(crate) const STEP: &str = "step";

/// The recording of one run.
#[derive(Debug)]
pub(crate) struct Profiler {
    path: PathBuf,
    steps: u64,
    last: u64,
    /// First step that waits after each phase.
    device_from: u64,
    done: bool,
}

impl Profiler {
    /// Records some of the next steps into a run's folder. One run of a process at a time.
    ///
    /// # Errors
    /// If the device cannot be used.
    pub(crate) fn start(folder: &Path, device: Device) -> Result<Self> {
        let queue = crate::device::queue(device)?;
        let device_from = WARM_UP_STEPS + RECORDED_STEPS;
        let last = device_from + if queue.is_some() { RECORDED_STEPS } else { 0 };
        *RECORDER.lock().unwrap_or_else(PoisonError::into_inner) = Some(Recorder::new(queue));
        Ok(Self { path: folder.join(TRACE_NAME), steps: 0, last, device_from, done: false })
    }

    /// Before each step.
    pub(crate) fn begin_step(&mut self) {
        self.steps += 1;
        let recorded = !self.done && self.steps > WARM_UP_STEPS;
        if recorded {
            let kind = if self.steps > self.device_from { Kind::Device } else { Kind::Host };
            let is_first = self.steps == WARM_UP_STEPS + 1;
            with_recorder(|recorder| {
                recorder.kind = kind;
                if is_first {
                    recorder.start_clocks();
                }
            });
        }
        RECORDING.store(recorded, Ordering::Relaxed);
    }

    /// After each step; once all are recorded, writes the trace and returns the table.
    ///
    /// # Errors
    /// If the trace cannot be written.
    pub(crate) fn end_step(&mut self) -> Result<Option<String>> {
        RECORDING.store(false, Ordering::Relaxed);
        if self.steps < self.last { Ok(None) } else { self.finish() }
    }

    /// Writes what is recorded, unless that was done.
    ///
    /// # Errors
    /// If the trace cannot be written.
    pub(crate) fn finish(&mut self) -> Result<Option<String>> {
        if std::mem::replace(&mut self.done, true) {
            return Ok(None);
        }
        let recorder = RECORDER.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(recorder) = recorder.filter(|recorder| !recorder.spans.is_empty()) else {
            return Ok(Some(format!("profile: a run of {WARM_UP_STEPS} steps or less is not recorded")));
        };
        let text = serde_json::to_vec(&recorder.trace())?;
        std::fs::write(&self.path, text).with_context(|| format!("cannot write {}", self.path.display()))?;
        Ok(Some(format!("where a step's time goes (trace: {}):\n{}", self.path.display(), recorder.table())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_trace_has_every_span_and_a_table_the_time_per_step() {
        let mut recorder = Recorder::new(None);
        let start = recorder.origin;
        let at = |ms: u64| start + Duration::from_millis(ms);
        for step in 0..2 {
            let t = 100 * step;
            recorder.add("forward", at(t), at(t + 10), None);
            recorder.add("forward", at(t + 10), at(t + 20), None);
            recorder.add("step", at(t), at(t + 50), None);
        }
        recorder.kind = Kind::Device;
        recorder.add("forward", at(300), at(340), Some(30.0));
        recorder.add("step", at(300), at(350), Some(40.0));

        assert_eq!(recorder.names(), ["forward", "step"]);
        assert_eq!(recorder.per_step("forward", Kind::Host), Some(20.0));
        assert_eq!(recorder.per_step("forward", Kind::Device), Some(30.0));
        assert_eq!(recorder.per_step("data", Kind::Host), None);
        let table = recorder.table();
        assert!(table.contains("20.000") && table.contains("30.000") && table.contains("75.0%"), "{table}");

        let trace = recorder.trace();
        let events = trace["traceEvents"].as_array().unwrap();
        let of = |thread: u64| events.iter().filter(|e| e["ph"] == "X" && e["tid"] == thread).count();
        assert_eq!([HOST, HOST_WAITING, DEVICE_ALONE, COMPUTING, COMMUNICATING].map(of), [6, 2, 2, 0, 0]);
        let device =
            events.iter().find(|e| e["tid"] == DEVICE_ALONE && e["name"] == "forward" && e["ph"] == "X").unwrap();
        assert_eq!((device["ts"].as_f64(), device["dur"].as_f64()), (Some(300e3), Some(30e3)));
    }
}
