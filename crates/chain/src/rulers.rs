//! Null rulers: rules that know nothing of what is right, and how often they tell the better side of labelled pairs.
//!
//! A figure of accuracy says something only beside the best of them: where the shorter reply is preferred in 61 % of the pairs,
//! a reward model at 63 % may have learned nothing else. Every accuracy of the pipeline is shown with these.

use std::collections::BTreeMap;

use arete_records::stats::{self, Interval};
use arete_records::{Message, Role, opening_id, prompt_id};
use serde::{Deserialize, Serialize};

/// Standard normal quantile of a two-sided 95 % interval.
const Z: f64 = 1.96;
/// Words that hedge.
const HEDGES: [&str; 9] =
    ["might", "may", "perhaps", "could", "possibly", "seem", "seems", "probably", "maybe"];
/// Words of refusals.
const REFUSALS: [&str; 12] = [
    "sorry",
    "cannot",
    "can't",
    "won't",
    "unable",
    "refuse",
    "shouldn't",
    "wouldn't",
    "illegal",
    "inappropriate",
    "apologize",
    "apologise",
];

/// A rule that calls one of two sides the better one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ruler {
    /// The side with fewer characters.
    Shorter,
    /// The side with more characters.
    Longer,
    /// The side shown first; where pairs have no order, a hash of their texts gives one.
    FirstShown,
    /// The side that hedges more (might, perhaps, …).
    MoreHedges,
    /// The side with more words of refusal (sorry, cannot, …).
    MoreRefusals,
}

impl Ruler {
    /// Every ruler.
    pub const ALL: [Self; 5] =
        [Self::Shorter, Self::Longer, Self::FirstShown, Self::MoreHedges, Self::MoreRefusals];

    /// In words.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Shorter => "shorter",
            Self::Longer => "longer",
            Self::FirstShown => "first shown",
            Self::MoreHedges => "more hedges",
            Self::MoreRefusals => "more refusal words",
        }
    }
}

/// The words of a text: lower-case runs of letters and digits, apostrophes inside kept.
pub fn words(text: &str) -> impl Iterator<Item = String> + use<> {
    let text = text.to_lowercase().replace('’', "'");
    let chars: Vec<char> = text.chars().collect();
    let mut out = Vec::new();
    let mut word = String::new();
    for (at, &c) in chars.iter().enumerate() {
        let joins = c == '\''
            && !word.is_empty()
            && chars.get(at + 1).is_some_and(|next| next.is_alphanumeric());
        if c.is_alphanumeric() || joins {
            word.push(c);
        } else if !word.is_empty() {
            out.push(std::mem::take(&mut word));
        }
    }
    if !word.is_empty() {
        out.push(word);
    }
    out.into_iter()
}

/// What the two sides of a pair say after what they share: the assistant's turns, line by line.
#[must_use]
pub fn own_texts(better: &[Message], worse: &[Message]) -> [String; 2] {
    let n_shared = better.iter().zip(worse).take_while(|(a, b)| a == b).count();
    [better, worse].map(|side| {
        let own = side[n_shared..].iter().filter(|message| message.role == Role::Assistant);
        own.map(|message| message.content.trim()).collect::<Vec<_>>().join("\n")
    })
}

/// What the rulers see of a pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruled {
    /// Characters, hedges and refusal words of the better side and of the worse.
    sides: [[usize; 3]; 2],
    /// Whether the better side is the one shown first.
    better_is_first: bool,
    /// Id of the opening question: pairs about one question are not independent.
    opening: String,
}

impl Ruled {
    /// Of a pair without an order: a hash of both texts shows one first, so that neither place is right more often.
    #[must_use]
    pub fn of(better: &[Message], worse: &[Message]) -> Self {
        Self::shown(better, worse, prompt_id(better) < prompt_id(worse))
    }

    /// Of a pair of which the better side was shown first, or second.
    #[must_use]
    pub fn shown(better: &[Message], worse: &[Message], better_is_first: bool) -> Self {
        let sides = own_texts(better, worse).map(|text| {
            let (mut n_hedges, mut n_refusals) = (0, 0);
            for word in words(&text) {
                n_hedges += usize::from(HEDGES.contains(&word.as_str()));
                n_refusals += usize::from(REFUSALS.contains(&word.as_str()));
            }
            [text.chars().count(), n_hedges, n_refusals]
        });
        Self { sides, better_is_first, opening: opening_id(better) }
    }

    /// 1 if the ruler calls the better side better, 0 if the worse, ½ if it cannot tell.
    #[must_use]
    pub fn is_right(&self, ruler: Ruler) -> f64 {
        let more = |at: usize| match self.sides[0][at].cmp(&self.sides[1][at]) {
            std::cmp::Ordering::Greater => 1.0,
            std::cmp::Ordering::Equal => 0.5,
            std::cmp::Ordering::Less => 0.0,
        };
        match ruler {
            Ruler::Shorter => 1.0 - more(0),
            Ruler::Longer => more(0),
            Ruler::FirstShown => f64::from(u8::from(self.better_is_first)),
            Ruler::MoreHedges => more(1),
            Ruler::MoreRefusals => more(2),
        }
    }

    /// Whether the shorter side has at least nine tenths of the longer one's characters.
    #[must_use]
    pub fn is_length_matched(&self) -> bool {
        let [better, worse] = [self.sides[0][0], self.sides[1][0]];
        10 * better.min(worse) >= 9 * better.max(worse)
    }
}

/// How the null rulers do on some pairs, and how far what is measured leads the best of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NullRulers {
    /// The ruler that is right most often on these very pairs, which flatters it.
    pub best: Ruler,
    /// Part of the pairs on which each is right (a tie counts half), with Wilson's 95 % interval.
    pub accuracy: BTreeMap<Ruler, Interval>,
    /// Accuracy of what is measured less that of the best ruler, with its 95 % interval (paired, clustered by opening question);
    /// none with fewer than two questions.
    pub lead: Option<Interval>,
}

impl NullRulers {
    /// The rulers on `pairs`, beside what is measured: `is_right` holds 1, ½ or 0 a pair. None without pairs.
    ///
    /// # Panics
    ///
    /// Unless there is one number a pair.
    #[must_use]
    pub fn beside(pairs: &[Ruled], is_right: &[f64]) -> Option<Self> {
        assert_eq!(pairs.len(), is_right.len(), "one number a pair");
        let right = |ruler| pairs.iter().map(|pair| pair.is_right(ruler)).collect::<Vec<f64>>();
        let accuracy: BTreeMap<Ruler, Interval> =
            Ruler::ALL.into_iter().map(|ruler| (ruler, share(&right(ruler)))).collect();
        if pairs.is_empty() {
            return None;
        }
        // The first of equals.
        let best = Ruler::ALL
            .into_iter()
            .rev()
            .max_by(|a, b| accuracy[a].estimate.total_cmp(&accuracy[b].estimate))?;
        let leads = pairs.iter().zip(is_right).zip(right(best));
        let lead = stats::clustered_mean(
            leads.map(|((pair, right), by_ruler)| (&pair.opening, right - by_ruler)),
        );
        Some(Self { best, accuracy, lead })
    }

    /// Accuracy of the best ruler.
    #[must_use]
    pub fn best_accuracy(&self) -> f64 {
        self.accuracy.get(&self.best).map_or(f64::NAN, |own| own.estimate)
    }

    /// Whether what is measured beats the best ruler beyond its interval.
    #[must_use]
    pub fn is_beaten(&self) -> bool {
        self.lead.is_some_and(|lead| lead.low > 0.0)
    }

    /// `best null ruler: shorter 61.0 %; lead +1.9 points [−2.0, 5.8]`.
    #[must_use]
    pub fn words(&self) -> String {
        let points = |value: f64| format!("{:.1}", 100.0 * value).replace('-', "−");
        let lead = self.lead.map_or("unknown".to_owned(), |Interval { estimate, low, high }| {
            let sign = if estimate > 0.0 { "+" } else { "" };
            format!("{sign}{} points [{}, {}]", points(estimate), points(low), points(high))
        });
        let best = 100.0 * self.best_accuracy();
        format!("best null ruler: {} {best:.1} %; lead {lead}", self.best.name())
    }
}

/// The mean of ones, halves and zeros with Wilson's 95 % interval (half ones are rounded down for the interval).
#[must_use]
pub fn share(right: &[f64]) -> Interval {
    let total: f64 = right.iter().sum();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and the number of pairs"
    )]
    let whole = total as u64;
    Interval { estimate: stats::mean(right), ..stats::wilson(whole, right.len() as u64, Z) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(question: &str, better: &str, worse: &str) -> Ruled {
        let side = |reply: &str| vec![Message::user(question), Message::assistant(reply)];
        Ruled::of(&side(better), &side(worse))
    }

    #[test]
    fn words_keep_their_apostrophes() {
        let found: Vec<String> = words("I can’t, 'no' — it's 3.5 ÉTÉ'").collect();
        assert_eq!(found, ["i", "can't", "no", "it's", "3", "5", "été"]);
    }

    #[test]
    fn rulers_by_hand() {
        let one = pair("q", "Sorry, I can't.", "Perhaps you could ask.");
        let right = Ruler::ALL.map(|ruler| one.is_right(ruler));
        assert_eq!([right[0], right[1], right[3], right[4]], [1.0, 0.0, 0.0, 1.0]);
        assert!(right[2] == 0.0 || right[2] == 1.0);
        assert!(
            !one.is_length_matched() && pair("q", "123456789", "1234567890").is_length_matched()
        );
        // Only what the sides do not share counts: the common reply is longer than both.
        let long = |reply: &str| {
            vec![
                Message::user("q"),
                Message::assistant("Maybe a long answer."),
                Message::user("why"),
                Message::assistant(reply),
            ]
        };
        let later = Ruled::of(&long("ab"), &long("abc"));
        assert_eq!(later.sides, [[2, 0, 0], [3, 0, 0]]);
        let shown = [true, false].map(|first| Ruled::shown(&long("a"), &long("b"), first));
        assert_eq!(shown.map(|pair| pair.is_right(Ruler::FirstShown)), [1.0, 0.0]);
    }

    #[test]
    fn the_best_ruler_and_the_lead_over_it_by_hand() {
        // Shorter is right on three of four; what is measured on all but the last.
        let shown = |question: &str, better: &str, worse: &str| {
            let side = |reply: &str| vec![Message::user(question), Message::assistant(reply)];
            Ruled::shown(&side(better), &side(worse), false)
        };
        let pairs = [
            shown("a", "x", "xxx"),
            shown("b", "x", "xxx"),
            shown("c", "xxx", "x"),
            shown("d", "x", "xxx"),
        ];
        let found = NullRulers::beside(&pairs, &[1.0, 1.0, 1.0, 0.0]).unwrap();
        assert_eq!((found.best, found.best_accuracy()), (Ruler::Shorter, 0.75));
        assert_eq!(found.accuracy[&Ruler::Longer].estimate, 0.25);
        assert_eq!(found.accuracy[&Ruler::MoreHedges].estimate, 0.5);
        // Leads 0, 0, 1, −1: mean 0, sd √(2/3), standard error √(1/6), t of 3 degrees 3.182446.
        let lead = found.lead.unwrap();
        assert_eq!(lead.estimate, 0.0);
        assert!((lead.high - 3.182_446 * (1.0_f64 / 6.0).sqrt()).abs() < 1e-5, "{lead:?}");
        assert!(!found.is_beaten());
        assert_eq!(
            found.words(),
            "best null ruler: shorter 75.0 %; lead 0.0 points [−129.9, 129.9]"
        );
        assert!(NullRulers::beside(&[], &[]).is_none());
    }

    #[test]
    fn neither_place_is_right_more_often() {
        let first = (0..400)
            .filter(|i| pair(&format!("{i}"), "good", "bad").is_right(Ruler::FirstShown) > 0.5)
            .count();
        assert!((160..=240).contains(&first), "{first}");
    }
}
