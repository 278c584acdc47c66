//! One attention case: outputs and gradients against float64.

use super::error_norm::{row_error, tensor_error};
use super::{Bounds, Comparison};
use anyhow::{Context, Result};
use std::path::Path;
use stickbreak_tensor::ops::attention::{StickBreakingSettings, stick_breaking, stick_breaking_backward};
use stickbreak_tensor::{DType, Tensor, io};

pub(super) fn compare(path: &Path, dtype: DType, bounds: Bounds) -> Result<Vec<Comparison>> {
    let file = io::load(path)?;
    let metadata = |key: &str| file.metadata.get(key).with_context(|| format!("no metadata {key:?}"));
    let settings = StickBreakingSettings {
        scale: metadata("scale")?.parse().context("metadata \"scale\" is not a number")?,
        attend_current: metadata("attend_current")?.parse().context("metadata \"attend_current\" is not a boolean")?,
        early_exit_bits: 0,
    };
    let input = |name: &str| -> Result<Tensor> { Ok(file.tensor(path, name)?.to_dtype(dtype)) };
    let (q, k, v) = (input("q")?, input("k")?, input("v")?);
    let cu_seqlens = file.tensor(path, "cu_seqlens")?.to_vec::<i32>()?;
    let out = stick_breaking(&q, &k, &v, &cu_seqlens, settings)?;
    let [dq, dk, dv] =
        stick_breaking_backward(&q, &k, &v, &cu_seqlens, settings, &out.saved, &input("do")?, Some(&input("drem")?))?;
    let head_dim = q.dim(2)?;
    let results = [
        ("o", out.o, head_dim),
        ("rem", out.rem, 1),
        ("log2_rem", out.log2_rem, 1),
        ("dq", dq, head_dim),
        ("dk", dk, head_dim),
        ("dv", dv, head_dim),
    ];
    let mut comparisons = Vec::new();
    for (name, result, width) in results {
        let (x, reference) = (result.to_f64_vec(), file.tensor(path, name)?.to_f64_vec());
        comparisons.push(Comparison::new(name, tensor_error(&x, &reference), bounds.tensor));
        comparisons.push(Comparison::new(format!("{name} by row"), row_error(&x, &reference, width), bounds.row));
    }
    Ok(comparisons)
}
