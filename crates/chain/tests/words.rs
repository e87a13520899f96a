//! The bag of words against scikit-learn (`scripts/goldens/statistics.py`).

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use arete_chain::words::BagOfWords;
use serde_json::Value;

fn pairs(value: &Value) -> Vec<[String; 2]> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn margins_of_held_out_pairs_are_those_of_scikit_learn() {
    let golden: Value = serde_json::from_str(include_str!("data/words.json")).unwrap();
    let judge = BagOfWords::train(&pairs(&golden["train"]));
    let held_out = pairs(&golden["held_out"]);
    let margins: Vec<f64> = serde_json::from_value(golden["margins"].clone()).unwrap();
    assert_eq!(held_out.len(), margins.len());
    for ([better, worse], expected) in held_out.iter().zip(margins) {
        let margin = judge.score(better) - judge.score(worse);
        assert!((margin - expected).abs() < 1e-6, "{better}: {margin}, expected {expected}");
    }
    // Standardising moves no order, and gives the texts it is by mean 0 and deviation 1.
    let texts = || held_out.iter().flatten().map(String::as_str);
    let judge = judge.standardised_by(texts());
    let scores: Vec<f64> = texts().map(|text| judge.score(text)).collect();
    assert!(arete_records::stats::mean(&scores).abs() < 1e-9);
    assert!((arete_records::stats::std(&scores) - 1.0).abs() < 1e-9);
    let dir = tempfile::tempdir().unwrap();
    judge.write(dir.path()).unwrap();
    assert_eq!(BagOfWords::read(dir.path()).unwrap().unwrap(), judge);
}
