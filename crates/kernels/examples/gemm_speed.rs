//! Speed of the CPU matrix product on a large square and on the shapes of training, in GFLOP/s of float32, and of the
//! memory-bound kernels, in GB/s of what they must read and write.
//!
//! `cargo run --release -p stickbreak-kernels --example gemm_speed`; `RAYON_NUM_THREADS` sets the threads.

use std::time::Instant;

use stickbreak_kernels::adamw::{self, AdamW};
use stickbreak_kernels::elementwise::cpu::{binary, unary};
use stickbreak_kernels::elementwise::{BinaryOp, Strided, UnaryOp};
use stickbreak_kernels::matmul::cpu::matmul;
use stickbreak_kernels::matmul::{MatmulSpec, MatrixStrides};
use stickbreak_kernels::reduce::Reduction;
use stickbreak_kernels::reduce::cpu::{reduce, sum_of_squares};
use stickbreak_kernels::rms_norm::{self, RmsNormSpec};
use stickbreak_kernels::rope::{self, RopeSpec};
use stickbreak_kernels::swiglu;

/// Seconds of one call: the best of repetitions for about a third of a second, which other work on the machine
/// disturbs least, after one call to warm up.
fn seconds(mut body: impl FnMut()) -> f64 {
    body();
    let start = Instant::now();
    let mut best = f64::INFINITY;
    let mut repetitions = 0;
    while repetitions < 5 || start.elapsed().as_secs_f64() < 0.3 {
        let start = Instant::now();
        body();
        best = best.min(start.elapsed().as_secs_f64());
        repetitions += 1;
    }
    best
}

fn numbers(length: usize) -> Vec<f32> {
    (0..length).map(|i| (i * 7919 % 1009) as f32 / 504.5 - 1.0).collect()
}

fn product(m: usize, n: usize, k: usize, a_is_transposed: bool, b_is_transposed: bool, beta: f32) -> f64 {
    let side = |transposed, rows, columns| match transposed {
        false => MatrixStrides::row_major(rows, columns),
        true => MatrixStrides::row_major(columns, rows).transposed(),
    };
    let (a, b) = (side(a_is_transposed, m, k), side(b_is_transposed, k, n));
    let spec = MatmulSpec { batch: 1, m, n, k, a, b, c: MatrixStrides::row_major(m, n) };
    let (a, b, mut c) = (numbers(m * k), numbers(k * n), numbers(m * n));
    let time = seconds(|| matmul(&spec, 1.0, &a, &b, beta, &mut c).unwrap());
    2.0 * (m * n * k) as f64 / time / 1e9
}

fn main() {
    println!("{} threads", rayon::current_num_threads());
    println!("2048^3                                    {:6.1} GFLOP/s", product(2048, 2048, 2048, false, false, 0.0));
    println!("tokens   in  out    x W^T (NT)  dy W (NN)  dW += dy^T x (TN)   GFLOP/s");
    for (tokens, input, output) in
        [(4096, 256, 256), (4096, 256, 704), (4096, 704, 256), (4096, 256, 257), (4096, 768, 768), (512, 256, 8192)]
    {
        let forward = product(tokens, output, input, false, true, 0.0);
        let inputs = product(tokens, input, output, false, false, 0.0);
        let weights = product(output, input, tokens, true, false, 1.0);
        println!("{tokens:6} {input:4} {output:4}    {forward:10.1} {inputs:10.1} {weights:18.1}");
    }

    let (rows, width) = (16384, 1024);
    let n = rows * width;
    let (x, y, weight) = (numbers(n), numbers(n), numbers(width));
    let (mut out, mut other, mut rms) = (vec![0f32; n], vec![0f32; n], vec![0f32; rows]);
    fn flat(x: &[f32]) -> Strided<'_, f32> {
        Strided::new(x, &[1])
    }
    let show = |name: &str, arrays: f64, time: f64| {
        println!("{name:24} {:7.2} ms {:6.1} GB/s", time * 1e3, arrays * 4.0 * n as f64 / time / 1e9);
    };
    let strides = [width, 1];
    let view = Strided::new(&x, &strides);
    println!("{rows} x {width}:");
    show("memory: copy_from_slice", 2.0, seconds(|| out.copy_from_slice(&x)));
    show(
        "affine",
        2.0,
        seconds(|| {
            unary(UnaryOp::Affine { scale: 2.0, shift: 1.0 }, &[n], flat(&x), &mut out).unwrap();
        }),
    );
    show("silu", 2.0, seconds(|| unary(UnaryOp::Silu, &[n], flat(&x), &mut out).unwrap()));
    show("add", 3.0, seconds(|| binary(BinaryOp::Add, &[n], flat(&x), flat(&y), &mut out).unwrap()));
    show(
        "add a row",
        2.0,
        seconds(|| {
            let weight = Strided::new(&weight, &[0, 1]);
            binary(BinaryOp::Add, &[rows, width], view, weight, &mut out).unwrap();
        }),
    );
    show("swiglu forward", 3.0, seconds(|| swiglu::cpu::forward(&x, &y, &mut out).unwrap()));
    show(
        "swiglu backward",
        5.0,
        seconds(|| {
            swiglu::cpu::backward(&x, &y, &x, Some(&mut out), Some(&mut other)).unwrap();
        }),
    );
    let spec = RmsNormSpec { rows, width, epsilon: 1e-5 };
    show("rms_norm forward", 2.0, seconds(|| rms_norm::cpu::forward(&spec, &x, &weight, &mut out, &mut rms).unwrap()));
    let mut dweight = vec![0f32; width];
    show(
        "rms_norm backward",
        3.0,
        seconds(|| {
            rms_norm::cpu::backward(&spec, &x, &weight, &rms, &y, Some(&mut out), Some(&mut dweight)).unwrap();
        }),
    );
    show(
        "sum over columns",
        1.0,
        seconds(|| {
            reduce(Reduction::Sum, &[rows, width], view, &[1], &mut rms).unwrap();
        }),
    );
    show(
        "sum over rows",
        1.0,
        seconds(|| {
            reduce(Reduction::Sum, &[rows, width], view, &[0], &mut dweight).unwrap();
        }),
    );
    show(
        "sum of squares",
        1.0,
        seconds(|| {
            std::hint::black_box(sum_of_squares(&x));
        }),
    );
    let positions: Vec<u32> = (0..rows as u32).collect();
    let spec = RopeSpec { tokens: rows, heads: width / 64, head_dim: 64, theta: 1e4 };
    show("rope", 2.0, seconds(|| rope::cpu::rotate(&spec, &positions, false, &x, &mut out).unwrap()));
    let spec = AdamW {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        step: 10,
        grad_scale: 1.0,
    };
    let mut second = vec![1f32; n];
    show("adamw", 7.0, seconds(|| adamw::cpu::step(&spec, &mut out, &y, &mut other, &mut second).unwrap()));
}
