//! Training of stick-breaking transformers.

pub mod data;
