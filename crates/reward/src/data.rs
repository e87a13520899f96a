//! Preference pairs: read, rendered, cut, and their common tokens found.

use std::path::Path;

use anyhow::{Context, Result};
use arete_chain::batches::n_common;
use arete_chain::{Ruled, pairs};
use arete_model::Chat;
use arete_records::left_out::{self, LeftOut};
use arete_training::not_rendered;
use arete_training::order;

use crate::config::{Label, OverLength};

pub use arete_chain::pairs::{
    Conversation, LabelledPair as Preference, read_pairs, read_preferences, splits_of_pairs,
};

/// A tokenised conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// The tokens, cut to the longest length.
    pub token_ids: Vec<i64>,
    /// Tokens of the assistant's own in the whole conversation, before cutting.
    pub n_own_tokens: usize,
}

/// A tokenised pair.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// The better side.
    pub chosen: Sequence,
    /// The worse side.
    pub rejected: Sequence,
    /// Leading tokens that both share and that are computed once; each side has at least one token of its own.
    pub n_shared: usize,
    /// What the loss aims at.
    pub chosen_prob: f32,
    /// Lead demanded of the winner's score.
    pub margin: f32,
}

impl Pair {
    fn new(chosen: Sequence, rejected: Sequence, chosen_prob: f32, margin: f32) -> Self {
        let common = n_common(&chosen.token_ids, &rejected.token_ids);
        let shorter = chosen.token_ids.len().min(rejected.token_ids.len());
        let n_shared = common.min(shorter - 1);
        Self { chosen, rejected, n_shared, chosen_prob, margin }
    }

    /// Tokens that go through the model.
    pub fn n_tokens(&self) -> usize {
        self.chosen.token_ids.len() + self.rejected.token_ids.len() - self.n_shared
    }
}

/// Tokenised pairs, and what happened to the others.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pairs {
    /// In file order.
    pub pairs: Vec<Pair>,
    /// Row of each in its file, from 1.
    pub rows: Vec<usize>,
    /// What the null rulers see of each.
    pub ruled: Vec<Ruled>,
    /// Pairs of which a side was cut.
    pub n_cut: usize,
    /// Pairs left out for their length.
    pub n_dropped: usize,
    /// Pairs left out because their sides are the same tokens (after cutting).
    pub n_identical: usize,
    /// Pairs with a side that was left open, without the end of its last turn.
    pub n_open: usize,
    /// Pairs that the template refuses.
    pub left_out: Vec<LeftOut>,
}

/// Swaps the sides of every pair for which a seeded coin shows tails: the control that has nothing to learn.
pub fn shuffle_labels(preferences: &mut [Preference], seed: u64) {
    let coins = order::permutation(seed, "shuffled labels", 2 * preferences.len());
    for (preference, coin) in preferences.iter_mut().zip(coins) {
        if coin % 2 == 1 {
            std::mem::swap(&mut preference.chosen, &mut preference.rejected);
        }
    }
}

/// How pairs become tokens.
#[derive(Clone, Copy, Debug)]
pub struct Rendering {
    /// Most tokens of a conversation.
    pub max_length: usize,
    /// What happens to longer ones.
    pub over_length: OverLength,
    /// What the loss aims at.
    pub label: Label,
    /// Lead demanded for every vote.
    pub margin_per_vote: f64,
}

/// The whole template, without an end of turn if the reply was cut off.
fn tokenize_whole(
    conversation: &Conversation,
    chat: &Chat<'_>,
) -> Result<Sequence, arete_model::Error> {
    let rendered = if conversation.truncated {
        chat.render_truncated(&conversation.messages)?
    } else {
        chat.render(&conversation.messages)?
    };
    let n_own_tokens = rendered.own.iter().filter(|&&own| own).count();
    Ok(Sequence { token_ids: rendered.token_ids, n_own_tokens })
}

fn cut(token_ids: &mut Vec<i64>, max_length: usize, over_length: OverLength) {
    match over_length {
        OverLength::TruncateLeft => {
            drop(token_ids.drain(..token_ids.len().saturating_sub(max_length)));
        }
        OverLength::TruncateRight | OverLength::Drop => token_ids.truncate(max_length),
    }
}

/// Cuts the sides of a pair. On the left, both lose the same tokens as long as these are common to both: then they are
/// compared in the same context, and what they share is still computed once.
fn cut_pair(
    chosen: &mut Vec<i64>,
    rejected: &mut Vec<i64>,
    max_length: usize,
    over_length: OverLength,
) {
    let excess = chosen.len().max(rejected.len()).saturating_sub(max_length);
    if over_length == OverLength::TruncateLeft && excess < n_common(chosen, rejected) {
        for side in [&mut *chosen, &mut *rejected] {
            drop(side.drain(..excess));
        }
    }
    cut(chosen, max_length, over_length);
    cut(rejected, max_length, over_length);
}

/// Tokenises pairs. Those that the template refuses are left out and named, unless they are too many.
///
/// # Errors
///
/// If the template refuses more than a [share](left_out::is_share) of them; fewer are left out and named.
pub fn tokenize(
    path: &Path,
    preferences: &[Preference],
    chat: &Chat<'_>,
    rendering: &Rendering,
) -> Result<Pairs> {
    let Rendering { max_length, over_length, label, margin_per_vote } = *rendering;
    let mut out = Pairs::default();
    for preference in preferences {
        let side = |conversation| {
            tokenize_whole(conversation, chat).with_context(|| not_rendered(path, preference.row))
        };
        let (mut chosen, mut rejected) =
            match side(&preference.chosen).and_then(|own| Ok((own, side(&preference.rejected)?))) {
                Ok(sides) => sides,
                Err(error) => {
                    out.left_out.push(pairs::of_row(path, preference.row, format!("{error:#}")));
                    if !left_out::is_share(out.left_out.len(), preferences.len()) {
                        return Err(error);
                    }
                    continue;
                }
            };
        let is_long = chosen.token_ids.len().max(rejected.token_ids.len()) > max_length;
        if is_long && over_length == OverLength::Drop {
            out.n_dropped += 1;
            continue;
        }
        cut_pair(&mut chosen.token_ids, &mut rejected.token_ids, max_length, over_length);
        if chosen.token_ids == rejected.token_ids {
            out.n_identical += 1;
            continue;
        }
        out.n_cut += usize::from(is_long);
        out.n_open += usize::from(preference.chosen.truncated || preference.rejected.truncated);
        let chosen_prob = match label {
            Label::Soft => preference.chosen_prob,
            Label::Hard => 1.0,
        };
        #[expect(clippy::cast_possible_truncation, reason = "a small number")]
        let margin = (margin_per_vote * f64::from(preference.vote_lead)) as f32;
        out.pairs.push(Pair::new(chosen, rejected, chosen_prob, margin));
        out.rows.push(preference.row);
        out.ruled.push(Ruled::of(&preference.chosen.messages, &preference.rejected.messages));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use arete_records::Message;

    use super::*;

    fn sequence(token_ids: &[i64]) -> Sequence {
        Sequence { token_ids: token_ids.to_vec(), n_own_tokens: 1 }
    }

    #[test]
    fn each_side_keeps_a_token_of_its_own() {
        let shared = |a: &[i64], b: &[i64]| Pair::new(sequence(a), sequence(b), 1.0, 0.0).n_shared;
        assert_eq!(shared(&[1, 2, 3, 4], &[1, 2, 9]), 2);
        assert_eq!(shared(&[1, 2], &[1, 2, 3]), 1); // one is a prefix of the other
        assert_eq!(shared(&[5], &[6]), 0);
        assert_eq!(shared(&[5], &[5, 6]), 0);
        let pair = Pair::new(sequence(&[1, 2, 3, 4]), sequence(&[1, 2, 9]), 1.0, 0.0);
        assert_eq!(pair.n_tokens(), 5);
    }

    #[test]
    fn sides_cut_on_the_left_keep_the_same_context() {
        let cut = |chosen: &[i64], rejected: &[i64]| {
            let (mut chosen, mut rejected) = (chosen.to_vec(), rejected.to_vec());
            cut_pair(&mut chosen, &mut rejected, 4, OverLength::TruncateLeft);
            (chosen, rejected)
        };
        // 1 2 3 are common: the longer side's excess is one, both lose the 1.
        assert_eq!(cut(&[1, 2, 3, 8, 9], &[1, 2, 3, 7]), (vec![2, 3, 8, 9], vec![2, 3, 7]));
        // The excess is all they share: each keeps as much as fits.
        assert_eq!(cut(&[1, 2, 6, 7, 8, 9], &[1, 2, 5]), (vec![6, 7, 8, 9], vec![1, 2, 5]));
        assert_eq!(cut(&[1, 2], &[1, 3]), (vec![1, 2], vec![1, 3]));
        let (mut chosen, mut rejected) = (vec![1, 2, 3, 4, 5], vec![1, 2, 3, 4, 6]);
        cut_pair(&mut chosen, &mut rejected, 4, OverLength::TruncateRight);
        assert_eq!(chosen, rejected);
    }

    #[test]
    fn about_half_of_the_labels_are_flipped() {
        let side = |text: &str| Conversation {
            messages: vec![Message::user("q"), Message::assistant(text)],
            truncated: false,
        };
        let pair = |row| Preference {
            row,
            chosen: side("good"),
            rejected: side("bad"),
            chosen_prob: 1.0,
            vote_lead: 0,
            about: None,
            split: None,
        };
        let mut pairs: Vec<Preference> = (1..=200).map(pair).collect();
        shuffle_labels(&mut pairs, 3);
        let n_flipped = pairs.iter().filter(|pair| pair.chosen == side("bad")).count();
        assert!((70..=130).contains(&n_flipped), "{n_flipped}");
        assert!(pairs.iter().all(|pair| pair.chosen != pair.rejected));
    }
}
