//! From scores to the reward of each token: standardise, combine, place, and subtract the KL penalty.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::Error;
use crate::error::check_shape;

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
///
/// # Errors
///
/// [`Error::Shape`] unless `z` has two dimensions and K ≥ 1.
///
/// # Source
///
/// Coste et al. 2023 (arXiv:2310.02743), section 3: mean, worst case and uncertainty-weighted; as its spread we take the
/// population standard deviation instead of the variance, so that the weight has no unit.
pub fn combine(z: &Tensor, ensemble: Ensemble, std_weight: f64) -> Result<Tensor, Error> {
    if z.dim() != 2 || z.size()[1] == 0 {
        return Err(Error::Shape { name: "z", expected: vec![-1, -1], got: z.size() });
    }
    Ok(match ensemble {
        Ensemble::Mean => z.mean_dim(1, false, Kind::Float),
        Ensemble::MeanMinusStd => {
            z.mean_dim(1, false, Kind::Float) - std_weight * z.std_dim(1, false, false)
        }
        Ensemble::Min => z.amin(1, false),
    })
}

/// Writes each score at one token and 0 at all others; scores that meet at a token add up.
///
/// # Shapes
///
/// - `scores`: `[B, K]` f32; `last_token`: `[B, K]` i64, the column each is paid out at; the result is `[B, T]` f32.
///
/// # Errors
///
/// [`Error::Shape`] if the shapes differ.
///
/// # Source
///
/// The last real token, as OpenRLHF and verl; TRL pays out at the padding token after the end of turn if there is one,
/// which discounts finished replies once more than cut ones.
pub fn place(scores: &Tensor, last_token: &Tensor, n_tokens: i64) -> Result<Tensor, Error> {
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
/// [`Error::Shape`] if the shapes differ.
///
/// # Source
///
/// Ziegler et al. 2019 (arXiv:1909.08593), equation 2. k1 as a reward is unbiased (Schulman, "Approximating KL
/// divergence", 2020).
pub fn token_rewards(
    kl: &Tensor,
    placed: &Tensor,
    valid: &Tensor,
    kl_coef: f64,
) -> Result<Tensor, Error> {
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
        assert_eq!(values_of(&combine(&z, Ensemble::Mean, 9.0).unwrap()), [1.0, 2.0]);
        assert_eq!(values_of(&combine(&z, Ensemble::Min, 9.0).unwrap()), [1.0, 1.0]);
        let conservative = values_of(&combine(&z, Ensemble::MeanMinusStd, 0.5).unwrap());
        assert_eq!(conservative[0], 1.0);
        assert!((conservative[1] - (2.0 - 0.5 * 2f64.sqrt())).abs() < 1e-6);
        // One reward model has no spread.
        let one = batch(&[&[3.0]]);
        assert_eq!(values_of(&combine(&one, Ensemble::MeanMinusStd, 0.5).unwrap()), [3.0]);
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
            for ensemble in [Ensemble::Mean, Ensemble::MeanMinusStd, Ensemble::Min] {
                let out = values_of(&combine(&tensor(&rows), ensemble, 0.5).unwrap());
                let back = values_of(&combine(&tensor(&turned), ensemble, 0.5).unwrap());
                for (a, b) in out.iter().zip(back.iter().rev()) {
                    prop_assert!(close(*a, *b));
                }
                // None promises more than the mean.
                let mean = values_of(&combine(&tensor(&rows), Ensemble::Mean, 0.5).unwrap());
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
