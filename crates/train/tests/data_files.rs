//! Token files and manifests: round trips, and what damaged ones are told.

use proptest::prelude::*;
use std::fs;
use std::path::Path;
use stickbreak_train::data::manifest::{self, Manifest, ShardEntry, SplitEntry, TokenizerEntry, parse_manifest};
use stickbreak_train::data::megatron::{MegatronTokens, parse_index};
use stickbreak_train::data::shard::{ShardReader, ShardWriter, parse_header};
use stickbreak_train::data::tokens::{NanoGptTokens, TokenWidth};
use stickbreak_train::data::{Dataset, FormatError, SplitName, TokenFormat, TokenSource, TokenStream};
use tempfile::tempdir;

fn write_shard(path: &Path, width: TokenWidth, tokens: &[u32]) -> String {
    let mut writer = ShardWriter::create(path, width).unwrap();
    writer.push(tokens).unwrap();
    writer.finish().unwrap().1
}

fn message<T>(result: stickbreak_train::data::Result<T>) -> String {
    result.err().expect("an error").to_string()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn shards_round_trip(tokens in prop::collection::vec(0u32..65536, 0..300), wide: bool, cut in 0.0f64..=1.0) {
        let folder = tempdir().unwrap();
        let path = folder.path().join("a.bin");
        let width = if wide { TokenWidth::U32 } else { TokenWidth::U16 };
        let tokens: Vec<u32> = tokens.iter().map(|t| if wide { t * 65537 } else { *t }).collect();
        write_shard(&path, width, &tokens);
        let reader = ShardReader::open(&path).unwrap();
        prop_assert_eq!(reader.len(), tokens.len() as u64);
        let middle = (tokens.len() as f64 * cut) as u64;
        let mut read = reader.read_tokens(0..middle).unwrap();
        read.extend(reader.read_tokens(middle..reader.len()).unwrap());
        prop_assert_eq!(read, tokens);
        prop_assert!(reader.read_tokens(0..reader.len() + 1).is_err());
    }

    #[test]
    fn parsers_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..1200), size: u64) {
        let _ = parse_header(&bytes, size);
        let _ = parse_index(&bytes, size);
        let _ = parse_manifest(&bytes);
    }
}

#[test]
fn the_header_is_llm_c_s() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("a.bin");
    write_shard(&path, TokenWidth::U16, &[50256, 1, 2]);
    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes.len(), 1024 + 6);
    assert_eq!(bytes[..12], [20240520i32, 1, 3].map(i32::to_le_bytes).concat());
    assert_eq!(bytes[1024..], [0x50, 0xC4, 1, 0, 2, 0]);

    write_shard(&path, TokenWidth::U32, &[128000]);
    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes[..12], [20240801i32, 7, 1].map(i32::to_le_bytes).concat());
    assert_eq!(bytes[1024..], 128000u32.to_le_bytes());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no partial file is left");
}

#[test]
fn a_damaged_header_is_refused_with_both_numbers() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("a.bin");
    write_shard(&path, TokenWidth::U16, &[1, 2, 3]);
    let good = fs::read(&path).unwrap();
    let with = |at: usize, value: i32| {
        let mut bytes = good.clone();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        parse_header(&bytes, bytes.len() as u64).unwrap_err().to_string()
    };
    assert!(with(0, 7).contains("found 7, expected 20240520"), "{}", with(0, 7));
    assert!(with(4, 2).contains("version 2 is not supported, expected 1"));
    assert!(with(8, -1).contains("-1"));
    assert!(with(8, 4).contains("has 1030 bytes, but its header says 1032"));

    fs::write(&path, &good[..1029]).unwrap();
    let error = message(ShardReader::open(&path));
    assert!(error.contains("a.bin") && error.contains("1029") && error.contains("1030"), "{error}");
    fs::write(&path, &good[..100]).unwrap();
    assert!(message(ShardReader::open(&path)).contains("100 bytes, 1024 are needed"));
    fs::write(&path, []).unwrap();
    assert!(message(ShardReader::open(&path)).contains("0 bytes"));
}

#[test]
fn a_file_that_shrinks_under_the_reader_is_an_error() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("a.bin");
    write_shard(&path, TokenWidth::U16, &[1; 5000]);
    let reader = ShardReader::open(&path).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(2000).unwrap();
    let error = message(reader.read_tokens(0..5000));
    assert!(error.contains("a.bin") && error.contains("2000"), "{error}");
}

#[test]
fn a_wide_token_does_not_fit_a_narrow_shard() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("a.bin");
    let mut writer = ShardWriter::create(&path, TokenWidth::U16).unwrap();
    assert!(
        message(writer.push(&[5, 65536])).contains("token 65536 at position 1 is not below the vocabulary size 65536")
    );
    drop(writer);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "an abandoned shard leaves nothing");
}

#[test]
fn nanogpt_files_are_bare_tokens() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("train.bin");
    fs::write(&path, [1, 0, 2, 1]).unwrap();
    let tokens = NanoGptTokens::open(&path).unwrap();
    assert_eq!(tokens.read_tokens(0..2).unwrap(), [1, 258]);
    fs::write(&path, [1, 0, 2]).unwrap();
    assert!(message(NanoGptTokens::open(&path)).contains("3 bytes"));
}

/// An `.idx` of i32 tokens with these sequences (length, byte offset) and document index.
fn megatron_index(sequences: &[(i32, i64)], documents: &[i64]) -> Vec<u8> {
    let mut bytes = b"MMIDIDX\0\0".to_vec();
    bytes.extend(1u64.to_le_bytes());
    bytes.push(4);
    bytes.extend((sequences.len() as u64).to_le_bytes());
    bytes.extend((documents.len() as u64).to_le_bytes());
    sequences.iter().for_each(|(length, _)| bytes.extend(length.to_le_bytes()));
    sequences.iter().for_each(|(_, offset)| bytes.extend(offset.to_le_bytes()));
    documents.iter().for_each(|document| bytes.extend(document.to_le_bytes()));
    bytes
}

#[test]
fn megatron_pairs_are_read_in_the_order_of_the_index() {
    let folder = tempdir().unwrap();
    // Sequences out of order in the .bin, one of them empty.
    fs::write(folder.path().join("d.v1.idx"), megatron_index(&[(2, 12), (0, 0), (3, 0)], &[0, 1, 3])).unwrap();
    fs::write(folder.path().join("d.v1.bin"), [10u32, 11, 12, 20, 21].map(u32::to_le_bytes).concat()).unwrap();
    for name in ["d.v1.idx", "d.v1.bin", "d.v1"] {
        let tokens = MegatronTokens::open(&folder.path().join(name)).unwrap();
        assert_eq!(tokens.len(), 5);
        assert_eq!(tokens.read_tokens(0..5).unwrap(), [20, 21, 10, 11, 12]);
        assert_eq!(tokens.read_tokens(1..4).unwrap(), [21, 10, 11]);
        assert_eq!(tokens.index().documents, [0, 1, 3]);
    }
}

#[test]
fn a_damaged_megatron_index_is_refused() {
    let good = megatron_index(&[(2, 0), (3, 8)], &[0, 1, 2]);
    assert!(parse_index(&good, 20).is_ok());
    assert!(matches!(parse_index(&good[..good.len() - 1], 20), Err(FormatError::Size { found: 81, expected: 82 })));
    assert!(parse_index(&good, 19).unwrap_err().to_string().contains("offset 1 is 8"));
    assert!(matches!(parse_index(&[], 20), Err(FormatError::TooShort { .. })));
    for (at, value) in [(0, b'X'), (9, 2), (17, 6), (18, 255), (25, 9), (33, 255)] {
        let mut bytes = good.clone();
        bytes[at] = value;
        assert!(parse_index(&bytes, 20).is_err(), "byte {at} set to {value}");
    }
    assert!(parse_index(&megatron_index(&[(-2, 0)], &[0, 1]), 20).is_err());
    assert!(parse_index(&megatron_index(&[(2, -8)], &[0, 1]), 20).is_err());
    assert!(parse_index(&megatron_index(&[(2, 0)], &[0, 2]), 20).is_err());
    assert!(parse_index(&megatron_index(&[(2, 0), (2, 8)], &[0, 2, 1]), 20).is_err());
    assert!(parse_index(&megatron_index(&[(2, 0)], &[]), 20).is_err());
    // Found by fuzzing: nothing at all, not even the one entry that ends a document index.
    assert!(parse_index(&megatron_index(&[], &[]), 0).is_err());
    assert!(parse_index(&megatron_index(&[], &[0]), 0).is_ok());
}

/// A folder with one shard of training tokens and none of validation.
fn small_dataset(folder: &Path) -> Manifest {
    let blake3 = write_shard(&folder.join("train_000000.bin"), TokenWidth::U16, &[256, 104, 105]);
    let (file, file_bytes) = ("train_000000.bin".into(), 1030);
    let shard = ShardEntry { file, file_bytes, tokens: 3, text_bytes: 2, documents: 1, blake3 };
    let manifest = Manifest {
        format_version: manifest::FORMAT_VERSION,
        vocabulary_size: 257,
        end_of_text: 256,
        tokenizer: TokenizerEntry::Bytes {},
        train: SplitEntry::from_shards(vec![shard]),
        valid: SplitEntry::default(),
        source_files: 1,
        binary_files: 0,
        empty_documents: 0,
        replaced_documents: 0,
    };
    manifest.write(folder).unwrap();
    manifest
}

#[test]
fn manifests_round_trip_and_refuse_what_they_do_not_know() {
    let folder = tempdir().unwrap();
    let manifest = small_dataset(folder.path());
    assert_eq!(Manifest::read(folder.path()).unwrap(), manifest);
    let text = fs::read_to_string(folder.path().join("manifest.json")).unwrap();
    let changed = |from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        parse_manifest(text.replacen(from, to, 1).as_bytes()).unwrap_err().to_string()
    };
    assert!(changed("\"source_files\"", "\"sauce_files\"").contains("unknown field `sauce_files`"));
    assert!(changed("\"kind\": \"bytes\"", "\"kind\": \"bytes\", \"extra\": 1").contains("unknown field `extra`"));
    assert!(
        changed("\"format_version\": 1", "\"format_version\": 2").contains("version 2 is not supported, expected 1")
    );
    assert!(changed("\"end_of_text\": 256", "\"end_of_text\": 257").contains("257"));
    assert!(changed("\"tokens\": 3", "\"tokens\": 4").contains("4 in one place, 3 by its shards"));
    assert!(changed("train_000000.bin", "../train_000000.bin").contains("is not the name of a file"));
    for end in (0..text.trim_end().len()).step_by(7) {
        assert!(parse_manifest(&text.as_bytes()[..end]).is_err(), "cut after {end} bytes");
    }
    fs::write(folder.path().join("manifest.json"), &text[..50]).unwrap();
    assert!(message(Dataset::open(folder.path())).contains("manifest.json: not valid"));
    fs::remove_file(folder.path().join("manifest.json")).unwrap();
    assert!(message(Dataset::open(folder.path())).contains("manifest.json: cannot read"));
}

#[test]
fn damaged_shards_are_refused_by_name() {
    let folder = tempdir().unwrap();
    small_dataset(folder.path());
    let path = folder.path().join("train_000000.bin");
    let good = fs::read(&path).unwrap();
    Dataset::open(folder.path()).unwrap().verify_checksums().unwrap();

    fs::write(&path, &good[..1028]).unwrap();
    let error = message(Dataset::open(folder.path()));
    assert!(error.contains("train_000000.bin") && error.contains("1028") && error.contains("1030"), "{error}");

    for at in [0, 11, 700, 1025] {
        let mut flipped = good.clone();
        flipped[at] ^= 1;
        fs::write(&path, &flipped).unwrap();
        let found = blake3::hash(&flipped).to_hex().to_string();
        let error = message(Dataset::open(folder.path()).unwrap().verify_checksums());
        let expected = blake3::hash(&good).to_hex().to_string();
        assert!(error.contains("train_000000.bin") && error.contains(&found) && error.contains(&expected), "{error}");
    }

    // A well-formed shard that is another one.
    write_shard(&path, TokenWidth::U32, &[256]);
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1030).unwrap();
    let dataset = Dataset::open(folder.path()).unwrap();
    assert!(dataset.split(SplitName::Train).is_err());

    fs::remove_file(&path).unwrap();
    assert!(message(Dataset::open(folder.path())).contains("train_000000.bin: cannot open"));
}

#[test]
fn a_token_outside_the_vocabulary_is_named_with_its_place() {
    let folder = tempdir().unwrap();
    let paths: Vec<_> = ["a.bin", "b.bin"].iter().map(|name| folder.path().join(name)).collect();
    write_shard(&paths[0], TokenWidth::U16, &[1, 2, 3]);
    write_shard(&paths[1], TokenWidth::U16, &[4, 300, 5]);
    let stream = TokenStream::open(&paths, TokenFormat::Llmc, 257).unwrap();
    assert_eq!(stream.len(), 6);
    assert_eq!(stream.read(1..4).unwrap(), [2, 3, 4]);
    let error = message(stream.read(2..6));
    assert!(error.contains("b.bin: token 300 at position 1 is not below the vocabulary size 257"), "{error}");
}
