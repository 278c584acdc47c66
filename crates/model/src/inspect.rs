//! Looking into a model's attention.

use crate::error::Result;
use crate::transformer::{AttentionSettings, Packing, Transformer};
use stickbreak_autograd::Tape;
use stickbreak_tensor::Tensor;
use stickbreak_tensor::ops::attention::{self, StickBreakingSettings, StickBreakingWanted};

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
    /// The attention of every layer on a text (one document), with dense weights for its first `dense_tokens` tokens.
    /// `None` for a softmax model, which visits every tile.
    ///
    /// # Errors
    /// If the model cannot run on the ids.
    pub fn inspect_attention(&self, ids: &Tensor, dense_tokens: usize) -> Result<Option<Vec<LayerAttention>>> {
        let settings = AttentionSettings::new(self.config());
        let AttentionSettings::StickBreaking(stick) = settings else { return Ok(None) };
        let packing = Packing::single(ids.elements())?.to_device(self.device())?;
        let ids = &ids.to_device(self.device())?;
        let tape = Tape::without_gradients();
        let counted = StickBreakingSettings { early_exit_bits: COUNTED_BITS, ..stick };
        let dense = dense_tokens.min(ids.elements());
        let mut layers = Vec::new();
        let mut x = self.embed(&tape, ids)?;
        for block in self.blocks() {
            x = block.forward_with(&x, packing.positions(), &mut |q, k, v| {
                let wanted = StickBreakingWanted { log2_rem: false, backward: true };
                let (q_value, k_value, v_value) = (q.value(), k.value(), v.value());
                let saved =
                    attention::stick_breaking(q_value, k_value, v_value, packing.cu_seqlens(), counted, wanted)?.saved;
                let (visited, causal) = saved.visited_tiles()?;
                let first = |t: &Tensor| t.narrow(0, 0, dense);
                layers.push(LayerAttention {
                    tiles_visited: visited.iter().map(|&tiles| tiles as f64 / causal.max(1) as f64).collect(),
                    weights: attention::stick_breaking_weights(&first(q.value())?, &first(k.value())?, stick)?,
                });
                settings.attend(q, k, v, packing.cu_seqlens())
            })?;
        }
        Ok(Some(layers))
    }
}
