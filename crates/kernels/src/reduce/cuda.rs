//! Reductions on a CUDA device, in fp32; flat sums in fp64.
//!
//! Where much is reduced to little, the terms are cut into parts by the shape alone, and the parts' fp32 results are combined
//! by a second launch.

use super::Reduction;
use crate::cuda::units::*;
use crate::cuda::{Arg, DeviceMut, DeviceRef, DeviceType, DeviceView, Launch, Queue, Source, check};
use crate::error::{KernelError, Result};
use crate::strided::{Layout, check_view, count};

const SOURCE: Source = source("reduce.cu", &[UNITS, VIEWS, include_str!("../../cuda/reduce.cu")]);

/// Sources of these ops.
pub(crate) fn sources() -> Vec<Source> {
    vec![SOURCE]
}

/// Blocks that fill a large GPU a few times over.
const MANY_BLOCKS: usize = 1024;
/// Terms up to which one launch reduces columns whole.
const FEW_TERMS: usize = 2048;

/// Reduces a view over `axes` into a contiguous `out`; f32 or bf16 in, f32 or bf16 out.
///
/// # Errors
/// A view that reaches past its memory, an output of the wrong length, an axis out of range or named twice.
pub fn reduce(
    queue: &Queue,
    op: Reduction,
    shape: &[usize],
    x: DeviceView<'_>,
    axes: &[usize],
    out: &mut DeviceMut<'_>,
) -> Result<()> {
    const OP: &str = "reduce";
    check_type(OP, "x", x.data.dtype(), FLOATS)?;
    check_view(OP, "x", shape, x.strides, x.data.len())?;
    let mut is_reduced = vec![false; shape.len()];
    for &axis in axes {
        if axis >= shape.len() {
            return Err(KernelError::size(OP, "axis", format!("below {}", shape.len()), axis));
        }
        if std::mem::replace(&mut is_reduced[axis], true) {
            return Err(KernelError::size(OP, "axes", "all different", format!("{axes:?}")));
        }
    }
    let dims = |reduced: bool| {
        let is_reduced = &is_reduced;
        (0..shape.len()).filter(move |&d| is_reduced[d] == reduced).map(|d| (shape[d], [x.strides[d]]))
    };
    let sizes = |reduced| dims(reduced).map(|(n, _)| n).collect::<Vec<_>>();
    let (terms, outputs) = (count(OP, &sizes(true))?, count(OP, &sizes(false))?);
    check(OP, "out", (out.len(), out.dtype()), outputs, FLOATS)?;
    small(OP, "number of outputs", outputs)?;
    if outputs == 0 {
        return Ok(());
    }
    let plan = Plan {
        op,
        data: x.data,
        outputs,
        terms,
        kept: Layout::merged(dims(false)),
        reduced: Layout::merged(dims(true)),
    };
    plan.run(queue, out)
}

/// Adds up the rows of fp32 partial sums `[parts, out.len()]`.
pub(crate) fn column_sums(queue: &Queue, partials: DeviceRef<'_>, parts: usize, out: &mut DeviceMut<'_>) -> Result<()> {
    let width = out.len();
    let x = DeviceView { data: partials, strides: &[width, 1] };
    reduce(queue, Reduction::Sum, &[parts, width], x, &[0], out)
}

struct Plan<'a> {
    op: Reduction,
    data: DeviceRef<'a>,
    outputs: usize,
    terms: usize,
    kept: Layout<1>,
    reduced: Layout<1>,
}

impl Plan<'_> {
    fn run(&self, queue: &Queue, out: &mut DeviceMut<'_>) -> Result<()> {
        let Self { op, data, outputs, terms, kept, reduced } = self;
        let (outputs, terms) = (*outputs, *terms);
        let unit = unit_of(data.dtype());
        let ([kept_stride], [reduced_stride]) = (kept.inner_strides(), reduced.inner_strides());
        let (kept_dims, reduced_dims) = (Dims::new("reduce", kept)?, Dims::new("reduce", reduced)?);
        let along = kept.inner() == 1 || (reduced.inner() > 1 && reduced_stride <= kept_stride);
        let all_multiples = |layout: &Layout<1>, skip: usize| {
            layout.strides[..layout.strides.len() - skip].iter().all(|[s]| s.is_multiple_of(unit))
        };

        let code = match op {
            Reduction::Sum => 0u32,
            Reduction::Max => 1,
        };
        let mut arguments: Vec<Arg> = vec![(*data).into(), 0u64.into(), code.into(), (outputs as u64).into()];
        let (parts, launch) = if along {
            let rows_fit = reduced.shape.len() == 1 || reduced.inner().is_multiple_of(unit);
            let vector = reduced_stride == 1
                && rows_fit
                && is_aligned(*data, unit)
                && all_multiples(reduced, 1)
                && all_multiples(kept, 0);
            let group = if terms <= FEW_TERMS { 32 } else { 256 };
            let blocks = outputs.div_ceil(256 / group);
            let parts = (MANY_BLOCKS / blocks).min(terms / 16384).max(1);
            let per_part = terms.div_ceil(parts).next_multiple_of(8).max(8);
            let parts = terms.div_ceil(per_part).max(1);
            arguments.extend([
                Arg::from(terms as u64),
                (per_part as u64).into(),
                (group as u32).into(),
                u32::from(vector).into(),
            ]);
            (parts, Launch { grid: [blocks as u32, parts as u32, 1], block: 256, shared: 0 })
        } else {
            let fits = kept_stride == 1
                && kept.inner().is_multiple_of(unit)
                && is_aligned(*data, unit)
                && all_multiples(kept, 1)
                && all_multiples(reduced, 0);
            // Few terms: rather many blocks than wide loads.
            let vector = fits && (terms > FEW_TERMS || outputs / (32 * unit) >= MANY_BLOCKS / 8);
            let blocks = outputs.div_ceil(if vector { 32 * unit } else { 32 });
            let parts = if terms > FEW_TERMS { (MANY_BLOCKS / blocks).min(terms / 256).max(1) } else { 1 };
            let per_part = terms.div_ceil(parts).max(1);
            let parts = terms.div_ceil(per_part).max(1);
            let threads = if parts == 1 && terms >= 128 { 1024 } else { 256 };
            arguments.extend([Arg::from(terms as u64), (per_part as u64).into(), u32::from(vector).into()]);
            (parts, Launch { grid: [blocks as u32, parts as u32, 1], block: threads, shared: 0 })
        };
        kept_dims.push(&mut arguments);
        reduced_dims.push(&mut arguments);

        let target = if parts == 1 { out.dtype() } else { DeviceType::F32 };
        let entry = match along {
            true => by_types!(data.dtype(), target, "reduce_along", "_to_"),
            false => by_types!(data.dtype(), target, "reduce_across", "_to_"),
        };
        let kernel = queue.gpu().kernel(&SOURCE, entry)?;
        if parts == 1 {
            arguments[1] = out.into();
            return queue.launch(&kernel, launch, &arguments);
        }
        let mut partials = queue.scratch(DeviceType::F32, parts * outputs)?;
        arguments[1] = (&mut partials.as_mut()).into();
        queue.launch(&kernel, launch, &arguments)?;
        let combine = Plan {
            op: *op,
            data: partials.as_ref(),
            outputs,
            terms: parts,
            kept: Layout::merged([(outputs, [1])].into_iter()),
            reduced: Layout::merged([(parts, [outputs])].into_iter()),
        };
        combine.run(queue, out)
    }
}

/// `out[0] = factor * sum of x`, in fp64 until the end. `x` is f32 or bf16, `out` one f32.
///
/// # Errors
/// Other types or another length of `out`.
pub fn sum(queue: &Queue, factor: f64, x: DeviceRef<'_>, out: &mut DeviceMut<'_>) -> Result<()> {
    flat_sum(queue, "sum", by_type!(x.dtype(), "sum_partial"), factor, x, out)
}

/// `out[0] =` sum of the squares of x, in fp64 until the end. `x` is f32 or bf16, `out` one f32. NaN and infinity propagate,
/// and a sum beyond the range of f32 is infinity.
///
/// # Errors
/// Other types or another length of `out`.
pub fn sum_of_squares(queue: &Queue, x: DeviceRef<'_>, out: &mut DeviceMut<'_>) -> Result<()> {
    flat_sum(queue, "sum_of_squares", by_type!(x.dtype(), "sum_of_squares_partial"), 1.0, x, out)
}

fn flat_sum(
    queue: &Queue,
    op: &'static str,
    entry: &'static str,
    factor: f64,
    x: DeviceRef<'_>,
    out: &mut DeviceMut<'_>,
) -> Result<()> {
    check_type(op, "x", x.dtype(), FLOATS)?;
    check(op, "out", (out.len(), out.dtype()), 1, F32)?;
    let unit = unit_of(x.dtype());
    // The number of partial sums depends on the length alone, and so does the result.
    let blocks = x.len().div_ceil(unit * 256 * 4).clamp(1, 2 * MANY_BLOCKS);
    let units = vectorized(x.len(), unit, &[Some(x)]);
    // Two words for each fp64 partial sum.
    let mut partials = queue.scratch(DeviceType::U32, 2 * blocks)?;
    let partial = queue.gpu().kernel(&SOURCE, entry)?;
    let last = queue.gpu().kernel(&SOURCE, "sum_final")?;
    let shape = |blocks: usize| Launch { grid: [blocks as u32, 1, 1], block: 256, shared: 0 };
    let arguments = [x.into(), (x.len() as u64).into(), units.into(), (&mut partials.as_mut()).into()];
    queue.launch(&partial, shape(blocks), &arguments)?;
    let arguments = [partials.as_ref().into(), (blocks as u32).into(), factor.into(), out.into()];
    queue.launch(&last, shape(1), &arguments)
}
