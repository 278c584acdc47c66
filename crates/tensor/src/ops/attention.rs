//! Attention over packed documents: q `[T, Hq, D]`, k and v `[T, Hkv, D]`, `cu_seqlens` as in
//! [`stickbreak_kernels::attention`]. Tokens may be strided (views into one projection of q, k and v); the heads of a
//! token must lie together.

use super::{expect_shape, same_device, same_dtype, statistics};
use crate::cuda::device_type;
use crate::tensor::for_float;
use crate::{DType, Device, Result, Tensor, TensorError};
use plans::PlanCache;
use std::sync::Arc;
use stickbreak_kernels::KernelError;
use stickbreak_kernels::attention::softmax::{self, SoftmaxSpec};
use stickbreak_kernels::attention::stick_breaking::{self, StickBreakingOutputs, StickBreakingSpec};
use stickbreak_kernels::attention::{AttentionGradients, AttentionInputs, AttentionLayout};
use stickbreak_kernels::cuda::Queue;

pub use decode::{softmax_decode, stick_breaking_decode, stick_breaking_extend};
pub use stickbreak_kernels::attention::softmax::alibi_slopes;

mod decode;
mod plans;

/// What the backward pass of stick-breaking attention needs of the forward pass besides its inputs.
#[derive(Debug)]
pub enum StickBreakingSaved {
    /// On the CPU.
    Cpu(stick_breaking::StickBreakingSaved),
    /// On a CUDA device; nothing if the backward pass was not asked for.
    Cuda {
        /// The state, in device memory.
        saved: Option<stick_breaking::cuda::Saved>,
        /// The device's number.
        ordinal: usize,
    },
}

impl StickBreakingSaved {
    /// How many tiles the forward pass visited; nobody waits for it.
    ///
    /// # Errors
    /// If the device fails, or nothing was saved.
    pub fn count_tiles(&self) -> Result<TileCount> {
        Ok(match self {
            Self::Cpu(saved) => {
                TileCount::Cpu { visited: saved.visited_tiles().to_vec(), causal: saved.causal_tiles() }
            }
            Self::Cuda { saved, ordinal } => {
                let saved = saved.as_ref().ok_or_else(nothing_saved)?;
                TileCount::Cuda { count: saved.count_tiles(&crate::cuda::queue(*ordinal)?)?, ordinal: *ordinal }
            }
        })
    }

    /// The type in which the remainder and its gradient are computed, for inputs of a type.
    pub fn remainder_type(dtype: DType) -> DType {
        statistics(dtype)
    }
}

fn nothing_saved() -> TensorError {
    KernelError::size("stick_breaking_attention", "the forward pass", "run with `backward`", "without").into()
}

/// How many tiles a forward pass visited; on a CUDA device until it is read. Smaller than what the pass saved, and
/// independent of it.
#[derive(Debug)]
pub enum TileCount {
    /// On the CPU.
    Cpu {
        /// For each query head the (query tile, key tile) pairs visited.
        visited: Vec<u64>,
        /// Those of one head that hold a visible key.
        causal: u64,
    },
    /// On a CUDA device.
    Cuda {
        /// One number a head, in device memory.
        count: stick_breaking::tiles_cuda::TileCount,
        /// The device's number.
        ordinal: usize,
    },
}

impl TileCount {
    /// For each query head how many (query tile, key tile) pairs were visited, and how many of one head hold a visible key.
    /// Waits for the device.
    ///
    /// # Errors
    /// If the device fails.
    pub fn read(&self) -> Result<(Vec<u64>, u64)> {
        match self {
            Self::Cpu { visited, causal } => Ok((visited.clone(), *causal)),
            Self::Cuda { count, ordinal } => Ok(count.read(&crate::cuda::queue(*ordinal)?)?),
        }
    }

    /// For each query head the share of the tiles that early exit left out, 0 to 1; 0 where no key is visible at all.
    /// Waits for the device.
    ///
    /// # Errors
    /// If the device fails.
    pub fn skipped(&self) -> Result<Vec<f64>> {
        let (visited, causal) = self.read()?;
        let share = |visited: u64| if causal == 0 { 0.0 } else { (causal - visited) as f64 / causal as f64 };
        Ok(visited.into_iter().map(share).collect())
    }
}

/// What a forward pass of stick-breaking attention is asked for besides output and remainder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StickBreakingWanted {
    /// The binary logarithm of the remainder.
    pub log2_rem: bool,
    /// What a backward pass needs.
    pub backward: bool,
}

/// Scale, mask and early exit of stick-breaking attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StickBreakingSettings {
    /// Factor of q.k.
    pub scale: f64,
    /// Whether a token sees its own key.
    pub attend_current: bool,
    /// Keys are skipped once every row of a tile has less than 2^-k of its stick left; 0 never skips.
    pub early_exit_bits: u32,
}

/// Scale and position bias of causal softmax attention.
#[derive(Debug, Clone, PartialEq)]
pub struct SoftmaxSettings {
    /// Factor of q.k.
    pub scale: f64,
    /// Bias `-slope_h * (i - j)` of each query head (ALiBi), if any.
    pub alibi_slopes: Option<Vec<f64>>,
}

/// What stick-breaking attention returns.
#[derive(Debug, Clone)]
pub struct StickBreaking {
    /// Output, `[T, Hq, D]`.
    pub o: Tensor,
    /// What is left of each query's stick, `[T, Hq]`.
    pub rem: Tensor,
    /// Its binary logarithm, finite where `rem` underflows, `[T, Hq]`, if it was asked for.
    pub log2_rem: Option<Tensor>,
    /// What the backward pass needs beside the inputs, and how many tiles were visited.
    pub saved: Arc<StickBreakingSaved>,
}

/// Row-major within a token: strides `[anything, D, 1]`. A copy if it is not so.
fn token_strided(tensor: &Tensor) -> Result<Tensor> {
    let (shape, strides) = (tensor.shape(), tensor.strides());
    let heads_together = (shape[2] == 1 || strides[2] == 1)
        && (shape[1] == 1 || strides[1] == shape[2])
        && strides[0] >= shape[1] * shape[2];
    if heads_together || tensor.is_contiguous() { Ok(tensor.clone()) } else { tensor.copy() }
}

struct Operands {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
}

impl Operands {
    fn new(op: &'static str, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Self> {
        let (&[tokens, query_heads, head_dim], &[_, kv_heads, _]) = (&q.shape()[..], &k.shape()[..]) else {
            let why = "q must be [tokens, heads, head_dim] and k [tokens, kv_heads, head_dim]".into();
            return Err(TensorError::ShapePair { op, left: q.shape().clone(), right: k.shape().clone(), why });
        };
        for (argument, tensor) in [("k", k), ("v", v)] {
            same_dtype(op, argument, q.dtype(), tensor)?;
            same_device(op, argument, q, tensor)?;
            expect_shape(op, argument, tensor, &[tokens, kv_heads, head_dim])?;
        }
        let (q, k, v) = (token_strided(q)?, token_strided(k)?, token_strided(v)?);
        let stride = |t: &Tensor, heads: usize| if tokens <= 1 { heads * head_dim } else { t.strides()[0] };
        let layout = AttentionLayout {
            query_stride: stride(&q, query_heads),
            key_stride: stride(&k, kv_heads),
            value_stride: stride(&v, kv_heads),
            ..AttentionLayout::contiguous(tokens, query_heads, kv_heads, head_dim)
        };
        Ok(Self { q, k, v, layout })
    }

    fn gradients(&self) -> Result<[Tensor; 3]> {
        let empty = |t: &Tensor| t.new_empty(t.shape(), t.dtype());
        Ok([empty(&self.q)?, empty(&self.k)?, empty(&self.v)?])
    }
}

/// Stick-breaking attention (arXiv 2410.17980, equation 2).
///
/// # Errors
/// If shapes, dtypes or document offsets do not fit.
pub fn stick_breaking(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    cu_seqlens: &[i32],
    settings: StickBreakingSettings,
    wanted: StickBreakingWanted,
) -> Result<StickBreaking> {
    const OP: &str = "stick_breaking_attention";
    let operands = Operands::new(OP, q, k, v)?;
    let spec = spec(&operands.layout, settings);
    let heads = [operands.layout.tokens, operands.layout.query_heads];
    let o = q.new_empty(q.shape(), q.dtype())?;
    let rem = q.new_empty(heads, statistics(q.dtype()))?;
    let log2_rem = wanted.log2_rem.then(|| q.new_empty(heads, statistics(q.dtype()))).transpose()?;
    if let (Some(queue), Device::Cuda(ordinal)) = (q.queue(), q.device()) {
        let plan = STICK_BREAKING_PLANS.get(ordinal, q.dtype(), cu_seqlens, &spec, || {
            stick_breaking::cuda::Plan::new(queue, &spec, cu_seqlens, device_type(OP, q.dtype())?).map_err(Into::into)
        })?;
        let (mut rem_out, mut log2_out) = (rem.device_mut(), log2_rem.as_ref().map(Tensor::device_mut));
        let saved = plan.forward(
            queue,
            operands.q.device_ref(),
            operands.k.device_ref(),
            operands.v.device_ref(),
            &mut o.device_mut(),
            Some(&mut rem_out),
            log2_out.as_mut(),
            wanted.backward,
        )?;
        let saved = Arc::new(StickBreakingSaved::Cuda { saved, ordinal });
        return Ok(StickBreaking { o, rem, log2_rem, saved });
    }
    let saved = for_float!(OP, q.dtype(), T => {
        let (q, k, v) = (operands.q.read::<T>()?, operands.k.read::<T>()?, operands.v.read::<T>()?);
        let (mut o, mut rem) = (o.expect_write::<T>(), rem.expect_write::<T>());
        let mut log2 = log2_rem.as_ref().map(|t| t.expect_write::<T>());
        let inputs = AttentionInputs { q: &q, k: &k, v: &v, cu_seqlens };
        let outputs = StickBreakingOutputs { o: &mut o, rem: Some(&mut rem), log2_rem: log2.as_deref_mut() };
        Ok(stick_breaking::cpu::forward(&spec, &inputs, outputs)?)
    })?;
    Ok(StickBreaking { o, rem, log2_rem, saved: Arc::new(StickBreakingSaved::Cpu(saved)) })
}

static STICK_BREAKING_PLANS: PlanCache<StickBreakingSpec, stick_breaking::cuda::Plan> = PlanCache::new();
static SOFTMAX_PLANS: PlanCache<SoftmaxSpec, softmax::cuda::Plan> = PlanCache::new();

fn spec(layout: &AttentionLayout, settings: StickBreakingSettings) -> StickBreakingSpec {
    StickBreakingSpec {
        layout: *layout,
        scale: settings.scale,
        attend_current: settings.attend_current,
        early_exit_bits: settings.early_exit_bits,
    }
}

/// Gradients of [`stick_breaking()`] with respect to q, k and v, given those of o and, if it was used, of rem.
///
/// # Errors
/// If shapes, dtypes or document offsets do not fit, or `saved` is another call's.
#[expect(clippy::too_many_arguments, reason = "the inputs of the forward pass and the gradients of its outputs")]
pub fn stick_breaking_backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    cu_seqlens: &[i32],
    settings: StickBreakingSettings,
    saved: &StickBreakingSaved,
    output_gradient: &Tensor,
    rem_gradient: Option<&Tensor>,
) -> Result<[Tensor; 3]> {
    const OP: &str = "stick_breaking_attention_backward";
    let operands = Operands::new(OP, q, k, v)?;
    expect_shape(OP, "output gradient", output_gradient, q.shape())?;
    same_dtype(OP, "output gradient", q.dtype(), output_gradient)?;
    let spec = spec(&operands.layout, settings);
    let output_gradient = output_gradient.contiguous()?;
    let (tokens, heads) = (operands.layout.tokens, operands.layout.query_heads);
    if let Some(rem_gradient) = rem_gradient {
        expect_shape(OP, "remainder gradient", rem_gradient, &[tokens, heads])?;
        same_dtype(OP, "remainder gradient", statistics(q.dtype()), rem_gradient)?;
        same_device(OP, "remainder gradient", q, rem_gradient)?;
    }
    let rem_gradient = rem_gradient.map(Tensor::contiguous).transpose()?;
    let (elements, rows) = (q.elements(), tokens * heads);
    let [dq, dk, dv] = operands.gradients()?;
    let saved = match saved {
        StickBreakingSaved::Cpu(saved) => saved,
        StickBreakingSaved::Cuda { saved, ordinal } => {
            same_device(OP, "output gradient", q, &output_gradient)?;
            let (saved, queue) = (saved.as_ref().ok_or_else(nothing_saved)?, crate::cuda::queue(*ordinal)?);
            let plan = STICK_BREAKING_PLANS.get(*ordinal, q.dtype(), cu_seqlens, &spec, || {
                stick_breaking::cuda::Plan::new(&queue, &spec, cu_seqlens, device_type(OP, q.dtype())?)
                    .map_err(Into::into)
            })?;
            plan.backward(
                &queue,
                operands.q.device_ref(),
                operands.k.device_ref(),
                operands.v.device_ref(),
                output_gradient.device_ref(),
                rem_gradient.as_ref().map(Tensor::device_ref),
                saved,
                &mut dq.device_mut(),
                &mut dk.device_mut(),
                &mut dv.device_mut(),
            )?;
            return Ok([dq, dk, dv]);
        }
    };
    for_float!(OP, q.dtype(), T => {
        let (q, k, v) = (operands.q.read::<T>()?, operands.k.read::<T>()?, operands.v.read::<T>()?);
        let (d_o, drem) = (output_gradient.read::<T>()?, rem_gradient.as_ref().map(|t| t.read::<T>()).transpose()?);
        let (mut dq, mut dk, mut dv) = (dq.expect_write::<T>(), dk.expect_write::<T>(), dv.expect_write::<T>());
        let inputs = AttentionInputs { q: &q, k: &k, v: &v, cu_seqlens };
        let gradients = AttentionGradients { dq: &mut dq, dk: &mut dk, dv: &mut dv };
        let drem = drem.as_ref().map(|t| &t[..rows]);
        Ok(stick_breaking::cpu::backward(&spec, &inputs, &d_o[..elements], drem, saved, gradients)?)
    })?;
    Ok([dq, dk, dv])
}

/// Causal softmax attention; returns the output and each row's log of the sum of exponentials, `[T, Hq]`.
///
/// # Errors
/// If shapes, dtypes or document offsets do not fit.
pub fn softmax(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    cu_seqlens: &[i32],
    settings: &SoftmaxSettings,
) -> Result<(Tensor, Tensor)> {
    const OP: &str = "softmax_attention";
    let operands = Operands::new(OP, q, k, v)?;
    let o = q.new_empty(q.shape(), q.dtype())?;
    let lse = q.new_empty([operands.layout.tokens, operands.layout.query_heads], statistics(q.dtype()))?;
    let spec = softmax_spec(&operands.layout, settings);
    if let (Some(queue), Device::Cuda(ordinal)) = (q.queue(), q.device()) {
        let plan = softmax_plan(OP, queue, ordinal, q.dtype(), cu_seqlens, &spec)?;
        let (q, k, v) = (operands.q.device_ref(), operands.k.device_ref(), operands.v.device_ref());
        plan.forward(queue, q, k, v, &mut o.device_mut(), &mut lse.device_mut())?;
        return Ok((o, lse));
    }
    for_float!(OP, q.dtype(), T => {
        let (q, k, v) = (operands.q.read::<T>()?, operands.k.read::<T>()?, operands.v.read::<T>()?);
        let inputs = AttentionInputs { q: &q, k: &k, v: &v, cu_seqlens };
        Ok(softmax::cpu::forward(&spec, &inputs, &mut o.expect_write::<T>(), &mut lse.expect_write::<T>())?)
    })?;
    Ok((o, lse))
}

fn softmax_plan(
    op: &'static str,
    queue: &Queue,
    ordinal: usize,
    dtype: DType,
    cu_seqlens: &[i32],
    spec: &SoftmaxSpec,
) -> Result<Arc<softmax::cuda::Plan>> {
    SOFTMAX_PLANS.get(ordinal, dtype, cu_seqlens, spec, || {
        softmax::cuda::Plan::new(queue, spec, cu_seqlens, device_type(op, dtype)?).map_err(Into::into)
    })
}

fn softmax_spec(layout: &AttentionLayout, settings: &SoftmaxSettings) -> SoftmaxSpec {
    SoftmaxSpec { layout: *layout, scale: settings.scale, alibi: settings.alibi_slopes.clone() }
}

/// Gradients of [`softmax()`] with respect to q, k and v.
///
/// # Errors
/// If shapes, dtypes or document offsets do not fit.
pub fn softmax_backward(
    qkv: [&Tensor; 3],
    cu_seqlens: &[i32],
    settings: &SoftmaxSettings,
    (o, lse): (&Tensor, &Tensor),
    output_gradient: &Tensor,
) -> Result<[Tensor; 3]> {
    const OP: &str = "softmax_attention_backward";
    let [q, k, v] = qkv;
    let operands = Operands::new(OP, q, k, v)?;
    expect_shape(OP, "output gradient", output_gradient, q.shape())?;
    same_dtype(OP, "output gradient", q.dtype(), output_gradient)?;
    expect_shape(OP, "output", o, q.shape())?;
    expect_shape(OP, "log of sums", lse, &[operands.layout.tokens, operands.layout.query_heads])?;
    let (o, lse, output_gradient) = (o.contiguous()?, lse.contiguous()?, output_gradient.contiguous()?);
    let spec = softmax_spec(&operands.layout, settings);
    let (elements, rows) = (q.elements(), lse.elements());
    let [dq, dk, dv] = operands.gradients()?;
    if let (Some(queue), Device::Cuda(ordinal)) = (q.queue(), q.device()) {
        for (argument, tensor) in [("output", &o), ("log of sums", &lse), ("output gradient", &output_gradient)] {
            same_device(OP, argument, q, tensor)?;
        }
        let plan = softmax_plan(OP, queue, ordinal, q.dtype(), cu_seqlens, &spec)?;
        plan.backward(
            queue,
            operands.q.device_ref(),
            operands.k.device_ref(),
            operands.v.device_ref(),
            o.device_ref(),
            lse.device_ref(),
            output_gradient.device_ref(),
            &mut dq.device_mut(),
            &mut dk.device_mut(),
            &mut dv.device_mut(),
        )?;
        return Ok([dq, dk, dv]);
    }
    for_float!(OP, q.dtype(), T => {
        let (q, k, v) = (operands.q.read::<T>()?, operands.k.read::<T>()?, operands.v.read::<T>()?);
        let (o, lse, d_o) = (o.read::<T>()?, lse.read::<T>()?, output_gradient.read::<T>()?);
        let (mut dq, mut dk, mut dv) = (dq.expect_write::<T>(), dk.expect_write::<T>(), dv.expect_write::<T>());
        let inputs = AttentionInputs { q: &q, k: &k, v: &v, cu_seqlens };
        let gradients = AttentionGradients { dq: &mut dq, dk: &mut dk, dv: &mut dv };
        Ok(softmax::cpu::backward(&spec, &inputs, &o[..elements], &lse[..rows], &d_o[..elements], gradients)?)
    })?;
    Ok([dq, dk, dv])
}

/// The dense attention weights of one document, `[Hq, T, T]` (row = query, column = key): for pictures of short texts.
///
/// # Errors
/// If shapes or dtypes do not fit.
pub fn stick_breaking_weights(q: &Tensor, k: &Tensor, settings: StickBreakingSettings) -> Result<Tensor> {
    const OP: &str = "stick_breaking_weights";
    if q.queue().is_some() {
        let on_host = |t: &Tensor| t.to_device(Device::Cpu)?.to_dtype(DType::F32);
        return stick_breaking_weights(&on_host(q)?, &on_host(k)?, settings);
    }
    let operands = Operands::new(OP, q, k, k)?;
    let AttentionLayout { tokens, query_heads, .. } = operands.layout;
    let spec = spec(&operands.layout, settings);
    for_float!(OP, q.dtype(), T => {
        let (q, k) = (operands.q.read::<T>()?, operands.k.read::<T>()?);
        let inputs = AttentionInputs { q: &q, k: &k, v: &k, cu_seqlens: &[0, tokens as i32] };
        let mut weights = Vec::with_capacity(query_heads * tokens * tokens);
        for head in 0..query_heads {
            weights.extend(stick_breaking::reference::attention_weights(&spec, &inputs, 0, head)?);
        }
        Tensor::from_vec(weights, [query_heads, tokens, tokens])
    })
}
