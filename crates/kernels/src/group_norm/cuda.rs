//! GroupNorm with one group per head on a CUDA device.
//!
//! Activations are f32 or bf16; weight and bias are f32 or, beside bf16 activations, bf16; mean and inverse standard
//! deviation are f32.

use super::GroupNormSpec;
use crate::cuda::units::*;
use crate::cuda::{Arg, DeviceMut, DeviceRef, DeviceType, Launch, Queue, Source, check};
use crate::elementwise::cuda::fill;
use crate::error::{KernelError, Result};
use crate::reduce::cuda::column_sums;

const OP: &str = "group_norm";
const SOURCE: Source = source("group_norm.cu", &[UNITS, include_str!("../../cuda/group_norm.cu")]);

/// Sources of this op.
pub(crate) fn sources() -> Vec<Source> {
    vec![SOURCE]
}

/// Threads of a block.
const THREADS: usize = 128;
/// The largest head: 32 threads with 16 elements each.
const MOST_HEAD_DIM: usize = 512;
/// Blocks of a backward launch at most; each leaves partial sums.
const BACKWARD_BLOCKS: usize = 1024;

/// How a block is shared out.
struct Places {
    wide: bool,
    group: usize,
    heads: usize,
    tokens: usize,
}

impl Places {
    fn new(spec: &GroupNormSpec, unit: usize, aligned: bool) -> Result<Self> {
        let GroupNormSpec { heads, head_dim, .. } = *spec;
        let wide = aligned && head_dim.is_multiple_of(unit) && head_dim / unit <= 32;
        if !wide && head_dim > MOST_HEAD_DIM {
            return Err(KernelError::size(OP, "head_dim", format!("at most {MOST_HEAD_DIM} on a GPU"), head_dim));
        }
        let group = if wide { head_dim / unit } else { head_dim.min(32) }.next_power_of_two();
        let heads = heads.min(THREADS / group);
        Ok(Self { wide, group, heads, tokens: THREADS / group / heads })
    }
}

/// Writes the normalised heads, and mean and inverse standard deviation of each; see [`super`].
///
/// # Errors
/// Memory whose length is not that of the spec, or of another type; a head of more than 512 elements.
pub fn forward(
    queue: &Queue,
    spec: &GroupNormSpec,
    x: DeviceRef<'_>,
    weight: DeviceRef<'_>,
    bias: DeviceRef<'_>,
    out: &mut DeviceMut<'_>,
    mean: &mut DeviceMut<'_>,
    inverse_std: &mut DeviceMut<'_>,
) -> Result<()> {
    let GroupNormSpec { tokens, heads, head_dim, epsilon } = *spec;
    let (dtype, width) = (x.dtype(), heads.saturating_mul(head_dim));
    check(OP, "x", (x.len(), dtype), tokens.saturating_mul(width), FLOATS)?;
    check_weight(OP, dtype, weight.dtype())?;
    check(OP, "weight", (weight.len(), weight.dtype()), width, FLOATS)?;
    check(OP, "bias", (bias.len(), bias.dtype()), width, &[weight.dtype()])?;
    check(OP, "out", (out.len(), out.dtype()), tokens.saturating_mul(width), &[dtype])?;
    check(OP, "mean", (mean.len(), mean.dtype()), tokens.saturating_mul(heads), F32)?;
    check(OP, "inverse_std", (inverse_std.len(), inverse_std.dtype()), tokens.saturating_mul(heads), F32)?;
    let sizes = [small(OP, "tokens", tokens)?, small(OP, "heads", heads)?, small(OP, "head_dim", head_dim)?];
    small(OP, "elements of a token", width)?;
    if width == 0 {
        fill(queue, 0.0, mean)?;
        return fill(queue, 1.0 / epsilon.sqrt(), inverse_std);
    }
    let unit = unit_of(dtype);
    let aligned = [x, weight, bias, out.as_ref()].iter().all(|&view| is_aligned(view, unit));
    let places = Places::new(spec, unit, aligned)?;
    let entry = match places.wide {
        true => by_types!(dtype, weight.dtype(), "group_norm_forward", "_"),
        false => by_types!(dtype, weight.dtype(), "group_norm_forward_narrow", "_"),
    };
    let kernel = queue.gpu().kernel(&SOURCE, entry)?;
    let mut arguments: Vec<Arg> =
        vec![x.into(), weight.into(), bias.into(), out.into(), mean.into(), inverse_std.into()];
    arguments.extend(sizes.map(Arg::from));
    arguments.extend([Arg::from((1.0 / head_dim as f64) as f32), (epsilon as f32).into()]);
    arguments.extend([places.heads as u32, places.group as u32].map(Arg::from));
    let grid = [tokens.div_ceil(places.tokens) as u32, heads.div_ceil(places.heads) as u32, 1];
    queue.launch(&kernel, Launch { grid, block: THREADS as u32, shared: 0 }, &arguments)
}

/// Overwrites the gradients that are asked for; those of weight and bias are f32 or bf16.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    queue: &Queue,
    spec: &GroupNormSpec,
    x: DeviceRef<'_>,
    weight: DeviceRef<'_>,
    mean: DeviceRef<'_>,
    inverse_std: DeviceRef<'_>,
    dout: DeviceRef<'_>,
    dx: Option<&mut DeviceMut<'_>>,
    dweight: Option<&mut DeviceMut<'_>>,
    dbias: Option<&mut DeviceMut<'_>>,
) -> Result<()> {
    let GroupNormSpec { tokens, heads, head_dim, .. } = *spec;
    let (dtype, width) = (x.dtype(), heads.saturating_mul(head_dim));
    check(OP, "x", (x.len(), dtype), tokens.saturating_mul(width), FLOATS)?;
    check_weight(OP, dtype, weight.dtype())?;
    check(OP, "weight", (weight.len(), weight.dtype()), width, FLOATS)?;
    check(OP, "mean", (mean.len(), mean.dtype()), tokens.saturating_mul(heads), F32)?;
    check(OP, "inverse_std", (inverse_std.len(), inverse_std.dtype()), tokens.saturating_mul(heads), F32)?;
    check(OP, "dout", (dout.len(), dout.dtype()), tokens.saturating_mul(width), &[dtype])?;
    if let Some(dx) = &dx {
        check(OP, "dx", (dx.len(), dx.dtype()), tokens.saturating_mul(width), &[dtype])?;
    }
    if let Some(dweight) = &dweight {
        check(OP, "dweight", (dweight.len(), dweight.dtype()), width, FLOATS)?;
    }
    if let Some(dbias) = &dbias {
        check(OP, "dbias", (dbias.len(), dbias.dtype()), width, FLOATS)?;
    }
    let sizes = [small(OP, "tokens", tokens)?, small(OP, "heads", heads)?, small(OP, "head_dim", head_dim)?];
    small(OP, "elements of a token", width)?;
    if width == 0 || (dx.is_none() && dweight.is_none() && dbias.is_none()) {
        return Ok(());
    }
    let unit = unit_of(dtype);
    let views = [Some(x), Some(weight), Some(dout), dx.as_ref().map(|dx| dx.as_ref())];
    let places = Places::new(spec, unit, views.into_iter().flatten().all(|view| is_aligned(view, unit)))?;
    let head_blocks = heads.div_ceil(places.heads);
    let slices = tokens.div_ceil(places.tokens).min((BACKWARD_BLOCKS / head_blocks / places.tokens).max(1));
    let parts = slices * places.tokens;
    let scratch = |wanted: bool| wanted.then(|| queue.scratch(DeviceType::F32, parts * width)).transpose();
    let (mut weight_partials, mut bias_partials) = (scratch(dweight.is_some())?, scratch(dbias.is_some())?);
    let entry = match places.wide {
        true => by_types!(dtype, weight.dtype(), "group_norm_backward", "_"),
        false => by_types!(dtype, weight.dtype(), "group_norm_backward_narrow", "_"),
    };
    let kernel = queue.gpu().kernel(&SOURCE, entry)?;
    let mut arguments: Vec<Arg> = vec![
        x.into(),
        weight.into(),
        mean.into(),
        inverse_std.into(),
        dout.into(),
        Arg::optional_mut(dx),
        Arg::optional_mut(weight_partials.as_mut().map(|p| p.as_mut()).as_mut()),
        Arg::optional_mut(bias_partials.as_mut().map(|p| p.as_mut()).as_mut()),
    ];
    arguments.extend(sizes.map(Arg::from));
    arguments.push(((1.0 / head_dim as f64) as f32).into());
    arguments.extend([places.heads as u32, places.group as u32].map(Arg::from));
    let grid = [slices as u32, head_blocks as u32, 1];
    queue.launch(&kernel, Launch { grid, block: THREADS as u32, shared: 0 }, &arguments)?;
    if let (Some(dweight), Some(partials)) = (dweight, &weight_partials) {
        column_sums(queue, partials.as_ref(), parts, dweight)?;
    }
    if let (Some(dbias), Some(partials)) = (dbias, &bias_partials) {
        column_sums(queue, partials.as_ref(), parts, dbias)?;
    }
    Ok(())
}
