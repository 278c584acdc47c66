//! The tokenizer of a preparation: loaded, or trained on the texts that are not held out.

use super::passes::{Pass, Rule};
use super::{PrepareEvent, PrepareOptions, Progress, TokenizerChoice, list_bytes, tell};
use crate::data::dataset::SplitName;
use crate::data::files;
use crate::data::journal::Journal;
use crate::data::manifest::TokenizerEntry;
use crate::data::source::{Document, Documents};
use crate::data::tokenizer::{Tokenizer, line_pieces};
use crate::data::{DataError, Result};

/// Name of the tokenizer in the output folder.
const TOKENIZER_FILE: &str = "tokenizer.json";

/// Training reads texts in pieces of this many bytes.
const PIECE_BYTES: usize = 64 << 10;

/// Loads or trains the tokenizer and puts it into the folder, unless it is there since an earlier attempt.
pub(super) fn make_tokenizer(
    options: &PrepareOptions,
    passes: &[Pass],
    journal: &mut Journal,
    progress: &mut Progress,
) -> Result<Tokenizer> {
    let path = options.output.join(TOKENIZER_FILE);
    let tokenizer = match (&options.tokenizer, &journal.tokenizer) {
        (TokenizerChoice::Bytes, _) => Tokenizer::Bytes,
        (TokenizerChoice::TrainBpe { .. }, Some(_)) => Tokenizer::from_file(&path, None, None)?,
        (TokenizerChoice::TrainBpe { vocabulary_size, sample_bytes }, None) => {
            let bytes = list_bytes(&passes[0].list).min(*sample_bytes);
            tell(progress, PrepareEvent::Phase { name: "training the tokenizer on", bytes })?;
            let mut failure = None;
            let texts = TrainingTexts::new(&passes[0], *sample_bytes, progress, &mut failure);
            let trained = Tokenizer::train_bpe(texts, *vocabulary_size);
            // The trainer takes texts and not errors: it saw the end of the texts where an error was.
            failure.map_or(Ok(()), Err)?;
            trained?
        }
        (TokenizerChoice::File { path, end_of_text, vocabulary_size }, _) => {
            Tokenizer::from_file(path, end_of_text.as_deref(), *vocabulary_size)?
        }
    };
    journal.tokenizer = Some(match tokenizer.json() {
        None => TokenizerEntry::Bytes {},
        Some(json) => {
            files::write_atomically(&path, json)?;
            TokenizerEntry::File { file: TOKENIZER_FILE.into(), blake3: blake3::hash(json).to_hex().to_string() }
        }
    });
    journal.write(&options.output)?;
    Ok(tokenizer)
}

/// Texts for the tokenizer's training, in pieces.
struct TrainingTexts<'a, 'p> {
    documents: Documents<'a>,
    rule: Rule,
    index: u64,
    left: u64,
    pieces: std::vec::IntoIter<String>,
    progress: &'a mut Progress<'p>,
    failure: &'a mut Option<DataError>,
}

impl<'a, 'p> TrainingTexts<'a, 'p> {
    fn new(pass: &'a Pass, left: u64, progress: &'a mut Progress<'p>, failure: &'a mut Option<DataError>) -> Self {
        let documents = Documents::new(&pass.list.files);
        Self { documents, rule: pass.rule, index: 0, left, pieces: Vec::new().into_iter(), progress, failure }
    }

    fn next_document(&mut self) -> Result<Option<Document>> {
        while let Some(document) = self.documents.next().transpose()? {
            tell(self.progress, PrepareEvent::Read { bytes: self.documents.bytes_read() })?;
            self.index += 1;
            if self.rule.split(self.index - 1, &document.name) == SplitName::Train {
                return Ok(Some(document));
            }
        }
        Ok(None)
    }
}

impl Iterator for TrainingTexts<'_, '_> {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        loop {
            if self.left == 0 || self.failure.is_some() {
                return None;
            }
            if let Some(piece) = self.pieces.next() {
                self.left = self.left.saturating_sub(piece.len() as u64);
                return Some(piece);
            }
            match self.next_document() {
                Ok(document) => {
                    let text = document?.text;
                    let text = String::from_utf8_lossy(&text);
                    let pieces: Vec<_> = line_pieces(&text, PIECE_BYTES).into_iter().map(String::from).collect();
                    self.pieces = pieces.into_iter();
                }
                Err(error) => *self.failure = Some(error),
            }
        }
    }
}
