//! What can go wrong while a graph is built or differentiated.

use crate::parameter::ParameterId;
use stickbreak_tensor::{DType, Shape, TensorError};
use thiserror::Error;

/// Result of an autograd call.
pub type Result<T> = std::result::Result<T, AutogradError>;

/// An autograd call that was refused.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AutogradError {
    /// An op on the values failed.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// An op in the backward pass failed; the op's name is given.
    #[error("backward of {op}: {source}")]
    Backward {
        /// The differentiable op.
        op: &'static str,
        /// What its backward reported.
        source: Box<AutogradError>,
    },
    /// Differentiation of something that is not one number, without a gradient to start from.
    #[error("backward needs a loss of one element, found shape {shape}")]
    NotScalar {
        /// Shape of the value.
        shape: Shape,
    },
    /// Differentiation of a value that depends on nothing tracked.
    #[error("backward of a value that no tracked input or parameter went into")]
    Untracked,
    /// A second backward pass over one tape.
    #[error("this tape has run backward already and what its ops saved is gone; record the step again on a new tape")]
    UsedUp,
    /// An id that an arena has not.
    #[error("the arena has {parameters} parameters, none with id {}", id.0)]
    UnknownParameter {
        /// The id asked for.
        id: ParameterId,
        /// Number of parameters.
        parameters: usize,
    },
    /// A gradient of another dtype than its value.
    #[error("{op}: gradient of input {input} has dtype {found}, its value {expected}")]
    GradientDType {
        /// The op whose backward made the gradient.
        op: &'static str,
        /// Which of its inputs.
        input: usize,
        /// Dtype of the value.
        expected: DType,
        /// Dtype of the gradient.
        found: DType,
    },
    /// A gradient of another shape than its value.
    #[error("{op}: gradient of input {input} has shape {found}, its value {expected}")]
    GradientShape {
        /// The op whose backward made the gradient.
        op: &'static str,
        /// Which of its inputs.
        input: usize,
        /// Shape of the value.
        expected: Shape,
        /// Shape of the gradient.
        found: Shape,
    },
    /// An analytic gradient that differs from the finite difference.
    #[error("{0}")]
    Gradcheck(Box<crate::gradcheck::Mismatch>),
}
