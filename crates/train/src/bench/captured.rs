//! Attention on q, k and v of a trained model: each layer's, on held-out text, with early exit and without, beside softmax
//! at the same shape. A row has the sum over layers.
//!
//! Each window is one document, also where a text ends within it, so that the shapes are those that others are timed at.
//! What does not depend on the values, dense attention and softmax, is timed in one layer, the middle one, and counted
//! for all.

use super::attention::{AttentionShape, Passes, Problem, time_softmax, time_stick_breaking};
use super::peers::Peers;
use super::row::{AttentionFigures, Row};
use super::trained::Trained;
use super::{Settings, random};
use crate::metrics::mean_share;
use anyhow::{Result, bail};
use std::fmt;
use stickbreak_tensor::{Device, Tensor};

/// Context lengths unless given; 2k is what the run behind the published figures was trained at.
const GPU_LENGTHS: [usize; 4] = [2048, 4096, 16384, 65536];
const CPU_LENGTHS: [usize; 3] = [512, 1024, 2048];
/// Tokens of the windows of one length together: enough to fill the device.
const GPU_TOKENS: usize = 65536;
const CPU_TOKENS: usize = 2048;

pub(super) fn measure(settings: &Settings, trained: &Trained, each: &mut dyn FnMut(Row)) -> Result<()> {
    trained.expect_stick_breaking()?;
    let (lengths, tokens) = match settings.device {
        Device::Cpu => (&CPU_LENGTHS[..], CPU_TOKENS),
        Device::Cuda(_) => (&GPU_LENGTHS[..], GPU_TOKENS),
    };
    let config = trained.loaded.model.config();
    let mut texts = Vec::new();
    for length in trained.available(settings, lengths)? {
        let (ids, packing) = trained.row(length, tokens)?;
        let (heads, kv_heads, head_dim) = (config.num_heads, config.kv_heads(), config.head_dim());
        let shape = AttentionShape { batch: ids.elements() / length, heads, kv_heads, length, head_dim };
        texts.push((shape, ids, packing));
    }
    let shapes: Vec<AttentionShape> = texts.iter().map(|(shape, ..)| *shape).collect();
    let peers = Peers::measure_if_wanted(settings, &shapes)?;
    let mut lines = Vec::new();
    for (shape, ids, packing) in texts {
        let found = Captured::measure(settings, trained, shape, &ids, packing.cu_seqlens())?;
        found.rows(trained).into_iter().for_each(&mut *each);
        peers.rows(shape, found.layers()).into_iter().for_each(&mut *each);
        lines.push(Line::new(&found, &peers));
    }
    println!("\n{}: all layers, forward + backward, milliseconds", trained.name);
    println!("{}", Line::HEADER);
    lines.iter().for_each(|line| println!("{line}"));
    Ok(())
}

/// All layers at one length.
struct Captured {
    shape: AttentionShape,
    early_exit: Passes,
    dense: Passes,
    softmax: Passes,
    /// By layer and head.
    skipped: Vec<Vec<f64>>,
    /// The largest of all layers: o, dq, dk, dv.
    apart: [f64; 4],
}

impl Captured {
    fn measure(
        settings: &Settings,
        trained: &Trained,
        shape: AttentionShape,
        ids: &Tensor,
        offsets: &[i32],
    ) -> Result<Self> {
        let (model, bits) = (&trained.loaded.model, trained.early_exit_bits());
        let (layers, none) = (model.blocks().len(), Passes::default());
        let mut found =
            Self { shape, early_exit: none, dense: none, softmax: none, skipped: Vec::new(), apart: [0.0; 4] };
        let output_gradient = random(settings, [ids.elements(), shape.heads, shape.head_dim], 4)?;
        let packing = stickbreak_model::Packing::new(offsets)?;
        model.visit_attention(ids, &packing, |layer, qkv| -> Result<()> {
            let problem = Problem {
                qkv,
                output_gradient: output_gradient.clone(),
                offsets: offsets.to_vec(),
                scale: model.config().attention_scale(),
                attend_current: model.config().attend_current,
            };
            let (early, skipped) = problem.results(bits)?;
            let (dense, _) = problem.results(0)?;
            for (most, (early, dense)) in found.apart.iter_mut().zip(early.iter().zip(&dense)) {
                *most = largest(*most, apart(early, dense)?);
            }
            drop((early, dense));
            found.skipped.push(skipped);
            found.early_exit += time_stick_breaking(settings, &problem, bits)?;
            if layer == layers / 2 {
                found.dense = time_stick_breaking(settings, &problem, 0)?.times(layers);
                found.softmax = time_softmax(settings, &problem)?.times(layers);
            }
            Ok(())
        })?;
        if found.apart.iter().any(|apart| !apart.is_finite()) {
            bail!("{}: attention gives values that are not finite at {shape}", trained.name);
        }
        Ok(found)
    }

    fn layers(&self) -> usize {
        self.skipped.len()
    }

    fn rows(&self, trained: &Trained) -> Vec<Row> {
        let (layers, mut rows) = (self.layers(), Vec::new());
        let [early_exit, dense] = trained.kinds().map(|(kind, _)| format!("{}, {kind}", trained.name));
        for mut row in self.early_exit.rows(&early_exit, self.shape, layers) {
            row.attention = row.attention.map(|figures| {
                let [o, gradients @ ..] = self.apart;
                let apart = if row.name.ends_with("backward") { gradients.to_vec() } else { vec![o] };
                AttentionFigures { apart_from_dense: apart, ..figures.with_skipped(&self.skipped) }
            });
            rows.push(row);
        }
        rows.extend(self.dense.rows(&dense, self.shape, layers));
        rows.extend(self.softmax.rows("softmax", self.shape, layers));
        rows
    }
}

/// `|a - b| / |b|` over all elements.
fn apart(a: &Tensor, b: &Tensor) -> Result<f64> {
    Ok((a.sub(b)?.sum_of_squares()? / b.sum_of_squares()?.max(f64::MIN_POSITIVE)).sqrt())
}

/// The larger one; not a number if one is not, which `f64::max` would hide.
fn largest(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

/// A line of the table at the end.
struct Line {
    shape: AttentionShape,
    skipped: f64,
    /// Milliseconds of both passes: early exit, dense, softmax, cuDNN's.
    times: [Option<f64>; 4],
}

impl Line {
    const HEADER: &'static str =
        "  context   sequences  skipped  early exit       dense     softmax       cuDNN  cuDNN / early exit";

    fn new(found: &Captured, peers: &Peers) -> Self {
        let both = |passes: &Passes| Some(1e3 * (passes.forward.0 + passes.backward.0));
        let cudnn = peers.milliseconds("cuDNN", found.shape, found.layers()).map(|[f, b]| f + b);
        let times = [both(&found.early_exit), both(&found.dense), both(&found.softmax), cudnn];
        Self { shape: found.shape, skipped: mean_share(&found.skipped), times }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [early, .., cudnn] = self.times;
        write!(f, "{:>9} {:>11} {:>7.1}%", self.shape.length, self.shape.batch, 100.0 * self.skipped)?;
        for time in self.times {
            write!(f, " {:>11}", time.map_or("-".to_owned(), |time| format!("{time:.3}")))?;
        }
        let ratio = early.zip(cudnn).map_or("-".to_owned(), |(early, cudnn)| format!("{:.2}", cudnn / early));
        write!(f, " {ratio:>19}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use stickbreak_tensor::DType;

    #[test]
    fn distances_are_relative() {
        let b = Tensor::from_vec(vec![3.0f32, 4.0], [2]).unwrap();
        let a = Tensor::from_vec(vec![3.0f32, 4.5], [2]).unwrap();
        assert!((apart(&a, &b).unwrap() - 0.1).abs() < 1e-7);
        assert_eq!(apart(&b, &b).unwrap(), 0.0);
        let zeros = Tensor::zeros([2], DType::F32);
        assert_eq!(apart(&zeros, &zeros).unwrap(), 0.0);
    }

    #[test]
    fn values_that_are_not_finite_are_not_hidden_by_those_of_another_layer() {
        let b = Tensor::from_vec(vec![3.0f32, 4.0], [2]).unwrap();
        for broken in [f32::NAN, f32::INFINITY] {
            let broken = Tensor::from_vec(vec![broken, 4.0], [2]).unwrap();
            let distances = [apart(&b, &b), apart(&broken, &broken), apart(&b, &b)].map(Result::unwrap);
            assert!(!distances.into_iter().fold(0.0, largest).is_finite(), "{distances:?}");
        }
        assert_eq!([0.1, 0.3, 0.2].into_iter().fold(0.0, largest), 0.3);
    }

    #[test]
    fn a_line_of_the_table_stands_under_its_header() {
        let shape = AttentionShape { batch: 4, heads: 2, kv_heads: 2, length: 16384, head_dim: 64 };
        let line = Line { shape, skipped: 0.66, times: [Some(100.0), Some(250.5), Some(200.0), Some(150.0)] };
        let text = line.to_string();
        assert_eq!(text.len(), Line::HEADER.len(), "{text}");
        assert!(text.ends_with("150.000                1.50") && text.contains(" 66.0% "), "{text}");
        let without = Line { times: [Some(100.0), Some(250.5), Some(200.0), None], ..line };
        assert!(without.to_string().ends_with("-                   -"), "{without}");
    }
}
