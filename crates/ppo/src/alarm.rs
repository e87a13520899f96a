//! Over-optimisation: the reward models' scores rise while a reward model that takes no part falls.

use arete_records::stats::{self, Interval, Resampling};
use serde::{Deserialize, Serialize};

/// A probe as later ones are measured against it: one number a validation prompt.
///
/// f32, whose text parses to the same bits.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Baseline {
    /// Mean standardised score of the ensemble.
    pub z: Vec<f32>,
    /// Score of the yardstick; empty if there is none.
    pub yardstick: Vec<f32>,
}

/// How a probe differs from an earlier one, on the same prompts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change {
    /// Of the ensemble's mean, with its 95 % interval.
    pub z: Interval,
    /// Of the yardstick's mean, with its 95 % interval.
    pub yardstick: Interval,
}

impl Change {
    /// From `earlier` to `now`; none without a yardstick, or if the probes are not of the same prompts.
    pub fn between(earlier: &Baseline, now: &Baseline, seed: u64) -> Option<Self> {
        let n = now.yardstick.len();
        let same = [&earlier.z, &earlier.yardstick, &now.z].into_iter().all(|part| part.len() == n);
        if n == 0 || !same {
            return None;
        }
        let difference = |first: &[f32], now: &[f32]| {
            let clusters =
                |part: &[f32]| part.iter().map(|&x| vec![f64::from(x)]).collect::<Vec<_>>();
            let (first, now) = (clusters(first), clusters(now));
            stats::paired_difference_of(&first, &now, stats::mean, Resampling::seeded(seed))
                .interval
        };
        Some(Self {
            z: difference(&earlier.z, &now.z),
            yardstick: difference(&earlier.yardstick, &now.yardstick),
        })
    }

    /// The ensemble has gained and the yardstick has lost more than chance explains: the policy learns what the reward
    /// models get wrong.
    ///
    /// # Source
    ///
    /// Gao et al. 2022 (arXiv:2210.10760): the proxy's score goes on rising when the gold score falls.
    pub fn is_over_optimised(&self) -> bool {
        self.z.estimate > 0.0 && self.yardstick.high < 0.0
    }
}

impl Baseline {
    /// Whether the yardstick's mean is higher here than in `other`; false without a yardstick.
    pub fn is_above(&self, other: &Self) -> bool {
        let sum = |scores: &[f32]| scores.iter().copied().map(f64::from).sum::<f64>();
        let [own, other] = [&self.yardstick, &other.yardstick];
        own.len() == other.len() && sum(own) > sum(other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn baseline(z: &[f32], yardstick: &[f32]) -> Baseline {
        Baseline { z: z.to_vec(), yardstick: yardstick.to_vec() }
    }

    #[test]
    fn the_alarm_needs_a_rise_and_a_fall_beyond_chance() {
        let first = baseline(&[0.0, 0.5, -0.5, 0.25], &[1.0, 2.0, 0.0, 1.0]);
        let higher = [1.0, 1.5, 0.5, 1.25];
        let change = |z: &[f32], yardstick: &[f32]| {
            Change::between(&first, &baseline(z, yardstick), 1).unwrap()
        };
        // Every prompt gains 1 with the ensemble and loses 1 or 2 with the yardstick.
        let hacked = change(&higher, &[0.0, 0.0, -2.0, 0.0]);
        assert_eq!((hacked.z.estimate, hacked.yardstick.estimate), (1.0, -1.5));
        assert!(hacked.yardstick.high <= -1.0);
        assert!(hacked.is_over_optimised());
        // Both rise; the yardstick falls on some prompts and rises on others; both fall.
        assert!(!change(&higher, &[2.0, 3.0, 1.0, 2.0]).is_over_optimised());
        assert!(!change(&higher, &[-1.0, 3.0, -2.0, 3.0]).is_over_optimised());
        assert!(!change(&[-1.0; 4], &[0.0, 0.0, -2.0, 0.0]).is_over_optimised());
    }

    #[test]
    fn a_fall_from_the_highest_probe_counts_though_the_first_was_lower() {
        let first = baseline(&[0.0; 4], &[0.0, 0.5, -0.5, 0.0]);
        let highest = baseline(&[1.0; 4], &[1.0, 1.5, 0.5, 1.0]);
        let now = baseline(&[2.0; 4], &[0.5, 1.0, 0.0, 0.5]);
        assert!(highest.is_above(&first) && !now.is_above(&highest) && !first.is_above(&first));
        assert!(!Change::between(&first, &now, 1).unwrap().is_over_optimised());
        assert!(Change::between(&highest, &now, 1).unwrap().is_over_optimised());
        assert!(!baseline(&[], &[]).is_above(&first));
    }

    #[test]
    fn without_a_yardstick_nothing_is_said() {
        let first = baseline(&[0.0, 1.0], &[]);
        assert_eq!(Change::between(&first, &baseline(&[2.0, 3.0], &[]), 1), None);
        let other = baseline(&[0.0], &[1.0]);
        assert_eq!(Change::between(&first, &other, 1), None);
    }

    #[test]
    fn a_baseline_survives_a_checkpoint_to_the_bit() {
        let kept = baseline(&[0.1, 1.0 / 3.0, -7.3e-9], &[2.1, f32::MIN_POSITIVE, 1e30]);
        let json = serde_json::to_vec_pretty(&kept).unwrap();
        assert_eq!(serde_json::from_slice::<Baseline>(&json).unwrap(), kept);
    }
}
