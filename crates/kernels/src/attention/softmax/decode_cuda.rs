//! Decoding on a CUDA device: being built.

use super::decode::SoftmaxDecodeSpec;
use crate::cuda::{DeviceMut, DeviceRef, Queue};
use crate::{KernelError, Result};

/// One query against a cache.
pub fn decode(
    _: &Queue,
    _: &SoftmaxDecodeSpec,
    _: DeviceRef<'_>,
    _: DeviceRef<'_>,
    _: DeviceRef<'_>,
    _: DeviceRef<'_>,

    _: &mut DeviceMut<'_>,
) -> Result<()> {
    Err(KernelError::cuda("decoding", "not built yet"))
}
