//! The shards of one split, one after another.

use crate::data::Result;
use crate::data::dataset::SplitName;
use crate::data::manifest::ShardEntry;
use crate::data::shard::ShardWriter;
use crate::data::tokens::TokenWidth;
use std::path::Path;

/// The shards of one split as they are written.
pub(super) struct SplitWriter {
    pub(super) name: SplitName,
    width: TokenWidth,
    /// Documents that finished shards hold already and that still come by in the input.
    pub(super) done_documents: u64,
    next_shard: usize,
    pub(super) shard: Option<ShardWriter>,
    /// Of the open shard.
    text_bytes: u64,
    documents: u64,
}

impl SplitWriter {
    pub(super) fn new(name: SplitName, width: TokenWidth, finished: &[ShardEntry]) -> Self {
        let done_documents = finished.iter().map(|shard| shard.documents).sum();
        Self { name, width, done_documents, next_shard: finished.len(), shard: None, text_bytes: 0, documents: 0 }
    }

    fn file_name(&self) -> String {
        format!("{}_{:06}.bin", self.name, self.next_shard)
    }

    pub(super) fn push(&mut self, folder: &Path, end_of_text: u32, tokens: &[u32], text_bytes: usize) -> Result<()> {
        let shard = match &mut self.shard {
            Some(shard) => shard,
            None => {
                let shard = ShardWriter::create(&folder.join(self.file_name()), self.width)?;
                self.shard.insert(shard)
            }
        };
        shard.push(&[end_of_text])?;
        shard.push(tokens)?;
        self.text_bytes += text_bytes as u64;
        self.documents += 1;
        Ok(())
    }

    pub(super) fn finish_shard(&mut self) -> Result<Option<ShardEntry>> {
        let Some(shard) = self.shard.take() else { return Ok(None) };
        let (header, blake3) = shard.finish()?;
        let entry = ShardEntry {
            file: self.file_name(),
            file_bytes: header.file_bytes(),
            tokens: header.tokens,
            text_bytes: std::mem::take(&mut self.text_bytes),
            documents: std::mem::take(&mut self.documents),
            blake3,
        };
        self.next_shard += 1;
        Ok(Some(entry))
    }
}
