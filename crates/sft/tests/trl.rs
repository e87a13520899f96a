//! The first five steps of TRL's `SFTTrainer` on the same data and adapter (`scripts/goldens/training.py`), in f32.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

#[path = "../../training/tests/support/trl.rs"]
mod support;

use arete_model::{Adapter, Device, Model, adapter};
use arete_records::Split;
use arete_sft::config::OverLength;
use arete_sft::data::{self, Example};
use arete_sft::objective::CrossEntropy;
use arete_training::{AdamW, AdamWConfig, Objective, Passes, Schedule, ScheduleKind};
use support::{golden, here, relative_difference, tiny_chat};

const N_STEPS: usize = 5;

fn examples(model: &Model) -> Vec<Example> {
    let path = here("tests/goldens/data.jsonl");
    let rows = data::read(&path, &[]).unwrap().0;
    let chat = model.chat().unwrap();
    let over_length = OverLength::TruncateRight;
    data::tokenize(&path, &rows, Split::Train, &chat, 1024, over_length).unwrap().examples
}

fn adapter(model: &Model) -> Adapter {
    let path = here("tests/goldens/adapter");
    let mut adapter = adapter::load(&path, "sft", &model.config, Device::Cpu).unwrap().adapter;
    adapter.set_trainable(true);
    adapter
}

fn assert_close(what: &str, ours: f64, theirs: f64) {
    assert!((ours - theirs).abs() <= 1e-4 * theirs.abs(), "{what}: {ours}, TRL {theirs}");
}

#[test]
fn tokens_and_targets_are_those_of_trl() {
    let model = tiny_chat();
    let (json, _) = golden();
    let examples = examples(&model);
    assert_eq!(examples.len(), 4);
    for (ours, theirs) in examples.iter().zip(json["rows"].as_array().unwrap()) {
        let ids: Vec<i64> = serde_json::from_value(theirs["token_ids"].clone()).unwrap();
        let mask: Vec<u8> = serde_json::from_value(theirs["assistant_mask"].clone()).unwrap();
        assert_eq!(ours.token_ids, ids);
        assert_eq!(ours.target, mask.iter().map(|&bit| bit == 1).collect::<Vec<_>>());
    }
}

#[test]
fn losses_gradients_and_weights_are_those_of_trl() {
    let model = tiny_chat();
    let (json, tensors) = golden();
    let examples = examples(&model);
    // Whole steps, steps in several forward passes, and blocks run again for the backward pass: all the same.
    for (micro_batch_tokens, recompute) in [(4096, false), (70, false), (4096, true), (70, true)] {
        let adapter = adapter(&model);
        let mut optimiser = AdamW::new(adapter.parameters(), AdamWConfig::default()).unwrap();
        let mut objective = CrossEntropy {
            decoder: &model.decoder,
            adapter: &adapter,
            train: &examples,
            validation: &[],
            passes: Passes::new(micro_batch_tokens, recompute),
        };
        let schedule = Schedule::new(ScheduleKind::Linear, 5e-3, 0.0, N_STEPS as u64).unwrap();
        let mut num_tokens = 0.0;
        for step in 0..N_STEPS {
            let theirs = |key: &str| json["steps"][step][key].as_f64().unwrap();
            let report = objective.accumulate_all(&[0, 1, 2, 3], 1.0).unwrap();
            num_tokens += report.n_tokens as f64;
            assert_close("loss", report.loss, theirs("loss"));
            assert_eq!(num_tokens, theirs("num_tokens"));
            let norm = optimiser.gradient_norm(1).unwrap();
            assert_close("grad_norm", norm, theirs("grad_norm"));
            if step == 0 {
                // TRL's were kept after clipping.
                let clipped = (1.0 / (norm + 1e-6)).min(1.0);
                for (name, leaf) in optimiser.parameters() {
                    let theirs = &tensors[&format!("grad.{name}")];
                    let difference = relative_difference(&(leaf.grad() * clipped), theirs);
                    assert!(difference < 1e-4, "gradient of {name}: {difference}");
                }
            }
            let rate = schedule.learning_rate(step as u64);
            assert_close("learning_rate", rate, theirs("learning_rate"));
            optimiser.step(rate, Some(1.0), 1).unwrap();
        }
        for (name, leaf) in optimiser.parameters() {
            let difference =
                relative_difference(&leaf.detach(), &tensors[&format!("final.{name}")]);
            assert!(difference < 1e-4, "{name} after {N_STEPS} steps: {difference}");
        }
    }
}

#[test]
fn training_and_evaluation_report_the_same_numbers() {
    let model = tiny_chat();
    let examples = examples(&model);
    let adapter = adapter(&model);
    let mut objective = CrossEntropy {
        decoder: &model.decoder,
        adapter: &adapter,
        train: &examples,
        validation: &examples,
        passes: Passes::new(50, false),
    };
    let train = objective.accumulate_all(&[0, 1, 2, 3], 1.0).unwrap();
    let evaluated = objective.evaluate().unwrap().unwrap();
    assert!((train.loss - evaluated.loss).abs() < 1e-5);
    for (a, b) in train.metrics.iter().zip(&evaluated.metrics) {
        assert_eq!(a.0, b.0);
        assert!((a.1 - b.1).abs() < 1e-5, "{a:?} {b:?}");
    }
}
