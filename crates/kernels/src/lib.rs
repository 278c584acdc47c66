//! Numerical kernels of stickbreak, on raw memory.
//!
//! The crate knows slices, shapes, strides and threads; it knows nothing of tensors, devices or gradients' bookkeeping,
//! so that it can be used alone by a program with its own memory.
//!
//! Every op is a folder `src/<op>/`: `mod.rs` says what it computes (formula, shapes, what is saved for the backward pass)
//! and holds its *spec*, which is validated once; `cpu.rs` is the CPU implementation, generic over [`Float`] (f32, f64)
//! and parallel over rayon's current thread pool. `KERNELS.md` has one row per op.
//!
//! Invariants:
//! * results do not depend on the number of threads: work is cut into pieces by shape alone, and partial sums are
//!   combined in a fixed order;
//! * an output is written in full, whatever it held before, unless its doc says "accumulates";
//! * a shape error is reported before anything is written.

// Unit tests share helpers with the tests outside of the crate, which know it by its name.
#[cfg(test)]
extern crate self as stickbreak_kernels;

pub mod adamw;
pub mod attention;
pub mod cross_entropy;
pub mod cuda;
pub mod elementwise;
pub mod embedding;
pub mod error;
pub mod float;
pub mod group_norm;
pub mod matmul;
mod parallel;
pub mod reduce;
pub mod rms_norm;
pub mod rope;
pub mod simd;
pub mod strided;
pub mod swiglu;

pub use error::{KernelError, Result};
pub use float::Float;
pub use strided::Strided;
