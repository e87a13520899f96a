//! Labelled pairs of conversations: hh-rlhf's strings, or TRL's lists of messages.

use std::path::Path;

use arete_records::{Message, Role, jsonl, parquet};
use serde_json::{Map, Value};

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
    let is_parquet = path.extension().is_some_and(|extension| extension == "parquet");
    let rows: Vec<(usize, Value)> = if is_parquet {
        (1..).zip(parquet::read_json(path)?.into_iter().map(Value::Object)).collect()
    } else {
        jsonl::read(path)?
    };
    let n_rows = rows.len();
    let mut pairs = Vec::new();
    for (row, value) in rows {
        let Value::Object(object) = value else {
            return Err(wrong(path, row, "the line", "an object", &value));
        };
        let [chosen, rejected] =
            [side(path, row, &object, "chosen")?, side(path, row, &object, "rejected")?];
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

fn side(
    path: &Path,
    row: usize,
    object: &Map<String, Value>,
    field: &str,
) -> Result<Vec<Message>, Error> {
    let mut messages = match object.get("prompt") {
        None | Some(Value::Null) => Vec::new(),
        Some(prompt) => messages(path, row, "prompt", prompt, Role::User)?,
    };
    match object.get(field) {
        Some(value) => messages.extend(self::messages(path, row, field, value, Role::Assistant)?),
        None => {
            let names: Vec<&str> = object.keys().map(String::as_str).collect();
            return Err(wrong(path, row, field, "a column of that name", &names.join(", ").into()));
        }
    }
    Ok(messages)
}

/// A list of messages, a dialogue, or a text that `role` says.
fn messages(
    path: &Path,
    row: usize,
    field: &str,
    value: &Value,
    role: Role,
) -> Result<Vec<Message>, Error> {
    match value {
        Value::String(text) => Ok(dialogue(text)
            .unwrap_or_else(|| vec![Message { role, content: text.trim().to_owned() }])),
        list => serde_json::from_value(list.clone())
            .map_err(|_| wrong(path, row, field, "a text or a list of {role, content}", value)),
    }
}

/// The turns of "\n\nHuman: …\n\nAssistant: …"; none if the text does not begin so.
fn dialogue(text: &str) -> Option<Vec<Message>> {
    const MARKS: [(&str, Role); 2] = [("Human:", Role::User), ("Assistant:", Role::Assistant)];
    let mut turns: Vec<Message> = Vec::new();
    for part in format!("\n\n{}", text.trim_start()).split("\n\n").skip(1) {
        let opened = MARKS.iter().find_map(|(mark, role)| Some((part.strip_prefix(mark)?, *role)));
        match (opened, turns.last_mut()) {
            (Some((content, role)), _) => turns.push(Message { role, content: content.to_owned() }),
            (None, Some(turn)) => turn.content.extend(["\n\n", part]),
            (None, None) => return None,
        }
    }
    for turn in &mut turns {
        turn.content = turn.content.trim().to_owned();
    }
    Some(turns)
}

fn wrong(path: &Path, row: usize, field: &str, expected: &str, found: &Value) -> Error {
    const MOST: usize = 200;
    let mut found = found.to_string();
    if found.chars().count() > MOST {
        found = found.chars().take(MOST).collect::<String>() + "…";
    }
    Error::File {
        path: path.to_owned(),
        field: format!("row {row}: {field}"),
        expected: expected.to_owned(),
        found,
    }
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
        assert!(message(r#"{"chosen": "x"}"#).contains("row 1: rejected: expected a column"));
        assert!(message(r#"{"chosen": 5, "rejected": "y"}"#).contains("expected a text or a list"));
        assert!(
            message(r#"{"chosen": "x", "rejected": "y"}"#).contains("none of them such a pair")
        );
    }
}
