//! What the ranks tell each other in a step's only round, beside loss and norm.

use super::saving::Progress;
use crate::data::Batch;

/// What a rank tells the others with a step's loss.
pub(super) struct Notes {
    /// Predicted tokens of its part of the next step.
    pub(super) next_tokens: f64,
    /// Whether its process was asked to stop.
    pub(super) stop: f64,
    /// Of a save that is under way.
    pub(super) progress: Progress,
    /// Arithmetic of its part of this step, in flop.
    pub(super) flops: f64,
}

/// The same, as it was heard.
pub(super) struct HeardNotes {
    pub(super) next_tokens: f64,
    pub(super) stop: f64,
    pub(super) progress: f64,
    pub(super) flops: f64,
}

/// Notes may travel as float32, which holds whole numbers up to 2^24: tokens are told in two parts.
const TOKENS_PART: f64 = 4096.0;

impl Notes {
    pub(super) fn to_values(&self) -> Vec<f64> {
        let thousands = (self.next_tokens / TOKENS_PART).floor();
        vec![
            thousands,
            self.next_tokens - TOKENS_PART * thousands,
            self.stop,
            f64::from(self.progress as u8),
            self.flops,
        ]
    }
}

impl HeardNotes {
    pub(super) fn new(values: &[f64]) -> Self {
        let [thousands, rest, stop, progress, flops] = values[..] else { unreachable!("every rank tells five values") };
        Self { next_tokens: TOKENS_PART * thousands + rest, stop, progress, flops }
    }
}

/// Predicted tokens of a rank's part of a step, none of no part.
pub(super) fn valid_tokens(batches: Option<&[Batch]>) -> f64 {
    batches.unwrap_or_default().iter().map(|batch| batch.valid_tokens as f64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_survive_float32() {
        // More tokens than float32 can count, as a rank with many micro-batches may have.
        for next_tokens in [0.0, 1.0, 4095.0, 4096.0, 16_777_217.0, 1e9 + 1.0] {
            let notes = Notes { next_tokens, stop: 1.0, progress: Progress::Written, flops: 1.5e14 };
            let travelled: Vec<f64> = notes.to_values().into_iter().map(|value| f64::from(value as f32)).collect();
            let heard = HeardNotes::new(&travelled);
            assert_eq!((heard.next_tokens, heard.stop), (next_tokens, 1.0));
            assert_eq!(heard.progress, f64::from(Progress::Written as u8));
            assert!((heard.flops - 1.5e14).abs() < 1e-6 * 1.5e14);
        }
    }
}
