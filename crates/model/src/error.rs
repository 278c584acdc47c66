//! What can be wrong with a model.

use std::path::PathBuf;
use stickbreak_autograd::AutogradError;
use stickbreak_tensor::TensorError;
use thiserror::Error;

/// Result of a model call.
pub type Result<T> = std::result::Result<T, ModelError>;

/// A model that cannot be built, loaded or run.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A configuration value that makes no model.
    #[error("model config: {field} = {value}: {why}")]
    Config {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// The rule it breaks.
        why: String,
    },
    /// An op failed.
    #[error(transparent)]
    Autograd(#[from] AutogradError),
    /// A tensor op failed.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// Weights whose names or shapes are not the model's.
    #[error("{}: {what}", path.display())]
    Weights {
        /// The file or folder.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
    /// A file that cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A generation that cannot be done.
    #[error("generate: {0}")]
    Generate(String),
}
