//! Tensors of stickbreak: an n-dimensional view of shared storage, and ops that validate shapes and dispatch to
//! [`stickbreak_kernels`].
//!
//! * [`Tensor`] is cheap to clone: clones and views share one [`storage::Storage`] by reference.
//! * Ops return new tensors; the few that write in place end in `_assign` or `_into` and refuse inputs that share the
//!   storage they write to.
//! * Every error names the op and both shapes.
//!
//! The crate knows nothing of gradients, models or training.

pub mod cuda;
pub mod device;
pub mod dtype;
pub mod error;
pub mod io;
pub mod ops;
pub mod shape;
pub mod storage;
mod tensor;

pub use device::Device;
pub use dtype::{DType, Element};
pub use error::{Result, TensorError};
pub use shape::Shape;
pub use storage::{MemoryUse, memory_use, reset_peak_memory};
pub use tensor::Tensor;
