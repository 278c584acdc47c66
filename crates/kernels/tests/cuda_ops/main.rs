//! Every CUDA op but attention and matrix products, against the CPU's float64.
//!
//! Inputs are exactly representable in bf16, so both types compute on the same numbers. Outputs are poisoned with NaN, lie
//! between guards that must survive, and start at addresses that allow 16-byte access and at ones that do not.

mod adamw;
mod cross_entropy;
mod elementwise;
mod embedding;
mod norms;
mod reduce;
mod rope;
mod speed;
mod support;
mod swiglu;
