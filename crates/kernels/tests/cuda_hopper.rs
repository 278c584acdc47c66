//! The Hopper kernels of stick-breaking attention against the portable ones and the dense float64 reference, with a state that
//! was kept, in part, or rebuilt; and their parts alone. Prints a line per case; run with `--nocapture`.

mod attention_support;
mod cuda_support;

use attention_support::{Errors, Problem, errors};
use cuda_support::{Watchdog, download, exact, poisoned, queue, same_bits, upload, wide, with_gaps, without_gaps};
use half::bf16;
use stickbreak_kernels::attention::AttentionLayout;
use stickbreak_kernels::attention::stick_breaking::cuda::{Kernels, Plan, Saved};
use stickbreak_kernels::attention::stick_breaking::hopper::Choice;
use stickbreak_kernels::attention::stick_breaking::hopper::forward::Tuning;
use stickbreak_kernels::attention::stick_breaking::hopper::probe::{self, Probe};
use stickbreak_kernels::attention::stick_breaking::{StickBreakingSpec, reference};
use stickbreak_kernels::cuda::{DeviceType, Queue, Scratch, sources_for};

/// Seconds that a case may take.
const PATIENCE: u64 = 60;

/// o, dq, dk, dv without gaps, and rem.
struct Found {
    tensors: [Vec<bf16>; 4],
    rem: Vec<f32>,
    saved: Saved,
}

fn plan(queue: &Queue, spec: &StickBreakingSpec, problem: &Problem<f64>, kernels: Kernels) -> Plan {
    Plan::with_kernels(queue, spec, &problem.cu_seqlens, DeviceType::Bf16, kernels).unwrap()
}

/// Both passes by these kernels.
fn run(queue: &Queue, spec: &StickBreakingSpec, problem: &Problem<f64>, kernels: Kernels) -> Found {
    run_passes(queue, spec, problem, kernels, kernels)
}

/// The forward pass by one plan's kernels, the backward pass by another's.
fn run_passes(
    queue: &Queue,
    spec: &StickBreakingSpec,
    problem: &Problem<f64>,
    forward: Kernels,
    backward: Kernels,
) -> Found {
    let layout = &spec.layout;
    let (width, kv_width) = (layout.query_heads * layout.head_dim, layout.kv_heads * layout.head_dim);
    let rows = layout.tokens * layout.query_heads;
    let q = upload::<bf16>(queue, &problem.q, width, layout.query_stride);
    let k = upload::<bf16>(queue, &problem.k, kv_width, layout.key_stride);
    let v = upload::<bf16>(queue, &problem.v, kv_width, layout.value_stride);
    let d_o = upload::<bf16>(queue, &problem.d_o, width, layout.output_stride);
    let drem = upload::<f32>(queue, &problem.d_rem, 1, 1);
    let mut o = poisoned::<bf16>(queue, layout.tokens * layout.output_stride);
    let mut rem = poisoned::<f32>(queue, rows);
    let [mut dq, mut dk, mut dv] = [rows * layout.head_dim, layout.tokens * kv_width, layout.tokens * kv_width]
        .map(|len| poisoned::<bf16>(queue, len));
    let (forward, backward) = (plan(queue, spec, problem, forward), plan(queue, spec, problem, backward));
    let (q, k, v) = (q.as_ref(), k.as_ref(), v.as_ref());
    let saved = forward.forward(queue, q, k, v, &mut o.as_mut(), Some(&mut rem.as_mut()), None, true).unwrap().unwrap();
    let [mut dq_view, mut dk_view, mut dv_view] = [&mut dq, &mut dk, &mut dv].map(Scratch::as_mut);
    let (d_o, drem) = (d_o.as_ref(), Some(drem.as_ref()));
    backward.backward(queue, q, k, v, d_o, drem, &saved, &mut dq_view, &mut dk_view, &mut dv_view).unwrap();
    let o = without_gaps(&download::<bf16>(queue, &o), width, layout.output_stride);
    let tensors = [o, download(queue, &dq), download(queue, &dk), download(queue, &dv)];
    Found { tensors, rem: download(queue, &rem), saved }
}

/// All Hopper kernels, of which the forward pass keeps the state of so many blocks of keys of a piece and another one rebuilds
/// the rest.
fn keeping(blocks: usize, head_dim: usize) -> Kernels {
    Kernels::Hopper(Choice { kept: Some(blocks), ..Choice::new(head_dim) })
}

/// Cases with their errors, and what was wrong.
struct Table {
    queue: Queue,
    failures: Vec<String>,
}

impl Table {
    fn new() -> Self {
        println!("tensor (row) error against float64 of o, dq, dk, dv, rem; of o against the portable kernel");
        Self { queue: queue(), failures: Vec::new() }
    }

    fn expect(&mut self, name: &str, holds: bool, why: impl FnOnce() -> String) {
        if !holds {
            self.failures.push(format!("{name}: {}", why()));
        }
    }

    /// Both passes by the Hopper and the portable forward kernel against the reference, and twice the same bits.
    fn check(&mut self, name: &str, spec: &StickBreakingSpec, problem: &Problem<f64>) {
        let dense = StickBreakingSpec { layout: problem.layout, early_exit_bits: 0, ..*spec };
        let AttentionLayout { tokens, query_heads, kv_heads, head_dim, .. } = spec.layout;
        let name = format!(
            "{name} {tokens} x {query_heads}/{kv_heads} x {head_dim}{}, exit {}, documents {:?}",
            if spec.attend_current { ", own key" } else { "" },
            spec.early_exit_bits,
            problem.cu_seqlens
        );
        let _watchdog = Watchdog::new(&name, PATIENCE);
        let hopper = Kernels::Hopper(Choice::new(head_dim));
        let found = run(&self.queue, spec, problem, hopper);
        let again = run(&self.queue, spec, problem, hopper);
        // As many blocks as a tile of the kernels has, and twice that; a document has up to 10 here.
        let rebuilt = [0, 2, 4].map(|blocks| (blocks, run(&self.queue, spec, problem, keeping(blocks, head_dim))));
        let portable = run(&self.queue, spec, problem, Kernels::Portable);
        let out = reference::forward(&dense, &problem.inputs()).unwrap();
        let gradients = reference::backward(&dense, &problem.inputs(), &problem.d_o, Some(&problem.d_rem)).unwrap();
        let expected = [out.o, gradients.dq, gradients.dk, gradients.dv];
        let of = |found: &Found, i: usize| errors(&wide(&found.tensors[i]), &expected[i], head_dim);
        let found_errors = std::array::from_fn::<_, 4, _>(|i| of(&found, i));
        let portable_errors = std::array::from_fn::<_, 4, _>(|i| of(&portable, i));
        let rem = errors(&wide(&found.rem), &out.rem, 1);
        let between = errors(&wide(&found.tensors[0]), &wide(&portable.tensors[0]), head_dim);
        let text: Vec<_> = found_errors.iter().map(|e| format!("{:.2e} ({:.1e})", e.tensor, e.row)).collect();
        println!("{} rem {:.1e} ({:.1e}) | {:.1e} | {name}", text.join(" "), rem.tensor, rem.row, between.tensor);
        for (i, what) in ["o", "dq", "dk", "dv"].iter().enumerate() {
            let (found, portable) = (found_errors[i], portable_errors[i]);
            // Where the portable kernel, whose bounds are tested elsewhere, has an error of its own, the same is allowed.
            let (tensor, row) = ((1.1 * portable.tensor).max(4e-3), (1.5 * portable.row).max(2e-2));
            let fine = |found: Errors| found.tensor <= tensor && found.row <= row;
            self.expect(&name, fine(found), || format!("{what} {found:?}, portable {portable:?}"));
            for (kept, rebuilt) in &rebuilt {
                let found = of(rebuilt, i);
                let why = || format!("{what} with {kept} blocks kept {found:?}, portable {portable:?}");
                self.expect(&name, fine(found), why);
            }
        }
        let less = rebuilt[0].1.saved.bytes() < found.saved.bytes();
        self.expect(&name, less, || "the state was not rebuilt, or had not been kept".into());
        let exit = if spec.early_exit_bits == 0 { 0.0 } else { (-f64::from(spec.early_exit_bits)).exp2() };
        self.expect(&name, rem.tensor <= 2e-5 + exit && rem.row <= 1e-4 + exit, || format!("rem {rem:?}"));
        self.expect(&name, between.tensor <= 2e-3 + exit, || format!("o against portable {between:?}"));
        let same = same_bits(&found.rem, &again.rem)
            && found.tensors.iter().zip(&again.tensors).all(|(one, two)| same_bits(one, two));
        self.expect(&name, same, || "two runs differ".into());
        let (visited, causal) = found.saved.visited_tiles(&self.queue).unwrap();
        let (most, _) = portable.saved.visited_tiles(&self.queue).unwrap();
        if spec.early_exit_bits > 0 {
            println!("    visited {visited:?} of {causal}, portable {most:?}");
            // A piece of 64 rows stops by itself here, after tiles of 128 keys; two pieces stop together there, after 64.
            let pieces = problem.cu_seqlens.windows(2).map(|w| (w[1] - w[0]) as u64 / 64 + 1).sum::<u64>();
            let fine = visited.iter().zip(&most).all(|(&here, &there)| here > 0 && here <= there + pieces);
            self.expect(&name, fine, || format!("visited {visited:?}, portable {most:?}"));
        } else {
            self.expect(&name, visited.iter().all(|&count| count == causal), || format!("visited {visited:?}"));
        }
    }

    fn check_both_masks(&mut self, name: &str, lengths: &[usize], heads: (usize, usize), head_dim: usize, spread: f64) {
        let problem = exact(lengths, heads, head_dim, spread);
        for attend_current in [false, true] {
            self.check(name, &StickBreakingSpec { attend_current, ..StickBreakingSpec::new(problem.layout) }, &problem);
        }
    }

    fn done(self) {
        assert!(self.failures.is_empty(), "{} failures\n{}", self.failures.len(), self.failures.join("\n"));
    }
}

/// In parallel, ahead of the tests behind this one (in the order of their names with `--test-threads=1`).
#[test]
#[ignore = "needs an NVIDIA Hopper GPU"]
fn a0_kernels_compile() {
    let queue = queue();
    let mut sources = Vec::new();
    for head_dim in [64, 128] {
        let choices = Choice::candidates(head_dim).into_iter().chain([Choice::new(head_dim)]);
        sources.extend(choices.flat_map(|choice| choice.sources(head_dim)));
        sources.push(probe::source(head_dim, &Tuning::new(head_dim)));
        let portable = sources_for("sm_90a", head_dim, DeviceType::Bf16);
        sources.extend(portable.into_iter().filter(|source| source.file == "stick_breaking.cu"));
    }
    queue.gpu().prepare(&sources, |_| ()).unwrap();
}

/// The numbers of a tile, all different within 2^16 and exact in bf16 as bits.
fn numbered(count: usize) -> Vec<bf16> {
    (0..count).map(|i| bf16::from_bits((i * 7919 % 0x7f00) as u16)).collect()
}

#[test]
#[ignore = "needs an NVIDIA Hopper GPU"]
fn a1_the_copy_engine_permutes_and_swizzles() {
    let queue = queue();
    let _watchdog = Watchdog::new("copies", PATIENCE);
    for (head_dim, tokens, width, stride) in [(64, 128, 64, 64), (64, 333, 192, 200), (128, 1000, 256, 256)] {
        let keys = numbered((tokens - 1) * stride + width);
        let memory = queue.upload(&keys).unwrap();
        let probe = Probe::new(&queue, head_dim, Tuning::new(head_dim));
        for (row, column) in [(0, 0), (tokens - 128, width - 64), ((tokens - 128) / 3, 0)] {
            let tile = probe.tile(memory.as_ref(), (tokens, width, stride), (row, column)).unwrap();
            let found = queue.download::<bf16>(tile.as_ref()).unwrap();
            let mut wrong = 0;
            for n in 0..128 {
                let key = 32 * (n >> 1 & 3) + 2 * (n >> 3) + (n & 1);
                for x in 0..64 {
                    let expected = keys[(row + key) * stride + column + x];
                    let at = n * 64 + ((x / 8) ^ (n & 7)) * 8 + x % 8;
                    wrong += usize::from(found[at].to_bits() != expected.to_bits());
                }
            }
            println!("{tokens} x {width}, stride {stride}, from {row}, {column}: {wrong} of 8192 elements elsewhere");
            assert_eq!(wrong, 0);
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA Hopper GPU"]
fn a2_products_of_a_warpgroup() {
    let queue = queue();
    let _watchdog = Watchdog::new("products", PATIENCE);
    for d in [64, 128] {
        let problem = exact(&[128], (1, 1), d, 1.0);
        let narrow = |values: &[f64]| values.iter().map(|&x| bf16::from_f64(x)).collect::<Vec<_>>();
        let weights: Vec<f64> = problem.d_o.iter().cycle().take(64 * 128).copied().collect();
        let (q, k, v) = (&problem.q[..64 * d], &problem.k, &problem.v);
        let [q_memory, k_memory, w_memory, v_memory] =
            [q, k, &weights, v].map(|values| queue.upload(&narrow(values)).unwrap());
        let probe = Probe::new(&queue, d, Tuning::new(d));
        let found = probe.products(q_memory.as_ref(), k_memory.as_ref(), w_memory.as_ref(), v_memory.as_ref()).unwrap();
        let [scores, values] = found.map(|memory| wide(&queue.download::<f32>(memory.as_ref()).unwrap()));
        let mut expected = [vec![0.0; 64 * 128], vec![0.0; 64 * d]];
        for i in 0..64 {
            for j in 0..128 {
                expected[0][i * 128 + j] = (0..d).map(|x| q[i * d + x] * k[j * d + x]).sum();
                for x in 0..d {
                    expected[1][i * d + x] += weights[i * 128 + j] * v[j * d + x];
                }
            }
        }
        let [of_scores, of_values] = [(&scores, &expected[0], 128), (&values, &expected[1], d)]
            .map(|(found, expected, width)| errors(found, expected, width));
        println!("head dim {d}: scores {of_scores:?}, values {of_values:?}");
        assert!(of_scores.tensor < 1e-5 && of_values.tensor < 1e-5);
    }
}

#[test]
#[ignore = "needs an NVIDIA Hopper GPU"]
fn b1_lengths_around_tile_edges() {
    let mut table = Table::new();
    for head_dim in [64, 128] {
        for tokens in [128, 129, 160, 191, 192, 193, 255, 256, 257, 300, 385, 640] {
            table.check_both_masks("length", &[tokens], (2, 1), head_dim, 1.0);
        }
    }
    table.done();
}

#[test]
#[ignore = "needs an NVIDIA Hopper GPU"]
fn b2_packed_documents_groups_and_strides() {
    let mut table = Table::new();
    for head_dim in [64, 128] {
        table.check_both_masks("packed", &[0, 3, 0, 0, 120, 65, 1, 0], (2, 1), head_dim, 1.0);
        table.check_both_masks("packed", &[140, 40], (8, 2), head_dim, 1.0);
        table.check_both_masks("packed", &[40, 101, 1], (4, 1), head_dim, 3.0);
        table.check_both_masks("packed", &[130, 1, 64, 63, 128, 257, 2], (4, 2), head_dim, 0.5);
        let problem = exact(&[70, 233], (4, 2), head_dim, 1.0);
        for gap in [8, 40] {
            let spec = StickBreakingSpec::new(with_gaps(&problem.layout, gap));
            table.check("strides", &spec, &problem);
        }
    }
    table.done();
}

#[test]
#[ignore = "needs an NVIDIA Hopper GPU"]
fn b3_saturated_scores_and_scales() {
    let mut table = Table::new();
    let mut state = 1u32;
    let mut uniform = |low: f64, high: f64| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f64::from(bf16::from_f64(low + (high - low) * f64::from(state >> 8) / f64::from(1 << 24)))
    };
    for head_dim in [64, 128] {
        for case in ["high", "low", "alternating", "wide", "never broken", "three in a row"] {
            let mut problem = exact(&[301], (1, 1), head_dim, 0.125);
            for token in 0..301 {
                problem.q[token * head_dim] = 1.0;
                problem.k[token * head_dim] = match case {
                    "high" => uniform(15.0, 30.0),
                    "low" => uniform(-30.0, -15.0),
                    "alternating" => [16.0, -16.0][token % 2],
                    "wide" => uniform(-20.0, 20.0),
                    "never broken" => uniform(-8.0, -4.0),
                    _ => [20.0, 20.0, 20.0, -9.0, -9.0, -9.0, -9.0][token % 7],
                };
            }
            let spec = StickBreakingSpec { scale: 1.0, ..StickBreakingSpec::new(problem.layout) };
            table.check(case, &spec, &problem);
        }
        let problem = exact(&[200], (2, 2), head_dim, 1.0);
        for scale in [-0.3, 1.0 / 64.0, 0.0] {
            table.check("scale", &StickBreakingSpec { scale, ..StickBreakingSpec::new(problem.layout) }, &problem);
        }
        // Scores beyond anything: whatever happens, happens in range.
        let problem = exact(&[301], (1, 1), head_dim, 300.0);
        let spec = StickBreakingSpec::new(problem.layout);
        let watchdog = Watchdog::new("scores beyond anything", PATIENCE);
        let found = run(&table.queue, &spec, &problem, Kernels::Hopper(Choice::new(head_dim)));
        drop(watchdog);
        let finite = found.tensors.iter().flatten().all(|x| x.is_finite()) && found.rem.iter().all(|x| x.is_finite());
        table.expect("scores beyond anything", finite, || format!("head dim {head_dim}: not finite"));
    }
    table.done();
}

#[test]
#[ignore = "needs an NVIDIA Hopper GPU"]
fn b4_early_exit() {
    let mut table = Table::new();
    for (lengths, heads, head_dim) in
        [(&[1000, 130, 0, 700][..], (2, 2), 64), (&[900, 333], (4, 2), 128), (&[600, 3], (2, 1), 64)]
    {
        let problem = exact(lengths, heads, head_dim, 1.0);
        for bits in [12, 20] {
            let spec = StickBreakingSpec { early_exit_bits: bits, ..StickBreakingSpec::new(problem.layout) };
            table.check("exit", &spec, &problem);
        }
    }
    // Sticks that never break are visited to the end.
    for head_dim in [64, 128] {
        let mut problem = exact(&[400], (1, 1), head_dim, 0.125);
        for token in 0..400 {
            (problem.q[token * head_dim], problem.k[token * head_dim]) = (8.0, -8.0);
        }
        let spec = StickBreakingSpec { early_exit_bits: 20, ..StickBreakingSpec::new(problem.layout) };
        table.check("never broken", &spec, &problem);
        let _watchdog = Watchdog::new("never broken", PATIENCE);
        let saved = run(&table.queue, &spec, &problem, Kernels::Hopper(Choice::new(head_dim))).saved;
        let (visited, causal) = saved.visited_tiles(&table.queue).unwrap();
        table.expect("never broken", visited == [causal], || format!("{visited:?} of {causal}"));
    }
    // Sticks that last for some tiles: longer ones with more bits.
    for (head_dim, shift) in [(64, 5.5), (128, 6.5)] {
        let mut problem = exact(&[1500], (2, 1), head_dim, 0.5);
        for token in 0..1500 {
            problem.k[token * head_dim] = -shift;
            for head in 0..2 {
                problem.q[(token * 2 + head) * head_dim] = shift;
            }
        }
        let layout = problem.layout;
        for attend_current in [false, true] {
            let spec = StickBreakingSpec { attend_current, early_exit_bits: 20, ..StickBreakingSpec::new(layout) };
            table.check("slowly broken", &spec, &problem);
        }
        let dense = reference::forward(&StickBreakingSpec::new(layout), &problem.inputs()).unwrap();
        let mut fewer = 0;
        for bits in [12, 20] {
            let name = format!("slowly broken, head dim {head_dim}, exit {bits}");
            let _watchdog = Watchdog::new(&name, PATIENCE);
            let spec = StickBreakingSpec { early_exit_bits: bits, ..StickBreakingSpec::new(layout) };
            let found = run(&table.queue, &spec, &problem, Kernels::Hopper(Choice::new(head_dim)));
            let (visited, causal) = found.saved.visited_tiles(&table.queue).unwrap();
            println!("    visited {visited:?} of {causal} | {name}");
            let between = visited.iter().all(|&count| fewer < count && count < causal);
            table.expect(&name, between, || format!("visited {visited:?} of {causal}, {fewer} with fewer bits"));
            fewer = visited.into_iter().max().unwrap_or(0);
            // A row is left when at most 2^-bits of its stick is left.
            let most = (-f64::from(bits)).exp2();
            let fine =
                wide(&found.rem).iter().zip(&dense.rem).all(|(found, dense)| (found - dense).abs() <= most + 1e-5);
            table.expect(&name, fine, || "a stick was given up too early".into());
        }
    }
    table.done();
}

/// Far more items than multiprocessors, most of them cut short: against the portable kernel, and many times the same bits.
#[test]
#[ignore = "needs an NVIDIA Hopper GPU"]
fn b5_many_items_give_the_same_bits() {
    let mut table = Table::new();
    for (head_dim, heads) in [(64, (24, 8)), (128, (16, 16))] {
        let problem = exact(&[1900, 300, 1, 77, 641], heads, head_dim, 1.0);
        let hopper = Kernels::Hopper(Choice::new(head_dim));
        for bits in [0, 24] {
            let name = format!("many items, head dim {head_dim}, exit {bits}");
            let _watchdog = Watchdog::new(&name, PATIENCE);
            let spec = StickBreakingSpec { early_exit_bits: bits, ..StickBreakingSpec::new(problem.layout) };
            let one = run(&table.queue, &spec, &problem, hopper);
            let portable = run(&table.queue, &spec, &problem, Kernels::Portable);
            for (i, what) in ["o", "dq", "dk", "dv"].iter().enumerate() {
                let between = errors(&wide(&one.tensors[i]), &wide(&portable.tensors[i]), head_dim);
                println!("{what} against portable {between:?} | {name}");
                table.expect(&name, between.tensor <= 2e-3 && between.row <= 2e-2, || format!("{what} {between:?}"));
            }
            for _ in 0..4 {
                let two = run(&table.queue, &spec, &problem, hopper);
                let same =
                    same_bits(&one.rem, &two.rem) && one.tensors.iter().zip(&two.tensors).all(|(a, b)| same_bits(a, b));
                table.expect(&name, same, || "two runs differ".into());
            }
        }
    }
    table.done();
}

/// What is not a number in one document shows there, and changes no bit of those before and behind it. One such key takes the
/// sticks of all later rows with it, and so the gradients of all older keys.
#[test]
#[ignore = "needs an NVIDIA Hopper GPU"]
fn b6_documents_do_not_leak() {
    let mut table = Table::new();
    for head_dim in [64, 128] {
        for bits in [0, 16] {
            let name = format!("leaks, head dim {head_dim}, exit {bits}");
            let problem = exact(&[330, 157, 290], (4, 2), head_dim, 1.0);
            let spec = StickBreakingSpec { early_exit_bits: bits, ..StickBreakingSpec::new(problem.layout) };
            for kernels in [Kernels::Hopper(Choice::new(head_dim)), keeping(0, head_dim), keeping(2, head_dim)] {
                let one = run(&table.queue, &spec, &problem, kernels);
                let mut other = problem.clone();
                for (values, heads) in [(&mut other.q, 4), (&mut other.k, 2), (&mut other.v, 2)] {
                    values[330 * heads * head_dim..487 * heads * head_dim].fill(f64::NAN);
                }
                let two = run(&table.queue, &spec, &other, kernels);
                for (i, (a, b)) in one.tensors.iter().zip(&two.tensors).enumerate() {
                    let (from, to) = (a.len() / 777 * 330, a.len() / 777 * 487);
                    let same = same_bits(&a[..from], &b[..from]) && same_bits(&a[to..], &b[to..]);
                    table.expect(&name, same, || format!("tensor {i} differs outside the document"));
                    table.expect(&name, b[from..to].iter().any(|x| x.is_nan()), || format!("tensor {i} shows no NaN"));
                }
                let mut other = problem.clone();
                other.k[400 * 2 * head_dim..401 * 2 * head_dim].fill(f64::NAN);
                let three = run(&table.queue, &spec, &other, kernels);
                for (what, gradient) in ["dk", "dv"].iter().zip(&three.tensors[2..]) {
                    let oldest = &gradient[330 * 2 * head_dim..394 * 2 * head_dim];
                    table.expect(&name, oldest.iter().all(|x| x.is_nan()), || {
                        format!("{what} of older keys is a number")
                    });
                }
            }
        }
    }
    table.done();
}

/// Errors at the sizes that other implementations are compared at; they do not grow with the scores.
#[test]
#[ignore = "needs an NVIDIA Hopper GPU"]
fn b7_errors_stay_flat_as_scores_grow() {
    let mut table = Table::new();
    for head_dim in [64, 128] {
        for spread in [1.0, 4.0] {
            let problem = exact(&[2048], (1, 1), head_dim, spread);
            let spec = StickBreakingSpec::new(problem.layout);
            let name = format!("head dim {head_dim}, spread {spread}");
            let _watchdog = Watchdog::new(&name, PATIENCE);
            let out = reference::forward(&spec, &problem.inputs()).unwrap();
            let gradients = reference::backward(&spec, &problem.inputs(), &problem.d_o, Some(&problem.d_rem)).unwrap();
            let expected = [out.o, gradients.dq, gradients.dk, gradients.dv];
            let found = run(&table.queue, &spec, &problem, Kernels::Hopper(Choice::new(head_dim)));
            let found =
                std::array::from_fn::<_, 4, _>(|i| errors(&wide(&found.tensors[i]), &expected[i], head_dim).tensor);
            println!("{name}: o, dq, dk, dv {found:?}");
            let fine = found.iter().zip([3.2e-3, 4e-3, 4e-3, 2.8e-3]).all(|(&found, limit)| found <= limit);
            table.expect(&name, fine, || format!("{found:?}"));
        }
    }
    table.done();
}

/// Every choice of how the kernel is built computes the same.
#[test]
#[ignore = "needs an NVIDIA Hopper GPU"]
fn b8_every_tuning() {
    let mut table = Table::new();
    for head_dim in [64, 128] {
        let problem = exact(&[500, 3, 270], (2, 1), head_dim, 1.0);
        for bits in [0, 20] {
            let spec = StickBreakingSpec { early_exit_bits: bits, ..StickBreakingSpec::new(problem.layout) };
            let portable = run(&table.queue, &spec, &problem, Kernels::Portable);
            for choice in Choice::candidates(head_dim) {
                let name = format!("head dim {head_dim}, exit {bits}, {choice:?}");
                let _watchdog = Watchdog::new(&name, PATIENCE);
                let found = run(&table.queue, &spec, &problem, Kernels::Hopper(choice));
                for (i, what) in ["o", "dq", "dk", "dv"].iter().enumerate() {
                    let between = errors(&wide(&found.tensors[i]), &wide(&portable.tensors[i]), head_dim);
                    table
                        .expect(&name, between.tensor <= 2e-3 && between.row <= 2e-2, || format!("{what} {between:?}"));
                }
            }
        }
    }
    table.done();
}

/// A state says itself what is in it: backward passes go on from forward passes of other plans.
#[test]
#[ignore = "needs an NVIDIA Hopper GPU"]
fn c2_any_plan_goes_on_from_any_other() {
    let mut table = Table::new();
    for head_dim in [64, 128] {
        for bits in [0, 24] {
            let problem = exact(&[700, 90, 330], (4, 2), head_dim, 1.0);
            let spec = StickBreakingSpec { early_exit_bits: bits, ..StickBreakingSpec::new(problem.layout) };
            let all = Choice::new(head_dim);
            let plans = [
                ("automatic", Kernels::Automatic),
                ("portable", Kernels::Portable),
                ("nothing kept", keeping(0, head_dim)),
                ("2 blocks kept", keeping(2, head_dim)),
                ("6 blocks kept", keeping(6, head_dim)),
                ("more blocks kept than there are", keeping(usize::MAX, head_dim)),
                (
                    "portable but for its backward pass",
                    Kernels::Hopper(Choice { backward: all.backward, ..Choice::NONE }),
                ),
            ];
            let dense = StickBreakingSpec::new(problem.layout);
            let gradients = reference::backward(&dense, &problem.inputs(), &problem.d_o, Some(&problem.d_rem)).unwrap();
            let expected = [gradients.dq, gradients.dk, gradients.dv];
            for (first, forward) in plans {
                for (second, backward) in plans {
                    let name = format!("{first}, then {second}, head dim {head_dim}, exit {bits}");
                    let _watchdog = Watchdog::new(&name, PATIENCE);
                    let found = run_passes(&table.queue, &spec, &problem, forward, backward);
                    for (i, what) in ["dq", "dk", "dv"].iter().enumerate() {
                        let error = errors(&wide(&found.tensors[i + 1]), &expected[i], head_dim);
                        let fine = error.tensor <= 4e-3 && error.row <= 2e-2;
                        table.expect(&name, fine, || format!("{what} {error:?}"));
                    }
                }
            }
        }
    }
    table.done();
}

#[test]
#[ignore = "needs an NVIDIA Hopper GPU"]
fn b9_calls_that_cannot_run_are_refused() {
    let queue = queue();
    for (layout, message) in [
        (AttentionLayout::contiguous(127, 2, 1, 64), "tokens must be at least 128, found 127"),
        (AttentionLayout::contiguous(200, 2, 1, 96), "head_dim must be 64 or 128, found 96"),
    ] {
        let spec = StickBreakingSpec::new(layout);
        let kernels = Kernels::Hopper(Choice::new(64));
        let documents = [0, layout.tokens as i32];
        let refused = Plan::with_kernels(&queue, &spec, &documents, DeviceType::Bf16, kernels).unwrap_err().to_string();
        assert!(refused.contains(message), "{refused}");
        // By itself a plan takes the portable kernel there.
        Plan::new(&queue, &spec, &documents, DeviceType::Bf16).unwrap();
    }
}

/// Near-normal numbers, quickly.
fn many(count: usize, mut seed: u32) -> Vec<bf16> {
    let mut uniform = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count).map(|_| bf16::from_f32(2.0 * (uniform() + uniform() + uniform()))).collect()
}

/// So large a state that most of it is rebuilt, and that the backward pass takes one key/value head at a time.
#[test]
#[ignore = "needs an NVIDIA Hopper GPU"]
fn c1_heads_in_several_launches() {
    let mut table = Table::new();
    let (tokens, heads, kv_heads, head_dim) = (16684, 192, 3, 64);
    let layout = AttentionLayout::contiguous(tokens, heads, kv_heads, head_dim);
    let documents = [0, 300, 16684];
    let (width, kv_width) = (tokens * heads * head_dim, tokens * kv_heads * head_dim);
    let [q, k, v, d_o] = [(width, 1), (kv_width, 2), (kv_width, 3), (width, 4)]
        .map(|(count, seed)| table.queue.upload(&many(count, seed)).unwrap());
    let drem: Vec<f32> = many(tokens * heads, 5).iter().map(|x| x.to_f32()).collect();
    let drem = table.queue.upload(&drem).unwrap();
    for early_exit_bits in [0, 24] {
        let spec = StickBreakingSpec { scale: 1.0 / 64.0, early_exit_bits, ..StickBreakingSpec::new(layout) };
        let mut found = Vec::new();
        let portable = [("sticks", 3), ("dq", 3), ("dk, dv", 3)];
        let hopper = [("sticks", 3), ("backward", 3), ("finish", 3)];
        for (kernels, expected) in [(Kernels::Portable, portable), (Kernels::Hopper(Choice::new(head_dim)), hopper)] {
            let _watchdog = Watchdog::new("several launches", PATIENCE);
            let queue = &table.queue;
            let plan = Plan::with_kernels(queue, &spec, &documents, DeviceType::Bf16, kernels).unwrap();
            let [mut o, mut dq, mut dk, mut dv] =
                [width, width, kv_width, kv_width].map(|len| queue.scratch(DeviceType::Bf16, len).unwrap());
            let (q, k, v, d_o) = (q.as_ref(), k.as_ref(), v.as_ref(), d_o.as_ref());
            let saved = plan.forward(queue, q, k, v, &mut o.as_mut(), None, None, true).unwrap().unwrap();
            let gradients = [dq.as_mut(), dk.as_mut(), dv.as_mut()];
            let times = plan.time_backward(queue, [q, k, v], d_o, &saved, gradients).unwrap();
            println!("{times:?}");
            let launches = |of: &str| times.iter().filter(|(name, _)| *name == of).count();
            let fine = expected.into_iter().all(|(name, count)| launches(name) == count);
            let drem = Some(drem.as_ref());
            let [mut a, mut b, mut c] = [dq.as_mut(), dk.as_mut(), dv.as_mut()];
            plan.backward(queue, q, k, v, d_o, drem, &saved, &mut a, &mut b, &mut c).unwrap();
            // Of dq the ends, which have all heads.
            let part = 500 * heads * head_dim;
            let ends = [dq.as_ref().slice(0..part), dq.as_ref().slice(width - part..width)];
            let [first, last] = ends.map(|part| wide(&queue.download::<bf16>(part).unwrap()));
            let [dk, dv] = [&dk, &dv].map(|memory| wide(&download::<bf16>(queue, memory)));
            found.push([first, last, dk, dv]);
            table.expect("several launches", fine, || format!("{times:?}"));
        }
        for (i, what) in ["dq, first rows", "dq, last rows", "dk", "dv"].iter().enumerate() {
            let between = errors(&found[1][i], &found[0][i], head_dim);
            println!("exit {early_exit_bits}: {what} against portable {between:?}");
            table.expect("several launches", between.tensor <= 3e-3 && between.row <= 3e-2, || {
                format!("exit {early_exit_bits}: {what} {between:?}")
            });
        }
    }
    table.done();
}
