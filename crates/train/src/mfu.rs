//! Model flops utilisation: how much of a card's peak rate a training step uses.
//!
//! `MFU = model flops of a step / seconds / peak`. Model flops are [`training_flops`](stickbreak_model::count): 6 x
//! matrix parameters x tokens, and attention counted causal-half; recomputed activations do not count. The peak is the
//! dense bf16 rate of the card's data sheet. A card that is not in the table, or a part of a card, has none: a guess
//! would be worse than nothing.

/// Dense bf16 tensor-core rates with fp32 accumulation, in flop/s, from NVIDIA's data sheets (half of a figure "with
/// sparsity"). The first entry whose words are all in a card's name counts, so variants stand before their family.
const PEAKS: &[(&[&str], f64)] = &[
    (&["GB200"], 2500e12),
    (&["B200"], 2250e12),
    (&["GH200"], 989e12),
    (&["H200", "NVL"], 835e12),
    (&["H200"], 989e12),
    (&["H100", "PCIE"], 756e12),
    (&["H100", "NVL"], 835e12),
    (&["H100"], 989e12),
    (&["H800", "PCIE"], 756e12),
    (&["H800"], 989e12),
    (&["H20"], 148e12),
    (&["A100"], 312e12),
    (&["A800"], 312e12),
    (&["A30"], 165e12),
    (&["A40"], 150e12),
    (&["A10"], 125e12),
    (&["L40S"], 362e12),
    (&["L40"], 181e12),
    (&["L4"], 121e12),
    (&["RTX", "6000", "ADA"], 364e12),
    (&["RTX", "5090"], 209e12),
    (&["RTX", "4090"], 165e12),
    (&["RTX", "3090"], 71e12),
];

/// Words that make a card another one than its family: a slice of it, a mobile or a cut-down part.
const OTHER_CARDS: [&str; 6] = ["MIG", "LAPTOP", "D", "TI", "MAX", "SUPER"];

/// The dense bf16 peak of a card by the name that its driver gives, in flop/s.
pub fn peak_flops(device_name: &str) -> Option<f64> {
    let name = device_name.to_ascii_uppercase();
    let words: Vec<&str> = name.split(|c: char| !c.is_ascii_alphanumeric()).collect();
    if OTHER_CARDS.iter().any(|other| words.contains(other)) {
        return None;
    }
    PEAKS.iter().find(|(wanted, _)| wanted.iter().all(|word| words.contains(word))).map(|&(_, peak)| peak)
}

/// Share of a peak, 0 to 1, of so many model flops in so many seconds.
pub fn utilisation(flops: f64, seconds: f64, peak: Option<f64>) -> Option<f64> {
    Some(flops / seconds / peak?).filter(|share| share.is_finite())
}

/// How the figures are counted, as printed once at the start of a run.
pub fn formula(device_name: Option<&str>, peak: Option<f64>) -> String {
    let peak = match (device_name, peak) {
        (Some(name), Some(peak)) => format!("MFU is over {:.0} TFLOP/s, dense bf16 of {name}", peak / 1e12),
        (Some(name), None) => format!("MFU is n/a: no bf16 peak is known for this kind of run on {name}"),
        (None, _) => "MFU is n/a on a CPU".to_owned(),
    };
    format!("flops: 6 x matrix parameters x tokens + attention counted causal-half (3 x its forward); {peak}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_have_the_peak_of_their_data_sheet_by_the_name_that_the_driver_gives() {
        for (name, peak) in [
            ("NVIDIA H200", 989e12),
            ("NVIDIA H100 80GB HBM3", 989e12),
            ("NVIDIA H100 PCIe", 756e12),
            ("NVIDIA H100 NVL", 835e12),
            ("NVIDIA A100-SXM4-80GB", 312e12),
            ("NVIDIA A100 80GB PCIe", 312e12),
            ("NVIDIA A10", 125e12),
            ("NVIDIA L40S", 362e12),
            ("NVIDIA L40", 181e12),
            ("NVIDIA L4", 121e12),
            ("NVIDIA B200", 2250e12),
            ("NVIDIA GeForce RTX 4090", 165e12),
        ] {
            assert_eq!(peak_flops(name), Some(peak), "{name}");
        }
    }

    #[test]
    fn a_card_that_is_not_known_or_not_whole_has_none() {
        for name in [
            "",
            "NVIDIA H200 MIG 1g.18gb",
            "NVIDIA H300",
            "NVIDIA GeForce RTX 4090 Laptop GPU",
            "NVIDIA GeForce RTX 4090 D",
            "NVIDIA GeForce RTX 3090 Ti",
            "Tesla V100-SXM2-16GB",
            "NVIDIA A1000",
        ] {
            assert_eq!(peak_flops(name), None, "{name}");
        }
    }

    #[test]
    fn utilisation_is_flops_over_time_and_peak() {
        assert_eq!(utilisation(5e14, 1.0, Some(1e15)), Some(0.5));
        assert_eq!(utilisation(5e14, 1.0, None), None);
        assert_eq!(utilisation(5e14, 0.0, Some(1e15)), None);
        assert!(formula(Some("NVIDIA H200"), peak_flops("NVIDIA H200")).contains("989 TFLOP/s"));
        assert!(formula(Some("X"), None).contains("n/a"));
    }
}
