//! Documents out of files, and tokenizers.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use stickbreak_train::data::registry::RegistryOptions;
use stickbreak_train::data::source::{Document, Documents, Input, find_files};
use stickbreak_train::data::{Result, Tokenizer};
use tempfile::tempdir;

fn documents(inputs: &[PathBuf], extensions: &[&str]) -> Result<Vec<Document>> {
    let inputs: Vec<_> = inputs.iter().cloned().map(Input::Path).collect();
    let extensions: Vec<_> = extensions.iter().map(|e| e.to_string()).collect();
    let list = find_files(&inputs, &extensions)?;
    Documents::new(&list.files).collect()
}

fn write(folder: &Path, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, bytes).unwrap();
    path
}

fn texts(documents: &[Document]) -> Vec<&[u8]> {
    documents.iter().map(|d| d.text.as_slice()).collect()
}

#[test]
fn folders_are_walked_in_order_without_hidden_and_binary_files() {
    let folder = tempdir().unwrap();
    for (name, bytes) in [
        ("b.rs", &b"two"[..]),
        ("a/z.rs", b"one"),
        ("c.md", b"three"),
        (".git/config", b"hidden"),
        ("c/.hidden.rs", b"hidden"),
        ("c/nul.txt", b"bi\0nary"),
        ("c/empty.rs", b""),
    ] {
        write(folder.path(), name, bytes);
    }
    let input = [folder.path().to_path_buf()];
    let found = documents(&input, &[]).unwrap();
    assert_eq!(found.iter().map(|d| d.name.as_str()).collect::<Vec<_>>(), ["a/z.rs", "b.rs", "c.md"]);
    assert_eq!(texts(&found), [&b"one"[..], b"two", b"three"]);
    let list = find_files(&[Input::Path(input[0].clone())], &[]).unwrap();
    assert_eq!(list.binary_files, 1);
    let mut reading = Documents::new(&list.files);
    assert_eq!(reading.by_ref().count(), 3);
    assert_eq!((reading.empty_documents(), reading.bytes_read()), (1, 11));
    assert_eq!(documents(&input, &["rs"]).unwrap().len(), 2);
    assert_eq!(documents(&input, &[".md"]).unwrap().len(), 1);
    assert!(documents(&input, &["py"]).unwrap_err().to_string().contains("no file to read"));
}

#[test]
fn a_text_file_named_on_its_own_may_hold_nul_and_invalid_utf8() {
    let folder = tempdir().unwrap();
    let bytes = b"a\0b\xFF\xE2\x80\xA8c\r\n";
    let path = write(folder.path(), "odd.txt", bytes);
    let found = documents(&[path], &[]).unwrap();
    assert_eq!(texts(&found), [bytes]);
    let path = write(folder.path(), "odd.rs", bytes);
    assert!(documents(&[path], &[]).unwrap_err().to_string().contains("odd.rs: looks binary"));
    assert!(
        documents(&[folder.path().join("none.txt")], &[]).unwrap_err().to_string().contains("none.txt: cannot open")
    );
}

#[test]
fn a_json_line_ends_at_a_newline_and_nowhere_else() {
    let folder = tempdir().unwrap();
    let mut lines = Vec::new();
    lines.extend("{\"text\": \"a\u{2028}b\u{2029}c\u{85}d\", \"meta\": {\"text\": 1}}\n".as_bytes());
    lines.extend(b"{\"text\": \"nul \\u0000 return \\r newline \\n\"}\r\n");
    lines.extend(b"{\"text\": \"bare nul \0 and tab \t\"}\n"); // not strict JSON, but no reason to lose a document
    lines.extend(b"\n  \n");
    lines.extend(b"{\"text\": \"\"}\n");
    lines.extend(b"{\"id\": 5, \"text\": \"not UTF-8: \xFF\"}"); // and no newline at the end
    let expected: [&[u8]; 4] = [
        "a\u{2028}b\u{2029}c\u{85}d".as_bytes(),
        b"nul \0 return \r newline \n",
        b"bare nul \0 and tab \t",
        b"not UTF-8: \xFF",
    ];
    let plain = write(folder.path(), "a.jsonl", &lines);
    let found = documents(&[plain], &[]).unwrap();
    assert_eq!(texts(&found), expected);
    assert_eq!(
        found.iter().map(|d| d.name.as_str()).collect::<Vec<_>>(),
        ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "a.jsonl:7"]
    );

    let packed = zstd::encode_all(lines.as_slice(), 1).unwrap();
    let path = write(folder.path(), "b.jsonl.zst", &packed);
    assert_eq!(texts(&documents(&[path], &[]).unwrap()), expected);
    let path = write(folder.path(), "cut.jsonl.zst", &packed[..packed.len() - 5]);
    assert!(documents(&[path], &[]).unwrap_err().to_string().contains("cut.jsonl.zst: cannot read"));
    let path = write(folder.path(), "not.jsonl.zst", b"plain text");
    assert!(documents(&[path], &[]).unwrap_err().to_string().contains("not.jsonl.zst"));
}

#[test]
fn a_bad_json_line_is_named() {
    let folder = tempdir().unwrap();
    for (line, reason) in [
        ("{\"text\": \"open", "EOF while parsing"),
        ("{\"content\": \"x\"}", "missing field `text`"),
        ("{\"text\": 5}", "expected a string as `text`"),
        ("{\"text\": null}", "expected a string as `text`"),
        ("[\"text\"]", "expected an object {\"text\": ...}"),
        ("{\"text\": \"a\"} {\"text\": \"b\"}", "trailing characters, column 15"),
        ("{\"text\": \"a\", \"text\": \"b\"}", "duplicate field"),
    ] {
        let path =
            write(folder.path(), "bad.jsonl", format!("{{\"text\": \"fine\"}}\n\n{line}\n{{\"text\": \"after\"}}\n"));
        let error = documents(&[path], &[]).unwrap_err().to_string();
        assert!(error.contains("bad.jsonl: line 3: ") && error.contains(reason), "{line}: {error}");
    }
}

#[cfg(not(feature = "parquet"))]
#[test]
fn parquet_names_its_feature() {
    let folder = tempdir().unwrap();
    let path = write(folder.path(), "a.parquet", b"PAR1");
    assert!(documents(&[path], &[]).unwrap_err().to_string().contains("cargo feature `parquet`"));
}

#[cfg(feature = "parquet")]
#[test]
fn parquet_text_is_read() {
    use parquet::data_type::{ByteArray, ByteArrayType, Int32Type};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use std::sync::Arc;
    let folder = tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let schema = "message m { required int32 id; optional binary text (UTF8); }";
    let schema = Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
    let file = fs::File::create(&path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::new(WriterProperties::default())).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<Int32Type>().write_batch(&[1, 2, 3], None, None).unwrap();
    column.close().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    let values = [ByteArray::from("one\n\u{2028}"), ByteArray::from("three")];
    column.typed::<ByteArrayType>().write_batch(&values, Some(&[1, 0, 1]), None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
    assert_eq!(texts(&documents(&[path], &[]).unwrap()), ["one\n\u{2028}".as_bytes(), b"three"]);
    let path = write(folder.path(), "bad.parquet", b"PAR1 but nothing more PAR1");
    assert!(documents(&[path], &[]).unwrap_err().to_string().contains("bad.parquet"));
}

#[test]
fn the_registry_gives_each_long_file_once() {
    let home = tempdir().unwrap();
    let options = |max_bytes| RegistryOptions {
        min_file_bytes: 10,
        max_file_bytes: 100,
        max_bytes,
        cargo_home: Some(home.path().to_path_buf()),
    };
    let find = |max_bytes| find_files(&[Input::CargoRegistry(options(max_bytes))], &[]);
    assert!(find(1000).unwrap_err().to_string().contains("cargo build"));
    let source = home.path().join("registry/src/index.example-1234");
    for (name, text) in [
        ("one-1.0.0/src/lib.rs", "pub fn one() {}"),
        ("one-1.0.1/src/lib.rs", "pub fn one() {}"),
        ("two-0.1.0/src/deep/down.rs", "pub fn two() {}"),
        ("two-0.1.0/src/short.rs", "x"),
        ("two-0.1.0/src/long.rs", &"long ".repeat(50)),
        ("two-0.1.0/README.md", "no Rust source"),
        ("three-0.1.0/src/lib.rs", "pub fn three() {}"),
    ] {
        write(&source, name, text);
    }
    let all = find(1000).unwrap().files;
    assert_eq!(all.len(), 3);
    assert!(all.iter().any(|file| file.name == "two-0.1.0/src/deep/down.rs"));
    assert_eq!(find(1000).unwrap().files, all);
    let some = find(33).unwrap().files;
    assert_eq!(some, all[..some.len()], "a smaller cap takes the beginning of the same order");
    assert_eq!(some.len(), 2);
}

#[test]
fn bytes_are_tokens() {
    let text = b"h\xFFi\0";
    assert_eq!(Tokenizer::Bytes.encode(text).unwrap(), [104, 255, 105, 0]);
    assert_eq!(Tokenizer::Bytes.decode_bytes(&[104, 256, 255]).unwrap(), b"h\xFF");
    assert_eq!(Tokenizer::Bytes.decode(&[104, 256, 255]).unwrap(), "h\u{FFFD}");
    assert_eq!((Tokenizer::Bytes.vocab_size(), Tokenizer::Bytes.end_of_text()), (257, 256));
    let error = Tokenizer::Bytes.decode_bytes(&[1, 257]).unwrap_err().to_string();
    assert!(error.contains("token 257 at position 1"), "{error}");
}

fn corpus() -> Vec<String> {
    (0..400)
        .map(|i| {
            format!("The number {i} comes before {}.\n\nWe don't count grün und 数字 backwards;\n\tnever!\n", i + 1)
        })
        .collect()
}

#[test]
fn a_trained_bpe_gives_back_every_text() {
    let bpe = Tokenizer::train_bpe(corpus().into_iter(), 400).unwrap();
    assert_eq!((bpe.vocab_size(), bpe.end_of_text()), (400, 399));
    let lengths = bpe.token_lengths();
    for text in [
        "",
        "The number 7",
        " leading",
        "a\u{2028}b\0c",
        "数字 \u{1F600}",
        "\n\n \t x  y",
        "<|endoftext|>",
        "a<|endoftext|>b",
    ] {
        let ids = bpe.encode(text).unwrap();
        assert!(!ids.contains(&399), "{text:?} mentions the token but does not hold it");
        assert_eq!(bpe.decode(&ids).unwrap(), text);
        assert_eq!(ids.iter().map(|id| lengths[*id as usize] as usize).sum::<usize>(), text.len());
    }
    assert_eq!(bpe.decode(&bpe.encode(b"bad \xFF byte").unwrap()).unwrap(), "bad \u{FFFD} byte");
    assert_eq!(bpe.decode_bytes(&[399]).unwrap(), b"");
    assert!(bpe.encode("The number").unwrap().len() < 5, "it has learnt the words");
    assert!(bpe.decode(&[400]).is_err());
}

#[test]
fn training_a_bpe_twice_gives_the_same_one() {
    let train = || Tokenizer::train_bpe(corpus().into_iter(), 380).unwrap();
    assert!(train().json().unwrap() == train().json().unwrap());
}

#[test]
fn long_texts_are_cut_without_changing_their_ids() {
    let bpe = Tokenizer::train_bpe(corpus().into_iter(), 400).unwrap();
    let text = corpus().concat().repeat(50);
    assert!(text.len() > 5 << 18, "more than one piece");
    let whole: Vec<u32> = text.split_inclusive(".\n\n").flat_map(|line| bpe.encode(line).unwrap()).collect();
    assert_eq!(bpe.decode(&bpe.encode(&text).unwrap()).unwrap(), text);
    assert_eq!(bpe.encode(&text).unwrap(), whole);
}

#[test]
fn tokenizers_that_do_not_fit_are_refused() {
    let folder = tempdir().unwrap();
    let bpe = Tokenizer::train_bpe(corpus().into_iter(), 300).unwrap();
    let path = write(folder.path(), "tokenizer.json", bpe.json().unwrap());
    let loaded = Tokenizer::from_file(&path, None, Some(300)).unwrap();
    assert_eq!(loaded.encode("The number").unwrap(), bpe.encode("The number").unwrap());
    let error = |end, declared| Tokenizer::from_file(&path, end, declared).err().unwrap().to_string();
    assert!(
        error(None, Some(299)).contains("tokenizer.json: token id 299 does not fit the declared vocabulary of 299")
    );
    assert!(error(Some("<eot>"), None).contains("looked for [\"<eot>\"]"));
    fs::File::options().write(true).open(&path).unwrap().write_all(b"?").unwrap();
    assert!(error(None, None).contains("tokenizer.json"));
    assert!(Tokenizer::train_bpe(corpus().into_iter(), 256).is_err());
    let few = Tokenizer::train_bpe(["abc".to_string()].into_iter(), 5000).err().unwrap().to_string();
    assert!(few.contains("5000"), "{few}");
}
