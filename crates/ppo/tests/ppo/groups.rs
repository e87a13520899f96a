//! RLOO, GRPO and GDPO: advantages, losses and gradients against TRL's own lines (`scripts/goldens/group_rl.py`), and runs
//! without a critic.

use crate::common::{adapter_sum, by_rule, config, metric, prepared, rollout};
use crate::goldens::{number, tensors};
use arete_model::{Kind, Tensor};
use arete_ppo::advantage::compare;
use arete_ppo::group::standardise_each;
use arete_ppo::loss::{Units, importance_weights, kl_loss, policy_loss, sequence_loss};
use arete_ppo::{TrainInputs, train};

/// `[B][K]`.
fn rows(tensor: &Tensor) -> Vec<Vec<f64>> {
    let wide = tensor.to_kind(Kind::Double);
    wide.unbind(0).iter().map(|row| Vec::try_from(row).unwrap()).collect()
}

fn column(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_kind(Kind::Double)).unwrap()
}

#[track_caller]
fn assert_near(what: &str, ours: &[f64], theirs: &[f64]) {
    assert_eq!(ours.len(), theirs.len());
    for (ours, theirs) in ours.iter().zip(theirs) {
        let error = (ours - theirs).abs();
        assert!(error < 1e-5 * (1.0 + theirs.abs()), "{what}: {ours}, not {theirs}");
    }
}

#[test]
fn advantages_against_a_group_are_trls() {
    let golden = tensors("groups.safetensors");
    let of = |name: &str| &golden[name];
    let weights = column(of("weights"));
    let weigh = |rewards: &[Vec<f64>]| -> Vec<f64> {
        let sum = |row: &Vec<f64>| row.iter().zip(&weights).map(|(r, w)| r * w).sum();
        rewards.iter().map(sum).collect()
    };
    let kl = (of("old_logprob") - of("ref_logprob")) * of("valid");
    let kl = column(&kl.sum_dim_intlist(1, false, Kind::Double));
    let rewards = rows(of("rewards"));
    let group = |algorithm| config(&["--samples-per-prompt", "4", "--algorithm", algorithm]);
    let rloo = compare(&[weigh(&rewards)], std::slice::from_ref(&kl), 0.3, &group("rloo"));
    assert_near("rloo", &rloo[0], &column(of("rloo.advantage")));
    let grpo = compare(&[weigh(&rewards)], std::slice::from_ref(&kl), 0.3, &group("grpo"));
    assert_near("grpo", &grpo[0], &column(of("grpo.advantage")));
    let each = arete_ppo::Config {
        aggregation: arete_ppo::config::Aggregation::NormalizeThenSum,
        ..group("grpo")
    };
    let gdpo = compare(&[weigh(&standardise_each(&rewards, 4))], &[kl], 0.3, &each);
    assert_near("gdpo", &gdpo[0], &column(of("gdpo.advantage")));
    // The three differ, so that none stands for another.
    assert!((gdpo[0][0] - grpo[0][0]).abs() > 1e-2 && (rloo[0][0] - grpo[0][0]).abs() > 1e-2);
}

#[test]
fn losses_of_groups_and_their_gradients_are_trls() {
    let golden = tensors("groups.safetensors");
    let of = |name: &str| &golden[name];
    let valid = of("valid");
    let own = |tensor: &Tensor| tensor.masked_select(valid); // [n]
    let n_tokens = number(&valid.sum(Kind::Float));
    let n_rows = valid.size()[0];
    let row = Tensor::arange(n_rows, (Kind::Int64, tch::Device::Cpu)).unsqueeze(1);
    let units = Units::of(&own(&row.expand_as(valid)));
    let narrow = |name: &str| own(&of(name).to_kind(Kind::Float).unsqueeze(1).expand_as(valid));
    let (old, reference) = (own(of("old_logprob")), own(of("ref_logprob")));
    let log_importance = &old - own(of("sampled_logprob"));
    for (name, start) in [
        ("rloo.first", "old_logprob"),
        ("rloo.later", "new_logprob"),
        ("grpo.first", "old_logprob"),
        ("grpo.later", "new_logprob"),
        ("grpo.weighed", "new_logprob"),
    ] {
        let leaf = of(start).copy().set_requires_grad(true);
        let logprob = own(&leaf);
        let loss = if name.starts_with("rloo") {
            let advantage = narrow("rloo.advantage");
            let n = n_rows as f64;
            sequence_loss(&logprob, &old, &advantage, &units, None, 0.2, n).unwrap().loss
        } else {
            let weights = importance_weights(&log_importance, 1.5);
            let weights = (name == "grpo.weighed").then_some(&weights);
            let advantage = narrow("grpo.advantage");
            let policy = policy_loss(&logprob, &old, &advantage, weights, 0.2, n_tokens);
            policy.unwrap().loss + 0.05 * kl_loss(&logprob, &reference, n_tokens).unwrap()
        };
        loss.backward();
        let theirs = number(of(&format!("{name}.loss")));
        assert!((number(&loss) - theirs).abs() < 1e-5, "{name}: {} not {theirs}", number(&loss));
        let gradient = of(&format!("{name}.grad"));
        let error = number(&(leaf.grad().to_kind(Kind::Double) - gradient).abs().max());
        assert!(error < 1e-6, "gradient of {name}: {error:e}");
        assert!(number(&gradient.abs().max()) > 1e-2);
    }
}

const GROUPS: [&str; 4] = ["--samples-per-prompt", "4", "--learning-rate", "2e-3"];

#[test]
fn a_group_run_has_no_critic_and_moves_the_policy() {
    let dir = prepared();
    let run = |output: &str, flags: &[&str]| {
        let config = config(&[&GROUPS[..], flags].concat());
        let inputs =
            TrainInputs { rewards: Some(dir.path().join("reward")), ..by_rule(dir.path(), output) };
        train(&config, &inputs).unwrap();
        inputs.output
    };
    let mut sums = std::collections::BTreeSet::new();
    for (output, flags) in [
        ("rloo", &["--algorithm", "rloo"][..]),
        ("rloo-final", &["--algorithm", "rloo", "--placement", "final"][..]),
        ("grpo", &["--algorithm", "grpo"][..]),
        ("grpo-free", &["--algorithm", "grpo", "--kl-coef", "0"][..]),
        ("gdpo", &["--algorithm", "grpo", "--aggregation", "normalize_then_sum"][..]),
        ("rloo-each", &["--algorithm", "rloo", "--aggregation", "normalize_then_sum"][..]),
        ("rloo-white", &["--algorithm", "rloo", "--whiten-advantages"][..]),
    ] {
        let output = run(output, flags);
        assert!(sums.insert(adapter_sum(&output)), "{flags:?} changes nothing");
        // Two groups of four, a prompt each, every sample its own.
        let rows = rollout(&output, 1);
        assert_eq!(rows.len(), 8);
        for group in rows.chunks(4) {
            assert!(group.iter().all(|row| row.prompt_id == group[0].prompt_id));
            assert!(group.iter().any(|row| row.messages != group[0].messages));
        }
        assert_ne!(rows[0].prompt_id, rows[4].prompt_id);
        assert_eq!(metric(&output, "first_log_ratio"), [0.0, 0.0]);
        assert_eq!(metric(&output, "frac_reward_zero_std").len(), 2);
        assert!(metric(&output, "objective/kl")[1] != 0.0, "the policy has moved");
        for name in ["value_mean", "loss/value_avg", "value_lr", "value_grad_norm", "returns_mean"]
        {
            assert!(metric(&output, name).is_empty(), "{name}");
        }
        let checkpoint = output.join("checkpoint-000002/tensors.safetensors");
        let tensors = Tensor::read_safetensors(checkpoint).unwrap();
        assert!(tensors.iter().all(|(name, _)| name.starts_with("policy/")));
    }
}

#[test]
fn the_mean_score_rises_without_a_critic_too() {
    for algorithm in ["rloo", "grpo"] {
        let dir = tempfile::tempdir().unwrap();
        let config = config(&[
            "--algorithm",
            algorithm,
            "--samples-per-prompt",
            "8",
            "--programmed-reward",
            "length:4",
            "--rollout",
            "answer",
            "--learning-rate",
            "4e-3",
            "--iterations",
            "14",
            "--rollout-size",
            "32",
            "--stats-samples",
            "64",
            "--kl-coef",
            "0.02",
            "--max-new-tokens",
            "24",
        ]);
        let inputs = by_rule(dir.path(), "out");
        train(&config, &inputs).unwrap();
        let scores = metric(&inputs.output, "z_mean");
        let last = arete_records::stats::mean(&scores[11..]);
        assert!(last > 0.8, "{algorithm}: {scores:?}");
    }
}

#[test]
fn micro_batches_change_a_group_runs_rounding_at_most() {
    for algorithm in ["rloo", "grpo"] {
        let dir = tempfile::tempdir().unwrap();
        let losses = [("whole", "100000"), ("cut", "100")].map(|(output, budget)| {
            let flags = ["--algorithm", algorithm, "--micro-batch-tokens", budget];
            let rule = ["--programmed-reward", "letter:e", "--epochs", "2"];
            let inputs = by_rule(dir.path(), output);
            train(&config(&[&GROUPS[..], &flags, &rule].concat()), &inputs).unwrap();
            let of = |name| metric(&inputs.output, name);
            [of("loss/policy_avg"), of("policy_grad_norm"), of("policy/clipfrac_avg")].concat()
        });
        for (a, b) in losses[0].iter().zip(&losses[1]) {
            assert!((a - b).abs() < 1e-4 * (1.0 + a.abs()), "{algorithm}: {losses:?}");
        }
    }
}
