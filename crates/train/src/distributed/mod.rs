//! Ranks that train together: how they find each other, and what they say to each other.
//!
//! * A [`Communicator`] is the only thing that the training loop knows of other ranks: collectives on tensors, small
//!   values on the host, and a way to give up together.
//! * [`single::Single`] is one rank, [`local::LocalGroup`] ranks as threads of one process, [`nccl`] processes with a GPU
//!   each, [`host`] processes on CPUs.
//! * [`launch`] says what started this process and which rank it is; [`connect()`] meets the others;
//!   [`spawn`] is a launcher of our own.
//! * [`plan`] says what a run on many GPUs will need, and [`cost`] predicts its speed.
//! * [`shards`] cuts the parameter arena for the ranks, [`gradients`] adds up what they have, [`weights`] brings back what
//!   each has updated: the two halves of a step's communication.
//!
//! Every collective has a name (`what`), which a person reads when it fails: the training step gives the bucket, the
//! error adds the rank, the kind of collective and the rank that is to blame.

mod connect;
mod control;
pub mod cost;
mod cpu;
mod error;
mod frame;
pub mod gradients;
pub mod host;
pub mod launch;
pub mod local;
pub mod nccl;
pub mod plan;
mod reduce;
mod rendezvous;
pub mod shards;
pub mod single;
pub mod spawn;
pub mod weights;

pub use connect::{connect, connect_unless};
pub use control::Timeouts;
pub use error::{BECAUSE_OF_ANOTHER_RANK, CommunicatorError, Ranks, Result, exit_code};

use std::fmt;
use stickbreak_tensor::Tensor;

/// How values of several ranks become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reduction {
    /// Their sum.
    Sum,
    /// The largest of them. A NaN beside a number is lost; a sum keeps it.
    Max,
}

/// Ranks that compute together. Collectives are called by all ranks in the same order with the same sizes.
///
/// On a GPU a collective is ordered behind the work that the tensors' device queue holds at the call, and runs beside work
/// put there later; [`Ticket::join`] orders later work of the queue behind it, and the host does not wait. On the CPU it
/// is over when the call returns, and joining is free.
///
/// The result never depends on timing: sums are taken in a fixed order. Sums of bfloat16 are taken in float32 on the CPU
/// and rounded once; on a GPU the library rounds on the way.
///
/// Tensors are contiguous. After an error a communicator is of no more use: every later call fails too.
pub trait Communicator: Send + Sync + fmt::Debug {
    /// This rank, below [`ranks`](Self::ranks).
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn ranks(&self) -> usize;

    /// Replaces `tensor` by the reduction over all ranks, on each of them.
    ///
    /// # Errors
    /// If the tensor is not contiguous, ranks disagree, or another rank is lost.
    fn all_reduce(&self, what: &str, tensor: &Tensor, reduction: Reduction) -> Result<Ticket>;

    /// Sums `from`, `[ranks * n]`, over all ranks and writes part number [`rank`](Self::rank) of it to `to`, `[n]`. `to`
    /// may be that very part of `from`; else they must not overlap. What becomes of the rest of `from` is left open.
    ///
    /// # Errors
    /// If sizes, types or places do not go together, ranks disagree, or another rank is lost.
    fn reduce_scatter(&self, what: &str, from: &Tensor, to: &Tensor) -> Result<Ticket>;

    /// Puts every rank's `from`, `[n]`, one behind the other into `to`, `[ranks * n]`, on each of them. `from` may be part
    /// number [`rank`](Self::rank) of `to`; else they must not overlap.
    ///
    /// # Errors
    /// As [`reduce_scatter`](Self::reduce_scatter).
    fn all_gather(&self, what: &str, from: &Tensor, to: &Tensor) -> Result<Ticket>;

    /// Replaces `tensor` by that of the rank `root`.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce), or if there is no such rank.
    fn broadcast(&self, what: &str, tensor: &Tensor, root: usize) -> Result<Ticket>;

    /// Whether [`share`](Self::share) may be of use: then the memory that it is given should be
    /// [shareable](Tensor::zeros_shareable_on). The same on all ranks.
    fn shares_memory(&self) -> bool {
        false
    }

    /// Lets all ranks reach a tensor of each other's directly as long as the communicator lasts, if they can: collectives
    /// inside it then take less of the device from what is computed beside them. Gathers have the same results; sums over more
    /// than two ranks may be taken in another order. All ranks call it with the same size. The host waits.
    ///
    /// # Errors
    /// If the tensor is not contiguous, or another rank is lost.
    fn share(&self, _what: &str, _tensor: &Tensor) -> Result<()> {
        Ok(())
    }

    /// Small host values of every rank, by rank: for agreeing on signals, errors, counts. The host waits. Ranks may give
    /// different numbers of values.
    ///
    /// # Errors
    /// If another rank is lost.
    fn gather_values(&self, what: &str, values: &[f64]) -> Result<Vec<Vec<f64>>>;

    /// Returns once every rank has come here. The host waits; work of the device is not waited for.
    ///
    /// # Errors
    /// If another rank is lost.
    fn barrier(&self, what: &str) -> Result<()> {
        self.gather_values(what, &[]).map(drop)
    }

    /// Whether the group still holds: what collectives that are over have left may be read after this.
    ///
    /// # Errors
    /// If another rank is lost; a collective that was under way then may have ended without its result.
    fn check(&self, _what: &str) -> Result<()> {
        Ok(())
    }

    /// Tells the others why this rank gives up, and ends what is under way: their calls fail, and name this rank and the
    /// reason.
    fn abort(&self, reason: &str);
}

/// A collective that was started.
///
/// Dropping a ticket joins it as well, but loses the error, which the next call gives.
#[must_use = "what comes later is ordered behind the collective only when its ticket is joined"]
pub struct Ticket(Option<Box<dyn Pending>>);

/// The work behind a [`Ticket`].
pub(crate) trait Pending: Send {
    /// Orders later work behind this.
    fn join(self: Box<Self>) -> Result<()>;
}

impl Ticket {
    /// Of a collective that is over.
    pub fn done() -> Self {
        Self(None)
    }

    /// Of a collective that may still run.
    pub(crate) fn pending(work: Box<dyn Pending>) -> Self {
        Self(Some(work))
    }

    /// Orders later work on the tensors' queue behind the collective. The host does not wait.
    ///
    /// # Errors
    /// If the collective is known to have failed.
    pub fn join(mut self) -> Result<()> {
        self.0.take().map_or(Ok(()), |work| work.join())
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(work) = self.0.take()
            && let Err(error) = work.join()
        {
            // Not lost to the run, as every later call fails too; one line for each bucket under way would hide the reason.
            tracing::debug!("{error}");
        }
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Ticket (pending)" } else { "Ticket (done)" })
    }
}

/// What every implementation checks of the tensors of one call before it starts anything.
#[derive(Debug, Clone, Copy)]
struct Call<'a> {
    rank: usize,
    ranks: usize,
    /// The trait's method.
    collective: &'static str,
    what: &'a str,
}

impl Call<'_> {
    /// The name in errors: `all_reduce "gradient norm"`.
    fn name(&self) -> String {
        format!("{} {:?}", self.collective, self.what)
    }

    fn refuse(&self, why: String) -> CommunicatorError {
        CommunicatorError::Argument { rank: self.rank, collective: self.name(), why }
    }

    fn tensor(&self, name: &str, tensor: &Tensor) -> Result<()> {
        if tensor.is_contiguous() {
            return Ok(());
        }
        Err(self.refuse(format!("{name} is not contiguous: shape {}, strides {:?}", tensor.shape(), tensor.strides())))
    }

    fn root(&self, root: usize) -> Result<()> {
        if root < self.ranks {
            return Ok(());
        }
        Err(self.refuse(format!("the root is rank {root}, but there are {} ranks", self.ranks)))
    }

    /// `part` holds one rank's share of `whole`.
    fn parts(&self, (part_name, part): (&str, &Tensor), (whole_name, whole): (&str, &Tensor)) -> Result<()> {
        self.tensor(part_name, part)?;
        self.tensor(whole_name, whole)?;
        let describe = |name: &str, tensor: &Tensor| {
            format!("{name} holds {} elements of {} on {}", tensor.elements(), tensor.dtype(), tensor.device())
        };
        let alike = part.dtype() == whole.dtype() && part.device() == whole.device();
        if !alike || whole.elements() != self.ranks * part.elements() {
            let (part, whole) = (describe(part_name, part), describe(whole_name, whole));
            let why = format!("{part}, and {whole}, which should be {} times as many of the same type", self.ranks);
            return Err(self.refuse(why));
        }
        let own = whole.offset() + self.rank * part.elements();
        let end = |tensor: &Tensor| tensor.offset() + tensor.elements();
        let overlap = part.shares_storage(whole)
            && part.offset() < end(whole)
            && whole.offset() < end(part)
            && part.elements() > 0;
        if overlap && part.offset() != own {
            return Err(self.refuse(format!(
                "{part_name} overlaps {whole_name} from element {} of their storage on, but this rank's part starts at {own}",
                part.offset()
            )));
        }
        Ok(())
    }
}
