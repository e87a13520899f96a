//! Advantages against the other samples of the same prompt, which need no critic.
//!
//! Samples of a prompt follow each other: entries `g · n .. (g + 1) · n` are group `g`. All sums are f64.

/// Added to a standard deviation before it divides, as in TRL.
const EPS: f64 = 1e-4;

/// Each reward less the mean of the others in its group.
///
/// # Panics
///
/// If groups have fewer than two members, or the rewards are not whole groups.
///
/// # Source
///
/// Kool et al. 2019; Ahmadian et al. 2024 (arXiv:2402.14740), RLOO; TRL 1.16's `RLOOTrainer`.
#[must_use]
pub fn leave_one_out(rewards: &[f64], n: usize) -> Vec<f64> {
    in_groups(rewards, n, |group| {
        let sum: f64 = group.iter().sum();
        let others = count(n - 1);
        group.iter().map(|reward| reward - (sum - reward) / others).collect()
    })
}

/// Each reward as standard deviations from the mean of its group.
///
/// # Panics
///
/// As [`leave_one_out`].
///
/// # Source
///
/// Shao et al. 2024 (arXiv:2402.03300), GRPO; TRL 1.16's `GRPOTrainer` with `scale_rewards = "group"`: Bessel's
/// correction, 1e-4 added to the deviation.
#[must_use]
pub fn standardise_groups(rewards: &[f64], n: usize) -> Vec<f64> {
    in_groups(rewards, n, standardised)
}

/// Several rewards, each brought to mean 0 and deviation 1 within its groups, so that none drowns the others when they are
/// summed.
///
/// # Shapes
///
/// - `rewards`: `[B][K]`; so is the result.
///
/// # Panics
///
/// As [`leave_one_out`].
///
/// # Source
///
/// GDPO ("Group reward-Decoupled Normalization Policy Optimization"); TRL 1.16's
/// `multi_objective_aggregation = "normalize_then_sum"`, in which [`standardised`] over the whole batch follows.
#[must_use]
pub fn standardise_each(rewards: &[Vec<f64>], n: usize) -> Vec<Vec<f64>> {
    let mut out = rewards.to_vec();
    for k in 0..rewards.first().map_or(0, Vec::len) {
        let column: Vec<f64> = rewards.iter().map(|row| row[k]).collect();
        for (row, scaled) in out.iter_mut().zip(standardise_groups(&column, n)) {
            row[k] = scaled;
        }
    }
    out
}

/// Numbers as standard deviations (Bessel's correction, 1e-4 added) from their mean.
#[must_use]
pub fn standardised(values: &[f64]) -> Vec<f64> {
    let n = count(values.len());
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    let deviation = if values.len() > 1 { (squares / (n - 1.0)).sqrt() } else { 0.0 };
    values.iter().map(|value| (value - mean) / (deviation + EPS)).collect()
}

/// Part of the groups whose rewards are all the same: they teach nothing.
#[must_use]
pub fn share_without_spread(rewards: &[f64], n: usize) -> f64 {
    let is_flat = |group: &&[f64]| group.iter().all(|reward| *reward == group[0]);
    count(rewards.chunks(n).filter(is_flat).count()) / count(rewards.chunks(n).count())
}

/// The advantage of each turn: its own, and those of the turns that follow from it.
///
/// # Shapes
///
/// - `turns`: `[U][B]`, a column a turn, in order; so is the result.
///
/// # Source
///
/// Shao et al. 2024 (arXiv:2402.03300), section 4.1.3: with rewards for steps, a token's advantage is the sum of the
/// normalised rewards of the steps that end after it.
#[must_use]
pub fn to_go(turns: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let mut out = turns.to_vec();
    for turn in (1..out.len()).rev() {
        let (before, after) = out.split_at_mut(turn);
        for (sum, later) in before[turn - 1].iter_mut().zip(&after[0]) {
            *sum += later;
        }
    }
    out
}

fn in_groups(rewards: &[f64], n: usize, of: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    assert!(n >= 2 && rewards.len().is_multiple_of(n), "whole groups of two or more");
    rewards.chunks(n).flat_map(of).collect()
}

#[expect(clippy::cast_precision_loss, reason = "counts of samples are small")]
fn count(n: usize) -> f64 {
    n as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn two_groups_of_three_by_hand() {
        let rewards = [1.0, 2.0, 6.0, 4.0, 4.0, 4.0];
        // 1 − (2 + 6)/2, 2 − (1 + 6)/2, 6 − (1 + 2)/2; a group that agrees says nothing.
        assert_eq!(leave_one_out(&rewards, 3), [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]);
        // Mean 3, deviation √((4 + 1 + 9)/2) = √7.
        let scaled = standardise_groups(&rewards, 3);
        for (got, expected) in scaled.iter().zip([-2.0, -1.0, 3.0, 0.0, 0.0, 0.0]) {
            assert!((got - expected / (7f64.sqrt() + 1e-4)).abs() < 1e-12);
        }
        assert_eq!(share_without_spread(&rewards, 3), 0.5);
    }

    #[test]
    fn a_reward_of_large_numbers_does_not_drown_the_others_when_each_is_normalised() {
        let rewards = [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 1000.0]].map(|row| row.to_vec());
        let sums: Vec<f64> =
            standardise_each(&rewards, 4).iter().map(|row| row.iter().sum()).collect();
        assert!((sums[0] - sums[3]).abs() < 1e-3 && sums[1] < sums[0], "{sums:?}");
    }

    #[test]
    fn a_turn_is_credited_with_what_follows() {
        let turns = [vec![1.0, -1.0], vec![2.0, 0.5], vec![0.25, 0.0]];
        assert_eq!(to_go(&turns), [vec![3.25, -0.5], vec![2.25, 0.5], vec![0.25, 0.0]]);
    }

    proptest! {
        #[test]
        fn a_constant_added_to_all_rewards_changes_no_advantage(
            rewards in prop::collection::vec(-3.0f64..3.0, 4), shift in -9.0f64..9.0,
        ) {
            let shifted: Vec<f64> = rewards.iter().map(|reward| reward + shift).collect();
            for of in [leave_one_out, standardise_groups] {
                for (a, b) in of(&rewards, 4).into_iter().zip(of(&shifted, 4)) {
                    prop_assert!((a - b).abs() < 1e-6 * (1.0 + a.abs()), "{a} against {b}");
                }
                // And a group's advantages add up to 0.
                prop_assert!(of(&rewards, 4).iter().sum::<f64>().abs() < 1e-9);
            }
        }
    }
}
