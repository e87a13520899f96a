//! Runs compared: what each recipe gained within its own runs, and the yardstick's scores between recipes.
//!
//! In: `scoring/scores.parquet` and `scoring/summary.json` of several runs, each under the name of an arm (a recipe, say);
//! an arm with several runs has several seeds. Out: tables, as text, JSON or HTML.
//!
//! Each recipe trains reward models of its own, so its Score means something within its runs alone; between arms only
//! the yardstick's scores of answers to the same test prompts are compared, or, where no run has any and all share their reward
//! models, theirs. Seeds and prompts are both luck: where the runs
//! share ten prompts or more they are crossed random effects ([`arete_records::stats::crossed_mean`]), else every run is one number and
//! Student's t covers both. Arms of one seed say so. Several looks at one question are corrected by Bonferroni, and named.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use arete_records::rows::ScoreRow;
use arete_records::stats::Interval;
use arete_records::{Refusal, files, parquet, redact};
use arete_stage::run::RunJson;
use serde_json::{Value, json};

use arete_chain::Turns;

use crate::score;
use crate::summary::{Difference, Scale, Scope, Summary};
use crate::table::{Text, bounds, dash, effect, interval, number, row};

mod figures;
mod page;

pub use figures::{ArmFigure, Comparison, Figure, Measure, compare};
pub use page::html;

/// A run under the name of its arm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arm {
    /// What its runs have in common: a recipe, say.
    pub name: String,
    /// Directory of the run, with one directory a stage.
    pub run: PathBuf,
}

/// A run's scores.
#[derive(Debug)]
pub struct ScoredRun {
    /// Its arm and place.
    pub arm: Arm,
    /// What scoring wrote.
    pub summary: Summary,
    /// Every score.
    pub scores: Vec<ScoreRow>,
    /// The turns of its constitution.
    pub turns: Turns,
    /// SHA-256 of the yardstick's files, by name; empty without one.
    pub yardstick: BTreeMap<String, String>,
    /// SHA-256 of the reward models' files and statistics, by name.
    pub rewards: BTreeMap<String, String>,
}

impl ScoredRun {
    /// Reads what `score` left in the run.
    ///
    /// # Errors
    ///
    /// A refused file if scoring has not been run there, A file's failure if its files are damaged.
    pub fn read(arm: Arm) -> Result<Self> {
        let dir = arm.run.join("scoring");
        let path = dir.join(score::SUMMARY);
        if !path.is_file() {
            bail!(Refusal::file(
                &path,
                "scoring",
                "the results of `arete-scoring score`",
                "no file"
            ));
        }
        let summary = serde_json::from_slice(&files::read_small(&path)?).map_err(|error| {
            Refusal::file(&path, "summary", "what `arete-scoring score` writes", error)
        })?;
        let scores = parquet::read(dir.join(score::SCORES))?;
        let mut yardstick = RunJson::read(&dir)?.inputs;
        let mut rewards = yardstick.clone();
        rewards.retain(|name, _| name.starts_with("reward ") || name.starts_with("score_stats "));
        yardstick.retain(|name, _| name.starts_with("yardstick"));
        let turns = Turns::carried(&dir)?;
        Ok(Self { arm, summary, scores, turns, yardstick, rewards })
    }

    /// Whether the run's labels were made from the contrast of these two models.
    fn is_circular(&self, first: &str, last: &str) -> bool {
        self.summary
            .differences
            .iter()
            .any(|own| own.circular && (own.first.as_str(), own.last.as_str()) == (first, last))
    }

    /// Refuses a model that the run did not score.
    fn check_model(&self, name: &str) -> Result<()> {
        let names: Vec<&str> =
            self.summary.models.iter().map(|model| model.name.as_str()).collect();
        if names.contains(&name) {
            return Ok(());
        }
        Err(Refusal::file(
            self.arm.run.join("scoring").join(score::SUMMARY),
            "models",
            name.to_owned(),
            names.join(", "),
        )
        .into())
    }
}

/// Whether these runs can stand in one comparison of `first` and `last`.
///
/// # Errors
///
/// A refused file if a run did not score one of the two models, or was scored with another yardstick than those before it.
pub fn check(runs: &[ScoredRun], first: &str, last: &str) -> Result<()> {
    for run in runs {
        run.check_model(first)?;
        run.check_model(last)?;
    }
    for (at, run) in runs.iter().enumerate() {
        let is_same = |other: &&ScoredRun| {
            other.arm.name == run.arm.name && !run.scores.is_empty() && other.scores == run.scores
        };
        if let Some(other) = runs[..at].iter().find(is_same) {
            bail!(Refusal::file(
                run.arm.run.join("scoring").join(score::SCORES),
                "scores",
                format!("a run of its own, for each run of `{}` counts as a seed", run.arm.name),
                format!("the very scores of {}", other.arm.run.display()),
            ));
        }
    }
    let with_yardstick: Vec<&ScoredRun> =
        runs.iter().filter(|run| !run.yardstick.is_empty()).collect();
    for pair in with_yardstick.windows(2) {
        let differs = |name: &&String| pair[0].yardstick.get(*name) != pair[1].yardstick.get(*name);
        if let Some(name) = pair[0].yardstick.keys().chain(pair[1].yardstick.keys()).find(differs) {
            let shown = |run: &ScoredRun| run.yardstick.get(name).cloned().unwrap_or_default();
            bail!(Refusal::file(
                pair[1].arm.run.join("scoring/run.json"),
                format!("inputs.{name}"),
                format!(
                    "the yardstick of {} ({}): scores of different yardsticks cannot be compared, score again with one",
                    pair[0].arm.run.display(),
                    shown(pair[0])
                ),
                shown(pair[1])
            ));
        }
    }
    Ok(())
}

/// How a comparison is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Aligned tables.
    Text,
    /// Every figure.
    Json,
    /// A page.
    Html,
}

/// The comparison in a format.
pub fn shown(runs: &[ScoredRun], comparison: &Comparison, format: Format) -> String {
    match format {
        Format::Text => text(runs, comparison),
        Format::Json => {
            let mut value = serde_json::to_value(comparison).expect("numbers and words serialise");
            let (first, last) = (&comparison.first, &comparison.last);
            value["runs"] = runs.iter().map(|run| run_json(run, first, last)).collect();
            redact::redact_json(&mut value);
            serde_json::to_string_pretty(&value).expect("it is a value already") + "\n"
        }
        Format::Html => html(runs, comparison),
    }
}

/// What a run gained, by all of its reward models: the first table's row, every figure of it.
fn run_json(run: &ScoredRun, first: &str, last: &str) -> Value {
    let is_gain = |own: &&Difference| (&*own.first, &*own.last) == (first, last);
    let is_whole = |own: &&Difference| matches!(own.scope, Scope::All);
    let gains: Vec<&Difference> =
        run.summary.differences.iter().filter(is_gain).filter(is_whole).collect();
    json!({
        "arm": run.arm.name,
        "run": run.arm.run,
        "n_prompts": run.summary.n_prompts,
        "differences": gains,
    })
}

/// The tables as aligned text.
pub fn text(runs: &[ScoredRun], comparison: &Comparison) -> String {
    let Comparison { first, last, measure, within, between, n_looks } = comparison;
    let mut text = Text::default();
    text.line(format!("{last} − {first} within each run; [95 % interval], of that run only"));
    text.line("");
    let mut rows = vec![row([
        "arm",
        "run",
        "prompts",
        "Score",
        "standardised",
        "better/same/worse",
        "detectable from",
        "yardstick, answers",
        "at equal length",
    ])];
    rows.extend(runs.iter().map(|run| run_row(run, first, last)));
    text.table(1, &rows);
    if runs.iter().any(|run| run.is_circular(first, last)) {
        text.line(crate::table::CIRCULAR);
    }
    let header = ["seeds", "prompts", measure.name(), "at equal length"];
    let looks = format!("corrected for {n_looks} looks (Bonferroni)");
    let header = |name: &str| {
        let mut out = vec![name.to_owned()];
        out.extend(header.map(str::to_owned));
        out.push(looks.clone());
        out
    };
    text.line("");
    if within.is_empty() {
        text.line(format!(
            "No arm has a yardstick's scores of {first} and {last}, and the runs share no reward models: score them with the same \
             --yardstick, or by the same --rewards."
        ));
        return text.finish();
    }
    text.line(format!(
        "{last} − {first} within arms, seeds and prompts as crossed random effects; [95 % interval]"
    ));
    text.line("");
    let mut rows = vec![header("arm")];
    rows.extend(within.iter().map(|own| figure_row(own.name.clone(), own)));
    text.table(1, &rows);
    text.line("");
    if between.is_empty() {
        text.line(format!("No two arms share scores of {last}."));
    } else {
        text.line(format!("{} of {last} between arms; [95 % interval]", measure.phrase()));
        text.line("");
        let mut rows = vec![header("arms")];
        rows.extend(between.iter().map(|own| figure_row(own.name.clone(), own)));
        text.table(1, &rows);
        if runs.windows(2).any(|pair| pair[0].turns.names() != pair[1].turns.names()) {
            text.line("");
            text.line(
                "The runs are of different constitutions: arms that differ are compared in the answer alone.",
            );
        }
    }
    for note in comparison.notes() {
        text.line(note);
    }
    text.finish()
}

fn figure_row(name: String, own: &ArmFigure) -> Vec<String> {
    let shown = |figure: &Figure| match figure.interval() {
        Some(found) => interval(&found, true),
        None => figure.reason.clone().unwrap_or_default(),
    };
    vec![
        name,
        own.n_seeds.clone(),
        own.n_prompts.to_string(),
        shown(&own.mean),
        shown(&own.equal_length),
        dash(own.corrected.as_ref().map(bounds)),
    ]
}

fn run_row(run: &ScoredRun, first: &str, last: &str) -> Vec<String> {
    let of = |scale: Scale| run.summary.difference(first, last, scale, run.summary.widest(scale));
    let change = |found: Option<&Difference>, read: fn(&Difference) -> &Interval| {
        dash(found.map(|own| {
            let mark = if own.circular { " (circular)" } else { "" };
            format!("{} {}{mark}", number(read(own).estimate, true), bounds(read(own)))
        }))
    };
    let standardised = of(Scale::Standardised);
    let yardstick = of(Scale::Yardstick);
    let equal_length = yardstick.map(|own| match own.equal_length.interval() {
        Some(found) => interval(&found, true),
        None => "not comparable".to_owned(),
    });
    vec![
        run.arm.name.clone(),
        name_of(&run.arm.run),
        run.summary.n_prompts.to_string(),
        change(of(Scale::Raw), |own| &own.score.interval),
        change(standardised, |own| &own.score.interval),
        dash(standardised.map(Difference::tally)),
        dash(standardised.map(|own| effect(&own.score))),
        change(yardstick, |own| &own.mean.interval),
        dash(equal_length),
    ]
}

/// The last part of a path.
fn name_of(path: &Path) -> String {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
    name.unwrap_or_else(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use arete_records::{Aspect, FinishReason};

    use super::*;
    use crate::coherence::Coherence;
    use crate::summary::ModelSummary;

    /// A run in which the yardstick gives the original's answer to prompt i nothing, and the final model's the i-th score.
    pub(super) fn run(arm: &str, scores: &[(u32, f32)]) -> ScoredRun {
        let of = |model: &str, (prompt, score): (u32, f32)| ScoreRow {
            model: model.to_owned(),
            prompt_id: format!("{prompt:016x}"),
            aspect: Aspect::ACTION,
            score: 0.0,
            z: 0.0,
            yardstick: Some(score),
            yardstick_words: None,
            n_tokens: 20,
            finish_reason: FinishReason::Stop,
        };
        let rows = scores.iter().flat_map(|&(prompt, score)| {
            [of("original", (prompt, 0.0)), of("final", (prompt, score))]
        });
        let scores = rows.collect();
        let model = |name: &str| ModelSummary {
            name: name.to_owned(),
            source: String::new(),
            scores: Vec::new(),
            coherence: Coherence::default(),
            coherence_by_aspect: BTreeMap::new(),
            retokenised: false,
            kl: None,
            preference_accuracy: None,
        };
        let models = vec![model("original"), model("final")];
        let summary = Summary { n_prompts: 2, models, ..Summary::default() };
        let arm = Arm { name: arm.to_owned(), run: PathBuf::from(format!("runs/{arm}")) };
        let (turns, none) = (Turns::default(), BTreeMap::new());
        ScoredRun { arm, summary, scores, turns, yardstick: none.clone(), rewards: none }
    }

    #[test]
    fn runs_of_different_constitutions_are_compared_in_their_answers() {
        // The second arm calls its answer otherwise, and asks something else after it.
        let dir = tempfile::tempdir().unwrap();
        let other = "[[turn]]\nname = \"deed\"\n[[turn]]\nname = \"why\"\nquestion = \"Why?\"\n\
                     [virtues]\nren = \"Which is kinder?\"";
        fs_err::write(dir.path().join("constitution.toml"), other).unwrap();
        let (answer, why) = (Aspect::new("deed").unwrap(), Aspect::new("why").unwrap());
        let mut confucian = run("confucian", &[(1, 1.0), (2, 2.0)]);
        confucian.turns = Turns::carried(dir.path()).unwrap();
        for row in &mut confucian.scores {
            row.aspect = answer;
        }
        let others = confucian.scores.clone().into_iter();
        confucian.scores.extend(others.map(|row| ScoreRow { aspect: why, ..row }));
        let runs = [run("report", &[(1, 0.0), (2, 1.0)]), confucian];
        let found = compare(&runs, "original", "final");
        assert_eq!((found.between[0].n_prompts, found.between[0].mean.value), (2, Some(1.0)));
        let text = text(&runs, &found);
        assert!(text.contains("compared in the answer alone"), "{text}");
    }

    #[test]
    fn runs_of_other_yardsticks_or_without_the_model_are_refused() {
        let by = |name: &str, sum: Option<&str>| {
            let mut run = run(name, &[(1, 0.0)]);
            run.yardstick =
                sum.map(|sum| ("yardstick".to_owned(), sum.to_owned())).into_iter().collect();
            run
        };
        let runs = [by("a", Some("aa")), by("b", None), by("c", Some("aa"))];
        check(&runs, "original", "final").unwrap();
        let text = check(&runs, "original", "finl").unwrap_err().to_string();
        assert!(text.contains("finl") && text.contains("original, final"), "{text}");
        let runs = [by("a", Some("aa")), by("b", None), by("c", Some("bb"))];
        let text = check(&runs, "original", "final").unwrap_err().to_string();
        assert!(
            text.contains("runs/c") && text.contains("runs/a") && text.contains("bb"),
            "{text}"
        );
    }

    #[test]
    fn one_run_is_one_seed_however_often_it_is_named() {
        let same = [run("a", &[(1, 0.0)]), run("b", &[(1, 0.0)]), run("a", &[(1, 0.0)])];
        let refusal = check(&same, "original", "final").unwrap_err().to_string();
        assert!(refusal.contains("each run of `a` counts as a seed"), "{refusal}");
        check(&same[..2], "original", "final").unwrap();
    }

    #[test]
    fn without_a_yardstick_nothing_is_compared_between_arms() {
        let mut runs = [run("a", &[(1, 0.0)]), run("b", &[(1, 1.0)])];
        for row in runs.iter_mut().flat_map(|run| &mut run.scores) {
            row.yardstick = None;
        }
        let found = compare(&runs, "original", "final");
        assert!(found.within.is_empty() && found.between.is_empty());
        assert!(text(&runs, &found).contains("the same --yardstick"));
    }
}
