//! The coefficient of the KL penalty: fixed, or steered towards a target.

use serde::{Deserialize, Serialize};

/// How the KL coefficient changes over a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum KlController {
    /// Not at all.
    Fixed,
    /// Towards a target.
    Adaptive {
        /// Wanted KL of policy against reference, in nats, summed over a conversation's own tokens.
        target: f64,
        /// Conversations over which the coefficient may change by 20 %.
        horizon: f64,
    },
}

/// Name of a [`KlController`] in recipes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum KlControl {
    /// The coefficient stays as it is.
    Fixed,
    /// The coefficient follows `kl_target`.
    Adaptive,
}

impl KlController {
    /// The coefficient after an iteration of `n` conversations whose mean summed KL was `kl`.
    ///
    /// # Source
    ///
    /// Ziegler et al. 2019 (arXiv:1909.08593), section 2.2, in the form of its code:
    /// `β ← β · (1 + clip(KL / target − 1, ±0.2) · n / horizon)`.
    pub fn next(self, coefficient: f64, kl: f64, n: usize) -> f64 {
        match self {
            Self::Fixed => coefficient,
            Self::Adaptive { target, horizon } => {
                let error = (kl / target - 1.0).clamp(-0.2, 0.2);
                #[expect(clippy::cast_precision_loss, reason = "conversation counts are small")]
                let n = n as f64;
                coefficient * (1.0 + error * n / horizon)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_coefficient_follows_the_target() {
        assert_eq!(KlController::Fixed.next(0.05, 100.0, 32), 0.05);
        let adaptive = KlController::Adaptive { target: 6.0, horizon: 100.0 };
        assert_eq!(adaptive.next(0.1, 6.0, 50), 0.1);
        // KL 6.6 is 10 % above: 0.1 · (1 + 0.1 · 50/100). KL 60 counts as 20 % above, KL −1 as 20 % below.
        assert!((adaptive.next(0.1, 6.6, 50) - 0.105).abs() < 1e-12);
        assert!((adaptive.next(0.1, 60.0, 50) - 0.11).abs() < 1e-12);
        assert!((adaptive.next(0.1, -1.0, 50) - 0.09).abs() < 1e-12);
    }
}
