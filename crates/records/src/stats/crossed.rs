//! Means over seeds and prompts.
//!
//! A run draws a seed, answers prompts and is scored. Both the seed and the choice of prompts are luck: an interval that
//! redraws prompts alone says nothing of the next seed. Seeds and prompts are crossed (every seed answers every prompt), so
//! the variance of the mean has a part of either and their interaction, which each part contains.

use serde::{Deserialize, Serialize};
use statrs::distribution::{ContinuousCDF, StudentsT};

use super::{Interval, mean};

/// Probability with which an interval misses.
pub(super) const ALPHA: f64 = 0.05;

/// A mean over seeds and prompts, with the interval it may lie in.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CrossedMean {
    /// The estimate and its 95 % interval.
    pub interval: Interval,
    /// Standard error of the estimate.
    pub standard_error: f64,
    /// Fewest seeds on either side.
    pub n_seeds: usize,
    /// Prompts that every run answered.
    pub n_prompts: usize,
    /// Degrees of freedom of the t distribution (Satterthwaite).
    pub degrees: f64,
}

impl CrossedMean {
    /// Whether the interval covers one run alone: nothing is known about other seeds.
    pub fn is_of_this_run_only(&self) -> bool {
        self.n_seeds == 1
    }

    /// The interval that holds 95 % for `n_looks` of its kind together (Bonferroni): each at level 1 − 0.05 / `n_looks`.
    ///
    /// # Panics
    ///
    /// If `n_looks` is 0.
    #[must_use]
    pub fn corrected(&self, n_looks: usize) -> Interval {
        assert!(n_looks > 0, "at least one look");
        around(self.interval.estimate, self.standard_error, self.degrees, 0.05 / count(n_looks))
    }
}

/// The mean of `values`, one row a seed, one column a prompt.
///
/// None without two prompts. With one seed the interval covers the choice of prompts alone.
///
/// # Panics
///
/// If the rows differ in length.
///
/// # Source
///
/// Two-way random effects without replication, variance of the mean (MS_seeds + MS_prompts − MS_rest) / (S·P), degrees of
/// freedom by Satterthwaite 1946. Differs from it in a floor: half the larger of the two parts, for where the difference comes
/// out too small by chance.
pub fn crossed_mean(values: &[Vec<f64>]) -> Option<CrossedMean> {
    let side = Side::of(values)?;
    combine(mean(&side.columns), std::slice::from_ref(&side), &side.columns)
}

/// The mean of `last` minus that of `first`, each one row a seed, one column a prompt; the prompts are the same, the seeds
/// are not. None without two prompts or without a seed on either side.
///
/// # Panics
///
/// If the rows differ in length.
///
/// # Source
///
/// As [`crossed_mean`], the parts of both sides' seeds added.
pub fn crossed_difference(first: &[Vec<f64>], last: &[Vec<f64>]) -> Option<CrossedMean> {
    let (first, last) = (Side::of(first)?, Side::of(last)?);
    assert_eq!(first.columns.len(), last.columns.len(), "the same prompts on both sides");
    let differences: Vec<f64> =
        first.columns.iter().zip(&last.columns).map(|(first, last)| last - first).collect();
    combine(mean(&differences), &[first, last], &differences)
}

/// One arm's part in the variance of a mean.
struct Side {
    n_seeds: usize,
    /// Means over seeds, one a prompt.
    columns: Vec<f64>,
    /// Variance of the mean over seeds' means.
    seeds: f64,
    /// That part of it which is the interaction of seed and prompt.
    rest: f64,
}

impl Side {
    fn of(values: &[Vec<f64>]) -> Option<Self> {
        let n_prompts = values.first()?.len();
        assert!(values.iter().all(|row| row.len() == n_prompts), "one column a prompt");
        if n_prompts < 2 {
            return None;
        }
        let rows: Vec<f64> = values.iter().map(|row| mean(row)).collect();
        let columns: Vec<f64> = (0..n_prompts)
            .map(|column| mean(&values.iter().map(|row| row[column]).collect::<Vec<_>>()))
            .collect();
        let n_seeds = values.len();
        let (mut seeds, mut rest) = (0.0, 0.0);
        if n_seeds > 1 {
            let all = mean(&rows);
            seeds = variance(&rows) / count(n_seeds);
            let mut squares = 0.0;
            for (row, of_row) in values.iter().zip(&rows) {
                for (value, of_column) in row.iter().zip(&columns) {
                    squares += (value - of_row - of_column + all).powi(2);
                }
            }
            rest = squares
                / (count(n_seeds - 1) * count(n_prompts - 1))
                / (count(n_seeds) * count(n_prompts));
        }
        Some(Self { n_seeds, columns, seeds, rest })
    }
}

fn combine(estimate: f64, sides: &[Side], columns: &[f64]) -> Option<CrossedMean> {
    let n_prompts = columns.len();
    let prompts = variance(columns) / count(n_prompts);
    let n_seeds = sides.iter().map(|side| side.n_seeds).min()?;
    // With a single seed on one side nothing is known of the luck of seeds, on either.
    let sides = if n_seeds > 1 { sides } else { &[] };
    let seeds: f64 = sides.iter().map(|side| side.seeds).sum();
    let rest: f64 = sides.iter().map(|side| side.rest).sum();
    let of_mean = (seeds + prompts - rest).max(0.5 * seeds.max(prompts));
    let share = |part: f64, degrees: f64| if part > 0.0 { part * part / degrees } else { 0.0 };
    let mut shares = share(prompts, count(n_prompts - 1));
    for side in sides {
        shares += share(side.seeds, count(side.n_seeds - 1));
        shares += share(side.rest, count(side.n_seeds - 1) * count(n_prompts - 1));
    }
    let degrees =
        if shares > 0.0 { (of_mean * of_mean / shares).max(1.0) } else { count(n_prompts - 1) };
    let standard_error = of_mean.sqrt();
    let interval = around(estimate, standard_error, degrees, ALPHA);
    Some(CrossedMean { interval, standard_error, n_seeds, n_prompts, degrees })
}

/// `estimate` ± its quantile of Student's t: the interval that misses with probability `alpha`.
pub(super) fn around(estimate: f64, standard_error: f64, degrees: f64, alpha: f64) -> Interval {
    let t = StudentsT::new(0.0, 1.0, degrees).expect("degrees of freedom are positive");
    let half = t.inverse_cdf(1.0 - alpha / 2.0) * standard_error;
    Interval { estimate, low: estimate - half, high: estimate + half }
}

pub(super) fn variance(values: &[f64]) -> f64 {
    let all = mean(values);
    values.iter().map(|value| (value - all).powi(2)).sum::<f64>() / count(values.len() - 1)
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
pub(super) fn count(n: usize) -> f64 {
    n as f64
}

#[cfg(test)]
pub(super) mod tests {
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};

    use super::*;

    /// Standard normals by Box and Muller.
    pub(in crate::stats) struct Normals(pub(in crate::stats) ChaCha8Rng);

    impl Normals {
        pub(in crate::stats) fn next(&mut self) -> f64 {
            let mut uniform = || (count((self.0.next_u64() >> 11) as usize) + 0.5) / 2f64.powi(53);
            (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()
        }
    }

    #[test]
    fn a_mean_by_hand() {
        // Two seeds, two prompts: rows 1.5 and 3.5, columns 2 and 3, rest 0.
        let found = crossed_mean(&[vec![1.0, 2.0], vec![3.0, 4.0]]).unwrap();
        // Variance of the mean: 2/2 + 0.5/2 − 0 = 1.25; degrees 1.25² / (1² + 0.25²) = 1.4706.
        assert!((found.degrees - 1.5625 / 1.0625).abs() < 1e-12);
        assert_eq!((found.interval.estimate, found.n_seeds, found.n_prompts), (2.5, 2, 2));
        // scipy.stats.t.ppf(0.975, 1.5625 / 1.0625)
        let half = 6.188_114_944_910_76 * 1.25_f64.sqrt();
        assert!((found.interval.high - 2.5 - half).abs() < 1e-6, "{found:?}");
    }

    #[test]
    fn one_seed_speaks_of_its_prompts_alone() {
        let found = crossed_mean(&[vec![1.0, 2.0, 6.0]]).unwrap();
        assert!(found.is_of_this_run_only());
        // The t interval of a mean: sd √7, n = 3, t = 4.302653.
        let half = 4.302_653 * (7.0_f64 / 3.0).sqrt();
        assert!((found.interval.high - found.interval.estimate - half).abs() < 1e-5);
        assert!(crossed_mean(&[vec![1.0]]).is_none() && crossed_mean(&[]).is_none());
    }

    /// How often the interval of a difference of arms holds the true one, in percent.
    fn coverage(n_seeds: usize, n_prompts: usize, [by_seed, by_prompt, rest]: [f64; 3]) -> f64 {
        const TRUTH: f64 = 0.4;
        const RUNS: usize = 2000;
        let mut normals = Normals(ChaCha8Rng::seed_from_u64(7));
        let mut held = 0;
        for _ in 0..RUNS {
            // How hard the prompts are, for both arms, and how much more the last arm gains on each.
            let prompts: Vec<(f64, f64)> =
                (0..n_prompts).map(|_| (normals.next(), by_prompt * normals.next())).collect();
            let mut arm = |gain: f64| -> Vec<Vec<f64>> {
                (0..n_seeds)
                    .map(|_| {
                        let seed = by_seed * normals.next();
                        let of = |(hard, more): &(f64, f64)| hard + gain * (TRUTH + more) + seed;
                        prompts.iter().map(|prompt| of(prompt) + rest * normals.next()).collect()
                    })
                    .collect()
            };
            let (first, last) = (arm(0.0), arm(1.0));
            let Interval { low, high, .. } = crossed_difference(&first, &last).unwrap().interval;
            held += usize::from(low <= TRUTH && TRUTH <= high);
        }
        100.0 * count(held) / count(RUNS)
    }

    #[test]
    fn intervals_cover_what_they_claim() {
        for (n_seeds, n_prompts) in [(3, 40), (3, 100), (5, 40), (5, 100)] {
            for effects in [[0.1, 0.5, 1.0], [0.3, 0.5, 1.0], [1.0, 0.5, 0.5], [0.1, 1.0, 0.3]] {
                let covered = coverage(n_seeds, n_prompts, effects);
                println!("{n_seeds} seeds, {n_prompts} prompts, {effects:?}: {covered:.1} %");
                assert!(
                    (93.0..=98.0).contains(&covered),
                    "{n_seeds} {n_prompts} {effects:?}: {covered}"
                );
            }
        }
    }

    #[test]
    fn intervals_that_ignore_seeds_do_not() {
        // The fault this replaces: seeds averaged, then prompts alone redrawn.
        let mut normals = Normals(ChaCha8Rng::seed_from_u64(9));
        let mut held = 0;
        for _ in 0..500 {
            let rows: Vec<Vec<f64>> = (0..3)
                .map(|_| {
                    let seed = 0.5 * normals.next();
                    (0..100).map(|_| seed + normals.next()).collect()
                })
                .collect();
            let columns: Vec<f64> =
                (0..100).map(|p| mean(&[rows[0][p], rows[1][p], rows[2][p]])).collect();
            let Interval { low, high, .. } = crossed_mean(&[columns]).unwrap().interval;
            held += usize::from(low <= 0.0 && 0.0 <= high);
        }
        assert!(held < 400, "{held} of 500");
    }
}
