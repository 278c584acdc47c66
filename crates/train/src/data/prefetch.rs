//! Batches read ahead by a thread, so that a step does not wait for the disk.

use super::loader::{Batch, Loader};
use super::{DataError, Result};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Batches that wait to be taken.
const AHEAD: usize = 2;

/// A thread that reads batches in a given order and stays at most two ahead.
pub struct Prefetch {
    batches: Option<Receiver<Result<Batch>>>,
    thread: Option<JoinHandle<()>>,
}

impl Prefetch {
    /// Starts reading: each item is the position and the number of windows of one batch.
    ///
    /// For the steps of one rank: [`super::Share::requests`]. Fails when the system starts no thread.
    pub fn start(
        loader: Arc<Loader>,
        requests: impl IntoIterator<Item = (u64, usize), IntoIter: Send + 'static>,
    ) -> Result<Self> {
        let (sender, batches) = sync_channel(AHEAD);
        let requests = requests.into_iter();
        let thread = thread::Builder::new().name("prefetch".into()).spawn(move || {
            for (position, count) in requests {
                let batch = loader.batch(position, count);
                let failed = batch.is_err();
                // Sending fails once the receiver is dropped: nobody waits for more.
                if sender.send(batch).is_err() || failed {
                    return;
                }
            }
        });
        let thread = thread.map_err(|error| DataError::Prefetch(error.to_string()))?;
        Ok(Self { batches: Some(batches), thread: Some(thread) })
    }

    /// The next batch, waiting for it. An error of the thread comes out here, after the batches before it.
    pub fn next_batch(&mut self) -> Result<Batch> {
        loop {
            if let Some(batch) = self.wait(Duration::from_secs(3600))? {
                return Ok(batch);
            }
        }
    }

    /// As [`next_batch`](Self::next_batch), but none when it takes longer than this, so that the caller can look for
    /// signals in between.
    pub fn wait(&mut self, at_most: Duration) -> Result<Option<Batch>> {
        let batches = self.batches.as_ref().expect("dropped only with self");
        match batches.recv_timeout(at_most) {
            Ok(batch) => batch.map(Some),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => {
                let panicked = self.thread.take().is_some_and(|thread| thread.join().is_err());
                let reason = if panicked { "it panicked" } else { "no more batches were asked for, or one has failed" };
                Err(DataError::Prefetch(reason.into()))
            }
        }
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        // First the channel, on which the thread may be waiting, then the thread.
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
