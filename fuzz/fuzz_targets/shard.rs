//! Shard headers: any bytes, any file size. A header that is accepted describes exactly the file that it is in.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stickbreak_train::data::shard::parse_header;

fuzz_target!(|input: (u64, &[u8])| {
    let (file_bytes, bytes) = input;
    for size in [file_bytes, bytes.len() as u64] {
        if let Ok(header) = parse_header(bytes, size) {
            assert_eq!(header.file_bytes(), size);
            assert_eq!(header.to_bytes()[..12], bytes[..12]);
        }
    }
});
