//! NCCL's C functions, found at run time.
//!
//! A table of our own instead of cudarc's: that one looks for `libnccl.so`, which only developers' packages have, and
//! panics without it; and it reads result codes into Rust enums, which a newer library's code would not fit into.

#![allow(unsafe_code)]

use libloading::Library;
use std::ffi::{CStr, OsStr, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use stickbreak_kernels::cuda::library::{self, Library as Name};
use stickbreak_tensor::DType;

/// Oldest version whose communicators may be non-blocking in all that is used here.
const OLDEST: i32 = 21800;

/// NCCL's `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct UniqueId([u8; UNIQUE_ID_BYTES]);

const UNIQUE_ID_BYTES: usize = 128;

/// Oldest version whose communicators gather registered memory by copy engines, with the configuration that asks for it.
const WITH_WINDOWS: i32 = 22800;

/// NCCL's `ncclConfig_t` of version 2.28. A library takes as much of it as `size` says, and its defaults for the rest.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
    traffic_class: c_int,
    // Up to here of versions before `WITH_WINDOWS`.
    comm_name: *const c_char,
    collnet_enable: c_int,
    cta_policy: c_int,
    shrink_share: c_int,
    nvls_ctas: c_int,
    channels_per_net_peer: c_int,
    nvlink_centric_scheduling: c_int,
}

impl Config {
    /// For a library of this version.
    fn non_blocking(version: i32) -> Self {
        const DEFAULT: c_int = c_int::MIN;
        /// `NCCL_CTA_POLICY_ZERO`: no multiprocessors where copy engines can do it. Changes nothing without windows.
        const NO_MULTIPROCESSORS: c_int = 2;
        let (size, version) = match version >= WITH_WINDOWS {
            true => (size_of::<Self>(), WITH_WINDOWS as c_uint),
            false => (std::mem::offset_of!(Self, comm_name), 21701),
        };
        Self {
            size,
            magic: 0xcafe_beef,
            version,
            blocking: 0,
            cga_cluster_size: DEFAULT,
            min_ctas: DEFAULT,
            max_ctas: DEFAULT,
            net_name: std::ptr::null(),
            split_share: DEFAULT,
            traffic_class: DEFAULT,
            comm_name: std::ptr::null(),
            collnet_enable: DEFAULT,
            cta_policy: NO_MULTIPROCESSORS,
            shrink_share: DEFAULT,
            nvls_ctas: DEFAULT,
            channels_per_net_peer: DEFAULT,
            nvlink_centric_scheduling: DEFAULT,
        }
    }
}

/// The environment variable that overrides [`Config::blocking`].
pub(super) const BLOCKING: &str = "NCCL_COMM_BLOCKING";

/// Whether calls stay non-blocking with this value of [`BLOCKING`].
///
/// # Errors
/// If the value is anything but `0` or nothing.
pub(super) fn check_blocking(value: Option<&OsStr>) -> Result<(), String> {
    match value.filter(|value| !value.is_empty() && *value != "0") {
        None => Ok(()),
        Some(value) => Err(format!(
            "{BLOCKING} is {value:?} in the environment: NCCL would wait without an end for a rank that is lost; unset \
             {BLOCKING}, or set it to 0"
        )),
    }
}

const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;

type Communicator = *mut c_void;
type Stream = *mut c_void;
type Window = *mut c_void;

/// `NCCL_WIN_COLL_SYMMETRIC`: every rank uses the same places of it in each collective.
const SYMMETRIC: c_int = 1;

macro_rules! functions {
    ($table:ident: $($name:ident: $symbol:literal, fn($($argument:ty),*) -> $result:ty;)*) => {
        struct $table {
            $($name: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl $table {
            fn load(library: &Library) -> Result<Self, String> {
                // SAFETY: the signatures are those of nccl.h.
                Ok(Self { $($name: unsafe {
                    *library.get(concat!($symbol, "\0").as_bytes()).map_err(|_| format!("it has no {}", $symbol))?
                },)* })
            }
        }
    };
}

functions! {
    Functions:
    version: "ncclGetVersion", fn(*mut c_int) -> c_int;
    unique_id: "ncclGetUniqueId", fn(*mut UniqueId) -> c_int;
    init: "ncclCommInitRankConfig", fn(*mut Communicator, c_int, UniqueId, c_int, *mut Config) -> c_int;
    async_error: "ncclCommGetAsyncError", fn(Communicator, *mut c_int) -> c_int;
    finalize: "ncclCommFinalize", fn(Communicator) -> c_int;
    destroy: "ncclCommDestroy", fn(Communicator) -> c_int;
    abort: "ncclCommAbort", fn(Communicator) -> c_int;
    error_text: "ncclGetErrorString", fn(c_int) -> *const c_char;
    last_error: "ncclGetLastError", fn(Communicator) -> *const c_char;
    all_reduce: "ncclAllReduce", fn(*const c_void, *mut c_void, usize, c_int, c_int, Communicator, Stream) -> c_int;
    reduce_scatter: "ncclReduceScatter", fn(*const c_void, *mut c_void, usize, c_int, c_int, Communicator, Stream) -> c_int;
    all_gather: "ncclAllGather", fn(*const c_void, *mut c_void, usize, c_int, Communicator, Stream) -> c_int;
    broadcast: "ncclBroadcast", fn(*const c_void, *mut c_void, usize, c_int, c_int, Communicator, Stream) -> c_int;
}

functions! {
    WindowFunctions:
    register: "ncclCommWindowRegister", fn(Communicator, *mut c_void, usize, *mut Window, c_int) -> c_int;
    deregister: "ncclCommWindowDeregister", fn(Communicator, Window) -> c_int;
}

/// The loaded library.
pub(super) struct Nccl {
    functions: Functions,
    /// Of versions from `WITH_WINDOWS` on.
    windows: Option<WindowFunctions>,
    /// 10000 major + 100 minor + patch.
    version: i32,
    place: String,
}

static NCCL: OnceLock<Result<Nccl, String>> = OnceLock::new();

/// Loads NCCL at the first call.
///
/// # Errors
/// If it is not found (naming the places that were looked into), is too old, or is not NCCL.
pub(super) fn nccl() -> Result<&'static Nccl, String> {
    NCCL.get_or_init(load).as_ref().map_err(Clone::clone)
}

fn load() -> Result<Nccl, String> {
    let place = library::require(Name::Nccl).map_err(|error| error.to_string())?;
    let broken = |why: String| format!("{} in {place}: {why}", Name::Nccl.file());
    // SAFETY: `require` has loaded it; this finds the loaded one by its name.
    let library = unsafe { Library::new(Name::Nccl.file()) }.map_err(|error| broken(error.to_string()))?;
    let functions = Functions::load(&library).map_err(broken)?;
    let mut version = 0;
    // SAFETY: writes one integer.
    let result = unsafe { (functions.version)(&raw mut version) };
    if result != SUCCESS {
        return Err(broken(format!("ncclGetVersion gave error {result}")));
    }
    if version < OLDEST {
        let (found, least) = (Version(version), Version(OLDEST));
        return Err(broken(format!("its version is {found}, and {least} or newer is needed")));
    }
    let windows = (version >= WITH_WINDOWS).then(|| WindowFunctions::load(&library)).transpose().map_err(broken)?;
    // Never closed, so the functions stay good.
    std::mem::forget(library);
    Ok(Nccl { functions, windows, version, place })
}

/// A version in NCCL's form, to be written out.
pub(super) struct Version(i32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0 / 10000, self.0 / 100 % 100, self.0 % 100)
    }
}

impl Nccl {
    pub(super) fn version(&self) -> Version {
        Version(self.version)
    }

    /// Whether memory can be registered for collectives by copy engines.
    pub(super) fn has_windows(&self) -> bool {
        self.windows.is_some()
    }

    /// Where it was found.
    pub(super) fn place(&self) -> &str {
        &self.place
    }

    fn text(&self, result: c_int, communicator: Communicator) -> String {
        // SAFETY: both give texts that end with a zero and stay, also for codes and communicators that they do not know.
        let (name, last) = unsafe { ((self.functions.error_text)(result), (self.functions.last_error)(communicator)) };
        let read = |text: *const c_char| {
            // SAFETY: as above, or null.
            if text.is_null() { String::new() } else { unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned() }
        };
        let (name, last) = (read(name), read(last));
        let last = last.trim();
        if last.is_empty() { format!("NCCL: {name}") } else { format!("NCCL: {name} ({last})") }
    }

    fn check(&self, result: c_int, communicator: Communicator) -> Result<(), String> {
        match result {
            SUCCESS | IN_PROGRESS => Ok(()),
            _ => Err(self.text(result, communicator)),
        }
    }

    /// A new group's id, to be given to all its ranks.
    pub(super) fn unique_id(&self) -> Result<Vec<u8>, String> {
        let mut id = UniqueId([0; UNIQUE_ID_BYTES]);
        // SAFETY: writes one id.
        let result = unsafe { (self.functions.unique_id)(&raw mut id) };
        self.check(result, std::ptr::null_mut())?;
        Ok(id.0.to_vec())
    }
}

/// How values become one, in NCCL's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub(super) enum Op {
    Sum = 0,
    Max = 2,
}

/// NCCL's number of an element type.
fn data_type(dtype: DType) -> Option<c_int> {
    Some(match dtype {
        DType::I32 => 2,
        DType::U32 => 3,
        DType::F32 => 7,
        DType::F64 => 8,
        DType::BF16 => 9,
        _ => return None,
    })
}

/// What a collective does with device memory, by addresses.
#[derive(Debug, Clone, Copy)]
pub(super) enum Work {
    AllReduce {
        memory: u64,
        count: usize,
        op: Op,
    },
    /// `count` is that of one rank's part, here and below.
    ReduceScatter {
        from: u64,
        to: u64,
        count: usize,
    },
    AllGather {
        from: u64,
        to: u64,
        count: usize,
    },
    Broadcast {
        memory: u64,
        count: usize,
        root: usize,
    },
}

/// NCCL's communicator. Every call is short, since it is non-blocking; a lock keeps them apart from the abort that frees it.
pub(super) struct Raw {
    nccl: &'static Nccl,
    /// Null once it is freed.
    communicator: Mutex<Handle>,
}

struct Handle {
    communicator: Communicator,
    /// Memory that it uses in its own ways until they are deregistered.
    windows: Vec<Window>,
}

/// A window that is being registered: where NCCL writes it to.
#[must_use = "until it is taken the window cannot be deregistered"]
pub(super) struct Registration(*mut Window);

// SAFETY: NCCL's communicators may be used from any thread, one at a time; the lock sees to that.
unsafe impl Send for Handle {}

impl fmt::Debug for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NCCL {}", self.nccl.version())
    }
}

impl Raw {
    /// Begins to connect the calling thread's current device; [`status`](Self::status) says when that is done.
    pub(super) fn begin(nccl: &'static Nccl, id: &[u8], rank: usize, ranks: usize) -> Result<Self, String> {
        let bytes = id.try_into().map_err(|_| format!("an id of {} bytes, not {UNIQUE_ID_BYTES}", id.len()))?;
        let (rank, ranks) = (rank as c_int, ranks as c_int);
        let mut communicator = std::ptr::null_mut();
        let mut config = Config::non_blocking(nccl.version);
        // SAFETY: both pointers are to live values of the types that nccl.h names; the configuration is copied.
        let result =
            unsafe { (nccl.functions.init)(&raw mut communicator, ranks, UniqueId(bytes), rank, &raw mut config) };
        nccl.check(result, communicator)?;
        Ok(Self { nccl, communicator: Mutex::new(Handle { communicator, windows: Vec::new() }) })
    }

    fn lock(&self) -> Result<MutexGuard<'_, Handle>, String> {
        let handle = self.communicator.lock().unwrap_or_else(PoisonError::into_inner);
        if handle.communicator.is_null() { Err("NCCL: the communicator was aborted".to_owned()) } else { Ok(handle) }
    }

    /// Whether what was asked for last has been begun; an asynchronous error, also of other ranks, if there is one.
    pub(super) fn status(&self) -> Result<bool, String> {
        let handle = self.lock()?;
        let mut state = SUCCESS;
        // SAFETY: the communicator is not freed (its lock is held), and one integer is written.
        let result = unsafe { (self.nccl.functions.async_error)(handle.communicator, &raw mut state) };
        self.nccl.check(result, handle.communicator)?;
        self.nccl.check(state, handle.communicator)?;
        Ok(state == SUCCESS)
    }

    /// Puts a collective on a stream.
    ///
    /// # Safety
    /// The addresses are those of `count` elements of `dtype` (for the whole of a scatter or gather: as many times the
    /// ranks) on the communicator's device, which stay until the stream has done the work, and which nothing else uses
    /// meanwhile. The stream is one of that device.
    pub(super) unsafe fn start(&self, work: Work, dtype: DType, stream: *mut c_void) -> Result<(), String> {
        let kind = data_type(dtype).ok_or_else(|| format!("NCCL does not know elements of {dtype}"))?;
        let handle = self.lock()?;
        let (f, comm) = (&self.nccl.functions, handle.communicator);
        let (constant, mutable) = (|address: u64| address as *const c_void, |address: u64| address as *mut c_void);
        // SAFETY: the caller's promise; the communicator is not freed, its lock is held.
        let result = unsafe {
            match work {
                Work::AllReduce { memory: m, count, op } => {
                    (f.all_reduce)(constant(m), mutable(m), count, kind, op as c_int, comm, stream)
                }
                Work::ReduceScatter { from, to, count } => {
                    (f.reduce_scatter)(constant(from), mutable(to), count, kind, Op::Sum as c_int, comm, stream)
                }
                Work::AllGather { from, to, count } => {
                    (f.all_gather)(constant(from), mutable(to), count, kind, comm, stream)
                }
                Work::Broadcast { memory: m, count, root } => {
                    (f.broadcast)(constant(m), mutable(m), count, kind, root as c_int, comm, stream)
                }
            }
        };
        self.nccl.check(result, comm)
    }

    /// The library.
    pub(super) fn nccl(&self) -> &'static Nccl {
        self.nccl
    }

    /// Begins to let all ranks reach memory of each other's; [`status`](Self::status) says when that is done, and
    /// [`registered`](Self::registered) takes the result then. All ranks call it.
    ///
    /// # Safety
    /// The memory, of so many bytes, is on the communicator's device and of the kind that other processes can be given to
    /// map. It stays until [`holds_memory`](Self::holds_memory) says that it is deregistered.
    pub(super) unsafe fn register(&self, address: u64, bytes: usize) -> Result<Registration, String> {
        let Some(functions) = &self.nccl.windows else {
            return Err(format!("NCCL {} has no windows", self.nccl.version()));
        };
        let handle = self.lock()?;
        // On the heap, and left there if it fails: a thread of NCCL writes it, at any time.
        let window = Box::into_raw(Box::new(std::ptr::null_mut()));
        // SAFETY: the caller's promise; the communicator is not freed, its lock is held; `window` stays.
        let result =
            unsafe { (functions.register)(handle.communicator, address as *mut c_void, bytes, window, SYMMETRIC) };
        self.nccl.check(result, handle.communicator)?;
        Ok(Registration(window))
    }

    /// Takes a window once its registration is done. Returns false if NCCL has no use for it.
    pub(super) fn registered(&self, registration: Registration) -> Result<bool, String> {
        if !self.status()? {
            return Err("NCCL has not registered the window yet".to_owned());
        }
        let mut handle = self.lock()?;
        // SAFETY: made by `register` from a box, and taken once; NCCL is done with it, as was asked above.
        let window = *unsafe { Box::from_raw(registration.0) };
        if !window.is_null() {
            handle.windows.push(window);
        }
        Ok(!window.is_null())
    }

    /// Whether NCCL may still use registered memory: also after an abort, or while another thread is at that.
    pub(super) fn holds_memory(&self) -> bool {
        self.communicator.try_lock().map_or(true, |handle| !handle.windows.is_empty())
    }

    /// Ends everything that is under way and frees the communicator; does nothing the second time.
    pub(super) fn abort(&self) {
        let mut handle = self.communicator.lock().unwrap_or_else(PoisonError::into_inner);
        let communicator = std::mem::replace(&mut handle.communicator, std::ptr::null_mut());
        if !communicator.is_null() {
            // SAFETY: it was not freed, and will not be used again.
            let _ = unsafe { (self.nccl.functions.abort)(communicator) };
        }
    }

    /// Frees a communicator whose work is done, together with the other ranks; aborts it if that takes too long.
    pub(super) fn close(&self, patience: Duration) {
        let end = Instant::now() + patience;
        let finalized = self.lock().and_then(|mut handle| {
            let communicator = handle.communicator;
            while let (Some(&window), Some(functions)) = (handle.windows.last(), &self.nccl.windows) {
                // SAFETY: the communicator is not freed, its lock is held; the window is its own, deregistered once.
                let result = unsafe { (functions.deregister)(communicator, window) };
                self.nccl.check(result, communicator)?;
                handle.windows.pop();
            }
            // SAFETY: the communicator is not freed, its lock is held.
            let result = unsafe { (self.nccl.functions.finalize)(communicator) };
            self.nccl.check(result, communicator)
        });
        if finalized.is_err() {
            return self.abort();
        }
        loop {
            match self.status() {
                Ok(true) => break,
                Ok(false) if Instant::now() < end => std::thread::sleep(Duration::from_millis(1)),
                _ => return self.abort(),
            }
        }
        let mut handle = self.communicator.lock().unwrap_or_else(PoisonError::into_inner);
        let communicator = std::mem::replace(&mut handle.communicator, std::ptr::null_mut());
        if !communicator.is_null() {
            // SAFETY: it is finalized, was not freed, and will not be used again.
            let _ = unsafe { (self.nccl.functions.destroy)(communicator) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_has_the_layout_of_nccl_h() {
        use std::mem::offset_of;
        let (old, new) = (Config::non_blocking(OLDEST), Config::non_blocking(23007));
        assert_eq!([(old.size, old.version), (new.size, new.version)], [(48, 21701), (80, 22800)]);
        assert_eq!((offset_of!(Config, comm_name), offset_of!(Config, cta_policy)), (48, 60));
        assert_eq!(offset_of!(Config, nvlink_centric_scheduling), 76);
        assert_eq!((offset_of!(Config, magic), offset_of!(Config, blocking)), (8, 16));
        assert_eq!((offset_of!(Config, net_name), offset_of!(Config, traffic_class)), (32, 44));
        assert_eq!(size_of::<UniqueId>(), 128);
    }

    #[test]
    fn blocking_calls_are_refused() {
        for fine in [None, Some(""), Some("0")] {
            assert_eq!(check_blocking(fine.map(OsStr::new)), Ok(()));
        }
        for value in ["1", "true", "-1"] {
            let error = check_blocking(Some(OsStr::new(value))).unwrap_err();
            assert!(error.contains(&format!("NCCL_COMM_BLOCKING is {value:?}")) && error.contains("unset"), "{error}");
        }
    }

    #[test]
    fn versions_are_written_with_dots() {
        assert_eq!(Version(22705).to_string(), "2.27.5");
        assert_eq!(Version(OLDEST).to_string(), "2.18.0");
    }

    #[test]
    fn nccl_is_loaded_or_the_error_says_where_it_was_looked_for() {
        match nccl() {
            Ok(nccl) => {
                assert!(nccl.version >= OLDEST && !nccl.place().is_empty());
                // No communicator: the text of the code alone.
                assert!(nccl.text(4, std::ptr::null_mut()).contains("invalid argument"));
            }
            Err(error) => assert!(error.contains("libnccl.so.2") && error.contains("LD_LIBRARY_PATH"), "{error}"),
        }
    }
}
