//! Errors of the data side: each names the file and carries the numbers that disagree.

use std::path::{Path, PathBuf};

/// Result with a [`DataError`].
pub type Result<T, E = DataError> = std::result::Result<T, E>;

/// What is wrong inside a file; the parsers, which see only bytes, return this.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The file ends before its header does.
    #[error("too short for {what}: {found} bytes, {expected} are needed")]
    TooShort {
        /// The part that does not fit.
        what: &'static str,
        /// Bytes there are.
        found: u64,
        /// Bytes there must be.
        expected: u64,
    },
    /// Another format, or a damaged header.
    #[error("wrong magic: found {found}, expected {expected}")]
    Magic {
        /// What stands in the file.
        found: String,
        /// What would be accepted.
        expected: &'static str,
    },
    /// The right format in a version not known here.
    #[error("version {found} is not supported, expected {expected}")]
    Version {
        /// What stands in the file.
        found: i128,
        /// What would be accepted.
        expected: i128,
    },
    /// A data type that does not hold token ids.
    #[error("data type code {found} is not supported: token ids are 4 (i32) or 8 (u16)")]
    DataType {
        /// Code in the file.
        found: u8,
    },
    /// The header and the size of the file do not agree.
    #[error("the file has {found} bytes, but its header says {expected}")]
    Size {
        /// Bytes of the file.
        found: u64,
        /// Bytes that the header asks for.
        expected: u64,
    },
    /// A count or offset that cannot be.
    #[error("{what} is {found}, allowed is {allowed}")]
    Range {
        /// The field.
        what: String,
        /// Its value.
        found: i128,
        /// What it may be.
        allowed: String,
    },
    /// JSON that does not parse, or not as this file's schema.
    #[error("not valid: {0}")]
    Json(String),
    /// Two statements of one file contradict each other.
    #[error("{what}: {left} in one place, {right} in another")]
    Contradiction {
        /// What is stated twice.
        what: String,
        /// First value.
        left: String,
        /// Second value.
        right: String,
    },
}

/// Everything that can go wrong between a text file and a batch.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The operating system refused.
    #[error("{}: cannot {action}: {source}", .path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Its reason.
        source: std::io::Error,
    },
    /// A file that is not what it should be.
    #[error("{}: {error}", .path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: FormatError,
    },
    /// A shard whose size is not the one in the manifest.
    #[error("{}: the file has {found} bytes, the manifest says {expected}: truncated or replaced", .path.display())]
    ManifestSize {
        /// The shard.
        path: PathBuf,
        /// Bytes of the file.
        found: u64,
        /// Bytes in the manifest.
        expected: u64,
    },
    /// A shard whose header counts other tokens than the manifest.
    #[error("{}: the header counts {found} tokens, the manifest says {expected}", .path.display())]
    ManifestTokens {
        /// The shard.
        path: PathBuf,
        /// Tokens by the header.
        found: u64,
        /// Tokens by the manifest.
        expected: u64,
    },
    /// Contents that are not those that were written.
    #[error("{}: blake3 checksum is {found}, the manifest says {expected}: the file was damaged or replaced", .path.display())]
    Checksum {
        /// The file.
        path: PathBuf,
        /// Checksum of its bytes.
        found: String,
        /// Checksum in the manifest.
        expected: String,
    },
    /// A read past the end, also of a file that shrank after it was opened.
    #[error("{}: cannot read {what} {start}..{end} of {len}", .path.display())]
    OutOfBounds {
        /// The file.
        path: PathBuf,
        /// "tokens" or "bytes".
        what: &'static str,
        /// First one wanted.
        start: u64,
        /// One past the last wanted.
        end: u64,
        /// How many there are.
        len: u64,
    },
    /// A token id that the vocabulary does not have.
    #[error("{}: token {token} at position {position} is not below the vocabulary size {vocabulary}", .path.display())]
    TokenOutOfRange {
        /// The file (or what stands for it).
        path: PathBuf,
        /// Position in the file, in tokens.
        position: u64,
        /// The id.
        token: u32,
        /// The vocabulary size.
        vocabulary: u64,
    },
    /// A tokenizer larger than the vocabulary it is to be used with.
    #[error("{}: token id {id} does not fit the declared vocabulary of {declared}", .path.display())]
    TokenizerTooLarge {
        /// The tokenizer file.
        path: PathBuf,
        /// Its largest id.
        id: u32,
        /// The declared vocabulary size.
        declared: u32,
    },
    /// A tokenizer that cannot be read, trained or used.
    #[error("{}: {reason}", .path.display())]
    Tokenizer {
        /// The tokenizer file (or what stands for it).
        path: PathBuf,
        /// What went wrong.
        reason: String,
    },
    /// A line of a JSON lines file that is not a document.
    #[error("{}: line {line}: {reason}", .path.display())]
    JsonLine {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: u64,
        /// What was wrong.
        reason: String,
    },
    /// An input that yields nothing usable, or cannot be used as asked.
    #[error("{0}")]
    Input(String),
    /// The split has fewer tokens than one window.
    #[error("{split}: a sequence of {sequence_length} tokens is longer than the data, which has {tokens} tokens")]
    SequenceTooLong {
        /// Which data.
        split: String,
        /// Tokens of a window.
        sequence_length: u64,
        /// Tokens there are.
        tokens: u64,
    },
    /// A batch that does not fit the 32-bit offsets of the kernels.
    #[error("a batch of {count} windows of {sequence_length} tokens is not possible: between 1 and {max} tokens fit")]
    BatchSize {
        /// Windows asked for.
        count: u64,
        /// Tokens of a window.
        sequence_length: u64,
        /// Most tokens of a batch.
        max: u64,
    },
    /// The output folder holds something else.
    #[error("{}: holds data prepared from other inputs or options ({difference}); give another folder or delete this one", .path.display())]
    OtherPreparation {
        /// The output folder.
        path: PathBuf,
        /// The first thing that differs.
        difference: String,
    },
    /// The caller's progress function asked to stop.
    #[error("preparation stopped: {0}; the same command continues it")]
    Stopped(String),
    /// The prefetch thread is gone.
    #[error("the prefetch thread ended: {0}")]
    Prefetch(String),
}

impl DataError {
    /// For `map_err` on an I/O result.
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { path, action, source }
    }

    /// For `map_err` on a parser's result.
    pub(crate) fn format(path: &Path) -> impl FnOnce(FormatError) -> Self {
        let path = path.to_path_buf();
        move |error| Self::Format { path, error }
    }
}
