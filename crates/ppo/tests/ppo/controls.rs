//! What must not move, what may be set, and what is said of a start that does not fit its statistics.

use std::path::Path;

use crate::common::{
    adapter_sum, by_rule, config, logged, metric, prepared, random_reward, rollout, save_reward,
    tiny_model,
};
use arete_model::adapter;
use arete_ppo::{NamedReward, TrainInputs, train};
use arete_records::stats::mean;
use serde_json::Value;
use tch::Device;

fn run_json(output: &Path) -> Value {
    serde_json::from_slice(&fs_err::read(output.join("run.json")).unwrap()).unwrap()
}

/// The policy's B factors, which are 0 as long as it is the reference.
fn has_moved(output: &Path) -> bool {
    let model = tiny_model();
    let policy = adapter::load(&output.join("adapter"), "p", &model.config, Device::Cpu);
    let parameters = policy.unwrap().adapter.parameters();
    let mut b = parameters.iter().filter(|(name, _)| name.contains("lora_B"));
    b.any(|(_, tensor)| tensor.abs().max().double_value(&[]) != 0.0)
}

/// Not within a tolerance, but to the bit: what every conversation is paid alike is taken out before advantages are
/// estimated (by the mean over the rollout, or over the group), 0 is what is left, and Adam makes 0 of a gradient of 0.
#[test]
fn a_constant_reward_moves_nothing() {
    for flags in [
        &["--rollout", "chain"][..],
        &["--rollout", "answer", "--lambda", "0.95"],
        &["--rollout", "answer", "--value", "adapter", "--whiten-rewards"],
        &["--algorithm", "rloo", "--samples-per-prompt", "4"],
        &["--algorithm", "grpo", "--samples-per-prompt", "4"],
    ] {
        let dir = tempfile::tempdir().unwrap();
        let shared = ["--programmed-reward", "constant", "--missing-eos-penalty", "0"];
        let shared = [&shared[..], &["--learning-rate", "1e-2", "--iterations", "4"]].concat();
        let config = config(&[&shared, &["--kl-coef", "0"][..], flags].concat());
        let inputs = by_rule(dir.path(), "out");
        train(&config, &inputs).unwrap();
        let output = &inputs.output;
        assert!(!has_moved(output), "{flags:?}");
        let paid = metric(output, "objective/scores");
        assert!(paid.len() == 4 && paid.iter().all(|paid| (paid - 1.0).abs() < 1e-6), "{paid:?}");
        assert_eq!(metric(output, "policy_grad_norm"), [0.0; 4]);
        assert_eq!(metric(output, "objective/kl"), [0.0; 4]);
    }
}

/// One key of a recipe makes a control of a whole pipeline, whose stages hand reward models on.
#[test]
fn beside_a_control_reward_models_are_not_read() {
    let dir = prepared();
    let inputs =
        TrainInputs { rewards: Some(dir.path().join("reward")), ..by_rule(dir.path(), "out") };
    let (done, log) = logged(|| train(&config(&["--programmed-reward", "constant"]), &inputs));
    done.unwrap();
    assert!(log.contains("a control: the reward models that are given are not read"), "{log}");
    assert_eq!(metric(&inputs.output, "score_action"), [1.0; 2]);
    let both = config(&["--programmed-reward", "letter:e"]);
    let inputs = TrainInputs { output: dir.path().join("both"), ..inputs };
    let error = train(&both, &inputs).unwrap_err().to_string();
    assert!(error.contains("rewards: expected either reward models"), "{error}");
}

/// The fault: with a critic of zero and λ < 1, paying every reply alike favoured the end of a turn.
#[test]
fn a_constant_reward_that_is_not_centred_moves_the_policy() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(&[
        "--programmed-reward",
        "constant",
        "--missing-eos-penalty",
        "0",
        "--kl-coef",
        "0",
        "--lambda",
        "0.95",
        "--rollout",
        "answer",
        "--center-scores=false",
        "--learning-rate",
        "1e-2",
    ]);
    let inputs = by_rule(dir.path(), "out");
    train(&config, &inputs).unwrap();
    assert!(has_moved(&inputs.output));
}

#[test]
fn a_coin_is_fair_and_its_own_for_every_reply() {
    let dir = tempfile::tempdir().unwrap();
    let flags = ["--programmed-reward", "coin", "--rollout-size", "64", "--iterations", "1"];
    let inputs = by_rule(dir.path(), "out");
    train(&config(&[&flags[..], &["--learning-rate", "0"]].concat()), &inputs).unwrap();
    let tosses: Vec<f64> = rollout(&inputs.output, 1)
        .iter()
        .flat_map(|row| &row.turns)
        .map(|turn| f64::from(turn.score.unwrap()))
        .collect();
    assert!(tosses.iter().all(|&toss| toss == 0.0 || toss == 1.0));
    // 192 tosses: 0.5 ± 3 · 0.036.
    assert!((mean(&tosses) - 0.5).abs() < 0.11, "{}", mean(&tosses));
}

/// Statistics that say where the scores of `name` lie.
fn write_stats(dir: &Path, name: &str, mean: f64, std: f64) {
    let base = tiny_model().base_sha256;
    let stats = format!(
        r#"{{"mean": {mean}, "std": {std}, "n": 64, "split": "validation", "base_sha256": "{base}", "n_prompts": 32, "source": "another model's replies"}}"#
    );
    fs_err::write(dir.join("reward").join(name).join("score_stats.json"), stats).unwrap();
}

#[test]
fn statistics_of_other_replies_are_found_out_at_the_first_iteration() {
    let dir = prepared();
    let dir = dir.path();
    let inputs =
        |output: &str| TrainInputs { rewards: Some(dir.join("reward")), ..by_rule(dir, output) };
    let config = config(&["--rollout-size", "32", "--stats-samples", "64"]);
    let (fits, log) = logged(|| train(&config, &inputs("fits")));
    fits.unwrap();
    assert!(!log.contains("first scores are not standardised"), "{log}");
    let found = &run_json(&dir.join("fits"))["counts"]["standardisation"];
    assert_eq!(found.as_object().unwrap().len(), 3);
    assert!(found.as_object().unwrap().values().all(|of| of["fits"] == true), "{found}");

    // Where the scores truly lie, and the same three deviations off, or measured with another yardstick's deviation.
    let own: Value =
        serde_json::from_slice(&fs_err::read(dir.join("fits/score_stats.json")).unwrap()).unwrap();
    let of = |name: &str, key: &str| own[name][key].as_f64().unwrap();
    write_stats(
        dir,
        "action",
        of("action", "mean") - 3.0 * of("action", "std"),
        of("action", "std"),
    );
    write_stats(dir, "motivation", of("motivation", "mean"), 3.0 * of("motivation", "std"));
    write_stats(dir, "consequence", of("consequence", "mean"), of("consequence", "std"));
    let (off, log) = logged(|| train(&config, &inputs("off")));
    off.unwrap(); // a warning, no abort
    let warned = log.lines().filter(|line| line.contains("first scores are not standardised"));
    assert_eq!(warned.count(), 2, "{log}");
    let found = &run_json(&dir.join("off"))["counts"]["standardisation"];
    let fits = ["action", "motivation", "consequence"].map(|name| found[name]["fits"] == true);
    assert_eq!(fits, [false, false, true], "{found}");
    assert!((found["action"]["z"].as_f64().unwrap() - 3.0).abs() < 1.0, "{found}");
    let output = dir.join("off");
    assert_eq!(metric(&output, "z_limit_action").len(), 1);
    let spread = metric(&output, "score_spread_motivation");
    assert!(spread.len() == 2 && spread[0] < 0.6, "{spread:?}");
}

fn named(name: &str, dir: &Path) -> NamedReward {
    NamedReward { name: name.to_owned(), dir: dir.to_owned() }
}

#[test]
fn one_reward_model_is_enough_and_may_be_a_virtues() {
    let dir = prepared();
    let dir = dir.path();
    let answers =
        config(&["--rollout", "answer", "--learning-rate", "2e-3", "--weights", "honesty=2"]);
    let reward = dir.join("reward");
    let only = TrainInputs {
        named_rewards: vec![named("honesty", &reward.join("motivation"))],
        ..by_rule(dir, "only")
    };
    train(&answers, &only).unwrap();
    assert_eq!(metric(&only.output, "z_honesty").len(), 2);
    assert!(metric(&only.output, "z_action").is_empty());
    assert!(run_json(&only.output)["inputs"]["reward_honesty"].is_string());
    // It has no columns, and says its scores beside them.
    assert!(rollout(&only.output, 1).iter().all(|row| row.z().is_empty()));
    let scores =
        arete_records::jsonl::read(only.output.join("rollouts/iteration-000001.scores.jsonl"))
            .unwrap();
    assert_eq!(scores.len(), 8);
    let logged: Vec<f64> =
        scores.iter().map(|(_, line)| line["z"]["honesty"].as_f64().unwrap()).collect();
    assert!((mean(&logged) - metric(&only.output, "z_honesty")[0]).abs() < 1e-9);
    assert!(run_json(&only.output)["counts"]["probe_z_before"].is_number());

    // The same model as the aspect's is read of the same answers.
    let (action, motivation) = (reward.join("action"), reward.join("motivation"));
    let both = TrainInputs {
        named_rewards: vec![named("action", &action), named("kindness", &motivation)],
        ..by_rule(dir, "both")
    };
    let chain = config(&["--learning-rate", "2e-3"]);
    train(&chain, &both).unwrap();
    assert_eq!(metric(&both.output, "z_kindness").len(), 2);
    assert!(rollout(&both.output, 1).iter().all(|row| row.turns[0].z.is_some()));

    // A virtue's in the directory is read as if it had been named; one of them all is enough for a chain, too.
    fs_err::rename(&motivation, reward.join("kindness")).unwrap();
    fs_err::remove_dir_all(reward.join("consequence")).unwrap();
    let found = TrainInputs { rewards: Some(reward.clone()), ..by_rule(dir, "found") };
    let (ran, log) = crate::common::logged(|| train(&chain, &found));
    ran.unwrap();
    assert_eq!(metric(&found.output, "z_kindness"), metric(&both.output, "z_kindness"));
    assert_eq!(metric(&found.output, "z_action"), metric(&both.output, "z_action"));
    let unread = log.lines().filter(|line| line.contains("no reward model reads this turn"));
    assert_eq!(unread.count(), 2, "{log}");
    fs_err::remove_dir_all(reward.join("kindness")).unwrap();
    let one = TrainInputs { rewards: Some(reward.clone()), ..by_rule(dir, "one") };
    train(&config(&["--rollout", "answer"]), &one).unwrap();
    train(&chain, &TrainInputs { output: dir.join("chain"), ..one }).unwrap();
    assert_eq!(metric(&dir.join("chain"), "z_action").len(), 2);
}

#[test]
fn each_key_of_the_reward_changes_what_is_learned() {
    let dir = prepared();
    let dir = dir.path();
    // A reward model of its own for every aspect, so that weights and minima have a choice.
    let model = tiny_model();
    let (adapter, head) = random_reward(&model, 11);
    save_reward(&dir.join("reward/consequence"), &model, &adapter, Some(&head));
    let mut seen = std::collections::BTreeMap::new();
    for flags in [
        &[][..],
        &["--weights", "action=1,motivation=0.25,consequence=0"],
        &["--length-residual"],
        &["--center-scores=false"],
        &["--samples-per-prompt", "2"],
        &["--placement", "final"],
        &["--placement", "final", "--ensemble", "soft_min"],
        &["--placement", "final", "--ensemble", "soft_min", "--soft-min-temperature", "0.1"],
        &["--placement", "final", "--ensemble", "min"],
        &["--importance-cap", "0.5"],
    ] {
        let output = format!("out/{}", seen.len());
        let inputs = TrainInputs { rewards: Some(dir.join("reward")), ..by_rule(dir, &output) };
        let shared = ["--learning-rate", "2e-3", "--kl-coef", "0.2"];
        train(&config(&[&shared[..], flags].concat()), &inputs).unwrap();
        if let Some(same) = seen.insert(adapter_sum(&inputs.output), flags) {
            panic!("{flags:?} gives the same policy as {same:?}");
        }
        if flags.contains(&"--length-residual") {
            assert!(inputs.output.join("length_trends.json").is_file());
        }
        if flags.contains(&"--importance-cap") {
            let weights = metric(&inputs.output, "importance_weight");
            // Sampler and trainer agree: without the cap every weight would be 1.
            assert!(weights.iter().all(|weight| (weight - 0.5).abs() < 1e-6), "{weights:?}");
        }
    }
}

#[test]
fn what_length_explains_is_taken_from_the_scores() {
    let dir = tempfile::tempdir().unwrap();
    let shared = ["--programmed-reward", "length:1000", "--rollout", "answer"];
    let shared = [&shared[..], &["--rollout-size", "32", "--learning-rate", "0"]].concat();
    let spread = |output: &str, flags: &[&str]| {
        let inputs = by_rule(dir.path(), output);
        train(&config(&[&shared, flags].concat()), &inputs).unwrap();
        metric(&inputs.output, "score_spread_action")[0]
    };
    // A reward that is nothing but length leaves nothing.
    assert!(spread("plain", &[]) > 0.5);
    assert!(spread("residual", &["--length-residual"]) < 1e-3);
}

#[test]
fn combinations_that_mean_nothing_are_refused_by_name() {
    let group = ["--algorithm", "rloo", "--samples-per-prompt", "4"];
    for (flags, wanted) in [
        (
            &["--algorithm", "grpo"][..],
            "samples_per_prompt: expected at least 2, for grpo compares the samples of a prompt, got 1",
        ),
        (
            &["--samples-per-prompt", "3"],
            "samples_per_prompt: expected a divisor of rollout_size (8), got 3",
        ),
        (
            &["--aggregation", "normalize_then_sum"],
            "aggregation: expected sum_then_normalize, for ppo compares no groups, got normalize_then_sum",
        ),
        (
            &[group[0], group[1], group[2], group[3], "--value", "adapter"],
            "value: expected trunk (the default), for rloo has no critic, got adapter",
        ),
        (
            &[group[0], group[1], group[2], group[3], "--lambda", "0.9"],
            "lambda: expected 1, for rloo compares whole replies, got 0.9",
        ),
        (
            &[group[0], group[1], group[2], group[3], "--whiten-rewards"],
            "whiten_rewards: expected false, for rloo estimates no advantage token by token, got true",
        ),
        (
            &[
                group[0],
                group[1],
                group[2],
                group[3],
                "--aggregation",
                "normalize_then_sum",
                "--ensemble",
                "min",
                "--placement",
                "final",
            ],
            "ensemble: expected mean, for aggregation = normalize_then_sum, got min",
        ),
        (
            &["--ensemble", "min", "--placement", "final", "--weights", "action=2"],
            "weights: expected none, for ensemble = min takes the lowest score as it is",
        ),
        (&["--weights", "action=-1"], "weights: expected numbers of at least 0"),
        (
            &["--soft-min-temperature", "0"],
            "soft_min_temperature: expected a number above 0, got 0",
        ),
        (&["--ensemble", "soft_min"], "placement: expected final"),
        (&["--importance-cap=-1"], "importance_cap: expected a number of at least 0, got -1"),
    ] {
        let error = config(flags).check().unwrap_err().to_string();
        assert!(error.starts_with(wanted), "{flags:?}: {error}");
    }
    // Without a critic the keys of the critic have no effect, and no iteration is too few for its warm-up.
    config(&[&group[..], &["--iterations", "1", "--value-warmup", "1"]].concat()).check().unwrap();
    let dir = prepared();
    let inputs =
        TrainInputs { rewards: Some(dir.path().join("reward")), ..by_rule(dir.path(), "out") };
    let error = train(&config(&["--weights", "honesty=1"]), &inputs).unwrap_err().to_string();
    let wanted =
        "weights: expected names of reward models (action, motivation, consequence), got honesty";
    assert!(error.contains(wanted), "{error}");
    let error = train(&config(&["--weights", "action=0,motivation=0,consequence=0"]), &inputs);
    assert!(error.unwrap_err().to_string().contains("expected a weight above 0"));
    let twice = TrainInputs {
        named_rewards: vec![named("action", &dir.path().join("reward/motivation"))],
        ..inputs
    };
    let error = train(&config(&[]), &twice).unwrap_err().to_string();
    assert!(
        error.contains("expected a name of its own for every reward model, got action"),
        "{error}"
    );
}
