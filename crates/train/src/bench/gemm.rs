//! Matrix products: the machine's peak, and the shapes of a model's step. Weight gradients are added (beta = 1), on a GPU
//! to float32.

use super::row::Row;
use super::{Settings, random, time};
use anyhow::Result;
use stickbreak_tensor::{DType, Device, Tensor};

/// Name; rows, columns and inner size; whether it is a weight gradient.
type Product = (&'static str, [usize; 3], bool);

/// A small byte model's.
const CPU: [Product; 5] = [
    ("square", [2048, 2048, 2048], false),
    ("projection, forward", [4096, 256, 256], false),
    ("feed-forward up", [4096, 704, 256], false),
    ("feed-forward down", [4096, 256, 704], false),
    ("weight gradient", [704, 256, 4096], true),
];
/// Those of the 360M and the 1.34B model.
const GPU: [Product; 11] = [
    ("square", [8192, 8192, 8192], false),
    ("360M projection, forward", [32768, 1024, 1024], false),
    ("360M feed-forward up", [32768, 2816, 1024], false),
    ("360M feed-forward down", [32768, 1024, 2816], false),
    ("360M feed-forward up, weight gradient", [2816, 1024, 32768], true),
    ("360M logits of 2048 tokens", [2048, 50304, 1024], false),
    ("1.34B projection, forward", [16384, 2048, 2048], false),
    ("1.34B feed-forward up", [16384, 5632, 2048], false),
    ("1.34B feed-forward down", [16384, 2048, 5632], false),
    ("1.34B feed-forward up, weight gradient", [5632, 2048, 16384], true),
    ("1.34B logits of 2048 tokens", [2048, 50304, 2048], false),
];

pub(super) fn measure(settings: &Settings, each: &mut dyn FnMut(Row)) -> Result<()> {
    let products = if settings.device == Device::Cpu { &CPU[..] } else { &GPU[..] };
    for &(name, [m, n, k], weight_gradient) in products {
        let (a, b) = if weight_gradient {
            (random(settings, [k, m], 1)?.transpose(0, 1)?, random(settings, [k, n], 2)?)
        } else {
            (random(settings, [m, k], 1)?, random(settings, [n, k], 2)?.transpose(0, 1)?)
        };
        let dtype = if weight_gradient { DType::F32 } else { a.dtype() };
        let out = Tensor::zeros_on([m, n], dtype, settings.device)?;
        let beta = if weight_gradient { 1.0 } else { 0.0 };
        let seconds = time(settings, || Ok(out.matmul_assign(1.0, &a, &b, beta)?))?;
        each(Row::new("gemm", name, format!("{m} x {n} x {k}"), seconds, 2.0 * (m * n * k) as f64, None));
    }
    Ok(())
}
