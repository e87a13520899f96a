//! Learning rates as a function of the step.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::Error;

/// How the learning rate falls after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Not at all.
    Constant,
    /// In a straight line to 0.
    Linear,
    /// Along half a cosine to 0.
    Cosine,
}

/// A learning rate for every step.
///
/// # Source
///
/// transformers 5.23, `optimization.py` (`get_constant_schedule_with_warmup`, `get_linear_…`, `get_cosine_…`); as there,
/// the first step of a warm-up has learning rate 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The fall after the warm-up.
    pub kind: ScheduleKind,
    /// The highest learning rate.
    pub peak: f64,
    /// Steps of linear rise from 0.
    pub warmup_steps: u64,
    /// Steps in all; the rate after them is 0 (but for [`ScheduleKind::Constant`]).
    pub total_steps: u64,
}

impl Schedule {
    /// A schedule whose warm-up takes `warmup_ratio` of all steps, rounded up.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the peak is negative or not finite, or the ratio not within 0 to 1.
    pub fn new(
        kind: ScheduleKind,
        peak: f64,
        warmup_ratio: f64,
        total_steps: u64,
    ) -> Result<Self, Error> {
        if !(peak.is_finite() && peak >= 0.0) {
            return Err(Error::Invalid {
                name: "learning_rate",
                expected: "a number of at least 0".to_owned(),
                got: peak.to_string(),
            });
        }
        if !(0.0..=1.0).contains(&warmup_ratio) {
            return Err(Error::Invalid {
                name: "warmup_ratio",
                expected: "a number within 0 to 1".to_owned(),
                got: warmup_ratio.to_string(),
            });
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "step counts are small and the ratio is within 0 to 1"
        )]
        let warmup_steps = (total_steps as f64 * warmup_ratio).ceil() as u64;
        Ok(Self { kind, peak, warmup_steps, total_steps })
    }

    /// The learning rate of the step after `n_done` finished ones.
    #[expect(clippy::cast_precision_loss, reason = "step counts are far below 2^52")]
    pub fn learning_rate(&self, n_done: u64) -> f64 {
        if n_done < self.warmup_steps {
            return self.peak * (n_done as f64 / self.warmup_steps as f64);
        }
        let n_falling = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let progress = ((n_done - self.warmup_steps) as f64 / n_falling).min(1.0);
        self.peak
            * match self.kind {
                ScheduleKind::Constant => 1.0,
                ScheduleKind::Linear => 1.0 - progress,
                ScheduleKind::Cosine => 0.5 * (1.0 + (PI * progress).cos()),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(kind: ScheduleKind, warmup: f64) -> Vec<f64> {
        let schedule = Schedule::new(kind, 8.0, warmup, 10).unwrap();
        (0..=10).map(|n_done| schedule.learning_rate(n_done)).collect()
    }

    #[test]
    fn the_linear_schedule_rises_and_falls() {
        // 10 steps, 2 of warm-up: 0, 4, then 8 · (8 − k)/8.
        let expected = [0.0, 4.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0];
        assert_eq!(rates(ScheduleKind::Linear, 0.15), expected); // ⌈1.5⌉ = 2
    }

    #[test]
    fn the_cosine_schedule_is_half_way_down_in_the_middle() {
        let rates = rates(ScheduleKind::Cosine, 0.2);
        assert_eq!(rates[2], 8.0);
        assert!((rates[6] - 4.0).abs() < 1e-12);
        assert!((rates[4] - 8.0 * 0.853_553_390_593_273_8).abs() < 1e-12); // (1 + cos 45°) / 2
        assert!(rates[10].abs() < 1e-12);
    }

    #[test]
    fn the_constant_schedule_stays() {
        let rates = rates(ScheduleKind::Constant, 0.0);
        assert!(rates.iter().all(|&rate| rate == 8.0));
    }

    #[test]
    fn a_warmup_beyond_the_run_is_refused() {
        let error = Schedule::new(ScheduleKind::Linear, 1.0, 1.5, 10).unwrap_err();
        assert_eq!(error.to_string(), "warmup_ratio: expected a number within 0 to 1, got 1.5");
    }
}
