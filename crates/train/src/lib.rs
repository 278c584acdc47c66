//! Under construction.

pub mod checkpoint;
pub mod metrics;
pub mod report;
pub mod signal;
