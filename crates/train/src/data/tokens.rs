//! Token files of any format behind one trait.

use super::files::DataFile;
use super::megatron::MegatronTokens;
use super::shard::ShardReader;
use super::{DataError, FormatError, Result};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A run of token ids that can be read at any place, by several threads at once.
pub trait TokenSource: Send + Sync {
    /// The file, for error messages.
    fn path(&self) -> &Path;

    /// Number of tokens.
    fn len(&self) -> u64;

    /// Whether there is no token at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The ids at `range`, which is in tokens. Fails when the range does not lie within `0..len()` or the file cannot
    /// be read there.
    fn read_tokens(&self, range: Range<u64>) -> Result<Vec<u32>>;
}

/// Formats of token files. It is always named, never guessed: a nanoGPT file has no header, so a damaged file of any
/// other format would pass for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TokenFormat {
    /// 1024-byte header and 16- or 32-bit ids: what `prepare` writes.
    Llmc,
    /// Bare 16-bit ids.
    #[serde(rename = "nanogpt")]
    NanoGpt,
    /// An `.idx` file with a `.bin` file beside it.
    Megatron,
}

/// Opens a token file; of a Megatron pair, either file may be named.
pub fn open_tokens(path: &Path, format: TokenFormat) -> Result<Box<dyn TokenSource>> {
    Ok(match format {
        TokenFormat::Llmc => Box::new(ShardReader::open(path)?),
        TokenFormat::NanoGpt => Box::new(NanoGptTokens::open(path)?),
        TokenFormat::Megatron => Box::new(MegatronTokens::open(path)?),
    })
}

/// Bytes of one token id on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenWidth {
    /// 16 bits, unsigned.
    U16,
    /// 32 bits.
    U32,
}

impl TokenWidth {
    /// The narrower width that holds every id of a vocabulary of this size.
    pub fn for_vocabulary(size: u32) -> Self {
        if size <= 1 << 16 { Self::U16 } else { Self::U32 }
    }

    /// Bytes of one id.
    pub fn bytes(self) -> u64 {
        match self {
            Self::U16 => 2,
            Self::U32 => 4,
        }
    }

    /// Little-endian bytes to ids; a remainder shorter than one id is left out.
    pub fn decode(self, bytes: &[u8]) -> Vec<u32> {
        match self {
            Self::U16 => bytes.as_chunks::<2>().0.iter().map(|b| u32::from(u16::from_le_bytes(*b))).collect(),
            Self::U32 => bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect(),
        }
    }
}

/// Checks a range of tokens against the length of its source.
pub(crate) fn check_range(path: &Path, range: &Range<u64>, len: u64) -> Result<()> {
    if range.start <= range.end && range.end <= len {
        return Ok(());
    }
    let path = path.to_path_buf();
    Err(DataError::OutOfBounds { path, what: "tokens", start: range.start, end: range.end, len })
}

/// nanoGPT's `.bin`: 16-bit ids and nothing else; the end-of-text token *follows* each document there.
pub struct NanoGptTokens {
    file: DataFile,
}

impl NanoGptTokens {
    /// Opens the file; an odd number of bytes is refused.
    pub fn open(path: &Path) -> Result<Self> {
        let file = DataFile::open(path)?;
        if file.len % 2 != 0 {
            let error = FormatError::Contradiction {
                what: "16-bit tokens".into(),
                left: "2 bytes each".into(),
                right: format!("a file of {} bytes", file.len),
            };
            return Err(DataError::format(path)(error));
        }
        Ok(Self { file })
    }
}

impl TokenSource for NanoGptTokens {
    fn path(&self) -> &Path {
        &self.file.path
    }

    fn len(&self) -> u64 {
        self.file.len / 2
    }

    fn read_tokens(&self, range: Range<u64>) -> Result<Vec<u32>> {
        check_range(self.path(), &range, self.len())?;
        let bytes = self.file.read_at(range.start * 2, (range.end - range.start) as usize * 2)?;
        Ok(TokenWidth::U16.decode(&bytes))
    }
}

/// Tokens held in memory: text tokenized on the spot, and tests.
pub struct MemoryTokens {
    name: PathBuf,
    tokens: Vec<u32>,
}

impl MemoryTokens {
    /// `name` stands for the path in error messages.
    pub fn new(name: impl Into<PathBuf>, tokens: Vec<u32>) -> Self {
        Self { name: name.into(), tokens }
    }
}

impl TokenSource for MemoryTokens {
    fn path(&self) -> &Path {
        &self.name
    }

    fn len(&self) -> u64 {
        self.tokens.len() as u64
    }

    fn read_tokens(&self, range: Range<u64>) -> Result<Vec<u32>> {
        check_range(&self.name, &range, self.len())?;
        Ok(self.tokens[range.start as usize..range.end as usize].to_vec())
    }
}
