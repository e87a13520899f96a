//! Labelled pairs of conversations: hh-rlhf's strings, or TRL's lists of messages.

use std::path::Path;

use anyhow::{Result, bail};
pub use arete_chain::pairs::LabelledPair;
use arete_records::Refusal;
use arete_records::table::Column;

/// Reads pairs ([`arete_chain::pairs`]). Those of which a side does not end with a reply are left out, with a warning.
///
/// # Errors
///
/// A file's failure if the file cannot be read or a row is no such pair, A refused file if none is left.
pub fn read(path: &Path, columns: &[Column]) -> Result<Vec<LabelledPair>> {
    let mut pairs = arete_chain::pairs::read_file(path, columns)?.pairs;
    let n_rows = pairs.len();
    pairs.retain(LabelledPair::is_whole);
    if pairs.is_empty() {
        let found = format!("{n_rows} rows, none of them such a pair");
        bail!(Refusal::file(path, "rows", "pairs of conversations that end with a reply", found));
    }
    if pairs.len() < n_rows {
        let n_left_out = n_rows - pairs.len();
        tracing::warn!(n_left_out, "pairs left out: a side does not end with a reply");
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use arete_records::Message;

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
        let pairs = read(&path, &[]).unwrap();
        assert_eq!(pairs.len(), 2);
        assert_eq!((pairs[0].row, pairs[1].row), (1, 3));
        assert_eq!(pairs[0].chosen.messages, [Message::user("a\n\nb"), Message::assistant("good")]);
        assert_eq!((&pairs[0].chosen, &pairs[0].rejected), (&pairs[1].chosen, &pairs[1].rejected));
    }

    #[test]
    fn bad_rows_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs.jsonl");
        let message = |text: &str| {
            fs_err::write(&path, text).unwrap();
            read(&path, &[]).unwrap_err().to_string()
        };
        assert!(message(r#"{"chosen": "x"}"#).contains("row 1: rejected: expected columns"));
        assert!(message(r#"{"chosen": 5, "rejected": "y"}"#).contains("expected a text or a list"));
        assert!(message(r#"{"chosen": "x", "rejected": "y"}"#).contains("a column `prompt`"));
        let open = r#"{"prompt": "q", "chosen": "x", "rejected": ""}"#;
        assert!(message(open).contains("none of them such a pair"));
    }
}
