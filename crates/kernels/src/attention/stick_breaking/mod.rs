//! Stick-breaking attention (Tan, Yang, Courville, Panda and Shen, arXiv 2410.17980).
//!
//! For query i and key j of one head, inside one document, with `j < i` (or `j <= i` with `attend_current`):
//!
//! ```text
//! z_ij    = scale * (q_i . k_j)
//! beta_ij = sigmoid(z_ij)
//! A_ij    = beta_ij * prod_{j < k visible} (1 - beta_ik)      nearer keys break the stick first
//! o_i     = sum_j A_ij v_j
//! rem_i   = prod_{j visible} (1 - beta_ij) = 1 - sum_j A_ij    what is left of the stick
//! ```
//!
//! A token without a visible key, the first of every document unless `attend_current`, has o = 0 and rem = 1.
//!
//! Backward, with a_ij = A_ij (do_i . v_j):
//!
//! ```text
//! dz_ij = (1 - beta_ij) a_ij - beta_ij * (sum_{l < j} a_il + drem_i rem_i)
//! dv_j  = sum_i A_ij do_i      dk_j = scale * sum_i dz_ij q_i      dq_i = scale * sum_j dz_ij k_j
//! ```
//!
//! The inner sum has to be built from the oldest key upwards. Taking it as the row's total minus the nearer part, as
//! softmax kernels do, cancels: for old keys the true sum is tiny while beta is not.
//!
//! **Early exit.** Keys are visited from the newest to the oldest. Once every row of a query tile has rem < 2^-k, the
//! older key tiles change o by at most 2^-k max|v|, and each dz they hold is at most 2^-k (max|do . v| + |drem|), so both
//! passes leave them out. k is [`StickBreakingSpec::early_exit_bits`]; 0 visits everything.

pub mod cpu;
pub mod cuda;
pub mod decode;
pub mod decode_cuda;
pub mod hopper;
pub mod reference;
mod stick;
pub mod tiles_cuda;

use std::ops::Range;

use super::schedule::QueryTile;
use super::{AttentionInputs, AttentionLayout};
use crate::{KernelError, Result};

/// What to compute: sizes, scale, mask and early exit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StickBreakingSpec {
    /// Sizes and strides.
    pub layout: AttentionLayout,
    /// Factor of q . k; 1 / sqrt(head_dim) by default.
    pub scale: f64,
    /// Whether a token sees its own key.
    pub attend_current: bool,
    /// k: key tiles are skipped once every row of a query tile has rem < 2^-k. 0 switches this off.
    pub early_exit_bits: u32,
}

impl StickBreakingSpec {
    /// Strict mask, scale 1 / sqrt(head_dim), no early exit.
    pub fn new(layout: AttentionLayout) -> Self {
        let scale = 1.0 / (layout.head_dim.max(1) as f64).sqrt();
        Self { layout, scale, attend_current: false, early_exit_bits: 0 }
    }

    fn validate<T>(&self, op: &'static str, inputs: &AttentionInputs<'_, T>) -> Result<Vec<Range<usize>>> {
        if !self.scale.is_finite() {
            return Err(KernelError::size(op, "scale", "finite", self.scale));
        }
        self.layout.check_inputs(op, inputs)
    }

    /// What rem has to be below for the older keys to be skipped; 0 if they never are.
    fn threshold(&self) -> f32 {
        if self.early_exit_bits == 0 { 0.0 } else { (-f64::from(self.early_exit_bits)).exp2() as f32 }
    }

    /// Keys that query `row` of a document sees: those below this one.
    fn visible_keys(&self, row: usize) -> usize {
        row + usize::from(self.attend_current)
    }
}

/// What a forward pass writes, in full.
#[derive(Debug)]
pub struct StickBreakingOutputs<'a, T> {
    /// `[tokens, query_heads, head_dim]` with `output_stride`.
    pub o: &'a mut [T],
    /// What is left of the stick, `[tokens, query_heads]`.
    pub rem: Option<&'a mut [T]>,
    /// Its binary logarithm, `[tokens, query_heads]`, which stays finite where `rem` underflows to 0.
    /// After an early exit it covers the visited keys.
    pub log2_rem: Option<&'a mut [T]>,
}

/// What the backward pass needs of the forward pass, besides its inputs, and how much was visited.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StickBreakingSaved {
    /// The oldest key tile visited by each query tile, in the order (document, head, tile); empty without early exit.
    first_key_tiles: Vec<u32>,
    visited_tiles: Vec<u64>,
    causal_tiles: u64,
}

impl StickBreakingSaved {
    /// For each query head, how many (query tile, key tile) pairs the forward pass visited.
    pub fn visited_tiles(&self) -> &[u64] {
        &self.visited_tiles
    }

    /// How many such pairs of one head hold a visible key.
    pub fn causal_tiles(&self) -> u64 {
        self.causal_tiles
    }

    fn new(spec: &StickBreakingSpec, tiles: &[QueryTile], first_key_tiles: Vec<u32>) -> Self {
        let mut visited_tiles = vec![0; spec.layout.query_heads];
        let mut causal_tiles = 0;
        for (tile, &first) in tiles.iter().zip(&first_key_tiles) {
            let causal = tile.visible.key_tiles() as u64;
            visited_tiles[tile.head] += causal - u64::from(first);
            causal_tiles += if tile.head == 0 { causal } else { 0 };
        }
        let first_key_tiles = if spec.early_exit_bits == 0 { Vec::new() } else { first_key_tiles };
        Self { first_key_tiles, visited_tiles, causal_tiles }
    }

    /// Refuses the state of another shape or of a pass without early exit.
    fn check(&self, op: &'static str, spec: &StickBreakingSpec, tiles: &[QueryTile]) -> Result<()> {
        let expected = if spec.early_exit_bits == 0 { 0 } else { tiles.len() };
        crate::error::check_len(op, "saved first key tiles", &self.first_key_tiles, expected)?;
        for (position, (&first, tile)) in self.first_key_tiles.iter().zip(tiles).enumerate() {
            let limit = tile.visible.key_tiles();
            if first as usize > limit {
                let (what, value) = ("saved first key tiles", i64::from(first));
                return Err(KernelError::Index { op, what, position, value, allowed: format!("at most {limit}") });
            }
        }
        Ok(())
    }

    fn first_key_tile(&self, query_tile: usize) -> usize {
        self.first_key_tiles.get(query_tile).map_or(0, |&first| first as usize)
    }
}
