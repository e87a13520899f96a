//! What is left of a difference between two arms at equal length and equal truncation.
//!
//! People and the reward models of their labels like shorter replies, and a policy finds that out. A difference that is
//! length alone vanishes here; where the lengths of two arms do not overlap there is no number at all.

use super::crossed::count;
use super::{CrossedMean, Interval, crossed_mean, quantile};

/// Share of the pairs that must be longer, and shorter, for lengths to overlap.
const OVERLAP: f64 = 0.1;
/// Fewest pairs of replies.
const FEWEST: usize = 10;
/// Newton steps within which a regression that has a solution reaches it.
const STEPS: usize = 50;

/// A pair of replies to one prompt: how much better the last is, how much longer, and whether more of it was cut.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairedReplies {
    /// Score of the last reply minus that of the first.
    pub score: f64,
    /// Its tokens minus those of the first.
    pub tokens: f64,
    /// 1 if only the last was cut by the limit, −1 if only the first was, else 0.
    pub cut: f64,
}

/// What is left of a difference at equal length and equal truncation: the intercept of score ~ 1 + tokens + cut, over
/// pairs, one row a seed, one column a prompt.
///
/// # Errors
///
/// In words, why there is no such number: too few pairs, or lengths (or cuts) of the two that do not overlap.
///
/// # Panics
///
/// If the rows differ in length.
///
/// # Source
///
/// Dubois et al. 2024 (arXiv:2404.04475), length-controlled AlpacaEval: the regression read at no difference of length. Differs from
/// it in a straight line for scores instead of a logit for win rates. The interval is that of [`crossed_mean`] over
/// the pairs' influence on the intercept, so it contains what the slopes' uncertainty adds.
pub fn at_equal_length(pairs: &[Vec<PairedReplies>]) -> Result<CrossedMean, String> {
    let all = comparable(pairs)?;
    let fit = Regression::of(&all);
    mean_influence(pairs, |pair| fit.influence(pair))
}

/// The share of prompts on which the last reply would win at equal length and equal truncation: the logit
/// win ~ 1 + tokens + cut, read at no difference. A tie is half a win. The interval is that of the intercept in log-odds, taken
/// back to a share.
///
/// # Errors
///
/// As [`at_equal_length`], and if length and truncation alone tell every win, or one side has them all.
///
/// # Panics
///
/// If the rows differ in length.
///
/// # Source
///
/// Dubois et al. 2024 (arXiv:2404.04475), without the terms for instructions and models: there are two models, and every prompt
/// has one pair a seed.
pub fn win_rate_at_equal_length(pairs: &[Vec<PairedReplies>]) -> Result<Interval, String> {
    let all = comparable(pairs)?;
    if let Some(always) =
        [0.0, 1.0].into_iter().find(|own| all.iter().all(|pair| win(pair) == *own))
    {
        let which = if always == 1.0 { "last" } else { "first" };
        return Err(format!("the {which} reply wins all {} pairs: no logit", all.len()));
    }
    let fit = Logit::of(&all)
        .ok_or_else(|| "not comparable: length alone tells which reply wins".to_owned())?;
    let Interval { estimate, low, high } =
        mean_influence(pairs, |pair| fit.influence(pair))?.interval;
    Ok(Interval { estimate: sigmoid(estimate), low: sigmoid(low), high: sigmoid(high) })
}

/// All pairs, if there are enough of them and their lengths and cuts overlap.
fn comparable(pairs: &[Vec<PairedReplies>]) -> Result<Vec<PairedReplies>, String> {
    let all: Vec<PairedReplies> = pairs.concat();
    if all.len() < FEWEST {
        return Err(format!("not comparable: {} pairs, expected {FEWEST} or more", all.len()));
    }
    let mut longer: Vec<f64> = all.iter().map(|pair| pair.tokens).collect();
    longer.sort_by(f64::total_cmp);
    if quantile(&longer, OVERLAP) > 0.0 || quantile(&longer, 1.0 - OVERLAP) < 0.0 {
        let share = longer.iter().filter(|tokens| **tokens > 0.0).count();
        return Err(format!(
            "not comparable: the last reply is longer in {share} of {} pairs, lengths do not overlap",
            all.len()
        ));
    }
    let alike = all.iter().filter(|pair| pair.cut == 0.0).count();
    if count(alike) < OVERLAP * count(all.len()) {
        return Err(format!("not comparable: {alike} of {} pairs are cut alike", all.len()));
    }
    Ok(all)
}

fn mean_influence(
    pairs: &[Vec<PairedReplies>],
    influence: impl Fn(&PairedReplies) -> f64,
) -> Result<CrossedMean, String> {
    let influences: Vec<Vec<f64>> =
        pairs.iter().map(|row| row.iter().map(&influence).collect()).collect();
    crossed_mean(&influences).ok_or_else(|| "not comparable: fewer than two prompts".to_owned())
}

/// Least squares of score on a constant, tokens and cut; a column that does not vary is left out.
struct Regression {
    coefficients: [f64; 3],
    /// First row of the inverse of XᵀX / n.
    intercept_row: [f64; 3],
}

impl Regression {
    fn of(pairs: &[PairedReplies]) -> Self {
        let mut right = [0.0; 3];
        for pair in pairs {
            let x = regressors(pair);
            (0..3).for_each(|i| right[i] += x[i] * pair.score / count(pairs.len()));
        }
        let normal = moments(pairs, |_| 1.0);
        let coefficients = solve_pinned(normal, right);
        // The inverse is symmetric: its first row is its first column.
        Self { coefficients, intercept_row: solve_pinned(normal, [1.0, 0.0, 0.0]) }
    }

    /// The pair's influence on the intercept, plus the intercept: their mean is the intercept.
    fn influence(&self, pair: &PairedReplies) -> f64 {
        let x = regressors(pair);
        let rest = pair.score - dot(&self.coefficients, &x);
        self.coefficients[0] + dot(&self.intercept_row, &x) * rest
    }
}

/// Logistic regression of wins on a constant, tokens and cut, by Newton's method.
struct Logit {
    coefficients: [f64; 3],
    /// First row of the inverse of XᵀWX / n.
    intercept_row: [f64; 3],
}

impl Logit {
    /// None if there is no finite solution: the regressors separate wins from losses.
    fn of(pairs: &[PairedReplies]) -> Option<Self> {
        let mut coefficients = [0.0; 3];
        for _ in 0..STEPS {
            let mut gradient = [0.0; 3];
            for pair in pairs {
                let x = regressors(pair);
                let rest = win(pair) - sigmoid(dot(&coefficients, &x));
                (0..3).for_each(|i| gradient[i] += x[i] * rest / count(pairs.len()));
            }
            let hessian = moments(pairs, |x| {
                let p = sigmoid(dot(&coefficients, x));
                p * (1.0 - p)
            });
            let step = solve_pinned(hessian, gradient);
            (0..3).for_each(|i| coefficients[i] += step[i]);
            if !coefficients.iter().all(|value| value.is_finite()) {
                return None;
            }
            if dot(&step, &gradient).abs() < 1e-20 {
                let intercept_row = solve_pinned(hessian, [1.0, 0.0, 0.0]);
                // Of separated wins the weights vanish while the steps still shrink.
                let is_flat = hessian[0][0] < 1e-6;
                return (!is_flat).then_some(Self { coefficients, intercept_row });
            }
        }
        None
    }

    fn influence(&self, pair: &PairedReplies) -> f64 {
        let x = regressors(pair);
        let rest = win(pair) - sigmoid(dot(&self.coefficients, &x));
        self.coefficients[0] + dot(&self.intercept_row, &x) * rest
    }
}

fn win(pair: &PairedReplies) -> f64 {
    match pair.score.total_cmp(&0.0) {
        _ if pair.score == 0.0 => 0.5,
        std::cmp::Ordering::Less => 0.0,
        _ => 1.0,
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn regressors(pair: &PairedReplies) -> [f64; 3] {
    [1.0, pair.tokens, pair.cut]
}

fn dot(a: &[f64; 3], b: &[f64; 3]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Xᵀ W X / n.
fn moments(pairs: &[PairedReplies], weight: impl Fn(&[f64; 3]) -> f64) -> [[f64; 3]; 3] {
    let mut out = [[0.0; 3]; 3];
    for pair in pairs {
        let x = regressors(pair);
        let weight = weight(&x) / count(pairs.len());
        for i in 0..3 {
            (0..3).for_each(|j| out[i][j] += weight * x[i] * x[j]);
        }
    }
    out
}

/// As [`solve`]; a regressor that does not vary tells nothing, and is pinned to zero.
fn solve_pinned(mut a: [[f64; 3]; 3], mut b: [f64; 3]) -> [f64; 3] {
    for i in 1..3 {
        if a[i][i] * a[0][0] - a[0][i] * a[0][i] <= 1e-12 * (1.0 + a[i][i]) * a[0][0] {
            (0..3).for_each(|j| (a[i][j], a[j][i]) = (0.0, 0.0));
            (a[i][i], b[i]) = (1.0, 0.0);
        }
    }
    solve(a, b)
}

/// Solves a positive definite 3 × 3 system by elimination, largest pivot first.
fn solve(mut a: [[f64; 3]; 3], mut b: [f64; 3]) -> [f64; 3] {
    for i in 0..3 {
        let pivot = (i..3).max_by(|&p, &q| a[p][i].abs().total_cmp(&a[q][i].abs())).unwrap_or(i);
        a.swap(i, pivot);
        b.swap(i, pivot);
        for row in i + 1..3 {
            let factor = a[row][i] / a[i][i];
            let above = a[i];
            for (cell, above) in a[row].iter_mut().zip(above) {
                *cell -= factor * above;
            }
            b[row] -= factor * b[i];
        }
    }
    let mut x = [0.0; 3];
    for i in (0..3).rev() {
        let known: f64 = (i + 1..3).map(|j| a[i][j] * x[j]).sum();
        x[i] = (b[i] - known) / a[i][i];
    }
    x
}

#[cfg(test)]
mod tests {
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::SeedableRng;

    use super::super::crossed::tests::Normals;
    use super::*;

    #[test]
    fn a_gain_that_is_length_alone_vanishes_at_equal_length() {
        let mut normals = Normals(ChaCha8Rng::seed_from_u64(3));
        let mut pairs = |gain: f64| -> Vec<Vec<PairedReplies>> {
            let mut pair = || {
                let tokens = (-3.0 + 8.0 * normals.next()).round();
                PairedReplies {
                    score: gain - 0.1 * tokens + 0.2 * normals.next(),
                    tokens,
                    cut: 0.0,
                }
            };
            (0..2).map(|_| (0..200).map(|_| pair()).collect()).collect()
        };
        let none = at_equal_length(&pairs(0.0)).unwrap().interval;
        assert!(none.low < 0.0 && 0.0 < none.high && none.high < 0.1, "{none:?}");
        let real = at_equal_length(&pairs(0.5)).unwrap().interval;
        assert!(real.low < 0.5 && 0.5 < real.high && real.low > 0.4, "{real:?}");
    }

    #[test]
    fn lengths_that_do_not_overlap_give_no_number() {
        let pair = |tokens: f64| PairedReplies { score: 1.0, tokens, cut: 0.0 };
        let shorter: Vec<PairedReplies> = (0..100).map(|i| pair(-1.0 - f64::from(i % 7))).collect();
        let reason = at_equal_length(&[shorter]).unwrap_err();
        assert!(reason.contains("longer in 0 of 100 pairs"), "{reason}");
        assert!(at_equal_length(&[vec![pair(0.0); 4]]).unwrap_err().contains("4 pairs"));
    }

    #[test]
    fn wins_that_length_alone_decides_have_no_rate() {
        let pair = |i: i32| PairedReplies {
            score: f64::from(-i.signum()),
            tokens: f64::from(i),
            cut: 0.0,
        };
        let pairs: Vec<PairedReplies> = (-20..=20).filter(|i| *i != 0).map(pair).collect();
        let reason = win_rate_at_equal_length(&[pairs]).unwrap_err();
        assert!(reason.contains("length alone"), "{reason}");
    }

    #[test]
    fn a_coin_beside_length_wins_half() {
        // The last is better on every second prompt whatever its length.
        let pair = |i: i32| PairedReplies {
            score: f64::from(i % 2) - 0.5,
            tokens: f64::from(i / 2 - 10),
            cut: 0.0,
        };
        let pairs: Vec<PairedReplies> = (0..40).map(pair).collect();
        let rate = win_rate_at_equal_length(&[pairs]).unwrap();
        assert!(
            (rate.estimate - 0.5).abs() < 1e-9 && rate.low < 0.4 && rate.high > 0.6,
            "{rate:?}"
        );
    }
}
