//! The control plane: one TCP connection from every rank to rank 0, open for the whole run.
//!
//! It carries what the host has to agree on (small values, barriers) and who is lost. Rank 0 is told by a connection that
//! ends without a goodbye, by one that stays silent, or by a rank that says why it gives up; it tells all others. It also
//! names the ranks that do not come to an exchange in time.
//!
//! Everything a rank waits for, it waits for with an end.

use super::error::Failure;
use super::frame::{self, Message};
use super::{CommunicatorError, Ranks, Result};
use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long a rank waits for others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// For all to be there at the start.
    pub start: Duration,
    /// For a collective on tensors.
    pub collective: Duration,
    /// For values and barriers on the host: longer than anything that one rank does while others wait, such as preparing
    /// data or measuring losses at great lengths. A rank that dies or freezes meanwhile is noticed all the same.
    pub host: Duration,
    /// For a sign of life; each side gives one four times as often.
    pub silence: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { start: seconds(300), collective: seconds(600), host: seconds(6 * 3600), silence: seconds(20) }
    }
}

/// A rank's end of the control plane. Dropping it says goodbye.
#[derive(Debug)]
pub(crate) struct Control {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    rank: usize,
    ranks: usize,
    timeouts: Timeouts,
    /// Rank 0: the connection of each other rank; else only that of rank 0. What is written is written under the lock.
    links: Vec<Option<Mutex<TcpStream>>>,
    state: Mutex<State>,
    changed: Condvar,
    closing: AtomicBool,
    /// Collectives of the devices that this rank has begun.
    begun: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    /// Number of exchanges that are over.
    exchanges: u64,
    /// What the last of them gave.
    parts: Arc<Vec<Vec<u8>>>,
    /// Rank 0: the exchange under way.
    round: Round,
    /// By rank: when it said goodbye.
    left: Vec<Option<Instant>>,
    /// Rank 0, by rank: how many collectives of the devices it has begun, as last heard.
    begun: Vec<u64>,
    /// Another rank than 0: whether the exchange that it waits for is still to end.
    waits: bool,
    failure: Option<Failure>,
}

#[derive(Debug, Default)]
struct Round {
    parts: Vec<Option<Vec<u8>>>,
    first: Option<First>,
}

/// Who came first to an exchange.
#[derive(Debug)]
struct First {
    rank: usize,
    call: String,
    since: Instant,
    patience: Duration,
}

/// Time for a reason that is on its way.
const GRACE: Duration = Duration::from_millis(500);
const READER_STACK_BYTES: usize = 256 << 10;

impl Control {
    /// Over the connections of the rendezvous, by rank: on rank 0 of all others, else of rank 0.
    pub(super) fn start(
        rank: usize,
        ranks: usize,
        links: Vec<Option<TcpStream>>,
        timeouts: Timeouts,
    ) -> io::Result<Self> {
        let mut readers = Vec::new();
        for (peer, link) in links.iter().enumerate() {
            if let Some(link) = link {
                link.set_nodelay(true)?;
                link.set_write_timeout(Some(timeouts.silence))?;
                let reader = link.try_clone()?;
                reader.set_read_timeout(Some(timeouts.silence))?;
                readers.push((peer, reader));
            }
        }
        let round = Round { parts: vec![None; ranks], first: None };
        let shared = Arc::new(Shared {
            rank,
            ranks,
            timeouts,
            links: links.into_iter().map(|link| link.map(Mutex::new)).collect(),
            state: Mutex::new(State { round, left: vec![None; ranks], begun: vec![0; ranks], ..State::default() }),
            changed: Condvar::new(),
            closing: AtomicBool::new(false),
            begun: AtomicU64::new(0),
        });
        let control = Self { shared };
        for (peer, reader) in readers {
            let shared = Arc::clone(&control.shared);
            let work = move || shared.listen(peer, reader);
            thread::Builder::new().name(format!("hears rank {peer}")).stack_size(READER_STACK_BYTES).spawn(work)?;
        }
        let shared = Arc::clone(&control.shared);
        thread::Builder::new().name("control plane".into()).spawn(move || shared.beat())?;
        Ok(control)
    }

    pub(super) fn rank(&self) -> usize {
        self.shared.rank
    }

    pub(super) fn timeouts(&self) -> Timeouts {
        self.shared.timeouts
    }

    pub(super) fn ranks(&self) -> usize {
        self.shared.ranks
    }

    /// Why the group is of no more use, if it is.
    pub(super) fn failure(&self) -> Option<Failure> {
        self.shared.lock().failure.clone()
    }

    /// The rank that said goodbye first, and when.
    pub(super) fn left(&self) -> Option<(usize, Instant)> {
        let state = self.shared.lock();
        let left = state.left.iter().enumerate().filter_map(|(rank, since)| Some((rank, (*since)?)));
        left.min_by_key(|&(_, since)| since)
    }

    /// Counts a collective of the devices that this rank begins; its number, from 1 on.
    pub(super) fn count_collective(&self) -> u64 {
        self.shared.begun.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Says that a collective of the devices does not end. Rank 0 makes of it a failure that names the ranks which have not
    /// begun it.
    pub(super) fn report_hanging(&self, number: u64, name: &str, timeout: Duration) {
        let shared = &self.shared;
        if shared.rank == 0 {
            return shared.blame(0, number, name, timeout);
        }
        let _ = shared.send(0, &Message::Hanging { number, name: name.to_owned(), timeout }, &[]);
    }

    /// Gives `part` to all and returns the parts of all, by rank; fails if another rank takes longer than `patience`. `call`
    /// says what is called, sizes included; it has to be the same for all.
    pub(super) fn share(&self, call: &str, part: Vec<u8>, patience: Duration) -> Result<Arc<Vec<Vec<u8>>>> {
        let shared = &self.shared;
        let error = |failure: &Failure| failure.error(shared.rank, call);
        let mut state = shared.lock();
        if let Some(failure) = &state.failure {
            return Err(error(failure));
        }
        let exchange = state.exchanges;
        if shared.rank == 0 {
            shared.lay_down(&mut state, 0, exchange, call, part, patience);
        } else {
            drop(state);
            let message = Message::Share { exchange, call: call.to_owned(), patience };
            let sent = shared.send(0, &message, &part);
            state = shared.lock();
            if let Err(cause) = sent {
                // Rank 0 may have ended because of another rank, and said so before.
                let known = |state: &mut State| state.failure.is_none();
                state =
                    shared.changed.wait_timeout_while(state, GRACE, known).unwrap_or_else(PoisonError::into_inner).0;
                shared.fail_locked(&mut state, Failure::Lost { culprit: 0, reason: unreachable(&cause) });
            }
        }
        state.waits = state.exchanges == exchange;
        shared.check_left(&mut state);
        // Rank 0 ends a round that takes too long and says who is missing; longer than that it is itself in trouble.
        let end = Instant::now() + patience + 2 * shared.timeouts.silence;
        while state.exchanges == exchange {
            if let Some(failure) = &state.failure {
                return Err(error(failure));
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let failure = Failure::Missing { culprits: Ranks(vec![0]), timeout: patience };
                let error = error(&failure);
                shared.fail_locked(&mut state, failure);
                return Err(error);
            }
            state = shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(Arc::clone(&state.parts))
    }

    /// Tells all why the group is of no more use; the first reason stays.
    pub(super) fn fail(&self, failure: Failure) {
        self.shared.fail(failure);
    }

    /// The failure as this rank's error in a collective, if there is one.
    pub(super) fn check(&self, collective: &str) -> std::result::Result<(), CommunicatorError> {
        match &self.shared.lock().failure {
            Some(failure) => Err(failure.error(self.shared.rank, collective)),
            None => Ok(()),
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let shared = &self.shared;
        shared.closing.store(true, Ordering::Release);
        if thread::panicking() {
            let reason = "panicked".to_owned();
            shared.fail(Failure::Lost { culprit: shared.rank, reason });
        }
        for peer in shared.peers() {
            let _ = shared.send(peer, &Message::Goodbye, &[]);
            if let Some(link) = &shared.links[peer] {
                // Only this direction: what the other side still says is read, so that it is not reset.
                let _ = link.lock().unwrap_or_else(PoisonError::into_inner).shutdown(Shutdown::Write);
            }
        }
        shared.changed.notify_all();
    }
}

fn unreachable(cause: &io::Error) -> String {
    format!("cannot be reached: {cause}")
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn peers(&self) -> impl Iterator<Item = usize> {
        self.links.iter().enumerate().filter_map(|(peer, link)| link.is_some().then_some(peer))
    }

    fn send(&self, peer: usize, message: &Message, payload: &[u8]) -> io::Result<()> {
        let Some(link) = &self.links[peer] else { return Ok(()) };
        frame::write(&mut *link.lock().unwrap_or_else(PoisonError::into_inner), message, payload)
    }

    fn fail(&self, failure: Failure) {
        self.fail_locked(&mut self.lock(), failure);
    }

    fn fail_locked(&self, state: &mut State, failure: Failure) {
        if state.failure.is_none() {
            // Rank 0 tells all; another rank tells rank 0, which passes it on.
            for peer in self.peers() {
                let _ = self.send(peer, &Message::Failed(failure.clone()), &[]);
            }
            state.failure = Some(failure);
            self.changed.notify_all();
        }
    }

    /// Reads what a peer says until it says goodbye or is lost.
    fn listen(&self, peer: usize, mut link: TcpStream) {
        loop {
            let reason = match frame::read(&mut link) {
                Ok((Message::Goodbye, _)) => {
                    return self.take_leave(peer);
                }
                Ok((message, payload)) => match self.hear(peer, message, payload) {
                    Ok(()) => continue,
                    Err(unexpected) => unexpected,
                },
                Err(cause) => match cause.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                        format!("gave no sign of life for {:.1} s", self.timeouts.silence.as_secs_f64())
                    }
                    io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
                        "died: its connection ended without a goodbye".to_owned()
                    }
                    _ => format!("is lost: {cause}"),
                },
            };
            if !self.closing.load(Ordering::Acquire) {
                self.fail(Failure::Lost { culprit: peer, reason });
            }
            return;
        }
    }

    fn hear(&self, peer: usize, message: Message, payload: Vec<u8>) -> std::result::Result<(), String> {
        match message {
            Message::Alive { begun } => self.lock().begun[peer] = begun,
            Message::Failed(failure) => self.fail(failure),
            Message::Left { rank } if rank < self.ranks => self.take_leave(rank),
            Message::Hanging { number, name, timeout } if self.rank == 0 => self.blame(peer, number, &name, timeout),
            Message::Share { exchange, call, patience } if self.rank == 0 => {
                self.lay_down(&mut self.lock(), peer, exchange, &call, payload, patience);
            }
            Message::Shared { exchange, lengths } if self.rank != 0 => {
                let parts = split(&payload, &lengths).ok_or("sent parts that do not add up")?;
                let mut state = self.lock();
                if exchange != state.exchanges || parts.len() != self.ranks {
                    return Err(format!("sent exchange {exchange} where {} was due", state.exchanges));
                }
                state.parts = Arc::new(parts);
                state.exchanges += 1;
                state.waits = false;
                self.changed.notify_all();
            }
            other => return Err(format!("sent an unexpected message: {other:?}")),
        }
        Ok(())
    }

    /// A rank has said goodbye.
    fn take_leave(&self, rank: usize) {
        let mut state = self.lock();
        state.left[rank].get_or_insert_with(Instant::now);
        if self.rank == 0 {
            for peer in self.peers().filter(|&peer| peer != rank) {
                let _ = self.send(peer, &Message::Left { rank }, &[]);
            }
        }
        self.check_left(&mut state);
    }

    /// Rank 0: finds out who keeps a collective of the devices from ending.
    fn blame(&self, reporter: usize, number: u64, name: &str, timeout: Duration) {
        let mut state = self.lock();
        state.begun[0] = self.begun.load(Ordering::Relaxed);
        let behind: Vec<usize> = (0..self.ranks).filter(|&rank| state.begun[rank] < number).collect();
        let failure = if behind.is_empty() {
            let seconds = timeout.as_secs_f64();
            let reason = format!(
                "waits for {name} since {seconds:.0} s, which all ranks have begun: a GPU or the network between them hangs"
            );
            Failure::Lost { culprit: reporter, reason }
        } else {
            Failure::Missing { culprits: Ranks(behind), timeout }
        };
        self.fail_locked(&mut state, failure);
    }

    /// Rank 0: takes a rank's part; the last part ends the exchange.
    fn lay_down(&self, state: &mut State, rank: usize, exchange: u64, call: &str, part: Vec<u8>, patience: Duration) {
        if exchange != state.exchanges || state.round.parts[rank].is_some() {
            let reason = format!("sent exchange {exchange} where {} was due", state.exchanges);
            return self.fail_locked(state, Failure::Lost { culprit: rank, reason });
        }
        match &state.round.first {
            None => {
                state.round.first = Some(First { rank, call: call.to_owned(), since: Instant::now(), patience });
            }
            Some(first) if first.call != call => {
                let one = (first.rank, first.call.clone());
                return self.fail_locked(state, Failure::Disagreement { one, other: (rank, call.to_owned()) });
            }
            Some(_) => {}
        }
        state.round.parts[rank] = Some(part);
        if state.round.parts.iter().any(Option::is_none) {
            return self.check_left(state);
        }
        let parts: Vec<Vec<u8>> = state.round.parts.iter_mut().filter_map(Option::take).collect();
        state.round.first = None;
        let message = Message::Shared { exchange, lengths: parts.iter().map(|part| part.len() as u64).collect() };
        let payload = parts.concat();
        // Sent before rank 0 goes on: it may end its process next.
        for peer in self.peers() {
            if let Err(cause) = self.send(peer, &message, &payload) {
                return self.fail_locked(state, Failure::Lost { culprit: peer, reason: unreachable(&cause) });
            }
        }
        state.parts = Arc::new(parts);
        state.exchanges += 1;
        self.changed.notify_all();
    }

    /// Fails an exchange that a rank which left can no longer come to.
    fn check_left(&self, state: &mut State) {
        let under_way = if self.rank == 0 { state.round.first.is_some() } else { state.waits };
        let gone = (0..self.ranks).find(|&rank| state.left[rank].is_some() && state.round.parts[rank].is_none());
        if let (true, Some(culprit)) = (under_way, gone) {
            self.fail_locked(state, Failure::Lost { culprit, reason: "left before its turn".into() });
        }
    }

    /// Gives signs of life; on rank 0 also ends exchanges that take too long.
    fn beat(&self) {
        let (beat, step) = (self.timeouts.silence / 4, Duration::from_millis(50));
        let mut last = Instant::now();
        while !self.closing.load(Ordering::Acquire) {
            thread::sleep(step.min(beat));
            if last.elapsed() >= beat {
                last = Instant::now();
                for peer in self.peers() {
                    // A peer that cannot be reached is reported by the thread that hears it.
                    let begun = self.begun.load(Ordering::Relaxed);
                    let _ = self.send(peer, &Message::Alive { begun }, &[]);
                }
            }
            let mut state = self.lock();
            if self.rank == 0
                && let Some(First { since, patience, .. }) = &state.round.first
                && since.elapsed() > *patience
            {
                let timeout = *patience;
                let parts = &state.round.parts;
                let culprits = Ranks((0..self.ranks).filter(|&rank| parts[rank].is_none()).collect());
                self.fail_locked(&mut state, Failure::Missing { culprits, timeout });
            }
        }
    }
}

fn split(mut payload: &[u8], lengths: &[u64]) -> Option<Vec<Vec<u8>>> {
    let mut parts = Vec::with_capacity(lengths.len());
    for &length in lengths {
        let (part, rest) = payload.split_at_checked(usize::try_from(length).ok()?)?;
        parts.push(part.to_vec());
        payload = rest;
    }
    payload.is_empty().then_some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    const LONG: Duration = Duration::from_secs(30);

    /// Control planes of ranks in this process.
    fn group(ranks: usize, silence: Duration) -> Vec<Control> {
        let timeouts = Timeouts { start: LONG, collective: LONG, host: LONG, silence };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut links = vec![None];
        let mut others = Vec::new();
        for rank in 1..ranks {
            let far = TcpStream::connect(address).unwrap();
            links.push(Some(listener.accept().unwrap().0));
            let far = std::iter::once(Some(far)).chain((1..ranks).map(|_| None)).collect();
            others.push(Control::start(rank, ranks, far, timeouts).unwrap());
        }
        let zero = Control::start(0, ranks, links, timeouts).unwrap();
        std::iter::once(zero).chain(others).collect()
    }

    /// What a rank sees within the time.
    fn soon<T>(what: impl Fn() -> Option<T>) -> T {
        let end = Instant::now() + LONG;
        loop {
            if let Some(seen) = what() {
                return seen;
            }
            assert!(Instant::now() < end, "nothing was seen");
            thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn a_hanging_collective_is_blamed_on_the_ranks_that_have_not_begun_it() {
        for reporter in [0, 1] {
            let group = group(4, Duration::from_millis(400));
            for control in &group[..3] {
                control.count_collective();
            }
            for control in [&group[0], &group[1]] {
                assert_eq!(control.count_collective(), 2);
            }
            // The numbers travel with the signs of life.
            soon(|| (group[0].shared.lock().begun[1..] == [2, 1, 0]).then_some(()));
            group[reporter].report_hanging(2, "reduce_scatter \"bucket 3\"", Duration::from_secs(9));
            for (rank, control) in group.iter().enumerate() {
                let error = soon(|| control.check("reduce_scatter \"bucket 3\"").err()).to_string();
                let expected =
                    format!("rank {rank}: reduce_scatter \"bucket 3\": ranks 2 and 3 did not come within 9.0 s");
                assert!(error.starts_with(&expected), "{error}");
            }
        }
    }

    #[test]
    fn a_collective_that_all_have_begun_is_blamed_on_who_waits_for_it() {
        let group = group(2, Duration::from_millis(400));
        for control in &group {
            control.count_collective();
        }
        soon(|| (group[0].shared.lock().begun[1] == 1).then_some(()));
        group[1].report_hanging(1, "all_gather \"weights\"", Duration::from_secs(9));
        let error = soon(|| group[0].check("x").err()).to_string();
        assert!(
            error.contains("rank 1 waits for all_gather \"weights\" since 9 s") && error.contains("network"),
            "{error}"
        );
    }

    #[test]
    fn a_goodbye_is_seen_by_all_and_is_no_failure() {
        let mut group = group(3, LONG);
        drop(group.pop());
        for control in &group {
            assert_eq!(soon(|| control.left()).0, 2);
            assert_eq!(control.failure(), None);
        }
        drop(group.remove(0));
        soon(|| group[0].shared.lock().left[0]);
        assert_eq!(group[0].failure(), None);
        let error = group[0].share("late", vec![], LONG).unwrap_err().to_string();
        assert!(error.contains("late: rank 0 left before its turn"), "{error}");
    }
}
