//! Which share of its tiles each head's early exit leaves out, counted in the passes that train anyway.

use crate::error::Result;
use crate::transformer::Transformer;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use stickbreak_tensor::ops::attention::{StickBreakingSaved, TileCount};

/// One layer's: counts each pass as long as it is on, and keeps the last count.
#[derive(Debug, Default)]
pub(crate) struct TileWatch {
    on: AtomicBool,
    last: Mutex<Option<TileCount>>,
}

impl TileWatch {
    /// Takes the count of a pass. On a GPU the host does not wait, and nothing that the pass saved is kept.
    pub fn see(&self, saved: &StickBreakingSaved) -> Result<()> {
        if self.on.load(Ordering::Relaxed) {
            let count = saved.count_tiles()?;
            *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(count);
        }
        Ok(())
    }

    fn take(&self) -> Option<TileCount> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Transformer {
    /// Whether passes that are recorded for a backward pass count the tiles that early exit leaves out, from now on.
    /// On a GPU that is one small kernel a layer.
    pub fn watch_tiles(&self, on: bool) {
        for block in self.blocks() {
            block.tiles.on.store(on, Ordering::Relaxed);
        }
    }

    /// For each layer and query head the share of the causal tiles left out, 0 to 1, in the last pass that was counted
    /// since this was last called; `None` if there was none: never for softmax or with early exit off. Waits for the device.
    ///
    /// # Errors
    /// If the device fails.
    pub fn take_skipped_tiles(&self) -> Result<Option<Vec<Vec<f64>>>> {
        let counts: Option<Vec<TileCount>> = self.blocks().iter().map(|block| block.tiles.take()).collect();
        let read = |counts: Vec<TileCount>| counts.iter().map(|count| Ok(count.skipped()?)).collect();
        counts.map(read).transpose()
    }
}
