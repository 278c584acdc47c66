//! From documents to shards: tokenized in parallel, written in order.

use super::passes::Pass;
use super::split_writer::SplitWriter;
use super::{PrepareEvent, PrepareOptions, Progress, Validation, list_bytes, tell};
use crate::data::dataset::SplitName;
use crate::data::journal::Journal;
use crate::data::manifest::{FORMAT_VERSION, Manifest, SplitEntry};
use crate::data::shard::ShardWriter;
use crate::data::source::{Document, Documents};
use crate::data::tokenizer::Tokenizer;
use crate::data::tokens::TokenWidth;
use crate::data::{DataError, Result};
use rayon::prelude::*;

/// Documents are tokenized together until they have this many bytes, or this many are together.
const BATCH_BYTES: usize = 16 << 20;
const BATCH_DOCUMENTS: usize = 4096;

/// Writes all shards that the journal does not have yet; returns the manifest, which is not written.
pub(super) fn write_shards(
    options: &PrepareOptions,
    passes: &[Pass],
    tokenizer: Tokenizer,
    vocabulary_size: u32,
    journal: &mut Journal,
    progress: &mut Progress,
) -> Result<Manifest> {
    let width = TokenWidth::for_vocabulary(vocabulary_size);
    let mut train = SplitWriter::new(SplitName::Train, width, &journal.train);
    let mut valid = SplitWriter::new(SplitName::Valid, width, &journal.valid);
    let mut writing = Writing { options, tokenizer, journal, progress, empty_documents: 0, replaced_documents: 0 };
    for pass in passes {
        writing.run(pass, &mut train, &mut valid)?;
    }
    for split in [&mut train, &mut valid] {
        writing.finish_shard(split)?;
    }
    writing.manifest(passes, vocabulary_size)
}

/// A preparation under way.
struct Writing<'a, 'p> {
    options: &'a PrepareOptions,
    tokenizer: Tokenizer,
    journal: &'a mut Journal,
    progress: &'a mut Progress<'p>,
    empty_documents: u64,
    replaced_documents: u64,
}

impl Writing<'_, '_> {
    /// Reads the documents of one pass, tokenizes them in batches and hands them to their splits in order.
    fn run(&mut self, pass: &Pass, train: &mut SplitWriter, valid: &mut SplitWriter) -> Result<()> {
        tell(self.progress, PrepareEvent::Phase { name: "tokenizing", bytes: list_bytes(&pass.list) })?;
        let mut documents = Documents::new(&pass.list.files);
        let (mut index, mut batch, mut batch_bytes) = (0, Vec::new(), 0);
        loop {
            let document = documents.next().transpose()?;
            let last = document.is_none();
            if let Some(mut document) = document {
                let split = pass.rule.split(index, &document.name);
                index += 1;
                self.make_utf8(&mut document);
                let writer = if split == SplitName::Train { &mut *train } else { &mut *valid };
                if writer.done_documents > 0 {
                    writer.done_documents -= 1; // in a shard that was finished before the interruption
                } else {
                    batch_bytes += document.text.len();
                    batch.push((split, document));
                }
            }
            if last || batch_bytes >= BATCH_BYTES || batch.len() >= BATCH_DOCUMENTS {
                self.write_batch(&batch, train, valid)?;
                tell(self.progress, PrepareEvent::Read { bytes: documents.bytes_read() })?;
                batch.clear();
                batch_bytes = 0;
            }
            if last {
                self.empty_documents += documents.empty_documents();
                return Ok(());
            }
        }
    }

    /// Text for a Hugging Face tokenizer is made UTF-8; for bytes it stays as it is.
    fn make_utf8(&mut self, document: &mut Document) {
        if self.tokenizer.json().is_some() && std::str::from_utf8(&document.text).is_err() {
            document.text = String::from_utf8_lossy(&document.text).into_owned().into_bytes();
            self.replaced_documents += 1;
        }
    }

    fn write_batch(
        &mut self,
        batch: &[(SplitName, Document)],
        train: &mut SplitWriter,
        valid: &mut SplitWriter,
    ) -> Result<()> {
        let tokenizer = &self.tokenizer;
        let encoded: Vec<_> = batch.par_iter().map(|(_, d)| tokenizer.encode(&d.text)).collect::<Result<_>>()?;
        for ((split, document), tokens) in batch.iter().zip(encoded) {
            let writer = if *split == SplitName::Train { &mut *train } else { &mut *valid };
            let open = writer.shard.as_ref().map_or(0, ShardWriter::tokens);
            if open > 0 && open + 1 + tokens.len() as u64 > self.options.shard_tokens {
                self.finish_shard(writer)?;
            }
            writer.push(&self.options.output, self.tokenizer.end_of_text(), &tokens, document.text.len())?;
        }
        Ok(())
    }

    fn finish_shard(&mut self, split: &mut SplitWriter) -> Result<()> {
        let Some(entry) = split.finish_shard()? else { return Ok(()) };
        let shards = match split.name {
            SplitName::Train => &mut self.journal.train,
            SplitName::Valid => &mut self.journal.valid,
        };
        shards.push(entry.clone());
        self.journal.write(&self.options.output)?;
        tell(self.progress, PrepareEvent::Shard { split: split.name, shard: &entry })
    }

    fn manifest(self, passes: &[Pass], vocabulary_size: u32) -> Result<Manifest> {
        let manifest = Manifest {
            format_version: FORMAT_VERSION,
            vocabulary_size,
            end_of_text: self.tokenizer.end_of_text(),
            tokenizer: self.journal.tokenizer.clone().expect("set by make_tokenizer"),
            train: SplitEntry::from_shards(self.journal.train.clone()),
            valid: SplitEntry::from_shards(self.journal.valid.clone()),
            source_files: passes.iter().map(|pass| pass.list.files.len() as u64).sum(),
            binary_files: passes.iter().map(|pass| pass.list.binary_files).sum(),
            empty_documents: self.empty_documents,
            replaced_documents: self.replaced_documents,
        };
        let (train, valid) = (manifest.train.documents, manifest.valid.documents);
        if train == 0 || (valid == 0 && self.options.validation != Validation::None) {
            return Err(DataError::Input(format!(
                "{train} documents to train on and {valid} to validate on: hold out another fraction or number of \
                 documents, give validation inputs, or hold out none"
            )));
        }
        if manifest.replaced_documents > 0 {
            tracing::warn!("{} documents had invalid UTF-8, replaced by U+FFFD", manifest.replaced_documents);
        }
        if manifest.empty_documents > 0 || manifest.binary_files > 0 {
            tracing::info!(
                "left out: {} empty documents, {} binary files",
                manifest.empty_documents,
                manifest.binary_files
            );
        }
        Ok(manifest)
    }
}
