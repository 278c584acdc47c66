//! [`decode`](super::decode::decode) on the GPU.

use super::decode::StickBreakingDecodeSpec;
use crate::attention::decode_cuda::Call;
use crate::cuda::{DeviceMut, DeviceRef, Queue};
use crate::{KernelError, Result};

const OP: &str = "stick-breaking attention, decode on CUDA";

/// Writes o `[sequences, query_heads, head_dim]`, f32 or bf16 as q, k and v are, and rem `[sequences, query_heads]`, f32,
/// both contiguous. Every cache is read in pieces by many blocks; with early exit each piece stops on its own.
///
/// `lengths`, i32 `[sequences]`, are the numbers of cached keys that each query sees; they are on the device, so they are
/// not checked but cut to 0 .. capacity.
///
/// # Errors
/// Views that do not fit the layout (nothing is launched then), or a failure of the device.
pub fn decode(
    queue: &Queue,
    spec: &StickBreakingDecodeSpec,
    q: DeviceRef<'_>,
    k: DeviceRef<'_>,
    v: DeviceRef<'_>,
    lengths: DeviceRef<'_>,
    o: &mut DeviceMut<'_>,
    rem: &mut DeviceMut<'_>,
) -> Result<()> {
    if !spec.scale.is_finite() {
        return Err(KernelError::size(OP, "scale", "finite", spec.scale));
    }
    let call = Call {
        op: OP,
        entries: [
            ["stick_breaking_decode_f32", "stick_breaking_decode_bf16"],
            ["stick_breaking_join_f32", "stick_breaking_join_bf16"],
        ],
        layout: &spec.layout,
        scale: spec.scale,
        threshold: super::cpu::early_exit_threshold(spec.early_exit_bits),
        slopes: None,
        q,
        k,
        v,
        lengths,
    };
    call.run(queue, o, Some(rem))
}
