//! The order of the windows: a seeded shuffle per epoch that depends on nothing else.

use super::{DataError, Result};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Permutations kept: the current epoch's and, around a boundary, its neighbour's.
const KEPT: usize = 2;

/// Maps a global position (windows consumed since the start of training) to an epoch and a window.
///
/// A state of the order is its position and nothing more: any position is reached directly.
#[derive(Debug)]
pub struct WindowOrder {
    windows: u64,
    seed: Option<u64>,
    kept: Mutex<VecDeque<(u64, Arc<[u32]>)>>,
}

impl WindowOrder {
    /// An order over `windows` windows; without a seed they come as they lie. Fails on 2^32 windows or more.
    pub fn new(windows: u64, seed: Option<u64>) -> Result<Self> {
        if windows == 0 || windows > u64::from(u32::MAX) {
            return Err(DataError::Input(format!("{windows} windows cannot be ordered: 1 to {} can", u32::MAX)));
        }
        Ok(Self { windows, seed, kept: Mutex::default() })
    }

    /// Windows of one epoch.
    pub fn windows(&self) -> u64 {
        self.windows
    }

    /// The epoch of a position.
    pub fn epoch(&self, position: u64) -> u64 {
        position / self.windows
    }

    /// The window at a position.
    pub fn window(&self, position: u64) -> u64 {
        let place = position % self.windows;
        match self.seed {
            Some(seed) => self.permutation(seed, self.epoch(position))[place as usize].into(),
            None => place,
        }
    }

    fn permutation(&self, seed: u64, epoch: u64) -> Arc<[u32]> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, permutation)) = kept.iter().find(|(of, _)| *of == epoch) {
            return permutation.clone();
        }
        let permutation = shuffled(self.windows as u32, seed, epoch);
        kept.truncate(KEPT - 1);
        kept.push_front((epoch, permutation.clone()));
        permutation
    }
}

/// Fisher and Yates' shuffle, written out: a run must continue in the same order after an update of `rand`, which
/// promises the numbers of ChaCha but not those of its shuffle.
fn shuffled(windows: u32, seed: u64, epoch: u64) -> Arc<[u32]> {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&epoch.to_le_bytes());
    let mut random = ChaCha8Rng::from_seed(key);
    let mut permutation: Vec<u32> = (0..windows).collect();
    for last in (1..permutation.len()).rev() {
        // The upper half of the product is uniform in 0..=last, to within 2^-32.
        let chosen = (u128::from(random.next_u64()) * (last as u128 + 1)) >> 64;
        permutation.swap(last, chosen as usize);
    }
    permutation.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_never_changes() {
        // A change here breaks every resumed run.
        assert_eq!(*shuffled(10, 1, 0), [1, 4, 9, 8, 0, 5, 7, 6, 2, 3]);
        assert_eq!(*shuffled(10, 1, 1), [8, 1, 6, 4, 0, 5, 9, 3, 7, 2]);
    }
}
