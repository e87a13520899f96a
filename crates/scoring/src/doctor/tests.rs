//! The diagnosis of runs made by hand.

use super::*;
use std::collections::BTreeMap;

use arete_records::rows::{ConversationRow, JudgementRow, TurnRow};
use arete_records::stats::Interval;
use arete_records::{FinishReason, Split, Virtue};

use crate::coherence::Coherence;
use arete_chain::{NullRulers, Ruled};
use arete_records::Message;
use arete_stage::run::RunJson;

use crate::run_files::{Metrics, MetricsLine, Reward, Scoring, StageRecord};
use crate::summary::{AtEqualLength, Change, Difference, ModelSummary, Scope, Summary};

/// 200 pairs, the first so many of which a reward model tells right, and of which the shorter reply is right.
fn evaluation(n_right: usize, n_shorter: usize) -> Evaluation {
    let ruled = |idx: usize| {
        let side = |text| [Message::user(format!("{idx}")), Message::assistant(text)];
        let [better, worse] = if idx < n_shorter { ["x", "xx"] } else { ["xx", "x"] };
        Ruled::of(&side(better), &side(worse))
    };
    let ruled: Vec<Ruled> = (0..200).map(ruled).collect();
    let right: Vec<f64> = (0..200).map(|idx| f64::from(u8::from(idx < n_right))).collect();
    Evaluation {
        split: "test".to_owned(),
        n: 200,
        accuracy: arete_chain::rulers::share(&right),
        null_rulers: NullRulers::beside(&ruled, &right),
        expected_calibration_error: 0.1,
        calibration: Vec::new(),
        pearson_score_length: None,
        mean_margin: 0.0,
    }
}

#[test]
fn an_empty_run_knows_nothing() {
    let findings = diagnose(&RunFiles::default());
    assert_eq!(findings.len(), 7);
    assert!(findings.iter().all(|f| f.grade == Grade::Unknown && !f.advice.is_empty()));
}

#[test]
fn a_reward_model_must_beat_every_rule_that_knows_nothing() {
    let find = |evaluation| {
        let mut run = RunFiles::default();
        let reward = Reward { evaluation: Some(evaluation), ..Reward::default() };
        run.rewards.insert(Aspect::ACTION, reward);
        reward_accuracy(&run)
    };
    let grade = |evaluation| find(evaluation).grade;
    // 70 % where the shorter reply is right in 60 %: a lead of 10 points, beyond its interval.
    assert_eq!(grade(evaluation(140, 120)), Grade::Ok);
    assert_eq!(grade(evaluation(121, 120)), Grade::Warn);
    assert_eq!(grade(evaluation(119, 120)), Grade::Bad);
    // Where the longer reply is right in 60 %, that is the rule to beat.
    let found = find(evaluation(110, 80));
    assert_eq!(found.grade, Grade::Bad);
    assert!(
        found.found.contains("55.0 % of 200 test pairs (best null ruler: longer 60.0 %"),
        "{found:?}"
    );
    // Figures of older versions stand beside nothing.
    let old = Evaluation { null_rulers: None, ..evaluation(140, 120) };
    assert!(find(old).found.contains("without null rulers"));
}

#[test]
fn f1_a_reward_model_without_a_reading_rule_is_named_and_not_used() {
    let mut run = RunFiles::default();
    let unreadable = Some("reward/action: reading rule: none".to_owned());
    let evaluation = Some(evaluation(200, 0));
    run.rewards.insert(Aspect::ACTION, Reward { evaluation, unreadable, ..Reward::default() });
    let found = reward_accuracy(&run);
    assert_eq!(found.grade, Grade::Bad);
    assert!(found.found.contains("reading rule") && found.advice.contains("train the reward"));
    let outdated_scoring = Some("scoring/summary.json: made by an older version".to_owned());
    let found = super::score(&RunFiles { outdated_scoring, ..RunFiles::default() });
    assert_eq!(found.grade, Grade::Bad);
    assert!(found.advice.contains("score again"), "{found:?}");
}

#[test]
fn a_beginning_that_cannot_be_is_named() {
    let find = |kl: f64, difference: f64, spread: f64| {
        let line = |step, values: [(&str, f64); 3]| MetricsLine {
            step,
            values: values.map(|(name, value)| (name.to_owned(), value)).into(),
        };
        let first = [
            ("objective/kl", kl),
            ("sampler_trainer_difference", 0.0),
            ("score_spread_action", spread),
        ];
        let later = [
            ("objective/kl", 9.0),
            ("sampler_trainer_difference", difference),
            ("score_spread_action", 3.0),
        ];
        let ppo = Some(Metrics { lines: vec![line(1, first), line(2, later)] });
        beginning(&RunFiles { ppo, ..RunFiles::default() })
    };
    assert_eq!(find(0.0, 0.0005, 1.2).grade, Grade::Ok);
    // The figures of a run on AMX, before rows were equal: KL −0.187, differences of 0.29 to 0.35.
    let apart = find(-0.187, 0.35, 1.0);
    assert_eq!(apart.grade, Grade::Bad);
    assert!(apart.found.contains("0.3500 at most") && apart.advice.contains("AMX"), "{apart:?}");
    let moved = find(-0.187, 0.0, 1.0);
    assert_eq!(moved.grade, Grade::Bad);
    assert!(moved.advice.contains("should be 0"));
    // F2: standardised by samples of another model, the spread was a quarter.
    let narrow = find(0.0, 0.0, 0.25);
    assert_eq!(narrow.grade, Grade::Warn);
    assert!(narrow.found.contains("action 0.250"), "{narrow:?}");
    assert_eq!(beginning(&RunFiles::default()).grade, Grade::Unknown);
}

/// 200 conversations of which so many were cut in one turn.
fn cut(aspect: Aspect, n_cut: usize) -> RunFiles {
    let row = |idx: usize| {
        let reason = |own: Aspect| match own == aspect && idx < n_cut {
            true => FinishReason::Length,
            false => FinishReason::Stop,
        };
        ConversationRow {
            prompt_id: idx.to_string(),
            split: Split::Train,
            sample: 0,
            persona: None,
            messages: Vec::new(),
            turns: Aspect::SHIPPED
                .map(|aspect| TurnRow {
                    aspect,
                    text: String::new(),
                    finish_reason: reason(aspect),
                    n_tokens: 1,
                })
                .into(),
            seed: 0,
        }
    };
    let conversations = Some((0..200).map(row).collect());
    RunFiles { conversations, ..RunFiles::default() }
}

#[test]
fn one_cut_turn_is_enough_to_see_truncation() {
    for aspect in Aspect::SHIPPED {
        let grade = |n_cut| truncation(&cut(aspect, n_cut)).grade;
        assert_eq!([grade(0), grade(10)], [Grade::Ok, Grade::Ok]); // 5 %
        assert_eq!([grade(11), grade(50)], [Grade::Warn, Grade::Warn]); // 25 %
        assert_eq!([grade(51), grade(200)], [Grade::Bad, Grade::Bad]);
    }
    let finding = truncation(&cut(Aspect::MOTIVATION, 51));
    assert!(finding.found.starts_with("action 0.0 %, motivation 25.5 %"), "{finding:?}");
    assert!(finding.advice.contains("raise max_new_tokens"));
    assert_eq!(truncation(&cut(Aspect::MOTIVATION, 0)).advice, "");
}

#[test]
fn a_judge_of_one_order_is_seen_to_follow_the_place() {
    let grade = |n_first: usize| {
        let verdict = |idx: usize| JudgementRow {
            prompt_id: idx.to_string(),
            split: Split::Train,
            aspect: Aspect::ACTION,
            virtue: Virtue::HONESTY,
            method: "pairwise-text".to_owned(),
            judge: "j".to_owned(),
            p_ab: Some(if idx < n_first { 1.0 } else { 0.0 }),
            p_ba: None,
            p_sample0: None,
            vote: Some(0),
        };
        let judgements = Some((0..100).map(verdict).collect());
        swap_consistency(&RunFiles { judgements, ..RunFiles::default() })
    };
    assert_eq!([grade(50).grade, grade(60).grade], [Grade::Ok, Grade::Ok]);
    assert_eq!([grade(65).grade, grade(35).grade], [Grade::Warn, Grade::Warn]);
    assert_eq!([grade(94).grade, grade(6).grade], [Grade::Bad, Grade::Bad]);
    assert!(grade(94).found.ends_with("the first shown preferred 94.0 %"));
    assert!(grade(94).advice.contains("orders = \"both\""));
}

#[test]
fn a_judge_that_follows_the_place_is_seen() {
    // Of 100 verdicts so many are the same in both orders; the others prefer what is shown first.
    let grade = |n_same: usize| {
        let verdict = |idx: usize| JudgementRow {
            prompt_id: idx.to_string(),
            split: Split::Train,
            aspect: Aspect::ACTION,
            virtue: Virtue::HONESTY,
            method: "pairwise-logits".to_owned(),
            judge: "j".to_owned(),
            p_ab: Some(0.9),
            p_ba: Some(if idx < n_same { 0.1 } else { 0.9 }),
            p_sample0: Some(0.9),
            vote: Some(0),
        };
        let judgements = Some((0..100).map(verdict).collect());
        swap_consistency(&RunFiles { judgements, ..RunFiles::default() })
    };
    assert_eq!([grade(100).grade, grade(75).grade], [Grade::Ok, Grade::Ok]);
    assert_eq!([grade(74).grade, grade(60).grade], [Grade::Warn, Grade::Warn]);
    assert_eq!([grade(59).grade, grade(0).grade], [Grade::Bad, Grade::Bad]);
    // Sample 0 first: preferred 100 times; sample 1 first: 41 times; 141 of 200.
    assert!(grade(59).found.ends_with("the first shown 70.5 %"), "{}", grade(59).found);
    assert!(grade(59).advice.contains("stronger judge"));
}

#[test]
fn labels_that_no_judge_gave_are_no_sign_of_a_good_judge() {
    let found = swap_consistency(&RunFiles { by_construction: true, ..RunFiles::default() });
    assert_eq!(found.grade, Grade::Unknown);
    assert!(found.found.contains("no judge was asked"), "{found:?}");
    // A method without orders shows nothing of places.
    let verdict = JudgementRow {
        prompt_id: "0".to_owned(),
        split: Split::Train,
        aspect: Aspect::ACTION,
        virtue: Virtue::HONESTY,
        method: "likelihood".to_owned(),
        judge: "j".to_owned(),
        p_ab: None,
        p_ba: None,
        p_sample0: Some(0.9),
        vote: Some(0),
    };
    let judgements = Some(vec![verdict]);
    let found = swap_consistency(&RunFiles { judgements, ..RunFiles::default() });
    assert_eq!(found.grade, Grade::Unknown);
    assert!(found.found.contains("likelihood") && found.advice.contains("calibrate"), "{found:?}");
}

#[test]
fn samples_that_the_ensemble_cannot_tell_apart_are_seen() {
    let grade = |gain| {
        let best = BestOf {
            n: 16,
            n_prompts: 10,
            from: "a test".to_owned(),
            mean: 0.0,
            curve: vec![(1, 0.0), (16, gain)],
            gain: Interval { estimate: gain, low: gain, high: gain },
            gain_by_aspect: BTreeMap::new(),
            yardstick_gain: None,
        };
        let finding = best_of(&RunFiles { best_of: Some(best), ..RunFiles::default() });
        assert_eq!(finding.step, "best of 16");
        finding.grade
    };
    assert_eq!([grade(1.5), grade(0.5)], [Grade::Ok, Grade::Ok]);
    assert_eq!([grade(0.499), grade(0.2)], [Grade::Warn, Grade::Warn]);
    assert_eq!([grade(0.199), grade(0.0)], [Grade::Bad, Grade::Bad]);
}

#[test]
fn statistics_that_ppo_found_not_to_fit_are_told() {
    let run = |counts: serde_json::Value| {
        let record: RunJson = serde_json::from_value(serde_json::json!({
            "stage": "ppo", "config": {}, "seed": 0, "inputs": {}, "versions": {}, "device": "cpu", "dtype": "f32",
            "counts": counts, "fingerprint": "", "outputs": {},
        }))
        .unwrap();
        let stage = StageRecord { dir: "ppo".to_owned(), run: Some(record), begun: true };
        RunFiles { stages: vec![stage], ..RunFiles::default() }
    };
    let of = |fits: bool| {
        let action = serde_json::json!({"z": 2.5, "limit": 0.5, "spread": 1.0, "fits": fits});
        run(serde_json::json!({ "standardisation": { "action": action } }))
    };
    let found = diagnose(&of(false));
    assert_eq!((found[4].step.as_str(), found[4].grade), ("score statistics", Grade::Warn));
    assert!(found[4].found.contains("action +2.500 (limit 0.500), spread 1.000"), "{found:?}");
    assert_eq!(diagnose(&of(true))[4].grade, Grade::Ok);
    assert_eq!(diagnose(&run(serde_json::json!({}))).len(), 7);
}

#[test]
fn a_policy_that_stayed_is_seen() {
    let find = |kl| {
        let values = [("objective/kl".to_owned(), kl)].into();
        let ppo = Some(Metrics { lines: vec![MetricsLine { step: 1, values }] });
        super::kl(&RunFiles { ppo, ..RunFiles::default() })
    };
    let grade = |kl| find(kl).grade;
    assert_eq!([grade(-0.01), grade(0.0), grade(0.049)], [Grade::Bad; 3]);
    assert_eq!([grade(0.05), grade(0.499)], [Grade::Warn; 2]);
    assert_eq!([grade(0.5), grade(6.0), grade(30.0)], [Grade::Ok; 3]);
    assert_eq!([grade(30.1), grade(80.0)], [Grade::Warn; 2]);
    assert!(find(0.0).advice.contains("raise learning_rate"));
    assert!(find(80.0).advice.contains("raise kl_coef"));
}

/// Two models whose Score and mean differ so.
fn scored(score: [f64; 3], mean: [f64; 3]) -> RunFiles {
    let change = |[estimate, low, high]: [f64; 3]| Change {
        interval: Interval { estimate, low, high },
        standard_error: 0.1,
        minimum_detectable_effect: 0.28,
    };
    let model = |name: &str| ModelSummary {
        name: name.to_owned(),
        source: name.to_owned(),
        scores: Vec::new(),
        coherence: Coherence::default(),
        coherence_by_aspect: BTreeMap::new(),
        retokenised: false,
        kl: None,
        preference_accuracy: None,
    };
    let difference = Difference {
        first: "sft".to_owned(),
        last: "final".to_owned(),
        scale: Scale::Standardised,
        scope: Scope::All,
        score: change(score),
        mean: change(mean),
        equal_length: AtEqualLength::default(),
        win_rate: AtEqualLength::default(),
        circular: false,
        wins: 30,
        ties: 5,
        losses: 15,
        sign_test: 0.04,
    };
    let summary = Summary {
        n_prompts: 50,
        models: vec![model("original"), model("sft"), model("final"), model("extra")],
        differences: vec![difference],
        ..Summary::default()
    };
    let scoring = Some(Scoring { summary, scores: Vec::new(), replies: Vec::new() });
    RunFiles { scoring, ..RunFiles::default() }
}

#[test]
fn a_score_counts_where_its_interval_excludes_zero() {
    let find = |score, mean| super::score(&scored(score, mean));
    let (up, down, open) = ([0.3, 0.1, 0.5], [-0.3, -0.5, -0.1], [0.14, -0.1, 0.4]);
    let good = find(up, up);
    assert_eq!((good.grade, good.advice.as_str()), (Grade::Ok, ""));
    assert!(good.found.starts_with("final − sft: +0.300") && good.found.contains("30/5/15"));
    // The spread fell, the mean did not move.
    let narrower = find(up, open);
    assert_eq!(narrower.grade, Grade::Warn);
    assert!(narrower.advice.contains("only the spread fell"));
    assert_eq!(find(down, down).grade, Grade::Bad);
    assert!(find(down, open).advice.contains("got worse"));
    // Twice the difference would be seen with 50 prompts, so this one with four times as many.
    let undecided = find(open, open);
    assert_eq!(undecided.grade, Grade::Warn);
    assert!(undecided.advice.ends_with("200 would show it"), "{}", undecided.advice);
    let nothing = find([-0.01, -0.2, 0.2], open);
    assert!(nothing.advice.contains("mend the steps above first"), "{}", nothing.advice);
}

#[test]
fn findings_are_lines_and_the_first_bad_one_leads() {
    let findings = [
        finding("a", Grade::Ok, "fine".to_owned(), "unused"),
        finding("bb", Grade::Bad, "broken".to_owned(), "mend it"),
    ];
    assert_eq!(
        text(&findings),
        "ok    a   fine\nbad   bb  broken\n          → mend it\n\nBegin with: bb.\n"
    );
}
