//! Ranks as processes that compute on CPUs: collectives over the control plane (`control.rs`).
//!
//! Every collective sends all tensors to rank 0 and back, and each rank takes from them what is its own: made for trying
//! a launcher, and for tests of what several processes do when one of them dies, not for speed. Results are the same bits
//! as those of ranks as threads.

use super::control::Control;
use super::error::Failure;
use super::reduce::{Compute, Gather, Number, Of, Reduce, for_number};
use super::{Call, Communicator, CommunicatorError, Reduction, Result, Ticket};
use stickbreak_tensor::{Device, Tensor};

/// The communicator of a process that computes on a CPU.
#[derive(Debug)]
pub struct HostCommunicator {
    control: Control,
}

impl HostCommunicator {
    pub(super) fn new(control: Control) -> Self {
        Self { control }
    }

    fn call<'a>(&self, collective: &'static str, what: &'a str) -> Call<'a> {
        Call { rank: self.control.rank(), ranks: self.control.ranks(), collective, what }
    }

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
        for_number!(from.dtype(), T => self.exchange::<T>(call, &described, from, to, compute))?;
        Ok(Ticket::done())
    }

    fn exchange<T: Number>(
        &self,
        call: Call<'_>,
        described: &str,
        from: &Tensor,
        to: &Tensor,
        compute: impl Compute,
    ) -> Result<()> {
        let broken = |source| CommunicatorError::Tensor { rank: call.rank, collective: call.name(), source };
        let own = bytemuck::cast_slice(&from.read::<T>().map_err(broken)?[..from.elements()]).to_vec();
        let parts = self.control.share(described, own, self.control.timeouts().collective)?;
        // Copied, since bytes from the wire need not be aligned. Lengths are the same: they are part of the call.
        let values = |part: &Vec<u8>| {
            let mut values = vec![T::default(); from.elements()];
            bytemuck::cast_slice_mut(&mut values).copy_from_slice(part);
            values
        };
        let all: Vec<Vec<T>> = parts.iter().map(values).collect();
        let result = compute.result(&all.iter().map(Vec::as_slice).collect::<Vec<_>>());
        to.write::<T>().map_err(broken)?.copy_from_slice(&result);
        Ok(())
    }
}

/// [`Communicator::gather_values`] over the control plane.
pub(super) fn gather_values(control: &Control, call: Call<'_>, values: &[f64]) -> Result<Vec<Vec<f64>>> {
    let bytes = values.iter().flat_map(|value| value.to_bits().to_le_bytes()).collect();
    let parts = control.share(&call.name(), bytes, control.timeouts().host)?;
    let value = |bytes: &[u8]| f64::from_bits(bytes.iter().rev().fold(0, |bits, &byte| bits << 8 | u64::from(byte)));
    Ok(parts.iter().map(|part| part.chunks_exact(8).map(value).collect()).collect())
}

/// [`Communicator::abort`] over the control plane.
pub(super) fn abort(control: &Control, reason: &str) {
    control.fail(Failure::Lost { culprit: control.rank(), reason: format!("gave up: {reason}") });
}

impl Communicator for HostCommunicator {
    fn rank(&self) -> usize {
        self.control.rank()
    }

    fn ranks(&self) -> usize {
        self.control.ranks()
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
        gather_values(&self.control, self.call("gather_values", what), values)
    }

    fn abort(&self, reason: &str) {
        abort(&self.control, reason);
    }
}
