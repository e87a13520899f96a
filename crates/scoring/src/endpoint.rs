//! The primary endpoint: one comparison, named in the recipe before the run, that the run is judged by.
//!
//! Of many comparisons some look well by luck; this one was chosen before anything was seen. Everything else is context.

use std::collections::BTreeSet;
use std::fmt::{self, Display};
use std::str::FromStr;

use arete_records::stats::Interval;
use arete_records::{Aspect, Refusal};
use serde::{Deserialize, Serialize};

use crate::summary::{AtEqualLength, Difference, ORIGINAL, Scale, Scope, Summary, comparison};

/// What the recipes name if they name nothing.
pub const DEFAULT: &str = "final - sft, answer, yardstick at equal length";
/// Name of the model after SFT.
const SFT: &str = "sft";

/// A comparison, a turn and a measure: `final - sft, answer, yardstick at equal length`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// What it is subtracted from.
    last: String,
    /// What is subtracted.
    first: String,
    turn: Turn,
    scale: Scale,
    at_equal_length: bool,
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |what: &str| format!("{what}, as in `{DEFAULT}`");
        let parts: Vec<&str> = text.split(',').map(str::trim).collect();
        let [models, turn, measure] = parts[..] else {
            return Err(wrong("a comparison, a turn and a measure, separated by commas"));
        };
        let models = models.replace('−', "-");
        let models = models.split_once(" - ").map(|(last, first)| (last.trim(), first.trim()));
        let Some((last, first)) =
            models.filter(|(last, first)| ![*last, *first].contains(&"") && last != first)
        else {
            return Err(wrong("LAST - FIRST, two models"));
        };
        let turn = match turn {
            "answer" => Turn::Answer,
            "all" => Turn::All,
            name => {
                Turn::Named(Aspect::new(name).map_err(|_| wrong("a turn: answer, all, or a name"))?)
            }
        };
        let (measure, at_equal_length) = match measure.strip_suffix(" at equal length") {
            Some(measure) => (measure, true),
            None => (measure, false),
        };
        let scale = match measure {
            "yardstick" => Scale::Yardstick,
            "bag of words" => Scale::Words,
            "score" => Scale::Standardised,
            _ => {
                return Err(wrong("a measure: yardstick, bag of words, score (… at equal length)"));
            }
        };
        if !scale.is_own() && turn != Turn::Answer {
            return Err(wrong("the answer: the yardstick reads nothing else"));
        }
        Ok(Self { last: last.to_owned(), first: first.to_owned(), turn, scale, at_equal_length })
    }
}

impl Endpoint {
    /// Refuses a turn that is none of the run's: `known` are its turns, and its reward models.
    ///
    /// # Errors
    ///
    /// A refused setting.
    pub fn check_turn(&self, known: &BTreeSet<Aspect>) -> Result<(), Refusal> {
        match self.turn {
            Turn::Named(name) if !known.contains(&name) => {
                let names: Vec<&str> = known.iter().map(|name| name.name()).collect();
                let expected = format!("as its turn answer, all or one of {}", names.join(", "));
                Err(Refusal::setting("primary", expected, name.name()))
            }
            _ => Ok(()),
        }
    }
}

impl Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let equal = if self.at_equal_length { " at equal length" } else { "" };
        let (turn, measure) = (self.turn.name(), measure(self.scale));
        write!(f, "{} - {}, {turn}, {measure}{equal}", self.last, self.first)
    }
}

/// Which turn is meant, whatever the constitution calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Answer,
    All,
    Named(Aspect),
}

impl Turn {
    fn name(self) -> &'static str {
        match self {
            Self::Answer => "answer",
            Self::All => Scope::All.name(),
            Self::Named(aspect) => aspect.name(),
        }
    }
}

fn measure(scale: Scale) -> &'static str {
    match scale {
        Scale::Yardstick => "yardstick",
        Scale::Words => "bag of words",
        Scale::Standardised | Scale::Raw => "score",
    }
}

/// What came of the primary endpoint: `primary` in `summary.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Primary {
    /// `final - sft`.
    pub comparison: String,
    /// `answer`, `motivation`, `consequence` or `all`.
    pub turn: String,
    /// `yardstick`, `bag of words`, or `score`: the run's own reward models, which is no evidence.
    pub measure: String,
    /// Whether the value is that at equal length and equal truncation.
    pub at_equal_length: bool,
    /// The difference, in standard deviations of the measure; none where there is no such number.
    pub value: Option<f64>,
    /// Lower end of its 95 % interval.
    pub low: Option<f64>,
    /// Upper end.
    pub high: Option<f64>,
    /// Seeds that the interval knows of.
    pub n_seeds: usize,
    /// What the figure is worth, or why there is none, in words.
    pub reason: String,
}

impl Primary {
    /// The value with its interval.
    pub fn interval(&self) -> Option<Interval> {
        Some(Interval { estimate: self.value?, low: self.low?, high: self.high? })
    }

    /// Whether the interval excludes no difference.
    pub fn is_clear(&self) -> bool {
        self.interval().is_some_and(|own| own.low > 0.0 || own.high < 0.0)
    }

    /// Of a summary whose differences are [complete](Summary::complete); `without_sft`: PPO started from the original.
    pub(crate) fn of(endpoint: &Endpoint, summary: &Summary, without_sft: bool) -> Self {
        let Endpoint { last, turn, at_equal_length, .. } = endpoint;
        let scope = match *turn {
            Turn::Answer => summary.answer(),
            Turn::All => Scope::All,
            Turn::Named(aspect) => Scope::Of(aspect),
        };
        let mut reasons = vec!["this run only: one seed".to_owned()];
        let mut first = endpoint.first.as_str();
        if first == SFT && without_sft {
            first = ORIGINAL;
            reasons.push("there is no sft, PPO started from the original".to_owned());
        }
        let has_scores =
            |scale: Scale| summary.models.iter().any(|model| model.score(scale, scope).is_some());
        let mut scale = endpoint.scale;
        if !scale.is_own() && !has_scores(scale) {
            scale = Scale::Standardised;
            reasons.push(format!("no {}", measure(endpoint.scale)));
        }
        if scale.is_own() {
            reasons.push("scores of the run's own reward models are no evidence".to_owned());
        } else if summary.yardstick_cross_fitted == Some(false) {
            let why = "the yardstick is not cross-fitted: it may have seen these prompts";
            reasons.push(why.to_owned());
        }
        let found = summary.difference(first, last, scale, scope);
        let figure = match found {
            Some(own) if *at_equal_length => own.equal_length.clone(),
            Some(Difference { mean, .. }) => AtEqualLength::of(Ok(mean.interval)),
            None => {
                let names: Vec<&str> =
                    summary.models.iter().map(|model| model.name.as_str()).collect();
                let why = format!("{last} and {first} are not both among {}", names.join(", "));
                AtEqualLength::of(Err(why))
            }
        };
        if found.is_some_and(|own| own.circular) {
            reasons.push("circular: the labels were made from this contrast".to_owned());
        }
        reasons.extend(figure.reason.clone());
        Self {
            comparison: comparison(first, last),
            turn: turn.name().to_owned(),
            measure: measure(scale).to_owned(),
            at_equal_length: *at_equal_length,
            value: figure.value,
            low: figure.low,
            high: figure.high,
            n_seeds: 1,
            reason: reasons.join("; "),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coherence::Coherence;
    use crate::summary::{Change, ModelSummary, ScoreOf};

    #[test]
    fn endpoints_are_parsed_as_they_are_printed() {
        for text in [DEFAULT, "a - b, all, score", "final - original, answer, bag of words"] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
        let same: Endpoint = "final − sft, answer,yardstick at equal length".parse().unwrap();
        assert_eq!(same, DEFAULT.parse().unwrap());
        for (text, expected) in [
            ("final - sft, answer", "separated by commas"),
            ("final, answer, score", "two models"),
            ("final - final, answer, score", "two models"),
            ("final - sft, An answer!, score", "a turn"),
            ("final - sft, answer, vibes", "a measure"),
            ("final - sft, all, yardstick", "the answer"),
        ] {
            let error = text.parse::<Endpoint>().unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    fn summary(yardstick: Option<bool>) -> Summary {
        let interval = |estimate| Interval { estimate, low: estimate - 1.0, high: estimate + 1.0 };
        let mut scales = vec![Scale::Standardised];
        scales.extend(yardstick.map(|_| Scale::Yardstick));
        let score = |&scale: &Scale| ScoreOf {
            scale,
            scope: Scope::Of(Aspect::ACTION),
            n: 20,
            mean: 0.0,
            std: 1.0,
            score: interval(0.0),
        };
        let model = |name: &str| ModelSummary {
            name: name.to_owned(),
            source: String::new(),
            scores: scales.iter().map(score).collect(),
            coherence: Coherence::default(),
            coherence_by_aspect: std::collections::BTreeMap::new(),
            retokenised: false,
            kl: None,
            preference_accuracy: None,
        };
        let change = |estimate| Change {
            interval: interval(estimate),
            standard_error: 0.5,
            minimum_detectable_effect: 1.4,
        };
        let difference = |first: &str, scale: Scale, mean: f64, equal: f64| Difference {
            first: first.to_owned(),
            last: "final".to_owned(),
            scale,
            scope: Scope::Of(Aspect::ACTION),
            score: change(9.0),
            mean: change(mean),
            equal_length: AtEqualLength::of(Ok(interval(equal))),
            win_rate: AtEqualLength::default(),
            circular: first == ORIGINAL && scale == Scale::Standardised,
            wins: 0,
            ties: 0,
            losses: 0,
            sign_test: 1.0,
        };
        Summary {
            yardstick: yardstick.map(|_| "y".to_owned()),
            yardstick_cross_fitted: yardstick,
            models: ["original", "sft", "final"].map(model).into(),
            differences: vec![
                difference("sft", Scale::Yardstick, 0.7, 0.2),
                difference("sft", Scale::Standardised, 3.0, 2.5),
                difference("original", Scale::Standardised, 4.0, 3.5),
            ],
            ..Summary::default()
        }
    }

    #[test]
    fn the_primary_endpoint_is_what_was_named() {
        let endpoint: Endpoint = DEFAULT.parse().unwrap();
        let found = Primary::of(&endpoint, &summary(Some(true)), false);
        assert_eq!((found.comparison.as_str(), found.turn.as_str()), ("final - sft", "answer"));
        assert_eq!(
            (found.measure.as_str(), found.value, found.low),
            ("yardstick", Some(0.2), Some(-0.8))
        );
        assert_eq!((found.n_seeds, found.reason.as_str()), (1, "this run only: one seed"));
        let plain: Endpoint = "final - sft, answer, yardstick".parse().unwrap();
        assert_eq!(Primary::of(&plain, &summary(Some(true)), false).value, Some(0.7));
        let found = Primary::of(&endpoint, &summary(Some(false)), false);
        assert!(found.reason.contains("not cross-fitted"), "{}", found.reason);
    }

    #[test]
    fn a_turn_that_the_run_has_not_is_refused() {
        let known = BTreeSet::from([Aspect::new("action").unwrap()]);
        let check = |text: &str| text.parse::<Endpoint>().unwrap().check_turn(&known);
        for good in [DEFAULT, "final - sft, all, score", "final - sft, action, score"] {
            check(good).unwrap();
        }
        let refusal = check("final - sft, nope, score").unwrap_err().to_string();
        assert!(refusal.contains("one of action") && refusal.contains("nope"), "{refusal}");
    }

    #[test]
    fn without_a_yardstick_it_is_a_score_and_no_evidence() {
        let endpoint: Endpoint = DEFAULT.parse().unwrap();
        let found = Primary::of(&endpoint, &summary(None), false);
        assert_eq!((found.measure.as_str(), found.value), ("score", Some(2.5)));
        assert!(found.reason.contains("no yardstick") && found.reason.contains("no evidence"));
        // Without SFT, PPO starts from the original: then that is the comparison, here a circular one.
        let found = Primary::of(&endpoint, &summary(None), true);
        assert_eq!((found.comparison.as_str(), found.value), ("final - original", Some(3.5)));
        assert!(found.reason.contains("circular"), "{}", found.reason);
        let other: Endpoint = "best - sft, answer, score".parse().unwrap();
        let found = Primary::of(&other, &summary(None), false);
        assert_eq!(found.value, None);
        assert!(found.reason.contains("not both among original, sft, final"), "{}", found.reason);
    }
}
