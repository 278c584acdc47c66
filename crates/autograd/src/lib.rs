//! Reverse-mode differentiation, small enough to read in one sitting.
//!
//! * [`Tape`] records the ops of one step in the order in which they ran, which is a topological order; the backward
//!   pass is one loop over the record from its end.
//! * [`Var`] is a tensor value and its place on a tape. It borrows the tape, so no graph outlives its step. A tracked
//!   `Var` is made only by an op that records itself ([`Tape::record`]); it loses its history only by [`Var::detach`].
//! * Every op is a struct in a file of its own under `ops/`. Its fields are exactly what its backward needs; they are
//!   dropped as soon as that has run.
//! * [`Parameter`]s live in flat arenas, and their gradients are accumulated there in place.
//! * [`gradcheck`](gradcheck::gradcheck) compares any function's gradients with finite differences; the op registry in
//!   [`registry`] makes a test of it for every op.
//!
//! The crate knows nothing of models or files. `docs/autograd.md` is a guided tour.

pub mod checkpoint;
pub mod dot;
pub mod error;
pub mod gradcheck;
pub mod ops;
pub mod parameter;
pub mod registry;
pub mod tape;
pub mod var;

pub use checkpoint::checkpoint;
pub use error::{AutogradError, Result};
pub use parameter::{ALIGNMENT, ArenaBuilder, ArenaEntry, ArenaLayout, Parameter, ParameterArena, ParameterId};
pub use tape::{BeforeUse, Gradients, Op, OutputGradients, Sink, Tape};
pub use var::Var;
