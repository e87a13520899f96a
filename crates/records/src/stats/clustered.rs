//! Means of values that come in groups, and of groups that share nothing.

use std::collections::BTreeMap;

use super::crossed::{ALPHA, around, count, variance};
use super::{Interval, mean};

/// The mean of values in clusters (pairs about one question, say) with its 95 % interval: values of a cluster may depend on
/// one another, clusters do not. None without two clusters.
///
/// # Source
///
/// Liang & Zeger 1986: least squares on a constant with cluster-robust errors, the factor G / (G − 1) and t with G − 1 degrees of
/// freedom, as statsmodels has them (`cov_type="cluster"`, `use_t=True`).
pub fn clustered_mean<K: Ord>(values: impl IntoIterator<Item = (K, f64)>) -> Option<Interval> {
    let mut clusters: BTreeMap<K, Vec<f64>> = BTreeMap::new();
    for (cluster, value) in values {
        clusters.entry(cluster).or_default().push(value);
    }
    let n: usize = clusters.values().map(Vec::len).sum();
    let n_clusters = clusters.len();
    if n_clusters < 2 {
        return None;
    }
    let estimate = clusters.values().flatten().sum::<f64>() / count(n);
    let squares: f64 = clusters
        .values()
        .map(|own| own.iter().map(|value| value - estimate).sum::<f64>().powi(2))
        .sum();
    let variance = squares / count(n).powi(2) * count(n_clusters) / count(n_clusters - 1);
    Some(around(estimate, variance.sqrt(), count(n_clusters - 1), ALPHA))
}

/// A mean of groups with its error.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MeanOfRuns {
    /// The estimate and its 95 % interval.
    pub interval: Interval,
    /// Standard error of the estimate.
    pub standard_error: f64,
    /// Degrees of freedom of the t distribution.
    pub degrees: f64,
}

impl MeanOfRuns {
    fn new(estimate: f64, variance: f64, degrees: f64) -> Self {
        let standard_error = variance.sqrt();
        let interval = around(estimate, standard_error, degrees, ALPHA);
        Self { interval, standard_error, degrees }
    }

    /// As [`super::CrossedMean::corrected`].
    ///
    /// # Panics
    ///
    /// If `n_looks` is 0.
    #[must_use]
    pub fn corrected(&self, n_looks: usize) -> Interval {
        assert!(n_looks > 0, "at least one look");
        around(self.interval.estimate, self.standard_error, self.degrees, ALPHA / count(n_looks))
    }
}

/// The mean over runs that answered prompts of their own, one number a run: Student's t. None of fewer than two runs.
pub fn mean_of_runs(runs: &[f64]) -> Option<MeanOfRuns> {
    (runs.len() > 1).then(|| {
        let n = count(runs.len());
        MeanOfRuns::new(mean(runs), variance(runs) / n, n - 1.0)
    })
}

/// The mean of `last` minus that of `first`, one number a run, no prompts in common: Welch's t. None of fewer than two runs
/// on a side.
///
/// # Source
///
/// Welch 1947, degrees of freedom by Satterthwaite, as `scipy.stats.ttest_ind(equal_var=False)`.
pub fn difference_of_runs(first: &[f64], last: &[f64]) -> Option<MeanOfRuns> {
    if first.len() < 2 || last.len() < 2 {
        return None;
    }
    let parts = [first, last].map(|runs| variance(runs) / count(runs.len()));
    let of_mean = parts[0] + parts[1];
    let share = |part: f64, runs: &[f64]| part * part / count(runs.len() - 1);
    let shares = share(parts[0], first) + share(parts[1], last);
    let degrees =
        if shares > 0.0 { of_mean * of_mean / shares } else { count(first.len() + last.len() - 2) };
    Some(MeanOfRuns::new(mean(last) - mean(first), of_mean, degrees))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_of_one_value_are_a_t_interval() {
        // 1, 2, 6: sd √7, n = 3, t = 4.302653.
        let found = clustered_mean([("a", 1.0), ("b", 2.0), ("c", 6.0)]).unwrap();
        assert_eq!(found.estimate, 3.0);
        assert!((found.high - 3.0 - 4.302_653 * (7.0_f64 / 3.0).sqrt()).abs() < 1e-5);
        assert!(clustered_mean([("a", 1.0), ("a", 2.0)]).is_none());
        assert!(
            mean_of_runs(&[1.0]).is_none() && difference_of_runs(&[1.0], &[1.0, 2.0]).is_none()
        );
    }
}
