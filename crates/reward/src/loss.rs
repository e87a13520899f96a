//! The Bradley–Terry loss of pairs.

use tch::{Kind, Tensor};

/// The loss of each pair: cross-entropy between `chosen_prob` and the probability that the scores give the chosen side,
/// plus a penalty on their sum.
///
/// `−p · log σ(Δ − margin) − (1 − p) · log σ(−Δ − margin) + center · (chosen + rejected)²` with Δ = chosen − rejected. With
/// p = 1 this is TRL's loss. The margin is a lead that whichever side wins must have.
///
/// # Shapes
///
/// - `chosen`, `rejected`: `[n]` f32, scores.
/// - `chosen_prob`: `[n]` f32 within 0 to 1, `margin`: `[n]` f32; the result is `[n]` f32.
///
/// # Source
///
/// Bradley & Terry 1952; margin: Touvron et al. 2023 (arXiv:2307.09288) eq. 2; centring: Eisenstein et al. 2023
/// (arXiv:2312.09244) eq. 3; TRL 1.16 `reward_trainer.py`, `compute_loss`.
pub fn bradley_terry(
    chosen: &Tensor,
    rejected: &Tensor,
    chosen_prob: &Tensor,
    margin: &Tensor,
    center: f64,
) -> Tensor {
    let lead = chosen - rejected; // [n]
    let wins = (&lead - margin).log_sigmoid(); // [n] log P(chosen wins)
    let loses = (-&lead - margin).log_sigmoid(); // [n]
    let loss = -(chosen_prob * wins) - (1.0 - chosen_prob) * loses; // [n]
    if center == 0.0 {
        return loss;
    }
    loss + center * (chosen + rejected).square()
}

/// A `[n]` f32 tensor.
pub(crate) fn column(values: &[f32], device: tch::Device) -> Tensor {
    Tensor::from_slice(values).to_kind(Kind::Float).to_device(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn losses(chosen: f32, rejected: f32, p: f32, margin: f32, center: f64) -> f64 {
        let t = |x: f32| Tensor::from_slice(&[x]);
        let loss = bradley_terry(&t(chosen), &t(rejected), &t(p), &t(margin), center);
        f64::try_from(loss.sum(Kind::Double)).unwrap()
    }

    #[test]
    fn hard_labels_give_minus_log_sigmoid_of_the_lead() {
        // −log σ(1) = log(1 + e⁻¹)
        assert!((losses(1.5, 0.5, 1.0, 0.0, 0.0) - 0.313_261_687_518_222_86).abs() < 1e-6);
        // no lead: log 2
        assert!((losses(0.3, 0.3, 1.0, 0.0, 0.0) - std::f64::consts::LN_2).abs() < 1e-6);
    }

    #[test]
    fn soft_labels_mix_both_outcomes() {
        // 0.75 · 0.3132617 + 0.25 · 1.3132617 = 0.5632617
        assert!((losses(1.5, 0.5, 0.75, 0.0, 0.0) - 0.563_261_687_518_222_9).abs() < 1e-6);
    }

    #[test]
    fn a_margin_is_demanded_of_the_winner() {
        // Δ = 1, margin 1: −log σ(0) = log 2
        assert!((losses(1.5, 0.5, 1.0, 1.0, 0.0) - std::f64::consts::LN_2).abs() < 1e-6);
        // rejected wins (p = 0) with Δ = 1, margin 1: −log σ(−2) = log(1 + e²)
        assert!((losses(1.5, 0.5, 0.0, 1.0, 0.0) - 2.126_928_011_042_972_5).abs() < 1e-6);
    }

    #[test]
    fn centring_penalises_the_sum() {
        // + 0.01 · (1.5 + 0.5)² = 0.04
        assert!((losses(1.5, 0.5, 1.0, 0.0, 0.01) - 0.353_261_687_518_222_9).abs() < 1e-6);
    }
}
