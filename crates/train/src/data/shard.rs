//! llm.c shards: a header of 256 little-endian `i32` (1024 bytes) and then token ids.
//!
//! | field | 16-bit ids | 32-bit ids |
//! |---|---|---|
//! | 0: magic | 20240520 | 20240801 |
//! | 1: version | 1 | 7 |
//! | 2: number of tokens | | |
//! | 3..256 | zero | zero |
//!
//! The file has exactly `1024 + width * tokens` bytes. The end-of-text token precedes each document.

use super::files::{self, DataFile};
use super::tokens::{TokenSource, TokenWidth, check_range};
use super::{DataError, FormatError, Result};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes of the header.
pub const HEADER_BYTES: u64 = 1024;

/// Most tokens of one shard: the header counts them in an `i32`.
pub const MAX_SHARD_TOKENS: u64 = i32::MAX as u64;

const MAGIC_U16: i32 = 20240520;
const MAGIC_U32: i32 = 20240801;
const VERSION_U16: i32 = 1;
const VERSION_U32: i32 = 7;

/// What a header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardHeader {
    /// Size of an id.
    pub width: TokenWidth,
    /// Number of tokens.
    pub tokens: u64,
}

impl ShardHeader {
    /// Bytes of a file with this header.
    pub fn file_bytes(&self) -> u64 {
        HEADER_BYTES + self.width.bytes() * self.tokens
    }

    /// The header as it stands in the file.
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES as usize] {
        let (magic, version) = match self.width {
            TokenWidth::U16 => (MAGIC_U16, VERSION_U16),
            TokenWidth::U32 => (MAGIC_U32, VERSION_U32),
        };
        let mut bytes = [0; HEADER_BYTES as usize];
        bytes[..4].copy_from_slice(&magic.to_le_bytes());
        bytes[4..8].copy_from_slice(&version.to_le_bytes());
        bytes[8..12].copy_from_slice(&(self.tokens as i32).to_le_bytes());
        bytes
    }
}

/// Reads a header from the first bytes of a file that has `file_bytes` bytes in all.
///
/// Fails on a short header, a wrong magic or version, a negative count, and a size that is not the header's.
pub fn parse_header(bytes: &[u8], file_bytes: u64) -> Result<ShardHeader, FormatError> {
    if bytes.len() < HEADER_BYTES as usize {
        let found = bytes.len() as u64;
        return Err(FormatError::TooShort { what: "the header of a shard", found, expected: HEADER_BYTES });
    }
    let field = |i: usize| i32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]]);
    let (width, expected) = match field(0) {
        MAGIC_U16 => (TokenWidth::U16, VERSION_U16),
        MAGIC_U32 => (TokenWidth::U32, VERSION_U32),
        other => return Err(FormatError::Magic { found: other.to_string(), expected: "20240520 or 20240801" }),
    };
    if field(1) != expected {
        return Err(FormatError::Version { found: field(1).into(), expected: expected.into() });
    }
    let tokens = u64::try_from(field(2)).map_err(|_| FormatError::Range {
        what: "the token count".into(),
        found: field(2).into(),
        allowed: format!("0..={MAX_SHARD_TOKENS}"),
    })?;
    let header = ShardHeader { width, tokens };
    if header.file_bytes() != file_bytes {
        return Err(FormatError::Size { found: file_bytes, expected: header.file_bytes() });
    }
    Ok(header)
}

/// An open shard.
#[derive(Debug)]
pub struct ShardReader {
    file: DataFile,
    header: ShardHeader,
}

impl ShardReader {
    /// Opens a shard and checks its header against its size.
    pub fn open(path: &Path) -> Result<Self> {
        let file = DataFile::open(path)?;
        let bytes = file.read_at(0, file.len.min(HEADER_BYTES) as usize)?;
        let header = parse_header(&bytes, file.len).map_err(DataError::format(path))?;
        Ok(Self { file, header })
    }

    /// What the header says.
    pub fn header(&self) -> ShardHeader {
        self.header
    }
}

impl TokenSource for ShardReader {
    fn path(&self) -> &Path {
        &self.file.path
    }

    fn len(&self) -> u64 {
        self.header.tokens
    }

    fn read_tokens(&self, range: Range<u64>) -> Result<Vec<u32>> {
        check_range(self.path(), &range, self.len())?;
        let width = self.header.width.bytes();
        let bytes =
            self.file.read_at(HEADER_BYTES + range.start * width, ((range.end - range.start) * width) as usize)?;
        Ok(self.header.width.decode(&bytes))
    }
}

/// Writes a shard as its tokens come. The file gets its name only when it is complete and on disk.
pub struct ShardWriter {
    path: PathBuf,
    partial: PathBuf,
    file: Option<BufWriter<File>>,
    header: ShardHeader,
    published: bool,
}

impl ShardWriter {
    /// Starts a shard that will be named `path`.
    pub fn create(path: &Path, width: TokenWidth) -> Result<Self> {
        let partial = files::partial_path(path);
        let file = File::create(&partial).map_err(DataError::io(&partial, "create"))?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        // The count is not known yet: an all-zero header, which no reader takes for a shard.
        file.write_all(&[0; HEADER_BYTES as usize]).map_err(DataError::io(&partial, "write"))?;
        let (path, header) = (path.to_path_buf(), ShardHeader { width, tokens: 0 });
        Ok(Self { path, partial, file: Some(file), header, published: false })
    }

    /// Tokens so far.
    pub fn tokens(&self) -> u64 {
        self.header.tokens
    }

    /// Appends ids. Fails on an id wider than the shard's width, on a count that the header cannot hold, and on I/O.
    pub fn push(&mut self, tokens: &[u32]) -> Result<()> {
        let total = self.header.tokens + tokens.len() as u64;
        if total > MAX_SHARD_TOKENS {
            let allowed = format!("at most {MAX_SHARD_TOKENS}");
            let error = FormatError::Range { what: "the token count".into(), found: total.into(), allowed };
            return Err(DataError::format(&self.path)(error));
        }
        let file = self.file.as_mut().expect("open until finish takes self");
        for (i, &token) in tokens.iter().enumerate() {
            let written = match (self.header.width, u16::try_from(token)) {
                (TokenWidth::U32, _) => file.write_all(&token.to_le_bytes()),
                (TokenWidth::U16, Ok(token)) => file.write_all(&token.to_le_bytes()),
                (TokenWidth::U16, Err(_)) => {
                    let position = self.header.tokens + i as u64;
                    return Err(DataError::TokenOutOfRange {
                        path: self.path.clone(),
                        position,
                        token,
                        vocabulary: 1 << 16,
                    });
                }
            };
            written.map_err(DataError::io(&self.partial, "write"))?;
        }
        self.header.tokens = total;
        Ok(())
    }

    /// Completes the header, syncs, renames; returns the header and the blake3 checksum of the whole file.
    pub fn finish(mut self) -> Result<(ShardHeader, String)> {
        let file = self.file.take().expect("finish runs once").into_inner().map_err(|e| e.into_error());
        let sync = |file: File| {
            file.write_all_at(&self.header.to_bytes(), 0)?;
            file.sync_all()
        };
        file.and_then(sync).map_err(DataError::io(&self.partial, "write"))?;
        let checksum = files::blake3_of_file(&self.partial)?;
        files::publish(&self.partial, &self.path)?;
        self.published = true;
        Ok((self.header, checksum))
    }
}

impl Drop for ShardWriter {
    fn drop(&mut self) {
        // An abandoned shard must not fill the disk; if it cannot be removed either, the next attempt overwrites it.
        if !self.published {
            drop(self.file.take());
            let _ = fs::remove_file(&self.partial);
        }
    }
}
