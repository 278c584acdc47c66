//! Training of stick-breaking transformers: everything around the model.
//!
//! * [`config`] is a run in one TOML file; [`data`] turns text into windows of tokens; [`trainer`] is the loop.
//! * [`checkpoint`] saves and restores atomically, [`metrics`] and [`report`] show what happened, [`signal`] stops.
//! * [`evaluate`] measures losses, also at other context lengths; [`inspect`] looks into the attention.
//! * [`verify`] checks this build against golden vectors, [`mod@bench`] times it, [`doctor`] says what the machine has.
//! * [`cli`] is the binary `stickbreak` over all of it.

pub mod bench;
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod console;
pub mod data;
pub mod doctor;
pub mod evaluate;
pub mod inspect;
pub mod metrics;
pub mod optimizer;
pub mod report;
pub mod schedule;
pub mod signal;
pub mod trainer;
pub mod verify;
