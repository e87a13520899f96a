//! PPO's two clipped losses, over the policy's own tokens in a micro-batch and normalised by the token count of its whole
//! minibatch, so that where micro-batches are cut changes nothing but rounding. Other tokens never come here.

use tch::{Kind, Tensor};

use crate::Error;
use crate::error::check_shape;

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

/// The clipped surrogate loss.
///
/// # Shapes
///
/// - `logprob` (with gradient), `old_logprob`, `advantage`: `[n]` f32.
/// - `n_tokens`: own tokens of the whole minibatch.
///
/// # Errors
///
/// [`Error::Shape`] if the shapes differ.
///
/// # Source
///
/// Schulman et al. 2017 (arXiv:1707.06347), equation 7, with the sign of a loss.
pub fn policy_loss(
    logprob: &Tensor,
    old_logprob: &Tensor,
    advantage: &Tensor,
    clip_range: f64,
    n_tokens: f64,
) -> Result<PolicyLoss, Error> {
    for (name, tensor) in [("old_logprob", old_logprob), ("advantage", advantage)] {
        check_shape(name, tensor, &logprob.size())?;
    }
    let log_ratio = (logprob - old_logprob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO);
    let ratio = log_ratio.exp();
    let plain = -advantage * &ratio;
    let clipped = -advantage * ratio.clamp(1.0 - clip_range, 1.0 + clip_range);
    let loss = plain.maximum(&clipped).sum(Kind::Float) / n_tokens;
    let n_clipped = clipped.gt_tensor(&plain).sum(Kind::Float);
    Ok(PolicyLoss {
        loss,
        ratio: ratio.detach(),
        squared_log_ratio: log_ratio.detach().square(),
        n_clipped,
    })
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
/// [`Error::Shape`] if the shapes differ.
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
) -> Result<ValueLoss, Error> {
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
        let out = policy_loss(&logprob, &advantage.zeros_like(), &advantage, 0.2, 4.0).unwrap();
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
        assert!(policy_loss(&two, &two, &three, 0.2, 2.0).is_err());
        assert!(value_loss(&two, &three, &two, 0.2, 2.0).is_err());
    }

    #[test]
    fn micro_batches_add_up_to_the_minibatch() {
        let logprob = Tensor::from_slice(&[0.1f32, -0.4, 0.0, 0.2, -0.1]);
        let (old, advantage) =
            (logprob.zeros_like(), Tensor::from_slice(&[1.0f32, -1.0, 0.5, -0.5, 1.0]));
        let whole = policy_loss(&logprob, &old, &advantage, 0.2, 5.0).unwrap().loss;
        let parts: f64 = [(0, 2), (2, 3)]
            .into_iter()
            .map(|(from, n)| {
                let part = |tensor: &Tensor| tensor.narrow(0, from, n);
                let out = policy_loss(&part(&logprob), &part(&old), &part(&advantage), 0.2, 5.0);
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
                policy_loss(&new, &old, &target, 0.2, n_tokens).unwrap().loss
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
