//! Intervals against statsmodels and scipy (`scripts/goldens/statistics.py`).

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

use arete_records::stats::{
    Interval, PairedReplies, at_equal_length, clustered_mean, difference_of_runs, mean_of_runs,
    win_rate_at_equal_length,
};
use serde_json::Value;

fn golden() -> Value {
    serde_json::from_str(include_str!("data/statistics.json")).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

#[track_caller]
fn same(found: Interval, expected: &Value) {
    let found = [found.estimate, found.low, found.high];
    for (found, expected) in found.into_iter().zip(numbers(expected)) {
        assert!((found - expected).abs() < 1e-6, "{found}, expected {expected}");
    }
}

fn pairs(golden: &Value) -> Vec<PairedReplies> {
    let rows = golden["pairs"].as_array().unwrap().iter().map(numbers);
    rows.map(|row| PairedReplies { score: row[0], tokens: row[1], cut: row[2] }).collect()
}

#[test]
fn means_of_clusters_and_of_runs_are_those_of_others() {
    let golden = golden();
    let clustered = &golden["clustered"];
    let clusters = numbers(&clustered["clusters"]).into_iter().map(|cluster| cluster as u64);
    let found = clustered_mean(clusters.zip(numbers(&clustered["values"]))).unwrap();
    same(found, &clustered["interval"]);
    let welch = &golden["welch"];
    let found = difference_of_runs(&numbers(&welch["first"]), &numbers(&welch["last"])).unwrap();
    same(found.interval, &welch["interval"]);
    let mean = &golden["mean"];
    same(mean_of_runs(&numbers(&mean["values"])).unwrap().interval, &mean["interval"]);
}

#[test]
fn what_is_left_at_equal_length_is_that_of_statsmodels() {
    let golden = golden();
    let pairs = pairs(&golden);
    same(at_equal_length(std::slice::from_ref(&pairs)).unwrap().interval, &golden["linear"]);
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let expected: Vec<f64> = numbers(&golden["logit"]).into_iter().map(sigmoid).collect();
    same(win_rate_at_equal_length(&[pairs]).unwrap(), &expected.into());
}

#[test]
fn several_looks_widen_the_interval_by_bonferroni() {
    // Student's t of 2 degrees: 4.302653 for 95 %, 7.648804 (scipy.stats.t.ppf(1 - 0.025 / 3, 2)) for three looks together.
    let found = mean_of_runs(&[1.0, 2.0, 6.0]).unwrap();
    let error = (7.0_f64 / 3.0).sqrt();
    assert!((found.interval.high - 3.0 - 4.302_653 * error).abs() < 1e-5);
    assert!((found.corrected(3).high - 3.0 - 7.648_804 * error).abs() < 1e-4);
    assert_eq!(found.corrected(1), found.interval);
}
