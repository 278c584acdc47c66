//! Stick-breaking attention on a CUDA device: the place of its plan, which is being built.

use super::StickBreakingSpec;
use crate::cuda::{DeviceMut, DeviceRef, DeviceType, Queue};
use crate::{KernelError, Result};

/// Prepared attention.
#[derive(Debug)]
pub struct Plan {}

/// State between the passes.
#[derive(Debug)]
pub struct Saved {}

fn missing<T>() -> Result<T> {
    Err(KernelError::cuda("stick-breaking attention", "not built yet"))
}

impl Saved {
    /// Counts.
    pub fn visited_tiles(&self, _: &Queue) -> Result<(Vec<u64>, u64)> {
        missing()
    }
}

impl Plan {
    /// Prepares.
    pub fn new(_: &Queue, _: &StickBreakingSpec, _: &[i32], _: DeviceType) -> Result<Self> {
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
        _: Option<&mut DeviceMut<'_>>,
        _: Option<&mut DeviceMut<'_>>,
        _: bool,
    ) -> Result<Option<Saved>> {
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
        _: Option<DeviceRef<'_>>,
        _: &Saved,
        _: &mut DeviceMut<'_>,
        _: &mut DeviceMut<'_>,
        _: &mut DeviceMut<'_>,
    ) -> Result<()> {
        missing()
    }
}
