//! Attention: maps, and how far each head reaches.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::ticks::short_number;
use crate::metrics::{AttentionHead, AttentionMap};

/// Shades of a map besides blank.
const SHADES: usize = 10;

/// A map as SVG: one path per shade, in which neighbouring cells of a row are one rectangle. Shades go with the square
/// root of the weight, so that a few strong cells do not hide the rest.
fn map_svg(map: &AttentionMap) -> String {
    let size = map.size.max(1);
    let strongest = map.weights.iter().copied().filter(|weight| weight.is_finite()).fold(0.0, f32::max);
    let shade = |weight: &f32| {
        let share = if strongest > 0.0 && weight.is_finite() { (weight.max(0.0) / strongest).sqrt() } else { 0.0 };
        (share * SHADES as f32).round() as usize
    };
    let mut paths = vec![String::new(); SHADES + 1];
    for (y, row) in map.weights.chunks(size).enumerate() {
        let mut x = 0;
        for run in row.chunk_by(|a, b| shade(a) == shade(b)) {
            let _ = write!(paths[shade(&run[0])], "M{x} {y}h{0}v1h-{0}z", run.len());
            x += run.len();
        }
    }
    let mut svg =
        format!("<svg class=\"map\" viewBox=\"0 0 {size} {size}\" role=\"img\" aria-label=\"attention map\">");
    for (shade, path) in paths.iter().enumerate().skip(1).filter(|(_, path)| !path.is_empty()) {
        let _ = write!(svg, "<path fill-opacity=\"{:.2}\" d=\"{path}\"/>", shade as f64 / SHADES as f64);
    }
    svg + "</svg>"
}

/// The maps of the heads that have one.
pub(super) fn maps(heads: &[AttentionHead]) -> String {
    let mut html = String::from("<div class=\"maps\">");
    for head in heads {
        if let Some(map) = &head.map {
            let (layer, number) = (head.layer, head.head);
            let svg = map_svg(map);
            let _ = write!(html, "<figure>{svg}<figcaption>layer {layer}, head {number}</figcaption></figure>");
        }
    }
    html + "</div>"
}

/// A table of layers by heads, from (layer, head, value). A value is shown as `text` says on a ground whose strength is
/// `strength`, 0 to 1.
pub(super) fn table(
    caption: &str,
    cells: impl IntoIterator<Item = (usize, usize, f64)>,
    text: impl Fn(f64) -> String,
    strength: impl Fn(f64) -> f64,
) -> String {
    let mut layers: BTreeMap<usize, BTreeMap<usize, f64>> = BTreeMap::new();
    for (layer, head, value) in cells {
        layers.entry(layer).or_default().insert(head, value);
    }
    let columns = layers.values().filter_map(|row| row.last_key_value()).map(|(&head, _)| head + 1).max().unwrap_or(0);
    let mut html = format!("<div class=\"scroll\"><table class=\"heat\"><caption>{caption}</caption><tr><th></th>");
    for column in 0..columns {
        let _ = write!(html, "<th>head {column}</th>");
    }
    html += "</tr>";
    for (layer, row) in layers {
        let _ = write!(html, "<tr><th>layer {layer}</th>");
        for column in 0..columns {
            let value = row.get(&column).copied().unwrap_or(f64::NAN);
            let ground = if value.is_finite() { strength(value).clamp(0.0, 1.0) } else { 0.0 };
            let shown = if value.is_finite() { text(value) } else { "n/a".to_owned() };
            let _ = write!(html, "<td style=\"--s:{ground:.2}\">{shown}</td>");
        }
        html += "</tr>";
    }
    html + "</table></div>"
}

/// A share, 0 to 1.
pub(super) fn percent(share: f64) -> String {
    format!("{:.0}%", 100.0 * share)
}

/// Keys, short.
pub(super) fn keys(value: f64) -> String {
    if value >= 100.0 { short_number(value.round()) } else { format!("{value:.1}") }
}
