//! The stage over tiny-chat: what an iteration must keep to, whatever it learns.

use crate::common::{by_rule, config, metric, rollout, tiny_model, write_prompts, write_rewards};
use arete_model::{Batch, SegmentIdx, adapter};
use arete_ppo::rollout::{Conversation, Reply, own_logprobs};
use arete_ppo::train;
use arete_records::rows::RolloutRow;
use arete_records::{Aspect, FinishReason};
use tch::Device;

fn inputs(dir: &std::path::Path, output: &str) -> arete_ppo::TrainInputs {
    arete_ppo::TrainInputs {
        prompts: write_prompts(dir),
        rewards: Some(dir.join("reward")),
        named_rewards: Vec::new(),
        constitution: None,
        yardstick: None,
        output: dir.join(output),
    }
}

#[test]
fn with_learning_rate_0_the_ratio_is_1_and_the_kl_0_exactly() {
    for flags in [&["--rollout", "chain"][..], &["--rollout", "answer", "--dtype", "auto"][..]] {
        let dir = tempfile::tempdir().unwrap();
        let rates = ["--learning-rate", "0", "--value-learning-rate", "0"];
        let rule = ["--programmed-reward", "letter:e", "--iterations", "3"];
        let config = config(&[flags, &rates, &rule].concat());
        let inputs = by_rule(dir.path(), "out");
        train(&config, &inputs).unwrap();
        for (name, expected) in [
            ("objective/kl", 0.0),
            ("policy/approxkl_avg", 0.0),
            ("policy/clipfrac_avg", 0.0),
            ("val/ratio", 1.0),
            ("val/ratio_var", 0.0),
            ("first_log_ratio", 0.0),
        ] {
            assert_eq!(metric(&inputs.output, name), [expected; 3], "{name}");
        }
        let difference = metric(&inputs.output, "sampler_trainer_difference");
        assert!(difference.iter().all(|&d| d <= 1e-4), "{difference:?}");
        let adapter =
            adapter::load(&inputs.output.join("adapter"), "p", &tiny_model().config, Device::Cpu);
        for (name, tensor) in adapter.unwrap().adapter.parameters() {
            let moved = tensor.abs().max().double_value(&[]);
            assert!(name.contains("lora_A") || moved == 0.0, "{name}");
        }
    }
}

#[test]
fn scores_are_those_of_each_conversation_alone() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model();
    write_rewards(dir.path(), &model);
    for kind in ["chain", "answer"] {
        // An answer asks for its own reward model alone.
        let asked = if kind == "chain" { &Aspect::SHIPPED[..] } else { &[Aspect::ACTION] };
        if kind == "answer" {
            for other in [Aspect::MOTIVATION, Aspect::CONSEQUENCE] {
                fs_err::remove_dir_all(dir.path().join("reward").join(other.name())).unwrap();
            }
        }
        let config = config(&["--rollout", kind, "--learning-rate", "1e-3"]);
        let inputs = inputs(dir.path(), kind);
        train(&config, &inputs).unwrap();
        let rows: Vec<RolloutRow> = (1..=2).flat_map(|i| rollout(&inputs.output, i)).collect();
        assert_eq!(rows.len(), 16);
        for &aspect in asked {
            let reward = adapter::load(
                &dir.path().join("reward").join(aspect.name()).join("adapter"),
                "r",
                &model.config,
                Device::Cpu,
            )
            .unwrap();
            for row in &rows {
                let got = f64::from(row.turn(aspect).unwrap().score.unwrap());
                let expected = score_alone(&model, &reward, row, aspect);
                assert!((got - expected).abs() < 1e-5, "{aspect}: {got} against {expected}");
            }
        }
        if kind == "answer" {
            for turn in rows.iter().flat_map(|row| &row.turns[1..]) {
                assert_eq!((turn.score, turn.z, turn.n_tokens), (None, None, None));
            }
        }
    }
}

/// Renders the conversation through the aspect's reply from its messages, and scores it in a pass of its own.
fn score_alone(
    model: &arete_model::Model,
    reward: &adapter::LoadedAdapter,
    row: &RolloutRow,
    aspect: Aspect,
) -> f64 {
    let _guard = tch::no_grad_guard();
    let chat = model.chat().unwrap();
    let place = row.turns.iter().position(|turn| turn.aspect == aspect).unwrap();
    let messages = arete_chain::through(&row.messages, row.n_asked(), place).unwrap();
    // Every cut reply ends at its last full sentence, if it has one, and is closed.
    let mut messages = messages.to_vec();
    let finish = row.turns.iter().map(|turn| turn.finish_reason);
    let n_prompt = row.messages.len() - (2 * row.n_asked() - 1);
    let replies = messages[n_prompt..].iter_mut().step_by(2);
    for (reply, _) in replies.zip(finish).filter(|(_, why)| *why == Some(FinishReason::Length)) {
        if let Some(kept) = arete_chain::trim::last_sentence(&reply.content) {
            reply.content = kept.to_owned();
        }
    }
    let rendered = chat.render(&messages).unwrap();
    let batch = Batch::from_sequences(&[&rendered.token_ids]);
    let hidden = model.decoder.forward(&batch, Some(&reward.adapter)).unwrap();
    let last = hidden.narrow(0, batch.last_row(SegmentIdx(0)) as i64, 1);
    reward.head.as_ref().unwrap().forward(&last).double_value(&[0])
}

#[test]
fn rewards_add_up_and_the_penalty_is_k1() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(&[
        "--rollout",
        "answer",
        "--programmed-reward",
        "length:5",
        "--kl-coef",
        "0.3",
        "--missing-eos-penalty",
        "0.5",
        "--learning-rate",
        "5e-3",
        "--iterations",
        "3",
        "--target-kl",
        "0",
    ]);
    let inputs = by_rule(dir.path(), "out");
    train(&config, &inputs).unwrap();
    let rows = rollout(&inputs.output, 3);
    assert!(rows.iter().any(|row| row.kl.abs() > 1e-3), "the policy has moved");
    for row in rows {
        let cut = f64::from(u8::from(row.turns[0].finish_reason == Some(FinishReason::Length)));
        let z = f64::from(row.turns[0].z.unwrap());
        let expected = z.clamp(-10.0, 10.0) - 0.5 * cut - 0.3 * f64::from(row.kl);
        assert!((f64::from(row.reward) - expected).abs() < 1e-4, "{row:?}");
    }
}

#[test]
fn keeping_the_first_pass_changes_no_bit() {
    for value in ["trunk", "trunk_detached", "adapter"] {
        let dir = tempfile::tempdir().unwrap();
        let mut sums = Vec::new();
        for (output, keep) in [("kept", "100000"), ("twice", "0")] {
            let flags = ["--value", value, "--keep-graph-tokens", keep, "--learning-rate", "1e-3"];
            let rule = ["--programmed-reward", "letter:e", "--micro-batch-tokens", "300"];
            let inputs = by_rule(dir.path(), output);
            train(&config(&[&flags[..], &rule[..]].concat()), &inputs).unwrap();
            sums.push(crate::common::adapter_sum(&inputs.output));
        }
        assert_eq!(sums[0], sums[1], "{value}");
    }
}

#[test]
fn micro_batches_and_recomputation_change_rounding_at_most() {
    let dir = tempfile::tempdir().unwrap();
    let mut losses = Vec::new();
    for (output, flags) in [
        ("whole", &["--micro-batch-tokens", "100000"][..]),
        ("cut", &["--micro-batch-tokens", "100"][..]),
        ("again", &["--recompute"][..]),
    ] {
        let shared =
            ["--programmed-reward", "letter:e", "--learning-rate", "1e-3", "--rollout", "answer"];
        let inputs = by_rule(dir.path(), output);
        train(&config(&[&shared, flags].concat()), &inputs).unwrap();
        let of = |name| metric(&inputs.output, name);
        losses.push([of("loss/policy_avg"), of("loss/value_avg"), of("policy_grad_norm")].concat());
    }
    for other in &losses[1..] {
        for (a, b) in losses[0].iter().zip(other) {
            assert!((a - b).abs() < 1e-4 * (1.0 + a.abs()), "{losses:?}");
        }
    }
}

#[test]
fn several_minibatches_start_at_ratio_1_too() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(&[
        "--programmed-reward",
        "letter:e",
        "--learning-rate",
        "1e-3",
        "--n-minibatches",
        "4",
        "--whiten-rewards",
        "--kl-control",
        "adaptive",
        "--kl-horizon",
        "20",
    ]);
    let inputs = by_rule(dir.path(), "out");
    train(&config, &inputs).unwrap();
    assert_eq!(metric(&inputs.output, "first_log_ratio"), [0.0, 0.0]);
    assert_eq!(metric(&inputs.output, "optimiser_steps"), [8.0, 8.0]);
    // KL far below the target of 6: the coefficient falls by 0.2 · 8/20.
    let kl_coef = metric(&inputs.output, "kl_coef");
    assert!((kl_coef[1] - 0.05 * (1.0 - 0.2 * 8.0 / 20.0)).abs() < 1e-12, "{kl_coef:?}");
}

#[test]
fn a_policy_that_drifts_too_far_stops_its_iteration_early() {
    let dir = tempfile::tempdir().unwrap();
    for (target_kl, steps, stopped) in [("1e-4", 1.0, 1.0), ("0", 4.0, 0.0)] {
        let config = config(&[
            "--programmed-reward",
            "letter:e",
            "--rollout",
            "answer",
            "--learning-rate",
            "3e-2",
            "--epochs",
            "4",
            "--iterations",
            "1",
            "--target-kl",
            target_kl,
        ]);
        let inputs = by_rule(dir.path(), target_kl);
        train(&config, &inputs).unwrap();
        assert_eq!(metric(&inputs.output, "optimiser_steps"), [steps]);
        assert_eq!(metric(&inputs.output, "stopped_early"), [stopped]);
    }
}

#[test]
fn everything_that_is_to_be_watched_is_logged() {
    let dir = tempfile::tempdir().unwrap();
    write_rewards(dir.path(), &tiny_model());
    let inputs = arete_ppo::TrainInputs {
        yardstick: Some(dir.path().join("reward/action")),
        ..inputs(dir.path(), "out")
    };
    train(&config(&["--iterations", "4", "--probe-every", "2"]), &inputs).unwrap();
    let aspects = ["action", "motivation", "consequence"];
    let per_aspect = ["score", "z", "score_spread", "length", "truncated"];
    let per_aspect =
        per_aspect.iter().flat_map(|name| aspects.map(|aspect| format!("{name}_{aspect}")));
    let described: Vec<String> =
        per_aspect.chain(["z_mean", "ensemble_disagreement"].map(str::to_owned)).collect();
    let rollouts = [
        // TRL's names; its `eps` is a wall time and stands in timings.jsonl.
        "objective/kl",
        "objective/entropy",
        "objective/non_score_reward",
        "objective/rlhf_reward",
        "objective/scores",
        "policy/approxkl_avg",
        "policy/clipfrac_avg",
        "policy/entropy_avg",
        "loss/policy_avg",
        "loss/value_avg",
        "val/clipfrac_avg",
        "val/ratio",
        "val/ratio_var",
        "val/num_eos_tokens",
        "lr",
        "episode",
        // Ours.
        "explained_variance",
        "first_log_ratio",
        "sampler_trainer_difference",
        "kl_coef",
        "value_lr",
        "policy_grad_norm",
        "value_grad_norm",
    ];
    for name in rollouts.into_iter().chain(described.iter().map(String::as_str)) {
        assert_eq!(metric(&inputs.output, name).len(), 4, "{name}");
    }
    for name in described.iter().map(String::as_str).chain(["kl", "yardstick"]) {
        assert_eq!(metric(&inputs.output, &format!("probe/{name}")).len(), 3, "{name}");
    }
    for name in ["z_gain", "yardstick_gain", "over_optimised"] {
        assert_eq!(metric(&inputs.output, &format!("probe/{name}")).len(), 2, "{name}");
    }
    for iteration in [0, 2, 4] {
        let table = inputs.output.join(format!("completions/iteration-{iteration:06}.parquet"));
        let rows: Vec<RolloutRow> = arete_records::parquet::read(table).unwrap();
        assert_eq!(rows.len(), 4);
    }
    let timings = arete_records::jsonl::read(inputs.output.join("timings.jsonl")).unwrap();
    for phase in ["sampling", "scoring", "reference", "first pass", "update"] {
        let speeds: Vec<f64> = timings
            .iter()
            .filter(|(_, line)| line["what"] == phase)
            .map(|(_, line)| line["tokens_per_s"].as_f64().unwrap())
            .collect();
        assert!(
            speeds.len() == 4 && speeds.iter().all(|&speed| speed > 0.0),
            "{phase}: {speeds:?}"
        );
    }
    assert_eq!(timings.iter().filter(|(_, line)| line["eps"].is_number()).count(), 4);
}

#[test]
fn f4_a_yardstick_that_falls_rings_the_alarm_and_where_every_probe_rings_the_start_is_the_result() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model();
    let (adapter, head) = crate::common::random_reward(&model, 3);
    let opposite = arete_model::ScalarHead { weight: -head.weight.copy() };
    for (name, head) in [
        ("reward/action", &head),
        ("reward/motivation", &head),
        ("reward/consequence", &head),
        ("opposite", &opposite),
    ] {
        crate::common::save_reward(&dir.path().join(name), &model, &adapter, Some(head));
    }
    let mut config = config(&[
        "--rollout",
        "answer",
        "--learning-rate",
        "4e-3",
        "--value-learning-rate",
        "1e-2",
        "--iterations",
        "14",
        "--rollout-size",
        "32",
        "--kl-coef",
        "0",
        "--missing-eos-penalty",
        "0",
        "--select",
        "last",
    ]);
    for (yardstick, alarm) in [("opposite", 1.0), ("reward/action", 0.0)] {
        let inputs = arete_ppo::TrainInputs {
            yardstick: Some(dir.path().join(yardstick)),
            ..inputs(dir.path(), &format!("out/{alarm}"))
        };
        train(&config, &inputs).unwrap();
        let last = |name: &str| metric(&inputs.output, name).pop().unwrap();
        assert!(last("probe/z_gain") > 0.5, "{}", last("probe/z_gain"));
        assert_eq!(last("probe/yardstick_gain") < 0.0, alarm > 0.0);
        assert_eq!(last("probe/over_optimised"), alarm);
    }
    // The only probe after the start rings: what is selected is the start, not the last weights.
    config.select = arete_training::Select::Best;
    config.probe_every = 0;
    let inputs = arete_ppo::TrainInputs {
        yardstick: Some(dir.path().join("opposite")),
        ..inputs(dir.path(), "out/start")
    };
    let (done, log) = crate::common::logged(|| train(&config, &inputs));
    done.unwrap();
    let said = "every probe after an iteration rang the alarm for over-optimisation: the start is the result";
    assert!(log.contains(said), "{log}");
    let run = fs_err::read_to_string(inputs.output.join("run.json")).unwrap();
    let run: serde_json::Value = serde_json::from_str(&run).unwrap();
    assert_eq!(run["counts"]["selected_iteration"], 0);
    let policy = adapter::load(&inputs.output.join("adapter"), "p", &model.config, Device::Cpu);
    let is_b = |name: &str| name.contains("lora_B");
    for (_, b) in policy.unwrap().adapter.parameters().iter().filter(|(name, _)| is_b(name)) {
        assert_eq!(b.abs().max().double_value(&[]), 0.0);
    }
}

#[test]
fn a_beginning_computed_once_changes_no_bit() {
    let model = tiny_model();
    let _guard = tch::no_grad_guard();
    let (adapter, _) = crate::common::random_reward(&model, 4);
    let conversations: Vec<Conversation> = (0..11)
        .map(|i| {
            let own = 3 + i % 4;
            let token_ids: Vec<i64> =
                (10..30).chain((0..2 + own).map(|k| 40 + (13 * i + 7 * k) % 400)).collect();
            let reply = Reply { tokens: 22..token_ids.len(), finish_reason: FinishReason::Stop };
            Conversation {
                prompt: 0,
                token_ids,
                n_prompt: 22,
                replies: vec![reply],
                sampled_logprob: Vec::new(),
                messages: Vec::new(),
            }
        })
        .collect();
    let logprobs = |budget| -> Vec<f32> {
        let all = own_logprobs(&model.decoder, Some(&adapter), &conversations, 0.7, budget);
        all.unwrap().try_into().unwrap()
    };
    assert_eq!(logprobs(4096), logprobs(1)); // one by one nothing is shared
}

#[test]
fn the_policy_waits_while_the_critic_warms_up() {
    let dir = tempfile::tempdir().unwrap();
    for value in ["trunk", "adapter"] {
        let config = config(&[
            "--programmed-reward",
            "letter:e",
            "--learning-rate",
            "1e-2",
            "--value-warmup",
            "2",
            "--value-learning-rate",
            "1e-2",
            "--iterations",
            "4",
            "--schedule",
            "constant",
            "--value",
            value,
        ]);
        let inputs = by_rule(dir.path(), value);
        train(&config, &inputs).unwrap();
        let kl = metric(&inputs.output, "objective/kl");
        assert_eq!(kl[..3], [0.0; 3]); // measured before an iteration's steps: the third is the first that steps
        assert_ne!(kl[3], 0.0);
        let norms = metric(&inputs.output, "policy_grad_norm");
        assert_eq!(norms[..2], [0.0, 0.0]);
        assert!(norms[2] > 0.0);
        let values = metric(&inputs.output, "value_mean");
        assert_eq!(values[0], 0.0);
        assert_ne!(values[1], 0.0);
    }
}

#[test]
fn a_huge_kl_coefficient_keeps_the_policy() {
    let dir = tempfile::tempdir().unwrap();
    let mut last = Vec::new();
    for (output, kl_coef) in [("free", "0"), ("held", "100")] {
        let config = config(&[
            "--programmed-reward",
            "length:3",
            "--rollout",
            "answer",
            "--learning-rate",
            "1e-3",
            "--iterations",
            "10",
            "--schedule",
            "constant",
            "--rollout-size",
            "16",
            "--kl-coef",
            kl_coef,
            "--probe-every",
            "0",
            "--target-kl",
            "0",
        ]);
        let inputs = by_rule(dir.path(), output);
        train(&config, &inputs).unwrap();
        last.push(metric(&inputs.output, "probe/kl").pop().unwrap().abs());
    }
    assert!(last[0] > 10.0 * last[1], "{last:?}");
}

#[test]
fn the_mean_score_rises_under_a_length_reward() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(&[
        "--programmed-reward",
        "length:4",
        "--rollout",
        "answer",
        "--learning-rate",
        "4e-3",
        "--value-learning-rate",
        "1e-2",
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
    // Standardised on the reference: 0 is where it starts, 1 is one standard deviation above.
    let scores = metric(&inputs.output, "z_mean");
    let last = arete_records::stats::mean(&scores[11..]);
    assert!(last > 0.8, "{scores:?}");
    let run = arete_stage::run::RunJson::read(&inputs.output).unwrap();
    assert!(run.counts["probe_z_after"].as_f64() > run.counts["probe_z_before"].as_f64());
    assert!(inputs.output.join("merged/model.safetensors").exists());
    // Complete: a second call does nothing.
    let before = crate::common::adapter_sum(&inputs.output);
    train(&config, &inputs).unwrap();
    assert_eq!(before, crate::common::adapter_sum(&inputs.output));
}
