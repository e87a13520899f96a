//! PPO's two clipped losses, over the valid tokens of a micro-batch and normalised by the token count of its whole
//! minibatch, so that where micro-batches are cut changes nothing but rounding.

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
    /// `[…]` f32: `π_new / π_old` of each token, 1 where not valid; without gradient.
    pub ratio: Tensor,
    /// `[…]` f32: `(log ratio)²`, 0 where not valid; without gradient.
    pub squared_log_ratio: Tensor,
    /// Scalar f32: valid tokens at which the clipped term was the larger one.
    pub n_clipped: Tensor,
}

/// The clipped surrogate loss.
///
/// # Shapes
///
/// - `logprob` (with gradient), `old_logprob`, `advantage`: the same shape (`[B, T]` or `[n]`), f32; `valid`: bool.
/// - `n_tokens`: valid tokens of the whole minibatch.
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
    valid: &Tensor,
    clip_range: f64,
    n_tokens: f64,
) -> Result<PolicyLoss, Error> {
    for (name, tensor) in [("old_logprob", old_logprob), ("advantage", advantage), ("valid", valid)]
    {
        check_shape(name, tensor, &logprob.size())?;
    }
    let zeros = logprob.zeros_like();
    // Before the exponential: 0 · inf would make the gradient of a padding token NaN.
    let log_ratio =
        (logprob - old_logprob).where_self(valid, &zeros).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO);
    let advantage = advantage.where_self(valid, &zeros);
    let ratio = log_ratio.exp();
    let plain = -&advantage * &ratio;
    let clipped = -&advantage * ratio.clamp(1.0 - clip_range, 1.0 + clip_range);
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
    /// Scalar f32: valid tokens at which the clipped term was the larger one.
    pub n_clipped: Tensor,
}

/// Half the squared error of the critic, with steps beyond `clip_range` from its old value not rewarded.
///
/// # Shapes
///
/// - `value` (with gradient), `old_value`, `returns`: the same shape, f32; `valid`: bool.
/// - `n_tokens`: valid tokens of the whole minibatch.
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
    valid: &Tensor,
    clip_range: f64,
    n_tokens: f64,
) -> Result<ValueLoss, Error> {
    for (name, tensor) in [("old_value", old_value), ("returns", returns), ("valid", valid)] {
        check_shape(name, tensor, &value.size())?;
    }
    let zeros = value.zeros_like();
    let own = |tensor: &Tensor| tensor.where_self(valid, &zeros);
    let (value, old_value, returns) = (own(value), own(old_value), own(returns));
    let near = &old_value + (&value - &old_value).clamp(-clip_range, clip_range);
    let plain = (&value - &returns).square();
    let clipped = (near - returns).square();
    let loss = 0.5 * plain.maximum(&clipped).sum(Kind::Float) / n_tokens;
    let n_clipped = clipped.gt_tensor(&plain).sum(Kind::Float);
    Ok(ValueLoss { loss, n_clipped })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::test_tensors::{batch, bools, close, values_of};

    fn scalar(tensor: &Tensor) -> f64 {
        f64::try_from(tensor).unwrap()
    }

    #[test]
    fn the_policy_loss_by_hand() {
        // Ratios 1.5, 0.5, 1.5, 0.5, clipped to 1.2 or 0.8. Advantages 1, 1, −1, −1:
        // max(−1.5, −1.2) = −1.2 (clipped), max(−0.5, −0.8) = −0.5, max(1.5, 1.2) = 1.5, max(0.5, 0.8) = 0.8 (clipped).
        let logs = [1.5f32.ln(), 0.5f32.ln(), 1.5f32.ln(), 0.5f32.ln(), f32::NAN];
        let logprob = batch(&[&logs]).set_requires_grad(true);
        let out = policy_loss(
            &logprob,
            &batch(&[&[0.0; 5]]),
            &batch(&[&[1.0, 1.0, -1.0, -1.0, f32::NAN]]),
            &bools(&[&[true, true, true, true, false]]),
            0.2,
            4.0,
        )
        .unwrap();
        assert!(close(scalar(&out.loss), (-1.2 - 0.5 + 1.5 + 0.8) / 4.0));
        assert_eq!(scalar(&out.n_clipped), 2.0);
        out.loss.backward();
        // d/dlogp of −A·ρ is −A·ρ where the plain term won, 0 where the clipped one did.
        let gradient = values_of(&logprob.grad());
        for (got, expected) in gradient.into_iter().zip([0.0, -0.125, 0.375, 0.0, 0.0]) {
            assert!(close(got, expected), "{got} against {expected}");
        }
    }

    #[test]
    fn the_value_loss_by_hand() {
        // R = 2. V 1.0 from V_old 0: clipped to 0.2, (0.2 − 2)² = 3.24 > 1: clipped. V 0.1: not clipped, 3.61.
        let value = batch(&[&[1.0, 0.1, f32::NAN]]).set_requires_grad(true);
        let out = value_loss(
            &value,
            &batch(&[&[0.0, 0.0, 0.0]]),
            &batch(&[&[2.0, 2.0, f32::NAN]]),
            &bools(&[&[true, true, false]]),
            0.2,
            2.0,
        )
        .unwrap();
        assert!(close(scalar(&out.loss), 0.5 * (3.24 + 3.61) / 2.0));
        assert_eq!(scalar(&out.n_clipped), 1.0);
        out.loss.backward();
        let gradient = values_of(&value.grad());
        // Both terms are equal at the second token: PyTorch's maximum splits the gradient, and both halves are (V − R).
        for (got, expected) in gradient.into_iter().zip([0.0, -0.95, 0.0]) {
            assert!(close(got, expected), "{got} against {expected}");
        }
    }

    #[test]
    fn micro_batches_add_up_to_the_minibatch() {
        let logprob = batch(&[&[0.1, -0.4, 0.3], &[0.0, 0.2, -0.1]]);
        let (old, advantage) =
            (logprob.zeros_like(), batch(&[&[1.0, -1.0, 2.0], &[0.5, -0.5, 1.0]]));
        let valid = bools(&[&[true, true, false], &[true, true, true]]);
        let whole = policy_loss(&logprob, &old, &advantage, &valid, 0.2, 5.0).unwrap().loss;
        let parts: f64 = (0..2)
            .map(|row| {
                let part = |tensor: &Tensor| tensor.narrow(0, row, 1);
                let out = policy_loss(
                    &part(&logprob),
                    &part(&old),
                    &part(&advantage),
                    &part(&valid),
                    0.2,
                    5.0,
                );
                scalar(&out.unwrap().loss)
            })
            .sum();
        assert!(close(scalar(&whole), parts));
    }
    /// Of each token: new, old, advantage or return, valid.
    type Token = (f32, f32, f32, bool);

    /// Both losses, and their gradients by the first column.
    fn losses(tokens: &[Token]) -> Vec<f64> {
        let part = |f: fn(&Token) -> f32| batch(&[&tokens.iter().map(f).collect::<Vec<_>>()]);
        let valid = bools(&[&tokens.iter().map(|token| token.3).collect::<Vec<_>>()]);
        let n_tokens = tokens.iter().filter(|token| token.3).count().max(1) as f64;
        let (old, target) = (part(|t| t.1), part(|t| t.2));
        let mut out = Vec::new();
        for is_policy in [true, false] {
            let new = part(|t| t.0).set_requires_grad(true);
            let loss = if is_policy {
                policy_loss(&new, &old, &target, &valid, 0.2, n_tokens).unwrap().loss
            } else {
                value_loss(&new, &old, &target, &valid, 0.2, n_tokens).unwrap().loss
            };
            loss.backward();
            out.push(scalar(&loss));
            out.extend(values_of(&new.grad()));
        }
        out
    }

    proptest! {
        #[test]
        fn what_lies_outside_valid_and_the_order_change_nothing(
            tokens in prop::collection::vec(
                (-2.0f32..2.0, -2.0f32..2.0, -2.0f32..2.0, prop::bool::weighted(0.7)), 1..30,
            ),
        ) {
            let out = losses(&tokens);
            let noisy: Vec<Token> = tokens
                .iter()
                .map(|&token| if token.3 { token } else { (f32::NAN, 7.0, f32::NAN, false) })
                .collect();
            prop_assert_eq!(&losses(&noisy), &out);
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
