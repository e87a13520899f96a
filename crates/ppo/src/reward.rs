//! From scores to the reward of each token: standardise, combine, place, and subtract the KL penalty.

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::shape::{check_shape, refused};

/// How the standardised scores of several reward models become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Ensemble {
    /// Their mean.
    Mean,
    /// Their mean less `ensemble_std_weight` times their standard deviation.
    MeanMinusStd,
    /// The lowest.
    Min,
    /// A smooth minimum, which leaves every reward model a say.
    SoftMin,
}

impl Ensemble {
    /// Its name in recipes.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::MeanMinusStd => "mean_minus_std",
            Self::Min => "min",
            Self::SoftMin => "soft_min",
        }
    }
}

/// Where in a conversation a score is paid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Placement {
    /// Each turn's share at the last token of its own reply.
    PerTurn,
    /// Everything at the last token of the last reply.
    Final,
}

/// One score a conversation out of one a reward model.
///
/// # Shapes
///
/// - `z`: `[B, K]` f32, standardised; the result is `[B]` f32.
/// - `weights`: `[K]`, not negative, with a sum above 0; [`Ensemble::Min`] takes none.
/// - `parameter`: λ of [`Ensemble::MeanMinusStd`], τ of [`Ensemble::SoftMin`].
///
/// # Errors
///
/// Another shape unless `z` has two dimensions, K ≥ 1, and there are K weights.
///
/// # Source
///
/// Coste et al. 2023 (arXiv:2310.02743), section 3: mean, worst case and uncertainty-weighted; as its spread we take the
/// population standard deviation instead of the variance, so that the weight has no unit. The smooth minimum is
/// `−τ · log Σ w · exp(−z / τ)` with weights that add up to 1: it lies between minimum (τ → 0) and mean (τ → ∞).
pub fn combine(z: &Tensor, ensemble: Ensemble, weights: &[f64], parameter: f64) -> Result<Tensor> {
    if z.dim() != 2 || z.size()[1] == 0 || z.size()[1] != weights.len() as i64 {
        let expected = vec![-1, weights.len() as i64];
        bail!(refused("z", &expected, &z.size()));
    }
    let total: f64 = weights.iter().sum();
    let weights: Vec<f32> = weights.iter().map(|&weight| weight as f32).collect();
    let weights = Tensor::from_slice(&weights).unsqueeze(0); // [1, K]
    let mean = |x: &Tensor| (x * &weights).sum_dim_intlist(1, true, Kind::Float) / total; // [B, 1]
    let combined = match ensemble {
        Ensemble::Mean => mean(z),
        Ensemble::MeanMinusStd => {
            let centre = mean(z);
            let spread = mean(&(z - &centre).square()).sqrt();
            centre - parameter * spread
        }
        Ensemble::Min => z.amin(1, true),
        Ensemble::SoftMin => {
            let share = &weights / total;
            (z / -parameter + share.log()).logsumexp(1, true) * -parameter
        }
    };
    Ok(combined.squeeze_dim(1)) // [B]
}

/// What is paid for each reply: the weighted scores of the reward models that read it, over the sum of all weights, and an
/// equal share of the penalties.
///
/// # Shapes
///
/// - `z`: `[B, K]` f32, standardised; `turns`, `weights`: `[K]`, the reply each model reads and what it weighs.
/// - `penalty`: `[B, T]` f32, what is subtracted for each of T replies; the result is `[B, T]` f32.
///
/// # Errors
///
/// Another shape if the numbers of models differ.
pub fn shares_by_turn(
    z: &Tensor,
    turns: &[usize],
    weights: &[f64],
    penalty: &Tensor,
) -> Result<Tensor> {
    check_shape("z", z, &[penalty.size()[0], turns.len() as i64])?;
    let total: f64 = weights.iter().sum();
    let n_turns = penalty.size()[1] as f64;
    let turns: Vec<i64> = turns.iter().map(|&turn| turn as i64).collect();
    let factors: Vec<f32> = weights.iter().map(|&weight| weight as f32).collect();
    let weighed = z * Tensor::from_slice(&factors).unsqueeze(0); // [B, K]
    let scores = penalty.zeros_like().index_add(1, &Tensor::from_slice(&turns), &weighed);
    Ok((scores - penalty * (total / n_turns)) / total) // [B, T]
}

/// Writes each score at one token and 0 at all others; scores that meet at a token add up.
///
/// # Shapes
///
/// - `scores`: `[B, K]` f32; `last_token`: `[B, K]` i64, the column each is paid out at; the result is `[B, T]` f32.
///
/// # Errors
///
/// Another shape if the shapes differ.
///
/// # Source
///
/// The last real token, as OpenRLHF and verl; TRL pays out at the padding token after the end of turn if there is one,
/// which discounts finished replies once more than cut ones.
pub fn place(scores: &Tensor, last_token: &Tensor, n_tokens: i64) -> Result<Tensor> {
    check_shape("last_token", last_token, &scores.size())?;
    let rows = scores.size()[0];
    let empty = Tensor::zeros([rows, n_tokens], (Kind::Float, scores.device()));
    Ok(empty.scatter_add(1, last_token, scores)) // [B, T]
}

/// The reward of each token: the KL penalty, and where a score is placed, that score.
///
/// # Shapes
///
/// - `kl`: `[B, T]` f32, nats, the k1 estimate `logprob − ref_logprob`; `placed`: `[B, T]` f32; `valid`: `[B, T]` bool.
///   The result is `[B, T]` f32, 0 where not valid.
///
/// # Errors
///
/// Another shape if the shapes differ.
///
/// # Source
///
/// Ziegler et al. 2019 (arXiv:1909.08593), equation 2. k1 as a reward is unbiased (Schulman, "Approximating KL
/// divergence", 2020).
pub fn token_rewards(kl: &Tensor, placed: &Tensor, valid: &Tensor, kl_coef: f64) -> Result<Tensor> {
    check_shape("placed", placed, &kl.size())?;
    check_shape("valid", valid, &kl.size())?;
    Ok((placed - kl_coef * kl).where_self(valid, &kl.zeros_like()))
}

/// What is subtracted from each reply's score for not having ended by itself.
///
/// # Shapes
///
/// - `truncated`: `[B, K]` bool, true where the token limit cut the reply; the result is `[B, K]` f32.
///
/// # Source
///
/// TRL's `missing_eos_penalty` (subtracted; Huang et al. 2024 replace the score instead).
pub fn missing_eos(truncated: &Tensor, penalty: f64) -> Tensor {
    truncated.to_kind(Kind::Float) * penalty
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::test_tensors::{batch, bools, close, values_of};

    #[test]
    fn ensembles_by_hand() {
        // Second row: mean 2, population std sqrt((1 + 1 + 4) / 3) = sqrt(2).
        let z = batch(&[&[1.0, 1.0, 1.0], &[1.0, 1.0, 4.0]]);
        let of =
            |ensemble, parameter| values_of(&combine(&z, ensemble, &[1.0; 3], parameter).unwrap());
        assert_eq!(of(Ensemble::Mean, 9.0), [1.0, 2.0]);
        assert_eq!(of(Ensemble::Min, 9.0), [1.0, 1.0]);
        let conservative = of(Ensemble::MeanMinusStd, 0.5);
        assert_eq!(conservative[0], 1.0);
        assert!((conservative[1] - (2.0 - 0.5 * 2f64.sqrt())).abs() < 1e-6);
        // −2 · log((2 · e^−½ + e^−2) / 3) = 1.5933
        let soft = of(Ensemble::SoftMin, 2.0);
        let expected = -2.0 * ((2.0 * (-0.5f64).exp() + (-2f64).exp()) / 3.0).ln();
        assert!((soft[0] - 1.0).abs() < 1e-6 && (soft[1] - expected).abs() < 1e-6, "{soft:?}");
        // One reward model has no spread.
        let one = batch(&[&[3.0]]);
        for ensemble in [Ensemble::Mean, Ensemble::MeanMinusStd, Ensemble::Min, Ensemble::SoftMin] {
            assert_eq!(values_of(&combine(&one, ensemble, &[1.0], 0.5).unwrap()), [3.0]);
        }
        assert!(combine(&z, Ensemble::Mean, &[1.0; 2], 0.5).is_err());
    }

    #[test]
    fn weights_shift_an_ensemble_and_0_leaves_out() {
        let z = batch(&[&[1.0, 5.0, 4.0]]);
        let of =
            |ensemble, weights: &[f64]| values_of(&combine(&z, ensemble, weights, 0.5).unwrap())[0];
        // (1 + 3 · 5) / 4 = 4; its spread √((9 + 3 · 1) / 4) = √3.
        assert_eq!(of(Ensemble::Mean, &[1.0, 3.0, 0.0]), 4.0);
        let cautious = of(Ensemble::MeanMinusStd, &[1.0, 3.0, 0.0]);
        assert!((cautious - (4.0 - 0.5 * 3f64.sqrt())).abs() < 1e-6);
        assert!((of(Ensemble::SoftMin, &[0.0, 0.0, 2.0]) - 4.0).abs() < 1e-6);
    }

    #[test]
    fn each_turn_is_paid_by_its_own_reward_models() {
        // Two models read the first reply, one the third; the weights add up to 6. The second reply was cut.
        let z = batch(&[&[1.0, 2.0, 3.0]]);
        let penalty = batch(&[&[0.0, 1.5, 0.0]]);
        let shares = shares_by_turn(&z, &[0, 0, 2], &[1.0, 2.0, 3.0], &penalty).unwrap();
        let got = values_of(&shares);
        for (got, expected) in got.into_iter().zip([5.0 / 6.0, -0.5, 9.0 / 6.0]) {
            assert!((got - expected).abs() < 1e-6);
        }
    }

    #[test]
    fn scores_are_paid_at_the_last_token_of_their_reply() {
        let scores = batch(&[&[1.0, 2.0], &[3.0, 4.0]]);
        let last = Tensor::from_slice(&[0i64, 3, 2, 2]).view([2, 2]);
        let placed = place(&scores, &last, 4).unwrap();
        assert_eq!(values_of(&placed), [1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 7.0, 0.0]);
    }

    #[test]
    fn the_penalty_counts_own_tokens_only() {
        let kl = batch(&[&[0.5, f32::NAN, -0.25]]);
        let placed = batch(&[&[0.0, 0.0, 2.0]]);
        let valid = bools(&[&[true, false, true]]);
        let rewards = token_rewards(&kl, &placed, &valid, 0.2).unwrap();
        let expected = [-0.1, 0.0, 2.05];
        for (got, expected) in values_of(&rewards).into_iter().zip(expected) {
            assert!((got - expected).abs() < 1e-6, "{got} against {expected}");
        }
        let cut = bools(&[&[true, false]]);
        assert_eq!(values_of(&missing_eos(&cut, 1.5)), [1.5, 0.0]);
    }
    proptest! {
        #[test]
        fn an_ensemble_knows_no_order(
            rows in prop::collection::vec(prop::collection::vec(-3.0f32..3.0, 3), 1..8),
        ) {
            let tensor = |rows: &[Vec<f32>]| batch(&rows.iter().map(Vec::as_slice).collect::<Vec<_>>());
            let turned: Vec<Vec<f32>> =
                rows.iter().rev().map(|row| row.iter().rev().copied().collect()).collect();
            let combined = |rows: &[Vec<f32>], ensemble| {
                values_of(&combine(&tensor(rows), ensemble, &[1.0; 3], 0.5).unwrap())
            };
            for ensemble in
                [Ensemble::Mean, Ensemble::MeanMinusStd, Ensemble::Min, Ensemble::SoftMin]
            {
                let out = combined(&rows, ensemble);
                let back = combined(&turned, ensemble);
                for (a, b) in out.iter().zip(back.iter().rev()) {
                    prop_assert!(close(*a, *b));
                }
                // None promises more than the mean.
                let mean = combined(&rows, Ensemble::Mean);
                prop_assert!(out.iter().zip(&mean).all(|(a, mean)| *a <= mean + 1e-5));
            }
        }

        #[test]
        fn rewards_do_not_depend_on_what_is_not_valid(
            tokens in prop::collection::vec((-2.0f32..2.0, -2.0f32..2.0, prop::bool::weighted(0.7)), 1..20),
            noise in -9.0f32..9.0,
        ) {
            let valid = bools(&[&tokens.iter().map(|token| token.2).collect::<Vec<_>>()]);
            let rewards = |noise: Option<f32>| {
                let part = |f: fn(&(f32, f32, bool)) -> f32| {
                    let column = tokens.iter().map(|token| match noise {
                        Some(noise) if !token.2 => noise,
                        _ => f(token),
                    });
                    batch(&[&column.collect::<Vec<_>>()])
                };
                values_of(&token_rewards(&part(|t| t.0), &part(|t| t.1), &valid, 0.3).unwrap())
            };
            prop_assert_eq!(rewards(None), rewards(Some(noise)));
        }
    }
}
