//! `metrics.jsonl` across resumes and crashes, and the event files beside it.

use std::fs;
use std::path::Path;

use stickbreak_train::metrics::tensorboard::EventWriter;
use stickbreak_train::metrics::{
    METRICS_NAME, MetricsError, MetricsLog, Record, RunMetrics, SampleMetrics, TrainMetrics, ValidMetrics, read_records,
};

fn train(step: u64) -> Record {
    Record::Train(TrainMetrics {
        step,
        loss: 5.0 / step as f64,
        grad_norm: 0.1 + 0.2,
        learning_rate: 6e-4,
        tokens_per_second: if step == 1 { f64::NAN } else { 3200.5 },
        milliseconds: 1280.25,
        device_milliseconds: None,
        host_milliseconds: None,
        exposed_milliseconds: None,
        ranks: None,
        tokens_seen: step * 4096,
        mfu: None,
        peak_memory_bytes: Some(1 << 30),
        tiles_skipped: None,
    })
}

fn valid(step: u64) -> Record {
    Record::Valid(ValidMetrics { step, loss: 2.0, perplexity: 2_f64.exp(), bits_per_byte: Some(1.1), tokens: 65_536 })
}

fn sample(step: u64, text: &str) -> Record {
    Record::Sample(SampleMetrics { step, prompt: "fn main".to_owned(), text: text.to_owned() })
}

fn steps(path: &Path, kind: &str) -> Vec<u64> {
    read_records(path).unwrap().iter().filter(|record| record.kind() == kind).map(Record::step).collect()
}

/// A file with train lines 1 to 10, a validation after 5 and 10, and a sample after 5.
fn ten_steps(path: &Path) {
    let mut log = MetricsLog::resume(path, 0).unwrap();
    for step in 1..=10 {
        log.append(&train(step)).unwrap();
        if step % 5 == 0 {
            log.append(&valid(step)).unwrap();
        }
        if step == 5 {
            log.append(&sample(step, "line\u{2028}separator\nnewline \0 \"quote\" 鼠")).unwrap();
        }
    }
    log.sync().unwrap();
}

#[test]
fn records_are_read_back_as_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(METRICS_NAME);
    assert!(read_records(&path).unwrap().is_empty());
    ten_steps(&path);
    let text = fs::read_to_string(&path).unwrap();
    assert_eq!(text.split('\n').count(), 14, "13 lines, whatever is in the sample");
    assert!(text.starts_with(r#"{"kind":"train","step":1,"loss":5.0,"grad_norm":0.30000000000000004,"#), "{text}");
    let records = read_records(&path).unwrap();
    assert_eq!(records.len(), 13);
    assert_eq!(records[1], train(2));
    assert!(records.contains(&sample(5, "line\u{2028}separator\nnewline \0 \"quote\" 鼠")));
    let Record::Train(first) = &records[0] else { panic!() };
    assert!(first.tokens_per_second.is_nan(), "null is NaN");
}

#[test]
fn a_resume_from_any_step_leaves_no_step_twice_and_none_out() {
    for resumed in 0..=12 {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(METRICS_NAME);
        ten_steps(&path);
        let untouched = fs::read(&path).unwrap();
        let mut log = MetricsLog::resume(&path, resumed).unwrap();
        assert_eq!(log.last_step("valid"), [None, Some(5), Some(10)][resumed as usize / 5 % 3]);
        for step in resumed.min(10) + 1..=10 {
            log.append(&train(step)).unwrap();
            if step % 5 == 0 {
                log.append(&valid(step)).unwrap();
            }
        }
        assert_eq!(steps(&path, "train"), (1..=10).collect::<Vec<_>>(), "resumed from {resumed}");
        assert_eq!(steps(&path, "valid"), [5, 10], "resumed from {resumed}");
        if resumed >= 5 {
            assert_eq!(fs::read(&path).unwrap(), untouched, "the same lines come again, byte for byte");
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file stays");
    }
}

#[test]
fn a_file_cut_at_any_byte_is_repaired() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(METRICS_NAME);
    ten_steps(&path);
    let bytes = fs::read(&path).unwrap();
    // Around each newline, and here and there, also inside of the sample's many-byte characters.
    let newlines = (0..bytes.len()).filter(|&index| bytes[index] == b'\n');
    let around = newlines.flat_map(|index| [index - 1, index, index + 1]).filter(|&index| index < bytes.len());
    for length in (0..bytes.len()).step_by(13).chain(around) {
        fs::write(&path, &bytes[..length]).unwrap();
        let whole = bytes[..length].iter().filter(|&&byte| byte == b'\n').count();
        // A line that only lacks its newline is whole, too.
        let lines = whole + usize::from(bytes[length] == b'\n');
        assert_eq!(read_records(&path).unwrap().len(), lines, "cut to {length}");
        let mut log = MetricsLog::resume(&path, 100).unwrap();
        log.append(&train(200)).unwrap();
        assert_eq!(read_records(&path).unwrap().len(), lines + 1, "cut to {length}");
    }
    // What some file systems leave after a power cut.
    fs::write(&path, [&bytes[..], &[0; 50]].concat()).unwrap();
    MetricsLog::resume(&path, 100).unwrap();
    assert_eq!(fs::read(&path).unwrap(), bytes);
}

#[test]
fn damage_before_the_last_line_is_an_error_and_nothing_is_changed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(METRICS_NAME);
    ten_steps(&path);
    let mut bytes = fs::read(&path).unwrap();
    let second = bytes.iter().position(|&byte| byte == b'\n').unwrap() + 1;
    bytes[second] = b'x';
    fs::write(&path, &bytes).unwrap();
    for error in [MetricsLog::resume(&path, 3).unwrap_err(), read_records(&path).unwrap_err()] {
        assert!(matches!(error, MetricsError::Line { line: 2, .. }));
        assert!(error.to_string().contains("metrics.jsonl line 2"), "{error}");
    }
    assert_eq!(fs::read(&path).unwrap(), bytes);
}

#[test]
fn a_step_that_is_there_is_refused_and_unknown_kinds_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(METRICS_NAME);
    fs::write(&path, "{\"kind\":\"spectrum\",\"step\":3,\"values\":[1,2]}\n").unwrap();
    let mut log = MetricsLog::resume(&path, 3).unwrap();
    log.append(&train(4)).unwrap();
    log.append(&sample(4, "a")).unwrap();
    log.append(&sample(4, "b")).unwrap();
    let error = log.append(&train(4)).unwrap_err().to_string();
    assert!(error.contains("train for step 4 after one for step 4"), "{error}");
    assert_eq!(log.last_step("spectrum"), Some(3));
    assert!(fs::read_to_string(&path).unwrap().contains("spectrum"));
    assert_eq!(read_records(&path).unwrap().len(), 3);
}

#[test]
fn both_files_are_written_and_a_resume_starts_a_new_event_file() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("runs/one");
    for resumed in [0, 2] {
        let mut metrics = RunMetrics::resume(&run, resumed).unwrap();
        for step in resumed + 1..=4 {
            metrics.append(&train(step)).unwrap();
        }
        metrics.append(&valid(4)).unwrap();
        metrics.sync().unwrap();
        assert_eq!(metrics.last_step("train"), Some(4));
    }
    assert_eq!(steps(&run.join(METRICS_NAME), "train"), [1, 2, 3, 4]);
    let names: Vec<String> =
        fs::read_dir(&run).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let events = names.iter().filter(|name| name.starts_with("events.out.tfevents."));
    assert_eq!(events.count(), 2, "{names:?}");
}

#[test]
fn event_files_are_framed_records() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = EventWriter::resume(folder.path(), 7).unwrap();
    writer.scalar(8, "train/loss", 1.5).unwrap();
    writer.text(8, "sample", "hello").unwrap();
    let bytes = fs::read(writer.path()).unwrap();
    let mut records = Vec::new();
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
        records.push(&rest[12..12 + length]);
        rest = &rest[12 + length + 4..];
    }
    assert_eq!(records.len(), 4, "version, session log, scalar, text");
    assert!(records[0].ends_with(b"\x1a\x0dbrain.Event:2"));
    assert!(records[1].ends_with(b"\x10\x08\x3a\x02\x08\x01"), "step 8, SessionLog.START");
    assert!(records[2].ends_with(b"\x0a\x0atrain/loss\x15\x00\x00\xc0\x3f"));
    assert!(records[3].windows(5).any(|window| window == b"hello"));
}
