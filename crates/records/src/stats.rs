//! Statistics of scores and verdicts, in f64.

mod clustered;
mod crossed;
mod equal_length;

use std::collections::BTreeMap;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use statrs::distribution::{ContinuousCDF, Normal};

pub use clustered::{MeanOfRuns, clustered_mean, difference_of_runs, mean_of_runs};
pub use crossed::{CrossedMean, crossed_difference, crossed_mean};
pub use equal_length::{PairedReplies, at_equal_length, win_rate_at_equal_length};

/// Draws of a bootstrap when nothing else is said.
pub const DRAWS: usize = 10_000;

/// An estimate with the interval it may lie in.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The estimate.
    pub estimate: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// The outcome of a bootstrap.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Bootstrap {
    /// The statistic of the sample, and the percentile interval of its redraws.
    pub interval: Interval,
    /// Standard deviation of the redraws.
    pub standard_error: f64,
}

/// How to draw a bootstrap.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Resampling {
    /// Number of redraws.
    pub draws: usize,
    /// Probability mass inside the interval, for instance 0.95.
    pub level: f64,
    /// Seed of the ChaCha8 stream.
    pub seed: u64,
}

impl Resampling {
    /// [`DRAWS`] redraws and 95 % intervals.
    pub fn seeded(seed: u64) -> Self {
        Self { draws: DRAWS, level: 0.95, seed }
    }
}

/// Arithmetic mean; NaN of nothing.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / count(values.len())
}

/// Population standard deviation (divisor n); NaN of nothing.
pub fn std(values: &[f64]) -> f64 {
    let mean = mean(values);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (squares / count(values.len())).sqrt()
}

/// The report's Score of a model: mean − ½ · population standard deviation of its scores.
pub fn score(values: &[f64]) -> f64 {
    mean(values) - 0.5 * std(values)
}

/// Standard error of the mean of `values`, whole clusters at a time; none for fewer than two clusters.
///
/// # Source
///
/// Liang & Zeger 1986 for a mean, with the factor G / (G − 1); with clusters of one value it is s / √n.
#[must_use]
pub fn clustered_error(values: &[f64], clusters: &[usize]) -> Option<f64> {
    let mean = mean(values);
    let mut sums: BTreeMap<usize, f64> = BTreeMap::new();
    for (value, cluster) in values.iter().zip(clusters) {
        *sums.entry(*cluster).or_default() += value - mean;
    }
    let (n, n_clusters) = (count(values.len()), count(sums.len()));
    let squares: f64 = sums.values().map(|sum| sum * sum).sum();
    (sums.len() > 1).then(|| (squares * n_clusters / (n_clusters - 1.0)).sqrt() / n)
}

/// Wilson's interval of a proportion; `z` = 1.96 for 95 %.
///
/// # Source
///
/// Wilson 1927. Without trials the interval is 0 to 1 and the estimate NaN.
pub fn wilson(successes: u64, n: u64, z: f64) -> Interval {
    if n == 0 {
        return Interval { estimate: f64::NAN, low: 0.0, high: 1.0 };
    }
    let (n, successes) = (count_u64(n), count_u64(successes));
    let p = successes / n;
    let denominator = 1.0 + z * z / n;
    let centre = (p + z * z / (2.0 * n)) / denominator;
    let half = z * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt() / denominator;
    Interval { estimate: p, low: (centre - half).max(0.0), high: (centre + half).min(1.0) }
}

/// Percentile bootstrap of a statistic, whole clusters (the values of one prompt) redrawn at a time.
///
/// # Panics
///
/// If there is no cluster, no draw, or the level is not between 0 and 1.
///
/// # Source
///
/// Efron & Tibshirani 1993, ch. 13 (percentile interval), ch. 8 (clusters as the sampling unit).
pub fn bootstrap(
    clusters: &[Vec<f64>],
    statistic: impl Fn(&[f64]) -> f64,
    resampling: Resampling,
) -> Bootstrap {
    let all: Vec<f64> = clusters.concat();
    let mut redrawn = Vec::with_capacity(all.len());
    resample(clusters.len(), resampling, statistic(&all), |indices| {
        redrawn.clear();
        redrawn.extend(indices.iter().flat_map(|&index| &clusters[index]));
        statistic(&redrawn)
    })
}

/// Percentile bootstrap of `statistic(last) − statistic(first)`, the same prompts redrawn for both:
/// cluster i of either belongs to prompt i.
///
/// # Panics
///
/// If the numbers of clusters differ, there is no cluster, no draw, or the level is not between 0
/// and 1.
pub fn paired_difference_of(
    first: &[Vec<f64>],
    last: &[Vec<f64>],
    statistic: impl Fn(&[f64]) -> f64,
    resampling: Resampling,
) -> Bootstrap {
    assert_eq!(first.len(), last.len(), "one cluster a prompt on both sides");
    let estimate = statistic(&last.concat()) - statistic(&first.concat());
    let mut redrawn = Vec::new();
    let mut redraw = |clusters: &[Vec<f64>], indices: &[usize]| {
        redrawn.clear();
        redrawn.extend(indices.iter().flat_map(|&index| &clusters[index]));
        statistic(&redrawn)
    };
    resample(first.len(), resampling, estimate, |indices| {
        redraw(last, indices) - redraw(first, indices)
    })
}

fn resample(
    n_clusters: usize,
    resampling: Resampling,
    estimate: f64,
    mut statistic: impl FnMut(&[usize]) -> f64,
) -> Bootstrap {
    let Resampling { draws, level, seed } = resampling;
    assert!(n_clusters > 0 && draws > 0, "something to draw from, and draws");
    assert!(level > 0.0 && level < 1.0, "level strictly between 0 and 1");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut indices = vec![0; n_clusters];
    let mut redraws: Vec<f64> = (0..draws)
        .map(|_| {
            indices.fill_with(|| below(&mut rng, n_clusters));
            statistic(&indices)
        })
        .collect();
    // Of one cluster every draw is the same, whatever rounding makes of their spread.
    let standard_error = if n_clusters > 1 { std(&redraws) } else { 0.0 };
    redraws.sort_by(f64::total_cmp);
    let tail = (1.0 - level) / 2.0;
    let interval =
        Interval { estimate, low: quantile(&redraws, tail), high: quantile(&redraws, 1.0 - tail) };
    Bootstrap { interval, standard_error }
}

/// A uniform index below `n`.
fn below(rng: &mut ChaCha8Rng, n: usize) -> usize {
    let n = n as u64;
    // Numbers above the last multiple of n would favour small indices: drawn again.
    let limit = u64::MAX - u64::MAX % n;
    loop {
        let number = rng.next_u64();
        if number < limit {
            return usize::try_from(number % n).expect("below a usize");
        }
    }
}

/// Quantile of sorted values, linear between neighbours (numpy's default).
///
/// # Panics
///
/// If there are no values, or `p` is not between 0 and 1.
pub fn quantile(sorted: &[f64], p: f64) -> f64 {
    assert!(!sorted.is_empty() && (0.0..=1.0).contains(&p), "values, and p in [0, 1]");
    let position = p * count(sorted.len() - 1);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 ≤ position")]
    let below = position.floor() as usize;
    let above = (below + 1).min(sorted.len() - 1);
    let weight = position - position.floor();
    sorted[below] + weight * (sorted[above] - sorted[below])
}

/// Pearson's correlation; NaN if either side does not vary.
///
/// # Panics
///
/// If the lengths differ.
pub fn pearson(x: &[f64], y: &[f64]) -> f64 {
    assert_eq!(x.len(), y.len(), "pairs");
    let (mean_x, mean_y) = (mean(x), mean(y));
    let (mut xy, mut xx, mut yy) = (0.0, 0.0, 0.0);
    for (x, y) in x.iter().zip(y) {
        let (dx, dy) = (x - mean_x, y - mean_y);
        xy += dx * dy;
        xx += dx * dx;
        yy += dy * dy;
    }
    xy / (xx * yy).sqrt()
}

/// Spearman's rank correlation, ties at their mean rank; NaN if either side does not vary.
///
/// # Panics
///
/// If the lengths differ.
pub fn spearman(x: &[f64], y: &[f64]) -> f64 {
    pearson(&ranks(x), &ranks(y))
}

/// Ranks from 1, ties at their mean rank.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    let mut start = 0;
    for tie in order.chunk_by(|&a, &b| values[a] == values[b]) {
        let end = start + tie.len();
        for &index in tie {
            ranks[index] = count(start + 1 + end) / 2.0;
        }
        start = end;
    }
    ranks
}

/// Stated probabilities of about the same size, and how often they came true.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CalibrationBin {
    /// How many.
    pub n: usize,
    /// Mean stated probability.
    pub stated: f64,
    /// Part of them that came true.
    pub observed: f64,
}

/// A reliability diagram: bins of equal width, empty ones left out.
///
/// # Panics
///
/// If the lengths differ, there is no bin, or a probability is not between 0 and 1.
///
/// # Source
///
/// Guo et al. 2017 (arXiv:1706.04599), section 2; a probability on an edge belongs to the upper
/// bin, 1 to the last.
pub fn calibration_bins(
    probabilities: &[f64],
    outcomes: &[bool],
    n_bins: usize,
) -> Vec<CalibrationBin> {
    assert_eq!(probabilities.len(), outcomes.len(), "one outcome a probability");
    assert!(n_bins > 0, "at least one bin");
    let mut bins = vec![(0, 0.0, 0.0); n_bins];
    for (&p, &outcome) in probabilities.iter().zip(outcomes) {
        assert!((0.0..=1.0).contains(&p), "a probability");
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 ≤ p ≤ 1")]
        let bin = ((p * count(n_bins)) as usize).min(n_bins - 1);
        let (n, stated, observed) = &mut bins[bin];
        *n += 1;
        *stated += p;
        *observed += f64::from(u8::from(outcome));
    }
    bins.into_iter()
        .filter(|(n, _, _)| *n > 0)
        .map(|(n, stated, observed)| CalibrationBin {
            n,
            stated: stated / count(n),
            observed: observed / count(n),
        })
        .collect()
}

/// Expected calibration error: the gap between stated probability and observed frequency, over
/// bins of equal width, weighted by their sizes. NaN of nothing.
///
/// # Panics
///
/// As [`calibration_bins`].
///
/// # Source
///
/// Guo et al. 2017 (arXiv:1706.04599), eq. 3.
pub fn expected_calibration_error(probabilities: &[f64], outcomes: &[bool], n_bins: usize) -> f64 {
    let gap = |bin: CalibrationBin| count(bin.n) * (bin.stated - bin.observed).abs();
    let bins = calibration_bins(probabilities, outcomes, n_bins);
    bins.into_iter().map(gap).sum::<f64>() / count(probabilities.len())
}

/// Two-sided exact sign test: the probability of a split at least as uneven if wins and losses
/// were equally likely. Ties are left out beforehand; 1 without any win or loss.
pub fn sign_test(wins: u64, losses: u64) -> f64 {
    let n = wins + losses;
    let fewer = wins.min(losses);
    // Terms of the binomial distribution, in logarithms: 2^-1000 is no f64.
    let mut log_term = -count_u64(n) * std::f64::consts::LN_2;
    let mut tail = 0.0;
    for k in 0..=fewer {
        tail += log_term.exp();
        log_term += count_u64(n - k).ln() - count_u64(k + 1).ln();
    }
    (2.0 * tail).min(1.0)
}

/// The smallest true difference that an experiment with this standard error finds with probability
/// `power` at a two-sided test of level `alpha`: (z₁₋α⁄₂ + z_power) · standard error.
///
/// # Panics
///
/// If `alpha` or `power` is not strictly between 0 and 1.
pub fn minimum_detectable_effect(standard_error: f64, alpha: f64, power: f64) -> f64 {
    (normal_quantile(1.0 - alpha / 2.0) + normal_quantile(power)) * standard_error
}

/// Quantile of the standard normal distribution.
///
/// # Panics
///
/// If `p` is not strictly between 0 and 1.
pub fn normal_quantile(p: f64) -> f64 {
    assert!(p > 0.0 && p < 1.0, "a probability strictly between 0 and 1");
    Normal::standard().inverse_cdf(p)
}

/// Fleiss' kappa: agreement of several raters beyond chance. `counts[i][j]` = raters who put
/// subject i in category j; every subject has the same number of raters. NaN if all agree on one
/// category throughout.
///
/// # Panics
///
/// If there is no subject, the rows differ in length or sum, or there are fewer than two raters.
///
/// # Source
///
/// Fleiss 1971.
pub fn fleiss_kappa(counts: &[Vec<u64>]) -> f64 {
    let first = counts.first().expect("at least one subject");
    let n_raters: u64 = first.iter().sum();
    assert!(n_raters >= 2, "at least two raters");
    let mut totals = vec![0.0; first.len()];
    let mut agreement = 0.0;
    for row in counts {
        assert_eq!(row.len(), totals.len(), "the same categories for every subject");
        assert_eq!(row.iter().sum::<u64>(), n_raters, "the same number of raters a subject");
        for (total, &n) in totals.iter_mut().zip(row) {
            *total += count_u64(n);
            agreement += count_u64(n * n.saturating_sub(1));
        }
    }
    let (n_subjects, n_raters) = (count(counts.len()), count_u64(n_raters));
    let observed = agreement / (n_subjects * n_raters * (n_raters - 1.0));
    let expected: f64 = totals.iter().map(|t| (t / (n_subjects * n_raters)).powi(2)).sum();
    (observed - expected) / (1.0 - expected)
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn count(n: usize) -> f64 {
    n as f64
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn count_u64(n: u64) -> f64 {
    n as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[track_caller]
    fn close(got: f64, expected: f64, tolerance: f64) {
        assert!((got - expected).abs() <= tolerance, "expected {expected}, got {got}");
    }

    #[test]
    fn errors_are_clustered_by_prompt() {
        // Clusters of one: s / √n with s² = (4 + 0 + 4) / 2 = 4.
        let error = clustered_error(&[1.0, 3.0, 5.0], &[0, 1, 2]).unwrap();
        assert!((error - 2.0 / 3f64.sqrt()).abs() < 1e-12);
        // Copies of the same three samples know no more: sums ±4 and 0, √(32 · 3/2) / 6.
        let doubled = clustered_error(&[1.0, 1.0, 3.0, 3.0, 5.0, 5.0], &[0, 0, 1, 1, 2, 2]);
        assert!((doubled.unwrap() - error).abs() < 1e-12);
        assert_eq!(clustered_error(&[1.0, 2.0], &[4, 4]), None);
    }

    #[test]
    fn mean_std_and_score_by_hand() {
        let values = [2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0];
        // Sum 40; squares of the differences 9 1 1 1 0 0 4 16 = 32, over 8 = 4.
        assert_eq!(mean(&values), 5.0);
        assert_eq!(std(&values), 2.0);
        assert_eq!(score(&values), 4.0);
        assert!(mean(&[]).is_nan() && std(&[]).is_nan());
    }

    #[test]
    fn wilson_matches_scipy() {
        // scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
        let z = 1.959_963_984_540_054;
        for (k, n, low, high) in [
            (8, 10, 0.490_162_471_536_641_8, 0.943_317_848_545_624_8),
            (150, 150, 0.975_029_755_631_923_4, 1.0),
            (0, 20, 0.0, 0.161_125_158_052_819_35),
        ] {
            let interval = wilson(k, n, z);
            close(interval.low, low, 1e-12);
            close(interval.high, high, 1e-12);
        }
        assert_eq!(wilson(8, 10, z).estimate, 0.8);
        assert_eq!((wilson(0, 0, z).low, wilson(0, 0, z).high), (0.0, 1.0));
    }

    #[test]
    fn correlations_match_scipy() {
        let x = [1.0, 2.0, 3.0, 4.0, 5.0, 5.5];
        let y = [2.0, 1.0, 4.0, 3.0, 7.0, 7.0];
        close(pearson(&x, &y), 0.883_931_907_127_668, 1e-12);
        let x = [1.0, 2.0, 2.0, 4.0, 5.0, 5.0];
        let y = [3.0, 1.0, 4.0, 4.0, 9.0, 7.0];
        close(spearman(&x, &y), 0.850_841_043_487_808_2, 1e-12);
        assert!(pearson(&[1.0, 1.0], &[1.0, 2.0]).is_nan());
    }

    #[test]
    fn ranks_share_ties() {
        assert_eq!(ranks(&[10.0, 20.0, 10.0, 5.0]), [2.5, 4.0, 2.5, 1.0]);
        assert_eq!(ranks(&[7.0, 7.0, 7.0]), [2.0, 2.0, 2.0]);
    }

    #[test]
    fn calibration_error_by_hand() {
        // Two bins. [0, ½): 0.2 and 0.4, one of them true: |0.6 − 1| = 0.4.
        // [½, 1]: 0.5, 0.9 and 1, two of them true: |2.4 − 2| = 0.4. Together 0.8 over 5.
        let p = [0.2, 0.4, 0.5, 0.9, 1.0];
        let outcomes = [false, true, false, true, true];
        close(expected_calibration_error(&p, &outcomes, 2), 0.16, 1e-12);
        close(expected_calibration_error(&[0.0, 1.0], &[false, true], 10), 0.0, 0.0);
        close(expected_calibration_error(&[0.0, 1.0], &[true, false], 10), 1.0, 0.0);
    }

    #[test]
    fn sign_test_matches_scipy() {
        // 8 of 10 by hand: 2 · (1 + 10 + 45) / 1024 = 0.109375.
        close(sign_test(8, 2), 0.109_375, 1e-12);
        close(sign_test(2, 8), 0.109_375, 1e-12);
        // scipy.stats.binomtest(k, n, 0.5).pvalue
        close(sign_test(520, 480), 0.217_448_293_204_141_2, 1e-9);
        close(sign_test(900, 1100), 8.457_089_535_503_81e-6, 1e-12);
        assert_eq!(sign_test(5, 5), 1.0);
        assert_eq!(sign_test(0, 0), 1.0);
    }

    #[test]
    fn normal_quantiles_match_scipy() {
        for (p, expected) in [
            (1e-6, -4.753_424_308_822_899),
            (0.001, -3.090_232_306_167_813),
            (0.02, -2.053_748_910_631_823),
            (0.5, 0.0),
            (0.8, 0.841_621_233_572_914_3),
            (0.9, 1.281_551_565_544_600_4),
            (0.975, 1.959_963_984_540_054),
            (0.999_999, 4.753_424_308_817_087),
        ] {
            close(normal_quantile(p), expected, 6e-9);
        }
    }

    #[test]
    fn minimum_detectable_effect_of_the_textbook() {
        // (1.95996 + 0.84162) · 0.1 at 5 % and power 80 %.
        close(minimum_detectable_effect(0.1, 0.05, 0.8), 0.280_158_5, 1e-6);
    }

    #[test]
    fn fleiss_kappa_of_his_own_example() {
        // Fleiss 1971, as worked on Wikipedia: 10 subjects, 14 raters, 5 categories: 0.210.
        let counts = [
            [0, 0, 0, 0, 14],
            [0, 2, 6, 4, 2],
            [0, 0, 3, 5, 6],
            [0, 3, 9, 2, 0],
            [2, 2, 8, 1, 1],
            [7, 7, 0, 0, 0],
            [3, 2, 6, 3, 0],
            [2, 5, 3, 2, 2],
            [6, 5, 2, 1, 0],
            [0, 2, 2, 3, 7],
        ];
        close(fleiss_kappa(&counts.map(|row| row.to_vec())), 0.210, 5e-4);
        assert_eq!(fleiss_kappa(&[vec![3, 0], vec![0, 3]]), 1.0);
    }

    #[test]
    fn quantiles_interpolate() {
        let sorted = [1.0, 2.0, 4.0, 8.0];
        assert_eq!(quantile(&sorted, 0.0), 1.0);
        assert_eq!(quantile(&sorted, 0.5), 3.0); // position 1.5
        assert_eq!(quantile(&sorted, 1.0), 8.0);
        assert_eq!(quantile(&[3.0], 0.7), 3.0);
    }

    /// 200 clusters of one value with mean 0 and known spread: the classic case.
    fn ones() -> Vec<Vec<f64>> {
        (0..200).map(|i| vec![if i % 2 == 0 { 1.0 } else { -1.0 }]).collect()
    }

    #[test]
    fn bootstrap_of_a_mean_has_the_textbook_standard_error() {
        // Standard deviation 1 over √200 = 0.0707; 95 % interval ± 1.96 of that.
        let outcome = bootstrap(&ones(), mean, Resampling::seeded(7));
        assert_eq!(outcome.interval.estimate, 0.0);
        close(outcome.standard_error, 0.070_71, 0.003);
        close(outcome.interval.high, 0.1386, 0.012);
        close(outcome.interval.low, -0.1386, 0.012);
    }

    #[test]
    fn one_prompt_has_no_standard_error() {
        let outcome = bootstrap(&[vec![0.1, 0.7, 0.3]], mean, Resampling::seeded(7));
        assert_eq!(outcome.standard_error, 0.0);
    }

    #[test]
    fn values_of_a_prompt_are_drawn_together() {
        // Each value three times in its cluster: as uncertain as once. Drawn one by one, the error
        // would be smaller by √3.
        let tripled: Vec<Vec<f64>> = ones().iter().map(|cluster| cluster.repeat(3)).collect();
        let once = bootstrap(&ones(), mean, Resampling::seeded(7));
        let thrice = bootstrap(&tripled, mean, Resampling::seeded(7));
        close(thrice.standard_error, once.standard_error, 1e-12);
    }

    #[test]
    fn a_constant_shift_is_certain_when_paired() {
        let first: Vec<Vec<f64>> = (0..50).map(|i| vec![f64::from(i), 0.5]).collect();
        let last: Vec<Vec<f64>> =
            first.iter().map(|cluster| cluster.iter().map(|x| x + 0.25).collect()).collect();
        // A shift moves the mean and leaves the spread: the Score's difference is the shift.
        let Bootstrap { interval, standard_error } =
            paired_difference_of(&first, &last, score, Resampling::seeded(1));
        for value in [interval.estimate, interval.low, interval.high] {
            close(value, 0.25, 1e-9);
        }
        close(standard_error, 0.0, 1e-9);
    }

    #[test]
    fn draws_depend_on_the_seed_alone() {
        let draw = |seed| bootstrap(&ones(), score, Resampling { draws: 200, level: 0.9, seed });
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn the_paired_difference_turns_its_sign(values in proptest::collection::vec((-9.0..9.0f64, -9.0..9.0f64), 1..20)) {
            let (a, b): (Vec<_>, Vec<_>) = values.iter().map(|(a, b)| (vec![*a], vec![*b])).unzip();
            let resampling = Resampling { draws: 100, level: 0.9, seed: 5 };
            let forth = paired_difference_of(&a, &b, score, resampling).interval;
            let back = paired_difference_of(&b, &a, score, resampling).interval;
            prop_assert!((forth.estimate + back.estimate).abs() < 1e-9);
            prop_assert!((forth.low + back.high).abs() < 1e-9);
            prop_assert!((forth.high + back.low).abs() < 1e-9);
        }

        #[test]
        fn indices_stay_below(n in 1usize..1000, seed: u64) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            prop_assert!((0..100).all(|_| below(&mut rng, n) < n));
        }
    }
}
