//! The losses of direct preference optimisation, over log-ratios of policy to reference.

use tch::Tensor;

use crate::config::LossType;

/// What the loss compares.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossSettings {
    /// Which loss.
    pub loss_type: LossType,
    /// How strongly the policy is held to the reference, per nat; `ipo`'s τ.
    pub beta: f64,
    /// Probability that a label is wrong.
    pub label_smoothing: f64,
}

impl LossSettings {
    /// Whether log-ratios are divided by the number of tokens that count.
    #[must_use]
    pub fn is_per_token(&self) -> bool {
        match self.loss_type {
            LossType::Sigmoid => false,
            LossType::Ipo | LossType::SigmoidNorm => true,
        }
    }
}

/// The loss of each pair: `q · ℓ(lead) + (1 − q) · ℓ(−lead)` with lead = chosen − rejected and
/// q = (1 − 2ε) · `chosen_prob` + ε for label smoothing ε.
///
/// ℓ(x) is −log σ(βx) for `sigmoid` and `sigmoid_norm`, (x − 1 / 2β)² for `ipo`. With `chosen_prob` 1 and no smoothing these are TRL's
/// losses of the same names.
///
/// # Shapes
///
/// - `chosen`, `rejected`: `[n]`, log P(policy) − log P(reference) of each side in nats, summed over the tokens that count
///   (`sigmoid`) or their mean (`ipo`, `sigmoid_norm`: [`LossSettings::is_per_token`]).
/// - `chosen_prob`: `[n]` within 0 to 1; the result is `[n]`.
///
/// # Source
///
/// Rafailov et al. 2023 (arXiv:2305.18290) eq. 7; smoothing and soft labels: Mitchell 2023, "A note on DPO with noisy
/// preferences", eq. 3; Azar et al. 2023 (arXiv:2310.12036) eq. 17; Lambert et al. 2024 (arXiv:2411.15124) eq. 6; TRL 1.16
/// `dpo_trainer.py`, `_compute_loss`.
pub fn preference_loss(
    settings: &LossSettings,
    chosen: &Tensor,
    rejected: &Tensor,
    chosen_prob: &Tensor,
) -> Tensor {
    let LossSettings { loss_type, beta, label_smoothing } = *settings;
    let lead = chosen - rejected; // [n]
    let loss = |lead: Tensor| match loss_type {
        LossType::Sigmoid | LossType::SigmoidNorm => -(lead * beta).log_sigmoid(),
        LossType::Ipo => (lead - 0.5 / beta).square(),
    };
    let right = chosen_prob * (1.0 - 2.0 * label_smoothing) + label_smoothing; // [n]
    &right * loss(lead.shallow_clone()) + (1.0 - &right) * loss(-lead)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loss(settings: &LossSettings, chosen: f64, rejected: f64, probability: f64) -> f64 {
        let t = |x: f64| Tensor::from_slice(&[x]);
        let loss = preference_loss(settings, &t(chosen), &t(rejected), &t(probability));
        f64::try_from(loss.sum(tch::Kind::Double)).unwrap()
    }

    fn settings(loss_type: LossType, beta: f64, label_smoothing: f64) -> LossSettings {
        LossSettings { loss_type, beta, label_smoothing }
    }

    fn assert_close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-12, "{found}, expected {expected}");
    }

    /// −log σ(1) = log(1 + e⁻¹), −log σ(−1) = log(1 + e).
    const WON: f64 = 0.313_261_687_518_222_86;
    const LOST: f64 = 1.313_261_687_518_222_9;

    #[test]
    fn sigmoid_scales_the_lead_by_beta() {
        for loss_type in [LossType::Sigmoid, LossType::SigmoidNorm] {
            let half = settings(loss_type, 0.5, 0.0);
            assert_close(loss(&half, 3.0, 1.0, 1.0), WON);
            assert_close(loss(&half, 1.0, 3.0, 1.0), LOST);
            assert_close(loss(&half, 2.0, 2.0, 1.0), std::f64::consts::LN_2);
        }
    }

    #[test]
    fn ipo_wants_a_certain_lead() {
        // τ = 0.25 wants a lead of 2: (3 − 2)² = 1, and (−1 − 2)² = 9 where it lags by 1.
        let quarter = settings(LossType::Ipo, 0.25, 0.0);
        assert_close(loss(&quarter, 4.0, 1.0, 1.0), 1.0);
        assert_close(loss(&quarter, 1.0, 2.0, 1.0), 9.0);
        assert_close(loss(&quarter, 3.0, 1.0, 1.0), 0.0);
    }

    #[test]
    fn soft_and_smoothed_labels_mix_both_outcomes() {
        let plain = settings(LossType::Sigmoid, 1.0, 0.0);
        assert_close(loss(&plain, 1.0, 0.0, 0.75), 0.75 * WON + 0.25 * LOST);
        // A tenth of the labels is wrong: 0.9 of certainty, 0.8 · 0.75 + 0.1 = 0.7 of three quarters.
        let smoothed = settings(LossType::Sigmoid, 1.0, 0.1);
        assert_close(loss(&smoothed, 1.0, 0.0, 1.0), 0.9 * WON + 0.1 * LOST);
        assert_close(loss(&smoothed, 1.0, 0.0, 0.75), 0.7 * WON + 0.3 * LOST);
        // IPO, lead 1, wanted ±1: 0.75 · 0 + 0.25 · (−1 − 1)² = 1.
        assert_close(loss(&settings(LossType::Ipo, 0.5, 0.0), 1.0, 0.0, 0.75), 1.0);
    }
}
