//! One attention case: outputs and gradients against float64.

use super::error_norm::{row_error, tensor_error};
use super::{Bounds, Comparison, digest_results};
use anyhow::{Context, Result};
use std::path::Path;
use stickbreak_tensor::ops::attention::{
    StickBreakingSaved, StickBreakingSettings, StickBreakingWanted, stick_breaking, stick_breaking_backward,
};
use stickbreak_tensor::{DType, Device, Tensor, io};

pub(super) fn compare(
    path: &Path,
    dtype: DType,
    device: Device,
    digest: &mut blake3::Hasher,
) -> Result<Vec<Comparison>> {
    let file = io::load(path)?;
    let metadata = |key: &str| file.metadata.get(key).with_context(|| format!("no metadata {key:?}"));
    let settings = StickBreakingSettings {
        scale: metadata("scale")?.parse().context("metadata \"scale\" is not a number")?,
        attend_current: metadata("attend_current")?.parse().context("metadata \"attend_current\" is not a boolean")?,
        early_exit_bits: 0,
    };
    let of_type =
        |name: &str, dtype| -> Result<Tensor> { Ok(file.tensor(path, name)?.to_dtype(dtype)?.to_device(device)?) };
    let input = |name: &str| of_type(name, dtype);
    let (q, k, v) = (input("q")?, input("k")?, input("v")?);
    let remainder_gradient = of_type("drem", StickBreakingSaved::remainder_type(dtype))?;
    let cu_seqlens = file.tensor(path, "cu_seqlens")?.to_vec::<i32>()?;
    let wanted = StickBreakingWanted { log2_rem: true, backward: true };
    let out = stick_breaking(&q, &k, &v, &cu_seqlens, settings, wanted)?;
    let [dq, dk, dv] = stick_breaking_backward(
        &q,
        &k,
        &v,
        &cu_seqlens,
        settings,
        &out.saved,
        &input("do")?,
        Some(&remainder_gradient),
    )?;
    let head_dim = q.dim(2)?;
    let (bounds, remainder_bounds) = (Bounds::of(dtype), Bounds::of_remainder(dtype));
    let results = [
        ("o", out.o, head_dim, bounds),
        ("rem", out.rem, 1, remainder_bounds),
        ("log2_rem", out.log2_rem.context("log2_rem was asked for")?, 1, remainder_bounds),
        ("dq", dq, head_dim, bounds),
        ("dk", dk, head_dim, bounds),
        ("dv", dv, head_dim, bounds),
    ];
    let mut comparisons = Vec::new();
    for (name, result, width, bounds) in results {
        let (x, reference) = (result.to_f64_vec()?, file.tensor(path, name)?.to_f64_vec()?);
        digest_results(digest, &x);
        comparisons.push(Comparison::new(name, tensor_error(&x, &reference), bounds.tensor));
        comparisons.push(Comparison::new(format!("{name} by row"), row_error(&x, &reference, width), bounds.row));
    }
    Ok(comparisons)
}
