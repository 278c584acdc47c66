//! The model itself.
//!
//! All tokens of a step stand in one row, `[T, C]`; [`Packing`] says where each document starts. With h = RMSNorm(x):
//!
//! ```text
//! x += residual_multiplier * W_o head_norm(attention(W_q h, W_k h, W_v h))
//! x += residual_multiplier * W_down (silu(W_gate h) * W_up h)
//! logits = logit_scale * W_head RMSNorm(x)
//! ```

use crate::config::{AttentionKind, ModelConfig, Remainder};
use crate::error::{ModelError, Result};
use crate::tiles::TileWatch;
use std::sync::Arc;
use stickbreak_autograd::ops::{self, StickBreakingOutput};
use stickbreak_autograd::{
    ArenaBuilder, ArenaLayout, AutogradError, Parameter, ParameterArena, ParameterId, Tape, Var, checkpoint,
};
use stickbreak_tensor::ops::attention::{SoftmaxSettings, StickBreakingSettings, alibi_slopes};
use stickbreak_tensor::ops::nn;
use stickbreak_tensor::{DType, Device, Tensor};

/// Where the documents of a row of tokens start, and each token's position in its document.
#[derive(Debug, Clone)]
pub struct Packing {
    cu_seqlens: Arc<[i32]>,
    positions: Tensor,
}

impl Packing {
    /// From cumulative lengths: a leading 0, then the end of each document (flash-attn's convention).
    ///
    /// # Errors
    /// If they do not start at 0 or decrease.
    pub fn new(cu_seqlens: &[i32]) -> Result<Self> {
        let valid = cu_seqlens.first() == Some(&0) && cu_seqlens.is_sorted();
        if !valid {
            return Err(ModelError::Config {
                field: "cu_seqlens",
                value: format!("{cu_seqlens:?}"),
                why: "must start at 0 and never decrease".into(),
            });
        }
        let positions: Vec<u32> = cu_seqlens.windows(2).flat_map(|w| 0..(w[1] - w[0]) as u32).collect();
        let tokens = positions.len();
        Ok(Self { cu_seqlens: cu_seqlens.into(), positions: Tensor::from_vec(positions, [tokens])? })
    }

    /// One document of `tokens` tokens.
    ///
    /// # Errors
    /// If the length does not fit an i32.
    pub fn single(tokens: usize) -> Result<Self> {
        let end = i32::try_from(tokens).map_err(|_| ModelError::Config {
            field: "cu_seqlens",
            value: tokens.to_string(),
            why: "a row has at most 2^31 - 1 tokens".into(),
        })?;
        Self::new(&[0, end])
    }

    /// Cumulative lengths.
    pub fn cu_seqlens(&self) -> &[i32] {
        &self.cu_seqlens
    }

    /// Position of each token in its document, u32 `[T]`.
    pub fn positions(&self) -> &Tensor {
        &self.positions
    }

    /// The same packing with the positions on a device, where a rotary embedding reads them.
    ///
    /// # Errors
    /// If the device has not the memory.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        Ok(Self { cu_seqlens: Arc::clone(&self.cu_seqlens), positions: self.positions.to_device(device)? })
    }
}

/// One layer: attention and feed-forward, each behind a norm and added to the residual stream.
#[derive(Debug)]
pub struct Block {
    config: Arc<ModelConfig>,
    input_norm: Parameter,
    query: Parameter,
    key: Parameter,
    value: Parameter,
    output: Parameter,
    head_bias: Option<Parameter>,
    head_norm: Option<(Parameter, Parameter)>,
    post_attention_norm: Parameter,
    gate: Parameter,
    up: Parameter,
    down: Parameter,
    pub(crate) tiles: TileWatch,
}

/// The attention of a block once q, k and v are there: over the whole row in training, against a cache in generation.
/// Takes q `[T, Hq, D]`, k and v `[T, Hkv, D]`; returns o `[T, Hq, D]` and, for stick-breaking, the remainder `[T, Hq]`.
pub(crate) type Attend<'a, 't> = &'a mut dyn FnMut(&Var<'t>, &Var<'t>, &Var<'t>) -> Result<(Var<'t>, Option<Var<'t>>)>;

/// The parameters of one block, by the order of their names in the Hugging Face layout.
struct BlockIds {
    input_norm: ParameterId,
    query: ParameterId,
    key: ParameterId,
    value: ParameterId,
    output: ParameterId,
    head_bias: Option<ParameterId>,
    head_norm: Option<(ParameterId, ParameterId)>,
    post_attention_norm: ParameterId,
    gate: ParameterId,
    up: ParameterId,
    down: ParameterId,
}

impl BlockIds {
    fn register(config: &ModelConfig, layer: usize, arena: &mut ArenaBuilder) -> Self {
        let (c, f) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.num_heads * config.head_dim(), config.kv_heads() * config.head_dim());
        let mut add = |name: &str, shape: &[usize]| arena.add(format!("model.layers.{layer}.{name}"), shape);
        Self {
            input_norm: add("input_layernorm.weight", &[c]),
            query: add("self_attn.q_proj.weight", &[q, c]),
            key: add("self_attn.k_proj.weight", &[kv, c]),
            value: add("self_attn.v_proj.weight", &[kv, c]),
            head_bias: (config.remainder == Remainder::Bias)
                .then(|| add("self_attn.head_bias", &[config.num_heads, config.head_dim()])),
            head_norm: config.head_norm.then(|| (add("self_attn.norm.weight", &[q]), add("self_attn.norm.bias", &[q]))),
            output: add("self_attn.o_proj.weight", &[c, q]),
            post_attention_norm: add("post_attention_layernorm.weight", &[c]),
            gate: add("mlp.gate_proj.weight", &[f, c]),
            up: add("mlp.up_proj.weight", &[f, c]),
            down: add("mlp.down_proj.weight", &[c, f]),
        }
    }

    fn build(&self, config: &Arc<ModelConfig>, arena: &ParameterArena) -> Result<Block> {
        let get = |id| arena.parameter(id);
        Ok(Block {
            config: Arc::clone(config),
            input_norm: get(self.input_norm)?,
            query: get(self.query)?,
            key: get(self.key)?,
            value: get(self.value)?,
            output: get(self.output)?,
            head_bias: self.head_bias.map(get).transpose()?,
            head_norm: self.head_norm.map(|(w, b)| Ok::<_, AutogradError>((get(w)?, get(b)?))).transpose()?,
            post_attention_norm: get(self.post_attention_norm)?,
            gate: get(self.gate)?,
            up: get(self.up)?,
            down: get(self.down)?,
            tiles: TileWatch::default(),
        })
    }
}

impl Block {
    /// The block over a row of packed documents: x `[T, C]` to `[T, C]`.
    ///
    /// # Errors
    /// If x has not as many rows as the documents have tokens, or not the model's width.
    pub fn forward<'t>(&self, x: &Var<'t>, packing: &Packing) -> Result<Var<'t>> {
        let settings = AttentionSettings::new(&self.config);
        self.forward_with(x, packing.positions(), &mut |q, k, v| {
            settings.attend_watched(q, k, v, packing.cu_seqlens(), Some(&self.tiles))
        })
    }

    /// The block with another attention; `positions` are those of x's tokens.
    pub(crate) fn forward_with<'t>(&self, x: &Var<'t>, positions: &Tensor, attend: Attend<'_, 't>) -> Result<Var<'t>> {
        let config = &*self.config;
        let tape = x.tape();
        let parameter = |p: &Parameter| tape.parameter(p);
        let residual = |x: &Var<'t>, y: Var<'t>| -> Result<Var<'t>> {
            let y = if config.residual_multiplier == 1.0 { y } else { y.scale(config.residual_multiplier)? };
            Ok(x.add(&y)?)
        };

        let h = ops::rms_norm(x, &parameter(&self.input_norm), config.norm_eps)?;
        let o = self.attention(&h, positions, attend)?;
        let x = residual(x, ops::linear(&o, &parameter(&self.output))?)?;

        let h = ops::rms_norm(&x, &parameter(&self.post_attention_norm), config.norm_eps)?;
        let gate = ops::linear(&h, &parameter(&self.gate))?;
        let up = ops::linear(&h, &parameter(&self.up))?;
        let y = ops::linear(&ops::swiglu(&gate, &up)?, &parameter(&self.down))?;
        residual(&x, y)
    }

    /// From the normed input `[T, C]` to the concatenated heads `[T, Hq D]`, before the output projection.
    fn attention<'t>(&self, h: &Var<'t>, positions: &Tensor, attend: Attend<'_, 't>) -> Result<Var<'t>> {
        let config = &*self.config;
        let (tokens, heads, kv_heads, d) = (h.value().dim(0)?, config.num_heads, config.kv_heads(), config.head_dim());
        let project =
            |weight: &Parameter, heads: usize| ops::linear(h, &h.tape().parameter(weight))?.reshape([tokens, heads, d]);
        let (mut q, mut k) = (project(&self.query, heads)?, project(&self.key, kv_heads)?);
        let v = project(&self.value, kv_heads)?;
        if config.attention == AttentionKind::SoftmaxRope {
            q = ops::rope(&q, positions, config.rope_theta)?;
            k = ops::rope(&k, positions, config.rope_theta)?;
        }
        let (mut o, remainder) = attend(&q, &k, &v)?;
        if let Some(remainder) = remainder {
            o = self.add_remainder(&o, &remainder, &v)?;
        }
        if let Some((weight, bias)) = &self.head_norm {
            let tape = h.tape();
            o = ops::head_norm(&o, &tape.parameter(weight), &tape.parameter(bias), config.norm_eps)?;
        }
        Ok(o.reshape([tokens, heads * d])?)
    }

    /// What becomes of the unbroken part of the stick; see [`Remainder`].
    fn add_remainder<'t>(&self, o: &Var<'t>, remainder: &Var<'t>, v: &Var<'t>) -> Result<Var<'t>> {
        let config = &*self.config;
        let (tokens, heads, kv_heads, d) = (o.value().dim(0)?, config.num_heads, config.kv_heads(), config.head_dim());
        match (config.remainder, &self.head_bias) {
            (Remainder::Value, _) => {
                // Grouped as [T, Hkv, Hq / Hkv, D], so that each value head broadcasts over its query heads.
                let group = heads / kv_heads;
                let weighted =
                    remainder.reshape([tokens, kv_heads, group, 1])?.mul(&v.reshape([tokens, kv_heads, 1, d])?)?;
                Ok(o.add(&weighted.reshape([tokens, heads, d])?)?)
            }
            (Remainder::Bias, Some(bias)) => {
                let bias = o.tape().parameter(bias).reshape([1, heads, d])?;
                Ok(o.add(&remainder.reshape([tokens, heads, 1])?.mul(&bias)?)?)
            }
            _ => Ok(o.clone()),
        }
    }
}

/// The attention of a config, ready to be called.
pub(crate) enum AttentionSettings {
    StickBreaking(StickBreakingSettings),
    Softmax(SoftmaxSettings),
}

impl AttentionSettings {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let scale = config.attention_scale();
        match config.attention {
            AttentionKind::StickBreaking => Self::StickBreaking(StickBreakingSettings {
                scale,
                attend_current: config.attend_current,
                early_exit_bits: config.early_exit_bits,
            }),
            kind => {
                let alibi = (kind == AttentionKind::SoftmaxAlibi).then(|| alibi_slopes(config.num_heads));
                Self::Softmax(SoftmaxSettings { scale, alibi_slopes: alibi })
            }
        }
    }

    pub(crate) fn attend<'t>(
        &self,
        q: &Var<'t>,
        k: &Var<'t>,
        v: &Var<'t>,
        cu_seqlens: &[i32],
    ) -> Result<(Var<'t>, Option<Var<'t>>)> {
        self.attend_watched(q, k, v, cu_seqlens, None)
    }

    /// [`attend`](Self::attend), and `watch` counts the tiles of a pass that a backward pass will follow.
    fn attend_watched<'t>(
        &self,
        q: &Var<'t>,
        k: &Var<'t>,
        v: &Var<'t>,
        cu_seqlens: &[i32],
        watch: Option<&TileWatch>,
    ) -> Result<(Var<'t>, Option<Var<'t>>)> {
        Ok(match self {
            Self::StickBreaking(settings) => {
                let StickBreakingOutput { o, rem, saved } =
                    ops::stick_breaking_attention(q, k, v, cu_seqlens, *settings)?;
                // Without early exit there is nothing to count; a pass that is not recorded saves nothing on a GPU.
                if let Some(watch) = watch.filter(|_| settings.early_exit_bits > 0 && o.is_tracked()) {
                    watch.see(&saved)?;
                }
                (o, Some(rem))
            }
            Self::Softmax(settings) => (ops::softmax_attention(q, k, v, cu_seqlens, settings)?, None),
        })
    }
}

/// A decoder-only language model.
#[derive(Debug)]
pub struct Transformer {
    config: Arc<ModelConfig>,
    arena: ParameterArena,
    embedding: Parameter,
    blocks: Vec<Arc<Block>>,
    final_norm: Parameter,
    /// The embedding itself if tied.
    head: Parameter,
}

impl Transformer {
    /// A model on the CPU with all parameters zero; [`crate::init`] or [`crate::weights`] fill them.
    ///
    /// # Errors
    /// If the config makes no model.
    pub fn new(config: ModelConfig, dtype: DType) -> Result<Self> {
        Self::new_on(config, dtype, Device::Cpu)
    }

    /// [`new`](Self::new) on a device. With bfloat16, float32 master weights are kept beside the ones that are read.
    ///
    /// # Errors
    /// If the config makes no model, or the device cannot hold it.
    pub fn new_on(config: ModelConfig, dtype: DType, device: Device) -> Result<Self> {
        Self::new_with(config, dtype, device, ArenaLayout::default())
    }

    /// [`new_on`](Self::new_on) with an arena of which ranks share the work.
    ///
    /// # Errors
    /// As [`new_on`](Self::new_on).
    pub fn new_with(config: ModelConfig, dtype: DType, device: Device, layout: ArenaLayout) -> Result<Self> {
        config.validate()?;
        let mut arena = ArenaBuilder::default();
        let table = [config.vocab_size, config.hidden_size];
        let embedding = arena.add("model.embed_tokens.weight", table);
        let blocks: Vec<_> = (0..config.num_layers).map(|i| BlockIds::register(&config, i, &mut arena)).collect();
        let final_norm = arena.add("model.norm.weight", [config.hidden_size]);
        let head = if config.tie_word_embeddings { embedding } else { arena.add("lm_head.weight", table) };
        let arena = arena.build_with(dtype, device, layout)?;
        let config = Arc::new(config);
        Ok(Self {
            embedding: arena.parameter(embedding)?,
            blocks: blocks.iter().map(|ids| Ok(Arc::new(ids.build(&config, &arena)?))).collect::<Result<_>>()?,
            final_norm: arena.parameter(final_norm)?,
            head: arena.parameter(head)?,
            config,
            arena,
        })
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where the model is.
    pub fn device(&self) -> Device {
        self.arena.values().device()
    }

    /// All parameters and their gradients.
    pub fn arena(&self) -> &ParameterArena {
        &self.arena
    }

    /// The weights of the projections behind attention, first layer to last: in a backward pass attention comes right behind
    /// each of their gradients.
    pub fn output_projections(&self) -> impl Iterator<Item = ParameterId> + '_ {
        self.blocks.iter().map(|block| block.output.id)
    }

    /// The layers, first to last.
    pub fn blocks(&self) -> &[Arc<Block>] {
        &self.blocks
    }

    /// The output projection's weight, `[V, C]`.
    pub fn head(&self) -> &Parameter {
        &self.head
    }

    /// Embeddings of token ids: u32 `[T]` to `[T, C]`.
    pub(crate) fn embed<'t>(&self, tape: &'t Tape, ids: &Tensor) -> Result<Var<'t>> {
        let x = ops::embedding(ids, &tape.parameter(&self.embedding))?;
        let factor = self.config.embedding_multiplier;
        Ok(if factor == 1.0 { x } else { x.scale(factor)? })
    }

    pub(crate) fn final_norm<'t>(&self, x: &Var<'t>) -> Result<Var<'t>> {
        Ok(ops::rms_norm(x, &x.tape().parameter(&self.final_norm), self.config.norm_eps)?)
    }

    /// Hidden states after the last norm: ids u32 `[T]` to `[T, C]`. With `recompute`, each block's activations are
    /// computed again in the backward pass instead of kept; the result is the same, bit for bit.
    ///
    /// # Errors
    /// If an id is outside of the vocabulary, or there are not as many ids as the documents have tokens.
    pub fn hidden<'t>(&self, tape: &'t Tape, ids: &Tensor, packing: &Packing, recompute: bool) -> Result<Var<'t>> {
        let mut x = self.embed(tape, ids)?;
        for block in &self.blocks {
            x = if recompute {
                let (block, packing) = (Arc::clone(block), packing.clone());
                checkpoint(tape, &[&x], move |_, inputs| block.forward(&inputs[0], &packing).map_err(into_autograd))?
            } else {
                block.forward(&x, packing)?
            };
        }
        self.final_norm(&x)
    }

    /// The sum of the tokens' losses times `loss_scale`, as a scalar; labels i32 `[T]`, already shifted, -100 where
    /// nothing is predicted. One over the number of predicted tokens as scale makes it the mean, in nats.
    ///
    /// # Errors
    /// As [`hidden`](Self::hidden), or if a label is neither an id nor -100.
    pub fn loss<'t>(
        &self,
        tape: &'t Tape,
        ids: &Tensor,
        labels: &Tensor,
        packing: &Packing,
        loss_scale: f64,
        recompute: bool,
    ) -> Result<Var<'t>> {
        let hidden = self.hidden(tape, ids, packing, recompute)?;
        let head = tape.parameter(&self.head);
        Ok(ops::linear_cross_entropy(&hidden, &head, labels, self.config.logit_scale(), loss_scale)?)
    }

    /// The loss of each token in nats, `[T]`, 0 where nothing is predicted; no gradients.
    ///
    /// # Errors
    /// As [`loss`](Self::loss).
    pub fn token_losses(&self, ids: &Tensor, labels: &Tensor, packing: &Packing) -> Result<Tensor> {
        let tape = Tape::without_gradients();
        let hidden = self.hidden(&tape, ids, packing, false)?;
        let scale = self.config.logit_scale();
        Ok(nn::linear_cross_entropy(hidden.value(), &self.head.value, labels, scale, 1.0, [false, false])?.losses)
    }

    /// Logits of hidden states: `[T, C]` to `[T, V]`.
    ///
    /// # Errors
    /// If the width is not the model's.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = hidden.matmul(&self.head.value.transpose(0, 1)?)?;
        let scale = self.config.logit_scale();
        Ok(if scale == 1.0 { logits } else { logits.affine(scale, 0.0)? })
    }
}

/// Checkpointed segments speak autograd's error type.
fn into_autograd(error: ModelError) -> AutogradError {
    match error {
        ModelError::Autograd(error) => error,
        ModelError::Tensor(error) => error.into(),
        other => unreachable!("a block's forward fails only in its ops: {other}"),
    }
}
