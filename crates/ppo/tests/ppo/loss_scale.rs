//! The loss scale of f16, with real overflows: the library computes in f16 on the CPU too, the program on GPUs only.

use std::collections::BTreeMap;
use std::path::Path;

use crate::common::{adapter_sum, config, logged, metric, prepared, tiny_model, tiny_model_in};
use crate::goldens::{conversations, number, policy_and_critic, tensors};
use crate::resume::{start, start_and_kill_in_the_third_rollout};
use anyhow::Result;
use arete_model::{Kind, Model, Tensor};
use arete_ppo::Config;
use arete_ppo::models::{Learning, Models};
use arete_ppo::packs::PackedRollout;
use arete_ppo::update::{Optimisers, Rates, Targets, UpdateReport, update};
use arete_training::{CheckpointStore, LossScale, Ranks};
use serde_json::{Value, json};

/// The golden policy and critic with their optimisers, and what they learn from.
struct Learner<'a> {
    golden: BTreeMap<String, Tensor>,
    config: Config,
    models: Models<'a>,
    optimisers: Optimisers,
}

impl<'a> Learner<'a> {
    /// One step an update, without clipping, unless `flags` say otherwise.
    fn new(model: &'a Model, flags: &[&str]) -> Self {
        let plain = ["--epochs", "1", "--target-kl", "0", "--max-grad-norm", "0"];
        let config = config(&[&plain[..], flags].concat());
        let golden = tensors("steps.safetensors");
        let models = policy_and_critic(model, &golden, &config);
        let optimisers = Optimisers::new(&models, &config).unwrap();
        Self { golden, config, models, optimisers }
    }

    /// Learns from advantages and errors of the value that are `size` times the golden ones: so are the gradients.
    fn update(&mut self, size: f64) -> Result<UpdateReport> {
        let packed = PackedRollout::new(&conversations(&self.golden), &self.config, 1)?;
        let first = packed.first_pass(&Ranks::alone(), &self.models, Learning::Both)?;
        let old_value = first.old_value.as_ref().unwrap();
        let error = &self.golden["returns"] - old_value;
        let advantage = &self.golden["advantage"] * size;
        let targets = Targets::of_critic(advantage, old_value + error * size);
        let rates = Rates { policy: 0.003, critic: 0.03 };
        let (models, optimisers, config) = (&self.models, &mut self.optimisers, &self.config);
        let both = Learning::Both;
        update(
            &Ranks::alone(),
            models,
            optimisers,
            &packed,
            first,
            &targets,
            config,
            both,
            rates,
            1,
        )
    }

    /// Weights, moments and step counts.
    fn state(&self) -> BTreeMap<String, Tensor> {
        let Optimisers { policy, critic, .. } = &self.optimisers;
        let critic = critic.as_ref().unwrap().state("critic");
        let views = policy.state("policy").into_iter().chain(critic);
        views.map(|(name, view)| (name, view.detach().copy())).collect()
    }

    /// The gradients of the only step taken: ten times Adam's first moment.
    fn gradients(&self) -> BTreeMap<String, Tensor> {
        let Optimisers { policy, critic, .. } = &self.optimisers;
        assert_eq!((policy.n_steps(), critic.as_ref().unwrap().n_steps()), (1, 1));
        let moments = self.state().into_iter().filter(|(name, _)| name.contains("/first_moment/"));
        moments.map(|(name, moment)| (name, moment * 10.0)).collect()
    }
}

#[track_caller]
fn assert_same(ours: &BTreeMap<String, Tensor>, theirs: &BTreeMap<String, Tensor>) {
    assert_eq!(ours.len(), theirs.len());
    for (name, tensor) in ours {
        assert!(tensor.equal(&theirs[name]), "{name} has changed");
    }
}

/// The largest relative error of a tensor, and its name.
fn worst(ours: &BTreeMap<String, Tensor>, theirs: &BTreeMap<String, Tensor>) -> (f64, String) {
    assert_eq!(ours.len(), theirs.len());
    ours.iter()
        .map(|(name, tensor)| {
            let norm = number(&theirs[name].norm());
            assert!(norm > 0.0, "{name} has no gradient");
            (number(&(tensor - &theirs[name]).norm()) / norm, name.clone())
        })
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .unwrap()
}

fn scale(factor: f64, n_good: u64) -> LossScale {
    LossScale { factor: Some(factor), n_good }
}

#[test]
fn an_overflow_skips_the_step_halves_the_scale_and_is_logged() {
    let model = tiny_model_in(Kind::Half);
    let mut learner = Learner::new(&model, &[]);
    // GradScaler's first scale.
    assert_eq!(learner.optimisers.scale, scale(65536.0, 0));
    let before = learner.state();
    learner.optimisers.scale = scale(1_099_511_627_776.0, 1999);
    let (report, log) = logged(|| learner.update(1.0).unwrap());
    assert_eq!((report.n_steps, report.policy_grad_norm, report.value_grad_norm), (0, 0.0, 0.0));
    assert!(report.policy_loss.is_finite() && report.value_loss.is_finite());
    assert_eq!(learner.optimisers.scale, scale(549_755_813_888.0, 0));
    assert_same(&learner.state(), &before);
    let line = log.lines().find(|line| line.contains("overflow in f16, step skipped"));
    let line = line.unwrap_or_else(|| panic!("no warning in: {log}"));
    assert!(line.contains("WARN") && line.contains("factor=1099511627776"), "{line}");

    // Nothing of it is left in the gradients: the next step is the first.
    learner.optimisers.scale = scale(256.0, 0);
    let (report, log) = logged(|| learner.update(1.0).unwrap());
    assert_eq!((report.n_steps, learner.optimisers.scale), (1, scale(256.0, 1)));
    assert!(!log.contains("overflow"), "{log}");
    let mut fresh = Learner::new(&model, &[]);
    fresh.optimisers.scale = scale(256.0, 0);
    fresh.update(1.0).unwrap();
    assert_same(&learner.state(), &fresh.state());
}

/// Differs from `GradScaler`, which would halve on without end and never learn.
#[test]
fn an_overflow_at_a_scale_of_1_is_an_error_and_changes_nothing() {
    let model = tiny_model_in(Kind::Half);
    let mut learner = Learner::new(&model, &[]);
    learner.optimisers.scale = scale(1.0, 5);
    let before = learner.state();
    let error = learner.update(2f64.powi(40)).unwrap_err().to_string();
    assert!(error.contains("the gradient of ") && error.contains("not finite"), "{error}");
    assert_same(&learner.state(), &before);
}

#[test]
fn the_scale_doubles_after_2000_steps_without_overflow() {
    let model = tiny_model_in(Kind::Half);
    let mut learner = Learner::new(&model, &["--epochs", "3"]);
    learner.optimisers.scale = scale(128.0, 1998);
    assert_eq!(learner.update(1.0).unwrap().n_steps, 3);
    // The second step was the 2000th; the third counts anew.
    assert_eq!(learner.optimisers.scale, scale(256.0, 1));
}

#[test]
fn gradients_in_f16_are_those_of_f32() {
    let (single, half) = (tiny_model(), tiny_model_in(Kind::Half));
    let mut exact = Learner::new(&single, &[]);
    assert_eq!(exact.optimisers.scale.factor, None);
    let expected = exact.update(1.0).unwrap();
    let mut learner = Learner::new(&half, &[]);
    let report = (0..17).map(|_| learner.update(1.0).unwrap()).find(|report| report.n_steps == 1);
    let report = report.expect("a scale that fits");
    let (error, name) = worst(&learner.gradients(), &exact.gradients());
    println!("scale {:?}: {name} {error:e} off", learner.optimisers.scale.factor);
    // f16 rounds to 2^-11 = 5e-4, in some twenty operations one after the other.
    assert!(error < 0.02, "{name}: {error:e}");
    for (ours, theirs) in [
        (report.policy_grad_norm, expected.policy_grad_norm),
        (report.value_grad_norm, expected.value_grad_norm),
    ] {
        assert!((ours - theirs).abs() < 0.01 * theirs, "norm {ours}, not {theirs}");
    }
}

#[test]
fn gradients_too_small_for_f16_survive_with_a_scale_only() {
    let size = 2f64.powi(-14);
    let (single, half) = (tiny_model(), tiny_model_in(Kind::Half));
    let mut exact = Learner::new(&single, &[]);
    exact.update(size).unwrap();
    let error = |factor: Option<f64>| {
        let mut learner = Learner::new(&half, &[]);
        learner.optimisers.scale.factor = factor;
        assert_eq!(learner.update(size).unwrap().n_steps, 1);
        worst(&learner.gradients(), &exact.gradients())
    };
    let (scaled, unscaled) = (error(Some(65536.0)), error(None));
    println!("scaled {scaled:?}, unscaled {unscaled:?}");
    assert!(scaled.0 < 0.02, "{scaled:?}");
    assert!(unscaled.0 > 0.1, "{unscaled:?}");
}

#[test]
fn gradients_are_clipped_after_their_scale_is_taken_out() {
    let model = tiny_model_in(Kind::Half);
    let mut learner = Learner::new(&model, &["--max-grad-norm", "0.001"]);
    learner.optimisers.scale = scale(256.0, 0);
    let report = learner.update(1.0).unwrap();
    assert!(report.policy_grad_norm > 0.001 && report.policy_grad_norm < 100.0, "{report:?}");
    let gradients = learner.gradients();
    let policy = gradients.iter().filter(|(name, _)| name.starts_with("policy/"));
    let norm = policy.map(|(_, tensor)| number(&tensor.norm()).powi(2)).sum::<f64>().sqrt();
    // norm / (norm + 1e-6) short of it.
    assert!((norm - 0.001).abs() < 2e-6, "{norm}");
}

/// In the CPU's own format a power of two changes no bit, so the run goes through with a scale it never had.
#[test]
fn the_scale_is_checkpointed_and_taken_up_again() {
    let dir = prepared();
    let dir = dir.path();
    assert!(start(dir, "whole").wait().unwrap().success());
    start_and_kill_in_the_third_rollout(dir, "out");
    let (whole, output) = (dir.join("whole"), dir.join("out"));
    let none = json!({ "factor": null, "n_good": 0 });
    let given = json!({ "factor": 65536.0, "n_good": 1999 });
    assert_eq!(exchange_scale(&output, 2, given), none);
    assert!(start(dir, "out").wait().unwrap().success());

    let n_steps = metric(&output, "optimiser_steps");
    assert_eq!(n_steps.len(), 6);
    assert_eq!(n_steps, metric(&whole, "optimiser_steps"));
    // The first step of the third iteration doubles it.
    let n_good = n_steps[2..].iter().sum::<f64>() as u64 - 1;
    let last = json!({ "factor": 131_072.0, "n_good": n_good });
    assert_eq!(exchange_scale(&output, 6, none.clone()), last);
    assert_eq!(metric(&output, "loss_scale"), [131_072.0; 4]);
    assert_eq!(adapter_sum(&output), adapter_sum(&whole));
    assert_eq!(exchange_scale(&whole, 6, none.clone()), none);
}

/// The scale in a checkpoint, which then holds another one.
fn exchange_scale(output: &Path, iteration: u64, scale: Value) -> Value {
    let manifest = output.join(format!("checkpoint-{iteration:06}/MANIFEST.json"));
    let manifest: Value = serde_json::from_slice(&fs_err::read(manifest).unwrap()).unwrap();
    let text = |key: &str| manifest[key].as_str().unwrap();
    let store = CheckpointStore::new(output, text("fingerprint"), text("dtype"), 9);
    let mut loaded = store.load::<Value>(iteration).unwrap();
    let before = std::mem::replace(&mut loaded.state["loss_scale"], scale);
    let tensors: Vec<(String, Tensor)> = loaded.tensors.into_iter().collect();
    store.save(iteration, &tensors, &loaded.state, &[]).unwrap();
    before
}
