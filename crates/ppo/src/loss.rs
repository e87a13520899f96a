//! The losses, over the policy's own tokens in a micro-batch and normalised by a count of its whole minibatch, so that where
//! micro-batches are cut changes nothing but rounding. Other tokens never come here.

use anyhow::Result;
use tch::{Kind, Tensor};

use crate::shape::check_shape;

/// Largest |log ratio| that is exponentiated, as in OpenRLHF and verl: beyond it the ratio is clipped anyway.
const MAX_LOG_RATIO: f64 = 20.0;

/// What [`policy_loss`] returns.
#[derive(Debug)]
pub struct PolicyLoss {
    /// Scalar: this micro-batch's share of the minibatch's mean.
    pub loss: Tensor,
    /// `[n]` f32: `π_new / π_old` of each token; without gradient.
    pub ratio: Tensor,
    /// `[n]` f32: `(log ratio)²`; without gradient.
    pub squared_log_ratio: Tensor,
    /// Scalar f32: tokens at which the clipped term was the larger one.
    pub n_clipped: Tensor,
}

/// The clipped surrogate loss of tokens: PPO's, and GRPO's without its KL penalty.
///
/// # Shapes
///
/// - `logprob` (with gradient), `old_logprob`, `advantage`: `[n]` f32.
/// - `weight`: `[n]` f32, what each token's loss is multiplied by ([`importance_weights`]); none = 1.
/// - `n_tokens`: own tokens of the whole minibatch.
///
/// # Errors
///
/// Another shape if the shapes differ.
///
/// # Source
///
/// Schulman et al. 2017 (arXiv:1707.06347), equation 7, with the sign of a loss.
pub fn policy_loss(
    logprob: &Tensor,
    old_logprob: &Tensor,
    advantage: &Tensor,
    weight: Option<&Tensor>,
    clip_range: f64,
    n_tokens: f64,
) -> Result<PolicyLoss> {
    for (name, tensor) in [("old_logprob", old_logprob), ("advantage", advantage)] {
        check_shape(name, tensor, &logprob.size())?;
    }
    let log_ratio = (logprob - old_logprob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO);
    let ratio = log_ratio.exp();
    let plain = -advantage * &ratio;
    let clipped = -advantage * ratio.clamp(1.0 - clip_range, 1.0 + clip_range);
    let mut worse = plain.maximum(&clipped);
    if let Some(weight) = weight {
        check_shape("weight", weight, &logprob.size())?;
        worse *= weight;
    }
    let n_clipped = clipped.gt_tensor(&plain).sum(Kind::Float);
    Ok(PolicyLoss {
        loss: worse.sum(Kind::Float) / n_tokens,
        ratio: ratio.detach(),
        squared_log_ratio: log_ratio.detach().square(),
        n_clipped,
    })
}

/// Own tokens by what they belong to: whole conversations, or their replies.
#[derive(Debug)]
pub struct Units {
    /// `[n]` i64: the unit of each token, from 0.
    of_token: Tensor,
    n_units: i64,
}

impl Units {
    /// From ascending numbers, `[n]` i64; tokens of equal numbers belong together.
    #[must_use]
    pub fn of(numbers: &Tensor) -> Self {
        let (units, of_token, _) = numbers.unique_consecutive(true, false, 0);
        Self { n_units: units.numel() as i64, of_token }
    }

    /// `[n]` to `[U]`: sums.
    fn sums(&self, of_tokens: &Tensor) -> Tensor {
        let empty = Tensor::zeros([self.n_units], (of_tokens.kind(), of_tokens.device()));
        empty.index_add(0, &self.of_token, of_tokens)
    }

    /// `[n]` to `[U]`, where all tokens of a unit have the same number.
    fn shared(&self, of_tokens: &Tensor) -> Tensor {
        let empty = Tensor::zeros([self.n_units], (of_tokens.kind(), of_tokens.device()));
        empty.scatter(0, &self.of_token, of_tokens)
    }

    /// `[U]` to `[n]`.
    fn spread(&self, of_units: &Tensor) -> Tensor {
        of_units.index_select(0, &self.of_token)
    }
}

/// The clipped surrogate loss of whole replies: RLOO's.
///
/// # Shapes
///
/// - `logprob` (with gradient), `old_logprob`, `advantage` (the same throughout a unit): `[n]` f32.
/// - `log_importance`: `[n]` f32, log P(trainer) − log P(sampler), and the cap of the weight that a unit's sum of them
///   gives; none = 1.
/// - `n_sequences`: conversations of the whole minibatch.
///
/// # Errors
///
/// Another shape if the shapes differ.
///
/// # Source
///
/// TRL 1.16's `RLOOTrainer`: the ratio is that of the whole completion, the loss a mean over completions. Where each reply
/// of a chain is paid by itself it has a ratio of its own.
pub fn sequence_loss(
    logprob: &Tensor,
    old_logprob: &Tensor,
    advantage: &Tensor,
    units: &Units,
    log_importance: Option<(&Tensor, f64)>,
    clip_range: f64,
    n_sequences: f64,
) -> Result<PolicyLoss> {
    let of_token = &units.of_token;
    for (name, tensor) in
        [("old_logprob", old_logprob), ("advantage", advantage), ("units", of_token)]
    {
        check_shape(name, tensor, &logprob.size())?;
    }
    let log_ratio = logprob - old_logprob;
    let ratio = units.sums(&log_ratio).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(); // [U]
    let advantage = units.shared(advantage); // [U]
    let plain = -&advantage * &ratio;
    let clipped = -&advantage * ratio.clamp(1.0 - clip_range, 1.0 + clip_range);
    let mut worse = plain.maximum(&clipped);
    if let Some((log_importance, cap)) = log_importance {
        check_shape("log_importance", log_importance, &logprob.size())?;
        worse *= importance_weights(&units.sums(log_importance), cap);
    }
    let is_clipped = units.spread(&clipped.gt_tensor(&plain)); // [n]
    let log_ratio = log_ratio.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO);
    Ok(PolicyLoss {
        loss: worse.sum(Kind::Float) / n_sequences,
        ratio: log_ratio.exp(),
        squared_log_ratio: log_ratio.square(),
        n_clipped: is_clipped.sum(Kind::Float),
    })
}

/// The penalty for leaving the reference that GRPO has in its loss.
///
/// # Shapes
///
/// - `logprob` (with gradient), `ref_logprob`: `[n]` f32, nats; the result is a scalar.
/// - `n_tokens`: own tokens of the whole minibatch.
///
/// # Errors
///
/// Another shape if the shapes differ.
///
/// # Source
///
/// k3, `r − log r − 1` with `r = π_ref / π` (Schulman, "Approximating KL divergence", 2020), as in Shao et al. 2024
/// (arXiv:2402.03300), equation 4, and TRL's `GRPOTrainer`.
pub fn kl_loss(logprob: &Tensor, ref_logprob: &Tensor, n_tokens: f64) -> Result<Tensor> {
    check_shape("ref_logprob", ref_logprob, &logprob.size())?;
    let log_ratio = (ref_logprob - logprob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO);
    Ok((log_ratio.exp() - log_ratio - 1.0).sum(Kind::Float) / n_tokens)
}

/// Weights that correct for a sampler that is another program than the trainer, cut at `cap`.
///
/// # Shapes
///
/// - `log_importance`: `[n]` f32, log P(trainer) − log P(sampler); so is the result.
///
/// # Source
///
/// Truncated importance sampling: Ionides 2008; TRL's `vllm_importance_sampling_correction` with
/// `vllm_importance_sampling_mode = "token_truncate"`, of whole sequences `"sequence_truncate"`.
pub fn importance_weights(log_importance: &Tensor, cap: f64) -> Tensor {
    log_importance.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp_max(cap)
}

/// What [`value_loss`] returns.
#[derive(Debug)]
pub struct ValueLoss {
    /// Scalar: this micro-batch's share of the minibatch's mean.
    pub loss: Tensor,
    /// Scalar f32: tokens at which the clipped term was the larger one.
    pub n_clipped: Tensor,
}

/// Half the squared error of the critic, with steps beyond `clip_range` from its old value not rewarded.
///
/// # Shapes
///
/// - `value` (with gradient), `old_value`, `returns`: `[n]` f32.
/// - `n_tokens`: own tokens of the whole minibatch.
///
/// # Errors
///
/// Another shape if the shapes differ.
///
/// # Source
///
/// OpenAI baselines' PPO2 and TRL: `½ max((V − R)², (clip(V, V_old ± ε) − R)²)`. TRL also trains the value of the padding
/// token after the end; we do not.
pub fn value_loss(
    value: &Tensor,
    old_value: &Tensor,
    returns: &Tensor,
    clip_range: f64,
    n_tokens: f64,
) -> Result<ValueLoss> {
    for (name, tensor) in [("old_value", old_value), ("returns", returns)] {
        check_shape(name, tensor, &value.size())?;
    }
    let near = old_value + (value - old_value).clamp(-clip_range, clip_range);
    let plain = (value - returns).square();
    let clipped = (near - returns).square();
    let loss = 0.5 * plain.maximum(&clipped).sum(Kind::Float) / n_tokens;
    let n_clipped = clipped.gt_tensor(&plain).sum(Kind::Float);
    Ok(ValueLoss { loss, n_clipped })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::test_tensors::{close, values_of};

    fn scalar(tensor: &Tensor) -> f64 {
        f64::try_from(tensor).unwrap()
    }

    #[test]
    fn the_policy_loss_by_hand() {
        // Ratios 1.5, 0.5, 1.5, 0.5, clipped to 1.2 or 0.8. Advantages 1, 1, −1, −1:
        // max(−1.5, −1.2) = −1.2 (clipped), max(−0.5, −0.8) = −0.5, max(1.5, 1.2) = 1.5, max(0.5, 0.8) = 0.8 (clipped).
        let logs = [1.5f32.ln(), 0.5f32.ln(), 1.5f32.ln(), 0.5f32.ln()];
        let logprob = Tensor::from_slice(&logs).set_requires_grad(true);
        let advantage = Tensor::from_slice(&[1.0f32, 1.0, -1.0, -1.0]);
        let out =
            policy_loss(&logprob, &advantage.zeros_like(), &advantage, None, 0.2, 4.0).unwrap();
        assert!(close(scalar(&out.loss), (-1.2 - 0.5 + 1.5 + 0.8) / 4.0));
        assert_eq!(scalar(&out.n_clipped), 2.0);
        out.loss.backward();
        // d/dlogp of −A·ρ is −A·ρ where the plain term won, 0 where the clipped one did.
        let gradient = values_of(&logprob.grad());
        for (got, expected) in gradient.into_iter().zip([0.0, -0.125, 0.375, 0.0]) {
            assert!(close(got, expected), "{got} against {expected}");
        }
    }

    #[test]
    fn whole_replies_have_one_ratio() {
        // Log-ratios of two replies: ln 1.1 + ln 1.1 (1.21, clipped at 1.2, advantage 2) and ln 0.9 (advantage −1).
        let logs = [1.1f32.ln(), 1.1f32.ln(), 0.9f32.ln()];
        let logprob = Tensor::from_slice(&logs).set_requires_grad(true);
        let advantage = Tensor::from_slice(&[2.0f32, 2.0, -1.0]);
        let units = Units::of(&Tensor::from_slice(&[4i64, 4, 7]));
        let old = advantage.zeros_like();
        let of = |importance: Option<(&Tensor, f64)>| {
            sequence_loss(&logprob, &old, &advantage, &units, importance, 0.2, 2.0).unwrap()
        };
        let out = of(None);
        assert!(close(scalar(&out.loss), (-2.0 * 1.2 + 0.9) / 2.0));
        assert_eq!(scalar(&out.n_clipped), 2.0);
        out.loss.backward();
        // Nothing from the clipped reply; d/dlogp of ρ is ρ.
        for (got, expected) in values_of(&logprob.grad()).into_iter().zip([0.0, 0.0, 0.45]) {
            assert!(close(got, expected), "{got} against {expected}");
        }
        // The sampler found the first reply half as likely (weight 2, cut at 1.5), the second twice (½).
        let half = 2f32.ln() / 2.0;
        let log_importance = Tensor::from_slice(&[half, half, -(2f32.ln())]);
        let weighed = of(Some((&log_importance, 1.5)));
        assert!(close(scalar(&weighed.loss), (-2.0 * 1.2 * 1.5 + 0.9 * 0.5) / 2.0));
    }

    #[test]
    fn each_token_is_weighed_by_what_the_sampler_thought_of_it() {
        let logprob = Tensor::from_slice(&[0.0f32, 0.0]).set_requires_grad(true);
        let advantage = Tensor::from_slice(&[1.0f32, -1.0]);
        let weights = importance_weights(&Tensor::from_slice(&[9.0f32, 0.5f32.ln()]), 3.0);
        let old = advantage.zeros_like();
        let out = policy_loss(&logprob, &old, &advantage, Some(&weights), 0.2, 2.0).unwrap();
        assert!(close(scalar(&out.loss), (-3.0 + 0.5) / 2.0));
        out.loss.backward();
        assert_eq!(values_of(&logprob.grad()), [-1.5, 0.25]);
    }

    #[test]
    fn the_kl_penalty_is_k3() {
        // r = ½ and 2: r − log r − 1 = 0.1931 and 0.3069; its derivative by log π is 1 − r.
        let logprob = Tensor::from_slice(&[2f32.ln(), -(2f32.ln())]).set_requires_grad(true);
        let loss = kl_loss(&logprob, &logprob.zeros_like().detach(), 2.0).unwrap();
        let expected = (0.5 + 2f64.ln() - 1.0 + 2.0 - 2f64.ln() - 1.0) / 2.0;
        assert!(close(scalar(&loss), expected));
        loss.backward();
        for (got, expected) in values_of(&logprob.grad()).into_iter().zip([0.25, -0.5]) {
            assert!(close(got, expected), "{got} against {expected}");
        }
    }

    #[test]
    fn the_value_loss_by_hand() {
        // R = 2. V 1.0 from V_old 0: clipped to 0.2, (0.2 − 2)² = 3.24 > 1: clipped. V 0.1: not clipped, 3.61.
        let value = Tensor::from_slice(&[1.0f32, 0.1]).set_requires_grad(true);
        let returns = Tensor::from_slice(&[2.0f32, 2.0]);
        let out = value_loss(&value, &returns.zeros_like(), &returns, 0.2, 2.0).unwrap();
        assert!(close(scalar(&out.loss), 0.5 * (3.24 + 3.61) / 2.0));
        assert_eq!(scalar(&out.n_clipped), 1.0);
        out.loss.backward();
        let gradient = values_of(&value.grad());
        // Both terms are equal at the second token: PyTorch's maximum splits the gradient, and both halves are (V − R).
        for (got, expected) in gradient.into_iter().zip([0.0, -0.95]) {
            assert!(close(got, expected), "{got} against {expected}");
        }
    }

    #[test]
    fn shapes_are_checked() {
        let (two, three) = (Tensor::from_slice(&[0f32; 2]), Tensor::from_slice(&[0f32; 3]));
        assert!(policy_loss(&two, &two, &three, None, 0.2, 2.0).is_err());
        assert!(value_loss(&two, &three, &two, 0.2, 2.0).is_err());
    }

    #[test]
    fn micro_batches_add_up_to_the_minibatch() {
        let logprob = Tensor::from_slice(&[0.1f32, -0.4, 0.0, 0.2, -0.1]);
        let (old, advantage) =
            (logprob.zeros_like(), Tensor::from_slice(&[1.0f32, -1.0, 0.5, -0.5, 1.0]));
        let whole = policy_loss(&logprob, &old, &advantage, None, 0.2, 5.0).unwrap().loss;
        let parts: f64 = [(0, 2), (2, 3)]
            .into_iter()
            .map(|(from, n)| {
                let part = |tensor: &Tensor| tensor.narrow(0, from, n);
                let (old, advantage) = (part(&old), part(&advantage));
                let out = policy_loss(&part(&logprob), &old, &advantage, None, 0.2, 5.0);
                scalar(&out.unwrap().loss)
            })
            .sum();
        assert!(close(scalar(&whole), parts));
    }
    /// Of each token: new, old, advantage or return.
    type Token = (f32, f32, f32);

    /// Both losses, and their gradients by the first column.
    fn losses(tokens: &[Token]) -> Vec<f64> {
        let part =
            |f: fn(&Token) -> f32| Tensor::from_slice(&tokens.iter().map(f).collect::<Vec<_>>());
        let (old, target) = (part(|t| t.1), part(|t| t.2));
        let n_tokens = tokens.len() as f64;
        let mut out = Vec::new();
        for is_policy in [true, false] {
            let new = part(|t| t.0).set_requires_grad(true);
            let loss = if is_policy {
                policy_loss(&new, &old, &target, None, 0.2, n_tokens).unwrap().loss
            } else {
                value_loss(&new, &old, &target, 0.2, n_tokens).unwrap().loss
            };
            loss.backward();
            out.push(scalar(&loss));
            out.extend(values_of(&new.grad()));
        }
        out
    }

    proptest! {
        #[test]
        fn the_order_of_tokens_changes_nothing(
            tokens in prop::collection::vec((-2.0f32..2.0, -2.0f32..2.0, -2.0f32..2.0), 1..30),
        ) {
            let out = losses(&tokens);
            let backwards: Vec<Token> = tokens.iter().rev().copied().collect();
            let turned = losses(&backwards);
            let n = tokens.len() + 1;
            for at in [0, n] {
                prop_assert!(close(turned[at], out[at]));
                for token in 0..tokens.len() {
                    let (a, b) = (turned[at + 1 + token], out[at + tokens.len() - token]);
                    prop_assert!(close(a, b), "{} against {}", a, b);
                }
            }
        }
    }
}
