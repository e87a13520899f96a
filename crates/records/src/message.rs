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
