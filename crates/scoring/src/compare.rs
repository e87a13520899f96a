//! Runs compared: what each recipe gained within its own runs, and the yardstick's scores between recipes.
//!
//! In: `scoring/scores.parquet` and `scoring/summary.json` of several runs, each under the name of an arm (a recipe, say);
//! an arm with several runs has several seeds. Out: two tables.
//!
//! Each recipe trains reward models of its own, so its Score means something within its runs alone; between arms only
//! the yardstick's scores of the same test prompts are compared. A prompt counts once, with the mean of its scores in all
//! runs of the arm that answered it (seeds may draw different test prompts), and prompts are redrawn, so the interval covers
//! the choice of prompts; how far seeds agree is seen in the first table, which has a row for every run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use arete_records::parquet;
use arete_records::rows::ScoreRow;
use arete_records::stats::{self, Interval, Resampling};
use arete_stage::run::RunJson;

use arete_chain::Turns;

use crate::Error;
use crate::score;
use crate::summary::{Change, Difference, Scale, Scope, Summary};
use crate::table::{Text, bounds, dash, effect, interval, number, row};

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
}

impl ScoredRun {
    /// Reads what `score` left in the run.
    ///
    /// # Errors
    ///
    /// [`Error::File`] if scoring has not been run there, [`Error::Records`] if its files are damaged.
    pub fn read(arm: Arm) -> Result<Self, Error> {
        let dir = arm.run.join("scoring");
        let path = dir.join(score::SUMMARY);
        if !path.is_file() {
            return Err(Error::File {
                path,
                field: "scoring".to_owned(),
                expected: "the results of `arete-scoring score`".to_owned(),
                found: "no file".to_owned(),
            });
        }
        let summary =
            serde_json::from_slice(&fs_err::read(&path)?).map_err(|error| Error::File {
                path,
                field: "summary".to_owned(),
                expected: "what `arete-scoring score` writes".to_owned(),
                found: error.to_string(),
            })?;
        let scores = parquet::read(dir.join(score::SCORES))?;
        let mut yardstick = RunJson::read(&dir)?.inputs;
        yardstick.retain(|name, _| name.starts_with("yardstick"));
        let turns = Turns::carried(&dir)?;
        Ok(Self { arm, summary, scores, turns, yardstick })
    }

    /// Refuses a model that the run did not score.
    fn check_model(&self, name: &str) -> Result<(), Error> {
        let names: Vec<&str> =
            self.summary.models.iter().map(|model| model.name.as_str()).collect();
        if names.contains(&name) {
            return Ok(());
        }
        Err(Error::File {
            path: self.arm.run.join("scoring").join(score::SUMMARY),
            field: "models".to_owned(),
            expected: name.to_owned(),
            found: names.join(", "),
        })
    }

    /// The yardstick's scores of one model's replies in the first `n_turns`, by prompt; none without a yardstick.
    fn yardstick(&self, model: &str, n_turns: usize) -> BTreeMap<&str, Vec<f64>> {
        let mut out: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        let is_among = |row: &&ScoreRow| {
            row.model == model && self.turns.place(row.aspect).is_some_and(|place| place < n_turns)
        };
        for row in self.scores.iter().filter(is_among) {
            if let Some(score) = row.yardstick {
                out.entry(&row.prompt_id).or_default().push(f64::from(score));
            }
        }
        out
    }
}

/// Whether these runs can stand in one comparison of `first` and `last`.
///
/// # Errors
///
/// [`Error::File`] if a run did not score one of the two models, or was scored with another yardstick than those before it.
pub fn check(runs: &[ScoredRun], first: &str, last: &str) -> Result<(), Error> {
    for run in runs {
        run.check_model(first)?;
        run.check_model(last)?;
    }
    let with_yardstick: Vec<&ScoredRun> =
        runs.iter().filter(|run| !run.yardstick.is_empty()).collect();
    for pair in with_yardstick.windows(2) {
        let differs = |name: &&String| pair[0].yardstick.get(*name) != pair[1].yardstick.get(*name);
        if let Some(name) = pair[0].yardstick.keys().chain(pair[1].yardstick.keys()).find(differs) {
            let shown = |run: &ScoredRun| run.yardstick.get(name).cloned().unwrap_or_default();
            return Err(Error::File {
                path: pair[1].arm.run.join("scoring/run.json"),
                field: format!("inputs.{name}"),
                expected: format!(
                    "the yardstick of {} ({}): scores of different yardsticks cannot be compared, score again with one",
                    pair[0].arm.run.display(),
                    shown(pair[0])
                ),
                found: shown(pair[1]),
            });
        }
    }
    Ok(())
}

/// How two arms compare by the yardstick.
#[derive(Clone, Debug, PartialEq)]
pub struct ArmDifference {
    /// What is subtracted.
    pub first: String,
    /// What it is subtracted from.
    pub last: String,
    /// Prompts that both answered, in one run or more.
    pub n_prompts: usize,
    /// Turns that both were asked for in the same words.
    pub n_turns: usize,
    /// Of the mean over prompts, aspects and seeds.
    pub mean: Change,
}

/// The number of turns that all runs share: as many as have the same questions from the first on, for a reply depends on
/// what was asked before it. The first, the answer to the prompt, all share.
pub fn n_shared_turns<'a>(runs: impl IntoIterator<Item = &'a ScoredRun>) -> usize {
    let mut shared: Option<Vec<Option<String>>> = None;
    for run in runs {
        let questions = run.turns.iter().map(|turn| turn.question.clone());
        let same = |before: Vec<Option<String>>| {
            before.into_iter().zip(questions.clone()).take_while(|(a, b)| a == b).map(|(a, _)| a)
        };
        shared = Some(
            shared.take().map_or_else(|| questions.clone().collect(), |own| same(own).collect()),
        );
    }
    shared.map_or(0, |own| own.len())
}

/// The yardstick's mean score of `model`, later arm − earlier arm, for every two arms that have one; of the turns that the
/// two arms' constitutions share.
///
/// # Panics
///
/// If `resampling` has no draws.
pub fn arm_differences(
    runs: &[ScoredRun],
    model: &str,
    resampling: Resampling,
) -> Vec<ArmDifference> {
    let mut names: Vec<&str> = Vec::new();
    for run in runs {
        if !names.contains(&run.arm.name.as_str()) {
            names.push(&run.arm.name);
        }
    }
    let of = |name: &str, n_turns: usize| {
        let runs = runs.iter().filter(|run| run.arm.name == name);
        means_by_prompt(runs.map(|run| run.yardstick(model, n_turns)))
    };
    let mut out = Vec::new();
    for (at, last) in names.iter().enumerate() {
        for first in &names[..at] {
            let either = |run: &&ScoredRun| [first, last].contains(&&run.arm.name.as_str());
            let n_turns = n_shared_turns(runs.iter().filter(either));
            let (before, after) = (of(first, n_turns), of(last, n_turns));
            let (before, after): (Vec<_>, Vec<_>) = before
                .iter()
                .filter_map(|(id, score)| Some((vec![*score], vec![*after.get(id)?])))
                .unzip();
            if before.is_empty() {
                continue;
            }
            let difference = stats::paired_difference_of(&before, &after, stats::mean, resampling);
            out.push(ArmDifference {
                first: (*first).to_owned(),
                last: (*last).to_owned(),
                n_prompts: before.len(),
                n_turns,
                mean: Change::of(difference),
            });
        }
    }
    out
}

/// The mean of each prompt's scores in all of these runs.
fn means_by_prompt<'a>(
    runs: impl Iterator<Item = BTreeMap<&'a str, Vec<f64>>>,
) -> BTreeMap<&'a str, f64> {
    let mut all: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for (id, scores) in runs.flatten() {
        all.entry(id).or_default().extend(scores);
    }
    all.into_iter().map(|(id, scores)| (id, stats::mean(&scores))).collect()
}

/// Both tables as aligned text.
pub fn text(runs: &[ScoredRun], first: &str, last: &str, resampling: Resampling) -> String {
    let mut text = Text::default();
    text.line(format!("{last} − {first} within each run; [95 % interval]"));
    text.line("");
    let mut rows = vec![row([
        "arm",
        "run",
        "prompts",
        "Score",
        "standardised",
        "better/same/worse",
        "detectable from",
        "yardstick",
    ])];
    rows.extend(runs.iter().map(|run| run_row(run, first, last)));
    text.table(1, &rows);
    text.line("");
    let between = arm_differences(runs, last, resampling);
    if between.is_empty() {
        text.line(format!(
            "No two arms share a yardstick's scores of {last}: score them with the same --yardstick to compare them."
        ));
    } else {
        text.line(format!("The yardstick's mean score of {last} between arms; [95 % interval]"));
        text.line("");
        let mut rows = vec![row(["arms", "yardstick", "prompts", "detectable from"])];
        rows.extend(between.iter().map(|own| {
            vec![
                format!("{} − {}", own.last, own.first),
                interval(&own.mean.interval, true),
                own.n_prompts.to_string(),
                effect(&own.mean),
            ]
        }));
        text.table(1, &rows);
        let n_shared = n_shared_turns(runs);
        if runs.iter().any(|run| run.turns.len() > n_shared) {
            let turns =
                if n_shared == 1 { "the answer alone" } else { "the turns that both share" };
            text.line("");
            text.line(format!(
                "The runs are of different constitutions: arms that differ are compared in {turns}."
            ));
        }
    }
    text.finish()
}

fn run_row(run: &ScoredRun, first: &str, last: &str) -> Vec<String> {
    let of = |scale| run.summary.difference(first, last, scale, Scope::All);
    let change = |found: Option<&Difference>, read: fn(&Difference) -> &Interval| {
        dash(found.map(|own| format!("{} {}", number(read(own).estimate, true), bounds(read(own)))))
    };
    let standardised = of(Scale::Standardised);
    vec![
        run.arm.name.clone(),
        name_of(&run.arm.run),
        run.summary.n_prompts.to_string(),
        change(of(Scale::Raw), |own| &own.score.interval),
        change(standardised, |own| &own.score.interval),
        dash(standardised.map(Difference::tally)),
        dash(standardised.map(|own| effect(&own.score))),
        change(of(Scale::Yardstick), |own| &own.mean.interval),
    ]
}

/// The last part of a path.
fn name_of(path: &Path) -> String {
    path.file_name()
        .map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use arete_records::{Aspect, FinishReason};

    use super::*;
    use crate::coherence::Coherence;
    use crate::summary::ModelSummary;

    /// A run in which every aspect of prompt i has the i-th yardstick score.
    fn run(arm: &str, scores: &[(u32, f32)]) -> ScoredRun {
        let scores = scores
            .iter()
            .flat_map(|&(prompt, score)| {
                Aspect::SHIPPED.map(|aspect| ScoreRow {
                    model: "final".to_owned(),
                    prompt_id: format!("{prompt:016x}"),
                    aspect,
                    score: 0.0,
                    z: 0.0,
                    yardstick: Some(score),
                    n_tokens: 1,
                    finish_reason: FinishReason::Stop,
                })
            })
            .collect();
        let summary = Summary {
            n_prompts: 2,
            n_left_out: 0,
            draws: 1,
            level: 0.95,
            base: String::new(),
            yardstick: None,
            standardisation: BTreeMap::new(),
            models: Vec::new(),
            differences: Vec::new(),
        };
        let arm = Arm { name: arm.to_owned(), run: PathBuf::from(format!("runs/{arm}")) };
        ScoredRun { arm, summary, scores, turns: Turns::default(), yardstick: BTreeMap::new() }
    }

    fn quick() -> Resampling {
        Resampling { draws: 200, level: 0.95, seed: 1 }
    }

    #[test]
    fn seeds_are_averaged_and_prompts_paired() {
        // Prompt 2 was drawn by one seed of the second arm only; prompt 3 by no run of the first, so it counts nowhere.
        let runs = [
            run("report", &[(1, 0.0), (2, 1.0)]),
            run("recommended", &[(1, 1.0)]),
            run("recommended", &[(1, 2.0), (2, 2.5), (3, 9.0)]),
        ];
        let differences = arm_differences(&runs, "final", quick());
        assert_eq!(differences.len(), 1);
        let own = &differences[0];
        assert_eq!((own.first.as_str(), own.last.as_str()), ("report", "recommended"));
        assert_eq!(own.n_prompts, 2);
        // (1 + 2) / 2 − 0 and 2.5 − 1; every prompt has the same difference, so no redraw has another.
        assert_eq!(own.mean.interval, Interval { estimate: 1.5, low: 1.5, high: 1.5 });
    }

    #[test]
    fn runs_of_different_constitutions_are_compared_in_what_they_share() {
        // The second arm asked another question after the answer, and its replies to that score 9.
        let dir = tempfile::tempdir().unwrap();
        let other = "[[turn]]\nname = \"deed\"\n[[turn]]\nname = \"why\"\nquestion = \"Why?\"\n\
                     [virtues]\nren = \"Which is kinder?\"";
        fs_err::write(dir.path().join("constitution.toml"), other).unwrap();
        let (answer, why) = (Aspect::new("deed").unwrap(), Aspect::new("why").unwrap());
        let mut confucian = run("confucian", &[(1, 1.0), (2, 2.0)]);
        confucian.turns = Turns::carried(dir.path()).unwrap();
        confucian.scores.retain(|row| row.aspect != Aspect::CONSEQUENCE);
        for row in &mut confucian.scores {
            row.aspect = if row.aspect == Aspect::ACTION { answer } else { why };
            row.yardstick = row.yardstick.map(|score| if row.aspect == why { 9.0 } else { score });
        }
        let runs = [run("report", &[(1, 0.0), (2, 1.0)]), confucian];
        assert_eq!((n_shared_turns(&runs), n_shared_turns(&runs[..1])), (1, 3));
        let own = &arm_differences(&runs, "final", quick())[0];
        assert_eq!((own.n_prompts, own.n_turns, own.mean.interval.estimate), (2, 1, 1.0));
        let text = text(&runs, "original", "final", quick());
        assert!(text.contains("compared in the answer alone"), "{text}");
    }

    #[test]
    fn runs_of_other_yardsticks_or_without_the_model_are_refused() {
        let by = |name: &str, sum: Option<&str>| {
            let mut run = run(name, &[(1, 0.0)]);
            run.yardstick =
                sum.map(|sum| ("yardstick".to_owned(), sum.to_owned())).into_iter().collect();
            let model = |name: &str| ModelSummary {
                name: name.to_owned(),
                source: String::new(),
                scores: Vec::new(),
                coherence: Coherence::default(),
                coherence_by_aspect: BTreeMap::new(),
                retokenised: false,
                preference_accuracy: None,
            };
            run.summary.models = vec![model("original"), model("final")];
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
    fn without_a_yardstick_nothing_is_compared_between_arms() {
        let mut runs = [run("a", &[(1, 0.0)]), run("b", &[(1, 1.0)])];
        for row in runs.iter_mut().flat_map(|run| &mut run.scores) {
            row.yardstick = None;
        }
        assert_eq!(arm_differences(&runs, "final", quick()), []);
        assert!(text(&runs, "original", "final", quick()).contains("the same --yardstick"));
    }
}
