//! How far the stick reaches and where the heads look, as the report shows it.

use crate::data::Loader;
use crate::evaluate::{BatchTensors, TOKENS_AT_ONCE, windows_at_once};
use crate::metrics::{AttentionHead, AttentionMap, AttentionMetrics, TilesMetrics};
use anyhow::Result;
use stickbreak_model::Transformer;
use stickbreak_tensor::Tensor;

/// Tokens at the beginning of the text whose dense weights are looked at.
const DENSE_TOKENS: usize = 512;
/// Cells per side of a map.
const MAP_CELLS: usize = 48;
/// Maps are kept for at most so many heads of a layer: a page should stay a page.
const MAPS_PER_LAYER: usize = 4;

/// The attention of every head on one text; `None` for a softmax model.
///
/// # Errors
/// If the model cannot run on the ids.
pub fn attention_metrics(model: &Transformer, ids: &Tensor, step: u64) -> Result<Option<AttentionMetrics>> {
    let Some(layers) = model.inspect_attention(ids, DENSE_TOKENS)? else { return Ok(None) };
    let mut heads = Vec::new();
    for (layer, attention) in layers.iter().enumerate() {
        let size = attention.weights.dim(1)?;
        let all = attention.weights.to_f64_vec()?;
        for (head, weights) in all.chunks_exact(size * size).enumerate() {
            heads.push(AttentionHead {
                layer,
                head,
                tiles_visited: attention.tiles_visited[head],
                mean_reach: mean_reach(weights, size),
                map: (head < MAPS_PER_LAYER).then(|| down_sample(weights, size)),
            });
        }
    }
    Ok(Some(AttentionMetrics { step, context: ids.elements(), heads }))
}

/// What early exit leaves out of each head's tiles on some windows spread over a text; `None` if it is off, and for a
/// softmax model.
///
/// # Errors
/// If tokens cannot be read or the model cannot run.
pub fn tiles_metrics(model: &Transformer, text: &Loader, step: u64) -> Result<Option<TilesMetrics>> {
    let context = text.sequence_length();
    let mut batches = text.spread(windows_at_once(text), context, TOKENS_AT_ONCE as u64)?;
    let Some(batch) = batches.next().transpose()? else { return Ok(None) };
    let BatchTensors { ids, packing, .. } = BatchTensors::new(&batch, model.device())?;
    let skipped = model.skipped_tiles(&ids, &packing)?;
    Ok(skipped.map(|skipped| TilesMetrics { step, tokens: batch.ids.len(), context, skipped }))
}

/// Mean distance from query to key, weighted by attention.
fn mean_reach(weights: &[f64], size: usize) -> f64 {
    let (mut distance, mut total) = (0.0, 0.0);
    for query in 0..size {
        for key in 0..query {
            let weight = weights[query * size + key];
            distance += weight * (query - key) as f64;
            total += weight;
        }
    }
    if total > 0.0 { distance / total } else { 0.0 }
}

/// Cells of queries by keys: sums over keys, means over queries.
fn down_sample(weights: &[f64], size: usize) -> AttentionMap {
    let cells = MAP_CELLS.min(size).max(1);
    let cell = |token: usize| token * cells / size.max(1);
    let mut sums = vec![0.0; cells * cells];
    let mut queries = vec![0usize; cells];
    for query in 0..size {
        queries[cell(query)] += 1;
        for key in 0..=query {
            sums[cell(query) * cells + cell(key)] += weights[query * size + key];
        }
    }
    let weights = sums.iter().enumerate().map(|(i, &sum)| (sum / queries[i / cells].max(1) as f64) as f32).collect();
    AttentionMap { size: cells, weights }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_keeps_the_weight_of_every_query() {
        let size = 100;
        // Each query gives all its weight to the key 10 tokens before it.
        let mut weights = vec![0.0; size * size];
        for query in 10..size {
            weights[query * size + query - 10] = 1.0;
        }
        assert_eq!(mean_reach(&weights, size), 10.0);
        let map = down_sample(&weights, size);
        let rows: Vec<f32> = map.weights.chunks(map.size).map(|row| row.iter().sum()).collect();
        assert!(rows[map.size / 2..].iter().all(|&row| (row - 1.0).abs() < 1e-6));
    }
}
