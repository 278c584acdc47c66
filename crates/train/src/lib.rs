//! Under construction.

pub mod checkpoint;
