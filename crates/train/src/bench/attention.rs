//! Attention, forward and backward. "dense" visits every tile; "early exit" is what random q and k allow, which is far
//! more than a trained model does: read it as a bound.

use super::{Row, row, time};
use anyhow::Result;
use stickbreak_model::count::attention_forward_flops;
use stickbreak_tensor::ops::attention::{
    SoftmaxSettings, StickBreakingSettings, softmax, softmax_backward, stick_breaking, stick_breaking_backward,
};
use stickbreak_tensor::{DType, Tensor};

pub(super) fn measure(repeats: usize) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (heads, tokens, d) in [(8, 2048, 64), (4, 512, 64), (8, 4096, 128)] {
        let shape = format!("B1 H{heads} T{tokens} D{d}");
        let flops = attention_forward_flops((heads * d) as f64, (tokens * tokens) as f64);
        let random = |seed| Tensor::randn(0.0, 1.0, [tokens, heads, d], DType::F32, seed);
        let (q, k, v, d_o) = (random(1)?, random(2)?, random(3)?, random(4)?);
        let (scale, offsets) = (1.0 / (d as f64).sqrt(), [0, tokens as i32]);
        let mut add = |name: &str, forward: (f64, f64), both: (f64, f64)| {
            rows.push(row("attention", format!("{name}, forward"), &shape, forward, flops, None));
            rows.push(row("attention", format!("{name}, both"), &shape, both, 3.5 * flops, None));
        };
        for (name, early_exit_bits) in [("stick-breaking dense", 0), ("stick-breaking early exit", 24)] {
            let settings = StickBreakingSettings { scale, attend_current: false, early_exit_bits };
            let run = || stick_breaking(&q, &k, &v, &offsets, settings);
            let forward = time(repeats, || Ok(run().map(drop)?))?;
            let both = time(repeats, || {
                let out = run()?;
                stick_breaking_backward(&q, &k, &v, &offsets, settings, &out.saved, &d_o, None)?;
                Ok(())
            })?;
            add(name, forward, both);
        }
        let settings = SoftmaxSettings { scale, alibi_slopes: None };
        let run = || softmax(&q, &k, &v, &offsets, &settings);
        let forward = time(repeats, || Ok(run().map(drop)?))?;
        let both = time(repeats, || {
            let (o, lse) = run()?;
            softmax_backward([&q, &k, &v], &offsets, &settings, (&o, &lse), &d_o)?;
            Ok(())
        })?;
        add("softmax", forward, both);
    }
    Ok(rows)
}
