//! From scores to statements: Score, intervals, wins, the smallest difference this many prompts can show.
//!
//! Everything is a function of the rows alone, in f64.

use std::collections::BTreeMap;

use arete_records::Aspect;
use arete_records::rows::ScoreRow;
use arete_records::stats::{self, Bootstrap, Interval, Resampling};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::coherence::Coherence;

/// Level of the two-sided test behind [`Change::minimum_detectable_effect`].
const ALPHA: f64 = 0.05;
/// Probability with which that effect would be found.
const POWER: f64 = 0.8;
/// Standard normal quantile of a two-sided 95 % interval.
const Z: f64 = 1.96;

/// Name of the model after PPO.
const FINAL: &str = "final";

/// Which numbers are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scale {
    /// Scores as the reward models give them.
    Raw,
    /// Scores with each reward model's mean and standard deviation removed.
    Standardised,
    /// Scores of the yardstick, the only ones comparable between recipes.
    Yardstick,
}

impl Scale {
    /// Every scale.
    pub const ALL: [Self; 3] = [Self::Raw, Self::Standardised, Self::Yardstick];

    fn of(self, row: &ScoreRow) -> Option<f64> {
        match self {
            Self::Raw => Some(f64::from(row.score)),
            Self::Standardised => Some(f64::from(row.z)),
            Self::Yardstick => row.yardstick.map(f64::from),
        }
    }
}

/// All aspects together, or one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// All scores.
    All,
    /// Those of one aspect's replies.
    Of(Aspect),
}

impl Scope {
    /// What stands for all aspects; no aspect is called that.
    const ALL: &str = "all";

    /// All aspects together, then each.
    pub fn every(aspects: &[Aspect]) -> Vec<Self> {
        [Self::All].into_iter().chain(aspects.iter().map(|&aspect| Self::Of(aspect))).collect()
    }

    /// The lower-case name.
    pub fn name(self) -> &'static str {
        self.aspect().map_or(Self::ALL, Aspect::name)
    }

    /// The aspect; none for all together.
    pub(crate) fn aspect(self) -> Option<Aspect> {
        match self {
            Self::All => None,
            Self::Of(aspect) => Some(aspect),
        }
    }

    fn holds(self, aspect: Aspect) -> bool {
        self.aspect().is_none_or(|own| own == aspect)
    }
}

impl Serialize for Scope {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Scope {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        if name == Self::ALL {
            return Ok(Self::All);
        }
        Aspect::new(&name).map(Self::Of).map_err(serde::de::Error::custom)
    }
}

/// The Score of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoreOf {
    /// Of which numbers.
    pub scale: Scale,
    /// Of which turns.
    pub scope: Scope,
    /// How many.
    pub n: usize,
    /// μ.
    pub mean: f64,
    /// σ, population.
    pub std: f64,
    /// μ − 0.5 σ with its bootstrap interval (prompts redrawn).
    pub score: Interval,
}

/// How probable a policy finds the better side of labelled pairs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PreferenceAccuracy {
    /// Number of pairs.
    pub n: usize,
    /// Part whose chosen reply has the higher mean log P per token, with Wilson's interval.
    pub accuracy: Interval,
}

impl PreferenceAccuracy {
    /// From (chosen, rejected) mean log-probabilities; none without pairs. A tie is no win.
    pub fn of(logprobs: &[(f64, f64)]) -> Option<Self> {
        let n = logprobs.len();
        let wins = logprobs.iter().filter(|(chosen, rejected)| chosen > rejected).count();
        (n > 0).then(|| Self { n, accuracy: stats::wilson(wins as u64, n as u64, Z) })
    }
}

/// What is said about one model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelSummary {
    /// `original`, `sft`, `final`, …
    pub name: String,
    /// Where it came from, as it was named.
    pub source: String,
    /// Its Scores.
    pub scores: Vec<ScoreOf>,
    /// Its replies as language.
    pub coherence: Coherence,
    /// Its replies as language, turn by turn.
    pub coherence_by_aspect: BTreeMap<Aspect, Coherence>,
    /// Whether its vocabulary is another than the base's: then perplexity is that of its replies' text in the base's tokens.
    #[serde(default)]
    pub retokenised: bool,
    /// On labelled pairs, if there are any.
    pub preference_accuracy: Option<PreferenceAccuracy>,
}

impl ModelSummary {
    /// One of its Scores.
    pub fn score(&self, scale: Scale, scope: Scope) -> Option<&ScoreOf> {
        self.scores.iter().find(|score| (score.scale, score.scope) == (scale, scope))
    }
}

/// A difference between two models on the same prompts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// last − first, with its paired bootstrap interval.
    pub interval: Interval,
    /// Standard deviation of the redraws.
    pub standard_error: f64,
    /// The smallest true difference that would be found with probability 0.8 at level 0.05.
    pub minimum_detectable_effect: f64,
}

impl Change {
    pub(crate) fn of(bootstrap: Bootstrap) -> Self {
        let Bootstrap { interval, standard_error } = bootstrap;
        let effect = stats::minimum_detectable_effect(standard_error, ALPHA, POWER);
        Self { interval, standard_error, minimum_detectable_effect: effect }
    }

    /// Whether the interval excludes no difference. One prompt has no interval, and is never clear.
    pub fn is_clear(&self) -> bool {
        self.standard_error > 0.0 && (self.interval.low > 0.0 || self.interval.high < 0.0)
    }
}

/// How two models compare.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// What is subtracted.
    pub first: String,
    /// What it is subtracted from.
    pub last: String,
    /// On which numbers.
    pub scale: Scale,
    /// On which turns.
    pub scope: Scope,
    /// Of the Score, μ − 0.5 σ.
    pub score: Change,
    /// Of the mean alone.
    pub mean: Change,
    /// Prompts on which `last` has the higher mean.
    pub wins: u64,
    /// Prompts on which both have the same (the same replies).
    pub ties: u64,
    /// Prompts on which `first` has the higher mean.
    pub losses: u64,
    /// Two-sided sign test of wins against losses.
    pub sign_test: f64,
}

impl Difference {
    /// `30/5/15`: prompts on which `last` is better, the same, worse.
    pub(crate) fn tally(&self) -> String {
        format!("{}/{}/{}", self.wins, self.ties, self.losses)
    }
}

/// How scores are standardised.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Standardisation {
    /// Subtracted.
    pub mean: f64,
    /// Divided by.
    pub std: f64,
    /// Scores they are from.
    pub n: usize,
    /// Where they are from: the reward model's own statistics, or these replies.
    pub from: String,
}

/// The contents of `summary.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Test prompts that every model answered.
    pub n_prompts: usize,
    /// Test prompts left out because prompt and replies do not fit some model.
    pub n_left_out: usize,
    /// Redraws of every bootstrap.
    pub draws: usize,
    /// Mass inside every interval.
    pub level: f64,
    /// What the reward models read with.
    pub base: String,
    /// The yardstick reward model, if there is one.
    pub yardstick: Option<String>,
    /// By reward model.
    pub standardisation: BTreeMap<Aspect, Standardisation>,
    /// In the order given.
    pub models: Vec<ModelSummary>,
    /// Of every two models, later − earlier, the most telling last.
    pub differences: Vec<Difference>,
}

impl Summary {
    /// The aspects that there are Scores of, in their order.
    pub fn aspects(&self) -> Vec<Aspect> {
        let mut aspects = Vec::new();
        for score in self.models.iter().flat_map(|model| &model.scores) {
            if let Some(aspect) = score.scope.aspect().filter(|aspect| !aspects.contains(aspect)) {
                aspects.push(aspect);
            }
        }
        aspects
    }

    /// The model that the run is about: `final`, or else the last one.
    pub fn outcome(&self) -> Option<&ModelSummary> {
        self.models.iter().find(|model| model.name == FINAL).or(self.models.last())
    }

    /// The outcome against the first model, on all scores: what the run changed.
    pub fn headline(&self, scale: Scale) -> Option<&Difference> {
        let first = self.models.first()?;
        self.difference(&first.name, &self.outcome()?.name, scale, Scope::All)
    }

    /// The outcome against the model before it, on all scores: what the last stage changed.
    pub fn last_step(&self, scale: Scale) -> Option<&Difference> {
        let outcome = self.outcome()?;
        let at = self.models.iter().position(|model| model.name == outcome.name)?;
        let before = self.models.get(at.checked_sub(1)?)?;
        self.difference(&before.name, &outcome.name, scale, Scope::All)
    }

    /// A difference, if both models are there.
    pub fn difference(
        &self,
        first: &str,
        last: &str,
        scale: Scale,
        scope: Scope,
    ) -> Option<&Difference> {
        self.differences.iter().find(|difference| {
            difference.first == first
                && difference.last == last
                && (difference.scale, difference.scope) == (scale, scope)
        })
    }
}

/// The scores of one model as clusters: one a prompt, in the order of `prompt_ids`.
fn clusters(
    rows: &[&ScoreRow],
    prompt_ids: &[&str],
    scale: Scale,
    scope: Scope,
) -> Option<Vec<Vec<f64>>> {
    let mut by_prompt: BTreeMap<&str, Vec<(Aspect, f64)>> = BTreeMap::new();
    for row in rows.iter().filter(|row| scope.holds(row.aspect)) {
        by_prompt.entry(&row.prompt_id).or_default().push((row.aspect, scale.of(row)?));
    }
    let cluster = |prompt_id: &&str| {
        let mut scores = by_prompt.get(prompt_id)?.clone();
        scores.sort_by_key(|(aspect, _)| *aspect);
        Some(scores.into_iter().map(|(_, score)| score).collect())
    };
    prompt_ids.iter().map(cluster).collect()
}

/// Rows of each model, in the order in which models first appear.
pub(crate) fn by_model(rows: &[ScoreRow]) -> Vec<(&str, Vec<&ScoreRow>)> {
    let mut out: Vec<(&str, Vec<&ScoreRow>)> = Vec::new();
    for row in rows {
        match out.iter_mut().find(|(name, _)| *name == row.model) {
            Some((_, own)) => own.push(row),
            None => out.push((&row.model, vec![row])),
        }
    }
    out
}

fn prompt_ids<'a>(rows: &[&'a ScoreRow]) -> Vec<&'a str> {
    let mut ids: Vec<&str> = rows.iter().map(|row| row.prompt_id.as_str()).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// The Scores of every model, in the order in which models first appear.
///
/// # Panics
///
/// If `draws` is 0.
pub fn scores(rows: &[ScoreRow], resampling: Resampling) -> Vec<(String, Vec<ScoreOf>)> {
    let aspects = aspects_of(rows);
    by_model(rows)
        .into_iter()
        .map(|(name, own)| {
            let prompt_ids = prompt_ids(&own);
            let mut scores = Vec::new();
            for (scale, scope) in every_view(&aspects) {
                if let Some(clusters) = clusters(&own, &prompt_ids, scale, scope) {
                    let all = clusters.concat();
                    let bootstrap = stats::bootstrap(&clusters, stats::score, resampling);
                    let (mean, std) = (stats::mean(&all), stats::std(&all));
                    let score = bootstrap.interval;
                    scores.push(ScoreOf { scale, scope, n: all.len(), mean, std, score });
                }
            }
            (name.to_owned(), scores)
        })
        .collect()
}

/// Every two models compared on the prompts both answered, later − earlier.
///
/// # Panics
///
/// If `draws` is 0.
pub fn differences(rows: &[ScoreRow], resampling: Resampling) -> Vec<Difference> {
    let models = by_model(rows);
    let aspects = aspects_of(rows);
    let mut out = Vec::new();
    for (at, (last, last_rows)) in models.iter().enumerate() {
        for (first, first_rows) in models[..at].iter().rev() {
            let theirs = prompt_ids(first_rows);
            let shared: Vec<&str> = prompt_ids(last_rows)
                .into_iter()
                .filter(|id| theirs.binary_search(id).is_ok())
                .collect();
            if shared.is_empty() {
                continue;
            }
            for (scale, scope) in every_view(&aspects) {
                let sides = clusters(first_rows, &shared, scale, scope)
                    .zip(clusters(last_rows, &shared, scale, scope));
                if let Some((before, after)) = sides {
                    out.push(difference(first, last, (scale, scope), &before, &after, resampling));
                }
            }
        }
    }
    out
}

fn every_view(aspects: &[Aspect]) -> impl Iterator<Item = (Scale, Scope)> {
    let scopes = Scope::every(aspects);
    Scale::ALL
        .into_iter()
        .flat_map(move |scale| scopes.clone().into_iter().map(move |scope| (scale, scope)))
}

/// The aspects that scores are of, in the order in which they first come up.
pub(crate) fn aspects_of(rows: &[ScoreRow]) -> Vec<Aspect> {
    let mut aspects = Vec::new();
    for row in rows {
        if !aspects.contains(&row.aspect) {
            aspects.push(row.aspect);
        }
    }
    aspects
}

fn difference(
    first: &str,
    last: &str,
    (scale, scope): (Scale, Scope),
    before: &[Vec<f64>],
    after: &[Vec<f64>],
    resampling: Resampling,
) -> Difference {
    let (mut wins, mut ties, mut losses) = (0, 0, 0);
    for (before, after) in before.iter().zip(after) {
        match stats::mean(after).total_cmp(&stats::mean(before)) {
            std::cmp::Ordering::Greater => wins += 1,
            std::cmp::Ordering::Equal => ties += 1,
            std::cmp::Ordering::Less => losses += 1,
        }
    }
    let change = |statistic: fn(&[f64]) -> f64| {
        Change::of(stats::paired_difference_of(before, after, statistic, resampling))
    };
    Difference {
        first: first.to_owned(),
        last: last.to_owned(),
        scale,
        scope,
        score: change(stats::score),
        mean: change(stats::mean),
        wins,
        ties,
        losses,
        sign_test: stats::sign_test(wins, losses),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arete_records::FinishReason;

    fn row(model: &str, prompt: u32, aspect: Aspect, score: f32) -> ScoreRow {
        ScoreRow {
            model: model.to_owned(),
            prompt_id: format!("{prompt:016x}"),
            aspect,
            score,
            z: score / 2.0,
            yardstick: None,
            n_tokens: 3,
            finish_reason: FinishReason::Stop,
        }
    }

    /// Three scores a prompt.
    fn rows(model: &str, prompts: &[[f32; 3]]) -> Vec<ScoreRow> {
        let mut out = Vec::new();
        for (prompt, scores) in (0..).zip(prompts) {
            for (aspect, score) in Aspect::SHIPPED.into_iter().zip(scores) {
                out.push(row(model, prompt, aspect, *score));
            }
        }
        out
    }

    fn quick() -> Resampling {
        Resampling { draws: 500, level: 0.95, seed: 1 }
    }

    #[test]
    fn the_score_is_that_of_the_report() {
        // All six: 2 4 4 4 5 5 → μ = 4, σ² = (4+0+0+0+1+1)/6 = 1, Score = 3.5.
        let rows = rows("original", &[[2.0, 4.0, 4.0], [4.0, 5.0, 5.0]]);
        let scores = scores(&rows, quick());
        let (name, scores) = &scores[0];
        assert_eq!(name, "original");
        let of =
            |scale, scope| scores.iter().find(|s| (s.scale, s.scope) == (scale, scope)).unwrap();
        let all = of(Scale::Raw, Scope::All);
        assert_eq!((all.n, all.mean, all.std, all.score.estimate), (6, 4.0, 1.0, 3.5));
        assert!(all.score.low <= 3.5 && all.score.high >= 3.5);
        // The action alone: 2 and 4 → μ = 3, σ = 1, Score = 2.5; standardised: half of everything.
        assert_eq!(of(Scale::Raw, Scope::Of(Aspect::ACTION)).score.estimate, 2.5);
        assert_eq!(of(Scale::Standardised, Scope::All).score.estimate, 1.75);
        assert!(!scores.iter().any(|score| score.scale == Scale::Yardstick));
    }

    #[test]
    fn differences_are_paired_and_count_wins() {
        let mut all = rows("original", &[[0.0; 3], [1.0; 3], [5.0, 6.0, 7.0], [2.0; 3]]);
        all.extend(rows("final", &[[1.0; 3], [2.0; 3], [6.0, 7.0, 8.0], [2.0; 3]]));
        let differences = differences(&all, quick());
        let of =
            |scope| differences.iter().find(|d| (d.scale, d.scope) == (Scale::Raw, scope)).unwrap();
        let d = of(Scope::All);
        assert_eq!((d.first.as_str(), d.last.as_str()), ("original", "final"));
        assert_eq!((d.wins, d.ties, d.losses), (3, 1, 0));
        assert_eq!(d.mean.interval.estimate, 0.75);
        // Sign test of 3 : 0 = 2 · (1/2)³.
        assert!((d.sign_test - 0.25).abs() < 1e-12);
        // 2.8016 = z(0.975) + z(0.8)
        let ratio = d.mean.minimum_detectable_effect / d.mean.standard_error;
        assert!((ratio - 2.801_585).abs() < 1e-5, "{ratio}");
        assert_eq!(of(Scope::Of(Aspect::ACTION)).mean.interval.estimate, 0.75);
    }

    #[test]
    fn only_shared_prompts_are_compared() {
        let mut all = rows("a", &[[1.0; 3], [2.0; 3]]);
        all.extend(rows("b", &[[1.5; 3]]));
        let differences = differences(&all, quick());
        let d = &differences[0];
        assert_eq!((d.wins, d.ties, d.losses), (1, 0, 0));
        assert_eq!(d.mean.interval.estimate, 0.5);
    }

    #[test]
    fn accuracy_of_a_policy_on_pairs() {
        let accuracy =
            PreferenceAccuracy::of(&[(-1.0, -2.0), (-2.0, -1.0), (-1.0, -1.0), (-0.5, -3.0)]);
        assert_eq!(accuracy.unwrap().accuracy.estimate, 0.5);
        assert!(PreferenceAccuracy::of(&[]).is_none());
    }
}
