//! How many tiles a forward pass on the GPU visited, counted there (`cuda/stick_breaking_tiles.cu`): what is read is one
//! number per head, and the host waits only when it reads it.

use super::cuda::Saved;
use crate::Result;
use crate::cuda::{DeviceType, Launch, Queue, Scratch, Source};

const THREADS: u32 = 256;

const SOURCE: Source = Source {
    file: "stick_breaking_tiles.cu",
    parts: &[include_str!("../../../cuda/stick_breaking_tiles.cu")],
    defines: Vec::new(),
};

/// All that can be asked for.
pub(crate) fn sources() -> Vec<Source> {
    vec![SOURCE]
}

/// The (query tile, key tile) pairs that a forward pass visited, on the device until they are read.
#[derive(Debug)]
pub struct TileCount {
    /// u32 `[query_heads]`; None without early exit, which visits all.
    skipped: Option<Scratch>,
    query_heads: usize,
    causal: u64,
}

impl Saved {
    /// Counts the pass's tiles; nobody waits. The same as [`visited_tiles`](Self::visited_tiles).
    ///
    /// # Errors
    /// If the kernel does not compile, or a failure of the device.
    pub fn count_tiles(&self, queue: &Queue) -> Result<TileCount> {
        let query_heads = self.spec().layout.query_heads;
        let skipped = self.first_tiles().map(|first| -> Result<Scratch> {
            let mut skipped = queue.scratch(DeviceType::U32, query_heads)?;
            let launch = Launch { grid: [query_heads as u32, 1, 1], block: THREADS, shared: 0 };
            let tiles = (first.len() / query_heads) as i32;
            let arguments = [first.into(), (&mut skipped.as_mut()).into(), tiles.into()];
            queue.launch(&queue.gpu().kernel(&SOURCE, "stick_breaking_skipped_tiles")?, launch, &arguments)?;
            Ok(skipped)
        });
        Ok(TileCount { skipped: skipped.transpose()?, query_heads, causal: self.causal_tiles() })
    }
}

impl TileCount {
    /// For each query head how many pairs were visited, and how many pairs of one head hold a visible key. Waits for the
    /// device if early exit was on.
    ///
    /// # Errors
    /// If the copy fails.
    pub fn read(&self, queue: &Queue) -> Result<(Vec<u64>, u64)> {
        let visited = match &self.skipped {
            Some(skipped) => {
                let skipped = queue.download::<u32>(skipped.as_ref())?;
                skipped.into_iter().map(|skipped| self.causal - u64::from(skipped)).collect()
            }
            None => vec![self.causal; self.query_heads],
        };
        Ok((visited, self.causal))
    }
}
