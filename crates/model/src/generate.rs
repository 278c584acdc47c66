//! Continuing a prompt, with a cache of keys and values.
//!
//! The prompt goes through the blocks in chunks, then one token at a time: through the same [`Block`] code as in training,
//! only with an attention that reads the cache.

use crate::error::{ModelError, Result};
use crate::transformer::{AttentionSettings, Block, Packing, Transformer};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;
use stickbreak_autograd::{Tape, Var};
use stickbreak_tensor::Tensor;
use stickbreak_tensor::ops::attention;

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 always takes the most likely token.
    pub temperature: f64,
    /// Only the k most likely tokens; 0 takes all.
    pub top_k: usize,
    /// Only the most likely tokens that together reach this probability; 1 takes all.
    pub top_p: f64,
    /// Only ids below this are taken, if given: a vocabulary that is padded to a round size has ids that stand for no text.
    pub vocabulary: Option<u32>,
    /// Seed of the random choices: the same seed, the same text.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, vocabulary: None, seed: 0 }
    }
}

impl Sampling {
    fn validate(&self) -> Result<()> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(ModelError::Generate(format!("temperature = {} must be 0 or more", self.temperature)));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(ModelError::Generate(format!("top_p = {} must be above 0 and at most 1", self.top_p)));
        }
        if self.vocabulary == Some(0) {
            return Err(ModelError::Generate("vocabulary = 0 leaves no token to choose".to_owned()));
        }
        Ok(())
    }

    /// Chooses a token from logits; ties go to the smaller id.
    fn choose(&self, logits: &[f64], rng: &mut ChaCha8Rng) -> u32 {
        let allowed = self.vocabulary.map_or(logits.len(), |ids| logits.len().min(ids as usize));
        let mut order: Vec<usize> = (0..allowed).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        if self.temperature == 0.0 {
            return order[0] as u32;
        }
        if self.top_k > 0 {
            order.truncate(self.top_k);
        }
        let largest = logits[order[0]];
        let weights: Vec<f64> = order.iter().map(|&i| ((logits[i] - largest) / self.temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut kept = 0.0;
        let mut count = 0;
        // Always at least one token, up to the first that reaches top_p.
        while count < weights.len() && (count == 0 || kept < self.top_p * total) {
            kept += weights[count];
            count += 1;
        }
        let mut remaining = kept * ((rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64);
        for (&token, &weight) in order.iter().zip(&weights).take(count) {
            remaining -= weight;
            if remaining < 0.0 {
                return token as u32;
            }
        }
        order[count - 1] as u32
    }
}

/// Keys and values of one layer, `[capacity, Hkv, D]`, of which the first `len` tokens are there.
struct LayerCache {
    key: Tensor,
    value: Tensor,
}

/// Tokens of a text that go through the model at once, for stick-breaking: enough to fill a GPU, and of a long text more, so
/// that it has [`CHUNKS`] chunks at most. Attention runs over the whole text so far for every chunk, with zeros in place of
/// the queries that have been answered; without a bound their number would grow with the square of the length.
const CHUNK: usize = 4096;
const CHUNKS: usize = 8;

/// A model in the middle of a text: the cache of the tokens so far and the logits of the next one.
pub struct Generator<'m> {
    model: &'m Transformer,
    settings: AttentionSettings,
    layers: Vec<LayerCache>,
    capacity: usize,
    len: usize,
    logits: Vec<f64>,
}

impl<'m> Generator<'m> {
    /// Runs the prompt through the model.
    ///
    /// # Errors
    /// If the prompt is empty or holds an id outside of the vocabulary.
    pub fn new(model: &'m Transformer, prompt: &[u32]) -> Result<Self> {
        Self::in_chunks(model, prompt, CHUNK.max(prompt.len().div_ceil(CHUNKS)))
    }

    /// [`new`](Self::new) with so many tokens at once. Softmax attention takes the prompt whole, whatever `chunk` is.
    ///
    /// # Errors
    /// As [`new`](Self::new), or if `chunk` is 0.
    pub fn in_chunks(model: &'m Transformer, prompt: &[u32], chunk: usize) -> Result<Self> {
        if prompt.is_empty() {
            return Err(ModelError::Generate("the prompt is empty; give at least the end-of-text token".into()));
        }
        if chunk == 0 {
            return Err(ModelError::Generate("chunk = 0 tokens of the prompt at once never end it".into()));
        }
        let settings = AttentionSettings::new(model.config());
        let mut generator = Self { model, settings, layers: Vec::new(), capacity: 0, len: 0, logits: Vec::new() };
        generator.reserve(prompt.len())?;
        let chunk = match generator.settings {
            AttentionSettings::StickBreaking(_) => chunk,
            AttentionSettings::Softmax(_) => prompt.len(),
        };
        prompt.chunks(chunk).try_for_each(|chunk| generator.prefill(chunk))?;
        Ok(generator)
    }

    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is in the cache; never true after [`new`](Self::new).
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Logits of the token that comes next, one for each id.
    pub fn logits(&self) -> &[f64] {
        &self.logits
    }

    /// Makes room for `tokens` tokens, at least doubling, so that copying stays a constant cost per token.
    fn reserve(&mut self, tokens: usize) -> Result<()> {
        if tokens <= self.capacity {
            return Ok(());
        }
        let config = self.model.config();
        let capacity = tokens.max(2 * self.capacity).next_multiple_of(64);
        let shape = [capacity, config.kv_heads(), config.head_dim()];
        let dtype = self.model.arena().values().dtype();
        let mut layers = Vec::new();
        for layer in 0..config.num_layers {
            let zeros = || Tensor::zeros_on(shape, dtype, self.model.device());
            let new = LayerCache { key: zeros()?, value: zeros()? };
            if let Some(old) = self.layers.get(layer) {
                new.key.narrow(0, 0, self.len)?.copy_assign(&old.key.narrow(0, 0, self.len)?)?;
                new.value.narrow(0, 0, self.len)?.copy_assign(&old.value.narrow(0, 0, self.len)?)?;
            }
            layers.push(new);
        }
        (self.layers, self.capacity) = (layers, capacity);
        Ok(())
    }

    /// Appends tokens to the cache, for which there is room; of softmax only the first.
    fn prefill(&mut self, tokens: &[u32]) -> Result<()> {
        let (first, end) = (self.len, self.len + tokens.len());
        let packing = Packing::single(end)?;
        let positions = packing.positions().narrow(0, first, tokens.len())?.to_device(self.model.device())?;
        self.run(tokens, &positions, |settings, layer, q, k, v| {
            layer.key.narrow(0, first, tokens.len())?.copy_assign(k.value())?;
            layer.value.narrow(0, first, tokens.len())?.copy_assign(v.value())?;
            match settings {
                AttentionSettings::StickBreaking(stick) if first > 0 => {
                    let (keys, values) = (layer.key.narrow(0, 0, end)?, layer.value.narrow(0, 0, end)?);
                    constants(q, attention::stick_breaking_extend(q.value(), &keys, &values, *stick)?)
                }
                _ => settings.attend(q, k, v, packing.cu_seqlens()),
            }
        })
    }

    /// Appends a token and computes the logits of the next one.
    ///
    /// # Errors
    /// If the id is outside of the vocabulary.
    pub fn push(&mut self, token: u32) -> Result<()> {
        self.reserve(self.len + 1)?;
        let position = self.len;
        let positions = Tensor::from_vec(vec![position as u32], [1])?.to_device(self.model.device())?;
        self.run(&[token], &positions, |settings, layer, q, k, v| {
            layer.key.narrow(0, position, 1)?.copy_assign(k.value())?;
            layer.value.narrow(0, position, 1)?.copy_assign(v.value())?;
            settings.decode(q, &layer.key.narrow(0, 0, position + 1)?, &layer.value.narrow(0, 0, position + 1)?)
        })
    }

    /// Chooses the next token from the current logits.
    ///
    /// # Errors
    /// If the sampling options make no sense, or the model's logits are not finite.
    pub fn sample(&self, sampling: &Sampling, rng: &mut ChaCha8Rng) -> Result<u32> {
        sampling.validate()?;
        if let Some((id, logit)) = self.logits.iter().enumerate().find(|(_, logit)| !logit.is_finite()) {
            let at = self.len;
            return Err(ModelError::Generate(format!("the logit of id {id} after {at} tokens is {logit}")));
        }
        Ok(sampling.choose(&self.logits, rng))
    }

    /// Runs new tokens through all blocks with `attend` as attention, and keeps the last token's logits.
    fn run(
        &mut self,
        tokens: &[u32],
        positions: &Tensor,
        mut attend: impl for<'t> FnMut(
            &AttentionSettings,
            &LayerCache,
            &Var<'t>,
            &Var<'t>,
            &Var<'t>,
        ) -> Result<(Var<'t>, Option<Var<'t>>)>,
    ) -> Result<()> {
        let tape = Tape::without_gradients();
        let ids = Tensor::from_slice(tokens, [tokens.len()])?.to_device(self.model.device())?;
        let mut x = self.model.embed(&tape, &ids)?;
        for (block, layer) in self.model.blocks().iter().zip(&self.layers) {
            let block: &Arc<Block> = block;
            x = block.forward_with(&x, positions, &mut |q, k, v| attend(&self.settings, layer, q, k, v))?;
        }
        let last = tape.constant(x.value().narrow(0, tokens.len() - 1, 1)?);
        let hidden = self.model.final_norm(&last)?;
        self.logits = self.model.logits(hidden.value())?.to_f64_vec()?;
        self.len += tokens.len();
        Ok(())
    }
}

/// o and rem as an attention gives them to its block: rem is of q's type, as the training forward makes it.
fn constants<'t>(q: &Var<'t>, (o, rem): (Tensor, Tensor)) -> Result<(Var<'t>, Option<Var<'t>>)> {
    let (tape, rem) = (q.tape(), rem.to_dtype(o.dtype())?);
    Ok((tape.constant(o), Some(tape.constant(rem))))
}

impl AttentionSettings {
    /// One query `[1, Hq, D]` against the cache `[len, Hkv, D]`, whose last row is the query's own token.
    fn decode<'t>(&self, q: &Var<'t>, keys: &Tensor, values: &Tensor) -> Result<(Var<'t>, Option<Var<'t>>)> {
        let one_sequence = |cache: &Tensor| cache.reshape([&[1], &cache.shape()[..]].concat());
        let (keys, values) = (one_sequence(keys)?, one_sequence(values)?);
        match self {
            Self::StickBreaking(settings) => {
                constants(q, attention::stick_breaking_decode(q.value(), &keys, &values, *settings)?)
            }
            Self::Softmax(settings) => {
                let o = attention::softmax_decode(q.value(), &keys, &values, settings)?;
                Ok((q.tape().constant(o), None))
            }
        }
    }
}

impl Transformer {
    /// Continues `prompt` by up to `max_tokens` tokens, or until `stop` is drawn (it is not returned). `on_token` sees
    /// each token as it comes and may end the text early by returning false.
    ///
    /// # Errors
    /// If the prompt or the sampling options make no sense.
    pub fn generate(
        &self,
        prompt: &[u32],
        max_tokens: usize,
        sampling: &Sampling,
        stop: Option<u32>,
        mut on_token: impl FnMut(u32) -> bool,
    ) -> Result<Vec<u32>> {
        sampling.validate()?;
        let mut rng = ChaCha8Rng::seed_from_u64(sampling.seed);
        let mut generator = Generator::new(self, prompt)?;
        let mut out = Vec::new();
        while out.len() < max_tokens {
            let token = generator.sample(sampling, &mut rng)?;
            if Some(token) == stop {
                break;
            }
            out.push(token);
            if !on_token(token) {
                break;
            }
            if out.len() < max_tokens {
                generator.push(token)?;
            }
        }
        Ok(out)
    }
}
