//! What is compared, as numbers.

use std::collections::{BTreeMap, BTreeSet};

use arete_records::FinishReason;
use arete_records::rows::ScoreRow;
use arete_records::stats::{self, CrossedMean, Interval, MeanOfRuns, PairedReplies};
use serde::Serialize;

use super::ScoredRun;

/// Fewest prompts that runs must share for seeds and prompts to be crossed.
const FEWEST_SHARED: usize = 10;

/// A figure, or why there is none.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Figure {
    /// The estimate.
    pub value: Option<f64>,
    /// Lower end of its 95 % interval.
    pub low: Option<f64>,
    /// Upper end.
    pub high: Option<f64>,
    /// Why there is none.
    pub reason: Option<String>,
}

impl Figure {
    fn of(found: Result<Interval, String>) -> Self {
        match found {
            Ok(Interval { estimate, low, high }) => {
                Self { value: Some(estimate), low: Some(low), high: Some(high), reason: None }
            }
            Err(reason) => Self { reason: Some(reason), ..Self::default() },
        }
    }

    /// The figure with its interval.
    #[must_use]
    pub fn interval(&self) -> Option<Interval> {
        Some(Interval { estimate: self.value?, low: self.low?, high: self.high? })
    }
}

/// A row of the tables: an arm, or two arms.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ArmFigure {
    /// `recommended`, or `recommended − report`.
    pub name: String,
    /// Seeds: `3`, or `3, 5` of two arms; of one seed the interval says nothing of others.
    pub n_seeds: String,
    /// Prompts that all its runs answered.
    pub n_prompts: usize,
    /// Whether its interval covers one run alone.
    pub this_run_only: bool,
    /// Whether seeds and prompts are crossed; else every run is one number.
    pub crossed: bool,
    /// By the comparison's measure.
    pub mean: Figure,
    /// The same at equal length and equal truncation.
    pub equal_length: Figure,
    /// The interval of `mean` that holds 95 % for all looks together (Bonferroni); none where there is none.
    pub corrected: Option<Interval>,
}

/// Whose scores are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Measure {
    /// The yardstick's, of answers.
    Yardstick,
    /// Those of the reward models, standardised, the mean over all turns: where no run has a yardstick's and all share them.
    Score,
}

impl Measure {
    /// Over the columns.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Yardstick => "yardstick, answers",
            Self::Score => "score, all turns",
        }
    }

    /// In a sentence.
    pub(super) fn phrase(self) -> &'static str {
        match self {
            Self::Yardstick => "The yardstick's score",
            Self::Score => "The shared reward models' standardised score",
        }
    }

    /// What these runs can be compared by.
    fn of(runs: &[ScoredRun]) -> Self {
        let has_yardstick = |run: &ScoredRun| run.scores.iter().any(|row| row.yardstick.is_some());
        let is_shared = |pair: &[ScoredRun]| {
            let [a, b] = pair else { return true };
            // The files, what they are standardised by, and what they read.
            a.rewards == b.rewards
                && a.summary.standardisation == b.summary.standardisation
                && a.turns.names() == b.turns.names()
        };
        let have_rewards = runs.iter().all(|run| !run.rewards.is_empty());
        match have_rewards && runs.windows(2).all(is_shared) && !runs.iter().any(has_yardstick) {
            true => Self::Score,
            false => Self::Yardstick,
        }
    }
}

/// Runs compared.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// The model that gains are counted from.
    pub first: String,
    /// The model that is compared.
    pub last: String,
    /// Whose scores are compared.
    pub measure: Measure,
    /// What each arm gained.
    pub within: Vec<ArmFigure>,
    /// The last model of every two arms, later − earlier.
    pub between: Vec<ArmFigure>,
    /// Looks that the corrected intervals hold for together: the rows of both tables.
    pub n_looks: usize,
}

impl Comparison {
    /// What must be said beside the tables.
    pub(super) fn notes(&self) -> Vec<&'static str> {
        let rows = || self.within.iter().chain(&self.between);
        let mut out = Vec::new();
        if self.measure == Measure::Score && rows().next().is_some() {
            out.push(
                "Without a yardstick: by the reward models that the runs share, which policies were trained against; that one scores \
                 higher is no evidence that it is better.",
            );
        }
        if rows().any(|own| own.this_run_only) {
            out.push("One seed: the interval says this run only (prompts alone are luck in it).");
        }
        if rows().any(|own| !own.crossed) {
            out.push(
                "Runs that share fewer than ten prompts count as one number each (Student's t).",
            );
        }
        out
    }
}

/// A measure's view of one run's replies: score, tokens and how much of them was cut, by prompt.
type Answers<'a> = BTreeMap<&'a str, (f64, f64, f64)>;

fn answers<'a>(run: &'a ScoredRun, model: &str, measure: Measure) -> Answers<'a> {
    let of = |row: &'a ScoreRow| {
        let is_cut = f64::from(u8::from(row.finish_reason == FinishReason::Length));
        let score = match measure {
            Measure::Yardstick => f64::from(row.yardstick?),
            Measure::Score => f64::from(row.z),
        };
        Some((row.prompt_id.as_str(), (score, f64::from(row.n_tokens), is_cut)))
    };
    // The reward model of the answer, or where there is none a virtue's, has the yardstick's score beside its own.
    let is_read = |row: &&ScoreRow| {
        measure == Measure::Score || run.turns.place(row.aspect).unwrap_or(0) == 0
    };
    let own = run.scores.iter().filter(|row| row.model == model).filter(is_read);
    let mut by_prompt: BTreeMap<&str, Vec<(f64, f64, f64)>> = BTreeMap::new();
    for (prompt_id, seen) in own.filter_map(of) {
        let all = by_prompt.entry(prompt_id).or_default();
        match measure {
            // Beside every virtue's score of an answer stands the same one.
            Measure::Yardstick => *all = vec![seen],
            Measure::Score => all.push(seen),
        }
    }
    let mean = |all: Vec<(f64, f64, f64)>| {
        let n = all.len() as f64;
        let sum = all.into_iter().reduce(|a, b| (a.0 + b.0, a.1 + b.1, a.2 + b.2));
        sum.map(|(score, tokens, cut)| (score / n, tokens / n, cut / n))
    };
    by_prompt.into_iter().filter_map(|(id, all)| Some((id, mean(all)?))).collect()
}

/// One arm's runs, those that have the measure's scores.
struct Side<'a> {
    name: &'a str,
    first: Vec<Answers<'a>>,
    last: Vec<Answers<'a>>,
}

/// Compares the runs by the yardstick's scores of the answers of `last`; without a yardstick by the reward models' scores, where all
/// runs share them.
#[must_use]
pub fn compare(runs: &[ScoredRun], first: &str, last: &str) -> Comparison {
    let measure = Measure::of(runs);
    let mut arms: Vec<Side<'_>> = Vec::new();
    for run in runs {
        let [before, after] = [first, last].map(|model| answers(run, model, measure));
        if after.is_empty() {
            continue;
        }
        match arms.iter_mut().find(|arm| arm.name == run.arm.name) {
            Some(arm) => {
                arm.first.push(before);
                arm.last.push(after);
            }
            None => arms.push(Side { name: &run.arm.name, first: vec![before], last: vec![after] }),
        }
    }
    let n_looks = arms.len() + arms.len() * arms.len().saturating_sub(1) / 2;
    let within = arms.iter().map(|arm| within(arm, n_looks)).collect();
    let mut between = Vec::new();
    for (at, last) in arms.iter().enumerate() {
        between.extend(arms[..at].iter().map(|first| difference(first, last, n_looks)));
    }
    let [first, last] = [first, last].map(str::to_owned);
    Comparison { first, last, measure, within, between, n_looks }
}

/// Prompts that all of these hold.
fn shared<'a>(all: &[&Answers<'a>]) -> Vec<&'a str> {
    let ids = |answers: &Answers<'a>| answers.keys().copied().collect::<BTreeSet<&str>>();
    let common = all.iter().map(|answers| ids(answers)).reduce(|a, b| &a & &b);
    common.into_iter().flatten().collect()
}

/// Last − first of the same prompts, one row a run.
fn paired(
    first: &[Answers<'_>],
    last: &[Answers<'_>],
    ids: Option<&[&str]>,
) -> Vec<Vec<PairedReplies>> {
    let row = |first: &Answers<'_>, last: &Answers<'_>| {
        let own = ids.map_or_else(|| shared(&[first, last]), <[&str]>::to_vec);
        own.into_iter()
            .map(|id| PairedReplies {
                score: last[id].0 - first[id].0,
                tokens: last[id].1 - first[id].1,
                cut: last[id].2 - first[id].2,
            })
            .collect()
    };
    first.iter().zip(last).map(|(first, last)| row(first, last)).collect()
}

fn scores(pairs: &[Vec<PairedReplies>]) -> Vec<Vec<f64>> {
    pairs.iter().map(|row| row.iter().map(|pair| pair.score).collect()).collect()
}

fn within(arm: &Side<'_>, n_looks: usize) -> ArmFigure {
    let all: Vec<&Answers<'_>> = arm.first.iter().chain(&arm.last).collect();
    let ids = shared(&all);
    let n_seeds = arm.last.len();
    let crossed = ids.len() >= FEWEST_SHARED || n_seeds == 1;
    let pairs = paired(&arm.first, &arm.last, crossed.then_some(&ids[..]));
    let found = match crossed {
        true => of_crossed(stats::crossed_mean(&scores(&pairs)), n_looks),
        false => of_runs(stats::mean_of_runs(&means(&scores(&pairs))), n_looks),
    };
    figure(arm.name.to_owned(), n_seeds.to_string(), n_seeds, ids.len(), crossed, found, &pairs)
}

fn difference(first: &Side<'_>, last: &Side<'_>, n_looks: usize) -> ArmFigure {
    let all: Vec<&Answers<'_>> = first.last.iter().chain(&last.last).collect();
    let ids = shared(&all);
    let seeds = [first.last.len(), last.last.len()];
    let fewest = seeds[0].min(seeds[1]);
    let crossed = ids.len() >= FEWEST_SHARED || fewest == 1;
    let of = |arm: &Side<'_>| -> Vec<Vec<f64>> {
        let row = |answers: &Answers<'_>| match crossed {
            true => ids.iter().map(|id| answers[id].0).collect(),
            false => answers.values().map(|answer| answer.0).collect(),
        };
        arm.last.iter().map(row).collect()
    };
    let (before, after) = (of(first), of(last));
    let found = match crossed {
        true => of_crossed(stats::crossed_difference(&before, &after), n_looks),
        false => of_runs(stats::difference_of_runs(&means(&before), &means(&after)), n_looks),
    };
    // At equal length replies are paired: the first run of one arm with the first of the other, and so on.
    let pairs = paired(&first.last, &last.last, crossed.then_some(&ids[..]));
    let n_seeds = match seeds[0] == seeds[1] {
        true => fewest.to_string(),
        false => format!("{}, {}", seeds[0], seeds[1]),
    };
    let name = format!("{} − {}", last.name, first.name);
    figure(name, n_seeds, fewest, ids.len(), crossed, found, &pairs)
}

/// An estimate with its interval, and the one corrected for several looks.
type Found = Option<(Interval, Interval)>;

fn of_crossed(found: Option<CrossedMean>, n_looks: usize) -> Found {
    found.map(|own| (own.interval, own.corrected(n_looks)))
}

fn of_runs(found: Option<MeanOfRuns>, n_looks: usize) -> Found {
    found.map(|own| (own.interval, own.corrected(n_looks)))
}

fn means(rows: &[Vec<f64>]) -> Vec<f64> {
    rows.iter().filter(|row| !row.is_empty()).map(|row| stats::mean(row)).collect()
}

fn figure(
    name: String,
    n_seeds: String,
    fewest_seeds: usize,
    n_prompts: usize,
    crossed: bool,
    found: Found,
    pairs: &[Vec<PairedReplies>],
) -> ArmFigure {
    let missing = || "fewer than two prompts in common".to_owned();
    let is_even = pairs.windows(2).all(|rows| rows[0].len() == rows[1].len());
    let equal_length = match is_even {
        true => stats::at_equal_length(pairs).map(|own| own.interval),
        // Runs with prompts of their own: what each is at equal length, and t over them.
        false => pairs
            .iter()
            .map(|row| stats::at_equal_length(std::slice::from_ref(row)))
            .collect::<Result<Vec<CrossedMean>, String>>()
            .and_then(|runs| {
                let runs: Vec<f64> = runs.iter().map(|own| own.interval.estimate).collect();
                stats::mean_of_runs(&runs).map(|own| own.interval).ok_or_else(missing)
            }),
    };
    ArmFigure {
        name,
        n_seeds,
        n_prompts,
        this_run_only: fewest_seeds == 1,
        crossed,
        mean: Figure::of(found.map(|(own, _)| own).ok_or_else(missing)),
        equal_length: Figure::of(equal_length),
        corrected: found.map(|(_, corrected)| corrected),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::run;
    use super::*;

    /// Scores of prompts 0 to 11: a gain, and what each prompt adds to it.
    fn scores(gain: f32, by_prompt: impl Fn(u32) -> f32) -> Vec<(u32, f32)> {
        (0..12).map(|prompt| (prompt, gain + by_prompt(prompt))).collect()
    }

    #[test]
    fn f7_the_interval_of_an_arm_knows_its_seeds() {
        // Three seeds whose gains are 0, 1 and 5 on every prompt: prompts say nothing, seeds everything.
        let runs = [0.0, 1.0, 5.0].map(|gain| run("recommended", &scores(gain, |_| 0.0)));
        let found = compare(&runs, "original", "final");
        let Interval { estimate, low, high } = found.within[0].mean.interval().unwrap();
        // Mean 2, sd √7, three seeds: t of 2 degrees is 4.302653.
        assert!((estimate - 2.0).abs() < 1e-6);
        assert!((high - 2.0 - 4.302_653 * (7.0_f64 / 3.0).sqrt()).abs() < 1e-4, "{high}");
        assert!(low < 0.0, "with prompts alone redrawn it was [2, 2]");
        assert_eq!((found.within[0].n_seeds.as_str(), found.within[0].this_run_only), ("3", false));
        assert_eq!(
            (found.n_looks, found.within[0].corrected),
            (1, found.within[0].mean.interval())
        );
    }

    #[test]
    fn arms_are_compared_over_seeds_and_looks_are_named() {
        let wobble = |prompt: u32| (prompt % 3) as f32 / 10.0;
        let runs = [
            run("report", &scores(0.0, wobble)),
            run("report", &scores(0.2, wobble)),
            run("recommended", &scores(1.0, wobble)),
            run("recommended", &scores(1.2, wobble)),
        ];
        let found = compare(&runs, "original", "final");
        let between = &found.between[0];
        assert_eq!((between.name.as_str(), between.n_prompts), ("recommended − report", 12));
        // Prompts cancel; each arm's seeds have variance 0.02, over two: standard error √0.02, two degrees: 4.302653.
        let own = between.mean.interval().unwrap();
        assert!((own.estimate - 1.0).abs() < 1e-6);
        assert!((own.high - 1.0 - 4.302_653 * 0.02_f64.sqrt()).abs() < 1e-4, "{own:?}");
        // Two arms and their difference: three looks, each at 1 − 0.05 / 3 (t 7.648804).
        assert_eq!(found.n_looks, 3);
        let corrected = between.corrected.unwrap();
        assert!((corrected.high - 1.0 - 7.648_804 * 0.02_f64.sqrt()).abs() < 1e-4);
        // All replies are equally long: the difference is the same there.
        assert!((between.equal_length.value.unwrap() - 1.0).abs() < 1e-6);
        let text = super::super::text(&runs, &found);
        assert!(text.contains("corrected for 3 looks (Bonferroni)"), "{text}");
    }

    #[test]
    fn shared_reward_models_compare_runs_without_a_yardstick() {
        // Two turns a prompt, scored 0.5 apart: the mean of both counts.
        let by_rewards = |arm: &str, gain: f32, sum: &str| {
            let mut run = run(arm, &scores(gain, |prompt| prompt as f32 / 10.0));
            for row in &mut run.scores {
                row.z = row.yardstick.take().unwrap();
            }
            let second = run.scores.clone().into_iter().map(|row| ScoreRow {
                aspect: arete_records::Aspect::MOTIVATION,
                z: row.z + 0.5,
                ..row
            });
            run.scores.extend(second.collect::<Vec<_>>());
            run.rewards = [("reward action".to_owned(), sum.to_owned())].into();
            run
        };
        let runs = [by_rewards("a", 0.0, "same"), by_rewards("b", 1.0, "same")];
        let found = compare(&runs, "original", "final");
        assert_eq!((found.measure, found.n_looks), (Measure::Score, 3));
        // The gain of 1, and of the prompts' own 0 to 1.1 in tenths the mean 0.55.
        assert!((found.within[1].mean.value.unwrap() - 1.55).abs() < 1e-6, "{found:?}");
        assert!((found.between[0].mean.value.unwrap() - 1.0).abs() < 1e-6);
        assert!(found.between[0].corrected.is_some());
        let text = super::super::text(&runs, &found);
        assert!(text.contains("score, all turns") && text.contains("no evidence"), "{text}");
        // Reward models of their own mean nothing to one another.
        let runs = [by_rewards("a", 0.0, "one"), by_rewards("b", 1.0, "other")];
        let found = compare(&runs, "original", "final");
        assert!(found.within.is_empty() && found.between.is_empty());
        // Nor do the same ones that are standardised otherwise.
        let mut runs = [by_rewards("a", 0.0, "same"), by_rewards("b", 1.0, "same")];
        let how = crate::summary::Standardisation {
            mean: 0.0,
            std: 2.0,
            n: 64,
            from: "these replies".to_owned(),
        };
        runs[1].summary.standardisation.insert(arete_records::Aspect::ACTION, how);
        assert!(compare(&runs, "original", "final").within.is_empty());
    }

    #[test]
    fn one_seed_speaks_of_itself() {
        let runs = [run("a", &scores(1.0, |prompt| prompt as f32))];
        let found = compare(&runs, "original", "final");
        assert!(found.within[0].this_run_only);
        assert!(super::super::text(&runs, &found).contains("this run only"));
    }

    #[test]
    fn seeds_with_prompts_of_their_own_are_one_number_each() {
        let far = |from: u32, gain: f32| -> Vec<(u32, f32)> {
            (from..from + 12).map(|prompt| (prompt, gain)).collect()
        };
        let runs = [run("a", &far(0, 0.0)), run("a", &far(100, 1.0)), run("a", &far(200, 5.0))];
        let found = compare(&runs, "original", "final");
        assert!(!found.within[0].crossed && found.within[0].n_prompts == 0);
        let own = found.within[0].mean.interval().unwrap();
        assert!((own.high - 2.0 - 4.302_653 * (7.0_f64 / 3.0).sqrt()).abs() < 1e-4, "{own:?}");
    }
}
