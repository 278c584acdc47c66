//! `--gpus N`: ranks as real processes, their output, their ends, and the signals between.
//!
//! This test executable is launcher and ranks in turn, chosen by a variable.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};
use stickbreak_tensor::{DType, Device, Tensor};
use stickbreak_train::distributed::launch::{Launch, detect_here};
use stickbreak_train::distributed::{Reduction, Timeouts, connect, exit_code, spawn};
use stickbreak_train::signal::StopFlag;

/// What the ranks do.
const MANNER: &str = "STICKBREAK_TEST_SPAWN_MANNER";
const LONG: Duration = Duration::from_secs(60);

/// The launcher, in a process of its own.
#[test]
fn launcher() {
    if std::env::var(MANNER).is_err() || spawn::is_spawned() {
        return;
    }
    let arguments: Vec<OsString> = ["rank", "--exact", "--nocapture"].map(OsString::from).into();
    match spawn::run(&Launch::alone(), 3, &std::env::current_exe().unwrap(), &arguments) {
        Ok(()) => std::process::exit(0),
        Err(error) => {
            eprintln!("error: {error}");
            std::process::exit(7);
        }
    }
}

/// A rank.
#[test]
fn rank() {
    let Ok(manner) = std::env::var(MANNER) else { return };
    spawn::end_with_launcher().unwrap();
    let stop = StopFlag::on_signals().unwrap();
    let launch = detect_here().unwrap();
    let say = |text: &str| {
        println!("{text} {} of {}", launch.rank, launch.ranks);
        std::io::stdout().flush().unwrap();
    };
    let timeouts = Timeouts { start: LONG, collective: LONG, host: LONG, ..Timeouts::default() };
    let group = connect(&launch, Device::Cpu, &[], timeouts).unwrap();
    say("ready: rank");
    let culprit = launch.rank == 1;
    match manner.as_str() {
        "sum" => {
            let tensor = Tensor::full(launch.rank as f64, [2], DType::F32);
            group.all_reduce("sum", &tensor, Reduction::Sum).unwrap().join().unwrap();
            say(&format!("sum {:?} on rank", tensor.to_f64_vec().unwrap()));
        }
        // The last line has no end.
        "fails" if culprit => {
            eprint!("error: on purpose");
            std::process::exit(5);
        }
        "killed" if culprit => {
            say("in a step: rank");
            thread::sleep(LONG);
        }
        "steps" => {
            // As the loop does: every step agrees on whether somebody wants to stop.
            loop {
                let wishes = group.gather_values("step", &[f64::from(u8::from(stop.is_set()))]).unwrap();
                if wishes.iter().any(|wish| wish[0] == 1.0) {
                    say(&format!("stopped by {:?}: rank", stop.cause()));
                    break;
                }
                thread::sleep(Duration::from_millis(5));
            }
        }
        "deaf" => thread::sleep(LONG),
        _ => {
            let error = anyhow::Error::from(group.barrier("step").unwrap_err());
            std::io::stderr().write_all(format!("error: {error}\n").as_bytes()).unwrap();
            std::process::exit(exit_code(&error).into());
        }
    }
    drop(group);
    std::process::exit(0);
}

struct Launched {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
}

impl Launched {
    fn new(manner: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["launcher", "--exact", "--nocapture"])
            .env(MANNER, manner)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (tell, lines) = channel();
        let pipes: [Box<dyn std::io::Read + Send>; 2] =
            [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        for pipe in pipes {
            let tell = tell.clone();
            thread::spawn(move || {
                for line in BufReader::new(pipe).lines() {
                    let _ = tell.send(line.unwrap());
                }
            });
        }
        Self { child, lines, seen: Vec::new() }
    }

    fn wait_for(&mut self, text: &str) {
        while !self.seen.iter().any(|line| line.contains(text)) {
            match self.lines.recv_timeout(LONG) {
                Ok(line) => self.seen.push(line),
                Err(_) => panic!("no {text:?} in {:#?}", self.seen),
            }
        }
    }

    fn all_ready(mut self) -> Self {
        for rank in 0..3 {
            self.wait_for(&format!("ready: rank {rank} of 3"));
        }
        self
    }

    fn signal(&self, name: &str) {
        signal(self.child.id(), name);
    }

    /// The launcher's exit code and everything that was written.
    fn end(mut self) -> (Option<i32>, String) {
        let started = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(started.elapsed() < LONG, "the launcher does not end: {:#?}", self.seen);
            thread::sleep(Duration::from_millis(5));
        };
        self.seen.extend(self.lines.iter());
        (status.code(), self.seen.join("\n"))
    }

    /// Process numbers of the ranks, by rank.
    fn ranks(&self) -> Vec<u32> {
        let of = format!("/proc/{0}/task/{0}/children", self.child.id());
        // The thread that runs the test has started them, not the main thread.
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let files = tasks.map(|task| task.unwrap().path().join("children")).chain([of.into()]);
        let mut found: Vec<u32> = files
            .flat_map(|file| {
                let text = std::fs::read_to_string(file).unwrap_or_default();
                text.split_whitespace().map(|number| number.parse().unwrap()).collect::<Vec<u32>>()
            })
            .collect();
        found.sort_unstable();
        found.dedup();
        assert_eq!(found.len(), 3, "one process a rank");
        found
    }
}

fn signal(process: u32, name: &str) {
    let command = format!("kill -{name} {process}");
    assert!(Command::new("sh").args(["-c", &command]).status().unwrap().success());
}

fn is_alive(process: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{process}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

#[test]
fn ranks_compute_together_and_their_lines_say_who_speaks() {
    let (code, output) = Launched::new("sum").end();
    assert_eq!(code, Some(0), "{output}");
    let has = |line: &str| output.lines().any(|found| found == line);
    // Rank 0 writes itself, the others' lines have their number.
    assert!(has("sum [3.0, 3.0] on rank 0 of 3"), "{output}");
    assert!(has("[1] sum [3.0, 3.0] on rank 1 of 3") && has("[2] sum [3.0, 3.0] on rank 2 of 3"), "{output}");
}

#[test]
fn the_first_failure_ends_all_with_its_message() {
    let (code, output) = Launched::new("fails").end();
    assert_eq!(code, Some(7), "{output}");
    assert!(output.contains("rank 1 failed (exit status: 5); its last line: error: on purpose"), "{output}");
    // The others saw it, too.
    for rank in [0, 2] {
        assert!(output.contains(&format!("rank {rank}: gather_values \"step\": rank 1 died")), "{output}");
    }
}

#[test]
fn a_killed_rank_ends_all_others_and_is_named() {
    let mut launched = Launched::new("killed").all_ready();
    launched.wait_for("in a step: rank 1");
    let started = Instant::now();
    // Started in the order of their ranks.
    signal(launched.ranks()[1], "KILL");
    let (code, output) = launched.end();
    assert_eq!(code, Some(7), "{output}");
    assert!(output.contains("rank 1 failed (signal: 9 (SIGKILL))"), "{output}");
    assert!(output.contains("rank 0: gather_values \"step\": rank 1 died"), "{output}");
    assert!(started.elapsed() < Duration::from_secs(30));
}

#[test]
fn signals_reach_all_ranks_and_an_orderly_stop_is_a_success() {
    for name in ["TERM", "INT", "USR1"] {
        let launched = Launched::new("steps").all_ready();
        launched.signal(name);
        let (code, output) = launched.end();
        assert_eq!(code, Some(0), "SIG{name}: {output}");
        for rank in 0..3 {
            assert!(output.contains(&format!("rank {rank} of 3")), "{output}");
        }
        assert!(output.contains(&format!("stopped by Some(\"SIG{name}\")")), "{output}");
    }
}

#[test]
fn a_second_signal_ends_all_at_once() {
    let launched = Launched::new("deaf").all_ready();
    launched.signal("TERM");
    thread::sleep(Duration::from_millis(200));
    launched.signal("TERM");
    let (code, output) = launched.end();
    assert_eq!(code, Some(7), "{output}");
    assert!(output.contains("exit status: 143"), "{output}");
}

#[test]
fn ranks_end_with_their_launcher_however_it_ends() {
    let launched = Launched::new("deaf").all_ready();
    let ranks = launched.ranks();
    assert!(ranks.iter().all(|&rank| is_alive(rank)));
    launched.signal("KILL");
    let started = Instant::now();
    while ranks.iter().any(|&rank| is_alive(rank)) {
        assert!(started.elapsed() < LONG, "a rank outlives its launcher");
        thread::sleep(Duration::from_millis(5));
    }
    launched.end();
}

#[test]
fn a_program_that_is_not_there_is_named() {
    let error = spawn::run(&Launch::alone(), 2, "/no/such/program".as_ref(), &[]).unwrap_err().to_string();
    assert!(error.contains("starting rank 0 (/no/such/program)"), "{error}");
}
