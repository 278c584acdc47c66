//! Ranks as processes that compute on CPUs: collectives over the control plane (`control.rs`).
//!
//! Every collective sends all tensors to rank 0 and back, and each rank takes from them what is its own: made for trying
//! a launcher, and for tests of what several processes do when one of them dies, not for speed. Results are the same bits
//! as those of ranks as threads.

use super::control::Control;
use super::cpu::OnCpu;
use super::error::Failure;
use super::reduce::{Compute, Number, for_number};
use super::{Call, CommunicatorError, Result};
use stickbreak_tensor::Tensor;

/// The communicator of a process that computes on a CPU.
#[derive(Debug)]
pub struct HostCommunicator {
    control: Control,
}

impl HostCommunicator {
    pub(super) fn new(control: Control) -> Self {
        Self { control }
    }

    fn share<T: Number>(
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

/// [`gather_values`](super::Communicator::gather_values) over the control plane.
pub(super) fn gather_values(control: &Control, call: Call<'_>, values: &[f64]) -> Result<Vec<Vec<f64>>> {
    let bytes = values.iter().flat_map(|value| value.to_bits().to_le_bytes()).collect();
    let parts = control.share(&call.name(), bytes, control.timeouts().host)?;
    let value = |bytes: &[u8]| f64::from_bits(bytes.iter().rev().fold(0, |bits, &byte| bits << 8 | u64::from(byte)));
    Ok(parts.iter().map(|part| part.chunks_exact(8).map(value).collect()).collect())
}

/// [`abort`](super::Communicator::abort) over the control plane.
pub(super) fn abort(control: &Control, reason: &str) {
    control.fail(Failure::Lost { culprit: control.rank(), reason: format!("gave up: {reason}") });
}

impl OnCpu for HostCommunicator {
    fn place(&self) -> (usize, usize) {
        (self.control.rank(), self.control.ranks())
    }

    fn exchange(
        &self,
        call: Call<'_>,
        described: String,
        from: &Tensor,
        to: &Tensor,
        compute: impl Compute,
    ) -> Result<()> {
        for_number!(from.dtype(), T => self.share::<T>(call, &described, from, to, compute))
    }

    fn exchange_values(&self, call: Call<'_>, values: &[f64]) -> Result<Vec<Vec<f64>>> {
        gather_values(&self.control, call, values)
    }

    fn give_up(&self, reason: &str) {
        abort(&self.control, reason);
    }
}
