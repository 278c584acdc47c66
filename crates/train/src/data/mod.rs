//! Text to tokens to batches.
//!
//! The way of the data, each step a file of this folder:
//!
//! 1. [`source`] finds documents in text files, source trees, JSON lines and parquet;
//! 2. [`tokenizer`] turns a document into token ids and back;
//! 3. [`prepare`](prepare()) writes the ids as [`shard`]s and describes the folder in a [`manifest`];
//! 4. [`dataset`] opens such a folder (or foreign token files) as one [`TokenStream`];
//! 5. [`loader`] cuts the stream into windows, shuffles them and packs batches.
//!
//! Files are read with `pread` rather than through a memory map: a file that shrinks while it is read is then an
//! error that names it and not a signal that kills the process.

pub mod dataset;
mod error;
mod files;
pub mod journal;
pub mod loader;
pub mod manifest;
pub mod megatron;
pub mod order;
pub mod prefetch;
pub mod prepare;
pub mod registry;
pub mod shard;
pub mod source;
pub mod tokenizer;
pub mod tokens;

pub use dataset::{Dataset, SplitName, TokenStream};
pub use error::{DataError, FormatError, Result};
pub use loader::{Batch, Cursor, IGNORED_LABEL, Loader, Share};
pub use manifest::Manifest;
pub use prefetch::Prefetch;
pub use prepare::{PrepareEvent, PrepareOptions, TokenizerChoice, Validation, prepare};
pub use registry::RegistryOptions;
pub use source::Input;
pub use tokenizer::Tokenizer;
pub use tokens::{TokenFormat, TokenSource};
