//! Training of stick-breaking transformers: everything around the model.
//!
//! * [`config`] is a run in one TOML file; [`data`] turns text into windows of tokens; [`trainer`] is the loop,
//!   [`mod@step`] what it repeats.
//! * [`checkpoint`] saves and restores atomically, [`metrics`] and [`report`] show what happened, [`signal`] stops.
//! * [`evaluate`] measures losses, also at other context lengths; [`inspect`] looks into the attention.
//! * [`distributed`] is ranks that train together.
//! * [`device`] says what a command computes on, [`mfu`] how well it uses it, [`profile`] where the time goes.
//! * [`verify`] checks this build against golden vectors, [`mod@bench`] times it, [`doctor`] says what the machine has.
//! * [`cli`] is the binary `stickbreak` over all of it.

pub mod bench;
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod console;
pub mod data;
pub mod device;
pub mod distributed;
pub mod doctor;
pub mod evaluate;
pub mod inspect;
mod load;
pub mod metrics;
pub mod mfu;
mod nvtx;
pub mod optimizer;
pub mod profile;
pub mod report;
pub mod schedule;
pub mod signal;
pub mod step;
pub mod trainer;
pub mod verify;
