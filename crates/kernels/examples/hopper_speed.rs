//! Times both passes of stick-breaking attention on a Hopper card, portable and Hopper kernels, dense: scores are shifted so
//! that the stick never breaks, and early exit is off. 4 B H D L L / 2 flops forward, 2.5 times that backward.
//!
//! `cargo run --release -p stickbreak-kernels --example hopper_speed -- [probe] [tunings] [B,H,L,D ...]`
//! `probe` measures the parts alone, `tunings` every way to build each kernel, with portable ones beside it.

use std::time::Duration;

use half::bf16;
use stickbreak_kernels::attention::AttentionLayout;
use stickbreak_kernels::attention::stick_breaking::StickBreakingSpec;
use stickbreak_kernels::attention::stick_breaking::cuda::{Kernels, Plan};
use stickbreak_kernels::attention::stick_breaking::hopper::forward::Tuning;
use stickbreak_kernels::attention::stick_breaking::hopper::probe::{self, Probe};
use stickbreak_kernels::attention::stick_breaking::hopper::{Choice, Turns, backward, sticks};
use stickbreak_kernels::cuda::{DeviceType, Queue, Scratch, sources_for};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

const SHAPES: [[usize; 4]; 6] = [
    [16, 16, 2048, 64],
    [8, 16, 4096, 64],
    [2, 16, 16384, 64],
    [16, 16, 2048, 128],
    [8, 16, 4096, 128],
    [2, 16, 16384, 128],
];
const RUNS: usize = 9;

/// Ends the process if a case hangs.
fn watched<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let (sender, receiver) = std::sync::mpsc::channel::<()>();
    let name = what.to_owned();
    std::thread::spawn(move || {
        if receiver.recv_timeout(Duration::from_secs(20)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            println!("{name}: no end after 20 s");
            // Not an exit in order: the driver's part of that may wait for the kernel.
            std::process::abort();
        }
    });
    let result = work();
    drop(sender);
    result
}

/// Near-normal numbers of which the first of each head is `shift`.
fn values(count: usize, head_dim: usize, shift: f32, mut seed: u32) -> Vec<bf16> {
    let mut uniform = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    // The same numbers again and again, each time from another place on.
    let some: Vec<bf16> = (0..1 << 18).map(|_| bf16::from_f32(2.0 * (uniform() + uniform() + uniform()))).collect();
    let value = |i: usize| some[(i / some.len() * 97 + i) % some.len()];
    (0..count).map(|i| if i % head_dim == 0 && shift != 0.0 { bf16::from_f32(shift) } else { value(i) }).collect()
}

struct Case {
    spec: StickBreakingSpec,
    documents: Vec<i32>,
    /// q, k, v, d_o.
    inputs: [Scratch; 4],
    flops: f64,
}

impl Case {
    fn new(queue: &Queue, [batch, heads, length, head_dim]: [usize; 4]) -> Outcome<Self> {
        let tokens = batch * length;
        let spec = StickBreakingSpec::new(AttentionLayout::contiguous(tokens, heads, heads, head_dim));
        // A score of -8.
        let shift = (8.0 / spec.scale).sqrt() as f32;
        let count = tokens * heads * head_dim;
        let upload = |shift, seed| queue.upload(&values(count, head_dim, shift, seed));
        let inputs = [upload(shift, 1)?, upload(-shift, 2)?, upload(0.0, 3)?, upload(0.0, 4)?];
        let documents = (0..=batch).map(|document| (document * length) as i32).collect();
        let flops = 4.0 * (batch * heads * head_dim) as f64 * (length * length) as f64 / 2.0;
        Ok(Self { spec, documents, inputs, flops })
    }

    /// Median milliseconds of both passes, and of each kernel of the backward pass by itself.
    fn time(&self, queue: &Queue, kernels: Kernels) -> Outcome<Times> {
        let plan = Plan::with_kernels(queue, &self.spec, &self.documents, DeviceType::Bf16, kernels)?;
        let [q, k, v, d_o] = self.inputs.each_ref().map(Scratch::as_ref);
        let mut outputs = Vec::new();
        for _ in 0..4 {
            outputs.push(queue.scratch(DeviceType::Bf16, q.len())?);
        }
        let [o, dq, dk, dv] = &mut outputs[..] else { return Err("four outputs".into()) };
        let (mut forward, mut backward, mut names, mut parts) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for run in 0..RUNS + 2 {
            let timer = queue.timer()?;
            let saved = plan.forward(queue, q, k, v, &mut o.as_mut(), None, None, true)?.ok_or("nothing was saved")?;
            let there = timer.milliseconds()?;
            let timer = queue.timer()?;
            let [mut a, mut b, mut c] = [dq.as_mut(), dk.as_mut(), dv.as_mut()];
            plan.backward(queue, q, k, v, d_o, None, &saved, &mut a, &mut b, &mut c)?;
            let back = timer.milliseconds()?;
            // One after the other, each with the wait behind it.
            let gradients = [dq.as_mut(), dk.as_mut(), dv.as_mut()];
            let times = plan.time_backward(queue, [q, k, v], d_o, &saved, gradients)?;
            if run >= 2 {
                forward.push(there);
                backward.push(back);
                names = times.iter().map(|(name, _)| *name).collect();
                parts.push(times.into_iter().map(|(_, time)| time).collect::<Vec<_>>());
            }
        }
        let median = |mut times: Vec<f64>| {
            times.sort_by(f64::total_cmp);
            times[RUNS / 2]
        };
        let part = |i: usize| median(parts.iter().map(|run| run[i]).collect());
        let parts = names.into_iter().enumerate().map(|(i, name)| (name, part(i))).collect();
        Ok(Times { forward: median(forward), backward: median(backward), parts })
    }
}

struct Times {
    forward: f64,
    backward: f64,
    parts: Vec<(&'static str, f64)>,
}

fn describe(choice: &Choice) -> String {
    let turned = |turns| match turns {
        Turns::None => "",
        Turns::Start => " turns",
        Turns::Scores => " turns until scores",
    };
    let mut text = String::new();
    if let Some(Tuning { warpgroups, stages, chunk, overlap, turns, .. }) = choice.forward {
        let overlap = if overlap { " overlap" } else { "" };
        text += &format!("o: {warpgroups} warpgroups, {stages} stages, chunks of {chunk}{overlap}{}", turned(turns));
    }
    if let Some(sticks::Tuning { warpgroups, stages }) = choice.sticks {
        text += &format!("sticks: {warpgroups} warpgroups, {stages} stages");
    }
    if let Some(backward::Tuning { stages, pairs, ahead }) = choice.backward {
        let options = [(ahead, " ahead"), (pairs, " pairs")];
        let options: String = options.iter().filter(|(on, _)| *on).map(|(_, word)| *word).collect();
        text += &format!("backward: {stages} stages{options}");
    }
    text
}

/// Every choice of kernels to measure, with its name.
fn choices(head_dim: usize, every: bool) -> Vec<(String, Kernels)> {
    let mut all = vec![("portable".to_owned(), Kernels::Portable)];
    all.push(("default".to_owned(), Kernels::Hopper(Choice::new(head_dim))));
    if every {
        all.extend(Choice::candidates(head_dim).into_iter().map(|choice| (describe(&choice), Kernels::Hopper(choice))));
    }
    all
}

/// What the parts are measured with: warpgroups, chunk, overlap.
fn probes(head_dim: usize) -> Vec<Tuning> {
    let all = [(1, 4, true), (2, 4, true), (2, 4, false), (2, 8, true), (3, 4, false), (3, 8, false)];
    let fits = all.into_iter().filter(|(warpgroups, ..)| head_dim * warpgroups <= 256);
    fits.map(|(warpgroups, chunk, overlap)| Tuning { warpgroups, chunk, overlap, ..Tuning::new(head_dim) }).collect()
}

fn probe(queue: &Queue) -> Outcome<()> {
    println!("| parts alone, D | warpgroups | chunk | what | ms | clocks a round | clocks per pair | TFLOP/s | GB/s |");
    println!("|---|---|---|---|---|---|---|---|---|");
    for (head_dim, tuning) in
        [64, 128].into_iter().flat_map(|head_dim| probes(head_dim).into_iter().map(move |t| (head_dim, t)))
    {
        let overlap = if tuning.overlap { "" } else { ", no overlap" };
        let name = format!("{head_dim} | {} | {}{overlap}", tuning.warpgroups, tuning.chunk);
        for rate in watched(&name, || Probe::new(queue, head_dim, tuning).rates(2000))? {
            let per_pair = if rate.pairs > 0 { rate.clocks_per_round / rate.pairs as f64 } else { 0.0 };
            let (tera, giga) = (rate.flops / rate.milliseconds / 1e9, rate.bytes / rate.milliseconds / 1e6);
            println!(
                "| {name} | {} | {:.3} | {:.0} | {per_pair:.4} | {tera:.0} | {giga:.0} |",
                rate.name, rate.milliseconds, rate.clocks_per_round
            );
        }
    }
    Ok(())
}

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let asked = |word: &str| arguments.iter().any(|argument| argument == word);
    let shapes = arguments.iter().filter(|argument| argument.contains(','));
    let shapes = shapes.map(|text| {
        let numbers = text.split(',').map(str::parse).collect::<Result<Vec<usize>, _>>()?;
        <[usize; 4]>::try_from(numbers).map_err(|_| format!("{text}: expected B,H,L,D").into())
    });
    let mut shapes = shapes.collect::<Outcome<Vec<_>>>()?;
    if shapes.is_empty() {
        shapes = SHAPES.to_vec();
    }

    let queue = Queue::open(0)?;
    println!("{}, {} multiprocessors", queue.gpu().name(), queue.gpu().multiprocessors());
    // Compiled in parallel, ahead.
    let mut sources = Vec::new();
    for head_dim in [64, 128] {
        for (_, kernels) in choices(head_dim, asked("tunings")) {
            if let Kernels::Hopper(choice) = kernels {
                sources.extend(choice.sources(head_dim));
            }
        }
        if asked("probe") {
            sources.extend(probes(head_dim).iter().map(|tuning| probe::source(head_dim, tuning)));
        }
        let portable = sources_for(&queue.gpu().architecture(), head_dim, DeviceType::Bf16);
        sources.extend(portable.into_iter().filter(|source| source.file == "stick_breaking.cu"));
    }
    queue.gpu().prepare(&sources, |_| ())?;
    if asked("probe") {
        probe(&queue)?;
    }
    println!("| B,H,L,D | kernels | forward ms | TFLOP/s | backward ms | TFLOP/s | its kernels: ms, TFLOP/s |");
    println!("|---|---|---|---|---|---|---|");
    for shape in shapes {
        let name = shape.map(|size| size.to_string()).join(",");
        let case = Case::new(&queue, shape)?;
        // A forward pass has two products.
        let rate = |products: f64, milliseconds: f64| products / 2.0 * case.flops / milliseconds / 1e9;
        for (kernel, choice) in choices(shape[3], asked("tunings")) {
            match watched(&format!("{name} {kernel}"), || case.time(&queue, choice)) {
                Ok(Times { forward, backward, parts }) => {
                    let part = |(part, time): &(&str, f64)| {
                        let products = match *part {
                            "dq" => 3.0,
                            "dk, dv" => 4.0,
                            "backward" => 5.0,
                            // It has none.
                            "finish" => 0.0,
                            _ => 1.0,
                        };
                        format!("{part} {time:.3}, {:.0}", rate(products, *time))
                    };
                    let parts = parts.iter().map(part).collect::<Vec<_>>().join("; ");
                    let (there, back) = (rate(2.0, forward), rate(5.0, backward));
                    println!("| {name} | {kernel} | {forward:.3} | {there:.0} | {backward:.3} | {back:.0} | {parts} |");
                }
                Err(error) => println!("| {name} | {kernel} | {error} |"),
            }
        }
    }
    Ok(())
}
