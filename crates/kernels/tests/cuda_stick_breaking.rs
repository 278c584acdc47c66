//! Stick-breaking attention on a GPU, f32 and bf16, by the kernels that run on every card, against the dense float64
//! reference. `cuda_hopper.rs` has those for Hopper cards.

mod attention_support;
mod cuda_support;

use attention_support::{Problem, assert_close, errors};
use cuda_support::{Number, download, exact, poisoned, queue, same_bits, upload, wide, with_gaps, without_gaps};
use half::bf16;
use stickbreak_kernels::attention::AttentionLayout;
use stickbreak_kernels::attention::stick_breaking::cuda::{Kernels, Plan, Saved};
use stickbreak_kernels::attention::stick_breaking::{StickBreakingSpec, reference};
use stickbreak_kernels::cuda::{DeviceType, Queue, Scratch};

/// What both passes wrote: o, dq, dk, dv without gaps; rem, log2_rem.
struct Found<T> {
    tensors: [Vec<T>; 4],
    rem: Vec<f32>,
    log2_rem: Vec<f32>,
    saved: Saved,
}

impl<T: Number> Found<T> {
    /// How many numbers differ of o, dq, dk, dv, rem, log2_rem.
    fn differences(&self, other: &Self) -> [usize; 6] {
        fn count<U: Number>(a: &[U], b: &[U]) -> usize {
            a.iter().zip(b).filter(|(a, b)| a.bits() != b.bits()).count()
        }
        let [o, dq, dk, dv] = std::array::from_fn(|i| count(&self.tensors[i], &other.tensors[i]));
        [o, dq, dk, dv, count(&self.rem, &other.rem), count(&self.log2_rem, &other.log2_rem)]
    }

    fn same_bits(&self, other: &Self) -> bool {
        self.tensors.iter().zip(&other.tensors).all(|(a, b)| same_bits(a, b))
            && same_bits(&self.rem, &other.rem)
            && same_bits(&self.log2_rem, &other.log2_rem)
    }
}

fn run<T: Number>(queue: &Queue, spec: &StickBreakingSpec, problem: &Problem<f64>, with_drem: bool) -> Found<T> {
    let layout = &spec.layout;
    let (width, kv_width) = (layout.query_heads * layout.head_dim, layout.kv_heads * layout.head_dim);
    let rows = layout.tokens * layout.query_heads;
    let q = upload::<T>(queue, &problem.q, width, layout.query_stride);
    let k = upload::<T>(queue, &problem.k, kv_width, layout.key_stride);
    let v = upload::<T>(queue, &problem.v, kv_width, layout.value_stride);
    let d_o = upload::<T>(queue, &problem.d_o, width, layout.output_stride);
    let drem = upload::<f32>(queue, &problem.d_rem, 1, 1);
    let mut o = poisoned::<T>(queue, layout.tokens * layout.output_stride);
    let [mut rem, mut log2_rem] = [rows, rows].map(|len| poisoned::<f32>(queue, len));
    let [mut dq, mut dk, mut dv] = [rows * layout.head_dim, layout.tokens * kv_width, layout.tokens * kv_width]
        .map(|len| poisoned::<T>(queue, len));
    let plan = Plan::with_kernels(queue, spec, &problem.cu_seqlens, T::TYPE, Kernels::Portable).unwrap();
    let (q, k, v) = (q.as_ref(), k.as_ref(), v.as_ref());
    let (mut rem_view, mut log_view) = (rem.as_mut(), log2_rem.as_mut());
    let saved = plan.forward(queue, q, k, v, &mut o.as_mut(), Some(&mut rem_view), Some(&mut log_view), true);
    let saved = saved.unwrap().unwrap();
    assert_eq!(saved.count_tiles(queue).unwrap().read(queue).unwrap(), saved.visited_tiles(queue).unwrap());
    let gradients = [&mut dq, &mut dk, &mut dv].map(Scratch::as_mut);
    let [mut dq_view, mut dk_view, mut dv_view] = gradients;
    let drem = with_drem.then(|| drem.as_ref());
    plan.backward(queue, q, k, v, d_o.as_ref(), drem, &saved, &mut dq_view, &mut dk_view, &mut dv_view).unwrap();
    let found = without_gaps(&download::<T>(queue, &o), width, layout.output_stride);

    // The pass that keeps nothing and leaves rem and its logarithm out writes the same o.
    let mut again = poisoned::<T>(queue, layout.tokens * layout.output_stride);
    let nothing = plan.forward(queue, q, k, v, &mut again.as_mut(), None, None, false).unwrap();
    assert!(nothing.is_none());
    let again = without_gaps(&download::<T>(queue, &again), width, layout.output_stride);
    let difference = errors(&wide(&again), &wide(&found), layout.head_dim);
    assert!(difference.tensor <= 1e-4 || T::TYPE == DeviceType::Bf16 && difference.tensor <= 1e-3, "{difference:?}");

    let tensors = [found, download(queue, &dq), download(queue, &dk), download(queue, &dv)];
    Found { tensors, rem: download(queue, &rem), log2_rem: download(queue, &log2_rem), saved }
}

/// Tensor and row error that are allowed to o and to the gradients.
fn limits<T: Number>() -> (f64, f64) {
    if T::TYPE == DeviceType::F32 { (2e-5, 1e-4) } else { (4e-3, 2e-2) }
}

fn check<T: Number>(queue: &Queue, spec: &StickBreakingSpec, problem: &Problem<f64>) {
    let found = run::<T>(queue, spec, problem, true);
    let dense = StickBreakingSpec { layout: problem.layout, ..*spec };
    let out = reference::forward(&dense, &problem.inputs()).unwrap();
    let gradients = reference::backward(&dense, &problem.inputs(), &problem.d_o, Some(&problem.d_rem)).unwrap();
    let layout = &spec.layout;
    let name = |what: &str| {
        let AttentionLayout { tokens, query_heads, kv_heads, head_dim, .. } = layout;
        format!("{what}, {} {tokens} x {query_heads}/{kv_heads} x {head_dim}, {:?}", T::NAME, problem.cu_seqlens)
    };
    assert_close(&name("rem"), &wide(&found.rem), &out.rem, 1, 2e-5, 1e-4);
    if spec.early_exit_bits == 0 {
        assert_close(&name("log2_rem"), &wide(&found.log2_rem), &out.log2_rem, 1, 2e-5, 1e-4);
        let (visited, causal) = found.saved.visited_tiles(queue).unwrap();
        assert!(visited.len() == layout.query_heads && visited.iter().all(|&count| count == causal));
    }
    let (tensor, row) = limits::<T>();
    let expected = [out.o, gradients.dq, gradients.dk, gradients.dv];
    for ((what, found), expected) in ["o", "dq", "dk", "dv"].iter().zip(&found.tensors).zip(&expected) {
        assert_close(&name(what), &wide(found), expected, layout.head_dim, tensor, row);
    }
}

fn check_both(queue: &Queue, lengths: &[usize], heads: (usize, usize), head_dim: usize, spread: f64) {
    let problem = exact(lengths, heads, head_dim, spread);
    for attend_current in [false, true] {
        let spec = StickBreakingSpec { attend_current, ..StickBreakingSpec::new(problem.layout) };
        check::<f32>(queue, &spec, &problem);
        if head_dim.is_multiple_of(8) && head_dim >= 16 {
            check::<bf16>(queue, &spec, &problem);
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn lengths_around_tile_edges() {
    let queue = queue();
    for tokens in [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 191, 193, 300] {
        check_both(&queue, &[tokens], (2, 2), 64, 1.0);
    }
    for (tokens, head_dim) in [(1, 128), (33, 128), (64, 128), (65, 128), (129, 128), (300, 128), (65, 256), (129, 256)]
    {
        check_both(&queue, &[tokens], (1, 1), head_dim, 1.0);
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn every_head_dim() {
    let queue = queue();
    for head_dim in [1, 5, 33, 129] {
        check_both(&queue, &[130], (1, 1), head_dim, 1.0);
    }
    for head_dim in (16..=128).step_by(8).chain([256]) {
        check_both(&queue, &[150], (2, 1), head_dim, 1.0);
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn packed_documents_and_groups() {
    let queue = queue();
    for head_dim in [16, 24, 64, 80, 128] {
        check_both(&queue, &[0, 3, 0, 0, 120, 65, 1, 0], (2, 1), head_dim, 1.0);
        check_both(&queue, &[140, 40], (8, 2), head_dim, 1.0);
        check_both(&queue, &[40, 101], (4, 1), head_dim, 3.0);
    }
    // Nothing to do is done without a launch.
    for lengths in [&[][..], &[0, 0]] {
        let problem = exact(lengths, (2, 1), 16, 1.0);
        let found = run::<bf16>(&queue, &StickBreakingSpec::new(problem.layout), &problem, true);
        assert!(found.tensors.iter().all(Vec::is_empty) && found.rem.is_empty());
    }
}

/// Long enough that the state between the passes is kept at head dim 256 and rebuilt at 16.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn kept_and_rebuilt_state() {
    let queue = queue();
    for (head_dim, kept) in [(16, false), (256, true)] {
        let problem = exact(&[1400, 20], (2, 1), head_dim, 0.5);
        let spec = StickBreakingSpec::new(problem.layout);
        check::<bf16>(&queue, &spec, &problem);
        let saved = run::<bf16>(&queue, &spec, &problem, true).saved;
        assert_eq!(saved.bytes() > 0, kept, "head dim {head_dim}: {} bytes", saved.bytes());
        let inputs = 2 * 2 * (2 + 1) * 1420 * head_dim;
        // The remainder of 23 pieces of 64 rows, 2 bytes each, for 2 heads, does not count; nor do the oldest blocks.
        assert!(saved.bytes() * 8 <= inputs + 8 * 2 * 23 * (64 * 2 + 4));
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn tokens_at_a_stride() {
    let queue = queue();
    for (head_dim, gap) in [(64, 8), (24, 40), (128, 16)] {
        let problem = exact(&[70, 133], (4, 2), head_dim, 1.0);
        let spec = StickBreakingSpec::new(with_gaps(&problem.layout, gap));
        check::<bf16>(&queue, &spec, &problem);
        check::<f32>(&queue, &spec, &problem);
        check::<f32>(&queue, &StickBreakingSpec::new(with_gaps(&problem.layout, 3)), &problem);
    }
}

/// Scores that are all large, all small, alternate, or are spread wide: one dimension of q and k makes them.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn saturated_scores() {
    let queue = queue();
    let mut state = 1u32;
    let mut uniform = |low: f64, high: f64| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f64::from(bf16::from_f64(low + (high - low) * f64::from(state >> 8) / f64::from(1 << 24)))
    };
    for head_dim in [32, 64, 128, 256] {
        for case in 0..5 {
            let mut problem = exact(&[301], (1, 1), head_dim, 0.125);
            for token in 0..301 {
                problem.q[token * head_dim] = 1.0;
                problem.k[token * head_dim] = match case {
                    0 => uniform(15.0, 30.0),
                    1 => uniform(-30.0, -15.0),
                    2 => [16.0, -16.0][token % 2],
                    3 => uniform(-20.0, 20.0),
                    _ => uniform(-8.0, -4.0),
                };
            }
            let spec = StickBreakingSpec { scale: 1.0, ..StickBreakingSpec::new(problem.layout) };
            check::<bf16>(&queue, &spec, &problem);
        }
        // Scores beyond anything: whatever happens, happens in range.
        let problem = exact(&[301], (1, 1), head_dim, 300.0);
        let found = run::<bf16>(&queue, &StickBreakingSpec::new(problem.layout), &problem, true);
        assert!(found.tensors.iter().flatten().all(|x| x.is_finite()));
        assert!(found.log2_rem.iter().all(|x| x.is_finite()));
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn scales_and_zero_gradients() {
    let queue = queue();
    let problem = exact(&[200], (2, 2), 64, 1.0);
    for scale in [-0.3, 1.0 / 64.0] {
        check::<bf16>(&queue, &StickBreakingSpec { scale, ..StickBreakingSpec::new(problem.layout) }, &problem);
    }
    let spec = StickBreakingSpec { scale: 0.0, ..StickBreakingSpec::new(problem.layout) };
    let found = run::<bf16>(&queue, &spec, &problem, true);
    assert!(found.tensors[1].iter().chain(&found.tensors[2]).all(|&x| f64::from(x) == 0.0));
    let spec = StickBreakingSpec::new(problem.layout);
    let mut zero = problem.clone();
    zero.d_rem.fill(0.0);
    check::<bf16>(&queue, &spec, &zero);
    assert!(run::<bf16>(&queue, &spec, &zero, true).same_bits(&run::<bf16>(&queue, &spec, &zero, false)));
    let mut zero = problem;
    zero.d_o.fill(0.0);
    let found = run::<bf16>(&queue, &spec, &zero, true);
    assert!(found.tensors[3].iter().all(|&x| f64::from(x) == 0.0));
    check::<bf16>(&queue, &spec, &zero);
}

/// What is left out is below the bound of the module's documentation.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn early_exit_keeps_its_bound() {
    let queue = queue();
    for (lengths, heads, head_dim) in [
        (&[1000, 130, 0, 700][..], (2, 2), 64),
        (&[900, 333], (4, 2), 128),
        (&[600], (2, 1), 256),
        (&[513], (2, 1), 24),
    ] {
        let problem = exact(lengths, heads, head_dim, 1.0);
        let all = StickBreakingSpec::new(problem.layout);
        let out = reference::forward(&all, &problem.inputs()).unwrap();
        let gradients = reference::backward(&all, &problem.inputs(), &problem.d_o, Some(&problem.d_rem)).unwrap();
        // Sum of A |v|: each weight is rounded to bf16 before its product, and the sum once more.
        let mut absolute = problem.clone();
        absolute.v.iter_mut().for_each(|v| *v = v.abs());
        let terms = reference::forward(&all, &absolute.inputs()).unwrap().o;
        let rounding = (-8f64).exp2();
        for bits in [6, 12, 20] {
            let spec = StickBreakingSpec { early_exit_bits: bits, ..all };
            let found = run::<bf16>(&queue, &spec, &problem, true);
            let (visited, causal) = found.saved.visited_tiles(&queue).unwrap();
            assert!(visited.iter().all(|&count| count > 0 && count < causal * 3 / 4), "{visited:?} of {causal}");
            let bound = (-f64::from(bits)).exp2();
            let largest = |values: &[f64]| values.iter().fold(0.0f64, |m, x| m.max(x.abs()));
            let v = largest(&problem.v);
            for ((found, expected), terms) in wide(&found.tensors[0]).iter().zip(&out.o).zip(&terms) {
                let allowed = bound * v + rounding * (expected.abs() + terms) + 1e-5;
                assert!((found - expected).abs() <= allowed, "{bits} bits: {found} {expected}, {allowed} allowed");
            }
            for (&found, expected) in found.rem.iter().zip(&out.rem) {
                assert!((f64::from(found) - expected).abs() <= bound + 1e-5);
            }
            if bits == 20 {
                let expected = [&gradients.dq, &gradients.dk, &gradients.dv];
                for (what, (found, expected)) in ["dq", "dk", "dv"].iter().zip(found.tensors[1..].iter().zip(expected))
                {
                    let what = format!("{what} after an early exit, {lengths:?} {heads:?} {head_dim}");
                    assert_close(&what, &wide(found), expected, head_dim, 4e-3, 2e-2);
                }
            }
        }
    }
    // Sticks that never break are visited to the end.
    let mut problem = exact(&[400], (1, 1), 64, 0.125);
    for token in 0..400 {
        (problem.q[token * 64], problem.k[token * 64]) = (8.0, -8.0);
    }
    let spec = StickBreakingSpec { early_exit_bits: 20, ..StickBreakingSpec::new(problem.layout) };
    let (visited, causal) = run::<bf16>(&queue, &spec, &problem, true).saved.visited_tiles(&queue).unwrap();
    assert_eq!(visited, [causal]);
    check::<bf16>(&queue, &spec, &problem);
}

/// Errors at the sizes that other implementations are compared at; they do not grow with the scores.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn errors_stay_flat_as_scores_grow() {
    let queue = queue();
    for head_dim in [64, 128] {
        for spread in [1.0, 4.0] {
            let problem = exact(&[2048], (1, 1), head_dim, spread);
            let spec = StickBreakingSpec::new(problem.layout);
            let found = run::<bf16>(&queue, &spec, &problem, true);
            let out = reference::forward(&spec, &problem.inputs()).unwrap();
            let gradients = reference::backward(&spec, &problem.inputs(), &problem.d_o, Some(&problem.d_rem)).unwrap();
            let expected = [out.o, gradients.dq, gradients.dk, gradients.dv];
            let found =
                std::array::from_fn::<_, 4, _>(|i| errors(&wide(&found.tensors[i]), &expected[i], head_dim).tensor);
            println!("head dim {head_dim}, spread {spread}: o, dq, dk, dv {found:?}");
            assert!(found.iter().zip([3.2e-3, 4e-3, 4e-3, 2.8e-3]).all(|(&found, limit)| found <= limit), "{found:?}");
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn the_same_launch_gives_the_same_bits_and_documents_do_not_leak() {
    let queue = queue();
    for bits in [0, 16] {
        let problem = exact(&[530, 1, 297], (4, 2), 64, 1.0);
        let spec = StickBreakingSpec { early_exit_bits: bits, ..StickBreakingSpec::new(problem.layout) };
        let one = run::<bf16>(&queue, &spec, &problem, true);
        for _ in 0..3 {
            let two = run::<bf16>(&queue, &spec, &problem, true);
            assert!(one.same_bits(&two), "{bits} bits: {:?}", one.differences(&two));
        }
        let mut other = problem.clone();
        other.k[..530 * 128].fill(f64::NAN);
        other.v[..530 * 128].fill(f64::NAN);
        other.q[..530 * 256].fill(f64::NAN);
        let two = run_with_nan(&queue, &spec, &other);
        for (a, b) in one.tensors.iter().zip(&two) {
            let from = a.len() / 828 * 530;
            assert!(same_bits(&a[from..], &b[from..]));
            // And what is not a number in a document shows in it.
            assert!(b[a.len() / 828..from].iter().any(|x| x.is_nan()));
        }
        let exact = run::<f32>(&queue, &spec, &problem, true);
        assert!(exact.same_bits(&run::<f32>(&queue, &spec, &problem, true)));
    }
}

/// o and the gradients of a problem that is partly not a number.
fn run_with_nan(queue: &Queue, spec: &StickBreakingSpec, problem: &Problem<f64>) -> [Vec<bf16>; 4] {
    let layout = &spec.layout;
    let up = |values: &[f64], width| upload::<bf16>(queue, values, width, width);
    let (width, kv_width) = (layout.query_stride, layout.key_stride);
    let (q, k, v) = (up(&problem.q, width), up(&problem.k, kv_width), up(&problem.v, kv_width));
    let (d_o, drem) = (up(&problem.d_o, width), upload::<f32>(queue, &problem.d_rem, 1, 1));
    let mut outputs = [width, width, kv_width, kv_width].map(|w| poisoned::<bf16>(queue, layout.tokens * w));
    let plan = Plan::with_kernels(queue, spec, &problem.cu_seqlens, DeviceType::Bf16, Kernels::Portable).unwrap();
    let [o, dq, dk, dv] = &mut outputs;
    let (q, k, v) = (q.as_ref(), k.as_ref(), v.as_ref());
    let saved = plan.forward(queue, q, k, v, &mut o.as_mut(), None, None, true).unwrap().unwrap();
    let (mut dq, mut dk, mut dv) = (dq.as_mut(), dk.as_mut(), dv.as_mut());
    plan.backward(queue, q, k, v, d_o.as_ref(), Some(drem.as_ref()), &saved, &mut dq, &mut dk, &mut dv).unwrap();
    outputs.map(|memory| download(queue, &memory))
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn wrong_calls_are_refused() {
    let queue = queue();
    let plan = |layout: AttentionLayout, cu_seqlens: &[i32], dtype| {
        Plan::new(&queue, &StickBreakingSpec::new(layout), cu_seqlens, dtype).unwrap_err().to_string()
    };
    let good = AttentionLayout::contiguous(4, 2, 1, 16);
    assert!(plan(good, &[0, 5], DeviceType::Bf16).contains("cu_seqlens[1] = 5"));
    assert!(plan(AttentionLayout::contiguous(4, 2, 1, 20), &[0, 4], DeviceType::Bf16).contains("head_dim"));
    assert!(plan(AttentionLayout::contiguous(4, 2, 1, 257), &[0, 4], DeviceType::F32).contains("head_dim"));
    assert!(plan(AttentionLayout { query_stride: 36, ..good }, &[0, 4], DeviceType::Bf16).contains("query_stride"));
    assert!(plan(good, &[0, 4], DeviceType::U32).contains("f32 or bf16"));
    let spec = StickBreakingSpec::new(good);
    let plan = Plan::new(&queue, &spec, &[0, 4], DeviceType::Bf16).unwrap();
    let [q, short, mut o, mut dq] = [128, 63, 128, 128].map(|len| poisoned::<bf16>(&queue, len));
    let (k, other, mut rem) = (poisoned::<bf16>(&queue, 64), poisoned::<f32>(&queue, 64), poisoned::<f32>(&queue, 7));
    for (k, v, message) in [(&short, &k, "k has 63 elements"), (&k, &other, "bf16 for v")] {
        let refused = plan.forward(&queue, q.as_ref(), k.as_ref(), v.as_ref(), &mut o.as_mut(), None, None, false);
        assert!(refused.unwrap_err().to_string().contains(message));
    }
    let (q, k) = (q.as_ref(), k.as_ref());
    let refused = plan.forward(&queue, q, k, k, &mut o.as_mut(), Some(&mut rem.as_mut()), None, false);
    assert!(refused.unwrap_err().to_string().contains("rem has 7 elements"));
    // The state of another spec.
    let other = StickBreakingSpec { early_exit_bits: 20, ..spec };
    let other = Plan::new(&queue, &other, &[0, 4], DeviceType::Bf16).unwrap();
    let saved = other.forward(&queue, q, k, k, &mut o.as_mut(), None, None, true).unwrap().unwrap();
    let [mut dk, mut dv] = [64, 64].map(|len| poisoned::<bf16>(&queue, len));
    let (mut dq, mut dk, mut dv) = (dq.as_mut(), dk.as_mut(), dv.as_mut());
    let refused = plan.backward(&queue, q, k, k, q, None, &saved, &mut dq, &mut dk, &mut dv);
    assert!(refused.unwrap_err().to_string().contains("saved"));
}
