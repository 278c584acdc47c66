//! The collectives of ranks on CPUs, whatever carries their values: threads ([`super::local`]) or TCP ([`super::host`]).

use super::reduce::{Compute, Gather, Of, Reduce};
use super::{Call, Communicator, Reduction, Result, Ticket};
use std::fmt;
use stickbreak_tensor::{Device, Tensor};

/// Ranks that can show each other values. It makes them a [`Communicator`].
pub(super) trait OnCpu: Send + Sync + fmt::Debug {
    /// This rank, and how many there are.
    fn place(&self) -> (usize, usize);

    /// Shows `from` to all, and writes to `to` what `compute` makes of everyone's. `described` has to be the same on all.
    fn exchange(
        &self,
        call: Call<'_>,
        described: String,
        from: &Tensor,
        to: &Tensor,
        compute: impl Compute,
    ) -> Result<()>;

    /// [`Communicator::gather_values`].
    fn exchange_values(&self, call: Call<'_>, values: &[f64]) -> Result<Vec<Vec<f64>>>;

    /// [`Communicator::abort`].
    fn give_up(&self, reason: &str);

    /// A call of this rank.
    fn call<'a>(&self, collective: &'static str, what: &'a str) -> Call<'a> {
        let (rank, ranks) = self.place();
        Call { rank, ranks, collective, what }
    }

    /// A collective whose tensors go together; over when it returns.
    fn collective(
        &self,
        call: Call<'_>,
        detail: &str,
        from: &Tensor,
        to: &Tensor,
        compute: impl Compute,
    ) -> Result<Ticket> {
        for tensor in [from, to] {
            if tensor.device() != Device::Cpu {
                return Err(call.refuse(format!("a tensor is on {}; these ranks use the CPU", tensor.device())));
            }
        }
        let described = format!("{} of {} elements of {}{detail}", call.name(), from.elements(), from.dtype());
        self.exchange(call, described, from, to, compute)?;
        Ok(Ticket::done())
    }
}

impl<T: OnCpu> Communicator for T {
    fn rank(&self) -> usize {
        self.place().0
    }

    fn ranks(&self) -> usize {
        self.place().1
    }

    fn all_reduce(&self, what: &str, tensor: &Tensor, reduction: Reduction) -> Result<Ticket> {
        let call = self.call("all_reduce", what);
        call.tensor("tensor", tensor)?;
        let whole = Reduce { reduction, part: 0, parts: 1 };
        self.collective(call, &format!(", {reduction:?}"), tensor, tensor, whole)
    }

    fn reduce_scatter(&self, what: &str, from: &Tensor, to: &Tensor) -> Result<Ticket> {
        let call = self.call("reduce_scatter", what);
        call.parts(("to", to), ("from", from))?;
        let part = Reduce { reduction: Reduction::Sum, part: call.rank, parts: call.ranks };
        self.collective(call, "", from, to, part)
    }

    fn all_gather(&self, what: &str, from: &Tensor, to: &Tensor) -> Result<Ticket> {
        let call = self.call("all_gather", what);
        call.parts(("from", from), ("to", to))?;
        self.collective(call, "", from, to, Gather)
    }

    fn broadcast(&self, what: &str, tensor: &Tensor, root: usize) -> Result<Ticket> {
        let call = self.call("broadcast", what);
        call.tensor("tensor", tensor)?;
        call.root(root)?;
        self.collective(call, &format!(" from rank {root}"), tensor, tensor, Of(root))
    }

    fn gather_values(&self, what: &str, values: &[f64]) -> Result<Vec<Vec<f64>>> {
        self.exchange_values(self.call("gather_values", what), values)
    }

    fn abort(&self, reason: &str) {
        self.give_up(reason);
    }
}
