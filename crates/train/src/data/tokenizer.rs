//! Text to token ids and back: bytes, or any Hugging Face `tokenizer.json`.

use super::files;
use super::{DataError, Result};
use rayon::prelude::*;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokenizers::AddedToken;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// Vocabulary size of [`Tokenizer::Bytes`].
pub const BYTE_VOCABULARY: u32 = 257;

/// End-of-text id of [`Tokenizer::Bytes`].
pub const BYTE_END_OF_TEXT: u32 = 256;

/// The end-of-text token of tokenizers trained here.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// Names under which other tokenizers have it, in the order of trying.
const END_OF_TEXT_NAMES: [&str; 5] = [END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]"];

/// Longer texts are encoded in pieces of about this many bytes, in parallel and with bounded memory.
const PIECE_BYTES: usize = 1 << 20;

/// Turns text into token ids and back.
#[derive(Clone)]
pub enum Tokenizer {
    /// One id per byte (0..=255) and 256 for end of text: works for every text in every language, and for no text.
    Bytes,
    /// A Hugging Face tokenizer.
    HuggingFace(Arc<HuggingFace>),
}

/// A loaded `tokenizer.json`.
pub struct HuggingFace {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
    json: Vec<u8>,
    end_of_text: u32,
    /// Bytes of each id's text; none for an id that has no token.
    token_bytes: Vec<Option<Vec<u8>>>,
    /// Tokens are bytes in GPT-2's disguise, so ids map to bytes exactly.
    byte_level: bool,
    /// Text may be cut between lines without changing its ids.
    pieces: bool,
}

impl Tokenizer {
    /// Loads a `tokenizer.json`.
    ///
    /// `end_of_text` names the token put before each document; without it the usual names are tried. `declared` is a
    /// vocabulary size that all ids must be below. Fails when the file is not a tokenizer, the token is not in it, or
    /// an id is too large.
    pub fn from_file(path: &Path, end_of_text: Option<&str>, declared: Option<u32>) -> Result<Self> {
        Self::from_json(path, files::read(path)?, end_of_text, declared)
    }

    /// As [`from_file`](Self::from_file) with the contents at hand; `path` is for error messages.
    pub fn from_json(path: &Path, json: Vec<u8>, end_of_text: Option<&str>, declared: Option<u32>) -> Result<Self> {
        let names = end_of_text.map_or(END_OF_TEXT_NAMES.to_vec(), |name| vec![name]);
        let find = |vocabulary: &HashMap<String, u32>| {
            let id = names.iter().find_map(|name| vocabulary.get(*name).copied());
            id.ok_or_else(|| failed(path)(format!("no end-of-text token: looked for {names:?}")))
        };
        Self::build(path, json, find, declared)
    }

    /// As [`from_json`](Self::from_json) for an end-of-text id that a manifest has fixed already.
    pub(crate) fn with_end_of_text_id(path: &Path, json: Vec<u8>, end_of_text: u32, declared: u32) -> Result<Self> {
        Self::build(path, json, |_| Ok(end_of_text), Some(declared))
    }

    fn build(
        path: &Path,
        json: Vec<u8>,
        find_end_of_text: impl FnOnce(&HashMap<String, u32>) -> Result<u32>,
        declared: Option<u32>,
    ) -> Result<Self> {
        let mut inner = tokenizers::Tokenizer::from_bytes(&json).map_err(failed(path))?;
        // A document that mentions "<|endoftext|>" holds these characters, not the token.
        inner.set_encode_special_tokens(true);
        // Stored in some files for inference; here every document counts in full.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(failed(path))?;

        let vocabulary = inner.get_vocab(true);
        let id = vocabulary.values().copied().max().ok_or_else(|| failed(path)("it has no tokens"))?;
        if let Some(declared) = declared.filter(|declared| id >= *declared) {
            return Err(DataError::TokenizerTooLarge { path: path.to_path_buf(), id, declared });
        }
        let end_of_text = find_end_of_text(&vocabulary)?;

        let value: Value = serde_json::from_slice(&json).map_err(failed(path))?;
        let byte_level = find_type(&value["decoder"], "ByteLevel").is_some();
        let prefix_space =
            find_type(&value["pre_tokenizer"], "ByteLevel").is_none_or(|p| p["add_prefix_space"] == true);
        let pieces = byte_level && !prefix_space && value["normalizer"].is_null();
        let token_bytes = token_bytes(&inner, &vocabulary, id, byte_level);
        let path = path.to_path_buf();
        Ok(Self::HuggingFace(Arc::new(HuggingFace { path, inner, json, end_of_text, token_bytes, byte_level, pieces })))
    }

    /// Trains a byte-level BPE with GPT-2's pre-tokenizer: 256 bytes, merges, and `<|endoftext|>` as the last id.
    ///
    /// `texts` may be split anywhere at line ends. Fails when `vocabulary_size` is below 257 or the texts are too few
    /// for it. The same texts give the same tokenizer.
    pub fn train_bpe<I>(texts: I, vocabulary_size: u32) -> Result<Self>
    where
        I: Iterator<Item = String> + Send,
    {
        let name = Path::new("new BPE");
        if vocabulary_size < BYTE_VOCABULARY {
            return Err(failed(name)(format!(
                "vocabulary {vocabulary_size} is below the {BYTE_VOCABULARY} that bytes need"
            )));
        }
        let trainer = BpeTrainer::builder()
            .show_progress(false)
            .vocab_size(vocabulary_size as usize - 1)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let mut inner = tokenizers::Tokenizer::new(BPE::default());
        inner.with_pre_tokenizer(Some(ByteLevel::new(false, false, true)));
        inner.with_decoder(Some(ByteLevel::new(false, false, true)));
        inner.train(&mut TrainerWrapper::BpeTrainer(trainer), texts).map_err(failed(name))?;
        inner.add_special_tokens(&[AddedToken::from(END_OF_TEXT, true)]);
        let size = inner.get_vocab_size(true);
        if size != vocabulary_size as usize {
            return Err(failed(name)(format!(
                "the texts are enough for {size} tokens only, {vocabulary_size} were asked for"
            )));
        }
        let json = inner.to_string(true).map_err(failed(name))?;
        Self::from_json(name, json.into_bytes(), Some(END_OF_TEXT), Some(vocabulary_size))
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> u32 {
        match self {
            Self::Bytes => BYTE_VOCABULARY,
            Self::HuggingFace(hf) => hf.token_bytes.len() as u32,
        }
    }

    /// The id put before each document. No text encodes to it.
    pub fn end_of_text(&self) -> u32 {
        match self {
            Self::Bytes => BYTE_END_OF_TEXT,
            Self::HuggingFace(hf) => hf.end_of_text,
        }
    }

    /// The contents of `tokenizer.json`; none for bytes.
    pub fn json(&self) -> Option<&[u8]> {
        match self {
            Self::Bytes => None,
            Self::HuggingFace(hf) => Some(&hf.json),
        }
    }

    /// Text to ids, without end-of-text tokens. Bytes are kept as they are; for a Hugging Face tokenizer invalid UTF-8
    /// is replaced by U+FFFD.
    pub fn encode(&self, text: impl AsRef<[u8]>) -> Result<Vec<u32>> {
        match self {
            Self::Bytes => Ok(text.as_ref().iter().map(|byte| u32::from(*byte)).collect()),
            Self::HuggingFace(hf) => hf.encode(&String::from_utf8_lossy(text.as_ref())),
        }
    }

    /// Ids to text; bytes that are not UTF-8 (a character cut in half) become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        Ok(match String::from_utf8_lossy(&self.decode_bytes(ids)?) {
            Cow::Borrowed(text) => text.to_string(),
            Cow::Owned(text) => text,
        })
    }

    /// Ids to bytes; end of text and other special tokens give none. Fails on an id that has no token.
    pub fn decode_bytes(&self, ids: &[u32]) -> Result<Vec<u8>> {
        let unknown = |path: &Path, position: usize| DataError::TokenOutOfRange {
            path: path.to_path_buf(),
            position: position as u64,
            token: ids[position],
            vocabulary: self.vocab_size().into(),
        };
        match self {
            Self::Bytes => {
                if let Some(position) = ids.iter().position(|id| *id >= BYTE_VOCABULARY) {
                    return Err(unknown(Path::new("byte vocabulary"), position));
                }
                Ok(ids.iter().filter_map(|id| u8::try_from(*id).ok()).collect())
            }
            Self::HuggingFace(hf) => {
                let token = |position: usize| hf.token_bytes.get(ids[position] as usize).and_then(Option::as_deref);
                if let Some(position) = (0..ids.len()).find(|position| token(*position).is_none()) {
                    return Err(unknown(&hf.path, position));
                }
                if hf.byte_level {
                    return Ok((0..ids.len()).flat_map(|i| token(i).unwrap_or_default()).copied().collect());
                }
                Ok(hf.inner.decode(ids, true).map_err(failed(&hf.path))?.into_bytes())
            }
        }
    }

    /// Bytes of text that each id stands for, special tokens none: exact for byte-level tokenizers; for others (with
    /// added spaces or normalization) the length of the token's own text.
    pub fn token_lengths(&self) -> Vec<u32> {
        match self {
            Self::Bytes => (0..BYTE_VOCABULARY).map(|id| u32::from(id < 256)).collect(),
            Self::HuggingFace(hf) => {
                hf.token_bytes.iter().map(|bytes| bytes.as_ref().map_or(0, |bytes| bytes.len() as u32)).collect()
            }
        }
    }
}

impl HuggingFace {
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encode = |piece: &str| match self.inner.encode_fast(piece, false) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(error) => Err(failed(&self.path)(error)),
        };
        if !self.pieces || text.len() <= PIECE_BYTES {
            return encode(text);
        }
        let pieces: Vec<Vec<u32>> =
            line_pieces(text, PIECE_BYTES).par_iter().map(|p| encode(p)).collect::<Result<_>>()?;
        Ok(pieces.concat())
    }
}

/// Cuts a text into pieces of at least `size` bytes that end with a lone newline: no byte-level pre-tokenizer in use
/// (GPT-2's and its successors') has a word that spans one, so the pieces have the ids of the whole.
pub(crate) fn line_pieces(text: &str, size: usize) -> Vec<&str> {
    let (bytes, mut pieces, mut start) = (text.as_bytes(), Vec::new(), 0);
    let graphic = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_alphanumeric);
    let mut at = size;
    while at + 1 < bytes.len() {
        if bytes[at] == b'\n' && graphic(at - 1) && graphic(at + 1) {
            pieces.push(&text[start..=at]);
            start = at + 1;
            at += size;
        }
        at += 1;
    }
    pieces.push(&text[start..]);
    pieces
}

fn failed<E: ToString>(path: &Path) -> impl Fn(E) -> DataError {
    let path = path.to_path_buf();
    move |error| DataError::Tokenizer { path: path.clone(), reason: error.to_string() }
}

/// Finds a component of a given type in the nested sequences of a `tokenizer.json`.
fn find_type<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    match value {
        Value::Object(_) if value["type"] == name => Some(value),
        Value::Object(map) => map.values().find_map(|inner| find_type(inner, name)),
        Value::Array(items) => items.iter().find_map(|inner| find_type(inner, name)),
        _ => None,
    }
}

fn token_bytes(
    inner: &tokenizers::Tokenizer,
    vocabulary: &HashMap<String, u32>,
    largest: u32,
    byte_level: bool,
) -> Vec<Option<Vec<u8>>> {
    let added = inner.get_added_tokens_decoder();
    let byte_of_char = gpt2_bytes();
    let mut table = vec![None; largest as usize + 1];
    for (token, id) in vocabulary {
        table[*id as usize] = Some(match added.get(id) {
            Some(added) if added.special => Vec::new(),
            Some(added) => added.content.clone().into_bytes(),
            None if byte_level => token.chars().filter_map(|c| byte_of_char.get(&c).copied()).collect(),
            None => sentencepiece_bytes(token),
        });
    }
    table
}

/// GPT-2 writes each byte as a visible character: itself when it is one, else the next unused from U+0100 on.
fn gpt2_bytes() -> HashMap<char, u8> {
    let visible = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let disguised = (0..=255).filter(|byte| !visible(byte)).zip('\u{100}'..);
    (0..=255).filter(visible).map(|byte| (char::from(byte), byte)).chain(disguised.map(|(byte, c)| (c, byte))).collect()
}

/// SentencePiece writes a space as U+2581 and a lone byte as `<0x41>`.
fn sentencepiece_bytes(token: &str) -> Vec<u8> {
    let byte = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>')).and_then(|t| u8::from_str_radix(t, 16).ok());
    byte.map_or_else(|| token.replace('\u{2581}', " ").into_bytes(), |byte| vec![byte])
}
