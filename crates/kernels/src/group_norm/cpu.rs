//! GroupNorm on the CPU: tokens in parallel; gradients of weight and bias from partial sums over fixed blocks of tokens.

use rayon::prelude::*;

use super::GroupNormSpec;
use crate::error::{Result, check_len};
use crate::float::Float;
use crate::parallel::{TASK, chunks_or_none, rows_per_task, sum_by, sum_by_2, sum_by_3, sum_partials};
use crate::simd::vectorize;

const OP: &str = "group_norm";

/// Writes the normalised heads, and mean and inverse standard deviation of each.
///
/// # Errors
/// A slice whose length is not that of the spec.
pub fn forward<T: Float>(
    spec: &GroupNormSpec,
    x: &[T],
    weight: &[T],
    bias: &[T],
    out: &mut [T],
    mean: &mut [T],
    inverse_std: &mut [T],
) -> Result<()> {
    let GroupNormSpec { tokens, heads, head_dim, epsilon } = *spec;
    let width = heads.saturating_mul(head_dim);
    check_len(OP, "x", x, tokens.saturating_mul(width))?;
    check_len(OP, "weight", weight, width)?;
    check_len(OP, "bias", bias, width)?;
    check_len(OP, "out", out, tokens.saturating_mul(width))?;
    check_len(OP, "mean", mean, tokens.saturating_mul(heads))?;
    check_len(OP, "inverse_std", inverse_std, tokens.saturating_mul(heads))?;
    if width == 0 {
        mean.fill(T::ZERO);
        inverse_std.fill(T::from_f64(1.0 / epsilon.sqrt()));
        return Ok(());
    }
    let block = rows_per_task(width);
    (
        x.par_chunks(block * width),
        out.par_chunks_mut(block * width),
        mean.par_chunks_mut(block * heads),
        inverse_std.par_chunks_mut(block * heads),
    )
        .into_par_iter()
        .for_each(|(x, out, mean, inverse_std)| {
            vectorize(
                #[inline(always)]
                || {
                    let groups = x.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim));
                    let statistics = mean.iter_mut().zip(inverse_std);
                    for (group, ((x, out), (mean, inverse_std))) in groups.zip(statistics).enumerate() {
                        let at = group % heads * head_dim;
                        let (weight, bias) = (&weight[at..at + head_dim], &bias[at..at + head_dim]);
                        let center = sum_by(x, |x| x) / T::from_usize(head_dim);
                        let squares = sum_by(x, |x| (x - center) * (x - center)).to_f64();
                        let r = T::from_f64(1.0 / (squares / head_dim as f64 + epsilon).sqrt());
                        *mean = center;
                        *inverse_std = r;
                        for (((out, &x), &weight), &bias) in out.iter_mut().zip(x).zip(weight).zip(bias) {
                            *out = ((x - center) * r).mul_add(weight, bias);
                        }
                    }
                },
            );
        });
    Ok(())
}

/// Overwrites the gradients that are asked for.
///
/// # Errors
/// A slice whose length is not that of the spec.
pub fn backward<T: Float>(
    spec: &GroupNormSpec,
    x: &[T],
    weight: &[T],
    mean: &[T],
    inverse_std: &[T],
    dout: &[T],
    dx: Option<&mut [T]>,
    dweight: Option<&mut [T]>,
    dbias: Option<&mut [T]>,
) -> Result<()> {
    let GroupNormSpec { tokens, heads, head_dim, .. } = *spec;
    let width = heads.saturating_mul(head_dim);
    check_len(OP, "x", x, tokens.saturating_mul(width))?;
    check_len(OP, "weight", weight, width)?;
    check_len(OP, "mean", mean, tokens.saturating_mul(heads))?;
    check_len(OP, "inverse_std", inverse_std, tokens.saturating_mul(heads))?;
    check_len(OP, "dout", dout, tokens.saturating_mul(width))?;
    if let Some(dx) = &dx {
        check_len(OP, "dx", dx, tokens.saturating_mul(width))?;
    }
    if let Some(dweight) = &dweight {
        check_len(OP, "dweight", dweight, width)?;
    }
    if let Some(dbias) = &dbias {
        check_len(OP, "dbias", dbias, width)?;
    }
    if width == 0 {
        return Ok(());
    }
    let block = (2 * TASK / width).max(32);
    let blocks = tokens.div_ceil(block);
    let mut weight_partials = vec![T::ZERO; if dweight.is_some() { blocks * width } else { 0 }];
    let mut bias_partials = vec![T::ZERO; if dbias.is_some() { blocks * width } else { 0 }];
    (
        x.par_chunks(block * width),
        dout.par_chunks(block * width),
        mean.par_chunks(block * heads),
        inverse_std.par_chunks(block * heads),
        chunks_or_none(dx, block * width, blocks),
        chunks_or_none(dweight.is_some().then_some(&mut weight_partials[..]), width, blocks),
        chunks_or_none(dbias.is_some().then_some(&mut bias_partials[..]), width, blocks),
    )
        .into_par_iter()
        .for_each(|(x, dout, mean, inverse_std, mut dx, mut dweight, mut dbias)| {
            vectorize(
                #[inline(always)]
                || {
                    let count = T::from_usize(head_dim);
                    for (group, (&center, &r)) in mean.iter().zip(inverse_std).enumerate() {
                        let at = group * head_dim..(group + 1) * head_dim;
                        let first = group % heads * head_dim;
                        let parameter = first..first + head_dim;
                        let (x, dout) = (&x[at.clone()], &dout[at.clone()]);
                        if let Some(dx) = &mut dx {
                            let weight = &weight[parameter.clone()];
                            let mean_g = sum_by_2(dout, weight, |dout, weight| dout * weight) / count;
                            let mean_gn =
                                sum_by_3(x, dout, weight, |x, dout, weight| (x - center) * r * (dout * weight)) / count;
                            for (((dx, &x), &dout), &weight) in dx[at].iter_mut().zip(x).zip(dout).zip(weight) {
                                *dx = r * (dout * weight - mean_g - (x - center) * r * mean_gn);
                            }
                        }
                        if let Some(dweight) = &mut dweight {
                            for ((sum, &x), &dout) in dweight[parameter.clone()].iter_mut().zip(x).zip(dout) {
                                *sum = dout.mul_add((x - center) * r, *sum);
                            }
                        }
                        if let Some(dbias) = &mut dbias {
                            for (sum, &dout) in dbias[parameter].iter_mut().zip(dout) {
                                *sum += dout;
                            }
                        }
                    }
                },
            );
        });
    if let Some(dweight) = dweight {
        sum_partials(&weight_partials, dweight);
    }
    if let Some(dbias) = dbias {
        sum_partials(&bias_partials, dbias);
    }
    Ok(())
}
