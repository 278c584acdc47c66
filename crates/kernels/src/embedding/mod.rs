//! Embedding: `out[t] = table[ids[t]]`.
//!
//! `ids` `[tokens]`, `table` `[vocabulary, width]`, `out` `[tokens, width]`. Saved for the backward pass: the ids.
//!
//! Backward *accumulates*: `dtable[ids[t]] += dout[t]`, for equal ids in the order of the tokens.

pub mod cpu;
pub mod cuda;

/// Sizes of an embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EmbeddingSpec {
    /// Number of tokens.
    pub tokens: usize,
    /// Rows of the table.
    pub vocabulary: usize,
    /// Elements of one row.
    pub width: usize,
}
