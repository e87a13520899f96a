//! Rewards, advantages, whitening and losses against TRL's own lines, and whole steps against PyTorch's
//! (`scripts/goldens/ppo.py`).

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::common::{config, tiny_model};
use arete_model::{Kind, Model, ScalarHead, Tensor, adapter};
use arete_ppo::Config;
use arete_ppo::gae::estimate_advantages;
use arete_ppo::loss::{policy_loss, value_loss};
use arete_ppo::models::{Critic, Learning, Models};
use arete_ppo::packs::PackedRollout;
use arete_ppo::reward::{place, token_rewards};
use arete_ppo::rollout::{Conversation, Reply};
use arete_ppo::update::{Optimisers, Rates, Targets, UpdateReport, update};
use arete_ppo::whiten::{rescale, whiten};
use arete_records::FinishReason;
use arete_training::Ranks;
use tch::Device;

fn goldens(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

pub(crate) fn tensors(name: &str) -> BTreeMap<String, Tensor> {
    Tensor::read_safetensors(goldens(name)).unwrap().into_iter().collect()
}

pub(crate) fn number(tensor: &Tensor) -> f64 {
    f64::try_from(tensor.to_kind(Kind::Double)).unwrap()
}

/// Largest difference, where `valid`.
fn largest_difference(ours: &Tensor, theirs: &Tensor, valid: &Tensor) -> f64 {
    let difference = (ours.to_kind(Kind::Double) - theirs.to_kind(Kind::Double)).abs();
    number(&difference.masked_select(valid).max())
}

#[track_caller]
fn assert_close(what: &str, ours: f64, theirs: f64) {
    assert!((ours - theirs).abs() <= 1e-4 * theirs.abs().max(0.01), "{what}: {ours}, not {theirs}");
}

/// The column of each conversation's last own token, `[B, 1]`.
fn last_own(valid: &Tensor) -> Tensor {
    let columns = Tensor::arange(valid.size()[1], (Kind::Int64, Device::Cpu));
    (valid.to_kind(Kind::Int64) * columns).amax(1, true)
}

#[test]
fn rewards_advantages_and_whitening_are_trls_on_own_tokens() {
    let golden = tensors("functions.safetensors");
    let of = |name: &str| &golden[name];
    let valid = of("valid");
    let kl = of("logprob") - of("ref_logprob");
    let placed = place(&of("scores").unsqueeze(1), &last_own(valid), valid.size()[1]).unwrap();
    let rewards = token_rewards(&kl, &placed, valid, 0.3).unwrap();
    let out = estimate_advantages(&rewards, of("values"), valid, 0.97, 0.9).unwrap();
    let everywhere = valid.ones_like();
    for (name, ours) in [
        ("rewards", &rewards),
        ("advantage", &out.advantage),
        ("returns", &out.returns),
        ("whitened", &whiten(&out.advantage, valid).unwrap()),
        ("rescaled", &rescale(&rewards, valid).unwrap()),
    ] {
        // Theirs are 0 where not valid, and so must ours be.
        let difference = largest_difference(ours, of(name), &everywhere);
        assert!(difference < 1e-5, "{name}: {difference:e}");
    }
}

#[test]
fn losses_and_their_gradients_are_trls() {
    let golden = tensors("functions.safetensors");
    let of = |name: &str| &golden[name];
    let valid = of("valid");
    let n_tokens = number(&valid.sum(Kind::Float));
    let logprob = of("new_logprob").copy().set_requires_grad(true);
    let own = |tensor: &Tensor| tensor.masked_select(valid); // [n]
    let (old, advantage) = (own(of("old_logprob")), own(of("advantages")));
    let policy = policy_loss(&own(&logprob), &old, &advantage, None, 0.2, n_tokens).unwrap();
    let value = of("new_value").copy().set_requires_grad(true);
    let (old, target) = (own(of("old_value")), own(of("target")));
    let critic = value_loss(&own(&value), &old, &target, 0.3, n_tokens).unwrap();
    policy.loss.backward();
    critic.loss.backward();
    assert_close("policy_loss", number(&policy.loss), number(of("policy_loss")));
    assert_close("value_loss", number(&critic.loss), number(of("value_loss")));
    assert_close("clipfrac", number(&policy.n_clipped) / n_tokens, number(of("clipfrac")));
    let value_clipfrac = number(&critic.n_clipped) / n_tokens;
    assert_close("value_clipfrac", value_clipfrac, number(of("value_clipfrac")));
    let everywhere = valid.ones_like();
    for (name, leaf) in [("new_logprob", &logprob), ("new_value", &value)] {
        let theirs = of(&format!("{name}.grad"));
        let difference = largest_difference(&leaf.grad(), theirs, &everywhere);
        assert!(difference < 1e-6, "gradient of {name}: {difference:e}");
        assert!(number(&theirs.abs().max()) > 1e-2);
    }
}

/// The golden conversations; texts play no part.
pub(crate) fn conversations(golden: &BTreeMap<String, Tensor>) -> Vec<Conversation> {
    let numbers = |tensor: &Tensor| -> Vec<i64> { tensor.reshape([-1]).try_into().unwrap() };
    let n_prompt = numbers(&golden["n_prompt"]);
    n_prompt
        .into_iter()
        .enumerate()
        .map(|(idx, n_prompt)| Conversation {
            prompt: idx,
            token_ids: numbers(&golden[&format!("token_ids.{idx}")]),
            n_prompt: n_prompt as usize,
            replies: numbers(&golden["replies"].get(idx as i64))
                .chunks(2)
                .map(|ends| Reply {
                    tokens: ends[0] as usize..ends[1] as usize,
                    finish_reason: FinishReason::Stop,
                })
                .collect(),
            sampled_logprob: Vec::new(),
            messages: Vec::new(),
        })
        .collect()
}

/// The golden policy and critic, ready to learn.
pub(crate) fn policy_and_critic<'a>(
    model: &'a Model,
    golden: &BTreeMap<String, Tensor>,
    config: &Config,
) -> Models<'a> {
    let mut models = Models::new(&model.decoder, config).unwrap();
    let adapter = adapter::load(&goldens("adapter"), "policy", &model.config, Device::Cpu);
    models.policy = adapter.unwrap().adapter;
    models.policy.set_trainable(true);
    let mut head = ScalarHead { weight: golden["head"].copy() };
    head.set_trainable(true);
    models.critic = Some(Critic::Trunk { head, detached: false });
    models
}

/// Three steps over the golden conversations: what was reported, and the tensors after them.
fn three_steps(
    golden: &BTreeMap<String, Tensor>,
    config: &Config,
) -> (UpdateReport, Vec<(String, Tensor)>) {
    let model = tiny_model();
    let models = policy_and_critic(&model, golden, config);
    let mut optimisers = Optimisers::new(&models, config).unwrap();
    let packed = PackedRollout::new(&conversations(golden), config, 1).unwrap();
    let first = packed.first_pass(&Ranks::alone(), &models, Learning::Both).unwrap();
    for (name, ours) in [
        ("old_logprob", &first.old_logprob),
        ("old_value", first.old_value.as_ref().unwrap()),
        ("entropy", &first.entropy),
    ] {
        let difference = number(&(ours - &golden[name]).abs().max());
        assert!(difference < 2e-5, "{name}: {difference:e}");
    }
    let targets = Targets::of_critic(golden["advantage"].copy(), golden["returns"].copy());
    let rates = Rates { policy: 0.003, critic: 0.03 };
    let both = Learning::Both;
    let ranks = Ranks::alone();
    let report =
        update(&ranks, &models, &mut optimisers, &packed, first, &targets, config, both, rates, 1);
    let mut tensors = models.policy.parameters();
    let Some(Critic::Trunk { head, .. }) = &models.critic else { unreachable!("made above") };
    tensors.push(("head".to_owned(), head.weight.shallow_clone()));
    (report.unwrap(), tensors)
}

#[test]
fn three_steps_of_policy_and_critic_are_pytorchs() {
    let golden = tensors("steps.safetensors");
    let mean = |name: &str| number(&golden[name].mean(Kind::Double));
    let settings = ["--epochs", "3", "--value-clip-range", "0.3", "--value-coef", "0.4"];
    let settings = [&settings[..], &["--target-kl", "0"]].concat();
    for more in
        [&[][..], &["--micro-batch-tokens", "30"], &["--recompute"], &["--keep-graph-tokens", "0"]]
    {
        let (report, tensors) =
            three_steps(&golden, &config(&[settings.as_slice(), more].concat()));
        assert_eq!((report.n_steps, report.first_log_ratio), (3, 0.0));
        for (name, ours) in [
            ("policy_loss", report.policy_loss),
            ("value_loss", report.value_loss),
            ("policy_norm", report.policy_grad_norm),
            ("value_norm", report.value_grad_norm),
            ("approx_kl", report.approx_kl),
            ("clip_fraction", report.clip_fraction),
            ("value_clip_fraction", report.value_clip_fraction),
            ("ratio", report.ratio),
            ("ratio_variance", report.ratio_variance),
        ] {
            assert_close(name, ours, mean(name));
        }
        assert_eq!(tensors.len(), 2 * 7 * 2 + 1);
        for (name, ours) in tensors {
            let theirs = &golden[&format!("final.{name}")];
            let relative = number(&((ours.detach() - theirs).norm() / theirs.norm()));
            assert!(relative < 1e-4, "{name} after three steps: {relative:e}");
        }
    }
}
