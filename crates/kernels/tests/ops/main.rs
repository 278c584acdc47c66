//! Every CPU op but attention, against plain float64 formulas, finite differences, and itself on other thread counts.

mod cross_entropy;
mod determinism;
mod elementwise;
mod embedding;
mod matmul;
mod norms;
mod optimizer;
mod reduce;
mod support;
