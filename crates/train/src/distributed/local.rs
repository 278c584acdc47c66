//! Ranks as threads of one process, on CPU tensors: the communicator of the tests.
//!
//! It is as strict as the real one: a rank that leaves, panics, aborts or does not come makes the calls of all others fail
//! and names itself; ranks that call different things are told so. Sums run in the order of the ranks.

use super::cpu::OnCpu;
use super::error::Failure;
use super::reduce::{Compute, Number, for_number};
use super::{Call, Communicator, CommunicatorError, Ranks, Result};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use stickbreak_tensor::Tensor;

/// What the ranks of one process share.
#[derive(Debug)]
pub struct LocalGroup {
    ranks: usize,
    timeout: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

/// One exchange at a time: every rank lays something down; when all have, everyone takes everything.
#[derive(Debug, Default)]
struct State {
    /// Number of exchanges that are over.
    exchanges: u64,
    laid_down: Vec<Option<Item>>,
    /// Of the last exchange. All have taken it before the next one can be over.
    taken: Arc<Vec<Item>>,
    /// By rank: how it left.
    left: Vec<Option<&'static str>>,
    /// The first failure, which all later calls repeat.
    failure: Option<Failure>,
}

/// What a rank lays down.
#[derive(Debug, Clone)]
struct Item {
    /// Collective, name and sizes: has to be the same for all.
    call: String,
    content: Content,
}

#[derive(Debug, Clone)]
enum Content {
    Tensor(Tensor),
    Values(Vec<f64>),
    /// The rank has read what it wanted of the others' tensors, which may be written now.
    HasRead,
}

impl LocalGroup {
    /// The communicators of `ranks` ranks, by rank. One that waits longer than `timeout` for the others gives up.
    ///
    /// # Panics
    /// If `ranks` is 0.
    pub fn with_ranks(ranks: usize, timeout: Duration) -> Vec<LocalCommunicator> {
        assert!(ranks > 0, "a group needs a rank");
        let state = State { laid_down: vec![None; ranks], left: vec![None; ranks], ..State::default() };
        let group = Arc::new(Self { ranks, timeout, state: Mutex::new(state), changed: Condvar::new() });
        (0..ranks).map(|rank| LocalCommunicator { group: Arc::clone(&group), rank }).collect()
    }

    /// Runs `work` on each rank, in a thread of its own, and returns what each gave, by rank; a panic is passed on as the
    /// thread's result.
    ///
    /// # Panics
    /// If `ranks` is 0.
    pub fn run<T: Send>(
        ranks: usize,
        timeout: Duration,
        work: impl Fn(Arc<dyn Communicator>) -> T + Sync,
    ) -> Vec<std::thread::Result<T>> {
        let communicators = Self::with_ranks(ranks, timeout);
        std::thread::scope(|scope| {
            let work = &work;
            let start = |communicator| scope.spawn(move || work(Arc::new(communicator)));
            let threads: Vec<_> = communicators.into_iter().map(start).collect();
            threads.into_iter().map(|thread| thread.join()).collect()
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One rank of a [`LocalGroup`]. Dropping it means that the rank leaves.
#[derive(Debug)]
pub struct LocalCommunicator {
    group: Arc<LocalGroup>,
    rank: usize,
}

impl Drop for LocalCommunicator {
    fn drop(&mut self) {
        let how = if std::thread::panicking() { "panicked" } else { "left before its turn" };
        self.group.lock().left[self.rank] = Some(how);
        self.group.changed.notify_all();
    }
}

impl LocalCommunicator {
    /// Lays an item down and returns those of all ranks, by rank.
    fn lay_down(&self, name: &str, item: Item) -> Result<Arc<Vec<Item>>> {
        let group = &self.group;
        let mut state = group.lock();
        if let Some(failure) = &state.failure {
            return Err(failure.error(self.rank, name));
        }
        let mine = state.exchanges;
        state.laid_down[self.rank] = Some(item);
        if state.laid_down.iter().all(Option::is_some) {
            let items: Vec<Item> = state.laid_down.iter_mut().filter_map(Option::take).collect();
            state.taken = Arc::new(items);
            state.exchanges += 1;
            group.changed.notify_all();
        }
        let deadline = Instant::now() + group.timeout;
        while state.exchanges == mine {
            let absent: Vec<usize> = (0..group.ranks).filter(|&rank| state.laid_down[rank].is_none()).collect();
            if let Some(failure) = &state.failure {
                return Err(failure.error(self.rank, name));
            }
            let gone = absent.iter().find_map(|&culprit| Some((culprit, state.left[culprit]?)));
            if let Some((culprit, how)) = gone {
                return Err(self.fail_all(state, name, Failure::Lost { culprit, reason: how.into() }));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.fail_all(
                    state,
                    name,
                    Failure::Missing { culprits: Ranks(absent), timeout: group.timeout },
                ));
            }
            state = group.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(Arc::clone(&state.taken))
    }

    fn fail_all(&self, mut state: MutexGuard<'_, State>, name: &str, failure: Failure) -> CommunicatorError {
        let error = failure.error(self.rank, name);
        state.failure.get_or_insert(failure);
        self.group.changed.notify_all();
        error
    }

    /// Refuses a call that is not the same for all ranks. Every rank sees the same items, so all refuse it.
    fn agree(&self, items: &[Item]) -> Result<()> {
        let mine = &items[self.rank].call;
        let Some(other) = items.iter().position(|item| item.call != *mine) else { return Ok(()) };
        let called = |rank: usize| (rank, items[rank].call.clone());
        let failure = Failure::Disagreement { one: called(self.rank), other: called(other) };
        let error = failure.error(self.rank, mine);
        self.group.lock().failure.get_or_insert(failure);
        Err(error)
    }

    /// Computes what this rank gets of everyone's, and writes it once all have computed theirs.
    fn compute<T: Number>(&self, name: &str, items: &[Item], to: &Tensor, compute: impl Compute) -> Result<()> {
        let broken = |source| CommunicatorError::Tensor { rank: self.rank, collective: name.to_owned(), source };
        let result = {
            let tensors = items.iter().filter_map(|item| match &item.content {
                Content::Tensor(tensor) => Some(tensor),
                _ => None,
            });
            let guards = tensors.map(|tensor| Ok((tensor.read::<T>()?, tensor.elements())));
            let guards: Vec<_> = guards.collect::<std::result::Result<_, _>>().map_err(broken)?;
            let values: Vec<&[T]> = guards.iter().map(|(guard, elements)| &guard[..*elements]).collect();
            compute.result(&values)
        };
        // Whoever writes sooner would write what another rank is still reading.
        self.lay_down(name, Item { call: name.to_owned(), content: Content::HasRead })?;
        to.write::<T>().map_err(broken)?.copy_from_slice(&result);
        Ok(())
    }
}

impl OnCpu for LocalCommunicator {
    fn place(&self) -> (usize, usize) {
        (self.rank, self.group.ranks)
    }

    fn exchange(
        &self,
        call: Call<'_>,
        described: String,
        from: &Tensor,
        to: &Tensor,
        compute: impl Compute,
    ) -> Result<()> {
        let name = call.name();
        let items = self.lay_down(&name, Item { call: described, content: Content::Tensor(from.clone()) })?;
        self.agree(&items)?;
        for_number!(from.dtype(), T => self.compute::<T>(&name, &items, to, compute))
    }

    fn exchange_values(&self, call: Call<'_>, values: &[f64]) -> Result<Vec<Vec<f64>>> {
        let name = call.name();
        let items = self.lay_down(&name, Item { call: name.clone(), content: Content::Values(values.to_vec()) })?;
        self.agree(&items)?;
        let values = items.iter().map(|item| match &item.content {
            Content::Values(values) => values.clone(),
            // Not reached: the calls are the same, and this call lays down values.
            _ => Vec::new(),
        });
        Ok(values.collect())
    }

    fn give_up(&self, reason: &str) {
        let failure = Failure::Lost { culprit: self.rank, reason: format!("gave up: {reason}") };
        self.group.lock().failure.get_or_insert(failure);
        self.group.changed.notify_all();
    }
}
