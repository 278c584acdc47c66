//! Axes: the range of the data, round numbers in it, and how they are written.

use super::chart::Scale;

/// The shown range of one axis.
#[derive(Debug, Clone, Copy)]
pub(super) struct Axis {
    pub scale: Scale,
    pub low: f64,
    pub high: f64,
}

impl Axis {
    /// The range of the values that can be shown, and a margin (share of the range) at both ends.
    pub fn of(scale: Scale, values: impl Iterator<Item = f64>, margin: f64) -> Self {
        let shown = values.filter(|&value| scale.shows(value)).map(|value| scale.apply(value));
        let (low, high) = shown.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
        let (low, high) = if low > high {
            (0.0, 1.0)
        } else if high - low <= 1e-9 * high.abs().max(1e-12) {
            let around = if scale == Scale::Linear && low != 0.0 { low.abs() * 0.1 } else { 0.5 };
            (low - around, high + around)
        } else {
            (low - margin * (high - low), high + margin * (high - low))
        };
        Self { scale, low, high }
    }

    /// Where a value lies: 0 at the low end, 1 at the high end; `None` if it cannot be shown.
    pub fn place(&self, value: f64) -> Option<f64> {
        self.scale.shows(value).then(|| (self.scale.apply(value) - self.low) / (self.high - self.low))
    }

    /// Round values inside of the range with their labels.
    pub fn ticks(&self, most: usize) -> Vec<(f64, String)> {
        let values = match self.scale {
            Scale::Linear => linear_ticks(self.low, self.high, most),
            Scale::Log2 => {
                let stride = (((self.high - self.low) / most as f64).ceil()).max(1.0);
                multiples(self.low, self.high, stride).into_iter().map(f64::exp2).collect()
            }
            Scale::Log10 => log10_ticks(self.low, self.high, most),
        };
        values.into_iter().map(|value| (value, label(value, self.scale))).collect()
    }
}

fn multiples(low: f64, high: f64, stride: f64) -> Vec<f64> {
    let (first, last) = ((low / stride - 1e-9).ceil() as i64, (high / stride + 1e-9).floor() as i64);
    (first..=last).map(|index| index as f64 * stride).collect()
}

/// 1, 2 or 5 times a power of ten apart.
fn linear_ticks(low: f64, high: f64, most: usize) -> Vec<f64> {
    let rough = (high - low) / most as f64;
    let power = 10_f64.powf(rough.log10().floor());
    let stride = [1.0, 2.0, 5.0, 10.0].iter().map(|factor| factor * power).find(|&stride| stride >= rough);
    let stride = stride.unwrap_or(10.0 * power);
    // 0.30000000000000004 is not round.
    multiples(low, high, stride).iter().map(|value| (value / power).round() * power).collect()
}

/// Powers of ten; with 2 and 5 between them if they are few.
fn log10_ticks(low: f64, high: f64, most: usize) -> Vec<f64> {
    let stride = ((high - low) / most as f64).ceil().max(1.0);
    let powers = multiples(low, high, stride);
    if powers.len() >= 3 {
        return powers.into_iter().map(|power| 10_f64.powf(power)).collect();
    }
    let decades = low.floor() as i32..=high.ceil() as i32;
    let fine: Vec<f64> = decades
        .flat_map(|power| [1.0, 2.0, 5.0].map(|factor| factor * 10_f64.powi(power)))
        .filter(|value| (low..=high).contains(&value.log10()))
        .collect();
    if fine.len() >= 2 { fine } else { linear_ticks(10_f64.powf(low), 10_f64.powf(high), most) }
}

/// A tick's value, short: `250`, `20k`, `1.5M`, `6e-4`; on a Log2 axis `2k` is 2048.
fn label(value: f64, scale: Scale) -> String {
    if scale == Scale::Log2 && value >= 1024.0 && value % 1024.0 == 0.0 {
        return if value >= 1_048_576.0 { format!("{}M", value / 1_048_576.0) } else { format!("{}k", value / 1024.0) };
    }
    short_number(value)
}

/// A number with three or four significant digits and a decimal unit.
pub(super) fn short_number(value: f64) -> String {
    let size = value.abs();
    let (scaled, unit) = match size {
        _ if !value.is_finite() => return "n/a".to_owned(),
        _ if size >= 1e12 => (value / 1e12, "T"),
        _ if size >= 1e9 => (value / 1e9, "G"),
        _ if size >= 1e6 => (value / 1e6, "M"),
        _ if size >= 1e4 => (value / 1e3, "k"),
        _ if size == 0.0 => return "0".to_owned(),
        _ if size < 1e-2 => {
            let text = format!("{value:.2e}");
            let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
            return format!("{}e{exponent}", trim_zeros(mantissa));
        }
        _ => (value, ""),
    };
    let digits = (3 - scaled.abs().log10().floor() as i32).clamp(0, 6) as usize;
    format!("{}{unit}", trim_zeros(&format!("{scaled:.digits$}")))
}

fn trim_zeros(number: &str) -> &str {
    if number.contains('.') { number.trim_end_matches('0').trim_end_matches('.') } else { number }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(scale: Scale, low: f64, high: f64) -> Vec<String> {
        let axis = Axis::of(scale, [low, high].into_iter(), 0.0);
        axis.ticks(6).into_iter().map(|(_, label)| label).collect()
    }

    #[test]
    fn ticks_are_round_and_short() {
        assert_eq!(labels(Scale::Linear, 0.0, 1.0), ["0", "0.2", "0.4", "0.6", "0.8", "1"]);
        assert_eq!(labels(Scale::Linear, 1.13, 1.46), ["1.2", "1.3", "1.4"]);
        assert_eq!(labels(Scale::Linear, 0.0, 120_000.0), ["0", "20k", "40k", "60k", "80k", "100k", "120k"]);
        assert_eq!(labels(Scale::Linear, 0.0, 6e-4), ["0", "1e-4", "2e-4", "3e-4", "4e-4", "5e-4", "6e-4"]);
        assert_eq!(labels(Scale::Log2, 512.0, 65536.0), ["1k", "4k", "16k", "64k"].map(String::from));
        assert_eq!(labels(Scale::Log10, 0.1, 30.0), ["0.1", "1", "10"]);
        assert_eq!(labels(Scale::Log10, 0.3, 2.5), ["0.5", "1", "2"]);
    }

    #[test]
    fn numbers_are_short() {
        let numbers = [(0.0, "0"), (4.14159, "4.142"), (250.0, "250"), (12_345.0, "12.35k"), (1.5e6, "1.5M")];
        for (value, text) in numbers.into_iter().chain([(f64::NAN, "n/a"), (-0.00012, "-1.2e-4"), (9999.6, "10000")]) {
            assert_eq!(short_number(value), text);
        }
    }
}
