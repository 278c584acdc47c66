//! A thread that ends a process whose group is of no more use.
//!
//! A collective whose partner is gone waits for ever on the device, and the host with it. So a thread of its own looks, ten
//! times a second, at the control plane, at NCCL's asynchronous errors, and at how long the oldest collective has been under
//! way. If something is wrong, all ranks are told; this process gets a moment to end by itself with its own error, then
//! the communicator is aborted and the process ends.
//!
//! The watchdog's own calls may block: in the driver while the main thread waits there for room on a full queue, in NCCL
//! behind a call that does not return. So a second thread, the guard, looks at the watchdog and at the control plane and calls
//! neither of the two. It reports a hang that the watchdog cannot, and ends a process that has not ended in time.

use super::super::BECAUSE_OF_ANOTHER_RANK;
use super::super::control::Control;
use super::super::error::Failure;
use super::bind;
use super::library::Raw;
use std::collections::VecDeque;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use stickbreak_kernels::KernelError;
use stickbreak_kernels::cuda::{Event, Queue};

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
/// How much later than the watchdog the guard ends the process.
const LATER: Duration = Duration::from_secs(1);
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

    /// Number and mark of the oldest, if it has begun.
    fn next_to_end(&self) -> Option<(u64, &M)> {
        self.list.front().and_then(|(number, _, end)| Some((*number, end.as_ref()?)))
    }

    /// Takes away what is over, or could not be begun.
    pub(super) fn remove(&mut self, number: u64) {
        let oldest = self.list.front().is_some_and(|(first, ..)| *first == number);
        self.list.retain(|(known, ..)| *known != number);
        if oldest {
            self.since = Instant::now();
        }
    }

    /// Number and name of the oldest, and for how long it has been that.
    pub(super) fn oldest(&self) -> Option<(u64, &str, Duration)> {
        self.list.front().map(|(number, name, _)| (*number, name.as_str(), self.since.elapsed()))
    }
}

/// Takes away the collectives that are over. The list is not locked while the device is asked, which may block.
fn settle<M: Clone, E>(outstanding: &Mutex<Outstanding<M>>, is_over: impl Fn(&M) -> Result<bool, E>) -> Result<(), E> {
    let list = || outstanding.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let next = list().next_to_end().map(|(number, mark)| (number, mark.clone()));
        let Some((number, mark)) = next else { return Ok(()) };
        if !is_over(&mark)? {
            return Ok(());
        }
        list().remove(number);
    }
}

/// What the watchdog and the guard look at.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) control: Control,
    pub(super) raw: Arc<Raw>,
    computing: Queue,
    pub(super) outstanding: Mutex<Outstanding<Arc<Event>>>,
    /// Longest that a collective may be the oldest.
    pub(super) timeout: Duration,
    pub(super) closing: AtomicBool,
    start: Instant,
    /// When the watchdog looked last: milliseconds since `start`.
    looked: AtomicU64,
    /// Whether the error was printed.
    said: AtomicBool,
}

/// Starts the watchdog and the guard, which end after `closing` is set.
pub(super) fn start(watched: &Arc<Watched>) -> std::io::Result<Vec<JoinHandle<()>>> {
    let spawn = |name: &str, work: fn(&Watched)| {
        let watched = Arc::clone(watched);
        thread::Builder::new().name(name.into()).spawn(move || work(&watched))
    };
    let threads = [("watchdog", Watched::watch_and_end as fn(&Watched)), ("guard", Watched::guard)];
    let started: std::io::Result<Vec<_>> = threads.into_iter().map(|(name, work)| spawn(name, work)).collect();
    if started.is_err() {
        watched.closing.store(true, Ordering::Release);
    }
    started
}

impl Watched {
    pub(super) fn new(control: Control, raw: Arc<Raw>, computing: Queue, timeout: Duration) -> Self {
        Self {
            control,
            raw,
            computing,
            outstanding: Mutex::new(Outstanding::new()),
            timeout,
            closing: AtomicBool::new(false),
            start: Instant::now(),
            looked: AtomicU64::new(0),
            said: AtomicBool::new(false),
        }
    }

    fn list(&self) -> MutexGuard<'_, Outstanding<Arc<Event>>> {
        self.outstanding.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Name of the oldest collective, for messages.
    pub(super) fn current(&self) -> String {
        self.list().oldest().map_or("between collectives".to_owned(), |(_, name, _)| name.to_owned())
    }

    fn oldest(&self) -> Option<(u64, String, Duration)> {
        self.list().oldest().map(|(number, name, age)| (number, name.to_owned(), age))
    }

    fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    fn watch_and_end(&self) {
        bind(&self.computing);
        if let Some(failure) = self.watch() {
            self.end(&failure);
        }
    }

    /// A pause between two looks, after which the watchdog is still at work.
    fn pause(&self) {
        thread::sleep(LOOK);
        self.looked.store(self.start.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// Returns why the group is of no more use, or nothing once it is closed in order.
    fn watch(&self) -> Option<Failure> {
        let mut hang = Hang::default();
        while !self.is_closing() {
            self.pause();
            if let Some(failure) = self.control.failure() {
                return Some(failure);
            }
            if let Err(error) = self.raw.status() {
                return Some(self.after_a_better_reason(format!("had an error in {}: {error}", self.current())));
            }
            let settled: Result<(), KernelError> = settle(&self.outstanding, |mark| mark.is_reached());
            if let Err(error) = settled {
                return Some(self.after_a_better_reason(format!("had an error on its GPU: {error}")));
            }
            let Some(oldest) = self.oldest() else { continue };
            if let Some((culprit, since)) = self.control.left()
                && oldest.2.min(since.elapsed()) > AFTER_GOODBYE
            {
                self.control.fail(Failure::Lost { culprit, reason: "left before its turn".into() });
            } else {
                hang.report(&self.control, oldest, self.timeout);
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
            self.pause();
        }
        self.control.fail(Failure::Lost { culprit: self.control.rank(), reason: own.clone() });
        self.control.failure().unwrap_or(Failure::Lost { culprit: self.control.rank(), reason: own })
    }

    /// Ends this process, unless the main thread does it by itself.
    fn end(&self, failure: &Failure) {
        let end = Instant::now() + own_end(failure, self.control.rank());
        while Instant::now() < end {
            if self.is_closing() {
                return;
            }
            thread::sleep(LOOK);
        }
        self.say(failure);
        let code = code(failure, self.control.rank());
        // The abort may hang in turn, also after `closing` is set, with which the guard ends.
        end_after(LAST_ACTS, code);
        self.raw.abort();
        // Without the handlers of CUDA and NCCL: the main thread may be in the driver.
        signal_hook::low_level::exit(code);
    }

    /// Ends this process after a moment, in case its orderly end waits for the driver: no abort ends a stream that waits for
    /// a lost rank to write to this one's memory, whether the abort itself waits or not.
    pub(super) fn end_late(&self) {
        if let Some(failure) = self.control.failure() {
            end_after(LAST_ACTS, code(&failure, self.control.rank()));
        }
    }

    /// Prints the error, once.
    fn say(&self, failure: &Failure) {
        if !self.said.swap(true, Ordering::Relaxed) {
            // At once, so that lines of several ranks do not mix; and whoever read them may be gone.
            let line = format!("error: {}\n", failure.error(self.control.rank(), &self.current()));
            let mut stderr = std::io::stderr();
            let _ = stderr.write_all(line.as_bytes()).and_then(|()| stderr.flush());
        }
    }

    /// The guard's work: no call into the driver or NCCL.
    fn guard(&self) {
        let mut guard = Guard::default();
        while !self.is_closing() {
            thread::sleep(LOOK);
            let looked = Duration::from_millis(self.looked.load(Ordering::Relaxed));
            let silent = self.start.elapsed().saturating_sub(looked);
            if let Some(failure) = guard.look(&self.control, self.oldest(), silent, self.timeout)
                && !self.is_closing()
            {
                self.say(&failure);
                signal_hook::low_level::exit(code(&failure, self.control.rank()));
            }
        }
    }
}

/// Ends this process after a while, whatever its other threads wait for.
fn end_after(pause: Duration, code: i32) {
    let last_acts = move || {
        thread::sleep(pause);
        signal_hook::low_level::exit(code);
    };
    let _ = thread::Builder::new().name("last acts".into()).spawn(last_acts);
}

/// Time for a rank's main thread to end by itself.
fn own_end(failure: &Failure, rank: usize) -> Duration {
    if failure.is_by(rank) { OWN_END_OF_CULPRIT } else { OWN_END }
}

/// The exit code of a rank's process.
fn code(failure: &Failure, rank: usize) -> i32 {
    if failure.is_by(rank) { 1 } else { i32::from(BECAUSE_OF_ANOTHER_RANK) }
}

/// A collective that does not end: since when that is reported.
#[derive(Debug, Default)]
struct Hang(Option<Instant>);

impl Hang {
    /// Reports the oldest collective (number, name, age) if it is older than the timeout.
    fn report(&mut self, control: &Control, (number, name, age): (u64, String, Duration), timeout: Duration) {
        if age <= timeout {
            return;
        }
        // Rank 0 knows who is behind, and answers with a failure.
        let since = self.0.get_or_insert_with(|| {
            control.report_hanging(number, &name, timeout);
            Instant::now()
        });
        if since.elapsed() > LAST_ACTS {
            let reason = format!("waits for {name} since {:.0} s", age.as_secs_f64());
            control.fail(Failure::Lost { culprit: control.rank(), reason });
        }
    }
}

/// What the guard remembers between its looks.
#[derive(Debug, Default)]
struct Guard {
    failed: Option<Instant>,
    hang: Hang,
}

impl Guard {
    /// Returns the failure because of which the process has to end now. Without one it reports the oldest collective, if it
    /// and the watchdog's silence are longer than the timeout.
    fn look(
        &mut self,
        control: &Control,
        oldest: Option<(u64, String, Duration)>,
        silent: Duration,
        timeout: Duration,
    ) -> Option<Failure> {
        let Some(failure) = control.failure() else {
            if let Some(oldest) = oldest
                && silent > timeout
            {
                self.hang.report(control, oldest, timeout);
            }
            return None;
        };
        let since = *self.failed.get_or_insert_with(Instant::now);
        (since.elapsed() > own_end(&failure, control.rank()) + LAST_ACTS + LATER).then_some(failure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::distributed::Timeouts;
    use std::cell::Cell;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn the_oldest_collective_is_named_until_it_is_over() {
        let over = [(); 3].map(|()| Cell::new(false));
        let list = Mutex::new(Outstanding::new());
        let outstanding = || list.lock().unwrap();
        let oldest = || outstanding().oldest().map(|(number, name, age)| (number, name.to_owned(), age)).unwrap();
        let settle = || settle(&list, |&mark: &usize| Ok::<_, String>(over[mark].get())).unwrap();
        assert!(outstanding().oldest().is_none());
        for mark in 0..3 {
            outstanding().push(mark as u64 + 7, format!("bucket {mark}"));
            settle();
            assert_eq!(oldest().0, 7, "what has not begun is not over");
            outstanding().begun(mark as u64 + 7, mark);
        }
        // The second being over does not help: they end in order.
        over[1].set(true);
        settle();
        thread::sleep(Duration::from_millis(20));
        let (number, name, age) = oldest();
        assert_eq!((number, name.as_str()), (7, "bucket 0"));
        assert!(age >= Duration::from_millis(20));
        over[0].set(true);
        settle();
        let (number, name, age) = oldest();
        assert_eq!((number, name.as_str()), (9, "bucket 2"));
        assert!(age < Duration::from_millis(20), "it is the oldest only now");
        over[2].set(true);
        settle();
        assert!(outstanding().oldest().is_none());
        outstanding().push(1, "x".into());
        outstanding().begun(1, 0);
        assert_eq!(super::settle(&list, |_| Err("no device")), Err("no device"));
    }

    #[test]
    fn what_could_not_be_begun_is_taken_away() {
        let mut outstanding = Outstanding::<()>::new();
        for number in 1..4 {
            outstanding.push(number, format!("bucket {number}"));
        }
        thread::sleep(Duration::from_millis(20));
        outstanding.remove(2);
        let (number, _, age) = outstanding.oldest().unwrap();
        assert!(number == 1 && age >= Duration::from_millis(20), "the oldest is the same: {number}, {age:?}");
        outstanding.remove(1);
        let (number, _, age) = outstanding.oldest().unwrap();
        assert!(number == 3 && age < Duration::from_millis(20), "it is the oldest only now: {number}, {age:?}");
        outstanding.remove(3);
        assert!(outstanding.oldest().is_none());
    }

    /// Control planes of two ranks in this process.
    fn pair() -> [Control; 2] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let near = listener.accept().unwrap().0;
        [(0, vec![None, Some(near)]), (1, vec![Some(far), None])]
            .map(|(rank, links)| Control::start(rank, 2, links, Timeouts::default()).unwrap())
    }

    #[test]
    fn the_guard_reports_a_hang_only_if_the_watchdog_is_silent() {
        let [zero, one] = pair();
        zero.count_collective();
        let (timeout, long) = (Duration::from_secs(9), Duration::from_secs(10));
        let mut guard = Guard::default();
        for (age, silent) in [(long, timeout), (timeout, long)] {
            guard.look(&zero, Some((1, "bucket 1".into(), age)), silent, timeout);
        }
        guard.look(&zero, None, long, timeout);
        assert_eq!((zero.failure(), one.failure()), (None, None));
        assert_eq!(guard.look(&zero, Some((1, "bucket 1".into(), long)), long, timeout), None, "there is time to end");
        let error = zero.check("bucket 1").unwrap_err().to_string();
        assert!(error.contains("bucket 1: rank 1 did not come within 9.0 s"), "{error}");
    }

    #[test]
    fn the_guard_ends_a_process_that_has_not_ended_in_time() {
        let [zero, one] = pair();
        let failure = Failure::Lost { culprit: 1, reason: "died".into() };
        one.fail(failure.clone());
        let end = Instant::now() + Duration::from_secs(30);
        while zero.failure().is_none() && Instant::now() < end {
            thread::sleep(Duration::from_millis(2));
        }
        let ago = |seconds| Instant::now().checked_sub(Duration::from_secs(seconds));
        // Seconds after the failure, by rank: the one to blame has longer.
        for (control, too_early, late, exit) in [(&zero, 7, 9, 75), (&one, 15, 17, 1)] {
            let mut guard = Guard::default();
            assert_eq!(guard.look(control, None, Duration::ZERO, Duration::ZERO), None);
            assert!(guard.failed.is_some());
            guard.failed = ago(too_early);
            assert_eq!(guard.look(control, None, Duration::ZERO, Duration::ZERO), None);
            guard.failed = ago(late);
            assert_eq!(guard.look(control, None, Duration::ZERO, Duration::ZERO), Some(failure.clone()));
            assert_eq!(code(&failure, control.rank()), exit);
        }
    }
}
