//! Attention, forward and backward, q and k and v from N(0, 1), so that logits are, too. The counting rule is everybody's:
//! forward 4 B H D L^2 / 2 flops, backward 2.5 forwards.

use super::{Row, Settings, random, time};
use anyhow::Result;
use stickbreak_model::count::attention_forward_flops;
use stickbreak_tensor::ops::attention::{
    SoftmaxSettings, StickBreakingSettings, StickBreakingWanted, softmax, softmax_backward, stick_breaking,
    stick_breaking_backward,
};
use stickbreak_tensor::{Device, Tensor};

/// Batch, heads, length, head size.
const CPU_SHAPES: [[usize; 4]; 3] = [[1, 8, 2048, 64], [1, 4, 512, 64], [1, 8, 4096, 128]];
/// Those that other kernels' figures are given for.
const GPU_SHAPES: [[usize; 4]; 10] = [
    [4, 12, 4096, 128],
    [4, 12, 16384, 128],
    [16, 16, 2048, 128],
    [8, 16, 4096, 128],
    [2, 16, 16384, 128],
    [16, 16, 2048, 64],
    [8, 16, 4096, 64],
    [2, 16, 16384, 64],
    [4, 32, 4096, 64],
    [1, 32, 65536, 64],
];

const TRAINING: StickBreakingWanted = StickBreakingWanted { log2_rem: false, backward: true };
const INFERENCE: StickBreakingWanted = StickBreakingWanted { log2_rem: false, backward: false };

/// Inputs and output gradient of one shape.
struct Problem {
    qkv: [Tensor; 3],
    output_gradient: Tensor,
    offsets: Vec<i32>,
    scale: f64,
    shape: String,
    forward_flops: f64,
}

impl Problem {
    fn new(settings: &Settings, [batch, heads, length, d]: [usize; 4]) -> Result<Self> {
        let random = |seed| random(settings, [batch * length, heads, d], seed);
        Ok(Self {
            qkv: [random(1)?, random(2)?, random(3)?],
            output_gradient: random(4)?,
            offsets: (0..=batch).map(|i| (i * length) as i32).collect(),
            scale: 1.0 / (d as f64).sqrt(),
            shape: format!("B{batch} H{heads} L{length} D{d}"),
            forward_flops: attention_forward_flops((heads * d) as f64, (batch * length * length) as f64),
        })
    }

    fn row(&self, name: String, seconds: (f64, f64), forwards: f64) -> Row {
        Row::new("attention", name, &self.shape, seconds, forwards * self.forward_flops, None)
    }
}

pub(super) fn measure(settings: &Settings, each: &mut dyn FnMut(Row)) -> Result<()> {
    let shapes = if settings.device == Device::Cpu { &CPU_SHAPES[..] } else { &GPU_SHAPES[..] };
    for &shape in shapes {
        let problem = Problem::new(settings, shape)?;
        measure_stick_breaking(settings, &problem, "stick-breaking dense", 0, each)?;
        if !settings.dense_only {
            measure_stick_breaking(settings, &problem, "stick-breaking early exit (flatters)", 24, each)?;
        }
        measure_softmax(settings, &problem, each)?;
    }
    Ok(())
}

fn measure_stick_breaking(
    settings: &Settings,
    problem: &Problem,
    name: &str,
    early_exit_bits: u32,
    each: &mut dyn FnMut(Row),
) -> Result<()> {
    let Problem { qkv: [q, k, v], output_gradient, offsets, scale, .. } = problem;
    let attention = StickBreakingSettings { scale: *scale, attend_current: false, early_exit_bits };
    let forward = |wanted| stick_breaking(q, k, v, offsets, attention, wanted);
    if settings.device != Device::Cpu {
        let seconds = time(settings, || Ok(forward(INFERENCE).map(drop)?))?;
        each(problem.row(format!("{name}, no grad"), seconds, 1.0));
    }
    let seconds = time(settings, || Ok(forward(TRAINING).map(drop)?))?;
    each(problem.row(format!("{name}, forward"), seconds, 1.0));
    let saved = forward(TRAINING)?.saved;
    let seconds = time(settings, || {
        Ok(stick_breaking_backward(q, k, v, offsets, attention, &saved, output_gradient, None).map(drop)?)
    })?;
    each(problem.row(format!("{name}, backward"), seconds, 2.5));
    Ok(())
}

fn measure_softmax(settings: &Settings, problem: &Problem, each: &mut dyn FnMut(Row)) -> Result<()> {
    let Problem { qkv: [q, k, v], output_gradient, offsets, scale, .. } = problem;
    let attention = SoftmaxSettings { scale: *scale, alibi_slopes: None };
    let forward = || softmax(q, k, v, offsets, &attention);
    let seconds = time(settings, || Ok(forward().map(drop)?))?;
    each(problem.row("softmax, forward".into(), seconds, 1.0));
    let (o, lse) = forward()?;
    let seconds =
        time(
            settings,
            || Ok(softmax_backward([q, k, v], offsets, &attention, (&o, &lse), output_gradient).map(drop)?),
        )?;
    each(problem.row("softmax, backward".into(), seconds, 2.5));
    Ok(())
}
