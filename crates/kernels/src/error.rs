//! What can be wrong with a kernel call. Every message names the op, the argument and both values.

use thiserror::Error;

/// Result of a kernel call.
pub type Result<T> = std::result::Result<T, KernelError>;

/// A kernel call that was refused before anything was written.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum KernelError {
    /// A slice has not the number of elements that the spec implies.
    #[error("{op}: {argument} has {found} elements, but the spec needs {expected}")]
    Length {
        /// Op that was called.
        op: &'static str,
        /// Which argument.
        argument: &'static str,
        /// Elements needed.
        expected: usize,
        /// Elements given.
        found: usize,
    },
    /// Two sizes that must agree, or a size that is out of range.
    #[error("{op}: {what} must be {expected}, found {found}")]
    Size {
        /// Op that was called.
        op: &'static str,
        /// Which size.
        what: &'static str,
        /// What is allowed.
        expected: String,
        /// What was given.
        found: String,
    },
    /// An index (token id, label, document offset) that points outside of its range.
    #[error("{op}: {what}[{position}] = {value}, but it must be {allowed}")]
    Index {
        /// Op that was called.
        op: &'static str,
        /// Name of the index array.
        what: &'static str,
        /// Position in the array.
        position: usize,
        /// Value found there.
        value: i64,
        /// What is allowed.
        allowed: String,
    },
    /// A CUDA library that is not installed, or too old.
    #[error("{library} cannot be used: {why}")]
    Library {
        /// File name of the library.
        library: &'static str,
        /// What is wrong with it, and where it was looked for.
        why: String,
    },
    /// The CUDA driver, compiler or a library refused.
    #[error("CUDA: {doing}: {why}")]
    Cuda {
        /// What was being done.
        doing: String,
        /// What came back.
        why: String,
    },
}

impl KernelError {
    /// A [`KernelError::Cuda`] from anything that can be printed.
    pub(crate) fn cuda(doing: impl std::fmt::Display, why: impl std::fmt::Display) -> Self {
        Self::Cuda { doing: doing.to_string(), why: why.to_string() }
    }

    /// A [`KernelError::Size`] from anything that can be printed.
    pub fn size(
        op: &'static str,
        what: &'static str,
        expected: impl std::fmt::Display,
        found: impl std::fmt::Display,
    ) -> Self {
        Self::Size { op, what, expected: expected.to_string(), found: found.to_string() }
    }
}

/// Refuses a slice whose length is not the expected one.
pub fn check_len<T>(op: &'static str, argument: &'static str, slice: &[T], expected: usize) -> Result<()> {
    if slice.len() == expected {
        Ok(())
    } else {
        Err(KernelError::Length { op, argument, expected, found: slice.len() })
    }
}
