//! NCCL between two GPUs: results, order beside computing work, bits, and what happens when a rank fails.
//!
//! This test executable is launcher and ranks in turn. Needs two GPUs and NCCL:
//!
//!     cargo test --release -p stickbreak-train --test cuda_nccl -- --ignored --nocapture --test-threads 1

use std::ffi::OsString;
use std::io::Write;
use std::process::{Command, Output};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use stickbreak_tensor::{DType, Device, Tensor};
use stickbreak_train::distributed::launch::{Launch, detect_here};
use stickbreak_train::distributed::{Communicator, Reduction, Timeouts, connect, exit_code, spawn};

/// What the ranks do.
const MANNER: &str = "STICKBREAK_TEST_NCCL_MANNER";
const RANKS: usize = 2;

/// The launcher, in a process of its own.
#[test]
fn launcher() {
    if std::env::var(MANNER).is_err() || spawn::is_spawned() {
        return;
    }
    let arguments: Vec<OsString> = ["rank", "--exact", "--nocapture"].map(OsString::from).into();
    match spawn::run(&Launch::alone(), RANKS, &std::env::current_exe().unwrap(), &arguments) {
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
    if let Err(error) = act(&manner) {
        std::io::stderr().write_all(format!("error: {error:#}\n").as_bytes()).unwrap();
        std::process::exit(exit_code(&error).into());
    }
    std::process::exit(0);
}

fn act(manner: &str) -> anyhow::Result<()> {
    let launch = detect_here()?;
    let timeouts = Timeouts {
        start: Duration::from_secs(60),
        collective: Duration::from_secs(if manner == "hangs" { 4 } else { 60 }),
        ..Timeouts::default()
    };
    let device = Device::Cuda(if manner == "one-gpu" { 0 } else { launch.local_rank });
    let group = connect(&launch, device, &[], timeouts)?;
    group.barrier("start")?;
    let culprit = launch.rank == 1;
    match manner {
        "results" => results(&*group, device),
        "order" => order(&*group, device),
        "bits" => bits(&*group, device),
        "speed" => speed(&*group, device),
        "shared" => shared(&*group, device),
        "killed-sharing" => shared_step(&*group, device, culprit),
        "killed" if culprit => kill_self(),
        "hangs" if culprit => {
            thread::sleep(Duration::from_secs(60));
            Ok(())
        }
        "gives-up" if culprit => {
            group.abort("the loss is NaN");
            anyhow::bail!("rank 1: the loss is NaN")
        }
        "leaves" if culprit => {
            drop(group);
            Ok(())
        }
        _ => step(group, device),
    }
}

fn kill_self() -> anyhow::Result<()> {
    let command = format!("kill -KILL {}", std::process::id());
    Command::new("sh").args(["-c", &command]).status()?;
    Ok(())
}

/// A collective, and the host waits for it: without rank 1 that is for ever.
fn step(group: Arc<dyn Communicator>, device: Device) -> anyhow::Result<()> {
    let tensor = Tensor::full_on(1.0, [1 << 20], DType::F32, device)?;
    group.all_reduce("bucket 3", &tensor, Reduction::Sum)?.join()?;
    device.synchronize()?;
    group.all_reduce("bucket 4", &tensor, Reduction::Sum)?.join()?;
    anyhow::bail!("the collective ended without rank 1")
}

fn results(group: &dyn Communicator, device: Device) -> anyhow::Result<()> {
    let (rank, ranks) = (group.rank(), group.ranks());
    for dtype in [DType::F32, DType::BF16, DType::U32, DType::I32] {
        for n in [0, 1, 5, 4096, (1 << 18) + 3] {
            // Small whole numbers, exact in every type.
            let contents = |rank: usize, n: usize| (0..n).map(|i| ((i * 7 + rank * 3) % 60) as f64).collect::<Vec<_>>();
            let on_device = |values: Vec<f64>| {
                let n = values.len();
                Tensor::from_vec(values, [n])?.to_dtype(dtype)?.to_device(device)
            };
            let own = |n| contents(rank, n);
            let sum = |n| (0..n).map(|i| (0..ranks).map(|r| contents(r, n)[i]).sum()).collect::<Vec<f64>>();
            let check = |what: &str, tensor: &Tensor, expected: &[f64]| {
                anyhow::ensure!(tensor.to_f64_vec()? == expected, "{what} of {n} {dtype} is wrong");
                Ok(())
            };
            if n < 10_000 {
                let tensor = on_device(own(n))?;
                group.all_reduce("sum", &tensor, Reduction::Sum)?.join()?;
                check("sum", &tensor, &sum(n))?;
                let tensor = on_device(own(n))?;
                group.all_reduce("max", &tensor, Reduction::Max)?.join()?;
                let max = |i| (0..ranks).map(|r| contents(r, n)[i]).fold(f64::MIN, f64::max);
                check("max", &tensor, &(0..n).map(max).collect::<Vec<_>>())?;
                let (from, to) = (on_device(own(ranks * n))?, on_device(own(n))?);
                group.reduce_scatter("apart", &from, &to)?.join()?;
                check("reduce_scatter", &to, &sum(ranks * n)[rank * n..][..n])?;
            }
            // In place, in the middle of an arena, whose ends stay.
            let arena = on_device(own(ranks * n + 8))?;
            let whole = arena.narrow(0, 4, ranks * n)?;
            let part = whole.narrow(0, rank * n, n)?;
            group.all_gather("in place", &part, &whole)?.join()?;
            let mut expected = own(ranks * n + 8);
            for r in 0..ranks {
                expected[4 + r * n..][..n].copy_from_slice(&contents(r, ranks * n + 8)[4 + r * n..][..n]);
            }
            check("all_gather", &arena, &expected)?;
            group.broadcast("root", &arena, ranks - 1)?.join()?;
            let mut of_root = contents(ranks - 1, ranks * n + 8);
            of_root[4..4 + ranks * n].copy_from_slice(&expected[4..4 + ranks * n]);
            check("broadcast", &arena, &of_root)?;
        }
    }
    anyhow::ensure!(group.gather_values("values", &[rank as f64])? == [[0.0], [1.0]]);
    println!("results are right on rank {rank}");
    Ok(())
}

/// Zeros that all ranks reach in each other's memory.
fn shared_arena(group: &dyn Communicator, n: usize, dtype: DType, device: Device) -> anyhow::Result<Tensor> {
    anyhow::ensure!(group.shares_memory(), "NCCL is older than 2.28");
    let arena = Tensor::zeros_shareable_on([n], dtype, device)?;
    anyhow::ensure!(arena.is_shareable(), "no memory that other processes can map");
    group.share("arena", &arena)?;
    Ok(arena)
}

/// Buckets of arenas that ranks share, in place: gathers and sums, behind and before work of the device.
fn shared(group: &dyn Communicator, device: Device) -> anyhow::Result<()> {
    const BUCKETS: usize = 4;
    let (rank, ranks, n) = (group.rank(), group.ranks(), (1 << 20) + 64);
    let whole = BUCKETS * ranks * n;
    let weights = shared_arena(group, whole, DType::BF16, device)?;
    let sums = shared_arena(group, whole, DType::F32, device)?;
    let heavy = Tensor::full_on(1e-3, [4096, 4096], DType::BF16, device)?;
    // Whole numbers below 256, exact in bfloat16.
    let value = |round: usize, bucket: usize, rank: usize| ((round * 29 + bucket * 7 + rank * 3) % 199) as f64;
    for round in 0..12 {
        // The device is busy here, so a rank that does not wait for the other's readiness is overwritten.
        (0..rank * 4).try_for_each(|_| heavy.matmul(&heavy).map(drop))?;
        let mut tickets = Vec::new();
        for bucket in 0..BUCKETS {
            let of = |arena: &Tensor| arena.narrow(0, bucket * ranks * n, ranks * n);
            let own = |bucket: &Tensor| bucket.narrow(0, rank * n, n);
            let (gathered, summed) = (of(&weights)?, of(&sums)?);
            own(&gathered)?.fill_assign(value(round, bucket, rank))?;
            summed.fill_assign(value(round, bucket, rank))?;
            tickets.push(group.reduce_scatter("gradients", &summed, &own(&summed)?)?);
            tickets.push(group.all_gather("weights", &own(&gathered)?, &gathered)?);
        }
        tickets.into_iter().try_for_each(|ticket| ticket.join())?;
        let (gathered, summed) = (weights.to_f64_vec()?, sums.to_f64_vec()?);
        for (i, piece) in gathered.chunks(n).enumerate() {
            let expected = value(round, i / ranks, i % ranks);
            anyhow::ensure!(piece.iter().all(|&x| x == expected), "round {round}: piece {i} is not {expected}");
        }
        for bucket in 0..BUCKETS {
            let expected: f64 = (0..ranks).map(|rank| value(round, bucket, rank)).sum();
            let own = &summed[(bucket * ranks + rank) * n..][..n];
            anyhow::ensure!(own.iter().all(|&x| x == expected), "round {round}: a sum of bucket {bucket} is wrong");
        }
    }
    println!("shared arenas are right on rank {rank}");
    Ok(())
}

/// A gather of a shared arena, and one more without rank 1, for which the host waits.
fn shared_step(group: &dyn Communicator, device: Device, culprit: bool) -> anyhow::Result<()> {
    let n = 1 << 20;
    let arena = shared_arena(group, group.ranks() * n, DType::BF16, device)?;
    let own = arena.narrow(0, group.rank() * n, n)?;
    group.all_gather("weights of bucket 2", &own, &arena)?.join()?;
    device.synchronize()?;
    group.barrier("both have it")?;
    if culprit {
        return kill_self();
    }
    group.all_gather("weights of bucket 3", &own, &arena)?.join()?;
    device.synchronize()?;
    group.all_gather("weights of bucket 4", &own, &arena)?.join()?;
    anyhow::bail!("the collective ended without rank 1")
}

/// Work before, beside and behind collectives, with the host far ahead of the device.
fn order(group: &dyn Communicator, device: Device) -> anyhow::Result<()> {
    let heavy = Tensor::full_on(1e-3, [4096, 4096], DType::BF16, device)?;
    let value = Tensor::full_on(1.0 + group.rank() as f64, [1 << 22], DType::F32, device)?;
    let mut expected: Vec<f64> = vec![1.0, 2.0];
    for round in 0..60 {
        // The device is busy here, so that a collective which does not wait reads what is not there yet...
        let _ = heavy.matmul(&heavy)?;
        value.scale_assign(0.5)?;
        let scratch = value.affine(1.0, 1.0)?;
        let ticket = group.all_reduce("scratch", &scratch, Reduction::Sum)?;
        // ...and here, beside the collective.
        let _ = heavy.matmul(&heavy)?;
        ticket.join()?;
        // Wrong if it does not wait for the sum. The scratch memory goes back to the pool and is used again.
        value.add_assign_scaled(if round % 2 == 0 { 0.25 } else { -0.25 }, &scratch)?;
        drop(scratch);
        let halved: Vec<f64> = expected.iter().map(|x| 0.5 * x).collect();
        let sum = halved.iter().map(|x| x + 1.0).sum::<f64>();
        expected = halved.iter().map(|x| x + if round % 2 == 0 { 0.25 } else { -0.25 } * sum).collect();
    }
    let expected = expected[group.rank()];
    let found = value.to_f64_vec()?;
    let worst = found.iter().map(|x| (x - expected).abs()).fold(0.0, f64::max);
    anyhow::ensure!(worst < 1e-5, "{worst} off {expected}");
    println!("order holds on rank {}", group.rank());
    Ok(())
}

/// The same sums again and again, on every rank.
fn bits(group: &dyn Communicator, device: Device) -> anyhow::Result<()> {
    for dtype in [DType::F32, DType::BF16] {
        let contents = Tensor::randn(0.0, 1.0, [3_000_001], DType::F32, 7 + group.rank() as u64)?.to_dtype(dtype)?;
        let mut seen = Vec::new();
        for _ in 0..5 {
            let tensor = contents.to_device(device)?;
            let tensor = tensor.affine(1.0, 0.0)?;
            group.all_reduce("again", &tensor, Reduction::Sum)?.join()?;
            let values = tensor.to_f64_vec()?;
            // FNV over the bits: equal sums of different bits would pass a comparison of means.
            let hash = values
                .iter()
                .fold(0xcbf2_9ce4_8422_2325u64, |hash, value| (hash ^ value.to_bits()).wrapping_mul(0x0100_0000_01b3));
            seen.push(f64::from((hash >> 32) as u32));
        }
        let all = group.gather_values("hashes", &seen)?.concat();
        anyhow::ensure!(all.iter().all(|hash| *hash == all[0]), "{dtype}: {all:?}");
    }
    println!("bits are the same on rank {}", group.rank());
    Ok(())
}

/// Bus bandwidth as NCCL's own tests define it: the share of the bytes that has to pass each link.
fn speed(group: &dyn Communicator, device: Device) -> anyhow::Result<()> {
    let ranks = group.ranks();
    for (megabytes, repeats) in [(16, 50), (64, 30), (256, 20), (1024, 8)] {
        let n = (megabytes << 20) / 4;
        let whole = Tensor::full_on(1.0, [n], DType::F32, device)?;
        let part = whole.narrow(0, group.rank() * (n / ranks), n / ranks)?;
        let share = (ranks - 1) as f64 / ranks as f64;
        for (name, factor) in [("all_reduce", 2.0 * share), ("reduce_scatter", share), ("all_gather", share)] {
            let mut started = Instant::now();
            for round in 0..repeats + 3 {
                if round == 3 {
                    device.synchronize()?;
                    group.barrier("timing")?;
                    started = Instant::now();
                }
                match name {
                    "all_reduce" => group.all_reduce(name, &whole, Reduction::Sum),
                    "reduce_scatter" => group.reduce_scatter(name, &whole, &part),
                    _ => group.all_gather(name, &part, &whole),
                }?
                .join()?;
            }
            device.synchronize()?;
            let seconds = started.elapsed().as_secs_f64() / f64::from(repeats);
            if group.rank() == 0 {
                let rate = factor * (megabytes << 20) as f64 / seconds / 1e9;
                println!("{name:<15} {megabytes:>5} MiB  {:.3} ms  {rate:.0} GB/s bus", seconds * 1e3);
            }
            whole.fill_assign(1.0)?;
        }
    }
    Ok(())
}

// ---------------------------------------------------------------------------------------------- the tests

fn launch(manner: &str) -> (Output, String, Duration) {
    let started = Instant::now();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["launcher", "--exact", "--nocapture"])
        .env(MANNER, manner)
        .output()
        .unwrap();
    let text = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat();
    println!("---- {manner}: {:.1} s\n{text}", started.elapsed().as_secs_f64());
    (output, text, started.elapsed())
}

fn succeeds(manner: &str, words: &str) {
    let (output, text, _) = launch(manner);
    assert_eq!(output.status.code(), Some(0), "{manner}");
    assert_eq!(text.matches(words).count(), if words.contains("bus") { 12 } else { RANKS }, "{manner}");
}

#[test]
#[ignore = "needs two NVIDIA GPUs"]
fn every_collective_gives_the_right_values() {
    succeeds("results", "results are right");
}

#[test]
#[ignore = "needs two NVIDIA GPUs"]
fn collectives_wait_for_work_before_them_and_later_work_waits_for_them() {
    succeeds("order", "order holds");
}

#[test]
#[ignore = "needs two NVIDIA GPUs"]
fn sums_have_the_same_bits_every_time_and_on_every_rank() {
    succeeds("bits", "bits are the same");
}

#[test]
#[ignore = "needs two NVIDIA GPUs"]
fn bandwidth() {
    succeeds("speed", "GB/s bus");
}

/// Rank 0 ends within 30 s beyond `wait`, says what rank 1 did, and the launcher fails.
fn ends_rank_0(manner: &str, words: &[&str], wait: Duration) {
    let (output, text, after) = launch(manner);
    assert_eq!(output.status.code(), Some(7), "{manner}");
    for word in words {
        assert!(text.contains(word), "{manner}: no {word:?}");
    }
    assert!(!text.contains("ended without rank 1"), "{manner}");
    assert!(after < wait + Duration::from_secs(30), "{manner} took {after:?}");
}

#[test]
#[ignore = "needs two NVIDIA GPUs"]
fn a_killed_rank_ends_the_other_which_names_it_and_the_collective() {
    let words = ["rank 0: all_reduce \"bucket 3\": rank 1 died", "rank 1 failed (signal: 9 (SIGKILL))"];
    // Connecting is in the time.
    ends_rank_0("killed", &words, Duration::from_secs(10));
}

#[test]
#[ignore = "needs two NVIDIA GPUs"]
fn shared_arenas_are_gathered_and_summed_in_place() {
    succeeds("shared", "shared arenas are right");
}

#[test]
#[ignore = "needs two NVIDIA GPUs"]
fn a_rank_killed_while_memory_is_shared_ends_the_other() {
    // Of which bucket is a matter of time: gathers by copy engines may be ahead of what was seen to end.
    let words = ["rank 0: all_gather \"weights of bucket ", ": rank 1 died", "rank 1 failed (signal: 9 (SIGKILL))"];
    ends_rank_0("killed-sharing", &words, Duration::from_secs(20));
}

#[test]
#[ignore = "needs two NVIDIA GPUs"]
fn a_hanging_rank_is_named_after_the_timeout() {
    let words = ["rank 0: all_reduce \"bucket 3\": rank 1 did not come within 4.0 s"];
    ends_rank_0("hangs", &words, Duration::from_secs(20));
}

#[test]
#[ignore = "needs two NVIDIA GPUs"]
fn a_rank_that_gives_up_or_leaves_ends_the_other() {
    ends_rank_0(
        "gives-up",
        &["rank 0: all_reduce \"bucket 3\": rank 1 gave up: the loss is NaN"],
        Duration::from_secs(10),
    );
    let words = ["rank 0: all_reduce \"bucket 3\": rank 1 left before its turn"];
    ends_rank_0("leaves", &words, Duration::from_secs(20));
}

#[test]
#[ignore = "needs two NVIDIA GPUs"]
fn two_ranks_on_one_gpu_are_refused() {
    let (output, text, _) = launch("one-gpu");
    assert_eq!(output.status.code(), Some(7));
    assert!(text.contains("use the same GPU (GPU-"), "{text}");
}
