//! Attention, forward and backward, q and k and v from N(0, 1), so that logits are, too. The counting rule is everybody's:
//! forward 4 B H D L^2 / 2 flops, backward 2.5 forwards.

use super::peers::Peers;
use super::row::{self, AttentionFigures, Row};
use super::{Seconds, Settings, random, time};
use anyhow::Result;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::AddAssign;
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

/// Sequences of one length, one document each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct AttentionShape {
    pub(super) batch: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) length: usize,
    pub(super) head_dim: usize,
}

impl AttentionShape {
    fn new([batch, heads, length, head_dim]: [usize; 4]) -> Self {
        Self { batch, heads, kv_heads: heads, length, head_dim }
    }

    /// Causal-half flops of a forward pass; a backward pass counts as 2.5 of them.
    pub(super) fn forward_flops(&self) -> f64 {
        attention_forward_flops((self.heads * self.head_dim) as f64, (self.batch * self.length * self.length) as f64)
    }
}

impl fmt::Display for AttentionShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { batch, heads, kv_heads, length, head_dim } = self;
        let heads = row::heads(*heads, *kv_heads);
        write!(f, "B{batch} H{heads} L{length} D{head_dim}")
    }
}

/// Inputs and output gradient of one shape.
pub(super) struct Problem {
    pub(super) qkv: [Tensor; 3],
    pub(super) output_gradient: Tensor,
    pub(super) offsets: Vec<i32>,
    pub(super) scale: f64,
    pub(super) attend_current: bool,
}

impl Problem {
    fn random(settings: &Settings, shape: AttentionShape) -> Result<Self> {
        let AttentionShape { batch, heads, length, head_dim, .. } = shape;
        let random = |seed| random(settings, [batch * length, heads, head_dim], seed);
        Ok(Self {
            qkv: [random(1)?, random(2)?, random(3)?],
            output_gradient: random(4)?,
            offsets: (0..=batch).map(|i| (i * length) as i32).collect(),
            scale: 1.0 / (head_dim as f64).sqrt(),
            attend_current: false,
        })
    }

    fn stick_breaking(&self, early_exit_bits: u32) -> StickBreakingSettings {
        StickBreakingSettings { scale: self.scale, attend_current: self.attend_current, early_exit_bits }
    }

    /// o, dq, dk, dv, and for each head the share of tiles left out.
    pub(super) fn results(&self, early_exit_bits: u32) -> Result<([Tensor; 4], Vec<f64>)> {
        let Self { qkv: [q, k, v], output_gradient, offsets, .. } = self;
        let settings = self.stick_breaking(early_exit_bits);
        let out = stick_breaking(q, k, v, offsets, settings, TRAINING)?;
        let [dq, dk, dv] = stick_breaking_backward(q, k, v, offsets, settings, &out.saved, output_gradient, None)?;
        Ok(([out.o, dq, dk, dv], out.saved.count_tiles()?.skipped()?))
    }
}

/// Times of the passes of one attention.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Passes {
    /// A forward pass that keeps nothing, where that is something else.
    no_grad: Option<Seconds>,
    pub(super) forward: Seconds,
    pub(super) backward: Seconds,
}

impl AddAssign for Passes {
    fn add_assign(&mut self, other: Self) {
        let sum = |a: Seconds, b: Seconds| (a.0 + b.0, a.1 + b.1);
        self.no_grad = other.no_grad.map(|seconds| sum(self.no_grad.unwrap_or_default(), seconds));
        self.forward = sum(self.forward, other.forward);
        self.backward = sum(self.backward, other.backward);
    }
}

/// What a pass counts as, in forward passes.
pub(super) const FORWARD: f64 = 1.0;
pub(super) const BACKWARD: f64 = 2.5;

/// The row of a pass that counts as so many forward passes; `layers` of the shape are in the time.
pub(super) fn pass_row(
    name: &str,
    pass: &str,
    shape: AttentionShape,
    layers: usize,
    seconds: Seconds,
    forwards: f64,
) -> Row {
    let flops = forwards * layers as f64 * shape.forward_flops();
    let row = Row::new("attention", format!("{name}, {pass}"), row::of_layers(shape, layers), seconds, flops, None);
    Row { attention: Some(AttentionFigures { layers, ..AttentionFigures::default() }), ..row }
}

impl Passes {
    pub(super) fn times(self, layers: usize) -> Self {
        let mut sum = Self::default();
        (0..layers).for_each(|_| sum += self);
        sum
    }

    /// One row a pass; `layers` of the shape are in the times.
    pub(super) fn rows(&self, name: &str, shape: AttentionShape, layers: usize) -> Vec<Row> {
        let row = |pass, seconds, forwards| pass_row(name, pass, shape, layers, seconds, forwards);
        let no_grad = self.no_grad.map(|seconds| row("no grad", seconds, FORWARD));
        no_grad
            .into_iter()
            .chain([row("forward", self.forward, FORWARD), row("backward", self.backward, BACKWARD)])
            .collect()
    }
}

pub(super) fn measure(settings: &Settings, each: &mut dyn FnMut(Row)) -> Result<()> {
    let shapes = if settings.device == Device::Cpu { &CPU_SHAPES[..] } else { &GPU_SHAPES[..] };
    let shapes: Vec<AttentionShape> = shapes.iter().map(|&shape| AttentionShape::new(shape)).collect();
    let peers = Peers::measure_if_wanted(settings, &shapes)?;
    for shape in shapes {
        let problem = Problem::random(settings, shape)?;
        let mut tell = |name: &str, passes: Passes| passes.rows(name, shape, 1).into_iter().for_each(&mut *each);
        tell("stick-breaking dense", time_stick_breaking(settings, &problem, 0)?);
        if !settings.dense_only {
            tell("stick-breaking early exit (flatters)", time_stick_breaking(settings, &problem, 24)?);
        }
        tell("softmax", time_softmax(settings, &problem)?);
        peers.rows(shape, 1).into_iter().for_each(&mut *each);
    }
    Ok(())
}

pub(super) fn time_stick_breaking(settings: &Settings, problem: &Problem, early_exit_bits: u32) -> Result<Passes> {
    let Problem { qkv: [q, k, v], output_gradient, offsets, .. } = problem;
    let attention = problem.stick_breaking(early_exit_bits);
    let forward = |wanted| stick_breaking(q, k, v, offsets, attention, wanted);
    let no_grad = match settings.device {
        Device::Cpu => None,
        Device::Cuda(_) => Some(time(settings, || Ok(forward(INFERENCE).map(drop)?))?),
    };
    let forward_seconds = time(settings, || Ok(forward(TRAINING).map(drop)?))?;
    let saved = forward(TRAINING)?.saved;
    let backward = time(settings, || {
        Ok(stick_breaking_backward(q, k, v, offsets, attention, &saved, output_gradient, None).map(drop)?)
    })?;
    Ok(Passes { no_grad, forward: forward_seconds, backward })
}

pub(super) fn time_softmax(settings: &Settings, problem: &Problem) -> Result<Passes> {
    let Problem { qkv: [q, k, v], output_gradient, offsets, scale, .. } = problem;
    let attention = SoftmaxSettings { scale: *scale, alibi_slopes: None };
    let forward = || softmax(q, k, v, offsets, &attention);
    let forward_seconds = time(settings, || Ok(forward().map(drop)?))?;
    let (o, lse) = forward()?;
    let backward =
        time(
            settings,
            || Ok(softmax_backward([q, k, v], offsets, &attention, (&o, &lse), output_gradient).map(drop)?),
        )?;
    Ok(Passes { no_grad: None, forward: forward_seconds, backward })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_several_layers_count_the_work_of_all() {
        let shape = AttentionShape { batch: 2, heads: 4, kv_heads: 2, length: 100, head_dim: 8 };
        let one = Passes { no_grad: None, forward: (2e-3, 1e-3), backward: (5e-3, 4e-3) };
        let rows = one.times(3).rows("dense", shape, 3);
        assert_eq!(rows.iter().map(|row| row.name.as_str()).collect::<Vec<_>>(), ["dense, forward", "dense, backward"]);
        assert_eq!(rows[0].shape, "3 x (B2 H4/2 L100 D8)");
        assert!((rows[0].milliseconds - 6.0).abs() < 1e-9 && (rows[1].fastest_milliseconds - 12.0).abs() < 1e-9);
        // 4 B H D L^2 / 2 a layer, 1.28 MFLOP in 2 ms; the backward pass 2.5 times as much in 5 ms.
        assert!(rows.iter().all(|row| (row.gflops_per_second - 0.64).abs() < 1e-9), "{rows:?}");
        let with = Passes { no_grad: Some((1e-3, 1e-3)), ..one };
        assert_eq!(with.rows("dense", shape, 1).len(), 3);
        assert_eq!(with.rows("dense", shape, 1)[0].shape, "B2 H4/2 L100 D8");
    }
}
