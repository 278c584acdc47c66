//! A prepared folder, and a split of it as one stream of tokens.

use super::files;
use super::manifest::{Manifest, SplitEntry, TokenizerEntry};
use super::shard::ShardReader;
use super::tokenizer::Tokenizer;
use super::tokens::{MemoryTokens, TokenFormat, TokenSource, check_range, open_tokens};
use super::{DataError, Result};
use rayon::prelude::*;
use std::fmt;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The two parts of a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SplitName {
    /// Trained on.
    Train,
    /// Held out.
    Valid,
}

impl fmt::Display for SplitName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Train => "train",
            Self::Valid => "valid",
        })
    }
}

/// An opened folder that `prepare` wrote.
pub struct Dataset {
    folder: PathBuf,
    manifest: Manifest,
}

impl Dataset {
    /// Reads the manifest and compares the size of every shard with it; [`verify_checksums`](Self::verify_checksums)
    /// also reads their bytes.
    pub fn open(folder: &Path) -> Result<Self> {
        let dataset = Self { folder: folder.to_path_buf(), manifest: Manifest::read(folder)? };
        for shard in dataset.manifest.train.shards.iter().chain(&dataset.manifest.valid.shards) {
            let path = folder.join(&shard.file);
            let found = fs::metadata(&path).map_err(DataError::io(&path, "open"))?.len();
            if found != shard.file_bytes {
                return Err(DataError::ManifestSize { path, found, expected: shard.file_bytes });
            }
        }
        Ok(dataset)
    }

    /// What the folder holds.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Compares the contents of every shard and of the tokenizer with the manifest, in parallel.
    pub fn verify_checksums(&self) -> Result<()> {
        let shards = self.manifest.train.shards.iter().chain(&self.manifest.valid.shards);
        let mut files: Vec<_> = shards.map(|shard| (&shard.file, &shard.blake3)).collect();
        if let TokenizerEntry::File { file, blake3 } = &self.manifest.tokenizer {
            files.push((file, blake3));
        }
        files.par_iter().try_for_each(|(file, expected)| {
            let path = self.folder.join(file);
            let found = files::blake3_of_file(&path)?;
            check_sum(path, found, expected)
        })
    }

    /// The tokenizer that the ids were made with. Fails when it was changed or has ids outside the vocabulary.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let TokenizerEntry::File { file, blake3 } = &self.manifest.tokenizer else {
            return Ok(Tokenizer::Bytes);
        };
        let path = self.folder.join(file);
        let json = files::read(&path)?;
        check_sum(path.clone(), blake3::hash(&json).to_hex().to_string(), blake3)?;
        Tokenizer::with_end_of_text_id(&path, json, self.manifest.end_of_text, self.manifest.vocabulary_size)
    }

    /// One split as a stream of tokens.
    pub fn split(&self, name: SplitName) -> Result<TokenStream> {
        let entry = self.entry(name);
        let mut sources: Vec<Box<dyn TokenSource>> = Vec::new();
        for shard in &entry.shards {
            let reader = ShardReader::open(&self.folder.join(&shard.file))?;
            if reader.len() != shard.tokens {
                let (path, found, expected) = (reader.path().to_path_buf(), reader.len(), shard.tokens);
                return Err(DataError::ManifestTokens { path, found, expected });
            }
            sources.push(Box::new(reader));
        }
        let mut stream = TokenStream::new(name.to_string(), sources, self.manifest.vocabulary_size)?;
        stream.end_of_text = Some(self.manifest.end_of_text);
        stream.token_lengths = Some(self.tokenizer()?.token_lengths().into());
        Ok(stream)
    }

    /// The manifest's entry of a split.
    pub fn entry(&self, name: SplitName) -> &SplitEntry {
        match name {
            SplitName::Train => &self.manifest.train,
            SplitName::Valid => &self.manifest.valid,
        }
    }
}

fn check_sum(path: PathBuf, found: String, expected: &str) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(DataError::Checksum { path, found, expected: expected.to_string() })
}

/// Token sources laid end to end, with what is needed to understand their ids.
pub struct TokenStream {
    name: String,
    sources: Vec<Box<dyn TokenSource>>,
    /// Where each source begins, and the end of the last.
    starts: Vec<u64>,
    vocabulary: u32,
    pub(crate) end_of_text: Option<u32>,
    pub(crate) token_lengths: Option<Arc<[u32]>>,
}

impl TokenStream {
    /// A stream that does not know its end-of-text token yet. `name` is for error messages. Fails on a vocabulary
    /// that labels of 32 bits with a sign cannot hold.
    pub fn new(name: impl Into<String>, sources: Vec<Box<dyn TokenSource>>, vocabulary: u32) -> Result<Self> {
        let name = name.into();
        if vocabulary == 0 || vocabulary > i32::MAX as u32 {
            return Err(DataError::Input(format!("{name}: a vocabulary of {vocabulary} tokens is not possible")));
        }
        let mut starts = vec![0];
        for source in &sources {
            starts.push(starts[starts.len() - 1] + source.len());
        }
        Ok(Self { name, sources, starts, vocabulary, end_of_text: None, token_lengths: None })
    }

    /// Token files made by other programs, in the order given.
    pub fn open(files: &[PathBuf], format: TokenFormat, vocabulary: u32) -> Result<Self> {
        let sources = files.iter().map(|file| open_tokens(file, format)).collect::<Result<_>>()?;
        Self::new(format!("{} token files", files.len()), sources, vocabulary)
    }

    /// One text, tokenized on the spot, as one document: an end-of-text token and its ids.
    pub fn from_text(name: impl Into<String>, text: &[u8], tokenizer: &Tokenizer) -> Result<Self> {
        let name = name.into();
        let mut tokens = vec![tokenizer.end_of_text()];
        tokens.extend(tokenizer.encode(text)?);
        let source = MemoryTokens::new(&name, tokens);
        Ok(Self::new(name, vec![Box::new(source)], tokenizer.vocab_size())?.with_tokenizer(tokenizer))
    }

    /// The stream with documents beginning at this id.
    pub fn with_end_of_text(mut self, id: u32) -> Self {
        self.end_of_text = Some(id);
        self
    }

    /// The stream with the end-of-text token and the token lengths of this tokenizer.
    pub fn with_tokenizer(mut self, tokenizer: &Tokenizer) -> Self {
        self.end_of_text = Some(tokenizer.end_of_text());
        self.token_lengths = Some(tokenizer.token_lengths().into());
        self
    }

    /// What the data is called in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Number of tokens.
    pub fn len(&self) -> u64 {
        self.starts[self.sources.len()]
    }

    /// Whether there is no token at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Every id is below it.
    pub fn vocabulary(&self) -> u32 {
        self.vocabulary
    }

    /// The id that begins a document, where it is known.
    pub fn end_of_text(&self) -> Option<u32> {
        self.end_of_text
    }

    /// The ids at `range`. Fails on a range outside the stream, on I/O, and on an id that the vocabulary does not have.
    pub fn read(&self, range: Range<u64>) -> Result<Vec<u32>> {
        check_range(Path::new(&self.name), &range, self.len())?;
        let mut tokens = Vec::with_capacity((range.end - range.start) as usize);
        let mut source = self.starts.partition_point(|start| *start <= range.start).saturating_sub(1);
        let mut position = range.start;
        while position < range.end {
            let end = range.end.min(self.starts[source + 1]);
            if end > position {
                let first = position - self.starts[source];
                tokens.extend(self.read_source(source, first..end - self.starts[source])?);
                position = end;
            }
            source += 1;
        }
        Ok(tokens)
    }

    fn read_source(&self, source: usize, range: Range<u64>) -> Result<Vec<u32>> {
        let source = &self.sources[source];
        let tokens = source.read_tokens(range.clone())?;
        if let Some(at) = tokens.iter().position(|token| *token >= self.vocabulary) {
            return Err(DataError::TokenOutOfRange {
                path: source.path().to_path_buf(),
                position: range.start + at as u64,
                token: tokens[at],
                vocabulary: self.vocabulary.into(),
            });
        }
        Ok(tokens)
    }
}
