//! The first five steps of TRL's `DPOTrainer` on the same pairs and adapter (`scripts/goldens/dpo.py`), in f32, once a loss.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

#[path = "../../training/tests/support/trl.rs"]
mod support;

use arete_chain::pairs;
use arete_dpo::config::{Label, LossType, OverLength};
use arete_dpo::data::{self, Pair, Pairs, Rendering};
use arete_dpo::loss::LossSettings;
use arete_dpo::model::pair_logprobs;
use arete_dpo::objective::DirectPreference;
use arete_model::{Adapter, Device, Model, adapter};
use arete_training::{AdamW, AdamWConfig, Objective, Passes, Schedule, ScheduleKind};
use serde_json::Value;
use support::{golden, here, relative_difference, tiny_chat};

const N_STEPS: usize = 5;

fn tokenized(model: &Model) -> Vec<Pair> {
    let path = here("tests/goldens/pairs.jsonl");
    let rows = pairs::read(&path).unwrap();
    let rendering =
        Rendering { max_length: 1024, over_length: OverLength::Drop, label: Label::Hard };
    let mut out = Pairs::default();
    data::tokenize(&mut out, &path, &rows, 0, &model.chat().unwrap(), &rendering).unwrap();
    out.pairs
}

fn adapter(model: &Model) -> Adapter {
    let path = here("tests/goldens/adapter");
    let mut adapter = adapter::load(&path, "dpo", &model.config, Device::Cpu).unwrap().adapter;
    adapter.set_trainable(true);
    adapter
}

fn assert_close(what: &str, ours: f64, theirs: f64) {
    // A reward near 0 is a difference of log-probabilities near 50 nats, times beta.
    let scale = theirs.abs().max(0.1);
    assert!((ours - theirs).abs() <= 2e-4 * scale, "{what}: {ours}, TRL {theirs}");
}

#[test]
fn tokens_and_what_counts_are_those_of_trl() {
    let model = tiny_chat();
    let (json, _) = golden();
    let pairs = tokenized(&model);
    assert_eq!(pairs.len(), 4);
    for (ours, theirs) in pairs.iter().zip(json["rows"].as_array().unwrap()) {
        let ids = |key: &str| -> Vec<i64> { serde_json::from_value(theirs[key].clone()).unwrap() };
        let prompt = ids("prompt_ids");
        for (side, key) in [(&ours.chosen, "chosen_ids"), (&ours.rejected, "rejected_ids")] {
            assert_eq!(side.token_ids, [prompt.clone(), ids(key)].concat());
            assert_eq!(side.counted, (prompt.len()..side.token_ids.len()).collect::<Vec<_>>());
        }
        assert_eq!(ours.n_shared, prompt.len());
    }
}

fn loss_settings(name: &str, theirs: &Value) -> LossSettings {
    let beta = theirs["beta"].as_f64().unwrap();
    let (loss_type, label_smoothing) = match name {
        "sigmoid" => (LossType::Sigmoid, 0.0),
        "ipo" => (LossType::Ipo, 0.0),
        "sigmoid_norm" => (LossType::SigmoidNorm, 0.0),
        "smoothed" => (LossType::Sigmoid, theirs["label_smoothing"].as_f64().unwrap()),
        other => panic!("{other} is none of the goldens'"),
    };
    LossSettings { loss_type, beta, label_smoothing }
}

#[test]
fn losses_metrics_gradients_and_weights_are_those_of_trl() {
    let model = tiny_chat();
    let (json, tensors) = golden();
    let shared = tokenized(&model);
    let apart: Vec<Pair> = shared.iter().map(|pair| Pair { n_shared: 0, ..pair.clone() }).collect();
    let losses = json["losses"].as_object().unwrap();
    assert_eq!(losses.len(), 4);
    for (name, theirs) in losses {
        let settings = loss_settings(name, &theirs["settings"]);
        let mut ways = vec![(&shared, 4096, false)];
        if name == "sigmoid" {
            // Steps in several forward passes, blocks run again for the backward pass, prompts computed twice: all the same.
            ways.extend([(&shared, 90, false), (&shared, 90, true), (&apart, 4096, false)]);
        }
        for (pairs, micro_batch_tokens, recompute) in ways {
            let adapter = adapter(&model);
            let mut optimiser = AdamW::new(adapter.parameters(), AdamWConfig::default()).unwrap();
            let mut objective = DirectPreference::new(
                &model.decoder,
                &adapter,
                (pairs, pairs),
                settings,
                Passes::new(micro_batch_tokens, recompute),
            );
            let schedule = Schedule::new(ScheduleKind::Linear, 5e-3, 0.0, N_STEPS as u64).unwrap();
            let mut num_tokens = 0.0;
            for (step, line) in theirs["steps"].as_array().unwrap().iter().enumerate() {
                let theirs = |key: &str| line[key].as_f64().unwrap();
                let evaluated = objective.evaluate().unwrap().unwrap();
                let report = objective.accumulate_all(&[0, 1, 2, 3], 1.0).unwrap();
                num_tokens += report.n_tokens as f64;
                let at = |what: &str| format!("{name}, step {step}: {what}");
                assert_close(&at("loss"), report.loss, theirs("loss"));
                assert_close(&at("eval_loss"), evaluated.loss, theirs("loss"));
                assert_eq!(num_tokens, theirs("num_tokens"));
                assert_eq!(report.metrics.len(), evaluated.metrics.len() + 1);
                for (found, evaluated) in report.metrics.iter().zip(&evaluated.metrics) {
                    assert_close(&at(found.0), found.1, theirs(found.0));
                    assert_close(&at(found.0), evaluated.1, found.1);
                }
                let norm = optimiser.gradient_norm(1).unwrap();
                assert_close(&at("grad_norm"), norm, theirs("grad_norm"));
                if step == 0 {
                    // TRL's were kept after clipping.
                    let clipped = (1.0 / (norm + 1e-6)).min(1.0);
                    for (parameter, leaf) in optimiser.parameters() {
                        let theirs = &tensors[&format!("{name}.grad.{parameter}")];
                        let difference = relative_difference(&(leaf.grad() * clipped), theirs);
                        assert!(difference < 1e-4, "{name}: gradient of {parameter}: {difference}");
                    }
                }
                optimiser.step(schedule.learning_rate(step as u64), Some(1.0), 1).unwrap();
            }
            if name == "sigmoid" {
                for (parameter, leaf) in optimiser.parameters() {
                    let theirs = &tensors[&format!("sigmoid.final.{parameter}")];
                    let difference = relative_difference(&leaf.detach(), theirs);
                    assert!(difference < 1e-4, "{parameter} after {N_STEPS} steps: {difference}");
                }
            }
        }
    }
}

#[test]
fn a_log_probability_does_not_depend_on_its_neighbours() {
    let model = tiny_chat();
    let pairs = tokenized(&model);
    let refs: Vec<&Pair> = pairs.iter().collect();
    let together = pair_logprobs(&model.decoder, None, &refs, 4096).unwrap();
    let alone = pair_logprobs(&model.decoder, None, &refs, 1).unwrap();
    assert_eq!(together, alone);
}
