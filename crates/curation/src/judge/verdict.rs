//! The arithmetic of a verdict: label masses to probabilities, two orders to one debiased
//! probability, probabilities to votes, votes to a preference. Pure functions of numbers.

use arete_records::rows::JudgementRow;

/// Label mass below which a judge did not answer the question.
pub const MIN_MASS: f64 = 0.1;

/// Probabilities are kept this far from 0 and 1, so that their logits stay finite.
const CLIP: f64 = 1e-6;

/// Probability that the judge's next token is one of the spellings of each of two labels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LabelMass {
    /// Of the first label (`A`, or `Yes`).
    pub first: f64,
    /// Of the second label (`B`, or `No`).
    pub second: f64,
}

impl LabelMass {
    /// P(first | first or second); `None` (an abstention) if the labels together have less than
    /// [`MIN_MASS`], or a number is not a probability.
    pub fn p_first(self) -> Option<f64> {
        let total = self.first + self.second;
        let sane = self.first >= 0.0 && self.second >= 0.0 && total <= 1.0 + 1e-3;
        (sane && total >= MIN_MASS).then(|| self.first / total)
    }
}

/// What a judge says of sample 0 against sample 1.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Verdict {
    /// P(sample 0 preferred | sample 0 shown first).
    pub p_ab: Option<f64>,
    /// P(sample 1 preferred | sample 1 shown first).
    pub p_ba: Option<f64>,
    /// P(sample 0 preferred), order-debiased.
    pub p_sample0: Option<f64>,
}

impl Verdict {
    /// From both orders: sigmoid((logit p_ab − logit p_ba) / 2), which a constant preference for
    /// the first place cancels out of. An abstention in one order abstains.
    pub fn both_orders(p_ab: Option<f64>, p_ba: Option<f64>) -> Self {
        let p_sample0 = p_ab.zip(p_ba).map(|(ab, ba)| sigmoid((logit(ab) - logit(ba)) / 2.0));
        Self { p_ab, p_ba, p_sample0 }
    }

    /// From the one order in which sample 0 stands first, as the report does.
    pub fn one_order(p_ab: Option<f64>) -> Self {
        Self { p_ab, p_ba: None, p_sample0: p_ab }
    }

    /// From each sample's own probability of being good.
    pub fn pointwise(p_0: Option<f64>, p_1: Option<f64>) -> Self {
        let p_sample0 = p_0.zip(p_1).map(|(p_0, p_1)| sigmoid(logit(p_0) - logit(p_1)));
        Self { p_ab: None, p_ba: None, p_sample0 }
    }

    /// The verdict with sample 0 and 1 exchanged, for a method that is known to point the wrong way.
    pub fn flipped(self) -> Self {
        let flip = |p: Option<f64>| p.map(|p| 1.0 - p);
        Self { p_ab: flip(self.p_ab), p_ba: flip(self.p_ba), p_sample0: flip(self.p_sample0) }
    }
}

/// The preferred sample, or `None` if there is no verdict or it lies within `tie_margin` of ½.
pub fn vote(p_sample0: Option<f64>, tie_margin: f64) -> Option<i32> {
    let lead = p_sample0? - 0.5;
    if lead == 0.0 || lead.abs() < tie_margin {
        return None;
    }
    Some(i32::from(lead < 0.0))
}

/// What the virtues' votes add up to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tally {
    /// Votes for sample 0 and sample 1.
    pub votes: [i32; 2],
    /// Mean over virtues of P(sample 0 preferred); `None` if all abstained.
    pub p_sample0: Option<f64>,
}

impl Tally {
    /// Counts one pair's judgements.
    pub fn of<'a>(judgements: impl IntoIterator<Item = &'a JudgementRow>) -> Self {
        let mut votes = [0; 2];
        let (mut sum, mut n) = (0.0, 0);
        for judgement in judgements {
            if let Some(sample) = judgement.vote {
                votes[usize::from(sample != 0)] += 1;
            }
            if let Some(p) = judgement.p_sample0 {
                sum += f64::from(p);
                n += 1;
            }
        }
        Self { votes, p_sample0: (n > 0).then(|| sum / f64::from(n)) }
    }

    /// The sample with more votes.
    pub fn winner(&self) -> Option<usize> {
        match self.votes[0].cmp(&self.votes[1]) {
            std::cmp::Ordering::Greater => Some(0),
            std::cmp::Ordering::Less => Some(1),
            std::cmp::Ordering::Equal => None,
        }
    }

    /// The sample with the higher mean probability.
    pub fn likelier(&self) -> Option<usize> {
        vote(self.p_sample0, 0.0).map(|sample| usize::from(sample != 0))
    }
}

fn logit(p: f64) -> f64 {
    let p = p.clamp(CLIP, 1.0 - CLIP);
    (p / (1.0 - p)).ln()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Marks around the thoughts of models that think in their replies.
const THOUGHTS: [(&str, &str); 4] = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
];

/// What a reply says after its thoughts; `None` if it ends inside them. Templates may open them before the reply begins.
fn after_thoughts(text: &str) -> Option<&str> {
    THOUGHTS.iter().try_fold(text, |text, (opening, end)| match text.rsplit_once(end) {
        Some((_, said)) => Some(said),
        None => (!text.trim_start().starts_with(opening)).then_some(text),
    })
}

/// The label a judge wrote after its thoughts: the first word that is one, letters compared without case and
/// punctuation stripped; `None` if both or neither come up front.
///
/// Looks through filler such as "Answer A" or "**B**", but never guesses: a lower-case `a` is the
/// article unless it stands alone.
pub fn read_label(text: &str, first: &str, second: &str) -> Option<bool> {
    let strip = |word: &str| word.trim_matches(|c: char| !c.is_alphanumeric()).to_owned();
    let words: Vec<String> =
        after_thoughts(text)?.split_whitespace().map(strip).filter(|w| !w.is_empty()).collect();
    if let [only] = &words[..] {
        let only = only.to_lowercase();
        return match () {
            () if only == first.to_lowercase() => Some(true),
            () if only == second.to_lowercase() => Some(false),
            () => None,
        };
    }
    let mut found = words.iter().filter(|word| *word == first || *word == second);
    let label = found.next()? == first;
    // "A or B": naming both decides nothing.
    found.all(|word| (word == first) == label).then_some(label)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: Option<f64>, expected: f64) {
        let got = got.unwrap();
        assert!((got - expected).abs() < 1e-9, "{got} {expected}");
    }

    #[test]
    fn label_mass_is_normalised_and_too_little_abstains() {
        close(LabelMass { first: 0.3, second: 0.1 }.p_first(), 0.75);
        assert_eq!(LabelMass { first: 0.05, second: 0.04 }.p_first(), None);
        assert_eq!(LabelMass { first: f64::NAN, second: 0.4 }.p_first(), None);
        assert_eq!(LabelMass { first: 3.0, second: 0.4 }.p_first(), None);
    }

    #[test]
    fn a_constant_preference_for_the_first_place_cancels() {
        // logit 0.9 = ln 9, logit 0.8 = ln 4: sigmoid((ln 9 - ln 4) / 2) = 1 / (1 + 2/3) = 0.6.
        close(Verdict::both_orders(Some(0.9), Some(0.8)).p_sample0, 0.6);
        close(Verdict::both_orders(Some(0.9), Some(0.9)).p_sample0, 0.5);
        // Both orders prefer sample 0: ln 9 and -ln 9, half the difference is ln 9.
        close(Verdict::both_orders(Some(0.9), Some(0.1)).p_sample0, 0.9);
        close(Verdict::both_orders(Some(1.0), Some(1.0)).p_sample0, 0.5);
        assert_eq!(Verdict::both_orders(Some(0.9), None).p_sample0, None);
    }

    #[test]
    fn pointwise_compares_the_two_logits() {
        // ln 4 - ln 1 = ln 4: 0.8.
        close(Verdict::pointwise(Some(0.8), Some(0.5)).p_sample0, 0.8);
        close(Verdict::pointwise(Some(0.8), Some(0.5)).flipped().p_sample0, 0.2);
    }

    #[test]
    fn votes_within_the_margin_are_ties() {
        assert_eq!(vote(Some(0.6), 0.1 - 1e-12), Some(0));
        assert_eq!(vote(Some(0.59), 0.1), None);
        assert_eq!(vote(Some(0.3), 0.1), Some(1));
        assert_eq!(vote(Some(0.5), 0.0), None);
        assert_eq!(vote(Some(0.500001), 0.0), Some(0));
        assert_eq!(vote(None, 0.0), None);
    }

    #[test]
    fn five_judgements_make_a_tally() {
        use arete_records::{Aspect, Split, Virtue};
        let row = |virtue: Virtue, p: Option<f32>, vote: Option<i32>| JudgementRow {
            prompt_id: String::new(),
            split: Split::Train,
            aspect: Aspect::ACTION,
            virtue,
            method: String::new(),
            judge: String::new(),
            p_ab: None,
            p_ba: None,
            p_sample0: p,
            vote,
        };
        let rows = [
            row(Virtue::HONESTY, Some(0.75), Some(0)),
            row(Virtue::PRUDENCE, Some(0.25), Some(1)),
            row(Virtue::COMPASSION, Some(0.5), None),
            row(Virtue::HUMILITY, None, None),
            row(Virtue::RESPECT, Some(0.125), Some(1)),
        ];
        let tally = Tally::of(&rows);
        assert_eq!(tally, Tally { votes: [1, 2], p_sample0: Some(0.40625) });
        assert_eq!((tally.winner(), tally.likelier()), (Some(1), Some(1)));
        assert_eq!(Tally::of(&rows[..2]).winner(), None);
        assert_eq!(Tally::of([]).p_sample0, None);
    }

    #[test]
    fn written_labels_are_read_without_guessing() {
        let cases = [
            ("A", Some(true)),
            (" b.", Some(false)),
            ("**B**", Some(false)),
            ("Answer A is more honest.", Some(true)),
            ("A or B", None),
            ("It is a matter of taste", None),
            ("I prefer (B) over the other", Some(false)),
            ("", None),
            ("Neither", None),
            // Thoughts are no verdict, whatever they weigh; a reply that was cut inside them has none.
            ("<think>\nOption A is kinder than option B.\n</think>\n\nB", Some(false)),
            ("Assistant A says that … B is kinder.\n</think>\n\n**A**", Some(true)),
            ("[THINK]A seems better[/THINK] The answer is B.", Some(false)),
            ("<think>\nI need to see who is more honest. Assistant A says that", None),
            ("<think>\nA</think>", None),
            ("<thinking>A", None),
            ("I think A <think> is no mark here", Some(true)),
        ];
        for (text, expected) in cases {
            assert_eq!(read_label(text, "A", "B"), expected, "{text:?}");
        }
        assert_eq!(read_label("Yes, it does.", "Yes", "No"), Some(true));
        assert_eq!(read_label("no", "Yes", "No"), Some(false));
    }
}
