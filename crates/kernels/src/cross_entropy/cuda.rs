//! Cross-entropy of rows of logits on a CUDA device, f32 or bf16.
//!
//! Labels are on the device and are not read by the host: one that is neither [`super::IGNORE_INDEX`] nor a class gives a
//! loss of NaN and no gradient.

use crate::cuda::units::*;
use crate::cuda::{DeviceMut, DeviceRef, DeviceType, Launch, Queue, Source, check};
use crate::error::{KernelError, Result};
use crate::strided::check_view;

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
