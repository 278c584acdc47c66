//! Learning rate by step.

use crate::config::{ScheduleConfig, ScheduleKind};

/// The factor of the peak learning rate at optimizer step `step` (0-based) of `steps`.
///
/// The warm-up rises linearly and reaches 1 at step `warmup_steps`; the shapes then run from 1 to `final_fraction`,
/// which they reach at the last step.
pub fn learning_rate_factor(schedule: &ScheduleConfig, step: u64, steps: u64) -> f64 {
    let warmup = schedule.warmup_steps;
    if step < warmup {
        return (step + 1) as f64 / (warmup + 1) as f64;
    }
    let last = steps.saturating_sub(1).max(warmup + 1);
    let progress = ((step - warmup) as f64 / (last - warmup) as f64).min(1.0);
    let end = schedule.final_fraction;
    match schedule.kind {
        ScheduleKind::Constant => 1.0,
        ScheduleKind::Linear => 1.0 + (end - 1.0) * progress,
        ScheduleKind::Cosine => end + (1.0 - end) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        ScheduleKind::Wsd => {
            let stable = 1.0 - schedule.decay_fraction;
            if progress <= stable { 1.0 } else { 1.0 + (end - 1.0) * (progress - stable) / schedule.decay_fraction }
        }
        ScheduleKind::Power => {
            let start = warmup.max(1) as f64;
            ((step - warmup) as f64 / start + 1.0).powf(-schedule.exponent).max(end)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(kind: ScheduleKind, step: u64) -> f64 {
        let schedule = ScheduleConfig { kind, warmup_steps: 10, final_fraction: 0.1, ..ScheduleConfig::default() };
        learning_rate_factor(&schedule, step, 111)
    }

    #[test]
    fn every_schedule_rises_to_one_and_ends_where_it_says() {
        for kind in [ScheduleKind::Cosine, ScheduleKind::Linear, ScheduleKind::Wsd] {
            assert_eq!(at(kind, 0), 1.0 / 11.0);
            assert_eq!(at(kind, 10), 1.0);
            assert!((at(kind, 110) - 0.1).abs() < 1e-12, "{kind:?}");
            assert!((0..110).all(|s| s < 10 || at(kind, s + 1) <= at(kind, s)), "{kind:?} falls");
        }
        assert_eq!(at(ScheduleKind::Constant, 110), 1.0);
        assert!((at(ScheduleKind::Cosine, 60) - 0.55).abs() < 1e-12, "half way down");
        assert_eq!(at(ScheduleKind::Wsd, 90), 1.0, "stable until the last fifth");
        assert!((at(ScheduleKind::Power, 40) - 0.5).abs() < 1e-12, "a quarter of the steps, half the rate");
    }

    #[test]
    fn a_run_shorter_than_its_warmup_has_finite_rates() {
        let schedule = ScheduleConfig { warmup_steps: 100, ..ScheduleConfig::default() };
        assert!((0..5).all(|step| learning_rate_factor(&schedule, step, 5).is_finite()));
    }
}
