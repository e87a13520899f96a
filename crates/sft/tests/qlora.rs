//! QLoRA: over a base packed to NF4, fifty steps lose what they lose over the same values held dense.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

use std::path::{Path, PathBuf};

use arete_model::{
    Adapter, Device, Kind, LoadOptions, LoraConfig, Model, Nf4Options, Source, Target,
    adapter::merge,
};
use arete_records::Split;
use arete_sft::config::OverLength;
use arete_sft::data;
use arete_sft::objective::CrossEntropy;
use arete_training::{AdamW, AdamWConfig, Objective, Passes};

const N_STEPS: u64 = 50;

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The losses of [`N_STEPS`] steps on the conversations of the goldens.
fn losses(source: PathBuf, nf4: Option<Nf4Options>, recompute: bool) -> Vec<f64> {
    let options = LoadOptions { device: Device::Cpu, dtype: Kind::Float, nf4 };
    let model = Model::load(&Source::Directory(source), &options).unwrap();
    assert_eq!(model.decoder.quantization().is_some(), nf4.is_some());
    let path = here("tests/goldens/data.jsonl");
    let (rows, chat) = (data::read(&path, &[]).unwrap().0, model.chat().unwrap());
    let over_length = OverLength::Drop;
    let examples =
        data::tokenize(&path, &rows, Split::Train, &chat, 1024, over_length).unwrap().examples;
    let lora = LoraConfig { rank: 4, alpha: 8.0, targets: Target::ALL.to_vec() };
    let mut adapter = Adapter::new("sft", &model.config, &lora, 1, Device::Cpu).unwrap();
    adapter.set_trainable(true);
    let mut optimiser = AdamW::new(adapter.parameters(), AdamWConfig::default()).unwrap();
    let mut objective = CrossEntropy {
        decoder: &model.decoder,
        adapter: &adapter,
        train: &examples,
        validation: &[],
        passes: Passes::new(4096, recompute),
    };
    let all: Vec<usize> = (0..examples.len()).collect();
    let step = |step: u64| {
        let loss = objective.accumulate_all(&all, 1.0).unwrap().loss;
        optimiser.step(2e-3, Some(1.0), step).unwrap();
        loss
    };
    (1..=N_STEPS).map(step).collect()
}

#[test]
fn a_packed_base_trains_as_its_dense_twin() {
    let base = here("../../tests/fixtures/tiny-chat");
    for (double_quantize, recompute) in [(false, false), (true, true)] {
        let packing = Nf4Options { double_quantize, ..Nf4Options::default() };
        let dir = tempfile::tempdir().unwrap();
        let twin = dir.path().join("twin");
        let source = Source::Directory(base.clone());
        let nothing = serde_json::Map::new();
        merge::write_model(&source, None, None, &twin, Kind::Float, Some(packing), nothing)
            .unwrap();
        let packed = losses(base.clone(), Some(packing), recompute);
        let dense = losses(twin, None, false);
        assert!(dense[49] < 0.8 * dense[0], "there is something to learn: {dense:?}");
        for (step, (packed, dense)) in packed.iter().zip(&dense).enumerate() {
            assert!((packed - dense).abs() <= 0.01 * dense, "step {step}: {packed}, {dense}");
        }
        // Rounding to four bits is not nothing, or the comparison would say nothing.
        let unrounded = losses(base.clone(), None, false);
        assert!(unrounded.iter().zip(&dense).any(|(a, b)| (a - b).abs() > 1e-3 * b));
    }
}
