//! The time line of one training step on a device, as `train --profile` has measured it.

use super::chart::{STYLE, Scale, VARIABLES};
use super::escape;
use super::ticks::Axis;
use crate::checkpoint::write_atomically;
use crate::profile::{COMMUNICATING_NAME, COMPUTING_NAME, STEP, TRACE_NAME};
use anyhow::{Context, Result};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::ops::Range;
use std::path::Path;

/// Writes one recorded step of a run, that of median duration, into an SVG file: what the device computed, and the
/// collectives beside it; the whole step, and what is around its update enlarged.
///
/// # Errors
/// If the run has no trace (the message says how to make it) or none of a device, or a file cannot be read or written.
pub fn write_time_line(run: &Path, path: &Path) -> Result<()> {
    let trace = run.join(TRACE_NAME);
    let text = std::fs::read(&trace)
        .with_context(|| format!("cannot read {}; `train --profile` makes it", trace.display()))?;
    let trace = Trace::read(&text).with_context(|| format!("cannot use {}", trace.display()))?;
    write_atomically(path, trace.svg().as_bytes()).with_context(|| format!("cannot write {}", path.display()))
}

/// A Chrome trace, as [`crate::profile`] writes it.
#[derive(Deserialize)]
struct File {
    #[serde(rename = "traceEvents")]
    events: Vec<Event>,
}

#[derive(Deserialize)]
struct Event {
    ph: String,
    name: String,
    tid: u64,
    /// Microseconds.
    #[serde(default)]
    ts: f64,
    #[serde(default)]
    dur: f64,
    #[serde(default)]
    args: BTreeMap<String, String>,
}

/// A named stretch of time, in milliseconds.
struct Span {
    name: String,
    time: Range<f64>,
}

/// What a device did, in order.
struct Trace {
    phases: Vec<Span>,
    collectives: Vec<Span>,
    /// The step that is shown.
    step: Range<f64>,
    /// Its number among the recorded ones, from 1, and theirs.
    number: [usize; 2],
}

/// The phases that are drawn, with the number of their colour. `reduce` is what remains to be summed after backward.
const PHASES: [(&str, usize); 4] = [("forward", 0), ("backward", 2), ("reduce", 3), ("optimizer", 4)];
/// Collectives by the start of their name, their name in the legend, and the colour.
const COLLECTIVES: [(&str, &str, usize); 2] =
    [("reduce_scatter", "reduce-scatter", 1), ("all_gather", "all-gather", 5)];

/// The picture, in the units of its text.
const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 372.0;
/// Where rows begin and end.
const LEFT: f64 = 108.0;
const RIGHT: f64 = WIDTH - 18.0;
/// The first row of the whole step, and of the enlarged part.
const WHOLE_TOP: f64 = 58.0;
const PART_TOP: f64 = 216.0;
const ROW: f64 = 36.0;
/// Milliseconds that are shown before and behind the time from backward's end to that of the update.
const AROUND_UPDATE: [f64; 2] = [2.0, 3.0];

impl Trace {
    fn read(text: &[u8]) -> Result<Self> {
        let File { events } = serde_json::from_slice(text)?;
        let of_thread = |name: &str| {
            let is_it = |event: &&Event| event.ph == "M" && event.args.get("name").is_some_and(|of| of == name);
            let thread = events.iter().find(is_it).map(|event| event.tid);
            let spans = events.iter().filter(|event| event.ph == "X" && Some(event.tid) == thread);
            let mut spans: Vec<Span> = spans
                .map(|event| {
                    let start = event.ts / 1e3;
                    Span { name: event.name.clone(), time: start..start + event.dur / 1e3 }
                })
                .collect();
            spans.sort_by(|a, b| a.time.start.total_cmp(&b.time.start));
            spans
        };
        let (phases, collectives) = (of_thread(COMPUTING_NAME), of_thread(COMMUNICATING_NAME));
        let steps: Vec<_> = phases.iter().filter(|span| span.name == STEP).map(|span| span.time.clone()).collect();
        // Of the last one nobody has recorded what follows.
        let mut order: Vec<usize> = (0..steps.len().saturating_sub(1)).collect();
        order.sort_by(|&a, &b| (steps[a].end - steps[a].start).total_cmp(&(steps[b].end - steps[b].start)));
        let median = *order.get(order.len() / 2).context("it has no two steps of a device that followed each other")?;
        Ok(Self { phases, collectives, step: steps[median].clone(), number: [median + 1, steps.len()] })
    }

    /// The time around the update: from the last backward pass's end to the optimizer's, and a little more.
    fn around_update(&self) -> Range<f64> {
        let inside = |span: &&Span| self.step.contains(&span.time.start);
        let end = |name: &str| self.phases.iter().filter(inside).rev().find(|s| s.name == name).map(|s| s.time.end);
        let from = end("backward").unwrap_or(self.step.end);
        from - AROUND_UPDATE[0]..end("optimizer").unwrap_or(self.step.end) + AROUND_UPDATE[1]
    }

    fn svg(&self) -> String {
        let [number, of] = self.number;
        let title = format!(
            "One step of {:.1} ms on one GPU, measured (number {number} of {of} recorded)",
            self.step.end - self.step.start
        );
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"chart\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
             aria-label=\"{0}\"><style>{VARIABLES}{STYLE}</style><rect class=\"paper\" width=\"100%\" height=\"100%\"/>\
             <text class=\"title\" x=\"18\" y=\"22\">{0}</text>",
            escape(&title)
        );
        let part = self.around_update();
        // The next step's beginning is shown too: weights still arrive there.
        let whole = self.step.start..self.step.end.max(part.end);
        self.panel(&mut out, "the whole step", whole, WHOLE_TOP);
        self.panel(&mut out, "around the update, enlarged", part, PART_TOP);
        let mut x = LEFT;
        let names = PHASES.map(|(name, colour)| (name, colour)).into_iter();
        for (name, colour) in names.chain(COLLECTIVES.map(|(_, name, colour)| (name, colour))) {
            let y = HEIGHT - 20.0;
            let _ = write!(
                out,
                "<rect class=\"bar c{colour}\" x=\"{x:.1}\" y=\"{}\" width=\"12\" height=\"12\"/>",
                y - 10.0
            );
            let _ = write!(out, "<text class=\"tick\" x=\"{:.1}\" y=\"{y}\">{name}</text>", x + 17.0);
            x += name.len() as f64 * 6.6 + 34.0;
        }
        out + "</svg>"
    }

    /// Two rows over an axis of milliseconds since the step's start.
    fn panel(&self, out: &mut String, title: &str, shown: Range<f64>, top: f64) {
        let origin = self.step.start;
        let axis = Axis::of(Scale::Linear, [shown.start - origin, shown.end - origin].into_iter(), 0.0);
        let at = |time: f64| axis.place(time - origin).map(|share| LEFT + share.clamp(0.0, 1.0) * (RIGHT - LEFT));
        let _ = write!(out, "<text class=\"label\" x=\"{LEFT}\" y=\"{}\">{title}, ms</text>", top - 10.0);
        let mut bar = |row: usize, colour: usize, Span { name, time }: &Span| {
            let seen = time.end > shown.start && time.start < shown.end;
            let Some((from, to)) = at(time.start).zip(at(time.end)).filter(|_| seen) else { return };
            let (y, width) = (top + row as f64 * ROW, (to - from).max(0.6));
            let _ = write!(
                out,
                "<rect class=\"bar c{colour}\" x=\"{from:.1}\" y=\"{y}\" width=\"{width:.1}\" height=\"{}\"><title>{}: \
                 {:.2} ms</title></rect>",
                ROW - 8.0,
                escape(name),
                time.end - time.start
            );
        };
        for span in &self.phases {
            if let Some((_, colour)) = PHASES.iter().find(|(name, _)| *name == span.name) {
                bar(0, *colour, span);
            }
        }
        for span in &self.collectives {
            if let Some((_, _, colour)) = COLLECTIVES.iter().find(|(start, _, _)| span.name.starts_with(start)) {
                bar(1, *colour, span);
            }
        }
        for (row, name) in ["computing", "communicating"].into_iter().enumerate() {
            let y = top + row as f64 * ROW + 18.0;
            let _ = write!(out, "<text class=\"tick end\" x=\"{}\" y=\"{y}\">{name}</text>", LEFT - 9.0);
        }
        let bottom = top + 2.0 * ROW + 2.0;
        let _ = write!(out, "<path class=\"axis\" d=\"M{LEFT} {bottom}H{RIGHT}\"/>");
        for (value, label) in axis.ticks(9) {
            let Some(x) = at(origin + value) else { continue };
            let _ = write!(out, "<path class=\"axis\" d=\"M{x:.1} {bottom}v5\"/>");
            let _ = write!(out, "<text class=\"tick mid\" x=\"{x:.1}\" y=\"{}\">{label}</text>", bottom + 19.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Three steps of 10, 14 and 11 ms, the first two followed by another.
    fn trace() -> Vec<u8> {
        let thread = |id: u64, name: &str| json!({"ph": "M", "name": "thread_name", "pid": 1, "tid": id, "args": {"name": name}});
        let event = |name: &str, tid: u64, ts: f64, dur: f64| json!({"ph": "X", "name": name, "pid": 1, "tid": tid, "ts": 1e3 * ts, "dur": 1e3 * dur});
        let mut events = vec![thread(7, COMPUTING_NAME), thread(8, COMMUNICATING_NAME)];
        for (start, duration) in [(0.0, 10.0), (20.0, 14.0), (40.0, 11.0)] {
            events.push(event(STEP, 7, start, duration));
            events.push(event("forward", 7, start, 3.0));
            events.push(event("backward", 7, start + 3.0, 5.0));
            events.push(event("reduce_scatter \"gradients <1>\"", 8, start + 6.0, 1.0));
            events.push(event("optimizer", 7, start + 8.0, 1.0));
            events.push(event("all_gather \"weights\"", 8, start + 8.5, 1.0));
        }
        serde_json::to_vec(&json!({"traceEvents": events})).unwrap()
    }

    #[test]
    fn the_step_of_median_duration_that_another_follows_is_drawn_with_all_beside_it() {
        let trace = Trace::read(&trace()).unwrap();
        assert_eq!((trace.step.clone(), trace.number), (20.0..34.0, [2, 3]));
        assert_eq!(trace.around_update(), 26.0..32.0);
        let svg = trace.svg();
        assert!(svg.contains("One step of 14.0 ms") && !svg.contains("gradients <1>"), "{svg}");
        // Both panels show this step's backward and collectives, and only the first its forward.
        let count = |text: &str| svg.matches(text).count();
        assert_eq!([count("forward: 3.00 ms"), count("backward: 5.00 ms")], [1, 2]);
        assert_eq!([count("reduce_scatter"), count("all_gather")], [2, 2]);
        // 3 of 14 ms.
        let width = (RIGHT - LEFT) * 3.0 / 14.0;
        assert!(svg.contains(&format!("x=\"{LEFT:.1}\" y=\"{WHOLE_TOP}\" width=\"{width:.1}\"")), "{svg}");
    }

    #[test]
    fn a_trace_without_a_device_is_refused() {
        let error = |text: &[u8]| format!("{:#}", Trace::read(text).err().unwrap());
        assert!(error(b"{\"traceEvents\": []}").contains("no two steps of a device"));
        assert!(error(b"{}").contains("traceEvents"));
        let folder = tempfile::tempdir().unwrap();
        let error = write_time_line(folder.path(), &folder.path().join("a.svg")).unwrap_err();
        assert!(format!("{error:#}").contains("train --profile"), "{error:#}");
    }
}
