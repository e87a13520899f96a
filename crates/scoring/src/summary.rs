//! From scores to statements: Score, intervals, wins, the smallest difference this many prompts can show.
//!
//! Everything is a function of the rows alone, in f64.

use std::collections::BTreeMap;

use arete_chain::rulers::{NullRulers, Ruled, share};
use arete_records::rows::ScoreRow;
use arete_records::stats::{self, Bootstrap, Interval, PairedReplies, Resampling};
use arete_records::{Aspect, FinishReason};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::coherence::Coherence;
use crate::endpoint::Primary;

/// Level of the two-sided test behind [`Change::minimum_detectable_effect`].
const ALPHA: f64 = 0.05;
/// Probability with which that effect would be found.
const POWER: f64 = 0.8;

/// Name of the model after PPO.
const FINAL: &str = "final";
/// Name of the untouched model.
pub(crate) const ORIGINAL: &str = "original";

/// Which numbers are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scale {
    /// Scores as the reward models give them.
    Raw,
    /// Scores with each reward model's mean and standard deviation removed.
    Standardised,
    /// Scores of the yardstick, the only ones comparable between recipes; of answers alone.
    Yardstick,
    /// Scores of the yardstick's second judge, a bag of words and length; of answers alone.
    Words,
}

impl Scale {
    /// Every scale.
    pub const ALL: [Self; 4] = [Self::Raw, Self::Standardised, Self::Yardstick, Self::Words];

    /// Whether they are those of the run's own reward models.
    pub(crate) fn is_own(self) -> bool {
        matches!(self, Self::Raw | Self::Standardised)
    }

    fn of(self, row: &ScoreRow) -> Option<f64> {
        match self {
            Self::Raw => Some(f64::from(row.score)),
            Self::Standardised => Some(f64::from(row.z)),
            Self::Yardstick => row.yardstick.map(f64::from),
            Self::Words => row.yardstick_words.map(f64::from),
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
    /// What knows nothing of what is right, on the same pairs.
    pub null_rulers: NullRulers,
}

impl PreferenceAccuracy {
    /// From (chosen, rejected) mean log-probabilities and what the null rulers see of the same pairs; none without pairs. A tie
    /// is no win.
    ///
    /// # Panics
    ///
    /// Unless there are as many of both.
    pub fn of(logprobs: &[(f64, f64)], ruled: &[Ruled]) -> Option<Self> {
        let wins: Vec<f64> = logprobs
            .iter()
            .map(|(chosen, rejected)| f64::from(u8::from(chosen > rejected)))
            .collect();
        let null_rulers = NullRulers::beside(ruled, &wins)?;
        Some(Self { n: wins.len(), accuracy: share(&wins), null_rulers })
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
    /// KL from the base, nats a conversation at the sampling temperature, over the sampled tokens, with its bootstrap interval; none
    /// where the most probable token is taken, or the vocabulary is another.
    #[serde(default)]
    pub kl: Option<Interval>,
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
    /// What is left of the mean's difference at equal length and equal truncation.
    pub equal_length: AtEqualLength,
    /// The share of prompts on which `last` would win at equal length and equal truncation.
    pub win_rate: AtEqualLength,
    /// Whether the labels that the scores were learned from were made from this very contrast.
    pub circular: bool,
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

/// A figure at equal length, or why there is none.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AtEqualLength {
    /// The figure.
    pub value: Option<f64>,
    /// Lower end of its 95 % interval; of this run only.
    pub low: Option<f64>,
    /// Upper end.
    pub high: Option<f64>,
    /// Why there is no figure.
    pub reason: Option<String>,
}

impl AtEqualLength {
    pub(crate) fn of(found: Result<Interval, String>) -> Self {
        match found {
            Ok(Interval { estimate, low, high }) => {
                Self { value: Some(estimate), low: Some(low), high: Some(high), reason: None }
            }
            Err(reason) => Self { reason: Some(reason), ..Self::default() },
        }
    }

    /// The figure with its interval.
    pub fn interval(&self) -> Option<Interval> {
        Some(Interval { estimate: self.value?, low: self.low?, high: self.high? })
    }
}

/// What two models' answers differ by at equal length: an entry of `equal_length` in `summary.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EqualLength {
    /// The figure by the yardstick, or, without one, by the run's own reward model of the answer.
    #[serde(flatten)]
    pub figure: AtEqualLength,
    /// Whose scores: `yardstick` or `score`.
    pub measure: String,
    /// The share of prompts on which the later model would win.
    pub win_rate: AtEqualLength,
    /// Whether the labels behind the scores were made from this very contrast.
    pub circular: bool,
}

/// How the reward models' labels came about, as far as it makes comparisons circular.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Labels {
    /// Method of the preferences stage.
    pub method: String,
    /// Personas of the conversations stage.
    pub personas: String,
}

impl Labels {
    /// Whether a comparison of these two models asks what the labels were made of: "the tuned model's sample beats the original's".
    fn is_contrast_of(&self, first: &str, last: &str) -> bool {
        let of_models = self.method == "contrast" && self.personas == ORIGINAL;
        of_models && [first, last].contains(&ORIGINAL)
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
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The one comparison that was named before the run.
    pub primary: Primary,
    /// By comparison (`final - sft`), of the answer turn.
    pub equal_length: BTreeMap<String, EqualLength>,
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
    /// The yardstick, if there is one.
    pub yardstick: Option<String>,
    /// Whether every prompt was scored by a fold of the yardstick that never saw its question; none without a yardstick.
    pub yardstick_cross_fitted: Option<bool>,
    /// How the reward models' labels came about; none if nothing says so.
    pub labels: Option<Labels>,
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

    /// The first turn, the answer; all together if there are no scores.
    pub fn answer(&self) -> Scope {
        let of_models = self.models.iter().flat_map(|model| &model.scores).map(|own| own.scope);
        let scopes = of_models.chain(self.differences.iter().map(|own| own.scope));
        scopes.into_iter().find(|scope| *scope != Scope::All).unwrap_or(Scope::All)
    }

    /// The most turns that have scores of a scale: the yardstick reads the answer alone.
    pub fn widest(&self, scale: Scale) -> Scope {
        if scale.is_own() { Scope::All } else { self.answer() }
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

    /// Marks what is circular, and fills in `equal_length`, from the differences.
    pub(crate) fn complete(&mut self) {
        let answer = self.answer();
        for own in &mut self.differences {
            let labels = self.labels.as_ref().filter(|_| own.scale.is_own());
            own.circular =
                labels.is_some_and(|labels| labels.is_contrast_of(&own.first, &own.last));
        }
        let (scale, measure) = match self.yardstick {
            Some(_) => (Scale::Yardstick, "yardstick"),
            None => (Scale::Standardised, "score"),
        };
        let of = |own: &Difference| EqualLength {
            figure: own.equal_length.clone(),
            measure: measure.to_owned(),
            win_rate: own.win_rate.clone(),
            circular: own.circular,
        };
        self.equal_length = self
            .differences
            .iter()
            .filter(|own| (own.scale, own.scope) == (scale, answer))
            .map(|own| (comparison(&own.first, &own.last), of(own)))
            .collect();
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

/// `final - sft`.
pub(crate) fn comparison(first: &str, last: &str) -> String {
    format!("{last} - {first}")
}

/// Tokens, and the part of the replies that were cut, of each prompt.
fn lengths(rows: &[&ScoreRow], prompt_ids: &[&str], scope: Scope) -> Vec<[f64; 2]> {
    let mut by_prompt: BTreeMap<&str, Vec<[f64; 2]>> = BTreeMap::new();
    for row in rows.iter().filter(|row| scope.holds(row.aspect)) {
        let is_cut = f64::from(u8::from(row.finish_reason == FinishReason::Length));
        by_prompt.entry(&row.prompt_id).or_default().push([f64::from(row.n_tokens), is_cut]);
    }
    let mean = |prompt_id: &&str| {
        let own = by_prompt.get(prompt_id).map_or(&[][..], Vec::as_slice);
        [0, 1].map(|at| stats::mean(&own.iter().map(|both| both[at]).collect::<Vec<_>>()))
    };
    prompt_ids.iter().map(mean).collect()
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
                    let lengths = [first_rows, last_rows].map(|rows| lengths(rows, &shared, scope));
                    let pairs = paired(&before, &after, &lengths);
                    let mut own =
                        difference((*first, *last), (scale, scope), &before, &after, resampling);
                    let pairs = [pairs];
                    own.equal_length = AtEqualLength::of(
                        stats::at_equal_length(&pairs).map(|found| found.interval),
                    );
                    own.win_rate = AtEqualLength::of(stats::win_rate_at_equal_length(&pairs));
                    out.push(own);
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

/// One entry a prompt: how much better the last replies are, how much longer, and how many more of them were cut.
fn paired(
    before: &[Vec<f64>],
    after: &[Vec<f64>],
    [first, last]: &[Vec<[f64; 2]>; 2],
) -> Vec<PairedReplies> {
    before
        .iter()
        .zip(after)
        .zip(first.iter().zip(last))
        .map(|((before, after), (first, last))| PairedReplies {
            score: stats::mean(after) - stats::mean(before),
            tokens: last[0] - first[0],
            cut: last[1] - first[1],
        })
        .collect()
}

fn difference(
    (first, last): (&str, &str),
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
        equal_length: AtEqualLength::default(),
        win_rate: AtEqualLength::default(),
        circular: false,
        wins,
        ties,
        losses,
        sign_test: stats::sign_test(wins, losses),
    }
}

#[cfg(test)]
mod tests;
