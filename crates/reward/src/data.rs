//! Preference pairs: read, rendered, cut, and their common tokens found.

use std::collections::HashSet;
use std::path::Path;

use arete_chain::{Ruled, pairs};
use arete_records::left_out::LeftOut;
use arete_records::table::Column;
use arete_model::Chat;
use arete_records::{Role, Split, fill_splits, split_of};
use arete_training::order;

use crate::Error;
use crate::config::{Label, OverLength};

pub use arete_chain::pairs::{Conversation, LabelledPair as Preference, read_preferences};

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
}

/// Reads labelled pairs as the hub has them ([`arete_chain::pairs`]). Repeated pairs are read once; pairs with a side that
/// does not end with a reply, and rows that are no pairs, are left out and named.
///
/// # Errors
///
/// [`Error::Records`] if the file is unusable, or too many rows are no such pairs.
pub fn read_pairs(
    path: &Path,
    columns: &[Column],
) -> Result<(Vec<Preference>, Vec<LeftOut>), Error> {
    let pairs::PairFile { mut pairs, mut left_out, .. } = pairs::read_file(path, columns)?;
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    pairs.retain(|pair| {
        if !pair.is_whole() {
            let item = format!("{name}:{}", pair.row);
            left_out.push(LeftOut::new(item, "a side does not end with a reply"));
        }
        pair.is_whole()
    });
    let mut seen = HashSet::new();
    pairs.retain(|pair| seen.insert((pair.chosen.clone(), pair.rejected.clone())));
    Ok((pairs, left_out))
}

/// The splits of pairs that name none: each has that of its opening question, and each split has one where there are
/// enough ([`fill_splits`]).
pub fn splits_of_pairs(pairs: &[Preference]) -> Vec<Split> {
    let keyed = |pair: &Preference| {
        let messages = &pair.chosen.messages;
        let asked = messages.iter().find(|message| message.role == Role::User);
        let key = asked.map_or_else(String::new, |message| message.content.trim().to_owned());
        (key, split_of(messages))
    };
    let mut items: Vec<(String, Split)> = pairs.iter().map(keyed).collect();
    fill_splits(&mut items);
    items.into_iter().map(|(_, split)| split).collect()
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

/// Leading tokens that are the same.
fn n_common(a: &[i64], b: &[i64]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Tokenises pairs.
///
/// # Errors
///
/// [`Error::Rendering`] if the template refuses a conversation.
pub fn tokenize(
    path: &Path,
    preferences: &[Preference],
    chat: &Chat<'_>,
    rendering: &Rendering,
) -> Result<Pairs, Error> {
    let Rendering { max_length, over_length, label, margin_per_vote } = *rendering;
    let mut out = Pairs::default();
    for preference in preferences {
        let side = |conversation| {
            tokenize_whole(conversation, chat).map_err(|source| {
                let source = Box::new(source);
                Error::Rendering { path: path.to_owned(), row: preference.row, source }
            })
        };
        let (mut chosen, mut rejected) = (side(&preference.chosen)?, side(&preference.rejected)?);
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
        };
        let mut pairs: Vec<Preference> = (1..=200).map(pair).collect();
        shuffle_labels(&mut pairs, 3);
        let n_flipped = pairs.iter().filter(|pair| pair.chosen == side("bad")).count();
        assert!((70..=130).contains(&n_flipped), "{n_flipped}");
        assert!(pairs.iter().all(|pair| pair.chosen != pair.rejected));
    }

    #[test]
    fn pairs_are_read_once_and_unfinished_ones_counted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs.jsonl");
        let good = r#"{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}"#;
        let empty = r#"{"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: c"}"#;
        let lists = r#"{"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "x"}], "rejected": "y", "chosen_prob": 0.7}"#;
        fs_err::write(&path, format!("{good}\n{good}\n{empty}\n{lists}\n")).unwrap();
        let (pairs, left_out) = read_pairs(&path, &[]).unwrap();
        assert_eq!((pairs.len(), left_out.len()), (2, 1));
        assert_eq!(left_out[0].item, "pairs.jsonl:3");
        assert_eq!(pairs[0].chosen.messages, [Message::user("a"), Message::assistant("b")]);
        assert_eq!(pairs[1].rejected.messages, [Message::user("q"), Message::assistant("y")]);
        assert_eq!(pairs[1].chosen_prob, 0.7);
    }

    #[test]
    fn bad_rows_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs.jsonl");
        let read = |line: &str| {
            fs_err::write(&path, line).unwrap();
            let error = read_pairs(&path, &[]).unwrap_err().to_string();
            error.split_once("pairs.jsonl").unwrap().1.to_owned()
        };
        assert_eq!(
            read(r#"{"chosen": "x"}"#),
            ": row 1: rejected: expected columns `chosen` and `rejected`, got chosen"
        );
        let range = r#"{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c", "chosen_prob": 1.5}"#;
        assert!(read(range).contains("chosen_prob: expected a number within 0 to 1, got 1.5"));
        assert!(read("[1]").contains("expected an object"));
    }
}
