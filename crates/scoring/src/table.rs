//! The summary as text: aligned columns for a terminal.

use std::fmt::Write as _;

use arete_records::Aspect;
use arete_records::stats::Interval;
use arete_stage::cli::printable;

use crate::summary::{Change, Difference, ModelSummary, Scale, Scope, Summary};

/// Percentile intervals of fewer clusters are known to be too narrow (Efron & Tibshirani 1993, ch. 14).
pub(crate) const FEW_PROMPTS: usize = 20;

/// What the star behind a perplexity means.
pub(crate) const RETOKENISED: &str =
    "* perplexity of the text, per token of the base: this model's own tokens are others";

/// The summary as a few aligned tables, ending with what it means.
pub fn of(summary: &Summary) -> String {
    let mut out = String::new();
    let mut line = |text: String| {
        out.push_str(text.trim_end());
        out.push('\n');
    };
    line(format!(
        "Score = mean − ½ · standard deviation of {} scores ({} test prompts × 3 aspects); [95 % interval]",
        3 * summary.n_prompts,
        summary.n_prompts
    ));
    line(String::new());
    for row in aligned(&models(summary)) {
        line(row);
    }
    if !summary.differences.is_empty() {
        line(String::new());
        for row in aligned(&differences(summary)) {
            line(row);
        }
    }
    line(String::new());
    for row in aligned(&coherence(summary)) {
        line(row);
    }
    if summary.models.iter().any(|model| model.retokenised) {
        line(RETOKENISED.to_owned());
    }
    if let Some(verdict) = verdict(summary) {
        line(String::new());
        line(verdict);
    }
    printable(&out)
}

fn has_yardstick(summary: &Summary) -> bool {
    summary.models.iter().any(|model| model.score(Scale::Yardstick, Scope::All).is_some())
}

fn models(summary: &Summary) -> Vec<Vec<String>> {
    let mut header = vec!["model".to_owned(), "Score".to_owned(), "standardised".to_owned()];
    header.extend(Aspect::ALL.map(|aspect| aspect.name().to_owned()));
    if has_yardstick(summary) {
        header.push("yardstick".to_owned());
    }
    let mut rows = vec![header];
    for model in &summary.models {
        let score = |scale, scope| {
            model
                .score(scale, scope)
                .map_or("–".to_owned(), |score| interval(&score.score, false))
        };
        let mut row = vec![
            model.name.clone(),
            score(Scale::Raw, Scope::All),
            score(Scale::Standardised, Scope::All),
        ];
        for scope in [Scope::Action, Scope::Motivation, Scope::Consequence] {
            let own = model.score(Scale::Standardised, scope);
            row.push(own.map_or("–".to_owned(), |score| number(score.score.estimate, false)));
        }
        if has_yardstick(summary) {
            row.push(score(Scale::Yardstick, Scope::All));
        }
        rows.push(row);
    }
    rows
}

fn differences(summary: &Summary) -> Vec<Vec<String>> {
    let header =
        ["difference", "Score", "standardised", "better/same/worse", "p", "detectable from"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    let raw = |d: &&Difference| d.scale == Scale::Raw && d.scope == Scope::All;
    for difference in summary.differences.iter().filter(raw) {
        let (first, last) = (&difference.first, &difference.last);
        let standardised = summary.difference(first, last, Scale::Standardised, Scope::All);
        let change = |change: &Change| interval(&change.interval, true);
        rows.push(vec![
            format!("{last} − {first}"),
            change(&difference.score),
            standardised.map_or("–".to_owned(), |own| change(&own.score)),
            standardised.map_or("–".to_owned(), |own| {
                format!("{}/{}/{}", own.wins, own.ties, own.losses)
            }),
            standardised.map_or("–".to_owned(), |own| probability(own.sign_test)),
            standardised.map_or("–".to_owned(), |own| {
                format!("±{:.3}", own.score.minimum_detectable_effect)
            }),
        ]);
    }
    rows
}

fn coherence(summary: &Summary) -> Vec<Vec<String>> {
    let with_pairs = summary.models.iter().any(|model| model.preference_accuracy.is_some());
    let mut header: Vec<String> =
        ["replies", "tokens", "cut off", "empty", "perplexity", "distinct-2", "repeated 4-grams"]
            .map(str::to_owned)
            .to_vec();
    if with_pairs {
        header.push("human pairs".to_owned());
    }
    let mut rows = vec![header];
    for model in &summary.models {
        let ModelSummary { name, coherence, preference_accuracy, .. } = model;
        let optional = |value: Option<f64>, digits: usize| {
            value.map_or("–".to_owned(), |value| format!("{value:.digits$}"))
        };
        let mut row = vec![
            name.clone(),
            format!("{:.1}", coherence.mean_tokens),
            percent(coherence.truncated_rate),
            percent(coherence.empty_rate),
            perplexity(model),
            optional(coherence.distinct_2, 3),
            coherence.repeated_4gram_rate.map_or("–".to_owned(), percent),
        ];
        if with_pairs {
            row.push(preference_accuracy.as_ref().map_or("–".to_owned(), |own| {
                format!("{} of {}", percent(own.accuracy.estimate), own.n)
            }));
        }
        rows.push(row);
    }
    rows
}

/// A model's perplexity under the base, starred where it is not that of the sampled tokens.
pub(crate) fn perplexity(model: &ModelSummary) -> String {
    let star = if model.retokenised { "*" } else { "" };
    model.coherence.perplexity.map_or("–".to_owned(), |value| format!("{value:.1}{star}"))
}

/// One sentence on what the run changed.
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
    } else {
        format!(
            "The Scores of {last} and {first} cannot be told apart: {} {} standardised, while {} prompts reliably show \
             differences from {effect:.3} on.",
            number(estimate, true),
            bounds(&score.interval),
            summary.n_prompts
        )
    };
    if score.is_clear() && !mean.is_clear() {
        let _ = write!(
            sentence,
            " The mean alone changed by {}, which may be nothing: what changed is the spread.",
            interval(&mean.interval, true)
        );
    }
    if summary.n_prompts < FEW_PROMPTS {
        let _ = write!(sentence, " With {} prompts intervals are too narrow.", summary.n_prompts);
    }
    Some(sentence)
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
    let text = format!("{:.3}", value.abs());
    let is_zero = text.chars().all(|c| matches!(c, '0' | '.'));
    let sign = match value {
        _ if is_zero => "",
        value if value < 0.0 => "−",
        _ if signed => "+",
        _ => "",
    };
    format!("{sign}{text}")
}

pub(crate) fn percent(rate: f64) -> String {
    format!("{:.1} %", 100.0 * rate)
}

pub(crate) fn probability(p: f64) -> String {
    if p < 0.001 { "< 0.001".to_owned() } else { format!("{p:.3}") }
}

/// Rows with their columns aligned: the first to the left, the others to the right.
pub(crate) fn aligned(rows: &[Vec<String>]) -> Vec<String> {
    let n_columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..n_columns).map(width).collect();
    rows.iter()
        .map(|row| {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let padded = if column == 0 {
                    format!("{cell:<width$}")
                } else {
                    format!("  {cell:>width$}")
                };
                write!(line, "{padded}").expect("writing to a String cannot fail");
            }
            line
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_by_characters() {
        let rows =
            [["a", "µ", "x"], ["long", "10", "−1"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(aligned(&rows), ["a      µ   x", "long  10  −1"]);
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
