//! Megatron indexes: every sequence of an index that is accepted lies within the `.bin` file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stickbreak_train::data::megatron::parse_index;

fuzz_target!(|input: (u64, &[u8])| {
    let (bin_bytes, bytes) = input;
    let Ok(index) = parse_index(bytes, bin_bytes) else { return };
    assert_eq!(index.starts.len(), index.offsets.len() + 1);
    for (i, offset) in index.offsets.iter().enumerate() {
        let length = (index.starts[i + 1] - index.starts[i]) * index.width.bytes();
        assert!(offset + length <= bin_bytes);
    }
    assert!(index.documents.is_sorted());
    assert_eq!(index.documents.last(), Some(&(index.offsets.len() as u64)));
});
