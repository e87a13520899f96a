//! The best and the worst of several samples.

use std::collections::BTreeMap;

use super::candidates::Candidate;
use crate::judge::verdict::Tally;

/// Of each prompt's judged pairs the one of its best and its worst sample: those with the highest and the lowest mean
/// probability of being preferred, over all pairs they are in (a tie goes to the sample drawn first). A prompt whose best
/// and worst were not judged against each other, or whose samples are all alike, has none.
pub(super) fn best_worst(judged: Vec<(&Candidate, Tally)>) -> Vec<(&Candidate, Tally)> {
    // Of each prompt and sample: sum and number of probabilities.
    let mut wins: BTreeMap<(usize, usize), (f64, f64)> = BTreeMap::new();
    for (candidate, tally) in &judged {
        let Some(p_sample0) = tally.p_sample0 else { continue };
        let [zero, one] = candidate.samples;
        for (sample, p) in [(zero, p_sample0), (one, 1.0 - p_sample0)] {
            let (sum, n) = wins.entry((candidate.prompt, sample)).or_default();
            (*sum, *n) = (*sum + p, *n + 1.0);
        }
    }
    let mut extremes: BTreeMap<usize, [(usize, f64); 2]> = BTreeMap::new();
    for ((prompt, sample), (sum, n)) in wins {
        let own = (sample, sum / n);
        let [best, worst] = extremes.entry(prompt).or_insert([own; 2]);
        if own.1 > best.1 {
            *best = own;
        }
        if own.1 < worst.1 {
            *worst = own;
        }
    }
    let is_extreme = |candidate: &Candidate| {
        let Some([(best, _), (worst, _)]) = extremes.get(&candidate.prompt) else { return false };
        best != worst && candidate.samples.contains(best) && candidate.samples.contains(worst)
    };
    judged.into_iter().filter(|(candidate, _)| is_extreme(candidate)).collect()
}

#[cfg(test)]
mod tests {
    use arete_records::Aspect;

    use super::*;
    use crate::judge::Pair;

    fn candidate(prompt: usize, samples: [usize; 2]) -> Candidate {
        let pair = Pair { question: Vec::new(), sides: [Vec::new(), Vec::new()], key: 0 };
        Candidate { prompt, aspect: Aspect::ACTION, samples, pair }
    }

    fn tally(p_sample0: f64) -> Tally {
        Tally { votes: [0, 0], p_sample0: Some(p_sample0) }
    }

    #[test]
    fn the_best_is_set_beside_the_worst() {
        // Sample 2 wins 0.9 and 0.6 of its pairs, sample 0 0.1 and 0.2, sample 1 0.8 and 0.4; prompt 1 is all alike.
        let pairs = [
            (candidate(0, [0, 1]), tally(0.2)),
            (candidate(0, [0, 2]), tally(0.1)),
            (candidate(0, [1, 2]), tally(0.4)),
            (candidate(1, [0, 1]), tally(0.5)),
        ];
        let judged = pairs.iter().map(|(candidate, tally)| (candidate, *tally)).collect();
        let found: Vec<(usize, [usize; 2])> =
            best_worst(judged).iter().map(|(c, _)| (c.prompt, c.samples)).collect();
        assert_eq!(found, [(0, [0, 2])]);
    }
}
