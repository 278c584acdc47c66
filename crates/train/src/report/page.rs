//! The page, section by section.

use std::fmt::Write;

use super::chart::{ChartLabels, STYLE, Scale, Series, Size, VARIABLES, inline_svg};
use super::ticks::short_number;
use super::{escape, heat};
use crate::metrics::{
    AttentionHead, AttentionMetrics, LengthMetrics, MemoryMetrics, Record, SampleMetrics, TilesMetrics, TrainMetrics,
    ValidMetrics,
};

/// A chart as wide as the page, and one of a pair.
const WIDE: Size = (1000.0, 380.0);
const HALF: Size = (500.0, 290.0);

/// The records of a run by kind, in order.
#[derive(Default)]
struct Run<'a> {
    train: Vec<&'a TrainMetrics>,
    valid: Vec<&'a ValidMetrics>,
    samples: Vec<&'a SampleMetrics>,
    tiles: Vec<&'a TilesMetrics>,
    length: Option<&'a LengthMetrics>,
    attention: Option<&'a AttentionMetrics>,
    memory: Option<&'a MemoryMetrics>,
}

/// The whole page.
pub(super) fn render(name: &str, records: &[Record], config: Option<&str>) -> String {
    let mut run = Run::default();
    for record in records {
        match record {
            Record::Train(metrics) => run.train.push(metrics),
            Record::Valid(metrics) => run.valid.push(metrics),
            Record::Sample(metrics) => run.samples.push(metrics),
            Record::Tiles(metrics) => run.tiles.push(metrics),
            // Of these the newest says it all.
            Record::Length(metrics) => run.length = Some(metrics),
            Record::Attention(metrics) => run.attention = Some(metrics),
            Record::Memory(metrics) => run.memory = Some(metrics),
            Record::Unknown => {}
        }
    }
    let title = escape(name);
    let sections = [
        summary(&run),
        loss(&run),
        course(&run),
        length(&run),
        tiles(&run),
        attention(&run),
        samples(&run),
        configuration(config),
    ];
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{title} · stickbreak</title>\n\
         <style>\n{VARIABLES}{STYLE}{}</style>\n</head>\n<body>\n<main>\n\
         <header><p class=\"over\">stickbreak run</p><h1>{title}</h1></header>\n{}\n</main>\n\
         <script>\n{}</script>\n</body>\n</html>\n",
        include_str!("page.css"),
        sections.join("\n"),
        include_str!("hover.js"),
    )
}

fn section(title: &str, body: &str) -> String {
    format!("<section>\n<h2>{title}</h2>\n{body}\n</section>")
}

fn missing(what: &str, remedy: &str) -> String {
    format!("<p class=\"missing\">{what} {remedy}</p>")
}

fn card(chart: &str) -> String {
    format!("<div class=\"card\">{chart}</div>")
}

fn summary(run: &Run<'_>) -> String {
    let mut facts: Vec<(&str, String, String)> = Vec::new();
    if let Some(last) = run.train.last() {
        facts.push(("Steps", last.step.to_string(), format!("{} tokens", short_number(last.tokens_seen as f64))));
        let recent = &run.train[run.train.len().saturating_sub(20)..];
        let mean = recent.iter().map(|train| train.loss).sum::<f64>() / recent.len() as f64;
        facts.push(("Training loss", fixed(mean), format!("nats, mean of the last {}", recent.len())));
    }
    if let Some(last) = run.valid.last() {
        let best = run.valid.iter().map(|valid| valid.loss).fold(f64::INFINITY, f64::min);
        facts.push(("Validation loss", fixed(last.loss), format!("nats, lowest {}", fixed(best))));
        facts.push(("Perplexity", short_number(last.perplexity), format!("over {} tokens", last.tokens)));
        if let Some(bits) = last.bits_per_byte {
            facts.push(("Bits per byte", fixed(bits), "validation".to_owned()));
        }
    }
    if let Some(rate) = median(run.train.iter().map(|train| train.tokens_per_second)) {
        facts.push(("Throughput", short_number(rate), "tokens/s, median".to_owned()));
    }
    if let Some(mfu) = median(run.train.iter().filter_map(|train| train.mfu)) {
        facts.push(("MFU", format!("{:.1}%", 100.0 * mfu), "median".to_owned()));
    }
    let seconds = run.train.iter().map(|train| train.milliseconds).filter(|value| value.is_finite()).sum::<f64>() / 1e3;
    if seconds > 0.0 {
        facts.push(("Time in steps", duration(seconds), "without evaluation and saving".to_owned()));
    }
    let peak = run.train.iter().filter_map(|train| train.peak_memory_bytes);
    if let Some(peak) = peak.chain(run.memory.map(|memory| memory.peak_bytes)).max() {
        facts.push(("Peak memory", format!("{:.2}", peak as f64 / (1u64 << 30) as f64), "GiB".to_owned()));
    }
    if facts.is_empty() {
        return section(
            "Summary",
            &missing("This run has no metrics yet.", "<code>cargo xtask train</code> makes them."),
        );
    }
    let mut html = String::from("<div class=\"facts\">");
    for (name, value, note) in facts {
        let _ = write!(html, "<div><span>{name}</span><b>{value}</b><small>{note}</small></div>");
    }
    html + "</div>"
}

fn loss(run: &Run<'_>) -> String {
    let points: Vec<(f64, f64)> = run.train.iter().map(|train| (train.step as f64, train.loss)).collect();
    let mut series = smoothed("training", points);
    let valid: Vec<(f64, f64)> = run.valid.iter().map(|valid| (valid.step as f64, valid.loss)).collect();
    series.push(Series { name: "validation".to_owned(), dots: valid.len() <= 40, points: valid, faint: false });
    series.retain(|series| !series.points.is_empty());
    let mut body = String::new();
    if !series.is_empty() {
        body += &card(&inline_svg(&series, &labels("Training and validation loss", "step", "nats per token"), WIDE));
    }
    if run.train.is_empty() {
        body += &missing("No training steps yet:", "<code>cargo xtask train</code> makes them.");
    }
    if run.valid.is_empty() {
        body += &missing(
            "No validation yet:",
            "<code>cargo xtask train</code> does it at its start, at its end and between.",
        );
    }
    section("Loss", &body)
}

fn course(run: &Run<'_>) -> String {
    if run.train.is_empty() {
        return String::new(); // The section on the loss has said so.
    }
    let of = |value: fn(&TrainMetrics) -> f64| -> Vec<(f64, f64)> {
        run.train.iter().map(|train| (train.step as f64, value(train))).collect()
    };
    let chart = |series: Vec<Series>, labels| card(&inline_svg(&series, &labels, HALF));
    let plain = |points| vec![Series { points, ..Series::default() }];
    let norm = ChartLabels { y_scale: Scale::Log10, ..labels("Gradient norm", "step", "before clipping, log scale") };
    let mut body = String::from("<div class=\"pair\">");
    body += &chart(plain(of(|train| train.learning_rate)), labels("Learning rate", "step", "per step"));
    body += &chart(smoothed("", of(|train| train.grad_norm)), norm);
    body +=
        &chart(smoothed("", of(|train| train.tokens_per_second)), labels("Throughput", "step", "tokens per second"));
    body += &chart(smoothed("", of(|train| train.milliseconds)), labels("Step time", "step", "milliseconds"));
    if run.train.iter().any(|train| train.mfu.is_some()) {
        let percent = of(|train| 100.0 * train.mfu.unwrap_or(f64::NAN));
        body += &chart(smoothed("", percent), labels("Model flops utilisation", "step", "% of the device's peak"));
    }
    section("Course of the training", &(body + "</div>"))
}

fn length(run: &Run<'_>) -> String {
    let Some(length) = run.length else {
        let remedy = "<code>cargo xtask eval RUN --data DATA --lengths 512,1024,2048 --record</code> reads one text at several context lengths and adds it.";
        return section("Length extrapolation", &missing("Not measured yet:", remedy));
    };
    let marks = vec![(length.trained_length as f64, "trained length".to_owned())];
    let by_length = length.lengths.iter().zip(&length.loss).map(|(&length, &loss)| (length as f64, loss)).collect();
    let curve = Series { points: by_length, dots: true, ..Series::default() };
    let at = ChartLabels {
        x_scale: Scale::Log2,
        marks: marks.clone(),
        ..labels("Loss by context length", "context length, tokens", "nats per token")
    };
    let mut body = format!("<p>The same text, read with longer and longer contexts at step {}. ", length.step);
    body += "A model that extrapolates stays level or falls to the right of the dashed line.</p><div class=\"pair\">";
    body += &card(&inline_svg(&[curve], &at, HALF));
    if length.loss_by_position.is_empty() {
        body += &missing(
            "Loss by position was not measured:",
            "<code>cargo xtask eval RUN --data DATA --lengths 512,1024,2048 --record</code> adds it.",
        );
    } else {
        let middle = |part: &crate::metrics::PositionLoss| ((part.start + part.end) as f64 / 2.0, part.loss);
        let points = length.loss_by_position.iter().map(middle).collect();
        let by_position = ChartLabels {
            x_scale: Scale::Log2,
            marks,
            ..labels("Loss by position", "position in the longest context, tokens", "nats per token")
        };
        body += &card(&inline_svg(&[Series { points, ..Series::default() }], &by_position, HALF));
    }
    section("Length extrapolation", &(body + "</div>"))
}

fn tiles(run: &Run<'_>) -> String {
    const TITLE: &str = "Skipped tiles";
    let trained: Vec<(f64, f64)> = run
        .train
        .iter()
        .filter_map(|train| train.tiles_skipped.map(|share| (train.step as f64, 100.0 * share)))
        .collect();
    if trained.is_empty() && run.tiles.is_empty() {
        let remedy = "<code>cargo xtask train</code> counts them; softmax and dense attention skip none.";
        return section(TITLE, &missing("Not counted:", remedy));
    }
    let held_out: Vec<(f64, f64)> = run
        .tiles
        .iter()
        .map(|tiles| (tiles.step as f64, 100.0 * tiles.mean()))
        .filter(|(_, y)| y.is_finite())
        .collect();
    let mut series = smoothed("training", trained);
    series.push(Series { name: "validation".to_owned(), dots: held_out.len() <= 40, points: held_out, faint: false });
    series.retain(|series| !series.points.is_empty());
    let mut body = String::from(
        "<p>Once a head has used up its stick, all older keys are left out, forward and backward. What this saves of the \
         causal square, in tiles of queries and keys:</p>",
    );
    if !series.is_empty() {
        let labels = labels("Share of the causal tiles skipped, mean over all heads", "step", "%");
        body += &card(&inline_svg(&series, &labels, WIDE));
    }
    // A run that holds out no text has only the course.
    let Some(last) = run.tiles.last() else { return section(TITLE, &body) };
    let cells = last.skipped.iter().enumerate();
    body += &heat::table(
        &format!(
            "Skipped by each head at step {}, on {} held-out tokens in windows of {}",
            last.step, last.tokens, last.context
        ),
        cells.flat_map(|(layer, heads)| heads.iter().enumerate().map(move |(head, &share)| (layer, head, share))),
        heat::percent,
        |share| share,
    );
    section(TITLE, &body)
}

fn attention(run: &Run<'_>) -> String {
    let Some(attention) = run.attention.filter(|attention| !attention.heads.is_empty()) else {
        let remedy = "<code>cargo xtask train</code> looks into the heads at its end; softmax has no stick to show.";
        return section("Attention", &missing("Not measured yet:", remedy));
    };
    let context = attention.context as f64;
    let cells =
        |value: fn(&AttentionHead) -> f64| attention.heads.iter().map(move |head| (head.layer, head.head, value(head)));
    let mut body = format!("<p>One text of {} tokens at step {}.</p>", attention.context, attention.step);
    body += &heat::table(
        "How far the stick reaches: mean distance to the attended keys, in keys",
        cells(|head| head.mean_reach),
        heat::keys,
        |reach| (1.0 + reach).ln() / (1.0 + context).ln(),
    );
    body += &heat::table(
        "Tiles visited: share of the causal tiles that early exit at 2^-20 would leave",
        cells(|head| head.tiles_visited),
        heat::percent,
        |share| share,
    );
    if attention.heads.iter().any(|head| head.map.is_some()) {
        body += "<p>Attention maps: a row is a stretch of queries, a column a stretch of keys; shade goes with the square \
                 root of the weight, relative to the strongest of the map.</p>";
        body += &heat::maps(&attention.heads);
    }
    section("Attention", &body)
}

fn samples(run: &Run<'_>) -> String {
    let Some(last) = run.samples.last() else {
        let remedy =
            "<code>cargo xtask train</code> writes them as it goes, <code>cargo xtask generate RUN</code> at any time.";
        return section("Samples", &missing("None yet:", remedy));
    };
    let text = |sample: &SampleMetrics| {
        format!("<pre class=\"sample\"><b>{}</b>{}</pre>", escape(&sample.prompt), escape(&sample.text))
    };
    let mut body = String::new();
    let mut step = u64::MAX;
    for sample in run.samples.iter().rev() {
        if sample.step == last.step {
            body += &text(sample);
            continue;
        }
        if step == u64::MAX {
            body += "<details><summary>Earlier samples</summary>";
        }
        if sample.step != step {
            step = sample.step;
            let _ = write!(body, "<h3>Step {step}</h3>");
        }
        body += &text(sample);
    }
    if step != u64::MAX {
        body += "</details>";
    }
    section(&format!("Samples after {} steps", last.step), &body)
}

fn configuration(config: Option<&str>) -> String {
    let body = match config {
        Some(text) => {
            format!("<details><summary>As resolved: config.toml</summary><pre>{}</pre></details>", escape(text))
        }
        None => missing("The run folder has no config.toml:", "<code>cargo xtask train</code> stores it there."),
    };
    section("Configuration", &body)
}

fn labels(title: &str, x: &str, y: &str) -> ChartLabels {
    ChartLabels { title: title.to_owned(), x: x.to_owned(), y: y.to_owned(), ..ChartLabels::default() }
}

/// A noisy curve: the raw one pale and, once there are enough points, a mean over about a fiftieth of them.
fn smoothed(name: &str, points: Vec<(f64, f64)>) -> Vec<Series> {
    let count = points.len();
    let whole = |points| Series { name: name.to_owned(), points, ..Series::default() };
    if count < 30 {
        return vec![whole(points)];
    }
    let mut sums = vec![(0.0, 0.0)]; // Of the finite values and of their number.
    for &(_, y) in &points {
        let (sum, number) = sums[sums.len() - 1];
        sums.push(if y.is_finite() { (sum + y, number + 1.0) } else { (sum, number) });
    }
    let smooth = |index: usize| {
        // At the start, as many points to the left as to the right, or a steep fall would be drawn too late; the end is
        // flat, and there the mean over what is left is calmer.
        let around = (count / 100).max(2).min(index);
        let (before, after): ((f64, f64), (f64, f64)) = (sums[index - around], sums[count.min(index + around + 1)]);
        let value = if points[index].1.is_finite() { (after.0 - before.0) / (after.1 - before.1) } else { f64::NAN };
        (points[index].0, value)
    };
    let smooth = whole((0..count).map(smooth).collect());
    vec![Series { points, faint: true, ..Series::default() }, smooth]
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut finite: Vec<f64> = values.filter(|value| value.is_finite()).collect();
    finite.sort_by(f64::total_cmp);
    finite.get(finite.len() / 2).copied()
}

/// Three decimals, or a word for what is no number.
fn fixed(value: f64) -> String {
    if value.is_finite() { format!("{value:.3}") } else { "n/a".to_owned() }
}

fn duration(seconds: f64) -> String {
    match seconds as u64 {
        whole @ 0..60 => format!("{whole} s"),
        whole @ 60..3600 => format!("{}:{:02} min", whole / 60, whole % 60),
        whole => format!("{}:{:02} h", whole / 3600, whole % 3600 / 60),
    }
}
