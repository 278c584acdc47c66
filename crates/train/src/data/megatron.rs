//! Megatron's indexed dataset: `NAME.idx` says where in `NAME.bin` each sequence of ids lies.
//!
//! The `.idx` file, little-endian: `MMIDIDX\0\0`, `u64` version 1, `u8` data type (4 = i32, 8 = u16), `u64` sequences,
//! `u64` entries of the document index (documents + 1), then `i32` lengths in tokens, `i64` byte offsets into the
//! `.bin`, and the `i64` document index: the first sequence of each document, and the number of sequences at its end.

use super::files::{self, DataFile};
use super::tokens::{TokenSource, TokenWidth, check_range};
use super::{DataError, FormatError, Result};
use std::ops::Range;
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 9] = b"MMIDIDX\0\0";
const HEADER_BYTES: u64 = 9 + 8 + 1 + 8 + 8;

/// A checked `.idx` file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MegatronIndex {
    /// Size of an id in the `.bin` file.
    pub width: TokenWidth,
    /// Where each sequence begins when all are laid end to end, in tokens; one entry more than sequences.
    pub starts: Vec<u64>,
    /// Where each sequence begins in the `.bin` file, in bytes.
    pub offsets: Vec<u64>,
    /// First sequence of each document; one entry more than documents.
    pub documents: Vec<u64>,
}

/// Reads an `.idx` file whose `.bin` file has `bin_bytes` bytes.
///
/// Fails on a wrong magic, version, data type or size, on a sequence outside the `.bin` file, and on a document index
/// that is not ascending from 0 to the number of sequences.
pub fn parse_index(bytes: &[u8], bin_bytes: u64) -> Result<MegatronIndex, FormatError> {
    let found = bytes.len() as u64;
    if found < HEADER_BYTES {
        return Err(FormatError::TooShort { what: "the header of a Megatron index", found, expected: HEADER_BYTES });
    }
    let (magic, rest) = bytes.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(FormatError::Magic { found: magic.escape_ascii().to_string(), expected: "MMIDIDX\\0\\0" });
    }
    let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| rest[at + i]));
    if u64_at(0) != 1 {
        return Err(FormatError::Version { found: u64_at(0).into(), expected: 1 });
    }
    let width = match rest[8] {
        4 => TokenWidth::U32,
        8 => TokenWidth::U16,
        found => return Err(FormatError::DataType { found }),
    };
    let (sequences, entries) = (u64_at(9), u64_at(17));
    // In 128 bits, so that absurd counts are compared rather than overflow; nothing is allocated before this check.
    let expected = u128::from(HEADER_BYTES) + 12 * u128::from(sequences) + 8 * u128::from(entries);
    if expected != u128::from(found) {
        return Err(FormatError::Size { found, expected: u64::try_from(expected).unwrap_or(u64::MAX) });
    }
    let (lengths, rest) = rest[25..].split_at(4 * sequences as usize);
    let (offsets, documents) = rest.split_at(8 * sequences as usize);

    let mut index = MegatronIndex { width, starts: vec![0], offsets: Vec::new(), documents: Vec::new() };
    let mut total = 0;
    for (i, (length, offset)) in lengths.as_chunks::<4>().0.iter().zip(offsets.as_chunks::<8>().0).enumerate() {
        let (length, offset) = (i32::from_le_bytes(*length), i64::from_le_bytes(*offset));
        let length = u64::try_from(length).map_err(|_| out_of_range("length", i, length.into(), "0 or more".into()))?;
        let last = bin_bytes.checked_sub(length * width.bytes());
        let offset =
            u64::try_from(offset).ok().filter(|offset| last.is_some_and(|last| *offset <= last)).ok_or_else(|| {
                out_of_range(
                    "offset",
                    i,
                    offset.into(),
                    format!("{length} tokens within the {bin_bytes} bytes of the .bin"),
                )
            })?;
        total += length; // below 2^31 each and fewer than 2^61 of them
        index.offsets.push(offset);
        index.starts.push(total);
    }
    let mut previous = 0;
    for (i, entry) in documents.as_chunks::<8>().0.iter().enumerate() {
        let entry = i64::from_le_bytes(*entry);
        let allowed = if i == 0 { 0..=0 } else { previous..=sequences };
        let checked = u64::try_from(entry).ok().filter(|entry| allowed.contains(entry));
        previous = checked.ok_or_else(|| out_of_range("document", i, entry.into(), format!("{allowed:?}")))?;
        index.documents.push(previous);
    }
    if entries == 0 || previous != sequences {
        let what = format!("the last of {entries} entries of the document index");
        return Err(FormatError::Range { what, found: previous.into(), allowed: sequences.to_string() });
    }
    Ok(index)
}

fn out_of_range(what: &str, i: usize, found: i128, allowed: String) -> FormatError {
    FormatError::Range { what: format!("{what} {i}"), found, allowed }
}

/// An open `.idx`/`.bin` pair, its sequences laid end to end.
#[derive(Debug)]
pub struct MegatronTokens {
    bin: DataFile,
    index: MegatronIndex,
}

impl MegatronTokens {
    /// Opens the pair; either file, or their common name, may be given.
    pub fn open(path: &Path) -> Result<Self> {
        let named = path.extension().is_some_and(|e| e == "idx" || e == "bin");
        // Without one of the two endings the whole name is kept: its dots are its own.
        let name = if named { path.with_extension("") } else { path.to_path_buf() };
        let with = |ending: &str| {
            let mut file = name.clone().into_os_string();
            file.push(ending);
            PathBuf::from(file)
        };
        let (idx, bin) = (with(".idx"), DataFile::open(&with(".bin"))?);
        let index = parse_index(&files::read(&idx)?, bin.len).map_err(DataError::format(&idx))?;
        Ok(Self { bin, index })
    }

    /// The checked index.
    pub fn index(&self) -> &MegatronIndex {
        &self.index
    }
}

impl TokenSource for MegatronTokens {
    fn path(&self) -> &Path {
        &self.bin.path
    }

    fn len(&self) -> u64 {
        self.index.starts.last().copied().unwrap_or(0)
    }

    fn read_tokens(&self, range: Range<u64>) -> Result<Vec<u32>> {
        check_range(self.path(), &range, self.len())?;
        let (starts, width) = (&self.index.starts, self.index.width);
        let mut tokens = Vec::new();
        let mut position = range.start;
        // The last sequence that begins at or before the position.
        let mut sequence = starts.partition_point(|start| *start <= position).saturating_sub(1);
        while position < range.end {
            let end = range.end.min(starts[sequence + 1]);
            if end > position {
                let offset = self.index.offsets[sequence] + (position - starts[sequence]) * width.bytes();
                tokens.extend(width.decode(&self.bin.read_at(offset, ((end - position) * width.bytes()) as usize)?));
                position = end;
            }
            sequence += 1;
        }
        Ok(tokens)
    }
}
