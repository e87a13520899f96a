//! The first five steps of TRL's `RewardTrainer` on the same pairs and adapter (`scripts/goldens/training.py`), in f32.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

#[path = "../../training/tests/support/trl.rs"]
mod support;

use arete_chain::reward_model::sequence_scores;
use arete_model::{Device, Model, adapter};
use arete_reward::config::{Label, OverLength};
use arete_reward::data::{self, Pair, Rendering};
use arete_reward::model::pair_scores;
use arete_reward::objective::BradleyTerry;
use arete_training::{AdamW, AdamWConfig, Objective, Passes, Schedule, ScheduleKind};
use serde_json::Value;
use support::{golden, here, relative_difference, tiny_chat};

const N_STEPS: usize = 5;

/// The pairs of the goldens, with the margins TRL took from its column.
fn pairs(model: &Model) -> Vec<Pair> {
    let path = here("tests/goldens/pairs.jsonl");
    let (rows, left_out) = data::read_pairs(&path, &[]).unwrap();
    assert!(left_out.is_empty());
    let rendering = Rendering {
        max_length: 1024,
        over_length: OverLength::Drop,
        label: Label::Hard,
        margin_per_vote: 0.0,
    };
    let chat = model.chat().unwrap();
    let mut pairs = data::tokenize(&path, &rows, &chat, &rendering).unwrap().pairs;
    let text = fs_err::read_to_string(&path).unwrap();
    for (pair, line) in pairs.iter_mut().zip(text.lines()) {
        let row: Value = serde_json::from_str(line).unwrap();
        pair.margin = row["margin"].as_f64().unwrap() as f32;
    }
    pairs
}

fn assert_close(what: &str, ours: f64, theirs: f64) {
    let scale = theirs.abs().max(0.1); // a mean score near 0 is a difference of larger ones
    assert!((ours - theirs).abs() <= 1e-4 * scale, "{what}: {ours}, TRL {theirs}");
}

#[test]
fn tokens_are_those_of_trl() {
    let model = tiny_chat();
    let (json, _) = golden();
    let pairs = pairs(&model);
    assert_eq!(pairs.len(), 4);
    for (ours, theirs) in pairs.iter().zip(json["rows"].as_array().unwrap()) {
        let ids = |key: &str| -> Vec<i64> { serde_json::from_value(theirs[key].clone()).unwrap() };
        assert_eq!(ours.chosen.token_ids, ids("chosen_ids"));
        assert_eq!(ours.rejected.token_ids, ids("rejected_ids"));
        assert!(ours.n_shared > 4, "the prompt is computed once");
    }
}

#[test]
fn losses_gradients_and_weights_are_those_of_trl() {
    let model = tiny_chat();
    let (json, tensors) = golden();
    let shared = pairs(&model);
    let unshared: Vec<Pair> =
        shared.iter().map(|pair| Pair { n_shared: 0, ..pair.clone() }).collect();
    for (pairs, micro_batch_tokens, recompute) in [
        (&shared, 4096, false),
        (&shared, 90, false),
        (&shared, 90, true),
        (&unshared, 4096, false),
    ] {
        let loaded =
            adapter::load(&here("tests/goldens/adapter"), "rm", &model.config, Device::Cpu)
                .unwrap();
        let (mut adapter, mut head) = (loaded.adapter, loaded.head.unwrap());
        adapter.set_trainable(true);
        head.set_trainable(true);
        let mut parameters = adapter.parameters();
        let name = "base_model.model.score.weight".to_owned();
        parameters.push((name, head.weight.shallow_clone()));
        let mut optimiser = AdamW::new(parameters, AdamWConfig::default()).unwrap();
        let mut objective = BradleyTerry {
            decoder: &model.decoder,
            adapter: &adapter,
            head: &head,
            train: pairs,
            validation: pairs,
            center: 0.01,
            passes: Passes::new(micro_batch_tokens, recompute),
            evaluated: None,
        };
        let schedule = Schedule::new(ScheduleKind::Linear, 5e-3, 0.0, N_STEPS as u64).unwrap();
        let mut num_tokens = 0.0;
        for step in 0..N_STEPS {
            let theirs = |key: &str| json["steps"][step][key].as_f64().unwrap();
            let evaluated = objective.evaluate().unwrap().unwrap();
            let report = objective.accumulate_all(&[0, 1, 2, 3], 1.0).unwrap();
            num_tokens += report.n_tokens as f64;
            assert_close("loss", report.loss, theirs("loss"));
            assert_close("eval_loss", evaluated.loss, theirs("loss"));
            assert_eq!(num_tokens, theirs("num_tokens"));
            for (found, evaluated) in report.metrics.iter().zip(&evaluated.metrics) {
                // TRL averages the extremes of its micro-batches: not the step's extremes.
                if !found.0.starts_with("m") || found.0 == "margin" || found.0 == "mean_reward" {
                    assert_close(found.0, found.1, theirs(found.0));
                }
                assert_close(found.0, evaluated.1, found.1);
            }
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
            optimiser.step(schedule.learning_rate(step as u64), Some(1.0), 1).unwrap();
        }
        for (name, leaf) in optimiser.parameters() {
            let difference =
                relative_difference(&leaf.detach(), &tensors[&format!("final.{name}")]);
            assert!(difference < 1e-4, "{name} after {N_STEPS} steps: {difference}");
        }
    }
}

#[test]
fn a_score_does_not_depend_on_its_neighbours() {
    let model = tiny_chat();
    let pairs = pairs(&model);
    let loaded =
        adapter::load(&here("tests/goldens/adapter"), "rm", &model.config, Device::Cpu).unwrap();
    let head = loaded.head.unwrap();
    let adapter = Some(&loaded.adapter);
    let sequences: Vec<Vec<i64>> = pairs
        .iter()
        .flat_map(|pair| [pair.chosen.token_ids.clone(), pair.rejected.token_ids.clone()])
        .collect();
    let together = sequence_scores(&model.decoder, adapter, &head, &sequences, 4096).unwrap();
    let alone = sequence_scores(&model.decoder, adapter, &head, &sequences, 1).unwrap();
    let refs: Vec<&Pair> = pairs.iter().collect();
    let paired = pair_scores(&model.decoder, adapter, &head, &refs, 4096).unwrap().concat();
    for ((a, b), c) in together.iter().zip(&alone).zip(&paired) {
        assert!((a - b).abs() < 1e-5 && (a - c).abs() < 1e-5, "{a} {b} {c}");
    }
}
