//! QLoRA: over a base packed to NF4, fifty steps lose what they lose over the same values held dense.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

use std::path::{Path, PathBuf};

use arete_model::{
    Adapter, Device, Kind, LoadOptions, LoraConfig, Model, Nf4Options, ScalarHead, Source, Target,
    adapter::merge,
};
use arete_reward::config::{Label, OverLength};
use arete_reward::data::{self, Rendering};
use arete_reward::objective::BradleyTerry;
use arete_training::{AdamW, AdamWConfig, Objective, Passes};

const N_STEPS: u64 = 50;

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The losses of [`N_STEPS`] steps on the pairs of the goldens.
fn losses(source: PathBuf, nf4: Option<Nf4Options>) -> Vec<f64> {
    let options = LoadOptions { device: Device::Cpu, dtype: Kind::Float, nf4 };
    let model = Model::load(&Source::Directory(source), &options).unwrap();
    assert_eq!(model.decoder.quantization().is_some(), nf4.is_some());
    let path = here("tests/goldens/pairs.jsonl");
    let (rows, _) = data::read_pairs(&path, &[]).unwrap();
    let rendering = Rendering {
        max_length: 1024,
        over_length: OverLength::Drop,
        label: Label::Hard,
        margin_per_vote: 0.0,
    };
    let pairs = data::tokenize(&path, &rows, &model.chat().unwrap(), &rendering).unwrap().pairs;
    let lora = LoraConfig { rank: 4, alpha: 8.0, targets: Target::ALL.to_vec() };
    let mut adapter = Adapter::new("rm", &model.config, &lora, 1, Device::Cpu).unwrap();
    let mut head = ScalarHead::normal(model.config.hidden_size, 1, Device::Cpu);
    adapter.set_trainable(true);
    head.set_trainable(true);
    let mut parameters = adapter.parameters();
    parameters.push(("score".to_owned(), head.weight.shallow_clone()));
    let mut optimiser = AdamW::new(parameters, AdamWConfig::default()).unwrap();
    let mut objective = BradleyTerry {
        decoder: &model.decoder,
        adapter: &adapter,
        head: &head,
        train: &pairs,
        validation: &[],
        center: 0.01,
        passes: Passes::new(4096, false),
        evaluated: None,
    };
    let step = |step: u64| {
        let loss = objective.accumulate_all(&[0, 1, 2, 3], 1.0).unwrap().loss;
        optimiser.step(1e-3, Some(1.0), step).unwrap();
        loss
    };
    (1..=N_STEPS).map(step).collect()
}

#[test]
fn a_packed_base_trains_as_its_dense_twin() {
    let base = here("../../tests/fixtures/tiny-chat");
    for double_quantize in [false, true] {
        let packing = Nf4Options { double_quantize, ..Nf4Options::default() };
        let dir = tempfile::tempdir().unwrap();
        let twin = dir.path().join("twin");
        let source = Source::Directory(base.clone());
        let nothing = serde_json::Map::new();
        merge::write_model(&source, None, None, &twin, Kind::Float, Some(packing), nothing)
            .unwrap();
        let (packed, dense) = (losses(base.clone(), Some(packing)), losses(twin, None));
        assert!(dense[49] < 0.5 * dense[0], "there is something to learn: {dense:?}");
        for (step, (packed, dense)) in packed.iter().zip(&dense).enumerate() {
            assert!((packed - dense).abs() <= 0.01 * dense, "step {step}: {packed}, {dense}");
        }
        // Rounding to four bits is not nothing, or the comparison would say nothing.
        let unrounded = losses(base.clone(), None);
        assert!(unrounded.iter().zip(&dense).any(|(a, b)| (a - b).abs() > 1e-3 * b));
    }
}
