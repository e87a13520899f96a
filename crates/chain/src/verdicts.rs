//! What verdicts say about the judge that gave them: votes, and how they depend on the order of the samples.

use std::collections::BTreeMap;

use arete_records::rows::JudgementRow;
use arete_records::{Virtue, stats};

/// How verdicts depend on virtue and place.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Verdicts {
    /// Verdicts asked for.
    pub n: usize,
    /// For sample 0, for sample 1, for neither.
    pub votes: [usize; 3],
    /// Single verdicts, and those of them for what was shown first.
    pub seen: usize,
    /// See `seen`.
    pub first: usize,
    /// Verdicts in both orders, and those of them for the same sample.
    pub both: usize,
    /// See `both`.
    pub consistent: usize,
    /// Verdicts not given.
    pub abstained: usize,
}

impl Verdicts {
    /// Counts the verdicts of some rows.
    pub fn of<'a>(rows: impl Iterator<Item = &'a JudgementRow>) -> Self {
        let mut out = Self::default();
        for row in rows {
            out.add(row);
        }
        out
    }

    /// Counts one more.
    pub fn add(&mut self, row: &JudgementRow) {
        self.n += 1;
        let place = match row.vote {
            Some(0) => 0,
            Some(_) => 1,
            None => 2,
        };
        self.votes[place] += 1;
        self.abstained += usize::from(row.p_sample0.is_none());
        for p in [row.p_ab, row.p_ba].into_iter().flatten() {
            self.seen += 1;
            self.first += usize::from(p > 0.5);
        }
        if let (Some(p_ab), Some(p_ba)) = (row.p_ab, row.p_ba) {
            self.both += 1;
            self.consistent += usize::from((p_ab > 0.5) == (p_ba < 0.5));
        }
    }

    /// Share of single verdicts for what was shown first.
    #[must_use]
    pub fn first_rate(&self) -> Option<f64> {
        (self.seen > 0).then(|| self.first as f64 / self.seen as f64)
    }

    /// Share of verdicts in both orders that are for the same sample.
    #[must_use]
    pub fn consistency(&self) -> Option<f64> {
        (self.both > 0).then(|| self.consistent as f64 / self.both as f64)
    }
}

/// The virtues that verdicts are by, in the order in which they first come up.
pub fn virtues_of<'a>(rows: impl IntoIterator<Item = &'a JudgementRow>) -> Vec<Virtue> {
    let mut virtues = Vec::new();
    for row in rows {
        if !virtues.contains(&row.virtue) {
            virtues.push(row.virtue);
        }
    }
    virtues
}

/// Fleiss' kappa of the virtues on the pairs that all of them voted on; none of a single virtue.
#[must_use]
pub fn kappa(rows: &[&JudgementRow]) -> Option<f64> {
    let n_virtues = virtues_of(rows.iter().copied()).len();
    if n_virtues < 2 {
        return None;
    }
    let mut votes: BTreeMap<&str, [u64; 2]> = BTreeMap::new();
    for row in rows {
        if let Some(vote @ 0..=1) = row.vote {
            votes.entry(&row.prompt_id).or_default()[usize::from(vote == 1)] += 1;
        }
    }
    let complete: Vec<Vec<u64>> = votes
        .into_values()
        .filter(|v| v.iter().sum::<u64>() == n_virtues as u64)
        .map(|v| v.to_vec())
        .collect();
    let kappa = if complete.is_empty() { f64::NAN } else { stats::fleiss_kappa(&complete) };
    kappa.is_finite().then_some(kappa)
}

#[cfg(test)]
mod tests {
    use arete_records::{Aspect, Split};

    use super::*;

    fn verdict(p_ab: Option<f32>, p_ba: Option<f32>, vote: Option<i32>) -> JudgementRow {
        JudgementRow {
            prompt_id: "a".to_owned(),
            split: Split::Train,
            aspect: Aspect::ACTION,
            virtue: Virtue::HONESTY,
            method: "pairwise-logits".to_owned(),
            judge: "j".to_owned(),
            p_ab,
            p_ba,
            p_sample0: p_ab.and(p_ba),
            vote,
        }
    }

    #[test]
    fn verdicts_by_hand() {
        let rows = [
            verdict(Some(0.9), Some(0.2), Some(0)), // sample 0 both times; first shown once
            verdict(Some(0.8), Some(0.7), None),    // whatever is first
            verdict(Some(0.4), None, None),
            verdict(None, None, None),
        ];
        let verdicts = Verdicts::of(rows.iter());
        assert_eq!((verdicts.n, verdicts.votes, verdicts.abstained), (4, [1, 0, 3], 2));
        assert_eq!(verdicts.first_rate(), Some(3.0 / 5.0));
        assert_eq!(verdicts.consistency(), Some(0.5));
        assert_eq!(Verdicts::default().first_rate(), None);
    }

    #[test]
    fn virtues_that_always_agree_have_kappa_one() {
        let rows: Vec<JudgementRow> = (0..4)
            .flat_map(|pair| {
                Virtue::SHIPPED.map(|virtue| JudgementRow {
                    prompt_id: pair.to_string(),
                    virtue,
                    ..verdict(Some(0.9), Some(0.1), Some(pair % 2))
                })
            })
            .collect();
        let all: Vec<&JudgementRow> = rows.iter().collect();
        assert!((kappa(&all).unwrap() - 1.0).abs() < 1e-12);
        // A pair that a virtue abstained on is left out; without any there is no kappa, and none of one virtue.
        assert!((kappa(&all[1..]).unwrap() - 1.0).abs() < 1e-12);
        let abstains = |row: &&&JudgementRow| row.virtue != Virtue::RESPECT;
        let mut none: Vec<JudgementRow> =
            all.iter().filter(abstains).map(|&row| row.clone()).collect();
        none.push(JudgementRow { virtue: Virtue::RESPECT, ..verdict(None, None, None) });
        assert_eq!(kappa(&none.iter().collect::<Vec<_>>()), None);
        let one: Vec<&JudgementRow> = all.iter().copied().step_by(5).collect();
        assert_eq!((virtues_of(one.iter().copied()), kappa(&one)), (vec![Virtue::HONESTY], None));
    }
}
