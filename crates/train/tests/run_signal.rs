//! Signals, sent to a real child process.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use stickbreak_train::signal::StopFlag;

/// Set in the child: whether it stops when the flag is set, or works on for ever.
const CHILD: &str = "STICKBREAK_TEST_SIGNAL_CHILD";

#[test]
fn child_that_polls_the_flag() {
    let Ok(manner) = std::env::var(CHILD) else { return };
    let flag = StopFlag::on_signals().unwrap();
    println!("ready");
    std::io::stdout().flush().unwrap();
    let start = Instant::now();
    let mut reported = None;
    while start.elapsed() < Duration::from_secs(60) {
        if flag.cause() != reported {
            reported = flag.cause();
            println!("cause {}", reported.unwrap());
            std::io::stdout().flush().unwrap();
        }
        if flag.is_set() && manner == "polite" {
            std::process::exit(0);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    std::process::exit(99);
}

struct Polling {
    child: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

impl Polling {
    fn start(manner: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["child_that_polls_the_flag", "--exact", "--nocapture"])
            .env(CHILD, manner)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut polling = Self { child, lines };
        polling.wait_for("ready");
        polling
    }

    fn wait_for(&mut self, text: &str) {
        while !self.lines.next().unwrap_or_else(|| panic!("ended before {text:?}")).unwrap().contains(text) {}
    }

    fn signal(&self, name: &str) {
        let command = format!("kill -{name} {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &command]).status().unwrap().success());
    }

    fn end(mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }
}

#[test]
fn each_signal_sets_the_flag_and_the_run_ends_in_order() {
    for name in ["TERM", "INT", "USR1"] {
        let mut child = Polling::start("polite");
        child.signal(name);
        child.wait_for(&format!("cause SIG{name}"));
        assert_eq!(child.end().code(), Some(0), "{name}");
    }
}

#[test]
fn a_second_signal_ends_at_once() {
    for (first, second, code) in
        [("TERM", "TERM", 143), ("INT", "INT", 130), ("TERM", "INT", 130), ("INT", "TERM", 143)]
    {
        let mut child = Polling::start("stubborn");
        child.signal(first);
        child.wait_for(&format!("cause SIG{first}"));
        child.signal(second);
        assert_eq!(child.end().code(), Some(code), "{first}, {second}");
    }
}

#[test]
fn after_usr1_one_term_still_leaves_time_to_save() {
    let mut child = Polling::start("stubborn");
    child.signal("USR1");
    child.wait_for("cause SIGUSR1");
    child.signal("TERM");
    child.wait_for("cause SIGTERM");
    child.signal("USR1");
    child.wait_for("cause SIGUSR1");
    child.signal("TERM");
    assert_eq!(child.end().code(), Some(143));
}

#[test]
fn a_test_can_set_the_flag() {
    let flag = StopFlag::new();
    let seen = flag.clone();
    assert!(!seen.is_set() && seen.cause().is_none());
    flag.trigger();
    assert!(seen.is_set());
    assert_eq!(seen.cause(), Some("request"));
}
