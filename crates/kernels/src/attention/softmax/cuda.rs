//! Softmax attention on a CUDA device: the place of its plan, which is being built.

use super::SoftmaxSpec;
use crate::cuda::{DeviceMut, DeviceRef, DeviceType, Queue};
use crate::{KernelError, Result};

/// Prepared attention.
#[derive(Debug)]
pub struct Plan {}

fn missing<T>() -> Result<T> {
    Err(KernelError::cuda("softmax attention", "not built yet"))
}

impl Plan {
    /// Prepares.
    pub fn new(_: &Queue, _: &SoftmaxSpec, _: &[i32], _: DeviceType) -> Result<Self> {
        missing()
    }
    /// Forward pass.
    pub fn forward(
        &self,
        _: &Queue,
        _: DeviceRef<'_>,
        _: DeviceRef<'_>,
        _: DeviceRef<'_>,
        _: &mut DeviceMut<'_>,
        _: &mut DeviceMut<'_>,
    ) -> Result<()> {
        missing()
    }
    /// Backward pass.
    pub fn backward(
        &self,
        _: &Queue,
        _: DeviceRef<'_>,
        _: DeviceRef<'_>,
        _: DeviceRef<'_>,
        _: DeviceRef<'_>,
        _: DeviceRef<'_>,
        _: DeviceRef<'_>,
        _: &mut DeviceMut<'_>,
        _: &mut DeviceMut<'_>,
        _: &mut DeviceMut<'_>,
    ) -> Result<()> {
        missing()
    }
}
