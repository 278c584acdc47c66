//! Float32 stick-breaking attention on a GPU against the dense float64 reference.

#[path = "../../tests/attention_support/mod.rs"]
mod attention_support;
#[path = "../../tests/cuda_support/mod.rs"]
mod cuda_support;

use attention_support::{Problem, assert_close, errors};
use cuda_support::{download, exact, poisoned, queue, same_bits, upload, wide, with_gaps, without_gaps};

use super::{Kind, Plan};
use crate::attention::documents;
use crate::attention::stick_breaking::{StickBreakingSpec, reference};
use crate::cuda::Queue;

/// o, rem, log2_rem, dq, dk, dv without gaps, and the first key tiles.
struct Run {
    outputs: [Vec<f32>; 6],
    visited: (Vec<u64>, u64),
}

const NAMES: [&str; 6] = ["o", "rem", "log2_rem", "dq", "dk", "dv"];

/// `most_pairs`: the chunk size of the backward pass, if not the usual one.
fn run(queue: &Queue, spec: &StickBreakingSpec, problem: &Problem<f64>, most_pairs: Option<usize>) -> Run {
    let layout = &spec.layout;
    let (width, kv_width) = (layout.query_heads * layout.head_dim, layout.kv_heads * layout.head_dim);
    let rows = layout.tokens * layout.query_heads;
    let q = upload::<f32>(queue, &problem.q, width, layout.query_stride);
    let k = upload::<f32>(queue, &problem.k, kv_width, layout.key_stride);
    let v = upload::<f32>(queue, &problem.v, kv_width, layout.value_stride);
    let d_o = upload::<f32>(queue, &problem.d_o, width, layout.output_stride);
    let d_rem = upload::<f32>(queue, &problem.d_rem, 1, 1);
    let documents = documents("test", &problem.cu_seqlens, layout.tokens).unwrap();
    let mut plan = Plan::new(queue, "test", Kind::StickBreaking, layout, &documents).unwrap();
    if let Some(most) = most_pairs {
        let (list, chunks) = super::cut(&documents, plan.tile, most);
        (plan.list, plan.chunks) = (queue.upload(&list).unwrap(), chunks);
    }
    let mut o = poisoned::<f32>(queue, layout.tokens * layout.output_stride);
    let [mut rem, mut log2_rem] = [rows, rows].map(|len| poisoned::<f32>(queue, len));
    let [mut dq, mut dk, mut dv] = [rows * layout.head_dim, layout.tokens * kv_width, layout.tokens * kv_width]
        .map(|len| poisoned::<f32>(queue, len));
    let mut first = queue.upload(&vec![u32::MAX; plan.query_tiles() * layout.query_heads]).unwrap();
    let inputs = [q.as_ref(), k.as_ref(), v.as_ref()];
    let early = spec.early_exit_bits > 0;
    plan.stick_breaking_forward(
        queue,
        spec,
        inputs,
        &mut o.as_mut(),
        Some(&mut rem.as_mut()),
        Some(&mut log2_rem.as_mut()),
        early.then_some(&mut first.as_mut()),
    )
    .unwrap();
    plan.stick_breaking_backward(
        queue,
        spec,
        inputs,
        d_o.as_ref(),
        Some(d_rem.as_ref()),
        early.then_some(first.as_ref()),
        [dq.as_mut(), dk.as_mut(), dv.as_mut()],
    )
    .unwrap();
    let first = if early { queue.download::<u32>(first.as_ref()).unwrap() } else { Vec::new() };
    let o = without_gaps(&download::<f32>(queue, &o), width, layout.output_stride);
    let [rem, log2_rem, dq, dk, dv] = [&rem, &log2_rem, &dq, &dk, &dv].map(|memory| download::<f32>(queue, memory));
    Run {
        outputs: [o, rem, log2_rem, dq, dk, dv],
        visited: plan.visited_tiles(&documents, spec.attend_current, &first),
    }
}

fn check_run(queue: &Queue, spec: &StickBreakingSpec, problem: &Problem<f64>, most_pairs: Option<usize>) {
    let found = run(queue, spec, problem, most_pairs);
    let dense = StickBreakingSpec { layout: problem.layout, ..*spec };
    let out = reference::forward(&dense, &problem.inputs()).unwrap();
    let gradients = reference::backward(&dense, &problem.inputs(), &problem.d_o, Some(&problem.d_rem)).unwrap();
    let expected = [out.o, out.rem, out.log2_rem, gradients.dq, gradients.dk, gradients.dv];
    for (index, what) in NAMES.iter().enumerate() {
        let width = if (1..3).contains(&index) { 1 } else { spec.layout.head_dim };
        let name = format!("{what} of {spec:?}");
        assert_close(&name, &wide(&found.outputs[index]), &expected[index], width, 2e-5, 1e-4);
    }
}

fn check(queue: &Queue, spec: StickBreakingSpec, problem: &Problem<f64>) {
    for attend_current in [false, true] {
        check_run(queue, &StickBreakingSpec { attend_current, ..spec }, problem, None);
    }
}

fn check_shape(queue: &Queue, lengths: &[usize], heads: (usize, usize), head_dim: usize) {
    let problem = exact(lengths, heads, head_dim, 1.0);
    check(queue, StickBreakingSpec::new(problem.layout), &problem);
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn lengths_around_tile_edges() {
    let queue = queue();
    for tokens in [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300] {
        check_shape(&queue, &[tokens], (2, 2), 64);
        check_shape(&queue, &[tokens], (1, 1), 128);
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn every_head_dim() {
    let queue = queue();
    for head_dim in [1, 2, 5, 16, 24, 31, 32, 33, 64, 65, 80, 100, 128, 129, 200, 255, 256] {
        check_shape(&queue, &[130], (2, 1), head_dim);
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn packed_documents_and_groups() {
    let queue = queue();
    for head_dim in [5, 16, 64, 128] {
        check_shape(&queue, &[0, 3, 0, 0, 120, 65, 1, 0], (2, 1), head_dim);
        check_shape(&queue, &[140, 40], (8, 2), head_dim);
        check_shape(&queue, &[40, 101], (4, 1), head_dim);
    }
    check_shape(&queue, &[], (2, 1), 16);
    check_shape(&queue, &[0, 0], (2, 1), 16);
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn tokens_at_a_stride() {
    let queue = queue();
    for (head_dim, gap) in [(64, 8), (64, 3), (24, 4), (7, 1)] {
        let problem = exact(&[70, 133], (4, 2), head_dim, 1.0);
        check(&queue, StickBreakingSpec::new(with_gaps(&problem.layout, gap)), &problem);
    }
}

/// Long inputs are taken in chunks of query tiles, each of which adds to dk and dv.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn chunks_of_the_backward_pass() {
    let queue = queue();
    let problem = exact(&[330, 0, 70, 200], (4, 2), 64, 1.0);
    for attend_current in [false, true] {
        let spec = StickBreakingSpec { attend_current, ..StickBreakingSpec::new(problem.layout) };
        for most_pairs in [1, 7] {
            check_run(&queue, &spec, &problem, Some(most_pairs));
        }
    }
}

/// Logits by key: q = e_0, k_0 = the logit.
fn with_logits(tokens: usize, logit: impl Fn(usize) -> f64) -> (StickBreakingSpec, Problem<f64>) {
    let mut problem = exact(&[tokens], (1, 1), 16, 0.02);
    for token in 0..tokens {
        problem.q[token * 16] = 1.0;
        problem.k[token * 16] = logit(token);
    }
    let spec = StickBreakingSpec { scale: 1.0, ..StickBreakingSpec::new(problem.layout) };
    (spec, problem)
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn saturated_logits() {
    let queue = queue();
    for logit in [
        (|_| 30.0) as fn(usize) -> f64,
        |_| -30.0,
        |key| if key % 2 == 0 { 16.0 } else { -16.0 },
        |key| -6.0 + (key % 5) as f64,
        |key| 15.0 + (key % 16) as f64,
        |key| -15.0 - (key % 16) as f64,
    ] {
        let (spec, problem) = with_logits(200, logit);
        check(&queue, spec, &problem);
    }
    let (spec, problem) = with_logits(120, |key| if key % 3 == 0 { 300.0 } else { -300.0 });
    let found = run(&queue, &spec, &problem, None);
    assert!(found.outputs.iter().flatten().all(|x| x.is_finite()));
    assert!(found.outputs[2][100] < -10_000.0);
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn early_exit_stays_within_its_bound_and_visits_less() {
    let queue = queue();
    let problem = exact(&[700, 90], (2, 1), 64, 1.0);
    let full = StickBreakingSpec::new(problem.layout);
    let all = run(&queue, &full, &problem, None);
    // 11 * 12 / 2 tiles of 64 x 64 in the long document, 3 in the short one.
    assert_eq!(all.visited, (vec![69, 69], 69));
    let norm = |row: &[f64]| row.iter().map(|x| x * x).sum::<f64>().sqrt();
    let max_v = problem.v.chunks(64).map(norm).fold(0.0, f64::max);
    for bits in [10, 20] {
        let found = run(&queue, &StickBreakingSpec { early_exit_bits: bits, ..full }, &problem, None);
        assert!(found.visited.0.iter().all(|&visited| visited < 40), "{:?}", found.visited);
        let bound = (-f64::from(bits)).exp2();
        for (found, all) in found.outputs[0].chunks(64).zip(all.outputs[0].chunks(64)) {
            let error: Vec<f64> = found.iter().zip(all).map(|(x, y)| f64::from(x - y)).collect();
            assert!(norm(&error) <= bound * max_v + 1e-5);
        }
        for index in [3, 4, 5] {
            let close = errors(&wide(&found.outputs[index]), &wide(&all.outputs[index]), 64);
            assert!(close.tensor < 4.0 * bound + 1e-5, "{} at {bits} bits: {close:?}", NAMES[index]);
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn the_same_launch_gives_the_same_bits() {
    let queue = queue();
    let problem = exact(&[230, 1, 97], (4, 2), 64, 1.0);
    let spec = StickBreakingSpec { early_exit_bits: 12, ..StickBreakingSpec::new(problem.layout) };
    let one = run(&queue, &spec, &problem, None);
    for _ in 0..3 {
        let two = run(&queue, &spec, &problem, None);
        assert!(one.outputs.iter().zip(&two.outputs).all(|(a, b)| same_bits(a, b)));
        assert_eq!(one.visited, two.visited);
    }
}
