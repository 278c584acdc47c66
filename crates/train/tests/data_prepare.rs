//! Preparing a folder: what is in it, and that interruptions leave no trace.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use stickbreak_train::data::{
    DataError, Dataset, Input, Manifest, PrepareEvent, PrepareOptions, Result, SplitName, Tokenizer, TokenizerChoice,
    Validation, prepare,
};
use tempfile::tempdir;

fn quietly(options: &PrepareOptions) -> Result<Manifest> {
    prepare(options, &mut |_| ControlFlow::Continue(()))
}

/// 60 documents of up to 200 bytes, two of them empty.
fn corpus(folder: &Path) -> PathBuf {
    let lines: Vec<String> = (0..60)
        .map(|i| serde_json::json!({ "text": format!("Text {i}. ").repeat(if i % 30 == 7 { 0 } else { i % 20 + 1 }) }))
        .map(|line| line.to_string() + "\n")
        .collect();
    let path = folder.join("corpus.jsonl");
    fs::write(&path, lines.concat()).unwrap();
    path
}

fn options(input: &Path, output: &Path, tokenizer: TokenizerChoice) -> PrepareOptions {
    let mut options = PrepareOptions::new(vec![Input::Path(input.into())], output);
    options.validation = Validation::Fraction(0.2);
    options.shard_tokens = 400;
    options.tokenizer = tokenizer;
    options
}

fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    paths.map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap())).collect()
}

#[test]
fn a_prepared_folder_holds_every_document_once() {
    let folder = tempdir().unwrap();
    let input = corpus(folder.path());
    let output = folder.path().join("out");
    let manifest = quietly(&options(&input, &output, TokenizerChoice::Bytes)).unwrap();
    assert!(manifest.train.shards.len() > 3 && manifest.valid.documents > 3);
    assert_eq!(manifest.train.documents + manifest.valid.documents, 58);
    assert_eq!((manifest.empty_documents, manifest.source_files), (2, 1));
    assert!(manifest.train.shards.iter().all(|s| s.tokens <= 400));

    let dataset = Dataset::open(&output).unwrap();
    dataset.verify_checksums().unwrap();
    for (name, entry) in [(SplitName::Train, &manifest.train), (SplitName::Valid, &manifest.valid)] {
        let stream = dataset.split(name).unwrap();
        let tokens = stream.read(0..stream.len()).unwrap();
        assert_eq!(tokens.len() as u64, entry.tokens);
        assert_eq!(tokens[0], 256, "end of text precedes");
        assert_eq!(tokens.iter().filter(|t| **t == 256).count() as u64, entry.documents);
        assert_eq!(Tokenizer::Bytes.decode_bytes(&tokens).unwrap().len() as u64, entry.text_bytes);
        assert_eq!(entry.tokens, entry.text_bytes + entry.documents);
    }
    // Asked again, it is there already, and nothing is written.
    let before = contents(&output);
    assert_eq!(quietly(&options(&input, &output, TokenizerChoice::Bytes)).unwrap(), manifest);
    assert_eq!(contents(&output), before);
}

#[test]
fn an_interrupted_preparation_continues_to_the_same_bytes() {
    let folder = tempdir().unwrap();
    let input = corpus(folder.path());
    let bpe = TokenizerChoice::TrainBpe { vocabulary_size: 270, sample_bytes: 1 << 20 };
    for tokenizer in [TokenizerChoice::Bytes, bpe] {
        let output = tempdir().unwrap();
        let whole = output.path().join("whole");
        quietly(&options(&input, &whole, tokenizer.clone())).unwrap();
        let expected = contents(&whole);
        let shards = expected.keys().filter(|name| name.ends_with(".bin")).count();
        assert!(shards > 4);

        for stop_after in 0..=shards {
            let parts = output.path().join(format!("parts{stop_after}"));
            let options = options(&input, &parts, tokenizer.clone());
            let mut finished = 0;
            let stopped = prepare(&options, &mut |event| {
                finished += usize::from(matches!(event, PrepareEvent::Shard { .. }));
                let enough = match event {
                    PrepareEvent::Phase { .. } | PrepareEvent::Read { .. } => stop_after == 0,
                    PrepareEvent::Shard { .. } => finished == stop_after,
                };
                if enough { ControlFlow::Break("injected".into()) } else { ControlFlow::Continue(()) }
            });
            assert!(matches!(stopped, Err(DataError::Stopped(_))), "{stop_after}");
            assert!(Dataset::open(&parts).is_err(), "a folder without a manifest is not a dataset");
            // What a kill leaves behind: half a shard, half a manifest.
            fs::write(parts.join(".train_000002.bin.partial"), b"half").unwrap();
            fs::write(parts.join(".manifest.json.partial"), b"{").unwrap();
            let written_before: Vec<_> =
                contents(&parts).into_keys().filter(|n| n.starts_with("train") || n.starts_with("valid")).collect();
            let times = |names: &[String]| -> Vec<_> {
                names.iter().map(|n| fs::metadata(parts.join(n)).unwrap().modified().unwrap()).collect()
            };
            let times_before = times(&written_before);
            quietly(&options).unwrap();
            assert_eq!(times(&written_before), times_before, "finished shards are not written again");
            let mut found = contents(&parts);
            found.retain(|name, _| !name.ends_with(".partial"));
            assert!(found == expected, "stopped after {stop_after} shards");
        }
    }
}

#[test]
fn a_used_folder_is_not_mixed_with_something_else() {
    let folder = tempdir().unwrap();
    let input = corpus(folder.path());
    let output = folder.path().join("out");
    let first = options(&input, &output, TokenizerChoice::Bytes);
    quietly(&first).unwrap();
    let mut other = first.clone();
    other.shard_tokens = 800;
    let error = quietly(&other).unwrap_err().to_string();
    assert!(error.contains("shard_tokens: 400 then, 800 now"), "{error}");
    fs::write(&input, "{\"text\": \"changed\"}\n").unwrap();
    assert!(quietly(&first).unwrap_err().to_string().contains("input files have changed"));
    fs::remove_file(output.join("prepare.json")).unwrap();
    assert!(quietly(&first).unwrap_err().to_string().contains("manifest.json without prepare.json"));
}

#[test]
fn the_output_does_not_become_input() {
    let folder = tempdir().unwrap();
    corpus(folder.path());
    let error =
        quietly(&options(folder.path(), &folder.path().join("out"), TokenizerChoice::Bytes)).unwrap_err().to_string();
    assert!(error.contains("lies within the input folder"), "{error}");
}

#[test]
fn a_damaged_shard_stops_a_continued_preparation() {
    let folder = tempdir().unwrap();
    let input = corpus(folder.path());
    let output = folder.path().join("out");
    let options = options(&input, &output, TokenizerChoice::Bytes);
    let _ = prepare(&options, &mut |event| match event {
        PrepareEvent::Shard { .. } => ControlFlow::Break("injected".into()),
        _ => ControlFlow::Continue(()),
    });
    let shard = contents(&output).into_keys().find(|name| name.ends_with(".bin")).unwrap();
    fs::File::options().write(true).open(output.join(&shard)).unwrap().set_len(1030).unwrap();
    let error = quietly(&options).unwrap_err().to_string();
    assert!(error.contains(&shard) && error.contains("1030"), "{error}");
}

#[test]
fn validation_can_be_chosen() {
    let folder = tempdir().unwrap();
    let input = corpus(folder.path());
    let valid = folder.path().join("valid.txt");
    fs::write(&valid, "held out").unwrap();
    let with = |name: &str, validation| {
        let mut options = options(&input, &folder.path().join(name), TokenizerChoice::Bytes);
        options.validation = validation;
        quietly(&options).map(|m| (m.train.documents, m.valid.documents, m.source_files))
    };
    assert_eq!(with("none", Validation::None).unwrap(), (58, 0, 1));
    assert_eq!(with("first", Validation::FirstDocuments(10)).unwrap(), (48, 10, 1));
    assert_eq!(with("inputs", Validation::Inputs(vec![Input::Path(valid.clone())])).unwrap(), (58, 1, 2));
    assert!(with("all", Validation::FirstDocuments(100)).unwrap_err().to_string().contains("0 documents to train on"));
    assert!(with("nan", Validation::Fraction(f64::NAN)).is_err());
    let same = with("same", Validation::Inputs(vec![Input::Path(input.clone())])).unwrap_err().to_string();
    assert!(same.contains("corpus.jsonl: both an input and a validation input"), "{same}");
}

#[test]
fn empty_one_token_and_undecodable_documents() {
    let folder = tempdir().unwrap();
    let text = folder.path().join("text");
    fs::create_dir(&text).unwrap();
    for (name, bytes) in
        [("a", &b""[..]), ("b", b"x"), ("c", b"bad \xFF\xFE bytes"), ("d", "sep \u{2028} \r end".as_bytes())]
    {
        fs::write(text.join(name), bytes).unwrap();
    }
    let mut options = PrepareOptions::new(vec![Input::Path(text)], folder.path().join("bytes"));
    options.validation = Validation::None;
    let manifest = quietly(&options).unwrap();
    assert_eq!((manifest.train.documents, manifest.empty_documents, manifest.replaced_documents), (3, 1, 0));
    let stream = Dataset::open(&options.output).unwrap().split(SplitName::Train).unwrap();
    let bytes = Tokenizer::Bytes.decode_bytes(&stream.read(0..stream.len()).unwrap()).unwrap();
    assert_eq!(bytes, [&b"xbad \xFF\xFE bytes"[..], "sep \u{2028} \r end".as_bytes()].concat());

    options.output = folder.path().join("bpe");
    options.tokenizer = TokenizerChoice::TrainBpe { vocabulary_size: 257, sample_bytes: 1 << 20 };
    let manifest = quietly(&options).unwrap();
    assert_eq!((manifest.train.documents, manifest.replaced_documents), (3, 1));
    let dataset = Dataset::open(&options.output).unwrap();
    let stream = dataset.split(SplitName::Train).unwrap();
    let text = dataset.tokenizer().unwrap().decode(&stream.read(0..stream.len()).unwrap()).unwrap();
    assert_eq!(text, "xbad \u{FFFD}\u{FFFD} bytessep \u{2028} \r end");
    assert_eq!(manifest.train.text_bytes, text.len() as u64);
}

#[test]
fn a_tokenizer_of_the_user_is_copied_and_guarded() {
    let folder = tempdir().unwrap();
    let input = corpus(folder.path());
    let bpe = Tokenizer::train_bpe((0..50).map(|i| format!("Text {i}. ")), 270).unwrap();
    let path = folder.path().join("mine.json");
    fs::write(&path, bpe.json().unwrap()).unwrap();
    let choose = |vocabulary_size| TokenizerChoice::File { path: path.clone(), end_of_text: None, vocabulary_size };
    let error = quietly(&options(&input, &folder.path().join("small"), choose(Some(260)))).unwrap_err().to_string();
    assert!(error.contains("mine.json: token id 269 does not fit the declared vocabulary of 260"), "{error}");

    let output = folder.path().join("padded");
    let manifest = quietly(&options(&input, &output, choose(Some(320)))).unwrap();
    assert_eq!((manifest.vocabulary_size, manifest.end_of_text), (320, 269));
    let dataset = Dataset::open(&output).unwrap();
    dataset.verify_checksums().unwrap();
    assert_eq!(dataset.tokenizer().unwrap().vocab_size(), 270);

    let mut json = fs::read(output.join("tokenizer.json")).unwrap();
    json.push(b'\n');
    fs::write(output.join("tokenizer.json"), json).unwrap();
    assert!(dataset.verify_checksums().unwrap_err().to_string().contains("tokenizer.json: blake3 checksum"));
    assert!(dataset.tokenizer().is_err());
    assert!(dataset.split(SplitName::Train).is_err());
}
