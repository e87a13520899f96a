//! Chat messages, and what identifies a prompt: its id and its split.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use unicode_normalization::UnicodeNormalization;

use crate::Split;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions that precede the conversation.
    System,
    /// The human.
    User,
    /// The model.
    Assistant,
}

impl Role {
    /// The lower-case name chat templates use.
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A turn with system instructions.
    pub fn system(content: impl Into<String>) -> Self {
        Self { role: Role::System, content: content.into() }
    }

    /// A turn of the human.
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: Role::User, content: content.into() }
    }

    /// A turn of the model.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self { role: Role::Assistant, content: content.into() }
    }
}

/// Text in the one form that ids are computed from: Unicode NFC, CRLF as LF, trimmed.
pub fn normalise(text: &str) -> String {
    let text: String = text.nfc().collect();
    text.replace("\r\n", "\n").trim().to_owned()
}

/// The first 16 hex digits of SHA-256 over the canonical JSON of the messages.
///
/// Canonical JSON is a compact array of `{"role":…,"content":…}` in that key order, UTF-8
/// unescaped, contents [normalised](normalise).
pub fn prompt_id(messages: &[Message]) -> String {
    hex(&canonical_digest(messages)[..8])
}

/// The split of a prompt, 80/10/10, from a hash of its opening question (the first user turn)
/// alone, so that prompts which share an opener are never on both sides.
///
/// The first 8 bytes of SHA-256 over the canonical JSON of that one message, read as a big-endian
/// number modulo 100: below 80 train, below 90 validation, else test. Messages without a user
/// turn are hashed whole.
pub fn split_of(messages: &[Message]) -> Split {
    match number(&opening_digest(messages)[..8]) % 100 {
        0..80 => Split::Train,
        80..90 => Split::Validation,
        _ => Split::Test,
    }
}

/// The fold of a prompt among `n_folds`, from a hash of its opening question alone: the second 8 bytes of the digest that
/// [`split_of`] takes the first of, modulo the number of folds.
///
/// # Panics
///
/// If there is no fold.
pub fn fold_of(messages: &[Message], n_folds: usize) -> usize {
    let fold = number(&opening_digest(messages)[8..16]) % n_folds as u64;
    usize::try_from(fold).expect("below a usize")
}

/// The id of a prompt's opening question, by which prompts belong together.
pub fn opening_id(messages: &[Message]) -> String {
    hex(&opening_digest(messages)[..8])
}

fn opening_digest(messages: &[Message]) -> [u8; 32] {
    match messages.iter().find(|m| m.role == Role::User) {
        Some(opening) => canonical_digest(std::slice::from_ref(opening)),
        None => canonical_digest(messages),
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// Gives every split an item where there are items enough: the splits of a small set, drawn one by one, often leave one
/// of them without any (of 21 prompts, none is of validation once in nine times).
///
/// `items` are the splits and what they were drawn from: items that share a key stay together. A split without items
/// takes, of the keys of the largest split, the one whose hash is least; nothing moves where each split has one, or
/// where there are fewer than three keys. Returns the number of items that moved.
pub fn fill_splits(items: &mut [(String, Split)]) -> usize {
    const SPLITS: [Split; 3] = [Split::Train, Split::Validation, Split::Test];
    let mut n_moved = 0;
    for wanted in SPLITS {
        let keys = |split| {
            let of_split = items.iter().filter(|(_, other)| *other == split);
            of_split.map(|(key, _)| key.as_str()).collect::<std::collections::BTreeSet<&str>>()
        };
        if !keys(wanted).is_empty() {
            continue;
        }
        let sizes = SPLITS.map(|split| keys(split).len());
        let largest = (0..3).rev().max_by_key(|&idx| sizes[idx]).expect("there are three");
        // The last one of a split does not leave it, and the last two are left where one more split is empty.
        if sizes[largest] < 2 {
            continue;
        }
        let hash = |key: &&str| <[u8; 32]>::from(Sha256::digest(key.as_bytes()));
        let key = keys(SPLITS[largest]).into_iter().min_by_key(hash).map(str::to_owned);
        for item in items.iter_mut().filter(|(own, _)| Some(own) == key.as_ref()) {
            item.1 = wanted;
            n_moved += 1;
        }
    }
    n_moved
}

fn canonical_digest(messages: &[Message]) -> [u8; 32] {
    let normalised: Vec<Message> =
        messages.iter().map(|m| Message { role: m.role, content: normalise(&m.content) }).collect();
    let json = serde_json::to_vec(&normalised).expect("strings and unit variants always serialise");
    Sha256::digest(json).into()
}

/// Lower-case hex digits of some bytes.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a String cannot fail");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    // Expected ids and splits: Python's hashlib, json.dumps(ensure_ascii=False,
    // separators=(",", ":")), unicodedata.normalize and str.strip.

    #[test]
    fn prompt_ids_are_those_of_an_independent_implementation() {
        let one = [Message::user("How do I \"steal\" a café\n\tsign?\\")];
        assert_eq!(prompt_id(&one), "92e9cb088900f4c7");
        let many = [
            Message::system("Be kind.\u{7}\u{7f}"),
            Message::user("Is lying ever right? 🙂"),
            Message::assistant("Sometimes."),
            Message::user("When?"),
        ];
        assert_eq!(prompt_id(&many), "05b27bf184b8bf0c");
        assert_eq!(prompt_id(&[]), "4f53cda18c2baa0c");
    }

    #[test]
    fn spelling_of_the_same_text_does_not_change_the_id() {
        let decomposed = "  How do I \"steal\" a cafe\u{301}\r\n\tsign?\\ \n";
        assert_eq!(prompt_id(&[Message::user(decomposed)]), "92e9cb088900f4c7");
    }

    #[test]
    fn the_role_changes_the_id() {
        let text = "Hello.";
        assert_ne!(prompt_id(&[Message::user(text)]), prompt_id(&[Message::assistant(text)]));
    }

    #[test]
    fn splits_are_those_of_an_independent_implementation() {
        let question = |i: usize| [Message::user(format!("Question {i}?"))];
        for i in 0..=21 {
            let expected = match i {
                3 | 8 | 21 => Split::Test,
                14 | 15 => Split::Validation,
                _ => Split::Train,
            };
            assert_eq!(split_of(&question(i)), expected, "question {i}");
        }
        let mut counts = [0; 3];
        for i in 0..1000 {
            counts[split_of(&question(i)) as usize] += 1;
        }
        assert_eq!(counts, [821, 88, 91]);
    }

    #[test]
    fn folds_are_those_of_an_independent_implementation() {
        let question = |i: usize| [Message::user(format!("Question {i}?"))];
        let folds: Vec<usize> = (0..12).map(|i| fold_of(&question(i), 5)).collect();
        assert_eq!(folds, [4, 1, 4, 0, 1, 2, 1, 4, 0, 3, 3, 3]);
        let longer = [Message::system("s"), Message::user("Question 3?"), Message::assistant("a")];
        assert_eq!(fold_of(&longer, 5), 0);
        assert_eq!(opening_id(&longer), prompt_id(&question(3)));
    }

    #[test]
    fn a_split_of_a_small_set_is_not_empty() {
        use Split::{Test, Train, Validation};
        let filled = |splits: &[Split]| {
            let keyed = |(idx, split): (usize, &Split)| (format!("{idx}"), *split);
            let mut items: Vec<_> = splits.iter().enumerate().map(keyed).collect();
            let n_moved = fill_splits(&mut items);
            (items.into_iter().map(|(_, split)| split).collect::<Vec<_>>(), n_moved)
        };
        for n in 3..30 {
            let (splits, n_moved) = filled(&vec![Train; n]);
            assert_eq!(n_moved, 2, "{n}");
            for split in [Validation, Test] {
                assert_eq!(splits.iter().filter(|other| **other == split).count(), 1, "{n}");
            }
            // What was filled stays as it is.
            assert_eq!(filled(&splits), (splits, 0));
        }
        let (splits, _) = filled(&[Test; 5]);
        assert!([Train, Validation, Test].iter().all(|split| splits.contains(split)));
        assert_eq!(filled(&[Train, Validation, Test]).1, 0);
        assert_eq!(filled(&[Train]), (vec![Train], 0));
        let mut together: Vec<_> = ["a", "b", "c", "a", "b", "c"].map(|key| (key.to_owned(), Train)).into();
        assert_eq!(fill_splits(&mut together), 4);
        assert_eq!(together[..3], together[3..]);
        assert_eq!(fill_splits(&mut []), 0);
    }

    #[test]
    fn contexts_that_share_an_opener_share_their_split() {
        let longer = [
            Message::system("Be brief."),
            Message::user(" Question 3?\r\n"),
            Message::assistant("Yes."),
            Message::user("Question 0?"),
        ];
        assert_eq!(split_of(&longer), Split::Test);
    }
}
