//! Times stick-breaking attention on the CPU: forward, backward, both (float32, one document, no early exit).
//!
//! `cargo run --release -p stickbreak-kernels --example attention_speed -- [tokens] [query heads] [kv heads] [head dim] [runs]`

use std::time::Instant;

use rand::{RngExt, SeedableRng};
use stickbreak_kernels::attention::stick_breaking::{StickBreakingOutputs, StickBreakingSpec, cpu};
use stickbreak_kernels::attention::{AttentionGradients, AttentionInputs, AttentionLayout};

fn main() {
    let arguments: Vec<usize> = std::env::args().skip(1).map(|text| text.parse().expect("a number")).collect();
    let argument = |index: usize, default: usize| arguments.get(index).copied().unwrap_or(default);
    let (tokens, query_heads) = (argument(0, 2048), argument(1, 8));
    let (kv_heads, head_dim, runs) = (argument(2, query_heads), argument(3, 64), argument(4, 11).max(1));

    let mut generator = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    let mut normal = |count: usize| -> Vec<f32> {
        (0..count).map(|_| (0..12).map(|_| generator.random::<f32>()).sum::<f32>() - 6.0).collect()
    };
    let (q, d_o) = (normal(tokens * query_heads * head_dim), normal(tokens * query_heads * head_dim));
    let (k, v) = (normal(tokens * kv_heads * head_dim), normal(tokens * kv_heads * head_dim));
    let cu_seqlens = [0, tokens as i32];
    let spec = StickBreakingSpec::new(AttentionLayout::contiguous(tokens, query_heads, kv_heads, head_dim));
    let inputs = AttentionInputs { q: &q, k: &k, v: &v, cu_seqlens: &cu_seqlens };
    let (mut o, mut rem) = (vec![0.0f32; q.len()], vec![0.0f32; tokens * query_heads]);
    let (mut dq, mut dk, mut dv) = (o.clone(), vec![0.0f32; k.len()], vec![0.0f32; v.len()]);

    let mut times = vec![[0.0; 3]; runs];
    for [forward, backward, both] in &mut times {
        let start = Instant::now();
        let outputs = StickBreakingOutputs { o: &mut o, rem: Some(&mut rem), log2_rem: None };
        let saved = cpu::forward(&spec, &inputs, outputs).expect("the shapes fit");
        *forward = start.elapsed().as_secs_f64();
        let gradients = AttentionGradients { dq: &mut dq, dk: &mut dk, dv: &mut dv };
        cpu::backward(&spec, &inputs, &d_o, None, &saved, gradients).expect("the shapes fit");
        *both = start.elapsed().as_secs_f64();
        *backward = *both - *forward;
    }
    // Two products of 2 D flops per visible pair forward, five backward.
    let pairs = (tokens * tokens.saturating_sub(1) / 2 * query_heads) as f64;
    for (index, name, products) in [(0, "forward", 2.0), (1, "backward", 5.0), (2, "both", 7.0)] {
        let mut column: Vec<f64> = times.iter().map(|row| row[index]).collect();
        column.sort_by(f64::total_cmp);
        let (least, median) = (column[0], column[runs / 2]);
        let rate = products * 2.0 * head_dim as f64 * pairs / least / 1e9;
        println!("{name:9} least {:8.2} ms, median {:8.2} ms, {rate:6.1} GFLOP/s", least * 1e3, median * 1e3);
    }
}
