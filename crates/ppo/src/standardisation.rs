//! Do the score statistics fit the policy that training starts from? Then its first scores are standardised: mean 0 and
//! deviation 1, as far as chance allows.
//!
//! If they do not, every weight that is measured in standard deviations (KL, cut replies, clip) means something else than it
//! says.

use arete_records::{ScoreStats, stats};
use serde::{Deserialize, Serialize};

/// Standard errors that the first mean may lie from 0.
const STANDARD_ERRORS: f64 = 3.0;
/// Where the first spread may lie.
const SPREAD: [f64; 2] = [0.6, 1.6];

/// How one reward model's scores of the first rollout lie.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Standardisation {
    /// Their mean, standardised.
    pub z: f64,
    /// What |mean| may be: three standard errors of the difference of the two means, clustered by prompt.
    pub limit: f64,
    /// Their standard deviation, standardised.
    pub spread: f64,
    /// Whether both are as they should be.
    pub fits: bool,
}

impl Standardisation {
    /// Of standardised scores `z`, of which equal `prompts` are samples of one prompt; none if there are fewer than two
    /// prompts.
    #[must_use]
    pub fn of(z: &[f64], prompts: &[usize], statistics: &ScoreStats) -> Option<Self> {
        let (mean, spread) = (stats::mean(z), stats::std(z));
        let error = stats::clustered_error(z, prompts)?;
        // In standard deviations, of which the statistics' sample has 1.
        let before = match statistics.standard_error {
            Some(standard_error) => standard_error / statistics.std,
            None => 1.0 / independent(statistics).sqrt(),
        };
        let limit = STANDARD_ERRORS * error.hypot(before);
        let fits = mean.abs() <= limit && (SPREAD[0]..=SPREAD[1]).contains(&spread);
        // Short decimals come back from a checkpoint as they went in.
        let short = |value: f64| (value * 1e4).round() / 1e4;
        Some(Self { z: short(mean), limit: short(limit), spread: short(spread), fits })
    }
}

/// Replies that can be taken as independent: one a prompt, where that is known.
#[expect(clippy::cast_precision_loss, reason = "counts of replies are small")]
fn independent(statistics: &ScoreStats) -> f64 {
    let n = if statistics.n_prompts > 0 { statistics.n_prompts } else { statistics.n };
    n.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_grows_with_both_samples_errors() {
        let statistics =
            ScoreStats { n_prompts: 4, ..ScoreStats::of(&[0.0, 2.0, 0.0, 2.0], "validation", "b") };
        let z = [-1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0];
        let prompts: Vec<usize> = (0..8).collect();
        let of = |z: &[f64], statistics: &ScoreStats| {
            Standardisation::of(z, &prompts, statistics).unwrap()
        };
        // s² = 8/7; 3 · √(1/7 + 1/4) = 1.8803.
        let found = of(&z, &statistics);
        assert_eq!((found.z, found.limit, found.spread, found.fits), (0.0, 1.8803, 1.0, true));
        let moved = |by: f64| z.map(|z| z + by);
        assert!(of(&moved(1.8), &statistics).fits && !of(&moved(1.9), &statistics).fits);
        // A recorded error counts instead: 3 · √(1/7 + 0.01) = 1.1729.
        let known = ScoreStats { standard_error: Some(0.1), ..statistics.clone() };
        assert_eq!(of(&z, &known).limit, 1.1729);
        for (factor, fits) in [(0.5, false), (0.7, true), (1.5, true), (1.7, false)] {
            assert_eq!(of(&z.map(|z| z * factor), &statistics).fits, fits, "{factor}");
        }
    }
}
