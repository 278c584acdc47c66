//! Attention of a text's next tokens against a cache of the keys and values before them.

use super::{SoftmaxSettings, StickBreaking, StickBreakingSettings, StickBreakingWanted};
use crate::ops::{expect_shape, same_device, same_dtype, statistics};
use crate::tensor::for_float;
use crate::{Result, Tensor, TensorError};
use stickbreak_kernels::KernelError;
use stickbreak_kernels::attention::decode::{DecodeInputs, DecodeLayout};
use stickbreak_kernels::attention::softmax::decode::SoftmaxDecodeSpec;
use stickbreak_kernels::attention::stick_breaking::decode::StickBreakingDecodeSpec;
use stickbreak_kernels::attention::{softmax, stick_breaking};

/// Queries of a stick that is cut short by nothing but their scores of 0: it halves with every key, so that all of it but
/// 2^-100, which no sum feels in any of the types, is used up within 100 keys.
const SHORT_STICK_BITS: u32 = 100;

/// A text's next tokens against a cache: q `[C, Hq, D]` against keys and values `[L, Hkv, D]`, whose last C rows are the
/// queries' own tokens. Returns o `[C, Hq, D]` and rem `[C, Hq]`: the last rows of [`stick_breaking()`](super::stick_breaking()) on the whole text.
/// With early exit off, keys are left out all the same where less than 2^-100 of a stick reaches them.
///
/// # Errors
/// If shapes or dtypes do not fit.
pub fn stick_breaking_extend(
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    settings: StickBreakingSettings,
) -> Result<(Tensor, Tensor)> {
    const OP: &str = "stick_breaking_extend";
    let (&[tokens, query_heads, head_dim], &[length, ..]) = (&q.shape()[..], &keys.shape()[..]) else {
        let why = "q must be [tokens, heads, head_dim] and the cache [tokens, kv_heads, head_dim]".into();
        return Err(TensorError::ShapePair { op: OP, left: q.shape().clone(), right: keys.shape().clone(), why });
    };
    if tokens > length {
        let why = format!("the cache must hold the {tokens} tokens of q, and has {length}");
        return Err(TensorError::ShapePair { op: OP, left: q.shape().clone(), right: keys.shape().clone(), why });
    }
    let cu_seqlens = [0, i32::try_from(length).map_err(|_| KernelError::size(OP, "tokens", "below 2^31", length))?];
    let wanted = StickBreakingWanted { log2_rem: false, backward: false };
    if tokens == length {
        let StickBreaking { o, rem, .. } = super::stick_breaking(q, keys, values, &cu_seqlens, settings, wanted)?;
        return Ok((o, rem));
    }
    // The kernels have a query for every key. Those of the cached tokens are zeros here, whose sticks are used up within a
    // tile or two: all together they cost little beside queries that look far back, and nobody reads what they give.
    let cached = length - tokens;
    let all = q.new_empty([length, query_heads, head_dim], q.dtype())?;
    all.narrow(0, 0, cached)?.zero_assign()?;
    all.narrow(0, cached, tokens)?.copy_assign(q)?;
    let early_exit_bits = if settings.early_exit_bits == 0 { SHORT_STICK_BITS } else { settings.early_exit_bits };
    let settings = StickBreakingSettings { early_exit_bits, ..settings };
    let StickBreaking { o, rem, .. } = super::stick_breaking(&all, keys, values, &cu_seqlens, settings, wanted)?;
    Ok((o.narrow(0, cached, tokens)?, rem.narrow(0, cached, tokens)?))
}

/// One query token of each sequence against its cache: what both attentions' decode steps share.
struct DecodeOperands {
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: DecodeLayout,
}

impl DecodeOperands {
    fn new(op: &'static str, q: &Tensor, keys: &Tensor, values: &Tensor) -> Result<Self> {
        let (&[sequences, query_heads, head_dim], &[_, capacity, kv_heads, _]) = (&q.shape()[..], &keys.shape()[..])
        else {
            let why =
                "q must be [sequences, heads, head_dim] and the cache [sequences, tokens, kv_heads, head_dim]".into();
            return Err(TensorError::ShapePair { op, left: q.shape().clone(), right: keys.shape().clone(), why });
        };
        for (argument, tensor) in [("keys", keys), ("values", values)] {
            same_dtype(op, argument, q.dtype(), tensor)?;
            same_device(op, argument, q, tensor)?;
            expect_shape(op, argument, tensor, &[sequences, capacity, kv_heads, head_dim])?;
        }
        let (q, keys, values) = (q.contiguous()?, keys.contiguous()?, values.contiguous()?);
        let layout = DecodeLayout::contiguous(sequences, capacity, query_heads, kv_heads, head_dim);
        Ok(Self { q, keys, values, layout })
    }

    /// Every sequence's number of visible keys.
    fn lengths(&self, visible: usize) -> Vec<i32> {
        vec![visible as i32; self.layout.sequences]
    }
}

/// One decoding step of sequences of one length: q `[S, Hq, D]` against keys and values `[S, L, Hkv, D]`, whose last rows
/// are the queries' own tokens. Returns o `[S, Hq, D]` and rem `[S, Hq]`.
///
/// # Errors
/// If shapes or dtypes do not fit.
pub fn stick_breaking_decode(
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    settings: StickBreakingSettings,
) -> Result<(Tensor, Tensor)> {
    const OP: &str = "stick_breaking_decode";
    let operands = DecodeOperands::new(OP, q, keys, values)?;
    let DecodeLayout { sequences, capacity, query_heads, .. } = operands.layout;
    let visible = if settings.attend_current { capacity } else { capacity.saturating_sub(1) };
    let lengths = operands.lengths(visible);
    let spec = StickBreakingDecodeSpec {
        layout: operands.layout,
        scale: settings.scale,
        early_exit_bits: settings.early_exit_bits,
    };
    let o = q.new_empty(q.shape(), q.dtype())?;
    let rem = q.new_empty([sequences, query_heads], statistics(q.dtype()))?;
    if let Some(queue) = q.queue() {
        let lengths = queue.upload(&lengths)?;
        stick_breaking::decode_cuda::decode(
            queue,
            &spec,
            operands.q.device_ref(),
            operands.keys.device_ref(),
            operands.values.device_ref(),
            lengths.as_ref(),
            &mut o.device_mut(),
            &mut rem.device_mut(),
        )?;
        return Ok((o, rem));
    }
    for_float!(OP, q.dtype(), T => {
        let (q, k, v) = (operands.q.read::<T>()?, operands.keys.read::<T>()?, operands.values.read::<T>()?);
        let inputs = DecodeInputs { q: &q, k: &k, v: &v, lengths: &lengths };
        let (mut o, mut rem) = (o.expect_write::<T>(), rem.expect_write::<T>());
        Ok(stick_breaking::decode::decode(&spec, &inputs, &mut o, &mut rem)?)
    })?;
    Ok((o, rem))
}

/// One decoding step of softmax attention: as [`stick_breaking_decode`], but the query sees its own token too.
///
/// # Errors
/// If shapes or dtypes do not fit.
pub fn softmax_decode(q: &Tensor, keys: &Tensor, values: &Tensor, settings: &SoftmaxSettings) -> Result<Tensor> {
    const OP: &str = "softmax_decode";
    let operands = DecodeOperands::new(OP, q, keys, values)?;
    let alibi = settings.alibi_slopes.clone();
    let spec = SoftmaxDecodeSpec { layout: operands.layout, scale: settings.scale, alibi };
    let lengths = operands.lengths(operands.layout.capacity);
    let o = q.new_empty(q.shape(), q.dtype())?;
    if let Some(queue) = q.queue() {
        let lengths = queue.upload(&lengths)?;
        softmax::decode_cuda::decode(
            queue,
            &spec,
            operands.q.device_ref(),
            operands.keys.device_ref(),
            operands.values.device_ref(),
            lengths.as_ref(),
            &mut o.device_mut(),
        )?;
        return Ok(o);
    }
    for_float!(OP, q.dtype(), T => {
        let (q, k, v) = (operands.q.read::<T>()?, operands.keys.read::<T>()?, operands.values.read::<T>()?);
        let inputs = DecodeInputs { q: &q, k: &k, v: &v, lengths: &lengths };
        Ok(softmax::decode::decode(&spec, &inputs, &mut o.expect_write::<T>())?)
    })?;
    Ok(o)
}
