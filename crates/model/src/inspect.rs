//! Looking into a model's attention.

use crate::error::{ModelError, Result};
use crate::transformer::{AttentionSettings, Packing, Transformer};
use stickbreak_autograd::Tape;
use stickbreak_tensor::Tensor;
use stickbreak_tensor::ops::attention::{self, StickBreakingSettings, StickBreakingWanted, TileCount};

/// How one layer's heads attend on one text.
#[derive(Debug, Clone)]
pub struct LayerAttention {
    /// For each head, the share of the causal tiles that early exit at 2^-20 visits, 0 to 1.
    pub tiles_visited: Vec<f64>,
    /// Weights on the first tokens of the text, `[Hq, n, n]`, row = query.
    pub weights: Tensor,
}

/// Early exit at which tiles are counted: weights below 2^-20 are nothing even in float32.
const COUNTED_BITS: u32 = 20;

impl Transformer {
    /// Runs a row of packed documents through the model and gives `each` every layer's number and its q `[T, Hq, D]`, k and v
    /// `[T, Hkv, D]`, as its attention reads them: with rotary embedding, if there is one. One layer's at a time are held.
    ///
    /// # Errors
    /// If the model cannot run on the ids, or those of `each`.
    pub fn visit_attention<E: From<ModelError>>(
        &self,
        ids: &Tensor,
        packing: &Packing,
        mut each: impl FnMut(usize, [Tensor; 3]) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let settings = AttentionSettings::new(self.config());
        let tape = Tape::without_gradients();
        let packing = packing.to_device(self.device())?;
        let mut x = ids.to_device(self.device()).map_err(ModelError::from).and_then(|ids| self.embed(&tape, &ids))?;
        for (layer, block) in self.blocks().iter().enumerate() {
            let mut seen = None;
            x = block.forward_with(&x, packing.positions(), &mut |q, k, v| {
                seen = Some([q, k, v].map(|x| x.value().clone()));
                settings.attend(q, k, v, packing.cu_seqlens())
            })?;
            seen.map_or(Ok(()), |qkv| each(layer, qkv))?;
        }
        Ok(())
    }

    /// The attention of every layer on a text (one document), with dense weights for its first `dense_tokens` tokens.
    /// `None` for a softmax model, which visits every tile.
    ///
    /// # Errors
    /// If the model cannot run on the ids.
    pub fn inspect_attention(&self, ids: &Tensor, dense_tokens: usize) -> Result<Option<Vec<LayerAttention>>> {
        let AttentionSettings::StickBreaking(stick) = AttentionSettings::new(self.config()) else { return Ok(None) };
        let packing = Packing::single(ids.elements())?;
        let counted = StickBreakingSettings { early_exit_bits: COUNTED_BITS, ..stick };
        let dense = dense_tokens.min(ids.elements());
        let mut layers = Vec::new();
        self.visit_attention(ids, &packing, |_, [q, k, v]| -> Result<()> {
            let skipped = count_tiles([&q, &k, &v], &packing, counted)?.skipped()?;
            let first = |t: &Tensor| t.narrow(0, 0, dense);
            layers.push(LayerAttention {
                tiles_visited: skipped.into_iter().map(|share| 1.0 - share).collect(),
                weights: attention::stick_breaking_weights(&first(&q)?, &first(&k)?, stick)?,
            });
            Ok(())
        })?;
        Ok(Some(layers))
    }

    /// For each layer and query head the share of the causal tiles that the model's early exit leaves out on a row of
    /// packed documents, 0 to 1. `None` for a softmax model or with early exit off.
    ///
    /// # Errors
    /// If the model cannot run on the ids.
    pub fn skipped_tiles(&self, ids: &Tensor, packing: &Packing) -> Result<Option<Vec<Vec<f64>>>> {
        let stick = match AttentionSettings::new(self.config()) {
            AttentionSettings::StickBreaking(stick) if stick.early_exit_bits > 0 => stick,
            _ => return Ok(None),
        };
        let mut counts = Vec::new();
        self.visit_attention(ids, packing, |_, [q, k, v]| -> Result<()> {
            counts.push(count_tiles([&q, &k, &v], packing, stick)?);
            Ok(())
        })?;
        let shares: Result<_> = counts.iter().map(|count| Ok(count.skipped()?)).collect();
        Ok(Some(shares?))
    }
}

fn count_tiles([q, k, v]: [&Tensor; 3], packing: &Packing, settings: StickBreakingSettings) -> Result<TileCount> {
    let wanted = StickBreakingWanted { log2_rem: false, backward: true };
    let saved = attention::stick_breaking(q, k, v, packing.cu_seqlens(), settings, wanted)?.saved;
    Ok(saved.count_tiles()?)
}
