//! Stopping a run in order: finish the step, save, exit 0.
//!
//! SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (what batch systems send before the time is up) only set a flag, which the
//! loop polls between steps and in every long wait. A second SIGTERM or SIGINT ends the process at once with the shell's
//! exit code for it, 143 or 130. After a SIGUSR1 the first SIGTERM still leaves time to save.
//!
//! A launcher must not forward a Ctrl-C to its children: the terminal has sent it to the whole group already, and the
//! second one would end the run without a save.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGPIPE, SIGTERM, SIGUSR1};

/// Ends the process without a word, with the shell's exit code for it (141), when what it prints to is closed, as in
/// `stickbreak bench | head`. For commands whose printed text is their whole result: Rust's own reaction is a panic.
///
/// # Errors
/// If the operating system refuses the handler.
pub fn end_on_closed_output() -> io::Result<()> {
    signal_hook::flag::register_conditional_shutdown(SIGPIPE, 141, Arc::new(AtomicBool::new(true))).map(drop)
}

/// Set once somebody wants the run to stop. Clones share the flag.
#[derive(Debug, Clone, Default)]
pub struct StopFlag {
    /// 0, the number of the last signal that came, or [`BY_HAND`].
    cause: Arc<AtomicUsize>,
}

/// The value of `cause` after [`StopFlag::trigger`]; no signal has this number.
const BY_HAND: usize = usize::MAX;

impl StopFlag {
    /// A flag that only [`Self::trigger`] sets.
    pub fn new() -> Self {
        Self::default()
    }

    /// A flag set by SIGTERM, SIGINT and SIGUSR1; call once per process, early.
    ///
    /// # Errors
    /// If the operating system refuses the handlers.
    pub fn on_signals() -> io::Result<Self> {
        let flag = Self::new();
        // Handlers run in the order of their registration: the first sees whether an earlier signal set `urgent`.
        let urgent = Arc::new(AtomicBool::new(false));
        for (signal, exit_code) in [(SIGTERM, 143), (SIGINT, 130)] {
            signal_hook::flag::register_conditional_shutdown(signal, exit_code, urgent.clone())?;
            signal_hook::flag::register(signal, urgent.clone())?;
        }
        for signal in [SIGTERM, SIGINT, SIGUSR1] {
            signal_hook::flag::register_usize(signal, flag.cause.clone(), signal as usize)?;
        }
        Ok(flag)
    }

    /// Whether the run should stop; cheap enough for an inner loop.
    pub fn is_set(&self) -> bool {
        self.cause.load(Ordering::Relaxed) != 0
    }

    /// Sets the flag, as a signal would.
    pub fn trigger(&self) {
        self.cause.store(BY_HAND, Ordering::Relaxed);
    }

    /// Why the run should stop, for the log: `SIGTERM`, `SIGINT`, `SIGUSR1` or `request`; `None` while it should not.
    pub fn cause(&self) -> Option<&'static str> {
        match self.cause.load(Ordering::Relaxed) {
            0 => None,
            number if number == SIGTERM as usize => Some("SIGTERM"),
            number if number == SIGINT as usize => Some("SIGINT"),
            number if number == SIGUSR1 as usize => Some("SIGUSR1"),
            _ => Some("request"),
        }
    }
}
