//! Manifests: one that is accepted adds up and stays in its folder, and is the same after writing and reading.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::Path;
use stickbreak_train::data::manifest::parse_manifest;

fuzz_target!(|bytes: &[u8]| {
    let Ok(manifest) = parse_manifest(bytes) else { return };
    assert!(manifest.end_of_text < manifest.vocabulary_size);
    for shard in manifest.train.shards.iter().chain(&manifest.valid.shards) {
        assert_eq!(Path::new(&shard.file).file_name(), Some(shard.file.as_ref()));
    }
    let text = manifest.to_json();
    assert_eq!(parse_manifest(text.as_bytes()), Ok(manifest));
});
