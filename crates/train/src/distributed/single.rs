//! One rank: every collective is the identity, so that training has one path for any number of ranks.

use super::{Call, Communicator, Reduction, Result, Ticket};
use crate::distributed::CommunicatorError;
use stickbreak_tensor::Tensor;

/// The communicator of a rank that is alone. Copies where the caller asks for a copy, and does nothing else.
#[derive(Debug, Clone, Copy, Default)]
pub struct Single;

impl Single {
    fn call<'a>(self, collective: &'static str, what: &'a str) -> Call<'a> {
        Call { rank: 0, ranks: 1, collective, what }
    }

    /// Copies between memory that is known to be the same or not to overlap.
    fn copy(self, call: Call<'_>, from: &Tensor, to: &Tensor) -> Result<Ticket> {
        let shared = from.shares_storage(to);
        if shared && from.offset() == to.offset() {
            return Ok(Ticket::done());
        }
        let flat = |tensor: &Tensor| tensor.reshape([tensor.elements()]);
        let copy = || {
            let mut from = flat(from)?;
            if shared {
                // An op does not read the storage that it writes, so parts of one storage go through a second one.
                let copy = from.new_empty(from.shape(), from.dtype())?;
                copy.copy_assign(&from)?;
                from = copy;
            }
            flat(to)?.copy_assign(&from)
        };
        copy().map_err(|source| CommunicatorError::Tensor { rank: 0, collective: call.name(), source })?;
        Ok(Ticket::done())
    }
}

impl Communicator for Single {
    fn rank(&self) -> usize {
        0
    }

    fn ranks(&self) -> usize {
        1
    }

    fn all_reduce(&self, what: &str, tensor: &Tensor, _: Reduction) -> Result<Ticket> {
        self.call("all_reduce", what).tensor("tensor", tensor)?;
        Ok(Ticket::done())
    }

    fn reduce_scatter(&self, what: &str, from: &Tensor, to: &Tensor) -> Result<Ticket> {
        let call = self.call("reduce_scatter", what);
        call.parts(("to", to), ("from", from))?;
        self.copy(call, from, to)
    }

    fn all_gather(&self, what: &str, from: &Tensor, to: &Tensor) -> Result<Ticket> {
        let call = self.call("all_gather", what);
        call.parts(("from", from), ("to", to))?;
        self.copy(call, from, to)
    }

    fn broadcast(&self, what: &str, tensor: &Tensor, root: usize) -> Result<Ticket> {
        let call = self.call("broadcast", what);
        call.tensor("tensor", tensor)?;
        call.root(root)?;
        Ok(Ticket::done())
    }

    fn gather_values(&self, _: &str, values: &[f64]) -> Result<Vec<Vec<f64>>> {
        Ok(vec![values.to_vec()])
    }

    /// There is nobody to tell; the caller's own error says why.
    fn abort(&self, _: &str) {}
}
