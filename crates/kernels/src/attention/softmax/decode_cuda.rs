//! [`decode`](super::decode::decode) on the GPU.

use super::decode::SoftmaxDecodeSpec;
use crate::Result;
use crate::attention::decode_cuda::Call;
use crate::cuda::{DeviceMut, DeviceRef, Queue, Scratch};

const OP: &str = "softmax attention, decode on CUDA";

/// Writes o `[sequences, query_heads, head_dim]`, contiguous, f32 or bf16 as q, k and v are. A sequence of length 0 gets
/// zeros. Every cache is read in pieces by many blocks.
///
/// `lengths`, i32 `[sequences]`, are the numbers of cached keys that each query sees; they are on the device, so they are
/// not checked but cut to 0 .. capacity.
///
/// # Errors
/// Views that do not fit the layout (nothing is launched then), or a failure of the device.
pub fn decode(
    queue: &Queue,
    spec: &SoftmaxDecodeSpec,
    q: DeviceRef<'_>,
    k: DeviceRef<'_>,
    v: DeviceRef<'_>,
    lengths: DeviceRef<'_>,
    o: &mut DeviceMut<'_>,
) -> Result<()> {
    super::check_scores(OP, spec.scale, spec.alibi.as_deref(), spec.layout.query_heads)?;
    let slopes = spec.alibi.as_ref().map(|slopes| slopes.iter().map(|&slope| slope as f32).collect::<Vec<_>>());
    let slopes = slopes.map(|slopes| queue.upload(&slopes)).transpose()?;
    let call = Call {
        op: OP,
        entries: [["softmax_decode_f32", "softmax_decode_bf16"], ["softmax_join_f32", "softmax_join_bf16"]],
        layout: &spec.layout,
        scale: spec.scale,
        threshold: 0.0,
        slopes: slopes.as_ref().map(Scratch::as_ref),
        q,
        k,
        v,
        lengths,
    };
    call.run(queue, o, None)
}
