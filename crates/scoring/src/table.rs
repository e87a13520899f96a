//! The summary as text: aligned columns for a terminal.

use std::fmt::Write as _;

use arete_records::stats::Interval;
use arete_stage::cli::printable;

use crate::endpoint::Primary;
use crate::summary::{
    AtEqualLength, Change, Difference, ModelSummary, PreferenceAccuracy, Scale, Scope, Summary,
};

/// Percentile intervals of fewer clusters are known to be too narrow (Efron & Tibshirani 1993, ch. 14).
pub(crate) const FEW_PROMPTS: usize = 20;

/// What `circular` means.
pub(crate) const CIRCULAR: &str = "circular: the reward models' labels said which of these two models' replies is better; scores by them are no evidence";

/// What the star behind a perplexity means.
pub(crate) const RETOKENISED: &str =
    "* perplexity of the text, per token of the base: this model's own tokens are others";

/// The summary as a few aligned tables, ending with what it means.
pub fn of(summary: &Summary) -> String {
    let mut text = Text::default();
    let (n, n_models) = (summary.n_prompts, summary.aspects().len());
    let models_of = if n_models == 1 { "reward model" } else { "reward models" };
    text.line(primary(&summary.primary));
    text.line("");
    text.line(format!(
        "Score = mean − ½ · standard deviation of {} scores ({n} test prompts × {n_models} {models_of}); [95 % interval], of this run only",
        n_models * n
    ));
    text.line("");
    text.table(1, &models(summary));
    if !summary.differences.is_empty() {
        text.line("");
        text.table(1, &differences(summary));
        if summary.differences.iter().any(|own| own.circular) {
            text.line(CIRCULAR);
        }
        text.line("");
        text.table(1, &equal_length(summary));
    }
    text.line("");
    text.table(1, &coherence(summary));
    if summary.models.iter().any(|model| model.retokenised) {
        text.line(RETOKENISED);
    }
    if let Some(verdict) = verdict(summary) {
        text.line("");
        text.line(verdict);
    }
    text.finish()
}

/// The scales of the yardstick's judges that there are.
fn yardsticks(summary: &Summary) -> impl Iterator<Item = (Scale, &'static str)> {
    let name = match summary.yardstick_cross_fitted {
        Some(false) => "yardstick (not cross-fitted), answers",
        _ => "yardstick, answers",
    };
    let answer = summary.answer();
    [(Scale::Yardstick, name), (Scale::Words, "bag of words, answers")].into_iter().filter(
        move |(scale, _)| summary.models.iter().any(|model| model.score(*scale, answer).is_some()),
    )
}

/// What came of the primary endpoint, in one line.
pub(crate) fn primary(primary: &Primary) -> String {
    let Primary { comparison, turn, measure, at_equal_length, reason, .. } = primary;
    let comparison = comparison.replace(" - ", " − ");
    let equal = if *at_equal_length { " at equal length" } else { "" };
    let found = match primary.interval() {
        Some(own) if primary.is_clear() => interval(&own, true),
        Some(own) => format!("{}, not told from zero", interval(&own, true)),
        None => "no figure".to_owned(),
    };
    format!("Primary endpoint: {comparison}, {turn}, {measure}{equal}: {found} ({reason}).")
}

/// What is left of each difference between answers at equal length.
fn equal_length(summary: &Summary) -> Vec<Vec<String>> {
    let measure = summary.equal_length.values().next().map_or("score", |own| own.measure.as_str());
    let mut rows =
        vec![vec!["answers at equal length".to_owned(), measure.to_owned(), "win rate".to_owned()]];
    for (comparison, own) in &summary.equal_length {
        let cell = |figure: &AtEqualLength, show: fn(&Interval) -> String| match figure.interval() {
            Some(found) => show(&found),
            None => figure.reason.clone().unwrap_or_default(),
        };
        let mark = if own.circular { " (circular)" } else { "" };
        rows.push(vec![
            format!("{}{mark}", comparison.replace(" - ", " − ")),
            cell(&own.figure, |found| interval(found, true)),
            match own.figure.value {
                Some(_) => cell(&own.win_rate, rate),
                None => "–".to_owned(),
            },
        ]);
    }
    rows
}

fn models(summary: &Summary) -> Vec<Vec<String>> {
    let mut header = row(["model", "Score", "standardised"]);
    header.extend(summary.aspects().iter().map(ToString::to_string));
    header.extend(yardsticks(summary).map(|(_, name)| name.to_owned()));
    let mut rows = vec![header];
    for model in &summary.models {
        let score =
            |scale, scope| dash(model.score(scale, scope).map(|own| interval(&own.score, false)));
        let mut row = vec![
            model.name.clone(),
            score(Scale::Raw, Scope::All),
            score(Scale::Standardised, Scope::All),
        ];
        for aspect in summary.aspects() {
            let own = model.score(Scale::Standardised, Scope::Of(aspect));
            row.push(dash(own.map(|own| number(own.score.estimate, false))));
        }
        row.extend(yardsticks(summary).map(|(scale, _)| {
            let own = model.score(scale, summary.answer());
            dash(own.map(|own| number(own.mean, false)))
        }));
        rows.push(row);
    }
    rows
}

fn differences(summary: &Summary) -> Vec<Vec<String>> {
    let header =
        ["difference", "Score", "standardised", "better/same/worse", "p", "detectable from"];
    let mut rows = vec![row(header)];
    let raw = |d: &&Difference| d.scale == Scale::Raw && d.scope == Scope::All;
    for difference in summary.differences.iter().filter(raw) {
        let (first, last) = (&difference.first, &difference.last);
        let standardised = summary.difference(first, last, Scale::Standardised, Scope::All);
        let cell = |show: fn(&Difference) -> String| dash(standardised.map(show));
        let score = |own: &Difference| interval(&own.score.interval, true);
        rows.push(vec![
            format!("{last} − {first}{}", if difference.circular { " (circular)" } else { "" }),
            score(difference),
            cell(score),
            cell(Difference::tally),
            cell(|own| probability(own.sign_test)),
            cell(|own| effect(&own.score)),
        ]);
    }
    rows
}

fn coherence(summary: &Summary) -> Vec<Vec<String>> {
    let with_pairs = summary.models.iter().any(|model| model.preference_accuracy.is_some());
    let mut header = row([
        "replies",
        "tokens",
        "cut off",
        "empty",
        "perplexity",
        "distinct-2",
        "repeated 4-grams",
    ]);
    if with_pairs {
        header.push("human pairs".to_owned());
    }
    let mut rows = vec![header];
    for model in &summary.models {
        let ModelSummary { name, coherence, preference_accuracy, .. } = model;
        let mut row = vec![
            name.clone(),
            format!("{:.1}", coherence.mean_tokens),
            percent(coherence.truncated_rate),
            percent(coherence.empty_rate),
            dash(perplexity(model)),
            dash(coherence.distinct_2.map(|value| format!("{value:.3}"))),
            dash(coherence.repeated_4gram_rate.map(percent)),
        ];
        if with_pairs {
            let pairs = preference_accuracy.as_ref();
            row.push(dash(pairs.map(|own| {
                let PreferenceAccuracy { n, accuracy, null_rulers } = own;
                format!("{} of {n}, {}", percent(accuracy.estimate), null_rulers.words())
            })));
        }
        rows.push(row);
    }
    rows
}

/// A model's perplexity under the base, starred where it is not that of the sampled tokens.
pub(crate) fn perplexity(model: &ModelSummary) -> Option<String> {
    let star = if model.retokenised { "*" } else { "" };
    model.coherence.perplexity.map(|value| format!("{value:.1}{star}"))
}

/// What the run changed: a sentence on the Score, what fell behind it, and what the last stage added.
pub(crate) fn verdict(summary: &Summary) -> Option<String> {
    let difference = summary.headline(Scale::Standardised)?;
    let Difference { first, last, score, mean, .. } = difference;
    let (estimate, effect) = (score.interval.estimate, score.minimum_detectable_effect);
    let mut sentence = if score.is_clear() {
        let word = if estimate > 0.0 { "higher" } else { "lower" };
        format!(
            "The Score of {last} is {word} than that of {first} by {} ({} standardised); the interval excludes zero.",
            number(estimate.abs(), false),
            bounds(&score.interval)
        )
    } else if effect == 0.0 && estimate == 0.0 {
        format!("{last} and {first} have the same Score on {}.", prompts(summary.n_prompts))
    } else {
        format!(
            "The Scores of {last} and {first} cannot be told apart: {} standardised, while {} reliably show \
             differences from {effect:.3} on.",
            interval(&score.interval, true),
            prompts(summary.n_prompts)
        )
    };
    if score.is_clear() && !mean.is_clear() {
        let _ = write!(
            sentence,
            " The mean alone changed by {}, which may be nothing: what changed is the spread.",
            interval(&mean.interval, true)
        );
    }
    if let Some(fell) = fell(summary, first, last) {
        match score.is_clear() && estimate > 0.0 {
            true => write!(sentence, " But {fell} fell."),
            false => write!(sentence, " Of what is in it, {fell} fell."),
        }
        .expect("a String takes every text");
    }
    if let Some(step) = summary.last_step(Scale::Standardised).filter(|own| own.first != *first) {
        let _ = write!(sentence, " {}", added(summary, step));
    }
    if difference.circular {
        let _ = write!(sentence, " This comparison is circular: the labels were made from it.");
    }
    if summary.n_prompts < FEW_PROMPTS {
        let n = prompts(summary.n_prompts);
        let _ = write!(sentence, " With {n} intervals are too narrow.");
    }
    Some(sentence)
}

fn prompts(n: usize) -> String {
    format!("{n} prompt{}", if n == 1 { "" } else { "s" })
}

/// The scores whose mean is lower in `last` than in `first`, their intervals excluding zero: of each turn or virtue, and the
/// yardstick's.
fn fell(summary: &Summary, first: &str, last: &str) -> Option<String> {
    let aspects = summary.aspects();
    // One reward model's score is the Score itself.
    let several = aspects.iter().filter(|_| aspects.len() > 1);
    let own = several.map(|&aspect| {
        (Scale::Standardised, Scope::Of(aspect), format!("the standardised score of {aspect}"))
    });
    let by =
        [(Scale::Yardstick, summary.answer(), "the yardstick's score of the answers".to_owned())];
    let parts: Vec<String> = own
        .chain(by)
        .filter_map(|(scale, scope, name)| {
            let mean = summary.difference(first, last, scale, scope)?.mean;
            let is_lower = mean.is_clear() && mean.interval.estimate < 0.0;
            is_lower.then(|| format!("{name} ({})", interval(&mean.interval, true)))
        })
        .collect();
    (!parts.is_empty()).then(|| parts.join(" and "))
}

/// What the last stage changed beyond the one before it.
fn added(summary: &Summary, step: &Difference) -> String {
    let Difference { first, last, score, .. } = step;
    let found = interval(&score.interval, true);
    let mut sentence = match (score.is_clear(), score.interval.estimate > 0.0) {
        (false, _) => format!("What {last} adds to {first} cannot be told from nothing: {found}"),
        (true, true) => format!("Over {first}, {last} added {found}"),
        (true, false) => {
            let lost = number(score.interval.estimate.abs(), false);
            format!("Against {first}, {last} lost {lost} ({})", bounds(&score.interval))
        }
    };
    if let Some(fell) = fell(summary, first, last) {
        let _ = write!(sentence, ", and {fell} fell");
    }
    sentence + "."
}

/// `0.370 [0.311, 0.424]`.
pub(crate) fn interval(interval: &Interval, signed: bool) -> String {
    let Interval { estimate, low, high } = *interval;
    format!("{} [{}, {}]", number(estimate, signed), number(low, signed), number(high, signed))
}

/// `[−0.250, 1.000]`.
pub(crate) fn bounds(interval: &Interval) -> String {
    format!("[{}, {}]", number(interval.low, false), number(interval.high, false))
}

/// Three decimals, a true minus sign; a plus sign if asked.
pub(crate) fn number(value: f64, signed: bool) -> String {
    let text = true_minus(&format!("{value:.3}"));
    match signed && !text.starts_with('−') && text != "0.000" {
        true => format!("+{text}"),
        false => text,
    }
}

/// A number's text with a true minus sign, and none before zero.
pub(crate) fn true_minus(text: &str) -> String {
    match text.strip_prefix('-') {
        Some(rest) if rest.contains(|c| matches!(c, '1'..='9')) => format!("−{rest}"),
        Some(rest) => rest.to_owned(),
        None => text.to_owned(),
    }
}

/// `±0.281`: the smallest effect that would be found; none where prompts do not differ, or one is all there is.
pub(crate) fn effect(change: &Change) -> String {
    if change.minimum_detectable_effect == 0.0 {
        return "–".to_owned();
    }
    format!("±{:.3}", change.minimum_detectable_effect)
}

/// What is not known is a dash.
pub(crate) fn dash(text: Option<String>) -> String {
    text.unwrap_or_else(|| "–".to_owned())
}

pub(crate) fn percent(rate: f64) -> String {
    format!("{:.1} %", 100.0 * rate)
}

/// `66.0 % [57.5, 74.0]`.
pub(crate) fn rate(rate: &Interval) -> String {
    format!("{} [{:.1}, {:.1}]", percent(rate.estimate), 100.0 * rate.low, 100.0 * rate.high)
}

pub(crate) fn probability(p: f64) -> String {
    if p < 0.001 { "< 0.001".to_owned() } else { format!("{p:.3}") }
}

/// A table's row of fixed words.
pub(crate) fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).into()
}

/// Lines and tables for a terminal.
#[derive(Default)]
pub(crate) struct Text(String);

impl Text {
    /// A line; spaces at its end are left out.
    pub(crate) fn line(&mut self, line: impl AsRef<str>) {
        self.0.push_str(line.as_ref().trim_end());
        self.0.push('\n');
    }

    /// Rows with their columns aligned: the first `n_words` to the left, the others to the right.
    pub(crate) fn table(&mut self, n_words: usize, rows: &[Vec<String>]) {
        let n_columns = rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..n_columns).map(width).collect();
        for row in rows {
            let cells = row.iter().zip(&widths).enumerate();
            let padded = cells.map(|(column, (cell, width))| match column < n_words {
                true => format!("{cell:<width$}"),
                false => format!("{cell:>width$}"),
            });
            self.line(padded.collect::<Vec<_>>().join("  "));
        }
    }

    /// Everything, control characters escaped.
    pub(crate) fn finish(self) -> String {
        printable(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use arete_records::Aspect;

    use super::*;
    use crate::coherence::Coherence;
    use crate::summary::ScoreOf;

    #[test]
    fn columns_are_aligned_by_characters() {
        let mut text = Text::default();
        text.table(1, &[row(["a", "µ", "x"]), row(["long", "10", "−1"])]);
        text.table(2, &[row(["a", "b", "c"]), row(["", "long", "10"])]);
        assert_eq!(text.finish(), "a      µ   x\nlong  10  −1\na  b      c\n   long  10\n");
    }

    /// Original, SFT and final model, with the changes of the Score and of each turn's mean given.
    fn summary(all: [f64; 3], action: [f64; 3], step: [f64; 3]) -> Summary {
        let change = |[estimate, low, high]: [f64; 3]| Change {
            interval: Interval { estimate, low, high },
            standard_error: 0.1,
            minimum_detectable_effect: 0.28,
        };
        let model = |name: &str| ModelSummary {
            name: name.to_owned(),
            source: String::new(),
            scores: [Aspect::ACTION, Aspect::MOTIVATION]
                .map(|aspect| ScoreOf {
                    scale: Scale::Standardised,
                    scope: Scope::Of(aspect),
                    n: 50,
                    mean: 0.0,
                    std: 1.0,
                    score: Interval { estimate: 0.0, low: 0.0, high: 0.0 },
                })
                .into(),
            coherence: Coherence::default(),
            coherence_by_aspect: std::collections::BTreeMap::new(),
            retokenised: false,
            kl: None,
            preference_accuracy: None,
        };
        let of = |first: &str, scope, score, mean| Difference {
            first: first.to_owned(),
            last: "final".to_owned(),
            scale: Scale::Standardised,
            scope,
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
        Summary {
            n_prompts: 50,
            models: ["original", "sft", "final"].map(model).into(),
            differences: vec![
                of("original", Scope::All, all, all),
                of("original", Scope::Of(Aspect::ACTION), action, action),
                of("original", Scope::Of(Aspect::MOTIVATION), all, all),
                of("sft", Scope::All, step, step),
                of("sft", Scope::Of(Aspect::ACTION), action, action),
            ],
            ..Summary::default()
        }
    }

    #[test]
    fn the_verdict_names_what_fell_and_what_the_last_stage_added() {
        // A demo's figures: the headline was "higher", the answers got worse.
        let (up, answers, open) = ([0.4, 0.1, 0.7], [-0.83, -1.55, -0.13], [0.02, -0.1, 0.14]);
        let said = verdict(&summary(up, answers, open)).unwrap();
        assert_eq!(
            said,
            "The Score of final is higher than that of original by 0.400 ([0.100, 0.700] standardised); the interval excludes \
             zero. But the standardised score of action (−0.830 [−1.550, −0.130]) fell. What final adds to sft cannot be told from \
             nothing: +0.020 [−0.100, +0.140], and the standardised score of action (−0.830 [−1.550, −0.130]) fell."
        );
        // Nothing is said to have fallen whose interval holds zero.
        let said = verdict(&summary(up, [-0.83, -1.55, 0.13], up)).unwrap();
        assert!(
            !said.contains("fell")
                && said.ends_with("Over sft, final added +0.400 [+0.100, +0.700].")
        );
        let down = [-0.4, -0.7, -0.1];
        let said = verdict(&summary(down, up, down)).unwrap();
        assert!(
            said.contains("is lower than") && said.contains("score of motivation (−0.400"),
            "{said}"
        );
        assert!(said.ends_with("Against sft, final lost 0.400 ([−0.700, −0.100])."), "{said}");
        assert!(said.contains("Of what is in it, the standardised score of motivation"), "{said}");
        // Open, and alike on every prompt.
        let said = verdict(&summary(open, down, up)).unwrap();
        assert!(
            said.starts_with(
                "The Scores of final and original cannot be told apart: +0.020 [−0.100, +0.140]"
            ) && said.contains("Of what is in it, the standardised score of action (−0.400"),
            "{said}"
        );
    }

    #[test]
    fn numbers_carry_their_sign() {
        assert_eq!(number(0.3696, false), "0.370");
        assert_eq!(number(-0.0085, true), "−0.009");
        assert_eq!(number(0.0085, true), "+0.009");
        assert_eq!(number(-0.0001, true), "0.000");
        let of = Interval { estimate: 0.5, low: -0.25, high: 1.0 };
        assert_eq!(interval(&of, true), "+0.500 [−0.250, +1.000]");
        assert_eq!(probability(0.000_01), "< 0.001");
    }
}
