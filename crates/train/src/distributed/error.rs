//! What can go wrong between ranks. Messages name the rank that speaks, the collective, and the rank that is to blame.

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
    #[error("rank {rank}: the ranks disagree: rank {rank} calls {mine}, rank {other} calls {theirs}")]
    Disagreement {
        /// Who says this.
        rank: usize,
        /// What it called.
        mine: String,
        /// The first rank that called something else.
        other: usize,
        /// What that one called.
        theirs: String,
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
}

/// Some ranks, in words: `rank 2`, `ranks 1 and 3`, `ranks 0, 1, 2, 3, 4, 5, 6, 7 and 120 more`.
#[derive(Debug, Clone, PartialEq, Eq)]
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
