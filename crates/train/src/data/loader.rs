//! Windows of a token stream, packed into batches.
//!
//! With `S` tokens to a sequence, window `i` has the tokens `[i S, (i + 1) S)` of the stream as inputs; what is left
//! over at the end is not used for training. A batch lays windows end to end in one row. A document begins at every
//! end-of-text token and at every window's first token, and `cu_seqlens` tells where, so that attention does not cross.
//! The label of a token is the next token of the stream, except where that one begins a document (or there is none):
//! a document's end does not predict the next document.

use super::dataset::TokenStream;
use super::order::WindowOrder;
use super::{DataError, Result};
use serde::{Deserialize, Serialize};

/// The label of a token that predicts nothing.
pub const IGNORED_LABEL: i32 = -100;

/// The whole state of the loader, as a checkpoint keeps it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cursor {
    /// Windows consumed by all ranks together since the start of training.
    pub position: u64,
}

impl Cursor {
    /// The epoch that the next window belongs to.
    pub fn epoch(&self, windows: u64) -> u64 {
        self.position / windows
    }
}

/// A rank's share of the windows of every step: the order of the data does not depend on how many ranks there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Windows of a step over all ranks, a multiple of `ranks`.
    pub sequences: usize,
    /// Whose share.
    pub rank: usize,
    /// Ranks that share.
    pub ranks: usize,
    /// Windows of one batch; divides the rank's share.
    pub at_once: usize,
}

impl Share {
    fn windows(&self) -> usize {
        self.sequences / self.ranks
    }

    /// Batches of the rank in each step.
    pub fn batches(&self) -> usize {
        self.windows() / self.at_once
    }

    /// Position and number of windows of the rank's batch `index` in a step whose first window is at `position`.
    pub fn batch(&self, position: u64, index: usize) -> (u64, usize) {
        (position + (self.rank * self.windows() + index * self.at_once) as u64, self.at_once)
    }

    /// Those of all steps from `cursor` on, one behind the other: what [`super::Prefetch`] is asked for.
    pub fn requests(self, cursor: Cursor) -> impl Iterator<Item = (u64, usize)> + Send + 'static {
        let steps = (0..).map(move |step: u64| cursor.position + step * self.sequences as u64);
        steps.flat_map(move |position| (0..self.batches()).map(move |index| self.batch(position, index)))
    }
}

/// One row of packed documents.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids.
    pub ids: Vec<u32>,
    /// The token that follows each, or [`IGNORED_LABEL`].
    pub labels: Vec<i32>,
    /// Offset of each document and, last, the number of tokens.
    pub cu_seqlens: Vec<i32>,
    /// Labels that are not ignored: what the sum of the loss is divided by.
    pub valid_tokens: usize,
    /// Bytes of text that those labels stand for; none when the stream does not know its tokenizer.
    pub text_bytes: Option<u64>,
}

/// Addresses the windows of a stream by their position in training.
pub struct Loader {
    stream: TokenStream,
    sequence_length: u64,
    order: WindowOrder,
}

impl Loader {
    /// Windows of `sequence_length` tokens, shuffled anew in every epoch when there is a seed.
    ///
    /// Fails when the stream does not fill one window.
    pub fn new(stream: TokenStream, sequence_length: usize, seed: Option<u64>) -> Result<Self> {
        let sequence_length = sequence_length as u64;
        if sequence_length == 0 {
            return Err(batch_size(1, 0));
        }
        if stream.len() < sequence_length {
            let (split, tokens) = (stream.name().to_string(), stream.len());
            return Err(DataError::SequenceTooLong { split, sequence_length, tokens });
        }
        let order = WindowOrder::new(stream.len() / sequence_length, seed)?;
        Ok(Self { stream, sequence_length, order })
    }

    /// Windows of one epoch.
    pub fn windows(&self) -> u64 {
        self.order.windows()
    }

    /// The order of the windows.
    pub fn order(&self) -> &WindowOrder {
        &self.order
    }

    /// The tokens underneath.
    pub fn stream(&self) -> &TokenStream {
        &self.stream
    }

    /// Tokens of one window.
    pub fn sequence_length(&self) -> usize {
        self.sequence_length as usize
    }

    /// The windows at positions `position..position + count` in one row.
    ///
    /// Positions count over all ranks and epochs, so the order does not depend on how many ranks share it: rank `r`
    /// with `n` windows of each step's `N` takes `batch(step * N + r * n, n)`. Fails on I/O, on ids outside the
    /// vocabulary and on rows that 32-bit offsets cannot address.
    pub fn batch(&self, position: u64, count: usize) -> Result<Batch> {
        let length = self.sequence_length;
        let tokens = (count as u64).saturating_mul(length);
        if count == 0 || tokens > i32::MAX as u64 {
            return Err(batch_size(count as u64, length));
        }
        let end = position.checked_add(count as u64).ok_or_else(|| batch_size(count as u64, length))?;
        let mut batch = Batch::with_capacity(tokens as usize, self.stream.token_lengths.is_some());
        for position in position..end {
            let start = self.order.window(position) * length;
            self.append_window(&mut batch, start, length)?;
        }
        batch.cu_seqlens.push(tokens as i32);
        Ok(batch)
    }

    /// The stream from its beginning, unshuffled, for validation: `count` windows to a batch, `max_tokens` tokens in
    /// all (or the whole stream). The last batch, and its last window, may be shorter.
    pub fn sequential(&self, count: usize, max_tokens: Option<u64>) -> impl Iterator<Item = Result<Batch>> + '_ {
        let end = max_tokens.unwrap_or(u64::MAX).min(self.stream.len());
        let row = (count as u64).max(1).saturating_mul(self.sequence_length).min(i32::MAX as u64);
        let row = row - row % self.sequence_length;
        let rows = if row == 0 { 0 } else { end.div_ceil(row) };
        (0..rows).map(move |i| {
            let (start, stop) = (i * row, end.min((i + 1) * row));
            let mut batch = Batch::with_capacity((stop - start) as usize, self.stream.token_lengths.is_some());
            for window in (start..stop).step_by(self.sequence_length as usize) {
                self.append_window(&mut batch, window, self.sequence_length.min(stop - window))?;
            }
            batch.cu_seqlens.push((stop - start) as i32);
            Ok(batch)
        })
    }

    /// A fixed sample of the stream for validation: whole blocks of `block` tokens (a multiple of the sequence length),
    /// evenly spaced over it, `max_tokens` in all and at least one block; `count` windows to a batch. A stream's first
    /// tokens may be a single document, which says little about the rest.
    ///
    /// Fails when the stream does not fill one block.
    pub fn spread(
        &self,
        count: usize,
        block: usize,
        max_tokens: u64,
    ) -> Result<impl Iterator<Item = Result<Batch>> + '_> {
        let (block, length) = (block as u64, self.sequence_length);
        if block == 0 || !block.is_multiple_of(length) {
            return Err(batch_size(block, length));
        }
        if self.stream.len() < block {
            let (split, tokens) = (self.stream.name().to_string(), self.stream.len());
            return Err(DataError::SequenceTooLong { split, sequence_length: block, tokens });
        }
        let blocks = self.stream.len() / block;
        let chosen = (max_tokens / block).clamp(1, blocks);
        let first = (0..chosen).map(move |i| (i as u128 * blocks as u128 / chosen as u128) as u64 * block);
        let windows: Vec<u64> = first.flat_map(|start| (start..start + block).step_by(length as usize)).collect();
        let batches: Vec<Vec<u64>> = windows.chunks(count.max(1)).map(<[u64]>::to_vec).collect();
        Ok(batches.into_iter().map(move |starts| {
            let tokens = starts.len() as u64 * length;
            if tokens > i32::MAX as u64 {
                return Err(batch_size(starts.len() as u64, length));
            }
            let mut batch = Batch::with_capacity(tokens as usize, self.stream.token_lengths.is_some());
            for start in starts {
                self.append_window(&mut batch, start, length)?;
            }
            batch.cu_seqlens.push(tokens as i32);
            Ok(batch)
        }))
    }

    fn append_window(&self, batch: &mut Batch, start: u64, length: u64) -> Result<()> {
        // One token more than the window, where there is one: the last label.
        let tokens = self.stream.read(start..self.stream.len().min(start + length + 1))?;
        batch.append_window(&tokens, length as usize, self.stream.end_of_text, self.stream.token_lengths.as_deref());
        Ok(())
    }
}

impl Batch {
    fn with_capacity(tokens: usize, counts_bytes: bool) -> Self {
        let (ids, labels) = (Vec::with_capacity(tokens), Vec::with_capacity(tokens));
        Self { ids, labels, text_bytes: counts_bytes.then_some(0), ..Self::default() }
    }

    /// Appends the first `length` tokens, and as their labels the tokens that follow them.
    fn append_window(&mut self, tokens: &[u32], length: usize, end_of_text: Option<u32>, lengths: Option<&[u32]>) {
        for i in 0..length {
            let begins_document = |token: u32| Some(token) == end_of_text;
            if i == 0 || begins_document(tokens[i]) {
                self.cu_seqlens.push(self.ids.len() as i32);
            }
            self.ids.push(tokens[i]);
            match tokens.get(i + 1) {
                Some(&next) if !begins_document(next) => {
                    self.labels.push(next as i32);
                    self.valid_tokens += 1;
                    let bytes = lengths.and_then(|lengths| lengths.get(next as usize)).copied().unwrap_or(0);
                    self.text_bytes = self.text_bytes.map(|sum| sum + u64::from(bytes));
                }
                _ => self.labels.push(IGNORED_LABEL),
            }
        }
    }
}

fn batch_size(count: u64, sequence_length: u64) -> DataError {
    DataError::BatchSize { count, sequence_length, max: i32::MAX as u64 }
}

/// Bits per byte of text from a summed loss in nats: comparable between tokenizers, unlike the loss per token.
pub fn bits_per_byte(nats: f64, text_bytes: u64) -> f64 {
    nats / std::f64::consts::LN_2 / text_bytes as f64
}
