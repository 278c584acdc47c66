//! What can go wrong between ranks. Messages name the rank that speaks, the collective, and the rank that is to blame.

use super::launch::Master;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;
use stickbreak_tensor::TensorError;
use thiserror::Error;

/// Result of a collective.
pub type Result<T> = std::result::Result<T, CommunicatorError>;

/// A collective, or the start of a group of ranks, that failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CommunicatorError {
    /// Another rank (or this one) gave up, died or left.
    #[error("rank {rank}: {collective}: rank {culprit} {reason}")]
    RankLost {
        /// Who says this.
        rank: usize,
        /// Collective that was under way.
        collective: String,
        /// Who is to blame.
        culprit: usize,
        /// What it did, as the end of a sentence.
        reason: String,
    },
    /// Ranks that did not come in time.
    #[error("rank {rank}: {collective}: {missing} did not come within {:.1} s: hung, or died without a word", timeout.as_secs_f64())]
    Timeout {
        /// Who says this.
        rank: usize,
        /// Collective that was under way.
        collective: String,
        /// Who did not come.
        missing: Ranks,
        /// How long was waited.
        timeout: Duration,
    },
    /// Ranks that called different collectives, or with different sizes.
    #[error("rank {rank}: the ranks disagree: rank {} calls {}, rank {} calls {}", one.0, one.1, other.0, other.1)]
    Disagreement {
        /// Who says this.
        rank: usize,
        /// A rank, and what it called.
        one: (usize, String),
        /// A rank that called something else, and what.
        other: (usize, String),
    },
    /// Tensors that a collective cannot take.
    #[error("rank {rank}: {collective}: {why}")]
    Argument {
        /// Who says this.
        rank: usize,
        /// Collective that was called.
        collective: String,
        /// What is wrong, with both values.
        why: String,
    },
    /// A tensor op inside a collective.
    #[error("rank {rank}: {collective}: {source}")]
    Tensor {
        /// Who says this.
        rank: usize,
        /// Collective that was called.
        collective: String,
        /// Why.
        source: TensorError,
    },
    /// A GPU, or the library that connects them.
    #[error("rank {rank}: {collective}: {why}")]
    Gpu {
        /// Who says this.
        rank: usize,
        /// Collective that was called.
        collective: String,
        /// What the library or the driver says.
        why: String,
    },
    /// The ranks did not find each other.
    #[error("rank {rank}: rendezvous at {master}: {why}")]
    Rendezvous {
        /// Who says this.
        rank: usize,
        /// Where they were to meet.
        master: Master,
        /// Why not.
        why: String,
    },
}

/// Exit code of a process that failed because another rank did: `EX_TEMPFAIL` of sysexits.h, "try again".
pub const BECAUSE_OF_ANOTHER_RANK: u8 = 75;

/// The exit code for an error: 1, or [`BECAUSE_OF_ANOTHER_RANK`] if it is only the echo of another rank's failure. So a
/// launcher can tell who failed first.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    let another = error.chain().any(|cause| match cause.downcast_ref() {
        Some(CommunicatorError::RankLost { rank, culprit, .. }) => rank != culprit,
        Some(CommunicatorError::Timeout { rank, missing, .. }) => !missing.0.contains(rank),
        _ => false,
    });
    if another { BECAUSE_OF_ANOTHER_RANK } else { 1 }
}

/// Why a group of ranks is of no more use; the same for all of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Failure {
    /// A rank gave up, died or left.
    Lost { culprit: usize, reason: String },
    /// Ranks did not come.
    Missing { culprits: Ranks, timeout: Duration },
    /// Ranks called different things.
    Disagreement { one: (usize, String), other: (usize, String) },
}

impl Failure {
    /// Whether a rank is to blame, or among those that are.
    pub(crate) fn is_by(&self, rank: usize) -> bool {
        match self {
            Failure::Lost { culprit, .. } => *culprit == rank,
            Failure::Missing { culprits, .. } => culprits.0.contains(&rank),
            Failure::Disagreement { one, other } => [one.0, other.0].contains(&rank),
        }
    }

    /// As the error of a rank in a collective.
    pub(crate) fn error(&self, rank: usize, collective: &str) -> CommunicatorError {
        let collective = collective.to_owned();
        match self.clone() {
            Failure::Lost { culprit, reason } => CommunicatorError::RankLost { rank, collective, culprit, reason },
            Failure::Missing { culprits: missing, timeout } => {
                CommunicatorError::Timeout { rank, collective, missing, timeout }
            }
            Failure::Disagreement { one, other } => CommunicatorError::Disagreement { rank, one, other },
        }
    }
}

/// Some ranks, in words: `rank 2`, `ranks 1 and 3`, `ranks 0, 1, 2, 3, 4, 5, 6, 7 and 120 more`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ranks(pub Vec<usize>);

/// More ranks than this are counted instead of named.
const NAMED: usize = 8;

impl fmt::Display for Ranks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<String> = self.0.iter().take(NAMED).map(usize::to_string).collect();
        match (&words[..], self.0.len().saturating_sub(NAMED)) {
            ([], _) => f.write_str("no rank"),
            ([one], 0) => write!(f, "rank {one}"),
            ([first @ .., last], 0) => write!(f, "ranks {} and {last}", first.join(", ")),
            (_, more) => write!(f, "ranks {} and {more} more", words.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn an_error_that_another_rank_caused_has_its_own_exit_code() {
        let lost = |culprit| Failure::Lost { culprit, reason: "died".into() }.error(2, "x");
        let code = |error: CommunicatorError| exit_code(&Err::<(), _>(error).context("step 3").unwrap_err());
        assert_eq!((code(lost(1)), code(lost(2))), (75, 1));
        let late = |culprit| Failure::Missing { culprits: Ranks(vec![culprit]), timeout: Duration::ZERO }.error(2, "x");
        assert_eq!((code(late(0)), code(late(2))), (75, 1));
        assert_eq!(exit_code(&anyhow::anyhow!("a full disk")), 1);
    }

    #[test]
    fn ranks_are_named_and_many_are_counted() {
        let text = |ranks: std::ops::Range<usize>| Ranks(ranks.collect()).to_string();
        assert_eq!(text(2..3), "rank 2");
        assert_eq!(text(1..3), "ranks 1 and 2");
        assert_eq!(text(0..4), "ranks 0, 1, 2 and 3");
        assert_eq!(text(0..8), "ranks 0, 1, 2, 3, 4, 5, 6 and 7");
        assert_eq!(text(0..128), "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 120 more");
        assert_eq!(text(0..0), "no rank");
    }
}
