//! The stick-breaking transformer: a decoder-only language model with RMSNorm, SwiGLU, grouped-query attention and a
//! choice of attention, so that stick-breaking and its baselines differ in nothing else.
//!
//! * [`ModelConfig`] says what a model is; [`Transformer`] holds its parameters in one arena and runs it.
//! * [`init`] gives the parameters their first values, [`weights`] reads and writes them under Hugging Face names.
//! * [`generate`] continues a prompt with a key/value cache, through the same code as the training forward.
//! * [`count`] counts parameters and floating-point operations, [`tiles`] what early exit leaves out; [`inspect`] looks into
//!   the attention.
//!
//! The crate knows nothing of files of text, optimizers or runs.

pub mod config;
pub mod count;
pub mod error;
pub mod generate;
pub mod hugging_face;
pub mod init;
pub mod inspect;
pub mod tiles;
pub mod transformer;
pub mod weights;

pub use config::{AttentionKind, InitScheme, ModelConfig, Remainder};
pub use error::{ModelError, Result};
pub use generate::{Generator, Sampling};
pub use transformer::{Block, Packing, Transformer};
