//! Line charts as SVG.

use std::fmt::Write;

use super::escape;
use super::ticks::Axis;

/// Width and height of a chart, in the units of its text: shown at this size, text is 12 pixels high.
pub(super) type Size = (f64, f64);
const STANDALONE: Size = (760.0, 340.0);
/// Space around the plot's frame: left, right, top, bottom.
const MARGINS: (f64, f64, f64, f64) = (66.0, 18.0, 50.0, 52.0);
/// Lines with more points are thinned out; about two points per shown pixel column stay.
const MOST_POINTS: usize = 1400;
/// Series have this many colours; further ones start over.
const COLOURS: usize = 6;

/// How values are laid out along an axis. The logarithmic ones show only values above 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scale {
    /// Evenly.
    #[default]
    Linear,
    /// Logarithmically, with ticks at powers of two: context lengths.
    Log2,
    /// Logarithmically, with ticks at powers of ten.
    Log10,
}

impl Scale {
    pub(super) fn shows(self, value: f64) -> bool {
        value.is_finite() && (self == Self::Linear || value > 0.0)
    }

    pub(super) fn apply(self, value: f64) -> f64 {
        match self {
            Self::Linear => value,
            Self::Log2 => value.log2(),
            Self::Log10 => value.log10(),
        }
    }
}

/// One line of a chart.
#[derive(Debug, Clone, Default)]
pub struct Series {
    /// Name in the legend; empty for none.
    pub name: String,
    /// Points in order of x. The line has a gap where a value is not finite.
    pub points: Vec<(f64, f64)>,
    /// Drawn thin and pale: raw values behind a smoothed line. It takes the colour of the series after it.
    pub faint: bool,
    /// A dot on each point: few points that were measured one by one.
    pub dots: bool,
}

/// What is written around a chart.
#[derive(Debug, Clone, Default)]
pub struct ChartLabels {
    /// Title above.
    pub title: String,
    /// What x is, with its unit.
    pub x: String,
    /// What y is, with its unit.
    pub y: String,
    /// Layout of the x axis.
    pub x_scale: Scale,
    /// Layout of the y axis.
    pub y_scale: Scale,
    /// Vertical dashed lines with a label, at x.
    pub marks: Vec<(f64, String)>,
}

/// A chart as a whole SVG file, to be shown anywhere; light or dark as the reader prefers.
pub fn line_chart_svg(series: &[Series], labels: &ChartLabels) -> String {
    let paper = "<rect class=\"paper\" width=\"100%\" height=\"100%\"/>";
    svg(series, labels, STANDALONE, &format!("<style>{VARIABLES}{STYLE}</style>{paper}"))
}

/// The colours of page and charts; a page must have them and [`STYLE`] once.
pub(super) const VARIABLES: &str = include_str!("colours.css");
/// How charts use the colours.
pub(super) const STYLE: &str = include_str!("chart.css");

/// A chart inside of a page that has the styles.
pub(super) fn inline_svg(series: &[Series], labels: &ChartLabels, size: Size) -> String {
    svg(series, labels, size, "")
}

fn svg(series: &[Series], labels: &ChartLabels, (width, height): Size, style: &str) -> String {
    let (left, right, top, bottom) = (MARGINS.0, width - MARGINS.1, MARGINS.2, height - MARGINS.3);
    let points = || series.iter().flat_map(|series| &series.points);
    let visible = || points().filter(|(x, y)| labels.x_scale.shows(*x) && labels.y_scale.shows(*y));
    let marks = labels.marks.iter().map(|(x, _)| *x).filter(|_| visible().next().is_some());
    let x_margin = if labels.x_scale == Scale::Linear { 0.0 } else { 0.03 };
    let x_axis = Axis::of(labels.x_scale, visible().map(|(x, _)| *x).chain(marks), x_margin);
    let y_axis = Axis::of(labels.y_scale, visible().map(|(_, y)| *y), 0.06);
    let at_x = |x| x_axis.place(x).map(|share| left + share * (right - left));
    let at_y = |y| y_axis.place(y).map(|share| bottom - share * (bottom - top));

    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"chart\" viewBox=\"0 0 {width} {height}\" role=\"img\" \
         aria-label=\"{}\" data-x=\"{:?} {} {} {left} {right}\" data-y=\"{:?} {} {} {bottom} {top}\">{style}",
        escape(&labels.title),
        labels.x_scale,
        x_axis.low,
        x_axis.high,
        labels.y_scale,
        y_axis.low,
        y_axis.high,
    );
    // Writing to a String cannot fail.
    let _ = write!(out, "<text class=\"title\" x=\"{left}\" y=\"22\">{}</text>", escape(&labels.title));
    let _ = write!(out, "<text class=\"label\" x=\"{left}\" y=\"40\">{}</text>", escape(&labels.y));
    let (middle, below) = ((left + right) / 2.0, height - 12.0);
    let _ = write!(out, "<text class=\"label mid\" x=\"{middle}\" y=\"{below}\">{}</text>", escape(&labels.x));
    if visible().next().is_none() {
        let _ = write!(out, "<text class=\"label mid\" x=\"{middle}\" y=\"{}\">no data</text></svg>", height / 2.0);
        return out;
    }
    for (value, label) in y_axis.ticks(6) {
        let Some(y) = at_y(value) else { continue };
        let _ = write!(out, "<path class=\"grid\" d=\"M{left} {y:.1}H{right}\"/>");
        let _ = write!(out, "<text class=\"tick end\" x=\"{}\" y=\"{:.1}\">{label}</text>", left - 9.0, y + 4.0);
    }
    // Powers of two have short labels.
    let spacing = if labels.x_scale == Scale::Log2 { 50.0 } else { 80.0 };
    for (value, label) in x_axis.ticks((width / spacing) as usize) {
        let Some(x) = at_x(value) else { continue };
        let _ = write!(out, "<path class=\"axis\" d=\"M{x:.1} {bottom}v5\"/>");
        let _ = write!(out, "<text class=\"tick mid\" x=\"{x:.1}\" y=\"{}\">{label}</text>", bottom + 19.0);
    }
    let _ = write!(out, "<path class=\"axis\" d=\"M{left} {bottom}H{right}\"/>");
    for (x, label) in &labels.marks {
        let Some(x) = at_x(*x) else { continue };
        let (side, anchor) = if x > right - 110.0 { (-6.0, "end") } else { (6.0, "start") };
        let _ = write!(out, "<path class=\"mark\" d=\"M{x:.1} {top}V{bottom}\"/>");
        let (text_x, text_y) = (x + side, top + 13.0);
        let label = escape(label);
        let _ = write!(out, "<text class=\"tick {anchor}\" x=\"{text_x:.1}\" y=\"{text_y}\">{label}</text>");
    }
    let mut colour = 0;
    let mut legend = Vec::new();
    for line in series {
        let faint = if line.faint { " faint" } else { "" };
        let places = line.points.iter().map(|&(x, y)| at_x(x).zip(at_y(y)));
        let (path, lonely) = path(&thin(places.collect()));
        let name = escape(&line.name);
        let _ = write!(out, "<path class=\"line c{colour}{faint}\" data-name=\"{name}\" d=\"{path}\"/>");
        let dots: Vec<(f64, f64)> =
            if line.dots { line.points.iter().filter_map(|&(x, y)| at_x(x).zip(at_y(y))).collect() } else { lonely };
        for (x, y) in dots {
            let _ = write!(out, "<circle class=\"dot c{colour}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\"/>");
        }
        if !line.name.is_empty() {
            legend.push((colour, faint, &line.name));
        }
        if !line.faint {
            colour = (colour + 1) % COLOURS;
        }
    }
    // The legend stands above the frame, its last name at the right end.
    let mut x = right;
    for (colour, faint, name) in legend.into_iter().rev() {
        let _ = write!(out, "<text class=\"tick end\" x=\"{x:.1}\" y=\"26\">{}</text>", escape(name));
        x -= name.chars().count() as f64 * 6.2 + 6.0;
        let _ = write!(out, "<path class=\"line c{colour}{faint}\" d=\"M{:.1} 22H{x:.1}\"/>", x - 18.0);
        x -= 34.0;
    }
    out + "</svg>"
}

type Place = Option<(f64, f64)>;

/// The path of a line with its gaps, and the points that have gaps on both sides.
fn path(places: &[Place]) -> (String, Vec<(f64, f64)>) {
    let (mut path, mut lonely) = (String::new(), Vec::new());
    for piece in places.split(Option::is_none).filter(|piece| !piece.is_empty()) {
        let piece: Vec<(f64, f64)> = piece.iter().flatten().copied().collect();
        for (index, (x, y)) in piece.iter().enumerate() {
            let _ = write!(path, "{}{x:.1} {y:.1}", if index == 0 { 'M' } else { 'L' });
        }
        if piece.len() == 1 {
            lonely.push(piece[0]);
        }
    }
    (path, lonely)
}

/// Of a long line, the lowest and the highest point of each stretch: a spike must stay visible.
fn thin(places: Vec<Place>) -> Vec<Place> {
    if places.len() <= MOST_POINTS {
        return places;
    }
    let stretch = places.len().div_ceil(MOST_POINTS / 2);
    let mut thinned = Vec::with_capacity(MOST_POINTS);
    for piece in places.chunks(stretch) {
        let shown = || piece.iter().flatten().copied();
        let (low, high) = (shown().min_by(|a, b| a.1.total_cmp(&b.1)), shown().max_by(|a, b| a.1.total_cmp(&b.1)));
        let in_order = low.zip(high).is_none_or(|(low, high)| low.0 <= high.0);
        thinned.extend(if in_order { [low, high] } else { [high, low] });
    }
    thinned
}
