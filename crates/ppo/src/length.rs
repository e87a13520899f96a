//! What a reply's length explains of its score.

use serde::{Deserialize, Serialize};

/// A line through standardised scores over reply lengths, by least squares.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LengthTrend {
    /// Standard deviations a token.
    pub slope: f64,
    /// Mean length, tokens: there the line is 0, so that a mean score stays what it was.
    pub mean_length: f64,
}

impl LengthTrend {
    /// The line of scores `z` over `lengths`; flat if all lengths are the same.
    ///
    /// # Panics
    ///
    /// If there are no scores, or not one a length.
    #[must_use]
    pub fn fit(lengths: &[f64], z: &[f64]) -> Self {
        assert!(!z.is_empty() && z.len() == lengths.len(), "one score a length");
        let (mean_length, mean_z) =
            (arete_records::stats::mean(lengths), arete_records::stats::mean(z));
        let pairs = || lengths.iter().map(|length| length - mean_length).zip(z);
        let squares: f64 = pairs().map(|(length, _)| length * length).sum();
        let products: f64 = pairs().map(|(length, z)| length * (z - mean_z)).sum();
        let slope = if squares > 0.0 { products / squares } else { 0.0 };
        Self { slope, mean_length }
    }

    /// What a length explains.
    #[must_use]
    pub fn at(&self, length: f64) -> f64 {
        self.slope * (length - self.mean_length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_found_and_taken_out() {
        let lengths = [10.0, 20.0, 30.0, 40.0];
        // 0.1 a token about 25, and ±0.5 that no length explains (and that is orthogonal to it).
        let z = [-1.0, -1.5, 1.5, 1.0].map(|z: f64| z);
        let trend = LengthTrend::fit(&lengths, &z);
        // Σ (l − 25)(z − 0) = 15·1 + 5·1.5 + 5·1.5 + 15·1 = 45; Σ (l − 25)² = 500.
        assert!((trend.slope - 0.09).abs() < 1e-12 && trend.mean_length == 25.0);
        let residuals: Vec<f64> =
            lengths.iter().zip(z).map(|(&length, z)| z - trend.at(length)).collect();
        assert!(residuals.iter().sum::<f64>().abs() < 1e-12);
        let left = LengthTrend::fit(&lengths, &residuals);
        assert!(left.slope.abs() < 1e-12);
        assert_eq!(LengthTrend::fit(&[7.0, 7.0], &[1.0, 2.0]).slope, 0.0);
    }
}
