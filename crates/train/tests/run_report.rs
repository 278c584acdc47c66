//! The report: a full run, an empty one, and everything that could break a page.

use std::fs;
use std::path::PathBuf;

use stickbreak_train::metrics::{
    AttentionHead, AttentionMap, AttentionMetrics, LengthMetrics, MemoryMetrics, PositionLoss, Record, RunMetrics,
    SampleMetrics, TilesMetrics, TrainMetrics, ValidMetrics,
};
use stickbreak_train::report::{ChartLabels, Scale, Series, line_chart_svg, write_report};

/// Keeps the full run's folder here, to look at its page.
const KEEP: &str = "STICKBREAK_TEST_KEEP_REPORT";
const STEPS: u64 = 2000;
const TRAINED: usize = 512;

/// Numbers between 0 and 1 without a pattern.
fn noise(seed: u64) -> f64 {
    let hash = blake3::hash(&seed.to_le_bytes());
    f64::from(u32::from_le_bytes(hash.as_bytes()[..4].try_into().unwrap())) / f64::from(u32::MAX)
}

fn loss_at(step: u64) -> f64 {
    1.35 + 4.2 / (1.0 + step as f64 / 25.0).powf(0.8)
}

fn attention() -> AttentionMetrics {
    const SIZE: usize = 32;
    let mut heads = Vec::new();
    for layer in 0..4 {
        for head in 0..4 {
            let reach = 2_f64.powf(1.0 + 6.5 * noise((layer * 4 + head) as u64));
            let mut weights = vec![0.0; SIZE * SIZE];
            for query in 0..SIZE {
                for key in 0..=query {
                    let distance = (query - key) as f64 * 16.0;
                    let weight = (-distance / reach).exp() * (0.4 + 0.6 * noise((key * 31 + layer) as u64));
                    weights[query * SIZE + key] = weight as f32;
                }
            }
            let tiles_visited = (0.12 + reach / 250.0).min(1.0);
            heads.push(AttentionHead {
                layer,
                head,
                tiles_visited,
                mean_reach: reach,
                map: Some(AttentionMap { size: SIZE, weights }),
            });
        }
    }
    AttentionMetrics { step: STEPS, context: TRAINED, heads }
}

fn tiles(step: u64) -> TilesMetrics {
    let share = |layer: u64, head: u64| (0.95 - step as f64 / 4000.0 * noise(layer * 4 + head)).clamp(0.0, 1.0);
    let skipped = (0..4).map(|layer| (0..4).map(|head| share(layer, head)).collect()).collect();
    TilesMetrics { step, tokens: 8192, context: TRAINED, skipped }
}

/// A run as the loop would leave it, resumed once.
fn write_run(folder: &std::path::Path) {
    let mut stop = 1300;
    for resumed in [0, 1200] {
        let mut metrics = RunMetrics::resume(folder, resumed).unwrap();
        for step in resumed + 1..=stop {
            let spike: f64 = if step == 700 { 6.0 } else { 1.0 };
            let progress = step as f64 / STEPS as f64;
            let record = TrainMetrics {
                step,
                loss: loss_at(step) * (0.97 + 0.06 * noise(step)) * spike.min(1.6),
                grad_norm: (0.35 + 2.5 / (1.0 + step as f64 / 30.0)) * (0.8 + 0.4 * noise(step + 9999)) * spike,
                learning_rate: 1e-3
                    * (step as f64 / 100.0).min(0.1 + 0.45 * (1.0 + (std::f64::consts::PI * progress).cos())),
                tokens_per_second: if step < 4 { f64::NAN } else { 7200.0 + 500.0 * noise(step + 77) },
                milliseconds: 560.0 + 40.0 * noise(step + 77),
                device_milliseconds: None,
                host_milliseconds: None,
                exposed_milliseconds: None,
                ranks: None,
                tokens_seen: step * 4096,
                mfu: Some(0.31 + 0.02 * noise(step + 5)),
                peak_memory_bytes: Some(734_003_200),
                tiles_skipped: step.is_multiple_of(10).then(|| 0.9 - 0.4 * progress + 0.02 * noise(step + 3)),
            };
            metrics.append(&Record::Train(record)).unwrap();
            if step % 200 == 0 {
                let loss = loss_at(step) * 1.03;
                let bits_per_byte = Some(loss / std::f64::consts::LN_2);
                let valid = ValidMetrics { step, loss, perplexity: loss.exp(), bits_per_byte, tokens: 65_536 };
                metrics.append(&Record::Valid(valid)).unwrap();
            }
            if step % 200 == 0 {
                metrics.append(&Record::Tiles(tiles(step))).unwrap();
            }
            if step % 1000 == 0 {
                let text = "<'a, T>(items: &'a [T]) -> Option<&'a T> {\n    items.iter().max()\n}\n</pre><script>alert(1)</script>\u{0} & so on";
                let sample = SampleMetrics { step, prompt: "pub fn largest".to_owned(), text: text.to_owned() };
                metrics.append(&Record::Sample(sample)).unwrap();
            }
        }
        stop = STEPS;
        if resumed > 0 {
            let lengths = vec![128, 256, 512, 1024, 2048, 4096, 8192];
            let loss = vec![1.62, 1.51, 1.43, 1.39, 1.37, 1.36, 1.365];
            let ends: Vec<usize> = (0..=26).map(|index| 2_f64.powf(index as f64 / 2.0) as usize).collect();
            let position = |ends: &[usize]| PositionLoss {
                start: ends[0] - 1,
                end: ends[1].max(ends[0]),
                loss: 1.34 + 3.5 / (1.0 + ends[0] as f64).sqrt() + 0.03 * noise(ends[1] as u64),
            };
            let loss_by_position = ends.windows(2).map(position).collect();
            let length = LengthMetrics { step: STEPS, trained_length: TRAINED, lengths, loss, loss_by_position };
            metrics.append(&Record::Length(length)).unwrap();
            metrics.append(&Record::Attention(attention())).unwrap();
            let parts = [("parameters", 13_000_000), ("moments", 26_000_000)];
            let parts = parts.into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect();
            let memory = MemoryMetrics { step: STEPS, peak_bytes: 734_003_200, parts };
            metrics.append(&Record::Memory(memory)).unwrap();
        }
    }
    fs::write(folder.join("config.toml"), "# <quickstart>\n[model]\nlayers = 4\n").unwrap();
}

/// Tags are closed in order and attributes are quoted: enough of XML to catch what escaping or formatting breaks.
fn assert_well_formed(text: &str) {
    let mut open = Vec::new();
    let mut rest = text;
    while let Some(start) = rest.find('<') {
        let tag = &rest[start + 1..];
        let end = tag.find('>').unwrap_or_else(|| panic!("a tag has no end: {:.80}", tag));
        let (tag, after) = (&tag[..end], &tag[end + 1..]);
        rest = after;
        let name = tag.split([' ', '\n', '/']).next().unwrap();
        assert_eq!(tag.matches('"').count() % 2, 0, "<{tag}>");
        if let Some(closed) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(closed), "</{closed}>");
        } else if name == "script" || name == "style" {
            let close = format!("</{name}>");
            rest = &rest[rest.find(&close).expect("closed") + close.len()..];
        } else if !tag.ends_with('/') && !tag.starts_with('!') && !["meta", "rect"].contains(&name) {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "not closed: {open:?}");
}

#[test]
fn a_full_run_gives_a_whole_page() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = std::env::var_os(KEEP).map_or(temporary.path().join("quickstart"), PathBuf::from);
    write_run(&folder);
    let path = write_report(&folder).unwrap();
    assert_eq!(path, folder.join("report.html"));
    let html = fs::read_to_string(&path).unwrap();
    assert_well_formed(&html);
    assert!(!html.contains("alert(1)</script>") && html.contains("&lt;script&gt;alert(1)&lt;/script&gt;"));
    assert!(html.contains("# &lt;quickstart&gt;"));
    assert!(!html.contains("class=\"missing\""), "every section has data");
    assert!(!html.contains("NaN") && !html.contains(">inf"), "no number is shown that is none");
    let addresses = html.replace("http://www.w3.org/2000/svg", "");
    assert!(!addresses.contains("http") && !addresses.contains("src="), "the page needs no network");
    for text in [
        "Training and validation loss",
        "trained length",
        "layer 3, head 3",
        "Bits per byte",
        "Step 1000",
        "Share of the causal tiles skipped",
        "Skipped by each head at step 2000, on 8192 held-out tokens in windows of 512",
    ] {
        assert!(html.contains(text), "{text}");
    }
    assert!(html.len() < 1_500_000, "{} bytes", html.len());
    assert_eq!(write_report(&folder).unwrap(), path, "again, over the old one");
    assert_eq!(fs::read_to_string(&path).unwrap(), html, "the same run, the same page");
}

#[test]
fn an_empty_run_says_what_makes_each_section() {
    let folder = tempfile::tempdir().unwrap();
    let html = fs::read_to_string(write_report(folder.path()).unwrap()).unwrap();
    assert_well_formed(&html);
    for command in ["cargo xtask train", "cargo xtask eval", "cargo xtask generate", "config.toml"] {
        assert!(html.contains(command), "{command}");
    }
    let error = write_report(&folder.path().join("absent")).unwrap_err();
    assert!(format!("{error:#}").contains("absent"), "{error:#}");
    fs::write(folder.path().join("metrics.jsonl"), "{}\n{}\n").unwrap();
    let error = write_report(folder.path()).unwrap_err();
    assert!(error.to_string().contains("metrics.jsonl line 1"), "{error}");
}

#[test]
fn numbers_that_are_none_do_not_break_the_page() {
    let folder = tempfile::tempdir().unwrap();
    let mut metrics = RunMetrics::resume(folder.path(), 0).unwrap();
    for step in 1..=3 {
        let train = TrainMetrics {
            step,
            loss: f64::NAN,
            grad_norm: f64::INFINITY,
            learning_rate: 0.0,
            tokens_per_second: f64::NAN,
            milliseconds: f64::NAN,
            device_milliseconds: None,
            host_milliseconds: None,
            exposed_milliseconds: None,
            ranks: None,
            tokens_seen: 0,
            mfu: None,
            peak_memory_bytes: None,
            tiles_skipped: Some(f64::NAN),
        };
        metrics.append(&Record::Train(train)).unwrap();
    }
    let valid =
        ValidMetrics { step: 3, loss: f64::NAN, perplexity: f64::INFINITY, bits_per_byte: Some(f64::NAN), tokens: 0 };
    metrics.append(&Record::Valid(valid)).unwrap();
    let map = Some(AttentionMap { size: 0, weights: vec![f32::NAN; 3] });
    let heads = vec![AttentionHead { layer: 0, head: 2, tiles_visited: f64::NAN, mean_reach: f64::NAN, map }];
    metrics.append(&Record::Attention(AttentionMetrics { step: 3, context: 0, heads })).unwrap();
    for skipped in [vec![], vec![vec![f64::NAN]]] {
        let tiles = TilesMetrics { step: 3, tokens: 0, context: 0, skipped };
        metrics.append(&Record::Tiles(tiles)).unwrap();
    }
    let length = LengthMetrics { step: 3, trained_length: 0, lengths: vec![], loss: vec![], loss_by_position: vec![] };
    metrics.append(&Record::Length(length)).unwrap();
    let html = fs::read_to_string(write_report(folder.path()).unwrap()).unwrap();
    assert_well_formed(&html);
    assert!(!html.contains("NaN"), "n/a is the word");
}

#[test]
fn charts_take_what_they_are_given() {
    let labels = ChartLabels {
        title: "Loss & <others>".to_owned(),
        x: "context".to_owned(),
        y: "nats".to_owned(),
        x_scale: Scale::Log2,
        marks: vec![(512.0, "trained".to_owned())],
        ..ChartLabels::default()
    };
    let chart = |points: Vec<(f64, f64)>| {
        let svg = line_chart_svg(&[Series { name: "\"a\"".to_owned(), points, ..Series::default() }], &labels);
        assert_well_formed(&svg);
        assert!(!svg.contains("NaN") && !svg.contains("inf "), "{svg}");
        svg
    };
    assert!(chart(vec![]).contains("no data"));
    assert!(line_chart_svg(&[], &labels).contains("no data"));
    assert!(chart(vec![(f64::NAN, 1.0), (2.0, f64::NAN), (0.0, 1.0), (-1.0, 2.0)]).contains("no data"));
    let one = chart(vec![(1024.0, 2.5)]);
    assert!(one.contains("<circle") && one.contains("Loss &amp; &lt;others&gt;") && one.contains("&quot;a&quot;"));
    let gap = chart(vec![(1.0, 1.0), (2.0, 2.0), (4.0, f64::INFINITY), (8.0, 2.0), (16.0, 1.0)]);
    let path = gap.split("data-name").nth(1).unwrap();
    assert_eq!(path.split("/>").next().unwrap().matches('M').count(), 2, "a gap where there is no value: {path}");
    chart(vec![(1.0, 3.0), (2.0, 3.0)]);
    let many = chart((1..100_000).map(|x| (f64::from(x), if x == 50_000 { 1e6 } else { 1.0 })).collect());
    assert!(many.len() < 40_000, "{} bytes", many.len());
    assert!(many.contains(" 62.7") || many.contains(" 62.8"), "the spike is still there");
}
