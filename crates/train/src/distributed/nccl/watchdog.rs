//! A thread that ends a process whose group is of no more use.
//!
//! A collective whose partner is gone waits for ever on the device, and the host with it. So a thread of its own looks, ten
//! times a second, at the control plane, at NCCL's asynchronous errors, and at how long the oldest collective has been under
//! way. If something is wrong, all ranks are told; this process gets a moment to end by itself with its own error, then
//! the communicator is aborted and the process ends.

use super::super::BECAUSE_OF_ANOTHER_RANK;
use super::super::control::Control;
use super::super::error::Failure;
use super::library::Raw;
use std::collections::VecDeque;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use stickbreak_kernels::cuda::Event;

/// Time between two looks.
const LOOK: Duration = Duration::from_millis(100);
/// Time for the main thread to end by itself after a failure: most often it waits for the device and cannot.
const OWN_END: Duration = Duration::from_secs(2);
/// The same on the rank that gave up: it is on its way out, and may have a checkpoint's thread to wait for.
const OWN_END_OF_CULPRIT: Duration = Duration::from_secs(10);
/// Time for another rank's reason, which says more than what NCCL sees of it.
const BETTER_REASON: Duration = Duration::from_secs(3);
/// Time for NCCL to abort and for the driver to let go of the device.
const LAST_ACTS: Duration = Duration::from_secs(5);
/// Time for collectives of which a rank that left had its part.
const AFTER_GOODBYE: Duration = Duration::from_secs(10);

/// Collectives under way, oldest first. `M` is what marks the end of one, once it has begun.
#[derive(Debug)]
pub(super) struct Outstanding<M> {
    list: VecDeque<(u64, String, Option<M>)>,
    /// Since when the first has been the oldest.
    since: Instant,
}

impl<M> Outstanding<M> {
    pub(super) fn new() -> Self {
        Self { list: VecDeque::new(), since: Instant::now() }
    }

    /// A collective is about to be begun.
    pub(super) fn push(&mut self, number: u64, name: String) {
        if self.list.is_empty() {
            self.since = Instant::now();
        }
        self.list.push_back((number, name, None));
    }

    /// It has begun, and will have ended at the mark.
    pub(super) fn begun(&mut self, number: u64, mark: M) {
        if let Some((_, _, end)) = self.list.iter_mut().rev().find(|(known, ..)| *known == number) {
            *end = Some(mark);
        }
    }

    /// Takes away what is over.
    pub(super) fn settle<E>(&mut self, is_over: impl Fn(&M) -> Result<bool, E>) -> Result<(), E> {
        while let Some((_, _, Some(mark))) = self.list.front() {
            if !is_over(mark)? {
                break;
            }
            self.list.pop_front();
            self.since = Instant::now();
        }
        Ok(())
    }

    /// Number and name of the oldest, and for how long it has been that.
    pub(super) fn oldest(&self) -> Option<(u64, &str, Duration)> {
        self.list.front().map(|(number, name, _)| (*number, name.as_str(), self.since.elapsed()))
    }
}

/// What the watchdog looks at.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) control: Control,
    pub(super) raw: Raw,
    pub(super) outstanding: Mutex<Outstanding<Arc<Event>>>,
    /// Longest that a collective may be the oldest.
    pub(super) timeout: Duration,
    pub(super) closing: AtomicBool,
}

pub(super) fn start(watched: Arc<Watched>) -> std::io::Result<JoinHandle<()>> {
    thread::Builder::new().name("watchdog".into()).spawn(move || {
        if let Some(failure) = watched.watch() {
            watched.end(&failure);
        }
    })
}

impl Watched {
    /// Name of the oldest collective, for messages.
    pub(super) fn current(&self) -> String {
        let outstanding = self.outstanding.lock().unwrap_or_else(PoisonError::into_inner);
        outstanding.oldest().map_or("between collectives".to_owned(), |(_, name, _)| name.to_owned())
    }

    /// Returns why the group is of no more use, or nothing once it is closed in order.
    fn watch(&self) -> Option<Failure> {
        let mut reported = None;
        while !self.closing.load(Ordering::Acquire) {
            thread::sleep(LOOK);
            if let Some(failure) = self.control.failure() {
                return Some(failure);
            }
            if let Err(error) = self.raw.status() {
                return Some(self.after_a_better_reason(format!("had an error in {}: {error}", self.current())));
            }
            let mut outstanding = self.outstanding.lock().unwrap_or_else(PoisonError::into_inner);
            let settled = outstanding.settle(|mark| mark.is_reached());
            let oldest = outstanding.oldest().map(|(number, name, age)| (number, name.to_owned(), age));
            drop(outstanding);
            if let Err(error) = settled {
                return Some(self.after_a_better_reason(format!("had an error on its GPU: {error}")));
            }
            let Some((number, name, age)) = oldest else { continue };
            if let Some((culprit, since)) = self.control.left()
                && age.min(since.elapsed()) > AFTER_GOODBYE
            {
                self.control.fail(Failure::Lost { culprit, reason: "left before its turn".into() });
            } else if age > self.timeout {
                // Rank 0 knows who is behind, and answers with a failure.
                let since = reported.get_or_insert_with(|| {
                    self.control.report_hanging(number, &name, self.timeout);
                    Instant::now()
                });
                if since.elapsed() > LAST_ACTS {
                    let reason = format!("waits for {name} since {:.0} s", age.as_secs_f64());
                    self.control.fail(Failure::Lost { culprit: self.control.rank(), reason });
                }
            }
        }
        None
    }

    /// What is known of the failure after a moment; if nothing, that this rank is to blame.
    fn after_a_better_reason(&self, own: String) -> Failure {
        let end = Instant::now() + BETTER_REASON;
        while Instant::now() < end {
            if let Some(failure) = self.control.failure() {
                return failure;
            }
            thread::sleep(LOOK);
        }
        self.control.fail(Failure::Lost { culprit: self.control.rank(), reason: own.clone() });
        self.control.failure().unwrap_or(Failure::Lost { culprit: self.control.rank(), reason: own })
    }

    /// Ends this process, unless the main thread does it by itself.
    fn end(&self, failure: &Failure) {
        let own = failure.is_by(self.control.rank());
        let end = Instant::now() + if own { OWN_END_OF_CULPRIT } else { OWN_END };
        while Instant::now() < end {
            if self.closing.load(Ordering::Acquire) {
                return;
            }
            thread::sleep(LOOK);
        }
        // At once, so that lines of several ranks do not mix; and whoever read them may be gone.
        let line = format!("error: {}\n", failure.error(self.control.rank(), &self.current()));
        let _ = std::io::stderr().write_all(line.as_bytes());
        // Neither NCCL nor the end of the process may hang in turn.
        thread::spawn(|| {
            thread::sleep(LAST_ACTS);
            std::process::abort();
        });
        self.raw.abort();
        std::process::exit(if own { 1 } else { i32::from(BECAUSE_OF_ANOTHER_RANK) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn the_oldest_collective_is_named_until_it_is_over() {
        let over = [(); 3].map(|()| Cell::new(false));
        let mut outstanding = Outstanding::new();
        let settle = |outstanding: &mut Outstanding<usize>| {
            outstanding.settle(|&mark| if over[mark].get() { Ok(true) } else { Ok::<_, String>(false) }).unwrap();
        };
        assert!(outstanding.oldest().is_none());
        for mark in 0..3 {
            outstanding.push(mark as u64 + 7, format!("bucket {mark}"));
            settle(&mut outstanding);
            assert_eq!(outstanding.oldest().unwrap().0, 7, "what has not begun is not over");
            outstanding.begun(mark as u64 + 7, mark);
        }
        // The second being over does not help: they end in order.
        over[1].set(true);
        settle(&mut outstanding);
        thread::sleep(Duration::from_millis(20));
        let (number, name, age) = outstanding.oldest().unwrap();
        assert_eq!((number, name), (7, "bucket 0"));
        assert!(age >= Duration::from_millis(20));
        over[0].set(true);
        settle(&mut outstanding);
        let (number, name, age) = outstanding.oldest().unwrap();
        assert_eq!((number, name), (9, "bucket 2"));
        assert!(age < Duration::from_millis(20), "it is the oldest only now");
        over[2].set(true);
        settle(&mut outstanding);
        assert!(outstanding.oldest().is_none());
        outstanding.push(1, "x".into());
        outstanding.begun(1, 0);
        assert_eq!(outstanding.settle(|_| Err("no device")), Err("no device"));
    }
}
