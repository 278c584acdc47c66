//! Matrix products: the machine's peak, and the shapes of a small model's step.

use super::{Row, row, time};
use anyhow::Result;
use stickbreak_tensor::{DType, Tensor};

pub(super) fn measure(repeats: usize) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (name, m, n, k) in [
        ("square", 2048, 2048, 2048),
        ("projection, forward", 4096, 256, 256),
        ("feed-forward up", 4096, 704, 256),
        ("feed-forward down", 4096, 256, 704),
        ("weight gradient", 704, 256, 4096),
    ] {
        let a = Tensor::randn(0.0, 1.0, [m, k], DType::F32, 1)?;
        let b = Tensor::randn(0.0, 1.0, [n, k], DType::F32, 2)?.transpose(0, 1)?;
        let out = Tensor::zeros([m, n], DType::F32);
        let seconds = time(repeats, || Ok(out.matmul_assign(1.0, &a, &b, 0.0)?))?;
        rows.push(row("gemm", name, format!("{m} x {n} x {k}"), seconds, 2.0 * (m * n * k) as f64, None));
    }
    Ok(rows)
}
