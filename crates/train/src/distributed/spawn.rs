//! Our own launcher: one process a GPU on this machine, for `--gpus N`.
//!
//! * Every rank is this program with the same arguments and torchrun's variables. Rank 0 writes to the terminal itself, so
//!   its progress bar works; lines of the others begin with `[rank]`.
//! * The first rank that fails ends all: the others get a moment to notice by themselves and say what they saw.
//! * SIGTERM, SIGINT and SIGUSR1 are passed on. Ranks have process groups of their own, so a Ctrl-C reaches them once.
//! * A rank ends when the pipe on its standard input does, and so with its launcher, however that ends.
//!
//! Under a launcher that starts one process a node (`srun --ntasks-per-node=1`, a PyTorchJob) it starts that node's ranks.

use super::BECAUSE_OF_ANOTHER_RANK;
use super::launch::{Launch, Launcher, Master};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, IsTerminal, Read, Write};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use thiserror::Error;

/// Set for the ranks that are started here.
const SPAWNED: &str = "STICKBREAK_SPAWNED";
/// Time for the other ranks to end by themselves after the first has failed.
const OWN_END: Duration = Duration::from_secs(15);
/// Time between two looks at the ranks and at signals.
const LOOK: Duration = Duration::from_millis(10);

/// Why ranks could not be started, or did not end well.
#[derive(Debug, Error)]
pub enum SpawnError {
    /// No process, or more than one a node already.
    #[error("--gpus {gpus}: {why}")]
    Impossible {
        /// What was asked for.
        gpus: usize,
        /// Why that cannot be.
        why: String,
    },
    /// The operating system refused something.
    #[error("{doing}: {cause}")]
    Io {
        /// What was tried.
        doing: String,
        /// Why it failed.
        cause: io::Error,
    },
    /// A rank failed, and with it the run.
    #[error("rank {rank} failed ({status}); {}", last_line.as_deref().map_or("its message is above".to_owned(), |line| format!("its last line: {line}")))]
    Failed {
        /// The first that failed by itself, not because of another one.
        rank: usize,
        /// How it ended.
        status: ExitStatus,
        /// The last that it wrote, if its output came through here.
        last_line: Option<String>,
    },
}

/// Whether this process is a rank that [`run`] started.
pub fn is_spawned() -> bool {
    std::env::var_os(SPAWNED).is_some()
}

/// In a rank that [`run`] started: ends this process once its launcher is gone. Does nothing in any other process. Call it
/// early; it takes standard input.
///
/// # Errors
/// If the system refuses a thread.
pub fn end_with_launcher() -> io::Result<()> {
    if !is_spawned() {
        return Ok(());
    }
    thread::Builder::new().name("launcher".into()).spawn(|| {
        // Nothing is ever written to this pipe: a read returns when its other end is closed.
        while matches!(io::stdin().lock().read(&mut [0; 64]), Ok(1..)) {}
        // Whoever read the lines may be gone with it, so a failure to write must not keep the process.
        let _ = io::stderr().write_all(b"error: the launcher is gone, and this rank ends with it\n");
        std::process::exit(1);
    })?;
    Ok(())
}

/// Runs this program with its own arguments as `gpus` ranks on this machine, and waits for them.
///
/// # Errors
/// If they cannot be started, or one of them fails.
pub fn run_self(launch: &Launch, gpus: usize) -> Result<(), SpawnError> {
    let program =
        std::env::current_exe().map_err(|cause| SpawnError::Io { doing: "finding this program".into(), cause })?;
    run(launch, gpus, &program, &std::env::args_os().skip(1).collect::<Vec<_>>())
}

/// Runs a program as `gpus` ranks on this machine, and waits for them. `launch` is how this process itself was started.
///
/// # Errors
/// If they cannot be started, or one of them fails.
pub fn run(launch: &Launch, gpus: usize, program: &Path, arguments: &[OsString]) -> Result<(), SpawnError> {
    let io = |doing: &str| {
        let doing = doing.to_owned();
        |cause| SpawnError::Io { doing, cause }
    };
    let plan = plan(launch, gpus)?;
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGUSR1]).map_err(io("catching signals"))?;
    let mut ranks = Vec::new();
    for variables in plan {
        match Rank::start(program, arguments, &variables) {
            Ok(rank) => ranks.push(rank),
            Err(cause) => {
                ranks.iter_mut().for_each(Rank::kill);
                let doing = format!("starting rank {} ({})", variables.rank, program.display());
                return Err(SpawnError::Io { doing, cause });
            }
        }
    }
    // In the order in which they were seen.
    let mut failures: Vec<(usize, ExitStatus)> = Vec::new();
    let mut failing_since: Option<Instant> = None;
    while ranks.iter().any(|rank| rank.status.is_none()) {
        for signal in signals.pending() {
            ranks.iter().for_each(|rank| rank.signal(signal));
        }
        for rank in &mut ranks {
            if let Some(status) = rank.look().map_err(io("waiting for a rank"))?
                && !status.success()
            {
                failures.push((rank.number, status));
                failing_since.get_or_insert_with(Instant::now);
            }
        }
        if failing_since.is_some_and(|since| since.elapsed() > OWN_END) {
            for rank in ranks.iter_mut().filter(|rank| rank.status.is_none()) {
                let line = format!("[{}] did not end by itself within {} s: killed\n", rank.number, OWN_END.as_secs());
                let _ = io::stderr().write_all(line.as_bytes());
                rank.kill();
            }
        }
        thread::sleep(LOOK);
    }
    // A rank is dead a moment before the system says so, and the others may be quicker to end because of it.
    let by_itself = |&&(_, status): &&(usize, ExitStatus)| status.code() != Some(i32::from(BECAUSE_OF_ANOTHER_RANK));
    let first = failures.iter().find(by_itself).or(failures.first()).copied();
    let mut last_line = None;
    for rank in ranks {
        let last = rank.drain();
        if first.is_some_and(|(number, _)| number == rank.number) {
            last_line = last;
        }
    }
    match first {
        None => Ok(()),
        Some((rank, status)) => Err(SpawnError::Failed { rank, status, last_line }),
    }
}

/// torchrun's variables of one rank.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    rank: usize,
    ranks: usize,
    local_rank: usize,
    local_ranks: usize,
    master: Master,
}

/// The places of this node's ranks.
fn plan(launch: &Launch, gpus: usize) -> Result<Vec<Place>, SpawnError> {
    let refuse = |why: String| SpawnError::Impossible { gpus, why };
    if gpus == 0 {
        return Err(refuse("at least one is needed".into()));
    }
    if launch.launcher != Launcher::None && launch.ranks > 1 && launch.local_ranks != Some(1) {
        let Launch { launcher, ranks, .. } = launch;
        return Err(refuse(format!(
            "{launcher} has started {ranks} ranks already, and not known to be one a node; leave --gpus out, or let it start \
             one process a node"
        )));
    }
    let master = match &launch.master {
        Some(master) if launch.ranks > 1 => master.clone(),
        _ => {
            Master { host: "127.0.0.1".into(), port: free_port().map_err(|cause| refuse(format!("no port: {cause}")))? }
        }
    };
    let place = |local_rank| Place {
        rank: launch.rank * gpus + local_rank,
        ranks: launch.ranks * gpus,
        local_rank,
        local_ranks: gpus,
        master: master.clone(),
    };
    Ok((0..gpus).map(place).collect())
}

/// A port that nobody uses now; somebody may take it before rank 0 does, which then says so.
fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

/// A rank that was started.
struct Rank {
    number: usize,
    child: Child,
    status: Option<ExitStatus>,
    readers: Vec<JoinHandle<()>>,
    /// Of standard error and of standard output: which of two lines came last is not known across them.
    last_lines: [Arc<Mutex<Option<String>>>; 2],
}

impl Rank {
    fn start(program: &Path, arguments: &[OsString], place: &Place) -> io::Result<Self> {
        let number = place.rank;
        let output = || if number == 0 { Stdio::inherit() } else { Stdio::piped() };
        let variables = [
            ("RANK", place.rank.to_string()),
            ("WORLD_SIZE", place.ranks.to_string()),
            ("LOCAL_RANK", place.local_rank.to_string()),
            ("LOCAL_WORLD_SIZE", place.local_ranks.to_string()),
            ("MASTER_ADDR", place.master.host.clone()),
            ("MASTER_PORT", place.master.port.to_string()),
            (SPAWNED, "1".to_owned()),
        ];
        // The pipe of standard input stays open in `child`, and closes with this process.
        let mut child = Command::new(program)
            .args(arguments)
            .envs(variables)
            .stdin(Stdio::piped())
            .stdout(output())
            .stderr(output())
            .process_group(0)
            .spawn()?;
        let last_lines: [Arc<_>; 2] = Default::default();
        let mut readers = Vec::new();
        if let Some(pipe) = child.stderr.take() {
            readers.push(pass_on(number, pipe, io::stderr(), &last_lines[0]));
        }
        if let Some(pipe) = child.stdout.take() {
            readers.push(pass_on(number, pipe, io::stdout(), &last_lines[1]));
        }
        Ok(Self { number, child, status: None, readers, last_lines })
    }

    /// How it ended, if that was not known before.
    fn look(&mut self) -> io::Result<Option<ExitStatus>> {
        if self.status.is_some() {
            return Ok(None);
        }
        self.status = self.child.try_wait()?;
        Ok(self.status)
    }

    fn signal(&self, signal: i32) {
        let signal = match signal {
            SIGTERM => Signal::TERM,
            SIGINT => Signal::INT,
            _ => Signal::USR1,
        };
        // One that has ended was waited for, and its number may be another process' now.
        if self.status.is_none() {
            let _ = kill_process(Pid::from_child(&self.child), signal);
        }
    }

    fn kill(&mut self) {
        let _ = self.child.kill();
        self.status = self.child.wait().ok();
    }

    /// Waits for the rest of its output; its last line, of standard error if there is any: that is where an error is.
    fn drain(&self) -> Option<String> {
        let end = Instant::now() + Duration::from_secs(1);
        // A process that the rank has started may hold the pipe open.
        while !self.readers.iter().all(JoinHandle::is_finished) && Instant::now() < end {
            thread::sleep(LOOK);
        }
        self.last_lines.iter().find_map(|line| line.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

/// Copies lines with the rank before them.
fn pass_on(
    rank: usize,
    pipe: impl Read + Send + 'static,
    mut to: impl Write + IsTerminal + Send + 'static,
    last_line: &Arc<Mutex<Option<String>>>,
) -> JoinHandle<()> {
    let last_line = Arc::clone(last_line);
    thread::spawn(move || {
        // Rank 0's progress bar stands in the line; it draws itself again below.
        let clear = if to.is_terminal() { "\r\x1b[2K" } else { "" };
        let mut lines = BufReader::new(pipe);
        let mut line = Vec::new();
        while matches!(lines.read_until(b'\n', &mut line), Ok(1..)) {
            let text = String::from_utf8_lossy(&line);
            let text = text.trim_end();
            // Written at once, so that lines of several ranks do not mix. If nobody reads any more, the rank goes on.
            let _ = to.write_all(format!("{clear}[{rank}] {text}\n").as_bytes()).and_then(|()| to.flush());
            if !text.is_empty() {
                *last_line.lock().unwrap_or_else(PoisonError::into_inner) = Some(text.to_owned());
            }
            line.clear();
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_of_one_machine_meet_on_it() {
        let places = plan(&Launch::alone(), 3).unwrap();
        for (rank, place) in places.iter().enumerate() {
            assert_eq!((place.rank, place.ranks, place.local_rank, place.local_ranks), (rank, 3, rank, 3));
            assert_eq!(place.master, places[0].master);
            assert_eq!(place.master.host, "127.0.0.1");
        }
        // A batch job of one task.
        let slurm = Launch { launcher: Launcher::Slurm, ..Launch::alone() };
        assert_eq!(plan(&slurm, 2).unwrap().len(), 2);
    }

    #[test]
    fn a_process_a_node_starts_that_nodes_ranks() {
        let master = Some(Master { host: "n0".into(), port: 7 });
        let node = |local_ranks| Launch {
            launcher: Launcher::Slurm,
            rank: 2,
            ranks: 3,
            local_rank: 0,
            local_ranks,
            master: master.clone(),
        };
        let places = plan(&node(Some(1)), 4).unwrap();
        assert_eq!(places.iter().map(|place| place.rank).collect::<Vec<_>>(), [8, 9, 10, 11]);
        assert_eq!((places[1].ranks, places[1].local_rank, places[1].local_ranks), (12, 1, 4));
        assert_eq!(places[0].master.host, "n0");
        for started in [Some(2), None] {
            let error = plan(&node(started), 4).unwrap_err().to_string();
            assert!(error.contains("--gpus 4") && error.contains("SLURM has started 3 ranks"), "{error}");
        }
        assert!(plan(&Launch::alone(), 0).unwrap_err().to_string().contains("at least one"));
    }
}
