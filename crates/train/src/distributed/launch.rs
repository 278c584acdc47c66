//! How this process was started, read from the variables that launchers set.
//!
//! The first that is there counts: torchrun (also Kubernetes' PyTorchJob and our own [`spawn`](super::spawn)), Open MPI's
//! `mpirun`, SLURM's `srun`; else this is one process. `mpirun` comes before SLURM because inside an allocation it leaves
//! SLURM's variables, which then describe its daemons, in every process; `srun` never sets `mpirun`'s. A variable that is
//! empty counts as not set.

use std::collections::BTreeMap;
use std::fmt;
use thiserror::Error;

/// The environment, or a test's picture of it.
pub type Variables = BTreeMap<String, String>;

/// What started this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Launcher {
    /// Nothing that says so: one process.
    None,
    /// torchrun, or whatever sets its variables.
    Torchrun,
    /// SLURM's `srun`.
    Slurm,
    /// Open MPI's `mpirun`.
    OpenMpi,
}

/// This process' place among those that train together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// What started it.
    pub launcher: Launcher,
    /// Its number among all.
    pub rank: usize,
    /// How many there are.
    pub ranks: usize,
    /// Its number among those of its node: which GPU it takes.
    pub local_rank: usize,
    /// How many its node has, where the launcher says so.
    pub local_ranks: Option<usize>,
    /// Where rank 0 listens; `None` for one process.
    pub master: Option<Master>,
}

/// Where the ranks meet.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Master {
    /// Name or address of rank 0's host.
    pub host: String,
    /// Port on which rank 0 listens.
    pub port: u16,
}

impl fmt::Display for Master {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // An IPv6 address has colons of its own.
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Variables that do not go together.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LaunchError {
    /// Some of a launcher's variables are there and some are not.
    #[error("started by {launcher}? {} is set, but {} is missing; {hint}", set.join(", "), missing.join(", "))]
    HalfSet {
        /// Whose variables they are.
        launcher: Launcher,
        /// `NAME=value` of those that are there.
        set: Vec<String>,
        /// Names of those that are not.
        missing: Vec<&'static str>,
        /// What to do.
        hint: &'static str,
    },
    /// A value that cannot be read.
    #[error("{variable}={value:?} is not {expected}")]
    Value {
        /// The variable.
        variable: &'static str,
        /// What it holds.
        value: String,
        /// What it should hold.
        expected: &'static str,
    },
    /// Values that contradict each other.
    #[error("{left} does not go with {right}: {why}")]
    Contradiction {
        /// `NAME=value`.
        left: String,
        /// `NAME=value`.
        right: String,
        /// The rule that is broken.
        why: &'static str,
    },
    /// Inside a batch job, but not started by `srun`: the other tasks would never come.
    #[error(
        "this is a SLURM job of {tasks} tasks, but this process was not started by srun: write `srun stickbreak train ...`, \
         or `--gpus N` in a job of one task"
    )]
    NotBySrun {
        /// Tasks of the job.
        tasks: usize,
    },
    /// Several ranks, and nothing that says where rank 0 is.
    #[error(
        "{ranks} ranks were started by {launcher} on more than one node, so MASTER_ADDR must be set to rank 0's host"
    )]
    NoMaster {
        /// What started them.
        launcher: Launcher,
        /// How many.
        ranks: usize,
    },
    /// More ranks on a node than GPUs.
    #[error("local rank {local_rank} has no GPU: this node shows {visible} (CUDA_VISIBLE_DEVICES may hide some)")]
    NoDevice {
        /// The rank.
        local_rank: usize,
        /// GPUs that the process sees.
        visible: usize,
    },
}

type Result<T> = std::result::Result<T, LaunchError>;

/// torchrun's usual port, for launchers that give no number to derive one from.
const DEFAULT_PORT: u16 = 29500;

impl fmt::Display for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Launcher::None => "nothing",
            Launcher::Torchrun => "torchrun",
            Launcher::Slurm => "SLURM",
            Launcher::OpenMpi => "Open MPI",
        })
    }
}

impl fmt::Display for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.launcher == Launcher::None {
            return f.write_str("one process (no launcher's variables are set)");
        }
        write!(
            f,
            "rank {} of {}, started by {}, local rank {}",
            self.rank, self.ranks, self.launcher, self.local_rank
        )?;
        if let Some(local_ranks) = self.local_ranks {
            write!(f, " of {local_ranks}")?;
        }
        match &self.master {
            Some(master) => write!(f, "; rank 0 is at {master}"),
            None => Ok(()),
        }
    }
}

impl Launch {
    /// One process that nobody started.
    pub fn alone() -> Self {
        Self { launcher: Launcher::None, rank: 0, ranks: 1, local_rank: 0, local_ranks: Some(1), master: None }
    }

    /// Which of the GPUs that this process sees is its own: the one with its local rank's number, or the only one, as where
    /// SLURM shows each task its own.
    ///
    /// # Errors
    /// If there are too few.
    pub fn device(&self, visible: usize) -> Result<usize> {
        match visible {
            1 => Ok(0),
            _ if self.local_rank < visible => Ok(self.local_rank),
            _ => Err(LaunchError::NoDevice { local_rank: self.local_rank, visible }),
        }
    }

    /// Refuses numbers that contradict each other; `names` are the variables of rank, ranks, local rank, local ranks.
    fn checked(self, names: [&str; 4]) -> Result<Self> {
        let Self { rank, ranks, local_rank, .. } = self;
        let below = |(i, n): (usize, usize), (name_i, name_n): (&str, &str)| {
            let (left, right) = (format!("{name_i}={i}"), format!("{name_n}={n}"));
            let why = "ranks count from 0 and stay below their number";
            if i < n { Ok(()) } else { Err(LaunchError::Contradiction { left, right, why }) }
        };
        below((rank, ranks), (names[0], names[1]))?;
        if let Some(local_ranks) = self.local_ranks {
            below((local_rank, local_ranks), (names[2], names[3]))?;
            if local_ranks > ranks {
                return Err(LaunchError::Contradiction {
                    left: format!("{}={local_ranks}", names[3]),
                    right: format!("{}={ranks}", names[1]),
                    why: "a node has at most all ranks",
                });
            }
        }
        Ok(self)
    }
}

/// [`detect`] in this process' environment.
///
/// # Errors
/// As [`detect`].
pub fn detect_here() -> Result<Launch> {
    // A variable that is not Unicode is none of a launcher's.
    detect(&std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))).collect())
}

/// What started a process with these variables.
///
/// # Errors
/// If a launcher's variables are half set, cannot be read, or contradict each other.
pub fn detect(variables: &Variables) -> Result<Launch> {
    let variables = Reader(variables);
    for launcher in [torchrun, open_mpi, slurm] {
        if let Some(launch) = launcher(variables)? {
            return Ok(launch);
        }
    }
    Ok(Launch::alone())
}

const TORCHRUN: [&str; 6] = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"];

fn torchrun(variables: Reader<'_>) -> Result<Option<Launch>> {
    let [rank, ranks, local_rank, local_ranks, address, port] = TORCHRUN;
    // An address alone may be meant for another launcher.
    if [rank, ranks, local_rank, local_ranks].iter().all(|name| variables.get(name).is_none()) {
        return Ok(None);
    }
    // PyTorchJob sets no local ones where each pod is one rank.
    let pods = variables.get(local_rank).is_none() && variables.get(local_ranks).is_none();
    let needed: &[&'static str] = if pods { &[rank, ranks, address, port] } else { &TORCHRUN };
    variables.require(Launcher::Torchrun, needed, "all of them are set by torchrun, or unset them for one process")?;
    let launch = Launch {
        launcher: Launcher::Torchrun,
        rank: variables.number(rank)?,
        ranks: variables.number(ranks)?,
        local_rank: if pods { 0 } else { variables.number(local_rank)? },
        local_ranks: Some(if pods { 1 } else { variables.number(local_ranks)? }),
        master: variables.get(address).map(str::to_owned).zip(variables.torchrun_port()?).map(Master::from),
    };
    launch.checked([rank, ranks, local_rank, local_ranks]).map(Some)
}

fn open_mpi(variables: Reader<'_>) -> Result<Option<Launch>> {
    const NAMES: [&str; 4] =
        ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"];
    if NAMES.iter().all(|name| variables.get(name).is_none()) {
        return Ok(None);
    }
    variables.require(Launcher::OpenMpi, &NAMES, "all of them are set by mpirun, or unset them for one process")?;
    let [rank, ranks, local_rank, local_ranks] = NAMES;
    let (ranks_value, local_ranks_value) = (variables.number(ranks)?, variables.number(local_ranks)?);
    let host = match variables.get("MASTER_ADDR") {
        Some(host) => host.to_owned(),
        None if local_ranks_value >= ranks_value => "127.0.0.1".to_owned(),
        None => {
            variables.slurm_host()?.ok_or(LaunchError::NoMaster { launcher: Launcher::OpenMpi, ranks: ranks_value })?
        }
    };
    let launch = Launch {
        launcher: Launcher::OpenMpi,
        rank: variables.number(rank)?,
        ranks: ranks_value,
        local_rank: variables.number(local_rank)?,
        local_ranks: Some(local_ranks_value),
        master: (ranks_value > 1).then_some(Master { host, port: variables.port()?.unwrap_or(DEFAULT_PORT) }),
    };
    launch.checked(NAMES).map(Some)
}

fn slurm(variables: Reader<'_>) -> Result<Option<Launch>> {
    const RANK: &str = "SLURM_PROCID";
    const LOCAL_RANK: &str = "SLURM_LOCALID";
    // Of this step; the other one is the job's in the shell of an interactive step.
    let tasks = if variables.get("SLURM_STEP_NUM_TASKS").is_some() { "SLURM_STEP_NUM_TASKS" } else { "SLURM_NTASKS" };
    if [RANK, LOCAL_RANK, tasks].iter().all(|name| variables.get(name).is_none()) {
        return Ok(None);
    }
    let alone = Launch { launcher: Launcher::Slurm, ..Launch::alone() };
    // Also the shell of an allocation, which has the number of tasks only.
    if variables.get(tasks).is_some() && variables.number(tasks)? == 1 {
        return Ok(Some(alone));
    }
    let hint = "all of them are set by srun, or unset them for one process";
    variables.require(Launcher::Slurm, &[RANK, LOCAL_RANK, tasks], hint)?;
    let ranks = variables.number(tasks)?;
    let in_step = ["SLURM_STEP_ID", "SLURM_STEPID"].iter().find_map(|name| variables.get(name));
    if variables.get("SLURM_JOB_ID").is_some() && in_step.is_none() {
        return Err(LaunchError::NotBySrun { tasks: ranks });
    }
    let no_master = || LaunchError::NoMaster { launcher: Launcher::Slurm, ranks };
    let launch = Launch {
        launcher: Launcher::Slurm,
        rank: variables.number(RANK)?,
        ranks,
        local_rank: variables.number(LOCAL_RANK)?,
        local_ranks: variables.tasks_per_node(),
        master: Some(Master {
            host: match variables.get("MASTER_ADDR") {
                Some(host) => host.to_owned(),
                None => variables.slurm_host()?.ok_or_else(no_master)?,
            },
            port: match variables.port()? {
                Some(port) => port,
                None => variables.slurm_port()?,
            },
        }),
    };
    launch.checked([RANK, tasks, LOCAL_RANK, "tasks per node"]).map(Some)
}

impl From<(String, u16)> for Master {
    fn from((host, port): (String, u16)) -> Self {
        Self { host, port }
    }
}

/// Reads variables and says what is wrong with them.
#[derive(Clone, Copy)]
struct Reader<'a>(&'a Variables);

impl<'a> Reader<'a> {
    fn get(self, name: &str) -> Option<&'a str> {
        self.0.get(name).map(|value| value.trim()).filter(|value| !value.is_empty())
    }

    fn require(self, launcher: Launcher, names: &[&'static str], hint: &'static str) -> Result<()> {
        let set = names.iter().filter_map(|name| Some(format!("{name}={}", self.get(name)?))).collect();
        let missing: Vec<_> = names.iter().copied().filter(|name| self.get(name).is_none()).collect();
        if missing.is_empty() { Ok(()) } else { Err(LaunchError::HalfSet { launcher, set, missing, hint }) }
    }

    fn number(self, variable: &'static str) -> Result<usize> {
        let value = self.get(variable).unwrap_or_default();
        let expected = "a number";
        value.parse().map_err(|_| LaunchError::Value { variable, value: value.to_owned(), expected })
    }

    fn port(self) -> Result<Option<u16>> {
        const PORT: &str = "MASTER_PORT";
        let Some(value) = self.get(PORT) else { return Ok(None) };
        match value.parse() {
            Ok(0) | Err(_) => {
                let expected = "a port from 1 to 65535";
                Err(LaunchError::Value { variable: PORT, value: value.to_owned(), expected })
            }
            Ok(port) => Ok(Some(port)),
        }
    }

    /// The host of SLURM's task 0: the first of the step, which need not be where `srun` was typed.
    fn slurm_host(self) -> Result<Option<String>> {
        for variable in ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"] {
            if let Some(value) = self.get(variable) {
                let expected = "a list of hosts such as node[01-04,07],login1";
                let host =
                    first_host(value).ok_or(LaunchError::Value { variable, value: value.to_owned(), expected })?;
                return Ok(Some(host));
            }
        }
        Ok(self.get("SLURM_LAUNCH_NODE_IPADDR").map(str::to_owned))
    }

    /// Tasks of each of SLURM's nodes, if they have as many: of `8` or `8(x2)`, not of `8(x2),4`.
    fn tasks_per_node(self) -> Option<usize> {
        let text = self.get("SLURM_STEP_TASKS_PER_NODE").or_else(|| self.get("SLURM_TASKS_PER_NODE"))?;
        text.split_once("(x").map_or(text, |(tasks, _)| tasks).parse().ok().filter(|_| !text.contains(','))
    }

    /// MASTER_PORT, unless torchrun itself listens there for PyTorch's sake: then another one that follows from it.
    fn torchrun_port(self) -> Result<Option<u16>> {
        let taken = self.get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value.eq_ignore_ascii_case("true"));
        let port = self.port()?;
        Ok(if taken { port.map(|port| 12_000 + ((u32::from(port) * 37 + 1) % 20_000) as u16) } else { port })
    }

    /// A port of this job and step, below those that systems hand out (from 32768).
    fn slurm_port(self) -> Result<u16> {
        const FIRST: u64 = 12_000;
        const PORTS: u64 = 20_000;
        let number = |names: &[&'static str]| {
            let Some(&variable) = names.iter().find(|name| self.get(name).is_some()) else { return Ok(0) };
            let value = self.get(variable).unwrap_or_default().to_owned();
            value.parse::<u64>().map_err(|_| LaunchError::Value { variable, value, expected: "a number" })
        };
        let job = number(&["SLURM_JOB_ID", "SLURM_JOBID"])?;
        let step = number(&["SLURM_STEP_ID", "SLURM_STEPID"])?;
        // Steps of a job, and jobs that follow each other, lie apart.
        Ok((FIRST + job.wrapping_mul(37).wrapping_add(step) % PORTS) as u16)
    }
}

/// The first host of SLURM's list: `node[003-010,12],x` is `node003`.
fn first_host(list: &str) -> Option<String> {
    let mut host = String::new();
    let mut rest = list;
    while let Some(c) = rest.chars().next() {
        rest = &rest[c.len_utf8()..];
        match c {
            ',' => break,
            '[' => {
                let (inside, after) = rest.split_once(']')?;
                let first = inside.split([',', '-']).next()?;
                if first.is_empty() || !first.bytes().all(|b| b.is_ascii_digit()) {
                    return None;
                }
                host.push_str(first);
                rest = after;
            }
            ']' => return None,
            _ => host.push(c),
        }
    }
    let valid = |c: char| c.is_ascii_alphanumeric() || "-_.:".contains(c);
    (!host.is_empty() && host.chars().all(valid)).then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(text: &str) -> Variables {
        let pairs = text.split_whitespace().map(|pair| pair.split_once('=').unwrap());
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    fn found(text: &str) -> Launch {
        detect(&variables(text)).unwrap()
    }

    fn refused(text: &str) -> String {
        detect(&variables(text)).unwrap_err().to_string()
    }

    fn master(launch: &Launch) -> String {
        launch.master.as_ref().unwrap().to_string()
    }

    const FULL: &str = "RANK=5 WORLD_SIZE=16 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4 MASTER_ADDR=host0 MASTER_PORT=29500";
    const OMPI: &str = "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=3";
    const STEP: &str = "SLURM_PROCID=9 SLURM_LOCALID=1 SLURM_NTASKS=16 SLURM_JOB_ID=77 SLURM_STEP_ID=0";

    #[test]
    fn nothing_set_is_one_process() {
        for text in ["", "HOME=/root MASTER_ADDR=host0 MASTER_PORT=1", "RANK= WORLD_SIZE=", "SLURM_JOB_ID=3"] {
            let launch = found(text);
            assert_eq!(launch, Launch::alone(), "{text}");
            assert!(launch.to_string().starts_with("one process"));
        }
    }

    #[test]
    fn torchrun_is_read() {
        let launch = found(FULL);
        assert_eq!((launch.rank, launch.ranks, launch.local_rank, launch.local_ranks), (5, 16, 1, Some(4)));
        assert_eq!(launch.launcher, Launcher::Torchrun);
        assert_eq!(
            launch.to_string(),
            "rank 5 of 16, started by torchrun, local rank 1 of 4; rank 0 is at host0:29500"
        );
        let ipv6 = found(&FULL.replace("host0", "fe80::1"));
        assert_eq!(master(&ipv6), "[fe80::1]:29500");
    }

    #[test]
    fn a_port_that_torchrun_itself_listens_on_is_left_to_it() {
        let launch = found(&format!("{FULL} TORCHELASTIC_USE_AGENT_STORE=True"));
        let port = launch.master.as_ref().unwrap().port;
        assert!(port != 29500 && (12_000..32_000).contains(&port), "{port}");
        // The same on every rank, and MASTER_PORT itself where nobody listens.
        let other = FULL.replace("RANK=5", "RANK=0");
        assert_eq!(found(&format!("{other} TORCHELASTIC_USE_AGENT_STORE=True")).master, launch.master);
        assert_eq!(master(&found(&format!("{FULL} TORCHELASTIC_USE_AGENT_STORE=False"))), "host0:29500");
        for port in 1..=u16::MAX {
            let text = FULL.replace("29500", &port.to_string());
            let launch = found(&format!("{text} TORCHELASTIC_USE_AGENT_STORE=True"));
            assert_ne!(launch.master.unwrap().port, port);
        }
    }

    #[test]
    fn torchrun_comes_before_the_others() {
        assert_eq!(found(&format!("{FULL} {STEP} {OMPI} OMPI_COMM_WORLD_LOCAL_SIZE=4")).rank, 5);
    }

    #[test]
    fn a_pytorchjob_of_one_rank_a_pod_sets_no_local_ranks() {
        let launch = found("RANK=2 WORLD_SIZE=3 MASTER_ADDR=job-master-0 MASTER_PORT=23456");
        assert_eq!((launch.rank, launch.ranks, launch.local_rank, launch.local_ranks), (2, 3, 0, Some(1)));
    }

    #[test]
    fn half_set_variables_are_named() {
        for missing in TORCHRUN {
            let text: Vec<&str> = FULL.split(' ').filter(|pair| !pair.starts_with(&format!("{missing}="))).collect();
            let message = refused(&text.join(" "));
            assert!(message.contains(&format!("but {missing} is missing")), "{message}");
            assert_eq!(message.contains("LOCAL_RANK=1"), missing != "LOCAL_RANK", "{message}");
        }
        let message = refused("RANK=0");
        assert!(message.contains("RANK=0 is set, but WORLD_SIZE, MASTER_ADDR, MASTER_PORT is missing"), "{message}");
        let message = refused(OMPI);
        assert!(message.contains("OMPI_COMM_WORLD_LOCAL_SIZE is missing") && message.contains("mpirun"), "{message}");
        // The shell of an allocation of several tasks.
        let message = refused("SLURM_NTASKS=4 SLURM_JOB_ID=1");
        assert!(message.contains("SLURM_PROCID, SLURM_LOCALID is missing") && message.contains("srun"), "{message}");
        assert!(refused("SLURM_PROCID=0 SLURM_LOCALID=0").contains("SLURM_NTASKS is missing"));
    }

    #[test]
    fn ill_formed_values_name_variable_and_value() {
        for (from, to, words) in [
            ("RANK=5 ", "RANK=five ", ["RANK=\"five\"", "a number"]),
            ("LOCAL_RANK=1", "LOCAL_RANK=-1", ["LOCAL_RANK=\"-1\"", "a number"]),
            ("29500", "70000", ["MASTER_PORT=\"70000\"", "65535"]),
            ("29500", "0", ["MASTER_PORT=\"0\"", "65535"]),
            ("RANK=5 ", "RANK=16 ", ["RANK=16", "WORLD_SIZE=16"]),
            ("WORLD_SIZE=16", "WORLD_SIZE=0", ["RANK=5", "WORLD_SIZE=0"]),
            ("LOCAL_RANK=1", "LOCAL_RANK=4", ["LOCAL_RANK=4", "LOCAL_WORLD_SIZE=4"]),
            ("LOCAL_WORLD_SIZE=4", "LOCAL_WORLD_SIZE=17", ["LOCAL_WORLD_SIZE=17", "WORLD_SIZE=16"]),
        ] {
            let message = refused(&FULL.replacen(from, to, 1));
            assert!(words.iter().all(|word| message.contains(word)), "{message}");
        }
        assert!(refused(&STEP.replace("NTASKS=16", "NTASKS=x")).contains("SLURM_NTASKS=\"x\""));
        let message = refused(&format!("{STEP} SLURM_STEP_NODELIST=node["));
        assert!(message.contains("SLURM_STEP_NODELIST=\"node[\""), "{message}");
        let message = refused(&format!("{STEP} MASTER_ADDR=h").replace("JOB_ID=77", "JOB_ID=7b"));
        assert!(message.contains("SLURM_JOB_ID=\"7b\""), "{message}");
    }

    #[test]
    fn slurm_is_read_and_rank_0_is_on_the_steps_first_host() {
        let lists = "SLURM_STEP_NODELIST=gpu[07-08] SLURM_JOB_NODELIST=gpu[01-08] SLURM_LAUNCH_NODE_IPADDR=10.0.0.9";
        let launch = found(&format!("{STEP} {lists}"));
        assert_eq!((launch.launcher, launch.rank, launch.ranks, launch.local_rank), (Launcher::Slurm, 9, 16, 1));
        assert_eq!(launch.master.as_ref().unwrap().host, "gpu07");
        let only_address = found(&format!("{STEP} SLURM_LAUNCH_NODE_IPADDR=10.0.0.9"));
        assert_eq!(only_address.master.as_ref().unwrap().host, "10.0.0.9");
        let set = found(&format!("{STEP} {lists} MASTER_ADDR=other MASTER_PORT=4000"));
        assert_eq!(master(&set), "other:4000");
        assert!(refused(STEP).contains("MASTER_ADDR"));
    }

    #[test]
    fn slurms_tasks_per_node_are_known_if_all_nodes_have_as_many() {
        let tasks =
            |text: &str| found(&format!("{STEP} SLURM_STEP_NODELIST=a SLURM_STEP_TASKS_PER_NODE={text}")).local_ranks;
        assert_eq!(
            (tasks("2"), tasks("8(x2)"), tasks("4(x3),2"), tasks("2,4"), tasks("x")),
            (Some(2), Some(8), None, None, None)
        );
        assert_eq!(found(&format!("{STEP} SLURM_STEP_NODELIST=a")).local_ranks, None);
        // The step's numbers, not the job's.
        let both = format!("{STEP} SLURM_STEP_NODELIST=a SLURM_TASKS_PER_NODE=4 SLURM_STEP_TASKS_PER_NODE=2(x8)");
        assert_eq!(found(&both).local_ranks, Some(2));
    }

    #[test]
    fn slurms_port_is_one_for_a_step_and_another_for_the_next() {
        let port = |text: &str| found(&format!("{text} SLURM_STEP_NODELIST=a")).master.unwrap().port;
        let here = port(STEP);
        assert_eq!(here, port(&STEP.replace("PROCID=9", "PROCID=0")), "the same for every task");
        assert_ne!(here, port(&STEP.replace("STEP_ID=0", "STEP_ID=1")));
        assert_ne!(here, port(&STEP.replace("JOB_ID=77", "JOB_ID=78")));
        for job in [0, 1, 4_000_000_000u64, u64::MAX] {
            assert!((12_000..32_000).contains(&port(&STEP.replace("JOB_ID=77", &format!("JOB_ID={job}")))));
        }
    }

    #[test]
    fn a_slurm_allocation_of_one_task_is_one_process() {
        for text in [
            "SLURM_NTASKS=1 SLURM_JOB_ID=5",
            "SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_JOB_ID=5",
            // The shell of an interactive step in a job of many tasks.
            "SLURM_NTASKS=8 SLURM_STEP_NUM_TASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_STEP_ID=4294967290 SLURM_JOB_ID=5",
        ] {
            let launch = found(text);
            assert_eq!((launch.launcher, launch.rank, launch.ranks), (Launcher::Slurm, 0, 1), "{text}");
            assert_eq!(launch.master, None);
        }
    }

    #[test]
    fn a_batch_script_without_srun_is_told_so() {
        let message = refused("SLURM_NTASKS=8 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_JOB_ID=5 SLURM_JOB_NODELIST=a");
        assert!(message.contains("8 tasks") && message.contains("srun stickbreak train"), "{message}");
    }

    #[test]
    fn open_mpi_is_read_and_needs_an_address_for_several_nodes() {
        let launch = found(&format!("{OMPI} OMPI_COMM_WORLD_LOCAL_SIZE=4"));
        assert_eq!((launch.launcher, launch.rank, launch.ranks), (Launcher::OpenMpi, 3, 4));
        assert_eq!((launch.local_rank, launch.local_ranks), (3, Some(4)));
        assert_eq!(master(&launch), "127.0.0.1:29500");
        let two_nodes = format!("{} OMPI_COMM_WORLD_LOCAL_SIZE=2", OMPI.replace("LOCAL_RANK=3", "LOCAL_RANK=1"));
        assert!(refused(&two_nodes).contains("MASTER_ADDR"));
        assert_eq!(master(&found(&format!("{two_nodes} MASTER_ADDR=h MASTER_PORT=5"))), "h:5");
        // mpirun inside an allocation: SLURM's variables are those of its daemons, but its list of hosts holds.
        let daemons = "SLURM_PROCID=1 SLURM_LOCALID=0 SLURM_NTASKS=2 SLURM_JOB_ID=5 SLURM_JOB_NODELIST=n[1-2]";
        assert_eq!(master(&found(&format!("{two_nodes} {daemons}"))), "n1:29500");
        let one =
            "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=1 OMPI_COMM_WORLD_LOCAL_RANK=0 OMPI_COMM_WORLD_LOCAL_SIZE=1";
        assert_eq!(found(one).master, None);
    }

    #[test]
    fn the_first_host_of_a_list() {
        for (list, first) in [
            ("node1", "node1"),
            ("node1,node2", "node1"),
            ("gpu[001-128]", "gpu001"),
            ("gpu[7,9-12],login1", "gpu7"),
            ("rack[2-3]node[05-16].cluster", "rack2node05.cluster"),
            ("gpu-a-1,gpu-b-2", "gpu-a-1"),
        ] {
            assert_eq!(first_host(list).as_deref(), Some(first), "{list}");
        }
        for bad in ["", ",", "node[", "node]", "node[]", "node[x-y]", "no de", "a[1-2"] {
            assert_eq!(first_host(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_rank_takes_the_gpu_of_its_local_rank_or_the_only_one_it_sees() {
        let launch = found(FULL);
        assert_eq!(launch.device(4), Ok(1));
        assert_eq!(launch.device(1), Ok(0));
        let third = Launch { local_rank: 3, ..launch };
        let message = third.device(2).unwrap_err().to_string();
        assert!(message.contains("local rank 3") && message.contains("shows 2"), "{message}");
        assert!(third.device(0).is_err());
    }
}
