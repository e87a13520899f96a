//! Generalised advantage estimation.

use anyhow::{Result, bail};
use tch::{Kind, Tensor};

use crate::shape::{check_shape, refused};

/// What [`estimate_advantages`] returns; both are 0 where `valid` is false.
#[derive(Debug)]
pub struct Advantages {
    /// `[B, T]` f32: how much better each token turned out than its state's value. Raw, not whitened.
    pub advantage: Tensor,
    /// `[B, T]` f32: what the critic should have said, `advantage + value`.
    pub returns: Tensor,
}

/// Generalised advantage estimation over a batch of completions.
///
/// Tokens that are not valid are stepped over: the token before a user's turn is followed by the first token after
/// it, with one discount between them.
///
/// # Shapes
///
/// - `rewards`, `values`: `[B, T]` f32; the value of a token is that of the state before it.
/// - `valid`: `[B, T]` bool, true on the policy's own tokens (in a chain, false on the user turns between them).
///
/// # Errors
///
/// Another shape if the three shapes differ.
///
/// # Source
///
/// Schulman et al. 2016 (arXiv:1506.02438), equation 16, as the recursion
/// `A_t = r_t + γ V_{t+1} − V_t + γ λ A_{t+1}`. The value after the last token is 0.
pub fn estimate_advantages(
    rewards: &Tensor,
    values: &Tensor,
    valid: &Tensor,
    gamma: f64,
    lambda: f64,
) -> Result<Advantages> {
    let shape = rewards.size();
    check_shape("values", values, &shape)?;
    check_shape("valid", valid, &shape)?;
    if shape.len() != 2 {
        bail!(refused("rewards", &[-1, -1], &shape));
    }
    let _guard = tch::no_grad_guard();
    let (n, n_tokens) = (shape[0], shape[1]);
    let zeros = || Tensor::zeros([n], (Kind::Float, rewards.device()));
    let (mut next_value, mut next_advantage) = (zeros(), zeros()); // [B]
    let mut columns = Vec::new();
    for t in (0..n_tokens).rev() {
        let (reward, value) = (rewards.select(1, t), values.select(1, t)); // [B]
        let is_valid = valid.select(1, t); // [B]
        let delta = reward + gamma * &next_value - &value;
        let advantage = delta + gamma * lambda * &next_advantage;
        columns.push(advantage.where_self(&is_valid, &zeros()));
        next_advantage = advantage.where_self(&is_valid, &next_advantage);
        next_value = value.where_self(&is_valid, &next_value);
    }
    if columns.is_empty() {
        return Ok(Advantages { advantage: rewards.zeros_like(), returns: rewards.zeros_like() });
    }
    columns.reverse();
    let advantage = Tensor::stack(&columns, 1); // [B, T]
    let returns = (&advantage + values).where_self(valid, &advantage.zeros_like());
    Ok(Advantages { advantage, returns })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::test_tensors::{batch, bools, close, values_of};

    #[test]
    fn three_tokens_by_hand() {
        // γ = 0.5, λ = 0.5. δ3 = 4 − 2 = 2; δ2 = 0 + 0.5·2 − 1 = 0; δ1 = 1 + 0.5·1 − 3 = −1.5.
        // A3 = 2; A2 = 0 + 0.25·2 = 0.5; A1 = −1.5 + 0.25·0.5 = −1.375. Returns: A + V.
        let out = estimate_advantages(
            &batch(&[&[1.0, 0.0, 4.0]]),
            &batch(&[&[3.0, 1.0, 2.0]]),
            &bools(&[&[true; 3]]),
            0.5,
            0.5,
        )
        .unwrap();
        assert_eq!(values_of(&out.advantage), [-1.375, 0.5, 2.0]);
        assert_eq!(values_of(&out.returns), [1.625, 1.5, 4.0]);
    }

    #[test]
    fn a_user_turn_is_stepped_over_whatever_it_holds() {
        // The three tokens above with two of the user's between the first and the second, and padding after.
        let nan = f32::NAN;
        let out = estimate_advantages(
            &batch(&[&[1.0, 9.0, nan, 0.0, 4.0, nan]]),
            &batch(&[&[3.0, nan, -7.0, 1.0, 2.0, 5.0]]),
            &bools(&[&[true, false, false, true, true, false]]),
            0.5,
            0.5,
        )
        .unwrap();
        assert_eq!(values_of(&out.advantage), [-1.375, 0.0, 0.0, 0.5, 2.0, 0.0]);
        assert_eq!(values_of(&out.returns), [1.625, 0.0, 0.0, 1.5, 4.0, 0.0]);
    }

    /// The fault: at λ = 0.95 and a critic of zero, a reward of 1 for every reply favoured the end of a turn over going on.
    #[test]
    fn f3_a_constant_reward_does_not_press_towards_short_replies() {
        #[derive(Debug, clap::Parser)]
        struct Cli {
            #[command(flatten)]
            config: crate::Config,
        }
        let Cli { config } = clap::Parser::parse_from(["ppo"]);
        // Replies of 1 to 16 tokens, 1 at the end of each.
        let (n, t) = (16, 16);
        let cell = |f: fn(usize, usize) -> bool| -> Vec<Vec<f32>> {
            let row = |b| (0..t).map(|i| f32::from(u8::from(f(b, i)))).collect();
            (0..n).map(row).collect()
        };
        let tensor = |rows: &[Vec<f32>]| batch(&rows.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let (last, own) = (cell(|b, i| b == i), cell(|b, i| i <= b));
        let valid = tensor(&own).gt(0.5);
        let zeros = tensor(&last).zeros_like();
        let advantage = |lambda| {
            let of = estimate_advantages(&tensor(&last), &zeros, &valid, config.gamma, lambda);
            values_of(&of.unwrap().advantage)
        };
        // How much better ending is than going on, in the mean over the tokens of each kind.
        let pressure = |advantage: &[f64]| {
            let mean = |wanted: bool| {
                let picked: Vec<f64> = (0..n * t)
                    .filter(|at| {
                        own[at / t][at % t] > 0.5 && (last[at / t][at % t] > 0.5) == wanted
                    })
                    .map(|at| advantage[at])
                    .collect();
                picked.iter().sum::<f64>() / picked.len() as f64
            };
            mean(true) - mean(false)
        };
        assert!(pressure(&advantage(0.95)) > 0.2, "{}", pressure(&advantage(0.95)));
        assert_eq!(pressure(&advantage(config.lambda)), 0.0);
    }

    #[test]
    fn shapes_are_checked() {
        let (x, valid) = (batch(&[&[1.0, 2.0]]), bools(&[&[true, true]]));
        let error =
            estimate_advantages(&x, &batch(&[&[1.0]]), &valid, 1.0, 1.0).unwrap_err().to_string();
        assert_eq!(error, "values: expected shape [1, 2], got [1, 1]");
    }

    /// B sequences of T tokens: rewards, values, which are valid.
    fn sequences() -> impl Strategy<Value = Vec<Vec<(f32, f32, bool)>>> {
        (1usize..5, 1usize..9).prop_flat_map(|(n, t)| {
            let token = (-2.0f32..2.0, -2.0f32..2.0, prop::bool::weighted(0.7));
            prop::collection::vec(prop::collection::vec(token, t), n)
        })
    }

    fn tensors(rows: &[Vec<(f32, f32, bool)>]) -> (Tensor, Tensor, Tensor) {
        let part = |f: fn(&(f32, f32, bool)) -> f32| {
            let rows: Vec<Vec<f32>> = rows.iter().map(|r| r.iter().map(f).collect()).collect();
            batch(&rows.iter().map(Vec::as_slice).collect::<Vec<_>>())
        };
        let valid = part(|t| f32::from(u8::from(t.2))).gt(0.5);
        (part(|t| t.0), part(|t| t.1), valid)
    }

    proptest! {
        #[test]
        fn lambda_0_gives_the_td_error_and_lambda_1_the_reward_to_go(rows in sequences(), gamma in 0.5f64..1.0) {
            let (rewards, values, valid) = tensors(&rows);
            let td = estimate_advantages(&rewards, &values, &valid, gamma, 0.0).unwrap();
            let to_go = estimate_advantages(&rewards, &values, &valid, gamma, 1.0).unwrap();
            let (td, to_go) = (values_of(&td.advantage), values_of(&to_go.returns));
            let n_tokens = rows[0].len();
            for (b, row) in rows.iter().enumerate() {
                let own: Vec<usize> = (0..n_tokens).filter(|&t| row[t].2).collect();
                for (i, &t) in own.iter().enumerate() {
                    let next = own.get(i + 1).map_or(0.0, |&next| f64::from(row[next].1));
                    let expected = f64::from(row[t].0) + gamma * next - f64::from(row[t].1);
                    prop_assert!(close(td[b * n_tokens + t], expected));
                    let sum: f64 = own[i..].iter().enumerate()
                        .map(|(k, &later)| gamma.powi(k as i32) * f64::from(row[later].0)).sum();
                    prop_assert!(close(to_go[b * n_tokens + t], sum));
                }
            }
        }

        #[test]
        fn what_lies_outside_valid_changes_nothing(rows in sequences(), noise in -9.0f32..9.0) {
            let (rewards, values, valid) = tensors(&rows);
            let mut changed = rows.clone();
            for token in changed.iter_mut().flatten().filter(|token| !token.2) {
                (token.0, token.1) = (noise, f32::NAN);
            }
            let (rewards2, values2, _) = tensors(&changed);
            let a = estimate_advantages(&rewards, &values, &valid, 0.9, 0.8).unwrap();
            let b = estimate_advantages(&rewards2, &values2, &valid, 0.9, 0.8).unwrap();
            prop_assert_eq!(values_of(&a.advantage), values_of(&b.advantage));
            prop_assert_eq!(values_of(&a.returns), values_of(&b.returns));
        }

        #[test]
        fn sequences_do_not_see_each_other(rows in sequences()) {
            let (rewards, values, valid) = tensors(&rows);
            let all = values_of(&estimate_advantages(&rewards, &values, &valid, 0.9, 0.8).unwrap().advantage);
            let mut reversed = rows.clone();
            reversed.reverse();
            let (rewards, values, valid) = tensors(&reversed);
            let out = estimate_advantages(&rewards, &values, &valid, 0.9, 0.8).unwrap();
            let back = values_of(&out.advantage.flip([0]));
            prop_assert_eq!(all, back);
        }
    }
}
