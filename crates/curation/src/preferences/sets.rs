//! What the preferences are about: a set, and with it a reward model, for each turn, for each virtue, or for both.

use anyhow::Result;
use arete_chain::Turns;
use arete_chain::constitution::listed;
use arete_records::rows::JudgementRow;
use arete_records::{Aspect, Refusal, Virtue};

use super::By;

/// Preferences that a reward model of their own learns from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Set {
    /// What its directory is called: the turn, or the virtue.
    pub(super) name: Aspect,
    /// The turn whose replies were judged.
    pub(super) aspect: Aspect,
    /// The virtue whose verdicts alone count; none if all of them vote.
    pub(super) virtue: Option<Virtue>,
}

impl Set {
    /// Of a turn's replies.
    pub(super) fn of_aspect(aspect: Aspect) -> Self {
        Self { name: aspect, aspect, virtue: None }
    }

    /// Of a virtue in the answers.
    ///
    /// # Errors
    ///
    /// A file's failure for a virtue whose name means something else in our files.
    pub(super) fn of_virtue(virtue: Virtue, answer: Aspect) -> Result<Self> {
        let name = Aspect::new(virtue.name())?;
        Ok(Self { name, aspect: answer, virtue: Some(virtue) })
    }

    /// Whether a verdict counts.
    pub(super) fn counts(&self, row: &JudgementRow) -> bool {
        row.aspect == self.aspect && self.virtue.is_none_or(|virtue| row.virtue == virtue)
    }
}

/// The turns that have to be judged: a virtue is looked for in the answers alone, which is what its reward model reads.
pub(super) fn judged(by: By, turns: &Turns) -> Vec<Aspect> {
    if by.has_aspects() { turns.names() } else { vec![turns.answer()] }
}

/// Every set, those of turns first. A virtue without a vote has none.
///
/// # Errors
///
/// A refused setting if a virtue is called as a turn, or none of them has a vote.
pub(super) fn of(
    by: By,
    turns: &Turns,
    virtues: &[Virtue],
    without_vote: &[Virtue],
) -> Result<Vec<Set>> {
    let mut sets = Vec::new();
    if by.has_aspects() {
        sets.extend(turns.names().into_iter().map(Set::of_aspect));
    }
    if !by.has_virtues() {
        return Ok(sets);
    }
    let refuse =
        |expected: &str, got: String| Err(Refusal::setting("by", expected.to_owned(), got).into());
    if without_vote.len() == virtues.len() {
        return refuse("aspect, unless a virtue has a vote", "none has".to_owned());
    }
    for &virtue in virtues.iter().filter(|virtue| !without_vote.contains(virtue)) {
        let set = Set::of_virtue(virtue, turns.answer())?;
        if turns.place(set.name).is_some() {
            let expected = "aspect, or virtues that are called otherwise than turns";
            return refuse(expected, format!("{virtue} among both ({})", listed(&turns.names())));
        }
        sets.push(set);
    }
    Ok(sets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_turn_or_every_virtue_with_a_vote_or_both() {
        let turns = Turns::default();
        let names = |by, without: &[Virtue]| {
            let sets = of(by, &turns, &Virtue::SHIPPED, without).unwrap();
            listed(&sets.iter().map(|set| set.name).collect::<Vec<_>>())
        };
        assert_eq!(names(By::Aspect, &[]), "action, motivation, consequence");
        let silent = [Virtue::PRUDENCE, Virtue::RESPECT];
        assert_eq!(names(By::Virtue, &silent), "honesty, compassion, humility");
        let both = "action, motivation, consequence, honesty, compassion, humility";
        assert_eq!(names(By::Both, &silent), both);
        assert_eq!(judged(By::Virtue, &turns), [Aspect::ACTION]);
        assert_eq!(judged(By::Both, &turns).len(), 3);
        let error = of(By::Virtue, &turns, &silent, &silent).unwrap_err().to_string();
        assert!(error.contains("none has"), "{error}");
        let called_as_a_turn = [Virtue::new("action").unwrap()];
        let error = of(By::Both, &turns, &called_as_a_turn, &[]).unwrap_err().to_string();
        assert!(error.contains("action among both"), "{error}");
    }
}
