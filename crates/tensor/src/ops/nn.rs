//! The ops of a transformer that are more than arithmetic on elements. Forward and backward passes stand side by side:
//! what a forward returns beside its output is what its backward takes.

use super::{expect_shape, not_aliased, same_device, same_dtype, statistics};
use crate::tensor::for_float;
use crate::{DType, Result, Tensor, TensorError};
use stickbreak_kernels::cuda::DeviceMut;
use stickbreak_kernels::{adamw, cross_entropy, embedding, group_norm, rms_norm, rope, swiglu};

pub use stickbreak_kernels::adamw::AdamW;
pub use stickbreak_kernels::cross_entropy::IGNORE_INDEX;

/// Which gradients a backward pass computes: one flag an input, in the order of the forward's arguments.
pub type Wanted<const N: usize> = [bool; N];

/// `Some(write guard)` as the kernels take optional outputs.
macro_rules! optional_output {
    ($tensor:expr, $t:ty) => {
        $tensor.as_ref().map(|t: &Tensor| t.expect_write::<$t>())
    };
}

/// The device memory of an optional output.
fn optional_device(tensor: &Option<Tensor>) -> Option<DeviceMut<'_>> {
    tensor.as_ref().map(Tensor::device_mut)
}

/// Memory for a gradient, if it is wanted.
fn optional_like(wanted: bool, like: &Tensor) -> Result<Option<Tensor>> {
    wanted.then(|| like.new_empty(like.shape(), like.dtype())).transpose()
}

/// Memory for a parameter's gradient, if it is wanted: in the type that sums over tokens are kept in.
fn optional_sum_like(wanted: bool, parameter: &Tensor) -> Result<Option<Tensor>> {
    wanted.then(|| parameter.new_empty(parameter.shape(), statistics(parameter.dtype()))).transpose()
}

fn rows_of(op: &'static str, x: &Tensor) -> Result<(usize, usize)> {
    match x.shape().split_last() {
        Some((&width, leading)) => Ok((leading.iter().product(), width)),
        None => Err(TensorError::Shape {
            op,
            argument: "x",
            expected: "one dimension or more".into(),
            found: x.shape().clone(),
        }),
    }
}

// ---------------------------------------------------------------------------------------------- RMSNorm

/// Root-mean-square norm over the last dimension, `x / sqrt(mean(x^2) + epsilon) * weight` (arXiv 1910.07467).
/// x `[.., C]`, weight `[C]`; returns the output and the inverse root mean squares `[rows]`.
///
/// # Errors
/// If shapes or dtypes do not fit.
pub fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<(Tensor, Tensor)> {
    const OP: &str = "rms_norm";
    let (rows, width) = rows_of(OP, x)?;
    same_dtype(OP, "weight", x.dtype(), weight)?;
    same_device(OP, "weight", x, weight)?;
    expect_shape(OP, "weight", weight, &[width])?;
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let out = x.new_empty(x.shape(), x.dtype())?;
    let inverse_rms = x.new_empty([rows], statistics(x.dtype()))?;
    let spec = rms_norm::RmsNormSpec { rows, width, epsilon };
    if let Some(queue) = x.queue() {
        let (mut y, mut inverse) = (out.device_mut(), inverse_rms.device_mut());
        rms_norm::cuda::forward(queue, &spec, x.device_ref(), weight.device_ref(), &mut y, &mut inverse)?;
        return Ok((out, inverse_rms));
    }
    for_float!(OP, x.dtype(), T => {
        let (x, w) = (x.read::<T>()?, weight.read::<T>()?);
        let (mut out, mut inverse) = (out.expect_write::<T>(), inverse_rms.expect_write::<T>());
        Ok(rms_norm::cpu::forward(&spec, &x[..rows * width], &w[..width], &mut out, &mut inverse)?)
    })?;
    Ok((out, inverse_rms))
}

/// Gradients of [`rms_norm()`] with respect to x and weight.
///
/// # Errors
/// If shapes or dtypes do not fit.
pub fn rms_norm_backward(
    x: &Tensor,
    weight: &Tensor,
    inverse_rms: &Tensor,
    epsilon: f64,
    dout: &Tensor,
    wanted: Wanted<2>,
) -> Result<[Option<Tensor>; 2]> {
    const OP: &str = "rms_norm_backward";
    let (rows, width) = rows_of(OP, x)?;
    expect_shape(OP, "weight", weight, &[width])?;
    expect_shape(OP, "inverse_rms", inverse_rms, &[rows])?;
    expect_shape(OP, "dout", dout, x.shape())?;
    same_dtype(OP, "dout", x.dtype(), dout)?;
    let (x, weight, dout) = (x.contiguous()?, weight.contiguous()?, dout.contiguous()?);
    let dx = optional_like(wanted[0], &x)?;
    let dweight = optional_sum_like(wanted[1], &weight)?;
    let spec = rms_norm::RmsNormSpec { rows, width, epsilon };
    if let Some(queue) = x.queue() {
        let (mut dx_out, mut dw_out) = (optional_device(&dx), optional_device(&dweight));
        rms_norm::cuda::backward(
            queue,
            &spec,
            x.device_ref(),
            weight.device_ref(),
            inverse_rms.device_ref(),
            dout.device_ref(),
            None,
            dx_out.as_mut(),
            dw_out.as_mut(),
        )?;
        return Ok([dx, dweight]);
    }
    for_float!(OP, x.dtype(), T => {
        let (x, w, inv, dy) = (x.read::<T>()?, weight.read::<T>()?, inverse_rms.read::<T>()?, dout.read::<T>()?);
        let (mut dx, mut dw) = (optional_output!(dx, T), optional_output!(dweight, T));
        Ok(rms_norm::cpu::backward(
            &spec, &x[..rows * width], &w[..width], &inv[..rows], &dy[..rows * width], dx.as_deref_mut(), dw.as_deref_mut(),
        )?)
    })?;
    Ok([dx, dweight])
}

// ---------------------------------------------------------------------------------------------- per-head GroupNorm

/// What [`head_norm()`] saves for its backward pass: mean and inverse standard deviation, each `[tokens, heads]`.
#[derive(Debug, Clone)]
pub struct HeadNormSaved {
    mean: Tensor,
    inverse_std: Tensor,
}

fn head_norm_spec(op: &'static str, x: &Tensor, epsilon: f64) -> Result<group_norm::GroupNormSpec> {
    match x.shape()[..] {
        [tokens, heads, head_dim] => Ok(group_norm::GroupNormSpec { tokens, heads, head_dim, epsilon }),
        _ => Err(TensorError::Shape {
            op,
            argument: "x",
            expected: "[tokens, heads, head_dim]".into(),
            found: x.shape().clone(),
        }),
    }
}

/// GroupNorm with one group a head: x `[T, H, D]`, weight and bias `[H * D]`, biased variance over the D entries.
///
/// # Errors
/// If shapes or dtypes do not fit.
pub fn head_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, epsilon: f64) -> Result<(Tensor, HeadNormSaved)> {
    const OP: &str = "head_norm";
    let spec = head_norm_spec(OP, x, epsilon)?;
    for (argument, tensor) in [("weight", weight), ("bias", bias)] {
        same_dtype(OP, argument, x.dtype(), tensor)?;
        same_device(OP, argument, x, tensor)?;
        expect_shape(OP, argument, tensor, &[spec.heads * spec.head_dim])?;
    }
    let (x, weight, bias) = (x.contiguous()?, weight.contiguous()?, bias.contiguous()?);
    let out = x.new_empty(x.shape(), x.dtype())?;
    let mean = x.new_empty([spec.tokens, spec.heads], statistics(x.dtype()))?;
    let inverse_std = x.new_empty([spec.tokens, spec.heads], statistics(x.dtype()))?;
    let (elements, width) = (x.elements(), weight.elements());
    if let Some(queue) = x.queue() {
        group_norm::cuda::forward(
            queue,
            &spec,
            x.device_ref(),
            weight.device_ref(),
            bias.device_ref(),
            &mut out.device_mut(),
            &mut mean.device_mut(),
            &mut inverse_std.device_mut(),
        )?;
        return Ok((out, HeadNormSaved { mean, inverse_std }));
    }
    for_float!(OP, x.dtype(), T => {
        let (x, w, b) = (x.read::<T>()?, weight.read::<T>()?, bias.read::<T>()?);
        let (mut out, mut mean, mut inv) =
            (out.expect_write::<T>(), mean.expect_write::<T>(), inverse_std.expect_write::<T>());
        Ok(group_norm::cpu::forward(&spec, &x[..elements], &w[..width], &b[..width], &mut out, &mut mean, &mut inv)?)
    })?;
    Ok((out, HeadNormSaved { mean, inverse_std }))
}

/// Gradients of [`head_norm()`] with respect to x, weight and bias.
///
/// # Errors
/// If shapes or dtypes do not fit.
pub fn head_norm_backward(
    x: &Tensor,
    weight: &Tensor,
    saved: &HeadNormSaved,
    epsilon: f64,
    dout: &Tensor,
    wanted: Wanted<3>,
) -> Result<[Option<Tensor>; 3]> {
    const OP: &str = "head_norm_backward";
    let spec = head_norm_spec(OP, x, epsilon)?;
    expect_shape(OP, "weight", weight, &[spec.heads * spec.head_dim])?;
    expect_shape(OP, "saved mean", &saved.mean, &[spec.tokens, spec.heads])?;
    expect_shape(OP, "dout", dout, x.shape())?;
    same_dtype(OP, "dout", x.dtype(), dout)?;
    let (x, weight, dout) = (x.contiguous()?, weight.contiguous()?, dout.contiguous()?);
    let (elements, width, groups) = (x.elements(), weight.elements(), spec.tokens * spec.heads);
    let dx = optional_like(wanted[0], &x)?;
    let dweight = optional_sum_like(wanted[1], &weight)?;
    let dbias = optional_sum_like(wanted[2], &weight)?;
    if let Some(queue) = x.queue() {
        let (mut dx_out, mut dw_out, mut db_out) =
            (optional_device(&dx), optional_device(&dweight), optional_device(&dbias));
        group_norm::cuda::backward(
            queue,
            &spec,
            x.device_ref(),
            weight.device_ref(),
            saved.mean.device_ref(),
            saved.inverse_std.device_ref(),
            dout.device_ref(),
            dx_out.as_mut(),
            dw_out.as_mut(),
            db_out.as_mut(),
        )?;
        return Ok([dx, dweight, dbias]);
    }
    for_float!(OP, x.dtype(), T => {
        let (x, w, dy) = (x.read::<T>()?, weight.read::<T>()?, dout.read::<T>()?);
        let (mean, inv) = (saved.mean.read::<T>()?, saved.inverse_std.read::<T>()?);
        let (mut dx, mut dw, mut db) =
            (optional_output!(dx, T), optional_output!(dweight, T), optional_output!(dbias, T));
        Ok(group_norm::cpu::backward(
            &spec, &x[..elements], &w[..width], &mean[..groups], &inv[..groups], &dy[..elements],
            dx.as_deref_mut(), dw.as_deref_mut(), db.as_deref_mut(),
        )?)
    })?;
    Ok([dx, dweight, dbias])
}

// ---------------------------------------------------------------------------------------------- SwiGLU

/// `silu(gate) * up` for two tensors of one shape (arXiv 2002.05202).
///
/// # Errors
/// If shapes or dtypes do not fit.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    const OP: &str = "swiglu";
    same_dtype(OP, "up", gate.dtype(), up)?;
    expect_shape(OP, "up", up, gate.shape())?;
    same_device(OP, "up", gate, up)?;
    let (gate, up) = (gate.contiguous()?, up.contiguous()?);
    let out = gate.new_empty(gate.shape(), gate.dtype())?;
    let n = gate.elements();
    if let Some(queue) = gate.queue() {
        swiglu::cuda::forward(queue, gate.device_ref(), up.device_ref(), &mut out.device_mut())?;
        return Ok(out);
    }
    for_float!(OP, gate.dtype(), T => {
        let (g, u) = (gate.read::<T>()?, up.read::<T>()?);
        Ok(swiglu::cpu::forward(&g[..n], &u[..n], &mut out.expect_write::<T>())?)
    })?;
    Ok(out)
}

/// Gradients of [`swiglu()`] with respect to gate and up.
///
/// # Errors
/// If shapes or dtypes do not fit.
pub fn swiglu_backward(gate: &Tensor, up: &Tensor, dout: &Tensor, wanted: Wanted<2>) -> Result<[Option<Tensor>; 2]> {
    const OP: &str = "swiglu_backward";
    same_dtype(OP, "up", gate.dtype(), up)?;
    expect_shape(OP, "up", up, gate.shape())?;
    same_device(OP, "up", gate, up)?;
    expect_shape(OP, "dout", dout, gate.shape())?;
    same_dtype(OP, "dout", gate.dtype(), dout)?;
    let (gate, up, dout) = (gate.contiguous()?, up.contiguous()?, dout.contiguous()?);
    let dgate = optional_like(wanted[0], &gate)?;
    let dup = optional_like(wanted[1], &gate)?;
    let n = gate.elements();
    if let Some(queue) = gate.queue() {
        let (mut dgate_out, mut dup_out) = (optional_device(&dgate), optional_device(&dup));
        let (gate, up, dout) = (gate.device_ref(), up.device_ref(), dout.device_ref());
        swiglu::cuda::backward(queue, gate, up, dout, dgate_out.as_mut(), dup_out.as_mut())?;
        return Ok([dgate, dup]);
    }
    for_float!(OP, gate.dtype(), T => {
        let (g, u, dy) = (gate.read::<T>()?, up.read::<T>()?, dout.read::<T>()?);
        let (mut dgate, mut dup) = (optional_output!(dgate, T), optional_output!(dup, T));
        Ok(swiglu::cpu::backward(&g[..n], &u[..n], &dy[..n], dgate.as_deref_mut(), dup.as_deref_mut())?)
    })?;
    Ok([dgate, dup])
}

// ---------------------------------------------------------------------------------------------- RoPE

/// Rotary position embedding (arXiv 2104.09864, dimension d paired with d + D/2): x `[T, H, D]`, positions u32 `[T]`.
/// `inverse` rotates back, which is also the backward pass.
///
/// # Errors
/// If shapes or dtypes do not fit, or D is odd.
pub fn rope(x: &Tensor, positions: &Tensor, theta: f64, inverse: bool) -> Result<Tensor> {
    const OP: &str = "rope";
    let [tokens, heads, head_dim] = x.shape()[..] else {
        let expected = "[tokens, heads, head_dim]".into();
        return Err(TensorError::Shape { op: OP, argument: "x", expected, found: x.shape().clone() });
    };
    same_dtype(OP, "positions", DType::U32, positions)?;
    expect_shape(OP, "positions", positions, &[tokens])?;
    same_device(OP, "positions", x, positions)?;
    let (x, positions) = (x.contiguous()?, positions.contiguous()?);
    let out = x.new_empty(x.shape(), x.dtype())?;
    let spec = rope::RopeSpec { tokens, heads, head_dim, theta };
    let n = x.elements();
    if let Some(queue) = x.queue() {
        let stride = heads * head_dim;
        let (positions, input) = (positions.device_ref(), x.device_ref());
        rope::cuda::rotate(queue, &spec, positions, inverse, input, stride, &mut out.device_mut(), stride)?;
        return Ok(out);
    }
    for_float!(OP, x.dtype(), T => {
        let (x, positions) = (x.read::<T>()?, positions.read::<u32>()?);
        Ok(rope::cpu::rotate(&spec, &positions[..tokens], inverse, &x[..n], &mut out.expect_write::<T>())?)
    })?;
    Ok(out)
}

// ---------------------------------------------------------------------------------------------- embedding

fn embedding_spec(op: &'static str, ids: &Tensor, table: &Tensor) -> Result<embedding::EmbeddingSpec> {
    same_dtype(op, "ids", DType::U32, ids)?;
    same_device(op, "ids", table, ids)?;
    match (&ids.shape()[..], &table.shape()[..]) {
        (&[tokens], &[vocabulary, width]) => Ok(embedding::EmbeddingSpec { tokens, vocabulary, width }),
        _ => Err(TensorError::ShapePair {
            op,
            left: ids.shape().clone(),
            right: table.shape().clone(),
            why: "ids must be [tokens] and the table [vocabulary, width]".into(),
        }),
    }
}

/// Rows of a table: ids u32 `[T]`, table `[V, C]`, output `[T, C]`.
///
/// # Errors
/// If shapes or dtypes do not fit, or an id is outside of the table.
pub fn embedding(ids: &Tensor, table: &Tensor) -> Result<Tensor> {
    const OP: &str = "embedding";
    let spec = embedding_spec(OP, ids, table)?;
    let (ids, table) = (ids.contiguous()?, table.contiguous()?);
    let out = table.new_empty([spec.tokens, spec.width], table.dtype())?;
    let n = table.elements();
    if let Some(queue) = table.queue() {
        embedding::cuda::forward(queue, &spec, ids.device_ref(), table.device_ref(), &mut out.device_mut())?;
        return Ok(out);
    }
    for_float!(OP, table.dtype(), T => {
        let (ids, table) = (ids.read::<u32>()?, table.read::<T>()?);
        Ok(embedding::cpu::forward(&spec, &ids[..spec.tokens], &table[..n], &mut out.expect_write::<T>())?)
    })?;
    Ok(out)
}

/// Gradient of [`embedding()`] with respect to the table, *added* to the contiguous `dtable`.
///
/// # Errors
/// If shapes or dtypes do not fit, an id is outside of the table, or `dtable` shares its storage with `dout`.
pub fn embedding_backward_into(ids: &Tensor, dout: &Tensor, dtable: &Tensor) -> Result<()> {
    const OP: &str = "embedding_backward";
    let spec = embedding_spec(OP, ids, dtable)?;
    expect_shape(OP, "dout", dout, &[spec.tokens, spec.width])?;
    not_aliased(OP, "dout", dtable, dout)?;
    if let Some(queue) = dtable.queue() {
        same_device(OP, "dout", dtable, dout)?;
        dtable.require_contiguous(OP)?;
        let (ids, dout) = (ids.contiguous()?, dout.contiguous()?);
        let (ids, dout) = (ids.device_ref(), dout.device_ref());
        return Ok(embedding::cuda::backward(queue, &spec, ids, dout, &mut dtable.device_mut())?);
    }
    same_dtype(OP, "dout", dtable.dtype(), dout)?;
    let (ids, dout) = (ids.contiguous()?, dout.contiguous()?);
    let n = dout.elements();
    for_float!(OP, dout.dtype(), T => {
        let (ids, dout) = (ids.read::<u32>()?, dout.read::<T>()?);
        Ok(embedding::cpu::backward(&spec, &ids[..spec.tokens], &dout[..n], &mut dtable.write::<T>()?)?)
    })
}

// ---------------------------------------------------------------------------------------------- cross-entropy

/// Tokens whose logits are held at once by [`linear_cross_entropy()`]: enough rows for an efficient matrix product.
const CROSS_ENTROPY_CHUNK: usize = 512;
/// The same on a CUDA device, which needs more rows to be busy.
const CROSS_ENTROPY_CHUNK_CUDA: usize = 4096;

/// What [`linear_cross_entropy()`] returns.
#[derive(Debug, Clone)]
pub struct LinearCrossEntropy {
    /// `-ln softmax(logits_t)[labels_t]` in nats, 0 where the label is [`IGNORE_INDEX`]: `[T]`.
    pub losses: Tensor,
    /// Gradient of `gradient_scale` times the sum of the losses with respect to hidden, if wanted: `[T, C]`.
    pub dhidden: Option<Tensor>,
    /// The same with respect to weight, if wanted: `[V, C]`, in float32 where the weight is bfloat16.
    pub dweight: Option<Tensor>,
}

/// The output projection and the cross-entropy in one op, in chunks of tokens, so that the logits of all tokens never
/// exist at once: `logits = logit_scale * hidden weight^T`, hidden `[T, C]`, weight `[V, C]`, labels i32 `[T]`.
/// The gradients, of `gradient_scale` times the sum of the losses, are computed in the same pass, while a chunk's logits
/// are there.
///
/// # Errors
/// If shapes or dtypes do not fit, or a label is neither an id nor [`IGNORE_INDEX`] (seen on the CPU only; on a CUDA device
/// such a token's loss is NaN).
pub fn linear_cross_entropy(
    hidden: &Tensor,
    weight: &Tensor,
    labels: &Tensor,
    logit_scale: f64,
    gradient_scale: f64,
    wanted: Wanted<2>,
) -> Result<LinearCrossEntropy> {
    const OP: &str = "linear_cross_entropy";
    same_dtype(OP, "weight", hidden.dtype(), weight)?;
    same_dtype(OP, "labels", DType::I32, labels)?;
    same_device(OP, "weight", hidden, weight)?;
    same_device(OP, "labels", hidden, labels)?;
    let (&[tokens, width], &[vocabulary, columns]) = (&hidden.shape()[..], &weight.shape()[..]) else {
        let why = "hidden must be [tokens, width] and weight [vocabulary, width]".into();
        return Err(TensorError::ShapePair {
            op: OP,
            left: hidden.shape().clone(),
            right: weight.shape().clone(),
            why,
        });
    };
    expect_shape(OP, "weight", weight, &[vocabulary, width])?;
    expect_shape(OP, "labels", labels, &[tokens])?;
    debug_assert_eq!(columns, width);
    let (hidden, weight, labels) = (hidden.contiguous()?, weight.contiguous()?, labels.contiguous()?);
    let losses = hidden.new_empty([tokens], statistics(hidden.dtype()))?;
    let dhidden = optional_like(wanted[0], &hidden)?;
    let dweight = optional_sum_like(wanted[1], &weight)?;
    let chunk = if hidden.queue().is_some() { CROSS_ENTROPY_CHUNK_CUDA } else { CROSS_ENTROPY_CHUNK };
    let spec = cross_entropy::LinearCrossEntropySpec { tokens, width, vocabulary, logit_scale, chunk };
    if let Some(queue) = hidden.queue() {
        let (mut dh_out, mut dw_out) = (optional_device(&dhidden), optional_device(&dweight));
        cross_entropy::cuda::forward(
            queue,
            &spec,
            gradient_scale,
            hidden.device_ref(),
            weight.device_ref(),
            labels.device_ref(),
            &mut losses.device_mut(),
            dh_out.as_mut(),
            dw_out.as_mut(),
        )?;
        return Ok(LinearCrossEntropy { losses, dhidden, dweight });
    }
    for_float!(OP, hidden.dtype(), T => {
        let (h, w, labels) = (hidden.read::<T>()?, weight.read::<T>()?, labels.read::<i32>()?);
        let (mut dh, mut dw) = (optional_output!(dhidden, T), optional_output!(dweight, T));
        Ok(cross_entropy::cpu::forward(
            &spec, &h[..tokens * width], &w[..vocabulary * width], &labels[..tokens],
            &mut losses.expect_write::<T>(), dh.as_deref_mut(), dw.as_deref_mut(),
        )?)
    })?;
    for gradient in [&dhidden, &dweight].into_iter().flatten() {
        gradient.scale_assign(gradient_scale)?;
    }
    Ok(LinearCrossEntropy { losses, dhidden, dweight })
}

// ---------------------------------------------------------------------------------------------- optimizer

/// One AdamW step over a range of the flat arenas, in place (arXiv 1711.05101; the exact rule is in
/// [`stickbreak_kernels::adamw`]).
///
/// # Errors
/// If shapes or dtypes differ, or two of the tensors share their storage.
pub fn adamw_step(
    spec: &AdamW,
    params: &Tensor,
    grads: &Tensor,
    first_moment: &Tensor,
    second_moment: &Tensor,
) -> Result<()> {
    const OP: &str = "adamw_step";
    for (argument, tensor) in [("grads", grads), ("first_moment", first_moment), ("second_moment", second_moment)] {
        same_dtype(OP, argument, params.dtype(), tensor)?;
        expect_shape(OP, argument, tensor, params.shape())?;
        not_aliased(OP, argument, params, tensor)?;
    }
    not_aliased(OP, "first_moment", second_moment, first_moment)?;
    not_aliased(OP, "grads", first_moment, grads)?;
    not_aliased(OP, "grads", second_moment, grads)?;
    let n = params.elements();
    for_float!(OP, params.dtype(), T => {
        let grads = grads.read::<T>()?;
        let (mut p, mut m, mut v) =
            (params.write::<T>()?, first_moment.write::<T>()?, second_moment.write::<T>()?);
        Ok(stickbreak_kernels::adamw::cpu::step(spec, &mut p, &grads[..n], &mut m, &mut v)?)
    })
}

/// What decides on the device, without a wait of the host, whether and how an update is made; see [`adamw_step_guarded()`].
#[derive(Debug, Clone, Copy)]
pub struct StepGuard<'a> {
    /// Sum of the squares of all gradients, a float32 scalar.
    pub sum_of_squares: &'a Tensor,
    /// The loss, a float32 scalar.
    pub loss: &'a Tensor,
    /// Largest global norm; 0 does not clip.
    pub clip_norm: f64,
}

/// [`adamw_step()`] on a CUDA device over float32 parameters, which also writes them rounded to bfloat16 to `copy`. The
/// clip factor is computed on the device, and nothing is updated if the sum of squares or the loss is not finite.
///
/// # Errors
/// If shapes, dtypes or devices differ, or two of the tensors share their storage.
pub fn adamw_step_guarded(
    spec: &AdamW,
    params: &Tensor,
    grads: &Tensor,
    first_moment: &Tensor,
    second_moment: &Tensor,
    copy: Option<&Tensor>,
    guard: &StepGuard<'_>,
) -> Result<()> {
    const OP: &str = "adamw_step_guarded";
    let state = [("grads", grads), ("first_moment", first_moment), ("second_moment", second_moment)];
    for (argument, tensor) in state.into_iter().chain(copy.map(|tensor| ("copy", tensor))) {
        expect_shape(OP, argument, tensor, params.shape())?;
        same_device(OP, argument, params, tensor)?;
        not_aliased(OP, argument, params, tensor)?;
        tensor.require_contiguous(OP)?;
    }
    params.require_contiguous(OP)?;
    not_aliased(OP, "first_moment", second_moment, first_moment)?;
    not_aliased(OP, "grads", first_moment, grads)?;
    not_aliased(OP, "grads", second_moment, grads)?;
    for (argument, tensor) in [("sum_of_squares", guard.sum_of_squares), ("loss", guard.loss)] {
        same_device(OP, argument, params, tensor)?;
    }
    let queue = params.queue().ok_or(TensorError::WrongDevice {
        op: OP,
        argument: "params",
        expected: crate::Device::Cuda(0),
        found: params.device(),
    })?;
    let guard = adamw::cuda::Guard {
        sum_of_squares: Some(guard.sum_of_squares.device_ref()),
        clip: guard.clip_norm,
        finite: Some(guard.loss.device_ref()),
    };
    let mut copy = copy.map(Tensor::device_mut);
    adamw::cuda::step(
        queue,
        spec,
        &guard,
        &mut params.device_mut(),
        grads.device_ref(),
        &mut first_moment.device_mut(),
        &mut second_moment.device_mut(),
        copy.as_mut(),
    )?;
    Ok(())
}
