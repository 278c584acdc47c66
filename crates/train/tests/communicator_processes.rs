//! The rendezvous and the control plane over real sockets: who is refused, who is missed, and who is told when a rank dies.
//!
//! Ranks are threads here with a connection each; to the sockets that makes no difference.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};
use stickbreak_tensor::{DType, Device, Tensor};
use stickbreak_train::distributed::launch::{Launch, Launcher, Master};
use stickbreak_train::distributed::local::LocalGroup;
use stickbreak_train::distributed::{Communicator, CommunicatorError, Reduction, Timeouts, connect};

const LONG: Duration = Duration::from_secs(30);
const PATIENT: Timeouts = Timeouts { start: LONG, collective: LONG, host: LONG, silence: LONG };

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn launch(rank: usize, ranks: usize, port: u16) -> Launch {
    let master = Some(Master { host: "127.0.0.1".into(), port });
    Launch { launcher: Launcher::Torchrun, rank, ranks, local_rank: rank, local_ranks: Some(ranks), master }
}

fn identity(config: &str) -> Vec<(String, String)> {
    vec![("config".to_owned(), config.to_owned()), ("data".to_owned(), "d0".to_owned())]
}

type Connected = Result<Arc<dyn Communicator>, CommunicatorError>;

fn join(launch: &Launch, config: &str, timeouts: Timeouts) -> Connected {
    connect(launch, Device::Cpu, &identity(config), timeouts)
}

/// Each rank in a thread; what `work` gave, by rank.
fn on_ranks<T: Send>(ranks: usize, timeouts: Timeouts, work: impl Fn(Arc<dyn Communicator>) -> T + Sync) -> Vec<T> {
    let port = free_port();
    let run = |rank| work(join(&launch(rank, ranks, port), "c", timeouts).unwrap());
    thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> = (0..ranks).map(|rank| scope.spawn(move || run(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn message(result: Connected) -> String {
    result.map(drop).unwrap_err().to_string()
}

// ---------------------------------------------------------------------------------------------- collectives

/// Everything that a communicator does, as bits.
fn everything(group: &dyn Communicator) -> Vec<Vec<f64>> {
    let (rank, ranks) = (group.rank(), group.ranks());
    let mut seen = Vec::new();
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        let values = |seed: usize, n: usize| {
            let values = (0..n).map(|i| 0.1 + 1e3 / (1 + i * ranks + rank + seed) as f64).collect::<Vec<_>>();
            Tensor::from_vec(values, [n]).unwrap().to_dtype(dtype).unwrap()
        };
        let tensor = values(1, 5);
        group.all_reduce("a", &tensor, Reduction::Sum).unwrap().join().unwrap();
        seen.push(tensor.to_f64_vec().unwrap());
        let tensor = values(2, 5);
        group.all_reduce("b", &tensor, Reduction::Max).unwrap().join().unwrap();
        seen.push(tensor.to_f64_vec().unwrap());
        let arena = values(3, 1 + 4 * ranks);
        let whole = arena.narrow(0, 1, 4 * ranks).unwrap();
        let part = whole.narrow(0, 4 * rank, 4).unwrap();
        group.reduce_scatter("c", &whole, &part).unwrap().join().unwrap();
        group.all_gather("d", &part, &whole).unwrap().join().unwrap();
        group.broadcast("e", &arena, ranks - 1).unwrap().join().unwrap();
        seen.push(arena.to_f64_vec().unwrap());
    }
    seen.extend(group.gather_values("f", &vec![f64::MIN_POSITIVE * (rank + 1) as f64; rank]).unwrap());
    group.barrier("g").unwrap();
    seen
}

#[test]
fn ranks_as_processes_compute_the_same_bits_as_ranks_as_threads() {
    for ranks in 1..=4 {
        let threads = LocalGroup::run(ranks, LONG, |group| everything(&*group));
        let threads: Vec<_> = threads.into_iter().map(Result::unwrap).collect();
        assert_eq!(on_ranks(ranks, PATIENT, |group| everything(&*group)), threads, "{ranks} ranks");
    }
}

#[test]
fn the_last_words_of_rank_0_reach_everyone_also_if_it_ends_at_once() {
    for _ in 0..30 {
        on_ranks(3, PATIENT, |group| {
            for _ in 0..3 {
                assert_eq!(group.gather_values("step", &[1.0]).unwrap().len(), 3);
            }
        });
    }
}

#[test]
fn a_large_tensor_passes() {
    let sums = on_ranks(2, PATIENT, |group| {
        let tensor = Tensor::full(1.0 + group.rank() as f64, [3_000_000], DType::F32);
        group.all_reduce("large", &tensor, Reduction::Sum).unwrap().join().unwrap();
        tensor.read::<f32>().unwrap().iter().all(|&value| value == 3.0)
    });
    assert_eq!(sums, [true, true]);
}

// ---------------------------------------------------------------------------------------------- the start

#[test]
fn one_rank_needs_nobody() {
    let alone = join(&Launch::alone(), "c", PATIENT).unwrap();
    assert_eq!((alone.rank(), alone.ranks()), (0, 1));
    // torchrun with one process names a master, too.
    assert_eq!(join(&launch(0, 1, free_port()), "c", PATIENT).unwrap().ranks(), 1);
}

#[test]
fn ranks_may_come_in_any_order() {
    let port = free_port();
    thread::scope(|scope| {
        let early: Vec<_> = [2, 1].map(|rank| scope.spawn(move || join(&launch(rank, 3, port), "c", PATIENT))).into();
        thread::sleep(Duration::from_millis(300));
        let zero = join(&launch(0, 3, port), "c", PATIENT).unwrap();
        let early: Vec<_> = early.into_iter().map(|thread| thread.join().unwrap().unwrap()).collect();
        assert_eq!((zero.rank(), early[0].rank(), early[1].rank()), (0, 2, 1));
    });
}

#[test]
fn missing_ranks_are_named_on_every_rank_that_is_there() {
    let port = free_port();
    let short = Timeouts { start: Duration::from_millis(800), ..PATIENT };
    let started = Instant::now();
    let errors: Vec<_> = thread::scope(|scope| {
        let there: Vec<_> = [0, 2].map(|rank| scope.spawn(move || join(&launch(rank, 4, port), "c", short))).into();
        there.into_iter().map(|thread| message(thread.join().unwrap())).collect()
    });
    for error in errors {
        assert!(error.contains("ranks 1 and 3 did not come within 0.8 s"), "{error}");
        assert!(error.contains(&format!("127.0.0.1:{port}")) && error.contains("rank 2 on "), "{error}");
    }
    assert!(started.elapsed() < LONG);
}

#[test]
fn without_rank_0_the_address_is_named() {
    let port = free_port();
    let short = Timeouts { start: Duration::from_millis(300), ..PATIENT };
    let error = message(join(&launch(1, 2, port), "c", short));
    for word in ["rank 1", "refused", "MASTER_ADDR=127.0.0.1", &format!("MASTER_PORT={port}"), "0.3 s"] {
        assert!(error.contains(word), "{word}: {error}");
    }
    let mut nowhere = launch(1, 2, port);
    nowhere.master = Some(Master { host: "no-such-host.invalid".into(), port });
    let error = message(join(&nowhere, "c", short));
    assert!(error.contains("MASTER_ADDR=no-such-host.invalid"), "{error}");
}

#[test]
fn a_port_in_use_is_said_at_once() {
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = other.local_addr().unwrap().port();
    let started = Instant::now();
    let error = message(join(&launch(0, 2, port), "c", PATIENT));
    assert!(error.contains("cannot listen") && error.contains("in use") && error.contains("MASTER_PORT"), "{error}");
    assert!(started.elapsed() < LONG);
}

#[test]
fn a_rank_of_another_run_is_named_with_what_differs() {
    for (config, ranks, words) in
        [("other", 2, ["rank 1 on", "config", "other, not c"]), ("c", 3, ["rank 1 on", "one of 3 ranks", "one of 2"])]
    {
        let port = free_port();
        thread::scope(|scope| {
            let zero = scope.spawn(move || join(&launch(0, 2, port), "c", PATIENT));
            let one = message(join(&launch(1, ranks, port), config, PATIENT));
            let zero = message(zero.join().unwrap());
            for word in words {
                assert!(zero.contains(word) && one.contains(word), "{word}: {zero} / {one}");
            }
        });
    }
}

#[test]
fn two_processes_of_one_rank_are_told_and_a_restarted_one_is_taken() {
    let port = free_port();
    thread::scope(|scope| {
        let zero = scope.spawn(move || join(&launch(0, 3, port), "c", PATIENT));
        let twins = [(); 2].map(|()| scope.spawn(move || join(&launch(1, 3, port), "c", PATIENT)));
        for thread in [zero].into_iter().chain(twins) {
            let error = message(thread.join().unwrap());
            assert!(error.contains("two processes are rank 1"), "{error}");
        }
    });
    let port = free_port();
    thread::scope(|scope| {
        let zero = scope.spawn(move || join(&launch(0, 3, port), "c", PATIENT));
        // Says who it is and dies.
        let mut first = connected(port);
        first.write_all(&introduction(1, 3)).unwrap();
        thread::sleep(Duration::from_millis(100));
        drop(first);
        let others = [1, 2].map(|rank| scope.spawn(move || join(&launch(rank, 3, port), "c", PATIENT)));
        let mut group: Vec<_> = vec![zero.join().unwrap().unwrap()];
        group.extend(others.into_iter().map(|thread| thread.join().unwrap().unwrap()));
        assert_eq!(group.len(), 3);
    });
}

/// Connects once somebody listens.
fn connected(port: u16) -> TcpStream {
    let end = Instant::now() + LONG;
    loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// What a rank writes first.
fn introduction(rank: usize, ranks: usize) -> Vec<u8> {
    let header = format!(
        r#"{{"Hello":{{"protocol":1,"rank":{rank},"ranks":{ranks},"host":"h","device":null,"identity":[["config","c"],["data","d0"]]}}}}"#
    );
    [b"stickbrk", &(header.len() as u32).to_le_bytes()[..], &[0; 8], header.as_bytes()].concat()
}

#[test]
fn strangers_are_ignored() {
    let port = free_port();
    thread::scope(|scope| {
        let zero = scope.spawn(move || join(&launch(0, 2, port), "c", PATIENT));
        let silent = connected(port);
        for garbage in
            [&b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"[..], &[0xff; 4096], b"stickbrk\xff\xff\xff\xff\xff\xff\xff"]
        {
            connected(port).write_all(garbage).unwrap();
        }
        let one = join(&launch(1, 2, port), "c", PATIENT).unwrap();
        let zero = zero.join().unwrap().unwrap();
        let other = scope.spawn(move || zero.barrier("both").unwrap());
        one.barrier("both").unwrap();
        other.join().unwrap();
        drop(silent);
    });
}

#[test]
fn another_program_on_the_port_is_recognised() {
    for (answer, word) in [(&b"HTTP/1.1 400 Bad Request\r\n"[..], "another program is there"), (b"", "was closed")] {
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = other.local_addr().unwrap().port();
        thread::scope(|scope| {
            let one = scope.spawn(move || message(join(&launch(1, 2, port), "c", PATIENT)));
            let (mut stream, _) = other.accept().unwrap();
            stream.write_all(answer).unwrap();
            stream.read_exact(&mut [0; 8]).unwrap();
            drop(stream);
            let error = one.join().unwrap();
            assert!(error.contains(word), "{error}");
        });
    }
}

// ---------------------------------------------------------------------------------------------- failures

/// The errors of all ranks but one, which does what `act` does instead of coming to a collective.
fn errors_beside(culprit: usize, timeouts: Timeouts, act: impl Fn(Arc<dyn Communicator>) + Sync) -> Vec<String> {
    let all_are_done = Barrier::new(3);
    let mut errors = on_ranks(3, timeouts, |group| {
        group.barrier("start").unwrap();
        if group.rank() == culprit {
            act(group);
            all_are_done.wait();
            return String::new();
        }
        let tensor = Tensor::ones([3], DType::F32);
        let error = group.all_reduce("bucket 3", &tensor, Reduction::Sum).unwrap_err().to_string();
        assert!(group.barrier("afterwards").is_err(), "it stays broken");
        all_are_done.wait();
        error
    });
    errors.remove(culprit);
    errors
}

#[test]
fn a_rank_that_leaves_or_gives_up_ends_all_others_with_its_name() {
    let started = Instant::now();
    for culprit in 0..3 {
        for error in errors_beside(culprit, PATIENT, drop) {
            assert!(error.contains(&format!("rank {culprit} left before its turn")), "{error}");
            assert!(error.contains(r#"all_reduce "bucket 3""#), "{error}");
        }
        for error in errors_beside(culprit, PATIENT, |group| group.abort("the loss is NaN")) {
            assert!(error.contains(&format!("rank {culprit} gave up: the loss is NaN")), "{error}");
        }
    }
    assert!(started.elapsed() < LONG, "none of these waits for a timeout");
}

#[test]
fn a_rank_that_does_not_come_is_named_after_the_timeout() {
    let timeouts = Timeouts { collective: Duration::from_millis(300), ..PATIENT };
    for culprit in 0..3 {
        let held = std::sync::Mutex::new(Vec::new());
        for error in errors_beside(culprit, timeouts, |group| held.lock().unwrap().push(group)) {
            assert!(error.contains(&format!("rank {culprit} did not come within 0.3 s")), "{error}");
        }
    }
}

#[test]
fn ranks_that_call_different_things_are_told_what_the_other_called() {
    let errors = on_ranks(3, PATIENT, |group| {
        let tensor = Tensor::ones([if group.rank() == 2 { 7 } else { 5 }], DType::F32);
        group.all_reduce("gradients", &tensor, Reduction::Sum).unwrap_err().to_string()
    });
    for error in errors {
        assert!(error.contains("rank 2 calls all_reduce \"gradients\" of 7 elements"), "{error}");
        assert!(error.contains("of 5 elements"), "{error}");
    }
}

/// A rank 1 of two that says who it is, hears the welcome, and then does what the test wants.
fn beside_a_false_rank(timeouts: Timeouts, act: impl FnOnce(TcpStream) + Send) -> (String, Duration) {
    let port = free_port();
    thread::scope(|scope| {
        let zero = scope.spawn(move || {
            let group = join(&launch(0, 2, port), "c", timeouts).unwrap();
            let started = Instant::now();
            (group.barrier("step").unwrap_err().to_string(), started.elapsed())
        });
        let mut stream = connected(port);
        stream.write_all(&introduction(1, 2)).unwrap();
        let mut welcome = [0; 8 + 12];
        stream.read_exact(&mut welcome).unwrap();
        act(stream);
        zero.join().unwrap()
    })
}

#[test]
fn a_killed_process_is_noticed_by_its_connection_and_a_frozen_one_by_its_silence() {
    let (error, after) = beside_a_false_rank(PATIENT, drop);
    assert!(error.contains("rank 1 died: its connection ended without a goodbye"), "{error}");
    assert!(after < LONG / 2);
    let silence = Timeouts { silence: Duration::from_millis(400), ..PATIENT };
    let frozen = std::sync::Mutex::new(None);
    let (error, _) = beside_a_false_rank(silence, |stream| *frozen.lock().unwrap() = Some(stream));
    assert!(error.contains("rank 1 gave no sign of life for 0.4 s"), "{error}");
    let (error, _) = beside_a_false_rank(PATIENT, |mut stream| stream.write_all(&[0xee; 64]).unwrap());
    assert!(error.contains("rank 1 is lost"), "{error}");
}

#[test]
fn signs_of_life_keep_a_long_wait_alive() {
    let silence = Duration::from_millis(200);
    on_ranks(3, Timeouts { silence, ..PATIENT }, |group| {
        if group.rank() == 1 {
            thread::sleep(silence * 5);
        }
        group.barrier("after a long evaluation").unwrap();
    });
}
