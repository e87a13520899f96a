//! Reward models made by peft and transformers give the same scores here (`scripts/goldens/peft_adapters.py`).

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

use std::path::{Path, PathBuf};

use arete_chain::RewardModel;
use arete_model::{Device, Kind, LoadOptions, Source, Tensor};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/goldens").join(name)
}

/// Largest difference between our scores and those in the golden file beside `theirs`.
fn largest_difference(source: &str, adapter: Option<&str>, theirs: &str, budget: usize) -> f64 {
    let options = LoadOptions { device: Device::Cpu, dtype: Kind::Float, nf4: None };
    let source = Source::Directory(golden(source));
    let adapter = adapter.map(golden);
    let (model, reward) = RewardModel::load(&source, adapter.as_deref(), &options).unwrap();
    let tensors = Tensor::read_safetensors(golden(theirs).join("golden.safetensors")).unwrap();
    let tensor = |name: &str| &tensors.iter().find(|(found, _)| found == name).unwrap().1;
    let ids = |i: usize| Vec::<i64>::try_from(tensor(&format!("ids.{i}")).view([-1])).unwrap();
    let sequences: Vec<Vec<i64>> = (0..3).map(ids).collect();
    let ours = reward.sequence_scores(&model, &sequences, budget).unwrap();
    let theirs = Vec::<f64>::try_from(tensor("scores").to_kind(Kind::Double).view([-1])).unwrap();
    assert_eq!(theirs.len(), 3);
    ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn an_adapter_of_peft_scores_as_there() {
    for budget in [1, 4096] {
        let difference =
            largest_difference("llama_untied", Some("peft/reward"), "peft/reward", budget);
        assert!(difference <= 1e-4, "{difference}");
    }
}

#[test]
fn a_merged_model_of_transformers_scores_as_there() {
    for budget in [1, 4096] {
        let difference = largest_difference("peft/merged", None, "peft/merged", budget);
        assert!(difference <= 1e-4, "{difference}");
    }
}
