//! What the page's templates read: numbers and names, nothing formatted.

use std::collections::BTreeMap;

use arete_chain::NullRulers;
use arete_chain::verdicts::virtues_of;
use arete_records::rows::{JudgementRow, PreferenceRow};
use arete_records::stats::{self, Interval};
use arete_records::{Aspect, Split, Virtue};
use arete_stage::metrics;
use serde::Serialize;
use serde_json::Value;

use super::drawing::Chart;
use super::made::Made;
use super::samples::{self, Replies};
use crate::coherence::Coherence;
use crate::doctor::{self, Finding};
use crate::front::Front;
use crate::gold::{Gold, GoldPoint};
use crate::judge::{Verdicts, kappa};
use crate::run_files::{
    Evaluation, JudgeMethod, JudgeOfVirtue, RolloutReply, RunFiles, StageRecord, rollout_reply,
};
use crate::summary::{Difference, ModelSummary, Scale, Scope, ScoreOf, Summary};
use crate::table::{percent, perplexity, primary, verdict};

/// The whole page; a part that is none was not run.
#[derive(Serialize)]
pub(crate) struct Page<'a> {
    name: &'a str,
    /// Date, commit, duration, model, machine.
    made: Made,
    /// The round that its stages are of, if the run has rounds.
    round: Option<u64>,
    aspects: Vec<Aspect>,
    /// Number of virtues that judged.
    n_virtues: usize,
    /// One sentence on what the run changed.
    verdict: Option<String>,
    /// What came of the endpoint that the recipe named.
    primary: Option<String>,
    /// The outcome against the first model.
    headline: Option<&'a Difference>,
    accuracies: Vec<f64>,
    /// The highest of the accuracies that null rulers reach beside them.
    best_null: Option<f64>,
    end_kl: Option<f64>,
    /// Mean over the aspects of the parts that the token limit cut.
    cut: Option<f64>,
    stages: Vec<Stage<'a>>,
    charts: BTreeMap<&'static str, Vec<Drawing<'a>>>,
    score: Option<Score<'a>>,
    /// What policies gained in two virtues.
    front: Option<&'a Front>,
    /// Of each arm of the gold protocol the point that gained most.
    gold: Vec<&'a GoldPoint>,
    findings: Vec<Finding>,
    replies: Option<Replies<'a>>,
    ppo: Option<Ppo>,
    rewards: Vec<Reward<'a>>,
    judge: Option<Judge<'a>>,
    /// Whether nobody was asked, and how the samples differ that were labelled so.
    by_construction: bool,
    personas: Option<&'a str>,
    calibration: Option<Calibration<'a>>,
    counts: Vec<Counts>,
    lengths: Vec<Lengths>,
    preferences: Vec<Preferences>,
    recipe: Option<&'a str>,
    records: Vec<Record<'a>>,
}

#[derive(Serialize)]
struct Stage<'a> {
    dir: &'a str,
    /// `done`, `begun` or `absent`.
    state: &'static str,
}

#[derive(Serialize)]
struct Drawing<'a> {
    name: &'a str,
    title: &'a str,
    caption: &'a str,
    svg: String,
}

#[derive(Serialize)]
struct Score<'a> {
    summary: &'a Summary,
    /// What there are scores of: turns, virtues.
    aspects: Vec<Aspect>,
    /// By scale, then by model.
    scores: Vec<ModelScore<'a>>,
    models: Vec<Model<'a>>,
    /// Of all scores.
    differences: Vec<DifferenceOf<'a>>,
    by_aspect: Vec<DifferenceOf<'a>>,
}

#[derive(Serialize)]
struct ModelScore<'a> {
    model: &'a str,
    scale: Scale,
    all: &'a ScoreOf,
    aspects: Vec<Option<f64>>,
}

#[derive(Serialize)]
struct Model<'a> {
    summary: &'a ModelSummary,
    /// The null rulers beside its accuracy on labelled pairs.
    pairs_beside: Option<String>,
    perplexity: Option<String>,
}

#[derive(Serialize)]
struct DifferenceOf<'a> {
    difference: &'a Difference,
    /// Whether the intervals of Score and mean exclude no difference.
    clear: [bool; 2],
}

#[derive(Serialize)]
struct Ppo {
    selected_iteration: Option<u64>,
    /// How far the ensemble's mean on validation prompts moved.
    probe: Option<Interval>,
    /// Whether the weights are those that did best on these prompts.
    selected_by_probe: bool,
}

#[derive(Serialize)]
struct Reward<'a> {
    aspect: Aspect,
    evaluation: Option<&'a Evaluation>,
    /// `shorter 61.0 %`.
    best_null: Option<String>,
}

#[derive(Serialize)]
struct Judge<'a> {
    n: usize,
    judge: &'a str,
    method: &'a str,
    /// Whether any pair was shown in an order.
    with_orders: bool,
    /// Whether any was shown in both.
    with_both: bool,
    votes: Vec<Votes>,
    /// Fleiss' κ of the virtues.
    kappa: Vec<(Aspect, f64)>,
}

#[derive(Serialize)]
struct Calibration<'a> {
    table: Vec<JudgingMethod<'a>>,
    /// The judge, a virtue at a time.
    virtues: &'a [JudgeOfVirtue],
    reason: &'a str,
}

#[derive(Serialize)]
struct JudgingMethod<'a> {
    method: &'a JudgeMethod,
    /// The null rulers beside its agreement.
    beside: Option<String>,
}

#[derive(Serialize)]
struct Votes {
    aspect: Aspect,
    /// None for all together.
    virtue: Option<Virtue>,
    n: usize,
    /// For sample 0, for sample 1, for neither.
    votes: Vec<usize>,
    first_rate: Option<f64>,
    consistency: Option<f64>,
    abstained: usize,
}

/// Rows of a file: all, and those of each split.
#[derive(Serialize)]
struct Counts {
    file: &'static str,
    aspect: Option<Aspect>,
    n: [Option<usize>; 4],
}

/// Parts cut off and mean tokens, by aspect.
#[derive(Default, Serialize)]
struct Lengths {
    /// `conversations`, `first`, `last` or `test`.
    of: &'static str,
    iteration: Option<i32>,
    model: Option<String>,
    cut: Vec<Option<f64>>,
    tokens: Vec<Option<f64>>,
}

#[derive(Serialize)]
struct Preferences {
    aspect: Aspect,
    /// Judged, pairs, ties, and those dropped: cut off, without a full sentence, identical.
    counts: Vec<Option<u64>>,
    /// Part of the pairs in which a reply was cut.
    cut: Option<f64>,
}

#[derive(Serialize)]
struct Record<'a> {
    dir: &'a str,
    /// None of a stage that is not complete.
    run: Option<Recorded<'a>>,
}

#[derive(Serialize)]
struct Recorded<'a> {
    device: &'a str,
    dtype: &'a str,
    seed: u64,
    fingerprint: &'a str,
    settings: Vec<(String, String)>,
    counts: Vec<(String, String)>,
    inputs: Vec<(&'a str, &'a str)>,
    /// Name, SHA-256 and bytes.
    outputs: Vec<(&'a str, &'a str, u64)>,
    versions: &'a BTreeMap<String, String>,
}

impl<'a> Page<'a> {
    /// From a run's files, with at most so many prompts side by side (0 = all).
    pub(crate) fn of(
        run: &'a RunFiles,
        charts: &'a [(&'static str, Vec<Chart>)],
        max_samples: usize,
        recipe: Option<&'a str>,
        made: Made,
    ) -> Self {
        let summary = run.scoring.as_ref().map(|scoring| &scoring.summary);
        let drawing = |chart: &'a Chart| Drawing {
            name: &chart.name,
            title: &chart.title,
            caption: &chart.caption,
            svg: chart.inline(),
        };
        let evaluations = run.rewards.iter().map(|(&aspect, reward)| {
            let evaluation = reward.evaluation.as_ref();
            let best_null = evaluation
                .and_then(|own| own.null_rulers.as_ref())
                .map(|own| format!("{} {}", own.best.name(), percent(own.best_accuracy())));
            Reward { aspect, evaluation, best_null }
        });
        let rewards: Vec<Reward<'_>> = evaluations.collect();
        let aspects = run.aspects();
        let cut: Option<Vec<f64>> = aspects.iter().map(|a| run.truncated(*a)).collect();
        Self {
            name: &run.name,
            made,
            round: run.round,
            aspects,
            n_virtues: run.judgements.iter().map(|rows| virtues_of(rows).len()).sum(),
            verdict: summary.and_then(verdict),
            primary: summary.map(|summary| primary(&summary.primary)),
            headline: summary.and_then(|summary| summary.headline(Scale::Standardised)),
            accuracies: rewards
                .iter()
                .filter_map(|reward| Some(reward.evaluation?.accuracy.estimate))
                .collect(),
            best_null: rewards
                .iter()
                .filter_map(|reward| Some(reward.evaluation?.null_rulers.as_ref()?.best_accuracy()))
                .max_by(f64::total_cmp),
            end_kl: run.end_kl(),
            cut: cut.map(|cut| stats::mean(&cut)),
            stages: run.stages.iter().filter_map(stage).collect(),
            charts: charts
                .iter()
                .map(|(id, own)| (*id, own.iter().map(drawing).collect()))
                .collect(),
            score: summary.map(score),
            front: run.front.as_ref().map(|(_, front)| front),
            gold: run.gold.iter().flat_map(Gold::best).collect(),
            findings: doctor::diagnose(run),
            replies: run
                .scoring
                .as_ref()
                .map(|scoring| samples::side_by_side(scoring, max_samples)),
            ppo: run.ppo.as_ref().map(|_| ppo(run)),
            rewards,
            judge: run
                .judgements
                .as_ref()
                .filter(|rows| !rows.is_empty())
                .map(|rows| judge(rows, &run.aspects())),
            by_construction: run.by_construction,
            personas: run
                .stage("conversations")
                .and_then(|own| own.config.get("personas")?.as_str()),
            calibration: run.calibration.as_ref().map(|own| Calibration {
                virtues: &own.virtues,
                reason: &own.recommendation.reason,
                table: own
                    .table
                    .iter()
                    .map(|method| JudgingMethod {
                        method,
                        beside: method.null_rulers.as_ref().map(NullRulers::words),
                    })
                    .collect(),
            }),
            counts: counts(run),
            lengths: lengths(run),
            preferences: preferences(run),
            recipe,
            records: run.stages.iter().filter_map(record).collect(),
        }
    }
}

/// None of an optional stage that was not run.
fn stage(stage: &StageRecord) -> Option<Stage<'_>> {
    const OPTIONAL: [&str; 3] = ["calibration", "yardstick", "best-of"];
    let state = match (&stage.run, stage.begun) {
        (Some(_), _) => "done",
        (None, true) => "begun",
        (None, false) if OPTIONAL.contains(&stage.dir.as_str()) => return None,
        (None, false) => "absent",
    };
    Some(Stage { dir: &stage.dir, state })
}

fn score(summary: &Summary) -> Score<'_> {
    let mut scores = Vec::new();
    for scale in Scale::ALL {
        for model in &summary.models {
            let Some(all) = model.score(scale, summary.widest(scale)) else { continue };
            let of = |aspect| Some(model.score(scale, Scope::Of(aspect))?.score.estimate);
            let aspects = summary.aspects().into_iter().map(of).collect();
            scores.push(ModelScore { model: &model.name, scale, all, aspects });
        }
    }
    let chosen = |holds: &dyn Fn(&Difference) -> bool| -> Vec<DifferenceOf<'_>> {
        let mut chosen: Vec<_> = summary.differences.iter().filter(|own| holds(own)).collect();
        chosen.sort_by_key(|difference| difference.scale); // stable: models keep their order
        let of = |difference: &'_ Difference| {
            [&difference.score, &difference.mean].map(|c| c.is_clear())
        };
        chosen
            .into_iter()
            .map(|difference| DifferenceOf { difference, clear: of(difference) })
            .collect()
    };
    Score {
        summary,
        aspects: summary.aspects(),
        scores,
        models: summary
            .models
            .iter()
            .map(|model| Model {
                summary: model,
                pairs_beside: model.preference_accuracy.as_ref().map(|own| own.null_rulers.words()),
                perplexity: perplexity(model),
            })
            .collect(),
        differences: chosen(&|own| own.scope == summary.widest(own.scale)),
        // Raw scores of one aspect say nothing that standardised ones do not.
        by_aspect: chosen(&|own| own.scope != summary.widest(own.scale) && own.scale != Scale::Raw),
    }
}

fn ppo(run: &RunFiles) -> Ppo {
    let count = |name: &str| run.stage("ppo")?.counts.get(name).cloned();
    Ppo {
        selected_iteration: count("selected_iteration").and_then(|at| at.as_u64()),
        probe: count("probe_z_difference").and_then(|own| serde_json::from_value(own).ok()),
        selected_by_probe: run
            .stage("ppo")
            .and_then(|record| record.config.get("select"))
            .is_some_and(|select| select == "best"),
    }
}

fn judge<'a>(rows: &'a [JudgementRow], aspects: &[Aspect]) -> Judge<'a> {
    let virtues = virtues_of(rows);
    let all = Verdicts::of(rows.iter());
    let (mut votes, mut agreement) = (Vec::new(), Vec::new());
    for &aspect in aspects {
        let own: Vec<&JudgementRow> = rows.iter().filter(|row| row.aspect == aspect).collect();
        // Of one virtue, all together are that one.
        let together = (virtues.len() > 1).then_some(None);
        for virtue in virtues.iter().copied().map(Some).chain(together) {
            let of = own.iter().filter(|row| virtue.is_none_or(|virtue| row.virtue == virtue));
            let verdicts = Verdicts::of(of.copied());
            if verdicts.n > 0 {
                votes.push(Votes {
                    aspect,
                    virtue,
                    n: verdicts.n,
                    votes: verdicts.votes.into(),
                    first_rate: verdicts.first_rate(),
                    consistency: verdicts.consistency(),
                    abstained: verdicts.abstained,
                });
            }
        }
        agreement.extend(kappa(&own).map(|kappa| (aspect, kappa)));
    }
    Judge {
        n: rows.len(),
        judge: &rows[0].judge,
        method: &rows[0].method,
        with_orders: all.seen > 0,
        with_both: all.consistency().is_some(),
        votes,
        kappa: agreement,
    }
}

fn counts(run: &RunFiles) -> Vec<Counts> {
    fn of<T>(file: &'static str, rows: Option<&Vec<T>>, split: fn(&T) -> Split) -> Counts {
        let count =
            |wanted| rows.map(|rows| rows.iter().filter(|row| split(row) == wanted).count());
        let [train, validation, test] = Split::ALL.map(count);
        Counts { file, aspect: None, n: [rows.map(Vec::len), train, validation, test] }
    }
    let mut out = vec![
        of("prompts", run.prompts.as_ref(), |row| row.split),
        of("demonstrations", run.demonstrations.as_ref(), |row| row.split),
        of("conversations", run.conversations.as_ref(), |row| row.split),
        of("judgements", run.judgements.as_ref(), |row| row.split),
    ];
    for &aspect in &run.sets {
        let own = Split::ALL.map(|split| run.preferences.get(&(aspect, split)).map(Vec::len));
        let all = own.iter().any(Option::is_some).then(|| own.iter().flatten().sum());
        let [train, validation, test] = own;
        out.push(Counts {
            file: "preferences",
            aspect: Some(aspect),
            n: [all, train, validation, test],
        });
    }
    out
}

fn lengths(run: &RunFiles) -> Vec<Lengths> {
    let mean = |values: Vec<f64>| (!values.is_empty()).then(|| stats::mean(&values));
    let aspects = run.aspects();
    let mut out = Vec::new();
    if let Some(conversations) = run.conversations.as_ref().filter(|rows| !rows.is_empty()) {
        let tokens = |aspect| {
            let own = conversations.iter().filter_map(|row| row.turn(aspect));
            mean(own.map(|turn| f64::from(turn.n_tokens)).collect())
        };
        out.push(Lengths {
            of: "conversations",
            cut: aspects.iter().map(|&aspect| run.truncated(aspect)).collect(),
            tokens: aspects.iter().map(|&aspect| tokens(aspect)).collect(),
            ..Lengths::default()
        });
    }
    if let (Some(first), Some(last)) = (run.rollouts.first(), run.rollouts.last()) {
        for (of, iteration) in [("first", first.iteration), ("last", last.iteration)] {
            let of_replies = |value: fn(RolloutReply) -> Option<f64>| {
                let of = |&aspect: &Aspect| {
                    let rows = run.rollouts.iter().filter(|row| row.iteration == iteration);
                    mean(rows.filter_map(|row| value(rollout_reply(row, aspect))).collect())
                };
                aspects.iter().map(of).collect()
            };
            out.push(Lengths {
                of,
                iteration: Some(iteration),
                cut: of_replies(|reply| reply.truncated),
                tokens: of_replies(|reply| reply.n_tokens),
                ..Lengths::default()
            });
        }
    }
    for model in run.scoring.iter().flat_map(|scoring| &scoring.summary.models) {
        let own = |value: fn(&Coherence) -> f64| {
            let of = |aspect| model.coherence_by_aspect.get(aspect).map(value);
            aspects.iter().map(of).collect()
        };
        out.push(Lengths {
            of: "test",
            model: Some(model.name.clone()),
            cut: own(|own| own.truncated_rate),
            tokens: own(|own| own.mean_tokens),
            ..Lengths::default()
        });
    }
    out
}

fn preferences(run: &RunFiles) -> Vec<Preferences> {
    let Some(stage) = run.stage("preferences") else { return Vec::new() };
    let of = |aspect: Aspect| {
        let counts = stage.counts.get(aspect.name())?;
        let names = [
            "judged",
            "pairs",
            "ties",
            "dropped_truncated",
            "dropped_untrimmable",
            "dropped_identical",
        ];
        let pairs: Vec<&PreferenceRow> = Split::ALL
            .iter()
            .filter_map(|split| run.preferences.get(&(aspect, *split)))
            .flatten()
            .collect();
        let is_cut = |pair: &&&PreferenceRow| pair.truncated_chosen || pair.truncated_rejected;
        let n_cut = pairs.iter().filter(is_cut).count();
        Some(Preferences {
            aspect,
            counts: names.map(|name| counts.get(name).and_then(Value::as_u64)).into(),
            cut: (!pairs.is_empty()).then(|| n_cut as f64 / pairs.len() as f64),
        })
    };
    run.sets.iter().copied().filter_map(of).collect()
}

/// None of a stage that was not begun.
fn record(stage: &StageRecord) -> Option<Record<'_>> {
    fn short(sum: &str) -> &str {
        sum.get(..16).unwrap_or(sum)
    }
    let Some(run) = &stage.run else {
        return stage.begun.then_some(Record { dir: &stage.dir, run: None });
    };
    let word = |(name, value): (String, Value)| {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        (name, text)
    };
    let flat = |value: &Value| metrics::flat(value).into_iter().map(word).collect();
    let outputs = run.outputs.iter().map(|(name, file)| (&**name, short(&file.sha256), file.size));
    let recorded = Recorded {
        device: &run.device,
        dtype: &run.dtype,
        seed: run.seed,
        fingerprint: short(&run.fingerprint),
        settings: flat(&run.config),
        counts: flat(&Value::Object(run.counts.clone())),
        inputs: run.inputs.iter().map(|(name, sum)| (&**name, short(sum))).collect(),
        outputs: outputs.collect(),
        versions: &run.versions,
    };
    Some(Record { dir: &stage.dir, run: Some(recorded) })
}
