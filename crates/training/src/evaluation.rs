//! How good a reward model, or a policy's implicit reward, is on pairs it has not seen, and where its scores lie.

use std::path::Path;

use arete_chain::rulers::{NullRulers, Ruled, share};
use arete_records::atomic;
use arete_records::stats::{self, CalibrationBin, Interval};
use serde::{Deserialize, Serialize};

use crate::Error;

/// Bins of the calibration error.
const N_BINS: usize = 10;

/// The contents of `evaluation.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// What was evaluated on.
    pub split: String,
    /// Number of pairs.
    pub n: usize,
    /// Part of the pairs whose chosen side scores higher, with Wilson's 95 % interval. A tie is no win.
    pub accuracy: Interval,
    /// What knows nothing of what is right, on the same pairs, and the lead over the best of it.
    pub null_rulers: NullRulers,
    /// Gap between the probability of the predicted side and how often it is right.
    pub expected_calibration_error: f64,
    /// The same gap bin by bin: stated probability of the predicted side (½ to 1) against how often it is right.
    pub calibration: Vec<CalibrationBin>,
    /// Pearson's correlation of score with length; null if either does not vary.
    pub pearson_score_length: Option<f64>,
    /// Spearman's.
    pub spearman_score_length: Option<f64>,
    /// Mean lead of the chosen side.
    pub mean_margin: f64,
}

/// P(chosen wins) of a pair: σ(chosen − rejected), in f64.
pub fn win_probability(chosen: f64, rejected: f64) -> f64 {
    1.0 / (1.0 + (rejected - chosen).exp())
}

/// Compares the scores of pairs (`[chosen, rejected]`) with which side was chosen; `n_own_tokens` are the lengths of both
/// sides in the model's own tokens, `ruled` is what the null rulers see of each.
///
/// # Panics
///
/// If there is no pair, or not one score pair (and one entry for the rulers) each.
pub fn report(
    split: &str,
    n_own_tokens: &[[usize; 2]],
    ruled: &[Ruled],
    scores: &[[f64; 2]],
) -> Report {
    let n = n_own_tokens.len();
    assert!(n > 0 && n == scores.len(), "one pair of scores a pair");
    let wins: Vec<f64> = scores.iter().map(|[c, r]| f64::from(u8::from(c > r))).collect();
    let confidences: Vec<f64> = scores
        .iter()
        .map(|&[c, r]| win_probability(c, r))
        .map(|probability| probability.max(1.0 - probability))
        .collect();
    let is_right: Vec<bool> = wins.iter().map(|&win| win > 0.0).collect();
    #[expect(clippy::cast_precision_loss, reason = "token counts are small")]
    let lengths: Vec<f64> = n_own_tokens.iter().flatten().map(|&length| length as f64).collect();
    let flat: Vec<f64> = scores.iter().flatten().copied().collect();
    let margins: Vec<f64> = scores.iter().map(|[c, r]| c - r).collect();
    Report {
        split: split.to_owned(),
        n,
        accuracy: share(&wins),
        null_rulers: NullRulers::beside(ruled, &wins).expect("there are pairs"),
        expected_calibration_error: stats::expected_calibration_error(
            &confidences,
            &is_right,
            N_BINS,
        ),
        calibration: stats::calibration_bins(&confidences, &is_right, N_BINS),
        pearson_score_length: finite(stats::pearson(&flat, &lengths)),
        spearman_score_length: finite(stats::spearman(&flat, &lengths)),
        mean_margin: stats::mean(&margins),
    }
}

fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

/// Writes a value as readable JSON.
///
/// # Errors
///
/// [`Error::Records`] if the disk refuses.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<(), Error> {
    let mut bytes =
        serde_json::to_vec_pretty(value).expect("structs of numbers and words always serialise");
    bytes.push(b'\n');
    Ok(atomic::write(path, &bytes)?)
}

#[cfg(test)]
mod tests {
    use arete_chain::rulers::Ruler;
    use arete_records::Message;

    use super::*;

    #[test]
    fn a_report_by_hand() {
        let lengths = [[5, 9], [9, 5], [7, 7], [3, 4]];
        // The better reply is the shorter one, but for the last.
        let ruled = |question: &str, better: &str, worse: &str| {
            let side = |reply| [Message::user(question), Message::assistant(reply)];
            Ruled::shown(&side(better), &side(worse), false)
        };
        let ruled = [
            ruled("a", "x", "xy"),
            ruled("b", "x", "xy"),
            ruled("c", "x", "xy"),
            ruled("d", "xy", "x"),
        ];
        // Wins: yes, no, tie, yes.
        let scores = [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [2.0, 0.0]];
        let report = report("validation", &lengths, &ruled, &scores);
        assert_eq!(report.n, 4);
        assert_eq!(report.accuracy.estimate, 0.5);
        // Wilson at 2 of 4, z = 1.96: centre 0.5, half-width 0.3499…
        assert!((report.accuracy.low - 0.150_04).abs() < 1e-4, "{:?}", report.accuracy);
        assert_eq!(report.null_rulers.best, Ruler::Shorter);
        assert_eq!(report.null_rulers.best_accuracy(), 0.75);
        assert_eq!(report.null_rulers.lead.unwrap().estimate, 0.5 - 0.75);
        // Confidences: σ(1) = 0.7311 right, 0.7311 wrong, 0.5 "wrong", σ(2) = 0.8808 right.
        // Bins: [0.7, 0.8): |1.4621 − 1|, [0.5, 0.6): 0.5, [0.8, 0.9): |0.8808 − 1|.
        let expected = (0.462_117_157 + 0.5 + 0.119_202_922) / 4.0;
        assert!((report.expected_calibration_error - expected).abs() < 1e-8);
        let bins: Vec<(usize, f64)> =
            report.calibration.iter().map(|bin| (bin.n, bin.observed)).collect();
        assert_eq!(bins, [(1, 0.0), (2, 0.5), (1, 1.0)]);
        assert!((report.calibration[1].stated - 0.731_058_579).abs() < 1e-8);
        assert_eq!(report.mean_margin, 0.5);
        assert!(report.pearson_score_length.is_some());
    }

    #[test]
    fn win_probabilities() {
        assert!((win_probability(1.0, 0.0) - 0.731_058_578_630_004_9).abs() < 1e-12);
        assert_eq!(win_probability(2.0, 2.0), 0.5);
    }
}
