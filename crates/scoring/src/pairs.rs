//! Labelled pairs of conversations: hh-rlhf's strings, or TRL's lists of messages.

use std::path::Path;

use arete_records::{Message, Role, dialogue};

use crate::Error;

/// A pair whose better side is known; both end with the assistant's reply.
#[derive(Clone, Debug, PartialEq)]
pub struct LabelledPair {
    /// Row or line in its file, from 1.
    pub row: usize,
    /// The better conversation.
    pub chosen: Vec<Message>,
    /// The worse one.
    pub rejected: Vec<Message>,
}

/// Reads pairs from JSON lines (`.gz` too) or Parquet with `chosen`, `rejected` and optionally `prompt`: texts of the form
/// "\n\nHuman: …\n\nAssistant: …", or lists of messages. Pairs of which a side does not end with a reply are
/// left out, with a warning.
///
/// # Errors
///
/// [`Error::Records`] if the file cannot be read, [`Error::File`] if a row is no such pair or none is left.
pub fn read(path: &Path) -> Result<Vec<LabelledPair>, Error> {
    let rows = dialogue::objects(path)?;
    let n_rows = rows.len();
    let mut pairs = Vec::new();
    for (row, object) in rows {
        let [chosen, rejected] = dialogue::pair(&object).map_err(|error| Error::File {
            path: path.to_owned(),
            field: format!("row {row}: {}", error.field),
            expected: error.expected,
            found: error.got,
        })?;
        let ends = |side: &[Message]| matches!(side, [_, .., last] if last.role == Role::Assistant && !last.content.trim().is_empty());
        if ends(&chosen) && ends(&rejected) {
            pairs.push(LabelledPair { row, chosen, rejected });
        }
    }
    if pairs.is_empty() {
        let found = format!("{n_rows} rows, none of them such a pair");
        return Err(Error::File {
            path: path.to_owned(),
            field: "rows".to_owned(),
            expected: "pairs of conversations that end with a reply".to_owned(),
            found,
        });
    }
    if pairs.len() < n_rows {
        let n_left_out = n_rows - pairs.len();
        tracing::warn!(n_left_out, "pairs left out: a side does not end with a reply");
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dialogues_and_lists_become_the_same_messages() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs.jsonl");
        let lines = [
            r#"{"chosen": "\n\nHuman: a\n\nb\n\nAssistant: good", "rejected": "\n\nHuman: a\n\nb\n\nAssistant: bad"}"#,
            r#"{"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: bad"}"#,
            r#"{"prompt": [{"role": "user", "content": "a\n\nb"}], "chosen": [{"role": "assistant", "content": "good"}], "rejected": "bad"}"#,
        ];
        fs_err::write(&path, lines.join("\n")).unwrap();
        let pairs = read(&path).unwrap();
        assert_eq!(pairs.len(), 2);
        assert_eq!((pairs[0].row, pairs[1].row), (1, 3));
        assert_eq!(pairs[0].chosen, [Message::user("a\n\nb"), Message::assistant("good")]);
        assert_eq!((&pairs[0].chosen, &pairs[0].rejected), (&pairs[1].chosen, &pairs[1].rejected));
    }

    #[test]
    fn bad_rows_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs.jsonl");
        let message = |text: &str| {
            fs_err::write(&path, text).unwrap();
            read(&path).unwrap_err().to_string()
        };
        assert!(message(r#"{"chosen": "x"}"#).contains("row 1: rejected: expected columns"));
        assert!(message(r#"{"chosen": 5, "rejected": "y"}"#).contains("expected a text or a list"));
        assert!(
            message(r#"{"chosen": "x", "rejected": "y"}"#).contains("none of them such a pair")
        );
    }
}
