//! Decoding against the last row of a forward pass, and the composition rule.

mod attention_support;

use attention_support::{Problem, assert_close, to_f64};
use proptest::prelude::*;
use stickbreak_kernels::Float;
use stickbreak_kernels::attention::decode::{DecodeInputs, DecodeLayout};
use stickbreak_kernels::attention::softmax::decode::SoftmaxDecodeSpec;
use stickbreak_kernels::attention::softmax::{self, SoftmaxSpec, alibi_slopes};
use stickbreak_kernels::attention::stick_breaking::decode::{StickBreakingDecodeSpec, compose, decode};
use stickbreak_kernels::attention::stick_breaking::{StickBreakingSpec, reference};

/// One query per document, the last one's, and a cache that holds the document.
struct Step<T> {
    layout: DecodeLayout,
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
}

fn last_step<T: Float>(problem: &Problem<T>, capacity: usize) -> Step<T> {
    let from = problem.layout;
    let (query_width, kv_width) = (from.query_heads * from.head_dim, from.kv_heads * from.head_dim);
    let sequences = problem.cu_seqlens.len() - 1;
    let layout = DecodeLayout::contiguous(sequences, capacity, from.query_heads, from.kv_heads, from.head_dim);
    let mut step = Step {
        layout,
        q: Vec::new(),
        // What lies in the cache behind a sequence must not matter.
        k: vec![T::from_f64(f64::NAN); sequences * capacity * kv_width],
        v: vec![T::from_f64(f64::NAN); sequences * capacity * kv_width],
    };
    for (sequence, range) in problem.cu_seqlens.windows(2).enumerate() {
        let (start, end) = (range[0] as usize, range[1] as usize);
        step.q.extend_from_slice(&problem.q[(end - 1) * query_width..end * query_width]);
        let at = sequence * capacity * kv_width;
        let length = (end - start) * kv_width;
        step.k[at..at + length].copy_from_slice(&problem.k[start * kv_width..end * kv_width]);
        step.v[at..at + length].copy_from_slice(&problem.v[start * kv_width..end * kv_width]);
    }
    step
}

fn last_rows(rows: &[f64], cu_seqlens: &[i32], width: usize) -> Vec<f64> {
    cu_seqlens[1..].iter().flat_map(|&end| rows[(end as usize - 1) * width..][..width].to_vec()).collect()
}

fn check_stick_breaking<T: Float>(lengths: &[usize], heads: (usize, usize), head_dim: usize, tolerance: f64) {
    let problem = Problem::<T>::random(lengths, heads.0, heads.1, head_dim, 1.0);
    let step = last_step(&problem, lengths.iter().max().unwrap() + 3);
    for attend_current in [false, true] {
        let spec = StickBreakingSpec { attend_current, ..StickBreakingSpec::new(problem.layout) };
        let dense = reference::forward(&spec, &problem.to_f64().inputs()).unwrap();
        let visible: Vec<i32> = lengths.iter().map(|&length| length as i32 - i32::from(!attend_current)).collect();
        let inputs = DecodeInputs { q: &step.q, k: &step.k, v: &step.v, lengths: &visible };
        let nan = T::from_f64(f64::NAN);
        let (mut o, mut rem) = (vec![nan; step.q.len()], vec![nan; lengths.len() * heads.0]);
        for early_exit_bits in [0, 40] {
            let spec = StickBreakingDecodeSpec { early_exit_bits, ..StickBreakingDecodeSpec::new(step.layout) };
            decode(&spec, &inputs, &mut o, &mut rem).unwrap();
            let expected = last_rows(&dense.o, &problem.cu_seqlens, heads.0 * head_dim);
            assert_close("o", &o, &expected, head_dim, tolerance, 5.0 * tolerance);
            let expected = last_rows(&dense.rem, &problem.cu_seqlens, heads.0);
            assert_close("rem", &rem, &expected, 1, tolerance.max(1e-11), 5.0 * tolerance.max(1e-11));
        }
    }
}

#[test]
fn stick_breaking_decode_is_the_last_row_of_the_forward_pass() {
    check_stick_breaking::<f64>(&[1, 2, 97, 300], (4, 2), 20, 1e-11);
    check_stick_breaking::<f32>(&[1, 96, 130], (4, 1), 64, 2e-6);
    // More than one piece.
    check_stick_breaking::<f32>(&[2500], (1, 1), 8, 2e-6);
}

#[test]
fn softmax_decode_is_the_last_row_of_the_forward_pass() {
    for (lengths, heads, head_dim) in [(&[1usize, 2, 97, 300][..], (4, 2), 20), (&[2500], (1, 1), 8)] {
        let problem = Problem::<f32>::random(lengths, heads.0, heads.1, head_dim, 1.0);
        let step = last_step(&problem, lengths.iter().max().unwrap() + 3);
        for alibi in [None, Some(alibi_slopes(heads.0))] {
            let spec = SoftmaxSpec { alibi: alibi.clone(), ..SoftmaxSpec::new(problem.layout) };
            let dense = softmax::reference::forward(&spec, &problem.to_f64().inputs()).unwrap();
            let lengths: Vec<i32> = lengths.iter().map(|&length| length as i32).collect();
            let inputs = DecodeInputs { q: &step.q, k: &step.k, v: &step.v, lengths: &lengths };
            let mut o = vec![f32::NAN; step.q.len()];
            let spec = SoftmaxDecodeSpec { alibi, ..SoftmaxDecodeSpec::new(step.layout) };
            softmax::decode::decode(&spec, &inputs, &mut o).unwrap();
            let expected = last_rows(&dense.o, &problem.cu_seqlens, heads.0 * head_dim);
            assert_close("o", &o, &expected, head_dim, 2e-6, 1e-5);
        }
    }
}

#[test]
fn lengths_are_checked() {
    let layout = DecodeLayout::contiguous(2, 4, 1, 1, 2);
    let (q, cache) = (vec![0.0f32; 4], vec![0.0f32; 16]);
    let (mut o, mut rem) = (vec![1.0f32; 4], vec![0.0f32; 2]);
    let spec = StickBreakingDecodeSpec::new(layout);
    let inputs = DecodeInputs { q: &q, k: &cache, v: &cache, lengths: &[0, 5] };
    let error = decode(&spec, &inputs, &mut o, &mut rem).unwrap_err().to_string();
    assert_eq!(error, "stick-breaking attention, decode: lengths[1] = 5, but it must be between 0 and the capacity, 4");
    // No keys: nothing is attended to and the stick is whole.
    decode(&spec, &DecodeInputs { lengths: &[0, 0], ..inputs }, &mut o, &mut rem).unwrap();
    assert_eq!((o, rem), (vec![0.0; 4], vec![1.0; 2]));
    assert!(decode(&spec, &DecodeInputs { k: &cache[1..], ..inputs }, &mut [0.0; 4], &mut [0.0; 2]).is_err());
}

/// The composed result of pieces of one sequence's cache, oldest piece first in `cuts`.
fn in_pieces(problem: &Problem<f64>, cuts: &[usize]) -> Vec<(Vec<f64>, Vec<f64>)> {
    let layout = problem.layout;
    let width = layout.kv_heads * layout.head_dim;
    cuts.windows(2)
        .map(|cut| {
            let (start, end) = (cut[0], cut[1]);
            let layout = DecodeLayout::contiguous(1, end - start, layout.query_heads, layout.kv_heads, layout.head_dim);
            let query_width = layout.query_heads * layout.head_dim;
            let lengths = [(end - start) as i32];
            let inputs = DecodeInputs {
                q: &problem.q[problem.q.len() - query_width..],
                k: &problem.k[start * width..end * width],
                v: &problem.v[start * width..end * width],
                lengths: &lengths,
            };
            let (mut o, mut rem) = (vec![0.0; query_width], vec![0.0; layout.query_heads]);
            decode(&StickBreakingDecodeSpec::new(layout), &inputs, &mut o, &mut rem).unwrap();
            (o, rem)
        })
        .collect()
}

fn join(nearer: &(Vec<f64>, Vec<f64>), farther: &(Vec<f64>, Vec<f64>)) -> (Vec<f64>, Vec<f64>) {
    let (mut o, mut rem) = nearer.clone();
    compose((&mut o, &mut rem), (&farther.0, &farther.1)).unwrap();
    (o, rem)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn composition_is_associative_and_gives_the_whole(first in 0usize..60, second in 0usize..60, third in 0usize..60) {
        let length = first + second + third;
        let problem = Problem::<f64>::random(&[length.max(1)], 2, 1, 5, 1.0);
        let pieces = in_pieces(&problem, &[0, first, first + second, length]);
        let whole = &in_pieces(&problem, &[0, length])[0];
        let left = join(&join(&pieces[2], &pieces[1]), &pieces[0]);
        let right = join(&pieces[2], &join(&pieces[1], &pieces[0]));
        for (found, expected) in [(&left, whole), (&right, whole), (&left, &right)] {
            assert_close("o", &found.0, &to_f64(&expected.0), 5, 1e-13, 1e-13);
            assert_close("rem", &found.1, &to_f64(&expected.1), 1, 1e-13, 1e-13);
        }
    }
}
