//! Why is the reward flat? The questions in the order in which they should be asked, one line each.
//!
//! A later step cannot work if an earlier one fails: cut replies make poor pairs, a judge that follows the order of
//! presentation makes labels of noise, a reward model without accuracy gives PPO nothing to follow.

use std::fmt::Write as _;

use arete_records::Aspect;
use arete_records::stats::Resampling;
use serde::{Deserialize, Serialize};

use crate::best_of::BestOf;
use crate::judge::Verdicts;
use crate::run_files::RunFiles;
use crate::summary::Scale;
use crate::table::{FEW_PROMPTS, Text, interval, number, percent};

/// Truncation above which pairs suffer, and above which they are mostly noise.
const TRUNCATED: [f64; 2] = [0.05, 0.25];
/// Swap consistency below which labels suffer, and below which they are mostly noise (a coin has ½).
const CONSISTENT: [f64; 2] = [0.75, 0.6];
/// How far the share of the place shown first may lie from one half, where pairs were shown in one order only.
const ONE_SIDED: [f64; 2] = [0.1, 0.25];
/// KL (nats a conversation) below which the policy has hardly moved, and above which it has moved far (Ziegler et al. 2019
/// aim at 6 for an answer).
const KL: [f64; 3] = [0.05, 0.5, 30.0];
/// Samples of a prompt that show whether the ensemble can tell them apart.
const BEST_OF: usize = 16;

/// How a step fares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Grade {
    /// Not the cause.
    Ok,
    /// Nothing is known, for lack of files.
    Unknown,
    /// May be part of the cause.
    Warn,
    /// Enough to explain a flat reward.
    Bad,
}

impl Grade {
    /// As it is printed.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Unknown => "?",
            Self::Warn => "warn",
            Self::Bad => "bad",
        }
    }
}

/// One step of the diagnosis.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// What was looked at.
    pub step: String,
    /// How it fares.
    pub grade: Grade,
    /// The numbers.
    pub found: String,
    /// What to change; empty if it fares well.
    pub advice: String,
}

fn finding(step: &str, grade: Grade, found: String, advice: &str) -> Finding {
    let advice = if grade == Grade::Ok { "" } else { advice };
    Finding { step: step.to_owned(), grade, found, advice: advice.to_owned() }
}

fn unknown(step: &str, missing: &str, advice: &str) -> Finding {
    finding(step, Grade::Unknown, missing.to_owned(), advice)
}

/// The whole diagnosis, in order.
pub fn diagnose(run: &RunFiles) -> Vec<Finding> {
    vec![
        truncation(run),
        swap_consistency(run),
        reward_accuracy(run),
        best_of(run),
        kl(run),
        score(run),
    ]
}

/// The findings as text: one line each, what to change below.
pub fn text(findings: &[Finding]) -> String {
    let mut rows = Vec::new();
    for Finding { step, grade, found, advice } in findings {
        rows.push(vec![format!("{:<4}", grade.name()), step.clone(), found.clone()]);
        if !advice.is_empty() {
            rows.push(vec![String::new(), String::new(), format!("→ {advice}")]);
        }
    }
    let mut text = Text::default();
    text.table(3, &rows);
    let first = |grade| findings.iter().find(|finding| finding.grade == grade);
    if let Some(first) = first(Grade::Bad) {
        text.line("");
        text.line(format!("Begin with: {}.", first.step));
    } else if let Some(first) = first(Grade::Warn) {
        text.line("");
        text.line(format!(
            "Nothing is broken; the weakest step is the first to warn: {}.",
            first.step
        ));
    } else if findings.iter().all(|finding| finding.grade == Grade::Ok) {
        text.line("");
        text.line("Nothing to change.");
    }
    text.finish()
}

/// Falls with the value: `limits` = where `Warn` and `Bad` begin.
fn grade_high(value: f64, [warn, bad]: [f64; 2]) -> Grade {
    match value {
        value if value > bad => Grade::Bad,
        value if value > warn => Grade::Warn,
        _ => Grade::Ok,
    }
}

fn truncation(run: &RunFiles) -> Finding {
    let step = "replies cut off";
    let rates: Vec<(Aspect, f64)> = run
        .aspects()
        .into_iter()
        .filter_map(|aspect| Some((aspect, run.truncated(aspect)?)))
        .collect();
    if rates.is_empty() {
        return unknown(step, "no conversations", "run the stage `conversations`");
    }
    let worst = rates.iter().map(|(_, rate)| *rate).fold(0.0, f64::max);
    let grade = grade_high(worst, TRUNCATED);
    // Pairs of cut replies that are closed or left out teach no reward model to like the cut.
    let (grade, treated, advice) = match run.truncated_setting() {
        Some("trim") => (grade.min(Grade::Warn), "; trimmed to a sentence before judging", ""),
        Some("drop") => (grade.min(Grade::Warn), "; their pairs were left out", ""),
        _ => (grade, "", ", or trim or drop cut replies (truncated = \"trim\")"),
    };
    let parts: Vec<String> =
        rates.iter().map(|(aspect, rate)| format!("{aspect} {}", percent(*rate))).collect();
    finding(
        step,
        grade,
        format!("{} of the sampled conversations{treated}", parts.join(", ")),
        &format!("raise max_new_tokens, or fine-tune on demonstrations that end sooner{advice}"),
    )
}

fn swap_consistency(run: &RunFiles) -> Finding {
    let step = "judge, both orders";
    let Some(rows) = run.judgements.as_ref().filter(|rows| !rows.is_empty()) else {
        return unknown(step, "no judgements", "run the stage `preferences`");
    };
    let verdicts = Verdicts::of(rows.iter());
    let Some(first) = verdicts.first_rate() else {
        let found = format!("judged by {}, which has no orders", rows[0].method);
        return finding(step, Grade::Ok, found, "");
    };
    let Some(consistency) = verdicts.consistency() else {
        // Whether it would say the same with places changed cannot be known, but how often it names the first place can.
        let found =
            format!("each pair shown in one order, the first shown preferred {}", percent(first));
        let grade = grade_high((first - 0.5).abs(), ONE_SIDED);
        let advice = "judge both orders (orders = \"both\"); if it follows the place, a stronger judge or labels by construction";
        return finding(step, grade, found, advice);
    };
    let [warn, bad] = CONSISTENT;
    let grade = grade_high(-consistency, [-warn, -bad]);
    finding(
        step,
        grade,
        format!(
            "the same answer in both orders {}, the first shown {}",
            percent(consistency),
            percent(first)
        ),
        "take a stronger judge (--judge), another method (calibrate them on labelled pairs), or a larger tie margin",
    )
}

fn reward_accuracy(run: &RunFiles) -> Finding {
    let step = "reward models";
    let evaluations: Vec<_> = run
        .rewards
        .iter()
        .filter_map(|(aspect, reward)| Some((*aspect, reward.evaluation.as_ref()?)))
        .collect();
    // A fault of the making comes first: figures of such a model mean nothing.
    if let Some(why) = run.rewards.values().find_map(|reward| reward.unreadable.as_ref()) {
        let advice = "train the reward models again (`make reward`), then PPO and scoring";
        return finding(step, Grade::Bad, why.clone(), advice);
    }
    if evaluations.is_empty() {
        return unknown(step, "no evaluation", "run the stage `reward` with validation pairs");
    }
    let mut worst = Grade::Ok;
    let mut parts = Vec::new();
    for (aspect, evaluation) in &evaluations {
        // The rule "the shorter answer", or its opposite, whichever does better.
        let shorter = evaluation.shorter_answer.estimate;
        let baseline = shorter.max(1.0 - shorter);
        let accuracy = &evaluation.accuracy;
        worst = worst.max(if accuracy.low > baseline {
            Grade::Ok
        } else if accuracy.estimate > baseline {
            Grade::Warn
        } else {
            Grade::Bad
        });
        parts.push(format!(
            "{aspect} {} (shorter answer {}, n = {})",
            percent(accuracy.estimate),
            percent(evaluation.shorter_answer.estimate),
            evaluation.n
        ));
    }
    finding(
        step,
        worst,
        parts.join(", "),
        "more pairs, a LoRA-sized learning rate (1e-4) and enough steps, cleaner labels; an interval above the baseline needs \
         more validation pairs too",
    )
}

fn best_of(run: &RunFiles) -> Finding {
    let step = format!("best of {BEST_OF}");
    let resampling = Resampling::seeded(0);
    let best = run.best_of.clone().or_else(|| BestOf::of_rollouts(&run.rollouts, resampling));
    let Some(best) = best else {
        return unknown(&step, "not measured", "run `doctor --best-of 16`: it needs the models");
    };
    // The best of n exceeds the mean by construction; what counts is by how much of the scores' spread.
    let grade = match best.gain.estimate {
        gain if gain < 0.2 => Grade::Bad,
        gain if gain < 0.5 => Grade::Warn,
        _ => Grade::Ok,
    };
    let mut found = format!(
        "{} standardised, {} prompts of {}",
        interval(&best.gain, true),
        best.n_prompts,
        best.from
    );
    let step = format!("best of {}", best.n);
    if let Some(gain) = &best.yardstick_gain {
        let _ = write!(found, "; by the yardstick {}", interval(gain, true));
        if gain.low <= 0.0 && grade == Grade::Ok {
            let advice = "the ensemble has favourites, and the yardstick does not see that they are better: look at them, and at \
                          what the reward models were trained on";
            return finding(&step, Grade::Warn, found, advice);
        }
    }
    finding(
        &step,
        grade,
        found,
        "the ensemble hardly tells the policy's samples apart: raise the temperature, or train the reward models on pairs that \
         differ more",
    )
}

fn kl(run: &RunFiles) -> Finding {
    let step = "KL at the end";
    let Some(kl) = run.end_kl() else {
        return unknown(step, "no PPO metrics", "run the stage `ppo`");
    };
    let [still, small, far] = KL;
    let (grade, advice) = match kl {
        kl if kl < still => (
            Grade::Bad,
            "the policy has not moved: raise learning_rate or iterations, lower kl_coef",
        ),
        kl if kl < small => (
            Grade::Warn,
            "the policy has hardly moved: more iterations, a higher learning_rate or a lower kl_coef",
        ),
        kl if kl > far => (
            Grade::Warn,
            "the policy is far from its start: read its replies, raise kl_coef or set a target KL",
        ),
        _ => (Grade::Ok, ""),
    };
    finding(step, grade, format!("{} nats a conversation", number(kl, false)), advice)
}

fn score(run: &RunFiles) -> Finding {
    let step = "Score";
    let last = run.scoring.as_ref().and_then(|scoring| {
        let summary = &scoring.summary;
        Some((summary, summary.last_step(Scale::Standardised)?))
    });
    let Some((summary, difference)) = last else {
        return unknown(step, "no two models scored", "run the stage `scoring`");
    };
    let score = &difference.score;
    let found = format!(
        "{} − {}: {} standardised, {} better/same/worse",
        difference.last,
        difference.first,
        interval(&score.interval, true),
        difference.tally()
    );
    if score.is_clear() && score.interval.estimate > 0.0 && !difference.mean.is_clear() {
        let advice = format!(
            "only the spread fell, the mean moved by {}: read the replies, they may all have become alike",
            interval(&difference.mean.interval, true)
        );
        return finding(step, Grade::Warn, found, &advice);
    }
    if score.is_clear() && score.interval.estimate > 0.0 && summary.n_prompts < FEW_PROMPTS {
        let advice = format!(
            "intervals of {} prompts are too narrow to be trusted: score {FEW_PROMPTS} or more",
            summary.n_prompts
        );
        return finding(step, Grade::Warn, found, &advice);
    }
    if score.is_clear() {
        let grade = if score.interval.estimate > 0.0 { Grade::Ok } else { Grade::Bad };
        return finding(
            step,
            grade,
            found,
            "the policy got worse: lower learning_rate or raise kl_coef, and read its replies",
        );
    }
    let n = summary.n_prompts as f64;
    let effect = score.minimum_detectable_effect;
    let ratio = if score.interval.estimate == 0.0 {
        f64::INFINITY
    } else {
        (effect / score.interval.estimate).powi(2)
    };
    let advice = if ratio.is_finite() && score.interval.estimate > 0.0 && ratio * n < 100_000.0 {
        format!(
            "{n} prompts show a difference from {effect:.3} on; if it is as large as it looks, {:.0} would show it",
            (ratio * n).ceil()
        )
    } else {
        format!(
            "{n} prompts show a difference from {effect:.3} on, and there is none of that size: mend the steps above first"
        )
    };
    finding(step, Grade::Warn, found, &advice)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    use arete_records::rows::{ConversationRow, JudgementRow, TurnRow};
    use arete_records::stats::Interval;
    use arete_records::{FinishReason, Split, Virtue};

    use crate::coherence::Coherence;
    use crate::run_files::{Evaluation, Metrics, MetricsLine, Reward, Scoring};
    use crate::summary::{Change, Difference, ModelSummary, Scope, Summary};

    fn evaluation(low: f64, estimate: f64, shorter: f64) -> Evaluation {
        let interval = |estimate: f64| Interval { estimate, low, high: 1.0 };
        Evaluation {
            split: "validation".to_owned(),
            n: 100,
            accuracy: interval(estimate),
            shorter_answer: Interval { estimate: shorter, low: 0.0, high: 1.0 },
            lead_over_shorter_answer: interval(0.0),
            expected_calibration_error: 0.1,
            calibration: Vec::new(),
            pearson_score_length: None,
            mean_margin: 0.0,
        }
    }

    #[test]
    fn an_empty_run_knows_nothing() {
        let findings = diagnose(&RunFiles::default());
        assert_eq!(findings.len(), 6);
        assert!(findings.iter().all(|f| f.grade == Grade::Unknown && !f.advice.is_empty()));
    }

    #[test]
    fn a_reward_model_must_beat_the_shorter_answer() {
        let grade = |evaluation| {
            let mut run = RunFiles::default();
            let reward = Reward { evaluation: Some(evaluation), ..Reward::default() };
            run.rewards.insert(Aspect::ACTION, reward);
            reward_accuracy(&run).grade
        };
        assert_eq!(grade(evaluation(0.62, 0.7, 0.55)), Grade::Ok);
        assert_eq!(grade(evaluation(0.53, 0.6, 0.55)), Grade::Warn);
        assert_eq!(grade(evaluation(0.45, 0.54, 0.55)), Grade::Bad);
        // A baseline below a coin is a coin.
        assert_eq!(grade(evaluation(0.4, 0.49, 0.3)), Grade::Bad);
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
            preference_accuracy: None,
        };
        let difference = Difference {
            first: "sft".to_owned(),
            last: "final".to_owned(),
            scale: Scale::Standardised,
            scope: Scope::All,
            score: change(score),
            mean: change(mean),
            wins: 30,
            ties: 5,
            losses: 15,
            sign_test: 0.04,
        };
        let summary = Summary {
            n_prompts: 50,
            n_left_out: 0,
            draws: 100,
            level: 0.95,
            base: "b".to_owned(),
            yardstick: None,
            standardisation: BTreeMap::new(),
            models: vec![model("original"), model("sft"), model("final"), model("extra")],
            differences: vec![difference],
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
}
