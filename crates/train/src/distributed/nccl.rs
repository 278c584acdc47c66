//! Ranks with a GPU each: collectives by NCCL, on a queue of their own beside the one that computes.
//!
//! A collective starts behind the work that the computing queue holds, and its ticket lets that queue's later work wait for
//! it; both by marks on the device, so the host goes on. What the host waits for (values, barriers) goes over the
//! control plane (`control.rs`), and a watchdog (`nccl/watchdog.rs`) ends the process if the group breaks.

#![allow(unsafe_code)]

mod library;
mod watchdog;

use super::control::{Control, Timeouts};
use super::error::Failure;
use super::host;
use super::launch::{Launch, Master};
use super::rendezvous::{self, Luggage};
use super::{Call, Communicator, CommunicatorError, Pending, Reduction, Result, Ticket};
use crate::profile;
use crate::signal::StopFlag;
use library::{Nccl, Op, Raw, Work};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use stickbreak_kernels::cuda::{Event, Queue};
use stickbreak_tensor::{Device, Tensor, cuda};
use watchdog::Watched;

/// Time for the ranks to part in order, and again for NCCL to free what it has.
const PARTING: Duration = Duration::from_secs(5);
/// Time for NCCL to begin a collective before the host sleeps meanwhile: a sleep takes longer than most beginnings.
const AT_ONCE: Duration = Duration::from_micros(100);

/// The communicator of a process with a GPU.
#[derive(Debug)]
pub struct NcclCommunicator {
    watched: Arc<Watched>,
    /// The watchdog and its guard.
    watching: Vec<JoinHandle<()>>,
    ordinal: usize,
    /// The device's one queue, on which all tensors are used.
    computing: Queue,
    communicating: Queue,
    /// Whether all ranks are on one host.
    one_host: bool,
    /// What all ranks reach in each other's memory; kept until NCCL has let go of it.
    shared: Mutex<Vec<Tensor>>,
    /// Collectives are started one at a time, in one order for device, list and numbers.
    starting: Mutex<()>,
}

/// The version of the library that is there and where it was found; else where it was looked for.
///
/// # Errors
/// If it is not found, is too old, or is broken.
pub fn version() -> std::result::Result<String, String> {
    library::nccl().map(|nccl| format!("{} ({})", nccl.version(), nccl.place()))
}

impl NcclCommunicator {
    /// Meets the other ranks and connects this one's device with theirs.
    pub(super) fn connect(
        launch: &Launch,
        master: &Master,
        ordinal: usize,
        identity: &[(String, String)],
        timeouts: Timeouts,
        stop: &StopFlag,
    ) -> Result<Self> {
        const START: &str = "connecting the GPUs";
        let refuse = |why: String| CommunicatorError::Gpu { rank: launch.rank, collective: START.to_owned(), why };
        library::check_blocking(std::env::var_os(library::BLOCKING).as_deref()).map_err(refuse)?;
        let nccl = library::nccl().map_err(refuse)?;
        let computing = cuda::queue(ordinal).map_err(|error| refuse(error.to_string()))?;
        let gpu = |error: stickbreak_kernels::KernelError| refuse(error.to_string());
        let mut identity = identity.to_vec();
        identity.push(("version of NCCL".to_owned(), nccl.version().to_string()));
        let luggage = Luggage {
            identity: &identity,
            device: Some(computing.gpu().uuid().map_err(gpu)?),
            for_all: if launch.rank == 0 { nccl.unique_id().map_err(refuse)? } else { Vec::new() },
            stop: stop.clone(),
        };
        let met = rendezvous::meet(launch, master, luggage, timeouts)?;
        let communicating = computing.beside().map_err(gpu)?;
        let raw = connect_device(nccl, &computing, &met.for_all, &met.control, timeouts.start).map_err(|why| {
            // The others learn from the control plane; what they know of each other says more than a late NCCL.
            let error = met.control.check(START).err();
            met.control.fail(Failure::Lost { culprit: launch.rank, reason: format!("could not connect: {why}") });
            error.unwrap_or_else(|| refuse(why))
        })?;
        let mut hosts = met.hosts.clone();
        hosts.dedup();
        let one_host = hosts.len() == 1;
        if launch.rank == 0 {
            tracing::info!(
                "{} ranks on {} are connected by NCCL {} ({})",
                launch.ranks,
                hosts.join(", "),
                nccl.version(),
                nccl.place()
            );
        }
        let watched = Arc::new(Watched::new(met.control, raw, computing.clone(), timeouts.collective));
        let watching = watchdog::start(&watched).map_err(|error| refuse(error.to_string()))?;
        let (shared, starting) = (Mutex::default(), Mutex::default());
        Ok(Self { watched, watching, ordinal, computing, communicating, one_host, shared, starting })
    }

    fn call<'a>(&self, collective: &'static str, what: &'a str) -> Call<'a> {
        Call { rank: self.rank(), ranks: self.ranks(), collective, what }
    }

    /// The addresses of tensors that are checked, on this rank's device.
    fn addresses<const N: usize>(&self, call: Call<'_>, tensors: [&Tensor; N]) -> Result<[u64; N]> {
        let mut addresses = [0; N];
        for (address, tensor) in addresses.iter_mut().zip(tensors) {
            let own = Device::Cuda(self.ordinal);
            *address = tensor.device_address().filter(|_| tensor.device() == own).ok_or_else(|| {
                call.refuse(format!("a tensor is on {}, but this rank's device is {own}", tensor.device()))
            })?;
        }
        Ok(addresses)
    }

    /// Puts a collective on the communicating queue, behind what the computing queue holds.
    ///
    /// # Safety
    /// The addresses in `work` are those of `tensors`, as [`Raw::start`] wants them.
    unsafe fn start(&self, call: Call<'_>, work: Work, tensors: [&Tensor; 2]) -> Result<Ticket> {
        let name = call.name();
        let refuse = |why: String| CommunicatorError::Gpu { rank: call.rank, collective: name.clone(), why };
        let gpu = |error: stickbreak_kernels::KernelError| refuse(error.to_string());
        let Watched { control, raw, outstanding, timeout, .. } = &*self.watched;
        let _one_at_a_time = self.starting.lock().unwrap_or_else(PoisonError::into_inner);
        control.check(&name)?;
        if tensors[0].elements() == 0 {
            return Ok(Ticket::done());
        }
        let list = || outstanding.lock().unwrap_or_else(PoisonError::into_inner);
        let number = control.count_collective();
        list().push(number, name.clone());
        // What was never begun must not look like a collective that hangs.
        let forget = || list().remove(number);
        let ordered = self.computing.mark().and_then(|mark| self.communicating.wait_for(&mark));
        ordered.inspect_err(|_| forget()).map_err(gpu)?;
        let timer = profile::collective(&self.communicating);
        let stream = self.communicating.stream().cu_stream().cast();
        // Until the computing queue, in whose order memory is used and freed, waits for the collective; for ever if that
        // cannot be arranged any more.
        let kept = tensors.map(Clone::clone);
        // SAFETY: the caller's promise about the addresses, and `kept`.
        unsafe { raw.start(work, tensors[0].dtype(), stream) }.inspect_err(|_| forget()).map_err(refuse)?;
        // Most often it is begun at once. Connections that are made at first use need the other ranks, and the watchdog
        // knows whom to blame before this time is over.
        let begun = wait_until_begun(raw, control, 2 * *timeout);
        profile::end_collective(&name, timer);
        let mark = || self.communicating.mark().inspect_err(|_| forget()).map_err(|error| error.to_string());
        match begun.and_then(|()| mark()) {
            Ok(mark) => {
                let over = Arc::new(mark);
                list().begun(number, Arc::clone(&over));
                let (watched, computing) = (Arc::clone(&self.watched), self.computing.clone());
                Ok(Ticket::pending(Box::new(UnderWay { watched, computing, over, tensors: kept, name })))
            }
            Err(why) => {
                std::mem::forget(kept);
                control.check(&name)?;
                Err(refuse(why))
            }
        }
    }

    /// Lets NCCL reach a tensor from all ranks, which call this together. Returns false if it has no use for it.
    ///
    /// # Safety
    /// The tensor is contiguous from this address on, in memory that other processes can be given to map, and is in `shared`.
    unsafe fn register(&self, call: Call<'_>, address: u64, tensor: &Tensor) -> Result<bool> {
        let refuse = |why: String| CommunicatorError::Gpu {
            rank: call.rank,
            collective: call.name(),
            why: format!("{why}; distributed.windows = \"none\" does without"),
        };
        let Watched { control, raw, timeout, .. } = &*self.watched;
        let _one_at_a_time = self.starting.lock().unwrap_or_else(PoisonError::into_inner);
        control.check(&call.name())?;
        bind(&self.computing);
        let bytes = tensor.elements() * tensor.dtype().size();
        // SAFETY: the caller's promise; what is in `shared` is never freed if NCCL still holds it in the end.
        let registration = unsafe { raw.register(address, bytes) }.map_err(refuse)?;
        if let Err(why) = wait_until_begun(raw, control, 2 * *timeout) {
            control.check(&call.name())?;
            return Err(refuse(why));
        }
        raw.registered(registration).map_err(refuse)
    }
}

/// Connects the device whose queue was used last on this thread.
fn connect_device(
    nccl: &'static Nccl,
    computing: &Queue,
    id: &[u8],
    control: &Control,
    timeout: Duration,
) -> std::result::Result<Arc<Raw>, String> {
    let raw = Arc::new(Raw::begin(nccl, id, control.rank(), control.ranks())?);
    let connected = wait_until_begun(&raw, control, timeout);
    if let Err(why) = connected {
        wait_for(on_its_own(&raw, computing, Raw::abort), PARTING);
        return Err(why);
    }
    Ok(raw)
}

/// Does what may hang, and ends or frees the communicator, on a thread that nobody has to wait for. The thread has the
/// device, since NCCL goes back to the one that it finds; and nothing of the control plane, which says goodbye all the same.
fn on_its_own(raw: &Arc<Raw>, computing: &Queue, act: fn(&Raw)) -> Option<JoinHandle<()>> {
    let (raw, computing) = (Arc::clone(raw), computing.clone());
    let work = move || {
        bind(&computing);
        act(&raw);
    };
    // Without a thread it is left to the end of the process.
    thread::Builder::new().name("parts".into()).spawn(work).ok()
}

/// Makes a queue's device the calling thread's; if that fails, so does what needs it.
fn bind(queue: &Queue) {
    let _ = queue.stream().context().bind_to_thread();
}

/// Waits for threads, but not for ever. Returns whether all have ended.
fn wait_for(threads: impl IntoIterator<Item = JoinHandle<()>>, limit: Duration) -> bool {
    let end = Instant::now() + limit;
    let mut all = true;
    for thread in threads {
        while !thread.is_finished() && Instant::now() < end {
            thread::sleep(Duration::from_millis(1));
        }
        if thread.is_finished() {
            let _ = thread.join();
        } else {
            all = false;
        }
    }
    all
}

/// Waits until NCCL has begun what it was asked for, while the group holds.
fn wait_until_begun(raw: &Raw, control: &Control, timeout: Duration) -> std::result::Result<(), String> {
    let start = Instant::now();
    let mut pause = Duration::from_micros(10);
    while !raw.status()? {
        if control.failure().is_some() {
            return Err("another rank failed".to_owned());
        }
        let waited = start.elapsed();
        if waited < AT_ONCE {
            thread::yield_now();
            continue;
        }
        if waited > timeout {
            return Err(format!("NCCL did not begin within {:.1} s", timeout.as_secs_f64()));
        }
        thread::sleep(pause);
        pause = (2 * pause).min(Duration::from_millis(10));
    }
    Ok(())
}

impl Communicator for NcclCommunicator {
    fn rank(&self) -> usize {
        self.watched.control.rank()
    }

    fn ranks(&self) -> usize {
        self.watched.control.ranks()
    }

    fn all_reduce(&self, what: &str, tensor: &Tensor, reduction: Reduction) -> Result<Ticket> {
        let call = self.call("all_reduce", what);
        call.tensor("tensor", tensor)?;
        let [memory] = self.addresses(call, [tensor])?;
        let op = match reduction {
            Reduction::Sum => Op::Sum,
            Reduction::Max => Op::Max,
        };
        let work = Work::AllReduce { memory, count: tensor.elements(), op };
        // SAFETY: the tensor is contiguous, and its memory is used in the order of the computing queue only.
        unsafe { self.start(call, work, [tensor, tensor]) }
    }

    fn reduce_scatter(&self, what: &str, from: &Tensor, to: &Tensor) -> Result<Ticket> {
        let call = self.call("reduce_scatter", what);
        call.parts(("to", to), ("from", from))?;
        let [source, target] = self.addresses(call, [from, to])?;
        let work = Work::ReduceScatter { from: source, to: target, count: to.elements() };
        // SAFETY: both are contiguous, of one type, `from` is as large as all parts, and they overlap as NCCL allows.
        unsafe { self.start(call, work, [from, to]) }
    }

    fn all_gather(&self, what: &str, from: &Tensor, to: &Tensor) -> Result<Ticket> {
        let call = self.call("all_gather", what);
        call.parts(("from", from), ("to", to))?;
        let [source, target] = self.addresses(call, [from, to])?;
        let work = Work::AllGather { from: source, to: target, count: from.elements() };
        // SAFETY: both are contiguous, of one type, `to` is as large as all parts, and they overlap as NCCL allows.
        unsafe { self.start(call, work, [from, to]) }
    }

    fn broadcast(&self, what: &str, tensor: &Tensor, root: usize) -> Result<Ticket> {
        let call = self.call("broadcast", what);
        call.tensor("tensor", tensor)?;
        call.root(root)?;
        let [memory] = self.addresses(call, [tensor])?;
        let work = Work::Broadcast { memory, count: tensor.elements(), root };
        // SAFETY: as in all_reduce.
        unsafe { self.start(call, work, [tensor, tensor]) }
    }

    fn shares_memory(&self) -> bool {
        self.one_host && self.watched.raw.nccl().has_windows()
    }

    fn share(&self, what: &str, tensor: &Tensor) -> Result<()> {
        let call = self.call("share", what);
        call.tensor("tensor", tensor)?;
        let [address] = self.addresses(call, [tensor])?;
        let nccl = self.watched.raw.nccl();
        let registered = if !self.one_host {
            Err("the ranks are on several hosts".to_owned())
        } else if !nccl.has_windows() {
            Err(format!("NCCL {} is older than 2.28", nccl.version()))
        } else {
            // All or none: the registration itself is a collective.
            self.shared.lock().unwrap_or_else(PoisonError::into_inner).push(tensor.clone());
            let kinds = self.gather_values(what, &[f64::from(u8::from(tensor.is_shareable()))])?;
            match kinds.iter().position(|kind| *kind != [1.0]) {
                Some(rank) => Err(format!("rank {rank} has no memory that other processes can map")),
                // SAFETY: the address is the tensor's, which is contiguous, of the right kind, and in `shared`.
                None if unsafe { self.register(call, address, tensor) }? => Ok(()),
                None => Err("NCCL takes no memory of the ranks'".to_owned()),
            }
        };
        if call.rank == 0 {
            match registered {
                Ok(()) => tracing::info!(
                    "the arena of {what} is a window of NCCL's: where the GPUs reach each other, gathers in it are by copy \
                     engines, sums by kernels of fewer blocks"
                ),
                Err(why) => tracing::info!("the arena of {what} is passed on by NCCL's kernels: {why}"),
            }
        }
        Ok(())
    }

    fn gather_values(&self, what: &str, values: &[f64]) -> Result<Vec<Vec<f64>>> {
        host::gather_values(&self.watched.control, self.call("gather_values", what), values)
    }

    fn check(&self, what: &str) -> Result<()> {
        self.watched.control.check(what)
    }

    fn abort(&self, reason: &str) {
        host::abort(&self.watched.control, reason);
        // Ends the kernels that wait for other ranks, so that this process can end.
        let _ = on_its_own(&self.watched.raw, &self.computing, Raw::abort);
    }
}

impl Drop for NcclCommunicator {
    fn drop(&mut self) {
        let watched = &self.watched;
        let broken = || thread::panicking() || watched.control.failure().is_some();
        if !broken() {
            // What is under way ends, or the watchdog ends the process.
            let _ = self.communicating.synchronize();
        }
        watched.closing.store(true, Ordering::Release);
        // The watchdog may wait for an abort that hangs.
        wait_for(self.watching.drain(..), PARTING);
        let (act, limit): (fn(&Raw), _) = match broken() {
            false => (|raw| raw.close(PARTING), 2 * PARTING),
            true => (Raw::abort, PARTING),
        };
        let over = wait_for(on_its_own(&watched.raw, &self.computing, act), limit);
        let shared = std::mem::take(self.shared.get_mut().unwrap_or_else(PoisonError::into_inner));
        if !over || broken() || watched.raw.holds_memory() {
            // Other ranks may still write there, and giving it back would wait for a device that waits for them.
            std::mem::forget(shared);
        }
        if broken() && (!over || watched.raw.holds_memory()) {
            watched.end_late();
        }
    }
}

/// A collective on the communicating queue.
struct UnderWay {
    watched: Arc<Watched>,
    computing: Queue,
    over: Arc<Event>,
    tensors: [Tensor; 2],
    name: String,
}

impl Pending for UnderWay {
    fn join(self: Box<Self>) -> Result<()> {
        let Self { watched, computing, over, tensors, name } = *self;
        let control = &watched.control;
        if let Err(error) = computing.wait_for(&over) {
            // Their memory must not go back while the collective may still use it.
            std::mem::forget(tensors);
            let (rank, why) = (control.rank(), error.to_string());
            return Err(CommunicatorError::Gpu { rank, collective: name, why });
        }
        control.check(&name)
    }
}
