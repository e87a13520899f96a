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
use crate::run_files::{Evaluation, RunFiles};
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
/// Largest difference of a token's log-probability between sampler and trainer, nats, in bf16 and in f32: PPO's own limits.
const SAMPLER_TRAINER: [f64; 2] = [1e-3, 1e-4];
/// KL of the first iteration, nats a conversation, above which policy and reference cannot be the same weights.
const FIRST_KL: f64 = 1e-2;
/// Within which the spread of standardised scores lies where they are standardised by such replies.
const SPREAD: std::ops::RangeInclusive<f64> = 0.6..=1.6;
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
    let mut findings = vec![
        truncation(run),
        swap_consistency(run),
        reward_accuracy(run),
        best_of(run),
        beginning(run),
        kl(run),
        score(run),
    ];
    // After the best of n: what is standardised wrongly makes that figure, and what comes after it, mean something else.
    findings.splice(4..4, standardisation(run));
    findings
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
    if run.by_construction {
        let found = "no judge was asked: the pairs are labelled by construction";
        return unknown(
            step,
            found,
            "whether such labels are right shows in what a yardstick says of the models",
        );
    }
    let Some(rows) = run.judgements.as_ref().filter(|rows| !rows.is_empty()) else {
        return unknown(step, "no judgements", "run the stage `preferences`");
    };
    let verdicts = Verdicts::of(rows.iter());
    let Some(first) = verdicts.first_rate() else {
        let found = format!("judged by {}, which has no orders", rows[0].method);
        let advice = "`arete-curation calibrate` says how often it agrees with labelled pairs";
        return unknown(step, &found, advice);
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
    for (aspect, Evaluation { accuracy, null_rulers, split, n, .. }) in &evaluations {
        let Some(null_rulers) = null_rulers else {
            let found = format!("{aspect}: an accuracy without null rulers, by an older version");
            let advice = "train the reward models again (`make reward`): their data stays";
            return finding(step, Grade::Warn, found, advice);
        };
        worst = worst.max(if null_rulers.is_beaten() {
            Grade::Ok
        } else if accuracy.estimate > null_rulers.best_accuracy() {
            Grade::Warn
        } else {
            Grade::Bad
        });
        let found = percent(accuracy.estimate);
        parts.push(format!("{aspect} {found} of {n} {split} pairs ({})", null_rulers.words()));
    }
    finding(
        step,
        worst,
        parts.join(", "),
        "more pairs, a LoRA-sized learning rate (1e-4) and enough steps, cleaner labels; a lead that excludes zero \
         needs more held-out pairs too",
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

/// PPO's own check of the score statistics against its first rollout; none for a run that has not made it.
fn standardisation(run: &RunFiles) -> Option<Finding> {
    let found = run.stage("ppo")?.counts.get("standardisation")?.as_object()?;
    if found.is_empty() {
        return None;
    }
    let number_of = |of: &serde_json::Value, key: &str| of[key].as_f64().unwrap_or(f64::NAN);
    let fits = found.values().all(|of| of["fits"] == true);
    let describe = |(name, of): (&String, &serde_json::Value)| {
        format!(
            "{name} {} (limit {}), spread {}",
            number(number_of(of, "z"), true),
            number(number_of(of, "limit"), false),
            number(number_of(of, "spread"), false)
        )
    };
    let parts: Vec<String> = found.iter().map(describe).collect();
    Some(finding(
        "score statistics",
        if fits { Grade::Ok } else { Grade::Warn },
        format!("at PPO's start {}", parts.join(", ")),
        "the statistics are of other replies than PPO starts from, and kl_coef and missing_eos_penalty mean something else: train \
         the reward models on this base's conversations, or remove score_stats.json to have them taken at the start",
    ))
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

/// The first iteration of PPO, where policy and reference are the same weights: the sampler must agree with the trainer, the KL
/// be nothing, and scores have the mean and the spread that they are standardised to.
fn beginning(run: &RunFiles) -> Finding {
    let step = "PPO's beginning";
    let first = |name: &str| {
        let curve = run.ppo.as_ref().map(|ppo| ppo.curve(&[name])).unwrap_or_default();
        curve.first().map(|(_, value)| *value)
    };
    let Some(kl) = first("objective/kl") else {
        return unknown(step, "no PPO metrics", "run the stage `ppo`");
    };
    let difference = run.ppo.as_ref().map_or(0.0, |ppo| {
        let curve = ppo.curve(&["sampler_trainer_difference"]);
        curve.into_iter().map(|(_, value)| value).fold(0.0, f64::max)
    });
    let spread = run.names().into_iter().filter_map(|aspect| {
        let wide = first(&format!("score_spread_{aspect}"))?;
        (!SPREAD.contains(&wide)).then(|| format!("{aspect} {}", number(wide, false)))
    });
    let spread: Vec<String> = spread.collect();
    let is_f32 = run.stage("ppo").is_some_and(|record| record.dtype == "f32");
    let limit = SAMPLER_TRAINER[usize::from(is_f32)];
    let found = format!(
        "KL {} nats a conversation, sampler and trainer differ by {difference:.4} at most (limit {limit}){}",
        number(kl, false),
        if spread.is_empty() {
            String::new()
        } else {
            format!("; spread of scores {}", spread.join(", "))
        },
    );
    if difference > limit {
        let advice = "rows depend on their neighbours here: the policy is trained on other probabilities than it sampled by; try \
                      --dtype f32, one thread, or a processor level without AMX (`ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16`)";
        return finding(step, Grade::Bad, found, advice);
    }
    if kl.abs() > FIRST_KL {
        let advice = "policy and reference are the same weights there, so it should be 0: is the reference's adapter off, and are \
                      both read at one temperature?";
        return finding(step, Grade::Bad, found, advice);
    }
    let advice = "scores are standardised by other replies than PPO starts from (1 is right): train the reward models again";
    let grade = if spread.is_empty() { Grade::Ok } else { Grade::Warn };
    finding(step, grade, found, advice)
}

fn score(run: &RunFiles) -> Finding {
    let step = "Score";
    if let Some(why) = &run.outdated_scoring {
        return finding(step, Grade::Bad, why.clone(), "score again (`make scoring`)");
    }
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
mod tests;
