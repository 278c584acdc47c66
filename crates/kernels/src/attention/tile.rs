//! Tile sizes and the register-blocked products under both attentions.
//!
//! A query tile is a few *panels* of [`LANES`] rows, and everything about a panel is stored with its rows as the
//! innermost index: scores are `[key][row]`, a transposed query is `[dim][row]`. So one vector register holds one key's
//! scores for many queries, and the recurrence along the keys runs in all of them at once, without shuffles.
//! The other operand of a product comes in *blocks* of [`BLOCK`] keys or dims: 6 x 16 sums of f32 are twelve AVX2
//! registers, which leaves room for both operands among the sixteen.

use crate::Float;

/// Query rows in one panel.
pub(super) const LANES: usize = 16;
/// Keys, or dims, that one product handles at a time.
pub(super) const BLOCK: usize = 6;
/// Panels in one query tile.
pub(super) const PANELS: usize = 6;
/// Rows in one query tile.
pub(super) const TILE_ROWS: usize = PANELS * LANES;
/// Keys in one key tile.
pub(super) const TILE_KEYS: usize = 16 * BLOCK;

/// One number for each row of a panel.
pub(super) type Lanes<T> = [T; LANES];
/// The sums that a product keeps in registers.
pub(super) type Sums<T> = [Lanes<T>; BLOCK];

/// `sums[m][lane] += sum_k a[k][m] * b[k][lane]`
#[inline(always)]
pub(super) fn accumulate<T: Float>(sums: &mut Sums<T>, a: &[[T; BLOCK]], b: &[Lanes<T>]) {
    let mut local = *sums;
    for (a, b) in a.iter().zip(b) {
        for m in 0..BLOCK {
            for lane in 0..LANES {
                local[m][lane] = a[m].mul_add(b[lane], local[m][lane]);
            }
        }
    }
    *sums = local;
}

/// `sums[m][lane] += sum_row a[m][row] * b[row][lane]` over the rows of one panel: here the lanes are dims.
#[inline(always)]
pub(super) fn accumulate_rows<T: Float>(sums: &mut Sums<T>, a: &Sums<T>, b: &[Lanes<T>; LANES]) {
    let mut local = *sums;
    for row in 0..LANES {
        for m in 0..BLOCK {
            for lane in 0..LANES {
                local[m][lane] = a[m][row].mul_add(b[row][lane], local[m][lane]);
            }
        }
    }
    *sums = local;
}

/// `scores[key][row] = sum_dim keys[key][dim] * queries[dim][row]` for as many blocks of keys as there are `scores`.
/// `keys` holds `head_dim` entries per block, `queries` is one panel.
#[inline(always)]
pub(super) fn scores<T: Float>(scores: &mut [Lanes<T>], keys: &[[T; BLOCK]], queries: &[Lanes<T>]) {
    let (blocks, _) = scores.as_chunks_mut::<BLOCK>();
    for (block, keys) in blocks.iter_mut().zip(keys.chunks_exact(queries.len())) {
        let mut sums = [[T::ZERO; LANES]; BLOCK];
        accumulate(&mut sums, keys, queries);
        *block = sums;
    }
}

/// Hides keys from rows by z = -infinity: row `lane` sees the keys below `all + lane`. A hidden key gets weight 0 in
/// either attention, exactly, and leaves a stick whole.
#[inline(always)]
pub(super) fn hide_future<T: Float>(z: &mut [Lanes<T>], all: usize) {
    for (key, z) in z.iter_mut().enumerate().skip(all) {
        for lane in 0..LANES {
            z[lane] = if key < all + lane { z[lane] } else { T::NEG_INFINITY };
        }
    }
}

/// The part of a query tile that its document really has, and which keys each of its panels sees.
#[derive(Debug, Clone, Copy)]
pub(super) struct Visible {
    /// First row of the tile, counted from the start of the document.
    pub first_row: usize,
    /// Rows in the tile.
    pub rows: usize,
    /// 1 if a row sees its own key, else 0.
    pub own_key: usize,
}

impl Visible {
    /// Panels that hold at least one row.
    #[inline(always)]
    pub fn panels(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// Keys below this one are seen by every row of the panel; row `lane` sees those below `all(panel) + lane`.
    #[inline(always)]
    pub fn all(&self, panel: usize) -> usize {
        self.first_row + panel * LANES + self.own_key
    }

    /// Keys from this one on are seen by no row of the panel.
    #[inline(always)]
    pub fn end(&self, panel: usize) -> usize {
        self.first_row + ((panel + 1) * LANES).min(self.rows) - 1 + self.own_key
    }

    /// Keys from this one on are seen by no row of the tile.
    #[inline(always)]
    pub fn tile_end(&self) -> usize {
        self.first_row + self.rows - 1 + self.own_key
    }

    /// Key tiles that hold a key that some row sees.
    #[inline(always)]
    pub fn key_tiles(&self) -> usize {
        self.tile_end().div_ceil(TILE_KEYS)
    }

    /// Of the key tile that starts at `first_key`: how many keys some row of the panel sees, and how many all do.
    #[inline(always)]
    pub fn in_tile(&self, panel: usize, first_key: usize) -> (usize, usize) {
        let seen = self.end(panel).saturating_sub(first_key).min(TILE_KEYS);
        (seen, self.all(panel).saturating_sub(first_key).min(seen))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_match_plain_sums() {
        let a: Vec<[f64; BLOCK]> = (0..7).map(|k| std::array::from_fn(|m| (k * 3 + m) as f64)).collect();
        let b: Vec<Lanes<f64>> = (0..7).map(|k| std::array::from_fn(|l| (k + 2 * l) as f64 - 5.0)).collect();
        let mut sums = [[1.0; LANES]; BLOCK];
        accumulate(&mut sums, &a, &b);
        for (m, row) in sums.iter().enumerate() {
            for (lane, sum) in row.iter().enumerate() {
                let expected: f64 = 1.0 + (0..7).map(|k| a[k][m] * b[k][lane]).sum::<f64>();
                assert_eq!(*sum, expected);
            }
        }
        let transposed: Sums<f64> = std::array::from_fn(|m| std::array::from_fn(|row| (m * row) as f64 - 7.0));
        let rows: [Lanes<f64>; LANES] = std::array::from_fn(|row| std::array::from_fn(|l| (row + 3 * l) as f64));
        let mut sums = [[0.5; LANES]; BLOCK];
        accumulate_rows(&mut sums, &transposed, &rows);
        for (m, row) in sums.iter().enumerate() {
            for (lane, sum) in row.iter().enumerate() {
                let expected: f64 = 0.5 + (0..LANES).map(|r| transposed[m][r] * rows[r][lane]).sum::<f64>();
                assert_eq!(*sum, expected);
            }
        }
    }

    #[test]
    fn visible_keys_of_a_partial_tile() {
        // Rows 96..=116: panel 0 has rows 96..=111, panel 1 rows 112..=116.
        let strict = Visible { first_row: 96, rows: 21, own_key: 0 };
        assert_eq!((strict.panels(), strict.key_tiles()), (2, 2));
        assert_eq!((strict.all(0), strict.end(0), strict.all(1), strict.end(1)), (96, 111, 112, 116));
        assert_eq!(strict.in_tile(0, 0), (96, 96));
        assert_eq!(strict.in_tile(0, 96), (15, 0));
        assert_eq!(strict.in_tile(1, 96), (20, 16));
        let first = Visible { first_row: 0, rows: 1, own_key: 0 };
        assert_eq!((first.key_tiles(), first.in_tile(0, 0)), (0, (0, 0)));
        assert_eq!(Visible { own_key: 1, ..first }.in_tile(0, 0), (1, 1));
    }
}
