//! Whether replies still read as language: repetition, variety, emptiness, surprise.
//!
//! Words are what white space separates, in lower case.

use std::collections::HashSet;

use arete_records::FinishReason;
use serde::{Deserialize, Serialize};

/// What is known of one reply.
#[derive(Clone, Debug)]
pub struct ReplyFacts<'a> {
    /// Its text.
    pub text: &'a str,
    /// Tokens sampled.
    pub n_tokens: i32,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// log P of its tokens under the base, summed, nats.
    pub base_logprob: f64,
    /// Number of those tokens.
    pub n_base_tokens: i32,
}

/// The coherence of a model's replies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Coherence {
    /// Number of replies.
    pub n_replies: usize,
    /// exp(−mean log P per token) of the replies under the base; none without tokens.
    pub perplexity: Option<f64>,
    /// Distinct pairs of neighbouring words among all such pairs, over all replies; none without pairs.
    pub distinct_2: Option<f64>,
    /// Mean over replies of [`repeated_4grams`]; none if all are shorter than four words.
    pub repeated_4gram_rate: Option<f64>,
    /// Mean number of sampled tokens per reply.
    pub mean_tokens: f64,
    /// Part of the replies that the token limit cut.
    pub truncated_rate: f64,
    /// Part of the replies without any text.
    pub empty_rate: f64,
}

impl Coherence {
    /// Of the replies of one model; all zeros of nothing.
    pub fn of(replies: &[ReplyFacts<'_>]) -> Self {
        if replies.is_empty() {
            return Self::default();
        }
        let n = replies.len() as f64;
        let share = |holds: &dyn Fn(&ReplyFacts<'_>) -> bool| {
            replies.iter().filter(|reply| holds(reply)).count() as f64 / n
        };
        let texts: Vec<&str> = replies.iter().map(|reply| reply.text).collect();
        let n_base_tokens: f64 = replies.iter().map(|reply| f64::from(reply.n_base_tokens)).sum();
        let base_logprob: f64 = replies.iter().map(|reply| reply.base_logprob).sum();
        let repeats: Vec<f64> = texts.iter().filter_map(|text| repeated_4grams(text)).collect();
        Self {
            n_replies: replies.len(),
            perplexity: (n_base_tokens > 0.0).then(|| (-base_logprob / n_base_tokens).exp()),
            distinct_2: distinct_2(&texts),
            repeated_4gram_rate: (!repeats.is_empty())
                .then(|| arete_records::stats::mean(&repeats)),
            mean_tokens: replies.iter().map(|reply| f64::from(reply.n_tokens)).sum::<f64>() / n,
            truncated_rate: share(&|reply| reply.finish_reason == FinishReason::Length),
            empty_rate: share(&|reply| reply.text.trim().is_empty()),
        }
    }
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_lowercase).collect()
}

/// Distinct pairs of neighbouring words among all such pairs of several texts; none without pairs.
///
/// # Source
///
/// Li et al. 2016 (arXiv:1510.03055), section 5.4; they divide by words, this by pairs, so that 1 is reached.
pub fn distinct_2(texts: &[&str]) -> Option<f64> {
    let mut distinct = HashSet::new();
    let mut n_pairs = 0_usize;
    for text in texts {
        for pair in words(text).windows(2) {
            n_pairs += 1;
            distinct.insert((pair[0].clone(), pair[1].clone()));
        }
    }
    (n_pairs > 0).then(|| distinct.len() as f64 / n_pairs as f64)
}

/// Part of a text's runs of four words that stood in it before; none below four words.
///
/// # Source
///
/// Welleck et al. 2019 (arXiv:1908.04319), eq. 7 (seq-rep-4).
pub fn repeated_4grams(text: &str) -> Option<f64> {
    let words = words(text);
    let runs: Vec<&[String]> = words.windows(4).collect();
    let distinct: HashSet<&[String]> = runs.iter().copied().collect();
    (!runs.is_empty()).then(|| 1.0 - distinct.len() as f64 / runs.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pairs_of_words_by_hand() {
        // the cat, cat the, the cat | The dog: 4 pairs, 3 of them distinct
        assert_eq!(distinct_2(&["the cat the cat", "The dog"]), Some(3.0 / 4.0));
        // pairs do not cross replies
        assert_eq!(distinct_2(&["a", "b"]), None);
        assert_eq!(distinct_2(&["a b", "A  B"]), Some(0.5));
    }

    #[test]
    fn repeated_runs_of_four_by_hand() {
        // 9 words, 6 runs: abcd bcda cdab dabc abcd bcdx: one repeated
        assert_eq!(repeated_4grams("a b c d a b c d x"), Some(1.0 - 5.0 / 6.0));
        assert_eq!(repeated_4grams("no no no no no no"), Some(1.0 - 1.0 / 3.0));
        assert_eq!(repeated_4grams("one two three four"), Some(0.0));
        assert_eq!(repeated_4grams("one two three"), None);
        assert_eq!(repeated_4grams(""), None);
    }

    #[test]
    fn coherence_by_hand() {
        let reply = |text, n_tokens, finish_reason, base_logprob, n_base_tokens| ReplyFacts {
            text,
            n_tokens,
            finish_reason,
            base_logprob,
            n_base_tokens,
        };
        let replies = [
            reply("a b c d a b c d", 8, FinishReason::Stop, -4.0, 8),
            reply("  ", 1, FinishReason::Stop, -1.0, 1),
            reply("x y", 3, FinishReason::Length, -5.0, 1),
        ];
        let coherence = Coherence::of(&replies);
        assert_eq!(coherence.n_replies, 3);
        assert!((coherence.perplexity.unwrap() - 1.0_f64.exp()).abs() < 1e-12); // 10 nats, 10 tokens
        // ab bc cd da ab bc cd | xy: 8 pairs, 5 distinct
        assert_eq!(coherence.distinct_2, Some(5.0 / 8.0));
        // 5 runs, the last repeats the first; the others are too short to count
        assert!((coherence.repeated_4gram_rate.unwrap() - 0.2).abs() < 1e-12);
        assert_eq!(coherence.mean_tokens, 4.0);
        assert_eq!(coherence.truncated_rate, 1.0 / 3.0);
        assert_eq!(coherence.empty_rate, 1.0 / 3.0);
        assert_eq!(Coherence::of(&[]), Coherence::default());
    }

    proptest! {
        #[test]
        fn rates_stay_rates(texts in proptest::collection::vec("[ab ]{0,24}", 0..6)) {
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            if let Some(rate) = distinct_2(&texts) {
                prop_assert!(rate > 0.0 && rate <= 1.0);
            }
            for text in texts {
                if let Some(rate) = repeated_4grams(text) {
                    prop_assert!((0.0..1.0).contains(&rate));
                }
            }
        }
    }
}
