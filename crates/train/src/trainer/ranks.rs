//! What the ranks of a run agree on. The first one leads: it writes metrics, checkpoints and what a person reads.

use super::Trainer;
use crate::distributed::Communicator;
use crate::distributed::shards::intersection;
use anyhow::{Result, bail};
use stickbreak_autograd::ParameterId;
use stickbreak_model::Transformer;
use stickbreak_tensor::Tensor;

/// A number in the place of an index where there is none.
const NONE: f64 = -1.0;

fn index(value: f64) -> Option<usize> {
    (value >= 0.0).then_some(value as usize)
}

/// The first rank that tells an index, and that index.
fn first_index(told: &[Vec<f64>], position: usize) -> Option<(usize, usize)> {
    told.iter().enumerate().find_map(|(rank, values)| Some((rank, index(values[position])?)))
}

/// Refuses to train on different data. Checksums are compared by their first 48 bits, which float64 holds exactly.
pub(super) fn agree_on_data(communicator: &dyn Communicator, fingerprint: &str) -> Result<()> {
    let bits = fingerprint.get(..12).and_then(|digits| u64::from_str_radix(digits, 16).ok()).unwrap_or_default();
    let told = communicator.gather_values("checksum of the data", &[bits as f64])?;
    match told.iter().position(|values| values[0] != told[0][0]) {
        Some(rank) => bail!(
            "rank {rank} has other data than rank 0: checksums {:012x} and {:012x}. All ranks need the same prepared data",
            told[rank][0] as u64,
            told[0][0] as u64
        ),
        None => Ok(()),
    }
}

/// Refuses to start from different weights: another folder under the same name on another machine, or a processor that
/// draws other numbers. Sums of squares are compared, to the bit.
pub(super) fn agree_on_weights(communicator: &dyn Communicator, model: &Transformer) -> Result<()> {
    if communicator.ranks() == 1 {
        return Ok(());
    }
    let told = communicator.gather_values("sum of the squared weights", &[model.arena().values().sum_of_squares()?])?;
    match told.iter().position(|values| values[0].to_bits() != told[0][0].to_bits()) {
        Some(rank) => bail!(
            "rank {rank} starts from other weights than rank 0: the sums of their squares are {} and {}. All ranks need the \
             same run folder, and machines that compute alike",
            told[rank][0],
            told[0][0]
        ),
        None => Ok(()),
    }
}

impl Trainer {
    /// This rank.
    pub(super) fn rank(&self) -> usize {
        self.communicator.rank()
    }

    /// How many ranks there are.
    pub(super) fn ranks(&self) -> usize {
        self.communicator.ranks()
    }

    /// Whether this is the rank that speaks and writes for all.
    pub(super) fn leads(&self) -> bool {
        self.rank() == 0
    }

    /// Whether this process was asked to stop, as a note to the others.
    pub(super) fn wants_to_stop(&self) -> f64 {
        f64::from(self.signal.is_set())
    }

    /// Takes note of who was asked to stop; once anybody was, all stop.
    pub(super) fn hear_stop(&mut self, asked: impl IntoIterator<Item = f64>) {
        if let Some(rank) = asked.into_iter().position(|asked| asked != 0.0) {
            self.stopped_rank.get_or_insert(rank);
            if self.ranks() > 1 {
                self.stop.trigger();
            }
        }
    }

    /// Whether all ranks stop here. Between these agreements, which each step is one of, nobody acts on a signal alone.
    pub(super) fn agree_on_stop(&mut self, what: &str) -> Result<bool> {
        let told = self.communicator.gather_values(what, &[self.wants_to_stop()])?;
        self.hear_stop(told.iter().map(|values| values[0]));
        Ok(self.stop.is_set())
    }

    /// Why the run stops, for the log.
    pub(super) fn stop_cause(&self) -> String {
        match (self.signal.cause(), self.stopped_rank) {
            (Some(cause), _) => cause.to_owned(),
            (None, Some(rank)) => format!("a signal to rank {rank}"),
            (None, None) => "request".to_owned(),
        }
    }

    /// The first parameter with an infinity or a NaN in it, and the rank that has it. Every rank calls it.
    pub(super) fn non_finite_parameter(&self) -> Result<Option<(usize, &str)>> {
        let mine = self.own_non_finite_parameter().map_or(NONE, |index| index as f64);
        let told = self.communicator.gather_values("finite parameters", &[mine])?;
        Ok(first_index(&told, 0).map(|(rank, index)| (rank, self.parameter_name(index))))
    }

    /// What kept a step from its update, in words, with the rank that has it. Every rank calls it.
    pub(super) fn non_finite_culprit(&self, losses: &[f64], loss: f64) -> Result<(usize, String)> {
        self.optimizer.weights().settle()?;
        let parameter = self.own_non_finite_parameter();
        // What the sum over the ranks made of it: each rank sees its shard.
        let gradient = if parameter.is_none() { self.own_non_finite_gradient()? } else { None };
        let mine = [parameter, gradient].map(|index| index.map_or(NONE, |index| index as f64));
        let told = self.communicator.gather_values("what is not finite", &mine)?;
        let of_one = self.ranks() == 1;
        let broken_loss = losses.iter().position(|loss| !loss.is_finite()).filter(|_| !of_one);
        let gradient = first_index(&told, 1);
        Ok(if let Some((rank, index)) = first_index(&told, 0) {
            (rank, format!("the parameter {}, hence the loss ({}),", self.parameter_name(index), losses[rank]))
        } else if let Some(rank) = broken_loss {
            (rank, format!("the loss ({})", losses[rank]))
        } else if let Some((rank, index)) = gradient {
            let summed = if of_one { "" } else { ", summed over the ranks" };
            (rank, format!("the gradient of {}{summed}, with a loss of {loss},", self.parameter_name(index)))
        } else {
            (0, format!("the loss ({loss}) or the sum of the squared gradients"))
        })
    }

    fn parameter_name(&self, index: usize) -> &str {
        self.model.arena().entries().get(index).map_or("arena", |entry| &entry.name)
    }

    /// The first parameter that is not finite here; the number behind the last if the arena is not for another reason.
    fn own_non_finite_parameter(&self) -> Option<usize> {
        let arena = self.model.arena();
        let whole = if arena.keeps_master() { arena.master() } else { arena.values() };
        if is_finite(whole) {
            return None;
        }
        let of = |id| if arena.keeps_master() { arena.master_of(id) } else { arena.parameter(id).map(|p| p.value) };
        let broken =
            (0..arena.entries().len()).find(|&index| !of(ParameterId(index)).is_ok_and(|values| is_finite(&values)));
        Some(broken.unwrap_or(arena.entries().len()))
    }

    /// The first parameter whose gradient is not finite in this rank's shard.
    fn own_non_finite_gradient(&self) -> Result<Option<usize>> {
        let (arena, layout) = (self.model.arena(), self.optimizer.layout());
        for bucket in 0..layout.buckets() {
            let piece = layout.piece(bucket).arena;
            if is_finite(&self.optimizer.gradients(&self.model, bucket)?) {
                continue;
            }
            for (index, entry) in arena.entries().iter().enumerate() {
                let common = intersection(&entry.range, &piece);
                if !common.is_empty() && !is_finite(&arena.gradients().narrow(0, common.start, common.len())?) {
                    return Ok(Some(index));
                }
            }
        }
        Ok(None)
    }
}

fn is_finite(tensor: &Tensor) -> bool {
    tensor.sum_of_squares().is_ok_and(f64::is_finite)
}
