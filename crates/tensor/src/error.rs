//! What can go wrong with a tensor op. Messages name the op and both values.

use crate::{DType, Device, Shape};
use std::path::PathBuf;
use stickbreak_kernels::KernelError;
use thiserror::Error;

/// Result of a tensor op.
pub type Result<T> = std::result::Result<T, TensorError>;

/// A tensor op that was refused.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TensorError {
    /// Two shapes that do not go together.
    #[error("{op}: shapes {left} and {right} do not go together: {why}")]
    ShapePair {
        /// Op that was called.
        op: &'static str,
        /// Shape of the first tensor.
        left: Shape,
        /// Shape of the second tensor.
        right: Shape,
        /// The rule that is broken.
        why: String,
    },
    /// One shape that an op cannot take.
    #[error("{op}: {argument} has shape {found}, expected {expected}")]
    Shape {
        /// Op that was called.
        op: &'static str,
        /// Which argument.
        argument: &'static str,
        /// What is allowed.
        expected: String,
        /// Shape given.
        found: Shape,
    },
    /// A dimension index or range outside of a shape.
    #[error("{op}: {what} is out of range for shape {shape}")]
    OutOfRange {
        /// Op that was called.
        op: &'static str,
        /// What was asked for.
        what: String,
        /// The tensor's shape.
        shape: Shape,
    },
    /// A dtype that an op cannot take.
    #[error("{op}: {argument} has dtype {found}, expected {expected}")]
    DType {
        /// Op that was called.
        op: &'static str,
        /// Which argument.
        argument: &'static str,
        /// What is allowed.
        expected: String,
        /// Dtype given.
        found: DType,
    },
    /// An in-place op whose input shares the memory that it writes.
    #[error("{op}: the output shares its storage with {argument}; give it a copy")]
    Aliased {
        /// Op that was called.
        op: &'static str,
        /// Which input.
        argument: &'static str,
    },
    /// A kernel refused its arguments.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A device that this build or machine cannot use.
    #[error("device {device} cannot be used: {reason}")]
    DeviceUnavailable {
        /// The device asked for.
        device: Device,
        /// Why not.
        reason: String,
    },
    /// A tensor that is not where the op needs it.
    #[error("{op}: {argument} is on {found}, expected {expected}")]
    WrongDevice {
        /// Op that was called.
        op: &'static str,
        /// Which argument.
        argument: &'static str,
        /// Where it should be.
        expected: Device,
        /// Where it is.
        found: Device,
    },
    /// Text that names no device.
    #[error("unknown device {text:?}: expected cpu, cuda or cuda:N")]
    UnknownDevice {
        /// The text.
        text: String,
    },
    /// A file that cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A safetensors file that is broken or holds something unexpected.
    #[error("{}: {what}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}
