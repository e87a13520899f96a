//! The page's sections, each from the stages it is about; a stage that was not run is said to be so.

use std::fmt::Write as _;

use arete_records::rows::JudgementRow;
use arete_records::stats::{self, Interval};
use arete_records::{Aspect, FinishReason, Split, Virtue};
use serde_json::Value;

use super::charts::{Chart, Colour, Estimate, Series};
use super::html::{Cell, escape, table};
use super::samples;
use crate::Error;
use crate::doctor::{self, Finding, Grade};
use crate::judge::{Verdicts, kappa};
use crate::run_files::{Metrics, RolloutReply, RunFiles, rollout_reply};
use crate::summary::{Change, Difference, Scale, Scope, Summary};
use crate::table::{
    RETOKENISED, bounds, interval, number, percent, perplexity, probability, verdict,
};

/// A part of the page.
#[derive(Clone, Debug)]
pub(crate) struct Section {
    pub(crate) id: &'static str,
    pub(crate) title: &'static str,
    /// A sentence below the title.
    pub(crate) lead: String,
    /// Drawn above the body.
    pub(crate) charts: Vec<Chart>,
    /// Markup.
    pub(crate) body: String,
}

impl Section {
    fn new(id: &'static str, title: &'static str) -> Self {
        Self { id, title, lead: String::new(), charts: Vec::new(), body: String::new() }
    }

    fn not_run(mut self, what: &str) -> Self {
        self.body = not_run(what);
        self
    }
}

fn not_run(what: &str) -> String {
    format!("<p class=\"absent\">{} not run.</p>", escape(what))
}

/// Every section, in the order of the page.
pub(crate) fn all(
    run: &RunFiles,
    max_samples: usize,
    recipe: Option<&str>,
) -> Result<Vec<Section>, Error> {
    Ok(vec![
        score(run)?,
        diagnosis(run),
        replies(run, max_samples),
        training(run)?,
        reward_models(run)?,
        judge(run)?,
        data(run)?,
        provenance(run, recipe),
    ])
}

const DASH: &str = "–";

fn dash(value: Option<String>) -> String {
    value.unwrap_or_else(|| DASH.to_owned())
}

/// The colour of the model at a place of the summary; the aspects have the three between.
pub(crate) fn model_colour(at: usize) -> Colour {
    const MODELS: [u8; 6] = [0, 1, 2, 6, 7, 8];
    Colour(MODELS[at % MODELS.len()])
}

fn aspect_colour(aspect: Aspect) -> Colour {
    Colour(3 + u8::try_from(aspect.index()).unwrap_or(0))
}

/// The page's head: one sentence, a few figures, the stages.
pub(crate) fn summary(run: &RunFiles) -> String {
    let mut out = String::new();
    let sentence = run.scoring.as_ref().and_then(|scoring| verdict(&scoring.summary));
    let sentence =
        sentence.unwrap_or_else(|| "The models of this run have not been scored yet.".to_owned());
    let _ = write!(out, "<p class=\"verdict\">{}</p>\n<dl class=\"figures\">", escape(&sentence));
    for (name, value, note) in figures(run) {
        let _ = write!(
            out,
            "<div><dt>{}</dt><dd>{}</dd><dd class=\"note\">{}</dd></div>",
            escape(&name),
            escape(&value),
            escape(&note)
        );
    }
    out.push_str("</dl>\n<ol class=\"stages\">");
    for stage in &run.stages {
        let (class, state) = match (&stage.run, stage.begun) {
            (Some(_), _) => ("done", "complete"),
            (None, true) => ("begun", "begun, not complete"),
            (None, false) => ("absent", "not run"),
        };
        if class == "absent"
            && matches!(stage.dir.as_str(), "calibration" | "yardstick" | "best-of")
        {
            continue; // optional
        }
        let _ = write!(out, "<li class=\"{class}\" title=\"{state}\">{}", escape(&stage.dir));
        if class != "done" {
            let _ = write!(out, " <span>{state}</span>");
        }
        out.push_str("</li>");
    }
    out.push_str("</ol>\n");
    out
}

fn figures(run: &RunFiles) -> Vec<(String, String, String)> {
    let mut out = Vec::new();
    let mut figure = |name: String, value: String, note: String| out.push((name, value, note));
    if let Some(scoring) = &run.scoring {
        let summary = &scoring.summary;
        if let Some(last) = summary.headline(Scale::Standardised) {
            figure(
                format!("{} − {}, standardised Score", last.last, last.first),
                number(last.score.interval.estimate, true),
                format!("95 % interval {}", bounds(&last.score.interval)),
            );
            figure(
                "better / same / worse".to_owned(),
                format!("{} / {} / {}", last.wins, last.ties, last.losses),
                format!(
                    "of {} test prompts, sign test p = {}",
                    summary.n_prompts,
                    probability(last.sign_test)
                ),
            );
        }
    }
    let accuracies: Vec<f64> = run
        .rewards
        .values()
        .filter_map(|reward| reward.evaluation.as_ref())
        .map(|evaluation| evaluation.accuracy.estimate)
        .collect();
    if !accuracies.is_empty() {
        let shown: Vec<String> = accuracies.iter().map(|a| format!("{:.0}", 100.0 * a)).collect();
        figure(
            "reward models' accuracy".to_owned(),
            format!("{} %", shown.join(" · ")),
            "action · motivation · consequence, on unseen pairs".to_owned(),
        );
    }
    if let Some(kl) = run.end_kl() {
        figure(
            "KL at the end".to_owned(),
            format!("{} nats", number(kl, false)),
            "from the reference, a conversation".to_owned(),
        );
    }
    let cut: Vec<f64> = Aspect::ALL.iter().filter_map(|aspect| run.truncated(*aspect)).collect();
    if cut.len() == 3 {
        figure(
            "replies cut off".to_owned(),
            percent(stats::mean(&cut)),
            "of the conversations that were judged".to_owned(),
        );
    }
    out
}

fn score(run: &RunFiles) -> Result<Section, Error> {
    let mut section = Section::new("score", "Score");
    let Some(scoring) = &run.scoring else {
        return Ok(section.not_run("Scoring was"));
    };
    let summary = &scoring.summary;
    section.lead = format!(
        "Score is the mean less half the standard deviation of all {} scores: {} test prompts, three aspects. \
         Intervals redraw the prompts {} times.",
        3 * summary.n_prompts,
        summary.n_prompts,
        summary.draws
    );
    section.charts.extend(score_charts(summary)?);
    section.charts.extend(distribution(run)?);
    let body = &mut section.body;
    body.push_str(&score_table(summary));
    body.push_str(&difference_tables(summary));
    body.push_str(&coherence_table(summary));
    let mut rows = Vec::new();
    for (aspect, how) in &summary.standardisation {
        rows.push(vec![
            Cell::text(aspect.name()),
            Cell::number(number(how.mean, false)),
            Cell::number(number(how.std, false)),
            Cell::number(how.n.to_string()),
            Cell::text(how.from.as_str()),
        ]);
    }
    let header = ["reward model", "mean", "std", "n", "from"];
    body.push_str(&table("What scores are standardised by", &header, &rows));
    Ok(section)
}

fn score_charts(summary: &Summary) -> Result<Vec<Chart>, Error> {
    let models: Vec<Estimate> = summary
        .models
        .iter()
        .enumerate()
        .filter_map(|(at, model)| {
            let score = model.score(Scale::Standardised, Scope::All)?;
            Some(Estimate {
                name: model.name.clone(),
                colour: model_colour(at),
                interval: score.score,
                reference: None,
            })
        })
        .collect();
    let mut charts = Vec::new();
    charts.extend(Chart::estimates(
        "score",
        "Standardised Score",
        "Each model's Score with its 95 % interval, scores standardised by each reward model's own statistics.",
        &models,
        None,
    )?);
    if let Some(Difference { first, last, .. }) = summary.headline(Scale::Standardised) {
        let differences: Vec<Estimate> = Scope::ALL
            .iter()
            .filter_map(|&scope| {
                let difference = summary.difference(first, last, Scale::Standardised, scope)?;
                let colour = match scope {
                    Scope::All => Colour(2),
                    Scope::Action => aspect_colour(Aspect::Action),
                    Scope::Motivation => aspect_colour(Aspect::Motivation),
                    Scope::Consequence => aspect_colour(Aspect::Consequence),
                };
                Some(Estimate {
                    name: scope.name().to_owned(),
                    colour,
                    interval: difference.mean.interval,
                    reference: None,
                })
            })
            .collect();
        charts.extend(Chart::estimates(
            "score-difference",
            &format!("{last} − {first}, mean standardised score"),
            "Paired over the same prompts. An interval across the dashed line leaves open whether there is any difference.",
            &differences,
            Some(0.0),
        )?);
    }
    Ok(charts)
}

/// How many of a model's scores fall where.
fn distribution(run: &RunFiles) -> Result<Option<Chart>, Error> {
    const BINS: usize = 16;
    let Some(scoring) = &run.scoring else { return Ok(None) };
    let z: Vec<f64> = scoring.scores.iter().map(|row| f64::from(row.z)).collect();
    let low = z.iter().copied().fold(f64::INFINITY, f64::min);
    let high = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if z.len() < 2 * BINS || high <= low {
        return Ok(None);
    }
    let width = (high - low) / BINS as f64;
    let series: Vec<Series> = scoring
        .summary
        .models
        .iter()
        .enumerate()
        .map(|(at, model)| {
            let own: Vec<f64> = scoring
                .scores
                .iter()
                .filter(|row| row.model == model.name)
                .map(|row| f64::from(row.z))
                .collect();
            let mut counts = [0.0; BINS];
            for z in &own {
                counts[(((z - low) / width) as usize).min(BINS - 1)] += 100.0 / own.len() as f64;
            }
            let points =
                (0..BINS).map(|bin| (low + (bin as f64 + 0.5) * width, counts[bin])).collect();
            Series { name: model.name.clone(), colour: model_colour(at), points }
        })
        .collect();
    Chart::lines(
        "score-distribution",
        "Where the scores lie",
        "Per cent of a model's standardised scores in each of sixteen equal bins.",
        "standardised score",
        &series,
    )
}

fn score_table(summary: &Summary) -> String {
    let mut rows = Vec::new();
    for scale in Scale::ALL {
        for model in &summary.models {
            let Some(all) = model.score(scale, Scope::All) else { continue };
            let mut row = vec![
                Cell::text(model.name.as_str()),
                Cell::text(scale_name(scale)),
                Cell::number(number(all.score.estimate, false)),
                Cell::number(bounds(&all.score)),
                Cell::number(number(all.mean, false)),
                Cell::number(number(all.std, false)),
            ];
            for scope in [Scope::Action, Scope::Motivation, Scope::Consequence] {
                let own = model.score(scale, scope);
                row.push(Cell::number(dash(own.map(|own| number(own.score.estimate, false)))));
            }
            rows.push(row);
        }
    }
    let header = [
        "model",
        "scores",
        "Score",
        "95 % interval",
        "mean",
        "std",
        "action",
        "motivation",
        "consequence",
    ];
    table("Score of every model, and of each aspect", &header, &rows)
}

fn scale_name(scale: Scale) -> &'static str {
    match scale {
        Scale::Raw => "raw",
        Scale::Standardised => "standardised",
        Scale::Yardstick => "yardstick",
    }
}

/// Those of all scores; below, folded away, those of each aspect.
fn difference_tables(summary: &Summary) -> String {
    if summary.differences.is_empty() {
        return String::new();
    }
    let row = |difference: &Difference| {
        let change = |change: &Change| {
            let class = match change.is_clear() {
                true if change.interval.estimate > 0.0 => "n good",
                true => "n bad",
                false => "n",
            };
            Cell::Html(format!(
                "<span class=\"{class}\">{}</span>",
                escape(&interval(&change.interval, true))
            ))
        };
        let of = match difference.scope {
            Scope::All => scale_name(difference.scale).to_owned(),
            scope => format!("{}, {}", scale_name(difference.scale), scope.name()),
        };
        vec![
            Cell::text(format!("{} − {}", difference.last, difference.first)),
            Cell::text(of),
            change(&difference.score),
            change(&difference.mean),
            Cell::number(format!(
                "{} / {} / {}",
                difference.wins, difference.ties, difference.losses
            )),
            Cell::number(probability(difference.sign_test)),
            Cell::number(format!("±{:.3}", difference.score.minimum_detectable_effect)),
        ]
    };
    let header = [
        "difference",
        "scores",
        "Score",
        "mean",
        "better / same / worse",
        "sign test",
        "detectable from",
    ];
    let rows = |holds: &dyn Fn(&Difference) -> bool| -> Vec<Vec<Cell>> {
        let mut chosen: Vec<&Difference> =
            summary.differences.iter().filter(|d| holds(d)).collect();
        chosen.sort_by_key(|difference| difference.scale); // stable: models keep their order
        chosen.into_iter().map(row).collect()
    };
    let all = rows(&|difference| difference.scope == Scope::All);
    // Raw scores of one aspect say nothing that standardised ones do not.
    let by_aspect =
        rows(&|difference| difference.scope != Scope::All && difference.scale != Scale::Raw);
    format!(
        "{}<details class=\"more\"><summary>Differences by aspect</summary>{}</details>",
        table("Differences on the same prompts", &header, &all),
        table("", &header, &by_aspect)
    )
}

fn coherence_table(summary: &Summary) -> String {
    let mut rows = Vec::new();
    let with_pairs = summary.models.iter().any(|model| model.preference_accuracy.is_some());
    for model in &summary.models {
        let coherence = &model.coherence;
        let optional = |value: Option<f64>, digits: usize| {
            Cell::number(dash(value.map(|value| format!("{value:.digits$}"))))
        };
        let mut row = vec![
            Cell::text(model.name.as_str()),
            Cell::number(perplexity(model)),
            optional(coherence.distinct_2, 3),
            Cell::number(dash(coherence.repeated_4gram_rate.map(percent))),
            Cell::number(format!("{:.1}", coherence.mean_tokens)),
            Cell::number(percent(coherence.truncated_rate)),
            Cell::number(percent(coherence.empty_rate)),
        ];
        if with_pairs {
            let pairs = model.preference_accuracy.as_ref();
            row.push(Cell::number(dash(
                pairs.map(|own| format!("{} of {}", rate_with_bounds(&own.accuracy), own.n)),
            )));
        }
        rows.push(row);
    }
    let mut header =
        vec!["model", "perplexity", "distinct-2", "repeated 4-grams", "tokens", "cut off", "empty"];
    let mut note = "Perplexity: how surprising the base finds the replies, per token. Distinct-2: different pairs of \
                    neighbouring words among all such pairs."
        .to_owned();
    if with_pairs {
        header.push("human pairs");
        note.push_str(" Human pairs: how often the better reply is likelier, per token.");
    }
    if summary.models.iter().any(|model| model.retokenised) {
        let _ = write!(note, " {RETOKENISED}.");
    }
    let table = table("Do the replies still read as language?", &header, &rows);
    format!("{table}<p class=\"below\">{}</p>", escape(&note))
}

/// What `doctor` says.
fn diagnosis(run: &RunFiles) -> Section {
    let mut section = Section::new("diagnosis", "Diagnosis");
    section.lead = "Why a reward may be flat, in the order in which to ask: a later step cannot work if an earlier one fails."
        .to_owned();
    section.body.push_str("<ol class=\"findings\">");
    for Finding { step, grade, found, advice } in doctor::diagnose(run) {
        let name = grade.name();
        let class = if grade == Grade::Unknown { "unknown" } else { name };
        let _ = write!(
            section.body,
            "<li class=\"is-{class}\"><b class=\"grade\">{}</b><div><h3>{}</h3><p>{}</p>",
            escape(name),
            escape(&step),
            escape(&found)
        );
        if !advice.is_empty() {
            let _ = write!(section.body, "<p class=\"dim\">→ {}</p>", escape(&advice));
        }
        section.body.push_str("</div></li>");
    }
    section.body.push_str("</ol>");
    section
}

fn replies(run: &RunFiles, max_samples: usize) -> Section {
    let mut section = Section::new("replies", "Replies side by side");
    match &run.scoring {
        Some(scoring) => {
            section.lead = "The same question and the same random stream for every model. Numbers are standardised scores."
                .to_owned();
            section.body = samples::side_by_side(scoring, max_samples);
            section
        }
        None => section.not_run("Scoring was"),
    }
}

fn series(name: &str, colour: Colour, points: Vec<(f64, f64)>) -> Series {
    Series { name: name.to_owned(), colour, points }
}

fn training(run: &RunFiles) -> Result<Section, Error> {
    let mut section = Section::new("ppo", "PPO");
    let Some(metrics) = &run.ppo else { return Ok(section.not_run("PPO was")) };
    section.lead = "Every point is one iteration: a rollout and the steps taken on it.".to_owned();
    if let Some(counts) = run.stage("ppo").map(|record| &record.counts) {
        if let Some(selected) = counts.get("selected_iteration").and_then(Value::as_u64) {
            let _ = write!(section.lead, " The final model is that of iteration {selected}.");
        }
        let difference = counts.get("probe_z_difference").cloned();
        if let Some(difference) =
            difference.and_then(|value| serde_json::from_value::<Interval>(value).ok())
        {
            let _ = write!(
                section.lead,
                " On validation prompts the ensemble's mean moved by {} from where it began.",
                interval(&difference, true)
            );
        }
    }
    let mut charts = Vec::new();
    let mut chart =
        |name: &str, title: &str, caption: &str, series: &[Series]| -> Result<(), Error> {
            charts.extend(Chart::lines(name, title, caption, "iteration", series)?);
            Ok(())
        };
    let curve = |names: &[&str]| metrics.curve(names);
    chart(
        "ppo-policy-loss",
        "PPO loss, policy",
        "The report's Figure 3.1. The clipped objective is near zero by construction; its sign says little.",
        &[series("policy", Colour(2), curve(&["loss/policy_avg"]))],
    )?;
    chart(
        "ppo-value-loss",
        "PPO loss, critic",
        "Squared error of the critic's values; it should fall as the critic learns what replies earn.",
        &[series("critic", Colour(1), curve(&["loss/value_avg"]))],
    )?;
    let rewards = [curve(&["objective/scores"]), curve(&["objective/rlhf_reward"])];
    let [scores, with_kl] = rewards;
    chart(
        "ppo-reward",
        "Mean reward",
        "The report's Figure 3.2: the ensemble's score, and what is left of it after the KL penalty.",
        &[series("score", Colour(2), scores), series("less KL penalty", Colour(0), with_kl)],
    )?;
    chart(
        "ppo-reward-models",
        "Score by reward model",
        "Standardised: 0 is where the base began, 1 is one standard deviation of its replies.",
        &by_aspect(metrics, "z", 1.0, run, |reply| reply.z),
    )?;
    let probe: Vec<Series> = probe_curves(metrics);
    chart(
        "ppo-probe",
        "Held-out probe",
        "The same scores on validation prompts: if rollouts rise and this falls, the policy games the reward models.",
        &probe,
    )?;
    chart(
        "ppo-yardstick",
        "Yardstick on the held-out probe",
        "Score of a reward model that PPO never sees, of the answers alone; standardised on its own held-out pairs where it has statistics.",
        &[series("yardstick", Colour(1), curve(&["probe/yardstick"]))],
    )?;
    chart(
        "ppo-kl",
        "KL from the reference",
        "Nats a conversation, summed over the policy's own tokens. Near zero, nothing was learned.",
        &[series("KL", Colour(3), curve(&["objective/kl"]))],
    )?;
    chart(
        "ppo-length",
        "Tokens per reply",
        "Mean length of the replies in each rollout. Rewards that rise with length alone are no progress.",
        &by_aspect(metrics, "length", 1.0, run, |reply| reply.n_tokens),
    )?;
    chart(
        "ppo-truncation",
        "Replies cut off, per cent",
        "A cut reply has no end, so the last token its score is paid to is arbitrary.",
        &by_aspect(metrics, "truncated", 100.0, run, |reply| reply.truncated),
    )?;
    chart(
        "ppo-entropy",
        "Entropy of the policy",
        "Nats per token. A collapse means the policy says one thing only.",
        &[series("entropy", Colour(4), curve(&["policy/entropy_avg", "objective/entropy"]))],
    )?;
    chart(
        "ppo-clip",
        "Clipped ratios, per cent",
        "Part of the tokens whose probability moved beyond the clip range within an iteration.",
        &[series(
            "clipped",
            Colour(5),
            curve(&["policy/clipfrac_avg"]).into_iter().map(|(x, y)| (x, 100.0 * y)).collect(),
        )],
    )?;
    chart(
        "ppo-disagreement",
        "Disagreement of the reward models",
        "Standard deviation of the three standardised scores of a conversation.",
        &[series("disagreement", Colour(0), disagreement(run, metrics))],
    )?;
    chart(
        "ppo-explained-variance",
        "Variance the critic explains",
        "1 = the critic knows what every token will earn; 0 = it knows no more than the mean.",
        &[series("explained", Colour(1), curve(&["explained_variance"]))],
    )?;
    section.charts = charts;
    if section.charts.is_empty() {
        section.body = "<p class=\"absent\">No iteration is finished yet.</p>".to_owned();
    }
    Ok(section)
}

/// One line an aspect: logged as `<name>_<aspect>`, or else from the rollouts that were kept.
fn by_aspect(
    metrics: &Metrics,
    name: &str,
    scale: f64,
    run: &RunFiles,
    value: fn(RolloutReply) -> Option<f64>,
) -> Vec<Series> {
    Aspect::ALL
        .iter()
        .map(|&aspect| {
            let logged = metrics.curve(&[&format!("{name}_{aspect}")]);
            let points = match logged.is_empty() {
                true => run.rollout_curve(|row| value(rollout_reply(row, aspect))),
                false => logged,
            };
            let points = points.into_iter().map(|(x, y)| (x, scale * y)).collect();
            series(aspect.name(), aspect_colour(aspect), points)
        })
        .collect()
}

fn probe_curves(metrics: &Metrics) -> Vec<Series> {
    let mut out = vec![series("mean", Colour(2), metrics.curve(&["probe/z_mean"]))];
    for aspect in Aspect::ALL {
        let name = format!("probe/z_{aspect}");
        out.push(series(aspect.name(), aspect_colour(aspect), metrics.curve(&[&name])));
    }
    out
}

fn disagreement(run: &RunFiles, metrics: &Metrics) -> Vec<(f64, f64)> {
    let logged = metrics.curve(&["ensemble_disagreement"]);
    if !logged.is_empty() {
        return logged;
    }
    run.rollout_curve(|row| {
        let z: Option<Vec<f64>> =
            Aspect::ALL.iter().map(|aspect| rollout_reply(row, *aspect).z).collect();
        z.map(|z| stats::std(&z))
    })
}

fn reward_models(run: &RunFiles) -> Result<Section, Error> {
    let mut section = Section::new("reward", "Reward models");
    if run.rewards.is_empty() {
        return Ok(section.not_run("Reward modelling was"));
    }
    section.lead = "A reward model is of use if it beats the rule “prefer the shorter answer” on pairs it has not seen."
        .to_owned();
    let mut estimates = Vec::new();
    let (mut rows, mut curves, mut losses) = (Vec::new(), Vec::new(), Vec::new());
    for (&aspect, reward) in &run.rewards {
        let colour = aspect_colour(aspect);
        curves.push(series(aspect.name(), colour, scaled(&reward.metrics, "eval_accuracy", 100.0)));
        losses.push(series(aspect.name(), colour, reward.metrics.curve(&["loss"])));
        let mut row = vec![Cell::text(aspect.name())];
        match &reward.evaluation {
            Some(evaluation) => {
                estimates.push(Estimate {
                    name: aspect.name().to_owned(),
                    colour,
                    interval: evaluation.accuracy,
                    reference: Some(evaluation.shorter_answer.estimate),
                });
                let lead = &evaluation.lead_over_shorter_answer;
                row.extend([
                    Cell::number(evaluation.n.to_string()),
                    Cell::number(rate_with_bounds(&evaluation.accuracy)),
                    Cell::number(percent(evaluation.shorter_answer.estimate)),
                    Cell::number(interval(lead, true)),
                    Cell::number(format!("{:.3}", evaluation.expected_calibration_error)),
                    Cell::number(dash(evaluation.pearson_score_length.map(|r| number(r, false)))),
                    Cell::number(number(evaluation.mean_margin, false)),
                ]);
            }
            None => row.extend((0..7).map(|_| Cell::number(DASH))),
        }
        rows.push(row);
    }
    section.charts.extend(Chart::estimates(
        "reward-accuracy",
        "Accuracy on unseen pairs",
        "Dot and bar: accuracy with its 95 % interval. Ring: always choosing the shorter answer. Dashed: a coin.",
        &estimates,
        Some(0.5),
    )?);
    section.charts.extend(Chart::lines(
        "reward-loss",
        "Training loss",
        "Bradley–Terry loss; 0.693 is what a coin has.",
        "step",
        &losses,
    )?);
    section.charts.extend(Chart::lines(
        "reward-validation",
        "Validation accuracy, per cent",
        "On the validation pairs, while training.",
        "step",
        &curves,
    )?);
    section.charts.extend(calibration_chart(run)?);
    section.charts.extend(best_of(run)?);
    let header = [
        "aspect",
        "pairs",
        "accuracy",
        "shorter answer",
        "lead over it",
        "calibration error",
        "with length",
        "margin",
    ];
    section.body = table("Reward models on validation pairs", &header, &rows);
    Ok(section)
}

/// `66.0 % [57.5, 74.0]`.
fn rate_with_bounds(rate: &Interval) -> String {
    format!("{} [{:.1}, {:.1}]", percent(rate.estimate), 100.0 * rate.low, 100.0 * rate.high)
}

fn scaled(metrics: &Metrics, name: &str, factor: f64) -> Vec<(f64, f64)> {
    metrics.curve(&[name]).into_iter().map(|(x, y)| (x, factor * y)).collect()
}

/// Stated against observed, of the side that a reward model favours.
fn calibration_chart(run: &RunFiles) -> Result<Option<Chart>, Error> {
    let mut lines = Vec::new();
    for (&aspect, reward) in &run.rewards {
        let bins = reward.evaluation.iter().flat_map(|evaluation| &evaluation.calibration);
        let points = bins.map(|bin| (100.0 * bin.stated, 100.0 * bin.observed)).collect();
        lines.push(series(aspect.name(), aspect_colour(aspect), points));
    }
    if lines.iter().all(|line| line.points.is_empty()) {
        return Ok(None);
    }
    lines.push(series("perfect", Colour(0), vec![(50.0, 50.0), (100.0, 100.0)]));
    Chart::lines(
        "reward-calibration",
        "Calibration, per cent right",
        "Of the pairs for whose better side a reward model stated this probability, how many it got right. Below the grey line \
         it is too sure of itself.",
        "stated probability, per cent",
        &lines,
    )
}

fn best_of(run: &RunFiles) -> Result<Option<Chart>, Error> {
    let Some(best) = &run.best_of else { return Ok(None) };
    let points = best.curve.iter().map(|(k, score)| (*k as f64, *score)).collect();
    let by_yardstick = best.yardstick_gain.as_ref().map_or(String::new(), |gain| {
        format!(" By the yardstick the ensemble's favourites gain {}.", interval(gain, true))
    });
    Chart::lines(
        "best-of",
        "Best of n",
        &format!(
            "Ensemble score of the best of n samples, {} prompts. If it does not rise, PPO cannot help.{by_yardstick}",
            best.n_prompts
        ),
        "samples",
        &[series("ensemble", Colour(2), points)],
    )
}

fn judge(run: &RunFiles) -> Result<Section, Error> {
    let mut section = Section::new("judge", "Judge");
    let Some(rows) = run.judgements.as_ref().filter(|rows| !rows.is_empty()) else {
        let mut section = section.not_run("Judging was");
        section.body.push_str(&methods_table(run));
        return Ok(section);
    };
    let first = &rows[0];
    section.lead = format!("{} verdicts by {} ({}).", rows.len(), first.judge, first.method);
    let all = Verdicts::of(rows.iter());
    if all.consistency().is_some() {
        section.lead.push_str(
            " A judge without a bias for places prefers what is shown first half of the time; one that looks at the answers \
             prefers the same one in both orders.",
        );
    }
    section.charts.extend(votes_chart(rows)?);
    section.charts.extend(first_shown_chart(rows)?);
    section.body = votes_table(rows, all.seen > 0);
    section.body.push_str(&methods_table(run));
    Ok(section)
}

/// Share of sample 0 among the votes of each virtue: what it would be if votes were cast blindly is one half.
fn votes_chart(rows: &[JudgementRow]) -> Result<Option<Chart>, Error> {
    let estimates = by_virtue(rows, |verdicts| {
        let [zero, one, _] = verdicts.votes;
        (zero, zero + one)
    });
    Chart::estimates(
        "judge-votes",
        "Votes for sample 0, per cent",
        "Of the votes of each virtue, over all aspects. Samples come in no order, so a fair judge is near the dashed line; under \
         contrasting personas sample 0 is the virtuous one.",
        &estimates,
        Some(50.0),
    )
}

fn first_shown_chart(rows: &[JudgementRow]) -> Result<Option<Chart>, Error> {
    let estimates = by_virtue(rows, |verdicts| (verdicts.first, verdicts.seen));
    Chart::estimates(
        "judge-first-shown",
        "First shown preferred, per cent",
        "Of the single verdicts of each virtue. Far from the dashed line the judge follows the place, not the answer.",
        &estimates,
        Some(50.0),
    )
}

/// A share in per cent with Wilson's interval for each virtue that has any trials.
fn by_virtue(rows: &[JudgementRow], share: impl Fn(&Verdicts) -> (usize, usize)) -> Vec<Estimate> {
    let mut out = Vec::new();
    for (at, virtue) in Virtue::ALL.into_iter().enumerate() {
        let verdicts = Verdicts::of(rows.iter().filter(|row| row.virtue == virtue));
        let (wins, n) = share(&verdicts);
        if n == 0 {
            continue;
        }
        let Interval { estimate, low, high } = stats::wilson(wins as u64, n as u64, 1.96);
        out.push(Estimate {
            name: virtue.name().to_owned(),
            colour: Colour([1, 2, 3, 4, 5][at]),
            interval: Interval { estimate: 100.0 * estimate, low: 100.0 * low, high: 100.0 * high },
            reference: None,
        });
    }
    out
}

fn votes_table(rows: &[JudgementRow], with_orders: bool) -> String {
    let mut header = vec!["aspect", "virtue", "verdicts", "sample 0", "sample 1", "neither"];
    if with_orders {
        header.extend(["first shown", "same in both orders", "abstained"]);
    }
    let mut table_rows = Vec::new();
    let mut agreement = Vec::new();
    for aspect in Aspect::ALL {
        let own: Vec<&JudgementRow> = rows.iter().filter(|row| row.aspect == aspect).collect();
        let mut push = |name: String, verdicts: &Verdicts| {
            if verdicts.n > 0 {
                table_rows.push(verdict_row(aspect.name(), name, verdicts, with_orders));
            }
        };
        for virtue in Virtue::ALL {
            let of = own.iter().copied().filter(|row| row.virtue == virtue);
            push(virtue.name().to_owned(), &Verdicts::of(of));
        }
        push("all five".to_owned(), &Verdicts::of(own.iter().copied()));
        agreement
            .extend(kappa(&own).map(|kappa| format!("{} {}", aspect.name(), number(kappa, false))));
    }
    let mut out = table("Votes by virtue", &header, &table_rows);
    if !agreement.is_empty() {
        let _ = write!(
            out,
            "<p class=\"below\">Agreement of the five virtues, Fleiss' κ (0 as by chance, 1 always): {}.</p>",
            escape(&agreement.join(", "))
        );
    }
    out
}

fn verdict_row(aspect: &str, name: String, verdicts: &Verdicts, with_orders: bool) -> Vec<Cell> {
    let [zero, one, neither] = verdicts.votes;
    let mut row = vec![Cell::text(aspect), Cell::text(name)];
    row.extend([verdicts.n, zero, one, neither].map(|n| Cell::number(n.to_string())));
    if with_orders {
        row.extend([
            Cell::number(dash(verdicts.first_rate().map(percent))),
            Cell::number(dash(verdicts.consistency().map(percent))),
            Cell::number(verdicts.abstained.to_string()),
        ]);
    }
    row
}

/// How far each judging method agrees with labelled pairs, if that was measured.
fn methods_table(run: &RunFiles) -> String {
    let Some(calibration) = &run.calibration else { return String::new() };
    let per_cent = |value: Option<f64>| Cell::number(dash(value.map(|p| format!("{p:.1} %"))));
    let rows: Vec<Vec<Cell>> = calibration
        .table
        .iter()
        .map(|row| {
            let shots = match row.few_shot {
                0 => String::new(),
                n => format!(", {n}-shot"),
            };
            vec![
                Cell::text(row.set.as_str()),
                Cell::text(format!("{}{shots}", row.method)),
                Cell::text(row.by.as_str()),
                Cell::number(row.agreement.n.to_string()),
                Cell::number(rate_with_bounds(&row.agreement.rate)),
                per_cent(row.first_position_percent),
                per_cent(row.swap_consistency_percent),
            ]
        })
        .collect();
    let header = ["pairs", "method", "by", "n", "agreement", "first shown", "same in both orders"];
    format!(
        "{}<p class=\"below\">{}.</p>",
        table("Judging methods on labelled pairs", &header, &rows),
        escape(&calibration.recommendation.reason)
    )
}

fn data(run: &RunFiles) -> Result<Section, Error> {
    let mut section = Section::new("data", "Data");
    section.lead = "What each stage made, and how many replies the token limit cut.".to_owned();
    if let Some(sft) = &run.sft {
        section.charts.extend(Chart::lines(
            "sft-loss",
            "SFT loss",
            "Cross-entropy per imitated token, nats.",
            "step",
            &[
                series("training", Colour(0), sft.curve(&["loss"])),
                series("validation", Colour(1), sft.curve(&["eval_loss"])),
            ],
        )?);
    }
    let body = &mut section.body;
    body.push_str(&counts_table(run));
    body.push_str(&truncation_table(run));
    body.push_str(&preference_table(run));
    Ok(section)
}

fn counts_table(run: &RunFiles) -> String {
    fn split_counts<T>(rows: Option<&Vec<T>>, split: impl Fn(&T) -> Split) -> Vec<Cell> {
        match rows {
            None => (0..4).map(|_| Cell::number(DASH)).collect(),
            Some(rows) => {
                let count =
                    |wanted| rows.iter().filter(|row| split(row) == wanted).count().to_string();
                let mut cells = vec![Cell::number(rows.len().to_string())];
                cells.extend(Split::ALL.map(|wanted| Cell::number(count(wanted))));
                cells
            }
        }
    }
    let row = |name: &str, cells: Vec<Cell>| {
        let mut row = vec![Cell::text(name)];
        row.extend(cells);
        row
    };
    let mut rows = vec![
        row("prompts", split_counts(run.prompts.as_ref(), |row| row.split)),
        row("demonstrations", split_counts(run.demonstrations.as_ref(), |row| row.split)),
        row("conversations", split_counts(run.conversations.as_ref(), |row| row.split)),
        row("judgements", split_counts(run.judgements.as_ref(), |row| row.split)),
    ];
    for aspect in Aspect::ALL {
        let count = |split| run.preferences.get(&(aspect, split)).map(Vec::len);
        let counts = Split::ALL.map(count);
        let cell = |n: Option<usize>| Cell::number(dash(n.map(|n| n.to_string())));
        let total = counts.iter().any(Option::is_some).then(|| counts.iter().flatten().sum());
        let mut cells = vec![cell(total)];
        cells.extend(counts.map(cell));
        rows.push(row(&format!("preferences, {aspect}"), cells));
    }
    table("Rows", &["file", "all", "train", "validation", "test"], &rows)
}

fn truncation_table(run: &RunFiles) -> String {
    let mut rows = Vec::new();
    let cells = |name: &str, rates: [Option<(f64, f64)>; 3]| {
        let mut row = vec![Cell::text(name)];
        for rate in rates {
            row.push(Cell::number(dash(rate.map(|(cut, _)| percent(cut)))));
            row.push(Cell::number(dash(rate.map(|(_, tokens)| format!("{tokens:.1}")))));
        }
        row
    };
    if let Some(conversations) = run.conversations.as_ref().filter(|rows| !rows.is_empty()) {
        let rates = Aspect::ALL.map(|aspect| {
            let tokens: Vec<f64> =
                conversations.iter().map(|row| f64::from(row.n_tokens(aspect))).collect();
            run.truncated(aspect).map(|cut| (cut, stats::mean(&tokens)))
        });
        rows.push(cells("conversations", rates));
    }
    if let (Some(first), Some(last)) = (run.rollouts.first(), run.rollouts.last()) {
        for (name, iteration) in [("first", first.iteration), ("last", last.iteration)] {
            let rates = Aspect::ALL.map(|aspect| {
                let own = || run.rollouts.iter().filter(|row| row.iteration == iteration);
                let cut: Vec<f64> =
                    own().filter_map(|row| rollout_reply(row, aspect).truncated).collect();
                let tokens: Vec<f64> =
                    own().filter_map(|row| rollout_reply(row, aspect).n_tokens).collect();
                (!cut.is_empty()).then(|| (stats::mean(&cut), stats::mean(&tokens)))
            });
            rows.push(cells(&format!("{name} rollout kept (iteration {iteration})"), rates));
        }
    }
    if let Some(scoring) = &run.scoring {
        for model in &scoring.summary.models {
            let rates = Aspect::ALL.map(|aspect| {
                let own = model.coherence_by_aspect.get(&aspect)?;
                Some((own.truncated_rate, own.mean_tokens))
            });
            rows.push(cells(&format!("test replies, {}", model.name), rates));
        }
    }
    if rows.is_empty() {
        return not_run("Sampling was");
    }
    let header = [
        "replies",
        "action cut",
        "tokens",
        "motivation cut",
        "tokens",
        "consequence cut",
        "tokens",
    ];
    table("Replies cut off by the token limit, and mean tokens", &header, &rows)
}

fn preference_table(run: &RunFiles) -> String {
    let Some(stage) = run.stage("preferences") else { return String::new() };
    let mut rows = Vec::new();
    for aspect in Aspect::ALL {
        let Some(counts) = stage.counts.get(aspect.name()) else { continue };
        let cell = |name: &str| {
            Cell::number(dash(counts.get(name).and_then(Value::as_u64).map(|n| n.to_string())))
        };
        let pairs: Vec<_> = Split::ALL
            .iter()
            .filter_map(|split| run.preferences.get(&(aspect, *split)))
            .flatten()
            .collect();
        let share = |holds: fn(&arete_records::rows::PreferenceRow) -> bool| {
            (!pairs.is_empty()).then(|| {
                percent(pairs.iter().filter(|pair| holds(pair)).count() as f64 / pairs.len() as f64)
            })
        };
        rows.push(vec![
            Cell::text(aspect.name()),
            cell("judged"),
            cell("pairs"),
            cell("ties"),
            cell("dropped_truncated"),
            cell("dropped_untrimmable"),
            cell("dropped_identical"),
            Cell::number(dash(share(|pair| pair.truncated_chosen || pair.truncated_rejected))),
        ]);
    }
    if rows.is_empty() {
        return String::new();
    }
    let header = [
        "aspect",
        "judged",
        "pairs",
        "ties",
        "dropped: cut off",
        "dropped: no full sentence",
        "dropped: identical",
        "pairs with a cut reply",
    ];
    table("From conversations to preference pairs", &header, &rows)
}

fn provenance(run: &RunFiles, recipe: Option<&str>) -> Section {
    let mut section = Section::new("provenance", "Recipe and provenance");
    section.lead =
        "Everything that each stage's results depend on, as recorded in its run.json.".to_owned();
    let body = &mut section.body;
    if let Some(recipe) = recipe {
        let _ = write!(
            body,
            "<details><summary>The recipe</summary><pre>{}</pre></details>",
            escape(recipe)
        );
    }
    for stage in &run.stages {
        let Some(record) = &stage.run else {
            if stage.begun {
                let _ = write!(
                    body,
                    "<p class=\"absent\">{}: begun, not complete.</p>",
                    escape(&stage.dir)
                );
            }
            continue;
        };
        let short = |sum: &str| sum.get(..16).unwrap_or(sum).to_owned();
        let _ = write!(
            body,
            "<details><summary>{} <span class=\"dim\">{} · {} · seed {} · {}</span></summary>",
            escape(&stage.dir),
            escape(&record.device),
            escape(&record.dtype),
            record.seed,
            escape(&short(&record.fingerprint))
        );
        let mut rows = Vec::new();
        flatten("", &record.config, &mut rows);
        let counts = Value::Object(record.counts.clone());
        let mut counted = Vec::new();
        flatten("", &counts, &mut counted);
        let pairs = |rows: Vec<(String, String)>| -> Vec<Vec<Cell>> {
            rows.into_iter()
                .map(|(name, value)| vec![Cell::text(name), Cell::text(value)])
                .collect()
        };
        body.push_str(&table("Settings", &["setting", "value"], &pairs(rows)));
        body.push_str(&table("Counts", &["count", "value"], &pairs(counted)));
        let inputs = record.inputs.iter().map(|(name, sum)| (name.clone(), short(sum))).collect();
        body.push_str(&table("Inputs", &["input", "SHA-256"], &pairs(inputs)));
        let outputs = record
            .outputs
            .iter()
            .map(|(name, file)| {
                (name.clone(), format!("{} · {} bytes", short(&file.sha256), file.size))
            })
            .collect();
        body.push_str(&table("Outputs", &["file", "SHA-256"], &pairs(outputs)));
        let versions: Vec<String> =
            record.versions.iter().map(|(name, version)| format!("{name} {version}")).collect();
        let _ = write!(body, "<p class=\"dim\">{}</p></details>", escape(&versions.join(", ")));
    }
    section
}

/// Nested settings as dotted names.
fn flatten(prefix: &str, value: &Value, out: &mut Vec<(String, String)>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&name, value, out);
            }
        }
        Value::Null => out.push((prefix.to_owned(), DASH.to_owned())),
        Value::String(text) => out.push((prefix.to_owned(), text.clone())),
        Value::Array(items) => {
            let items: Vec<String> = items
                .iter()
                .map(|item| item.as_str().map_or_else(|| item.to_string(), str::to_owned))
                .collect();
            out.push((prefix.to_owned(), items.join(", ")));
        }
        other => out.push((prefix.to_owned(), other.to_string())),
    }
}

/// Whether a reply ended by itself, for the page's words.
pub(crate) fn ended(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "ended",
        FinishReason::Length => "cut off",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_settings_become_dotted_names() {
        let value = serde_json::json!({"a": {"b": [1, "x"], "c": null}, "d": true});
        let mut rows = Vec::new();
        flatten("", &value, &mut rows);
        let rows: Vec<(&str, &str)> = rows.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        assert_eq!(rows, [("a.b", "1, x"), ("a.c", "–"), ("d", "true")]);
    }
}
