//! Float32 stick-breaking attention on a GPU against the dense float64 reference.

mod attention_support;
mod cuda_support;

use attention_support::{Problem, assert_close, errors};
use cuda_support::{download, exact, poisoned, queue, same_bits, upload, wide, with_gaps, without_gaps};

use stickbreak_kernels::attention::AttentionLayout;
use stickbreak_kernels::attention::stick_breaking::cuda::Plan;
use stickbreak_kernels::attention::stick_breaking::{StickBreakingSpec, reference};
use stickbreak_kernels::cuda::{DeviceRef, DeviceType, Queue};

/// o, rem, log2_rem, dq, dk, dv without gaps, and the tiles visited by each head and present in one.
struct Run {
    outputs: [Vec<f32>; 6],
    visited: (Vec<u64>, u64),
}

const NAMES: [&str; 6] = ["o", "rem", "log2_rem", "dq", "dk", "dv"];

fn run(queue: &Queue, spec: &StickBreakingSpec, problem: &Problem<f64>) -> Run {
    let layout = &spec.layout;
    let (width, kv_width) = (layout.query_heads * layout.head_dim, layout.kv_heads * layout.head_dim);
    let q = upload::<f32>(queue, &problem.q, width, layout.query_stride);
    let k = upload::<f32>(queue, &problem.k, kv_width, layout.key_stride);
    let v = upload::<f32>(queue, &problem.v, kv_width, layout.value_stride);
    let d_o = upload::<f32>(queue, &problem.d_o, width, layout.output_stride);
    let d_rem = upload::<f32>(queue, &problem.d_rem, 1, 1);
    let [q, k, v, d_o] = [&q, &k, &v, &d_o].map(|memory| memory.as_ref());
    let mut run = run_on_device(queue, spec, &problem.cu_seqlens, [q, k, v, d_o, d_rem.as_ref()]);
    run.outputs[0] = without_gaps(&run.outputs[0], width, layout.output_stride);
    run
}

/// `inputs`: q, k, v, d_o, drem. The rows of o still have their gaps.
fn run_on_device(queue: &Queue, spec: &StickBreakingSpec, cu_seqlens: &[i32], inputs: [DeviceRef<'_>; 5]) -> Run {
    let layout = &spec.layout;
    let [q, k, v, d_o, d_rem] = inputs;
    let (rows, kv) = (layout.tokens * layout.query_heads, layout.tokens * layout.kv_heads * layout.head_dim);
    let lengths = [layout.tokens * layout.output_stride, rows, rows, rows * layout.head_dim, kv, kv];
    let mut outputs = lengths.map(|len| poisoned::<f32>(queue, len));
    let [o, rem, log2_rem, dq, dk, dv] = outputs.each_mut().map(|memory| memory.as_mut());
    let (mut o, mut rem, mut log2_rem, mut dq, mut dk, mut dv) = (o, rem, log2_rem, dq, dk, dv);
    let plan = Plan::new(queue, spec, cu_seqlens, DeviceType::F32).unwrap();
    let saved = plan.forward(queue, q, k, v, &mut o, Some(&mut rem), Some(&mut log2_rem), true).unwrap().unwrap();
    plan.backward(queue, q, k, v, d_o, Some(d_rem), &saved, &mut dq, &mut dk, &mut dv).unwrap();
    let visited = saved.visited_tiles(queue).unwrap();
    assert_eq!(saved.count_tiles(queue).unwrap().read(queue).unwrap(), visited);
    Run { outputs: outputs.each_ref().map(|memory| download::<f32>(queue, memory)), visited }
}

fn check_run(queue: &Queue, spec: &StickBreakingSpec, problem: &Problem<f64>) {
    let found = run(queue, spec, problem);
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
        check_run(queue, &StickBreakingSpec { attend_current, ..spec }, problem);
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

/// So many heads and tokens that the backward pass takes its query tiles in chunks, each of which adds to dk and dv, against
/// a few of the heads at a time.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn chunks_of_the_backward_pass() {
    let queue = queue();
    let (heads, few, head_dim) = (64, 8, 16);
    let problem = exact(&[9000, 0, 92], (heads, heads), head_dim, 1.0);
    let layout = problem.layout;
    let [q, k, v, d_o] = [&problem.q, &problem.k, &problem.v, &problem.d_o].map(|x| upload::<f32>(&queue, x, 1, 1));
    let d_rem = upload::<f32>(&queue, &problem.d_rem, 1, 1);
    let inputs = [&q, &k, &v, &d_o, &d_rem].map(|memory| memory.as_ref());
    let spec = StickBreakingSpec::new(layout);
    let all = run_on_device(&queue, &spec, &problem.cu_seqlens, inputs);
    let AttentionLayout { query_stride, key_stride, value_stride, output_stride, tokens, .. } = layout;
    for first in [0, 24, 56] {
        let strides = AttentionLayout {
            query_stride,
            key_stride,
            value_stride,
            output_stride,
            ..AttentionLayout::contiguous(tokens, few, few, head_dim)
        };
        let of_heads = |values: &[f32], width: usize| -> Vec<f32> {
            let rows = values.chunks(heads * width);
            rows.flat_map(|row| row[first * width..(first + few) * width].to_vec()).collect()
        };
        let drem: Vec<f64> = problem.d_rem.chunks(heads).flat_map(|row| row[first..first + few].to_vec()).collect();
        let drem = upload::<f32>(&queue, &drem, 1, 1);
        let [q, k, v, d_o, _] = inputs.map(|memory| memory.slice(first * head_dim..memory.len().max(first * head_dim)));
        let part = run_on_device(
            &queue,
            &StickBreakingSpec { layout: strides, ..spec },
            &problem.cu_seqlens,
            [q, k, v, d_o, drem.as_ref()],
        );
        assert!(same_bits(&part.outputs[3], &of_heads(&all.outputs[3], head_dim)), "dq");
        for index in [4, 5] {
            let close = errors(&of_heads(&all.outputs[index], head_dim), &wide(&part.outputs[index]), head_dim);
            assert!(close.tensor < 2e-6 && close.row < 1e-5, "{}: {close:?}", NAMES[index]);
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
    let found = run(&queue, &spec, &problem);
    assert!(found.outputs.iter().flatten().all(|x| x.is_finite()));
    assert!(found.outputs[2][100] < -10_000.0);
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn early_exit_stays_within_its_bound_and_visits_less() {
    let queue = queue();
    let problem = exact(&[700, 90], (2, 1), 64, 1.0);
    let full = StickBreakingSpec::new(problem.layout);
    let all = run(&queue, &full, &problem);
    // 11 * 12 / 2 tiles of 64 x 64 in the long document, 3 in the short one.
    assert_eq!(all.visited, (vec![69, 69], 69));
    let norm = |row: &[f64]| row.iter().map(|x| x * x).sum::<f64>().sqrt();
    let max_v = problem.v.chunks(64).map(norm).fold(0.0, f64::max);
    for bits in [10, 20] {
        let found = run(&queue, &StickBreakingSpec { early_exit_bits: bits, ..full }, &problem);
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
    let one = run(&queue, &spec, &problem);
    for _ in 0..3 {
        let two = run(&queue, &spec, &problem);
        assert!(one.outputs.iter().zip(&two.outputs).all(|(a, b)| same_bits(a, b)));
        assert_eq!(one.visited, two.visited);
    }
}
