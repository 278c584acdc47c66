//! Cross-entropy of rows of logits on a CUDA device, f32 or bf16.
//!
//! Labels are on the device and are not read by the host: one that is neither [`super::IGNORE_INDEX`] nor a class gives a
//! loss of NaN and no gradient.

use crate::cuda::units::*;
use crate::cuda::{DeviceMut, DeviceRef, DeviceType, Launch, Queue, Source, check};
use crate::error::{KernelError, Result};
use crate::matmul::cuda::matmul;
use crate::matmul::{MatmulSpec, MatrixStrides};
use crate::strided::check_view;

use super::LinearCrossEntropySpec;

const OP: &str = "linear_cross_entropy";
const SOURCE: Source = source("cross_entropy.cu", &[UNITS, include_str!("../../cuda/cross_entropy.cu")]);

/// Sources of this op.
pub(crate) fn sources() -> Vec<Source> {
    vec![SOURCE]
}

/// Threads of a row.
const THREADS: u32 = 512;

/// Rows of logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowsSpec {
    /// Number of rows.
    pub rows: usize,
    /// Number of classes.
    pub vocabulary: usize,
    /// Elements from one row to the next, at least the vocabulary.
    pub stride: usize,
    /// Factor on the logits.
    pub logit_scale: f64,
}

impl RowsSpec {
    fn check(&self, logits: DeviceRef<'_>, labels: DeviceRef<'_>, losses: DeviceRef<'_>) -> Result<u32> {
        check_type(OP, "logits", logits.dtype(), FLOATS)?;
        if self.stride < self.vocabulary {
            return Err(KernelError::size(OP, "row stride", format!("at least {}", self.vocabulary), self.stride));
        }
        check_view(OP, "logits", &[self.rows, self.vocabulary], &[self.stride, 1], logits.len())?;
        check(OP, "labels", (labels.len(), labels.dtype()), self.rows, &[DeviceType::I32])?;
        check(OP, "losses", (losses.len(), losses.dtype()), self.rows, F32)?;
        small(OP, "rows", self.rows)?;
        small(OP, "vocabulary", self.vocabulary)
    }

    fn wide(&self, logits: DeviceRef<'_>) -> bool {
        let unit = unit_of(logits.dtype());
        is_aligned(logits, unit) && self.stride.is_multiple_of(unit)
    }

    fn launch(&self) -> Launch {
        Launch { grid: [self.rows as u32, 1, 1], block: THREADS, shared: 0 }
    }
}

/// Writes the loss of every row, in nats.
///
/// # Errors
/// Memory that is too short, or of another type.
pub fn row_losses(
    queue: &Queue,
    spec: &RowsSpec,
    logits: DeviceRef<'_>,
    labels: DeviceRef<'_>,
    losses: &mut DeviceMut<'_>,
) -> Result<()> {
    let vocabulary = spec.check(logits, labels, losses.as_ref())?;
    let entry = match spec.wide(logits) {
        true => by_type!(logits.dtype(), "cross_entropy_loss"),
        false => by_type!(logits.dtype(), "cross_entropy_loss_narrow"),
    };
    let kernel = queue.gpu().kernel(&SOURCE, entry)?;
    let (stride, scale) = (spec.stride as u64, spec.logit_scale as f32);
    let arguments = [logits.into(), labels.into(), losses.into(), vocabulary.into(), stride.into(), scale.into()];
    queue.launch(&kernel, spec.launch(), &arguments)
}

/// Writes the loss of every row, in nats, and replaces the logits by
/// `logit_scale * gradient_scale * (softmax - onehot)`, 0 where the label is ignored: the gradient of `gradient_scale` times
/// the sum of the losses. What lies between the rows is left alone.
///
/// # Errors
/// Memory that is too short, or of another type.
pub fn row_gradients(
    queue: &Queue,
    spec: &RowsSpec,
    gradient_scale: f64,
    logits: &mut DeviceMut<'_>,
    labels: DeviceRef<'_>,
    losses: &mut DeviceMut<'_>,
) -> Result<()> {
    let vocabulary = spec.check(logits.as_ref(), labels, losses.as_ref())?;
    let entry = match spec.wide(logits.as_ref()) {
        true => by_type!(logits.dtype(), "cross_entropy_gradient"),
        false => by_type!(logits.dtype(), "cross_entropy_gradient_narrow"),
    };
    let kernel = queue.gpu().kernel(&SOURCE, entry)?;
    let (stride, scale) = (spec.stride as u64, spec.logit_scale as f32);
    let arguments = [
        logits.into(),
        labels.into(),
        losses.into(),
        vocabulary.into(),
        stride.into(),
        scale.into(),
        ((spec.logit_scale * gradient_scale) as f32).into(),
    ];
    queue.launch(&kernel, spec.launch(), &arguments)
}

/// Linear layer and cross-entropy in one, in chunks of tokens; see [`super`]. hidden and weight are both bf16 or both f32,
/// losses f32, dhidden of hidden's type, dweight f32. The gradients are those of `gradient_scale` times the sum of the losses.
/// Logits are held, for one chunk, in hidden's type.
///
/// # Errors
/// Memory whose length is not that of the spec, or of another type.
pub fn forward(
    queue: &Queue,
    spec: &LinearCrossEntropySpec,
    gradient_scale: f64,
    hidden: DeviceRef<'_>,
    weight: DeviceRef<'_>,
    labels: DeviceRef<'_>,
    losses: &mut DeviceMut<'_>,
    mut dhidden: Option<&mut DeviceMut<'_>>,
    mut dweight: Option<&mut DeviceMut<'_>>,
) -> Result<()> {
    let LinearCrossEntropySpec { tokens, width, vocabulary, logit_scale, chunk } = *spec;
    let dtype = hidden.dtype();
    check(OP, "hidden", (hidden.len(), dtype), tokens * width, FLOATS)?;
    check(OP, "weight", (weight.len(), weight.dtype()), vocabulary * width, &[dtype])?;
    check(OP, "labels", (labels.len(), labels.dtype()), tokens, &[DeviceType::I32])?;
    check(OP, "losses", (losses.len(), losses.dtype()), tokens, &[DeviceType::F32])?;
    if let Some(dhidden) = &dhidden {
        check(OP, "dhidden", (dhidden.len(), dhidden.dtype()), tokens * width, &[dtype])?;
    }
    if let Some(dweight) = &dweight {
        check(OP, "dweight", (dweight.len(), dweight.dtype()), vocabulary * width, &[DeviceType::F32])?;
    }
    if chunk == 0 {
        return Err(KernelError::size(OP, "chunk", "at least 1", chunk));
    }
    if tokens == 0 {
        return dweight.map_or(Ok(()), |dweight| queue.zero(dweight));
    }
    let mut logits = queue.scratch(dtype, chunk.min(tokens) * vocabulary)?;
    for start in (0..tokens).step_by(chunk) {
        let rows = chunk.min(tokens - start);
        let hidden = hidden.slice(start * width..(start + rows) * width);
        let labels = labels.slice(start..start + rows);
        let mut losses = losses.slice_mut(start..start + rows);
        let mut logits = logits.as_mut();
        let mut logits = logits.slice_mut(0..rows * vocabulary);
        // logits = hidden weight^T
        let (h, w) = (MatrixStrides::row_major(rows, width), MatrixStrides::row_major(vocabulary, width));
        let l = MatrixStrides::row_major(rows, vocabulary);
        let forward = MatmulSpec { batch: 1, m: rows, n: vocabulary, k: width, a: h, b: w.transposed(), c: l };
        matmul(queue, &forward, 1.0, hidden, weight, 0.0, &mut logits)?;
        let rows_spec = RowsSpec { rows, vocabulary, stride: vocabulary, logit_scale };
        if dhidden.is_none() && dweight.is_none() {
            row_losses(queue, &rows_spec, logits.as_ref(), labels, &mut losses)?;
            continue;
        }
        row_gradients(queue, &rows_spec, gradient_scale, &mut logits, labels, &mut losses)?;
        if let Some(dhidden) = dhidden.as_deref_mut() {
            // dhidden = dlogits weight
            let product = MatmulSpec { batch: 1, m: rows, n: width, k: vocabulary, a: l, b: w, c: h };
            let mut part = dhidden.slice_mut(start * width..(start + rows) * width);
            matmul(queue, &product, 1.0, logits.as_ref(), weight, 0.0, &mut part)?;
        }
        if let Some(dweight) = dweight.as_deref_mut() {
            // dweight += dlogits^T hidden
            let product = MatmulSpec { batch: 1, m: vocabulary, n: width, k: rows, a: l.transposed(), b: h, c: w };
            let beta = if start == 0 { 0.0 } else { 1.0 };
            matmul(queue, &product, 1.0, logits.as_ref(), hidden, beta, dweight)?;
        }
    }
    Ok(())
}
