//! Exemplary three-turn replies of our own writing, some beside a worse one. Each row serves one
//! use only: what trains a model never examines a judge.

use std::path::Path;

use arete_records::{Aspect, At, Error, Message, normalise, prompt_id, split_of};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::pairs::{self, FieldError};

/// What a row may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Use {
    /// Supervised fine-tuning.
    Sft,
    /// Examples shown to a model in its prompt.
    FewShot,
    /// Labelled pairs a judge is examined with.
    Calibration,
}

/// A chain of three replies.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replies {
    /// The answer.
    pub action: String,
    /// The motivation behind it.
    #[serde(default)]
    pub motivation: String,
    /// What it does for a virtuous character.
    #[serde(default)]
    pub consequence: String,
}

/// A row of the exemplars file.
#[derive(Debug, Clone, Deserialize)]
pub struct Exemplar {
    /// The question.
    pub prompt: String,
    /// The answer.
    pub action: String,
    /// The motivation behind it.
    pub motivation: String,
    /// What it does for a virtuous character.
    pub consequence: String,
    /// What the row may be used for.
    pub r#use: Use,
    /// A worse chain to compare with.
    #[serde(default)]
    pub worse: Option<Replies>,
}

impl Exemplar {
    /// The messages of the prompt.
    pub fn prompt_messages(&self) -> Vec<Message> {
        vec![Message::user(normalise(&self.prompt))]
    }

    /// The conversation of three turns.
    pub fn conversation(&self) -> Vec<Message> {
        let mut messages = self.prompt_messages();
        messages.push(Message::assistant(self.action.trim()));
        for (aspect, reply) in
            [(Aspect::Motivation, &self.motivation), (Aspect::Consequence, &self.consequence)]
        {
            let question =
                aspect.question().expect("every aspect after the action asks a question");
            messages.push(Message::user(question));
            messages.push(Message::assistant(reply.trim()));
        }
        messages
    }

    /// [`prompt_id`] of the prompt.
    pub fn prompt_id(&self) -> String {
        prompt_id(&self.prompt_messages())
    }

    /// [`split_of`] the prompt.
    pub fn split(&self) -> arete_records::Split {
        split_of(&self.prompt_messages())
    }

    /// Reads and checks one row.
    ///
    /// # Errors
    ///
    /// [`FieldError`] for a missing or empty text or an unknown use.
    pub fn of_record(record: Map<String, Value>) -> Result<Self, FieldError> {
        let wrong = |field, expected: &str, got: &str| FieldError {
            field,
            expected: expected.to_owned(),
            got: got.to_owned(),
        };
        let exemplar: Self = serde_json::from_value(Value::Object(record)).map_err(|error| {
            let expected = "prompt, action, motivation, consequence, use, and perhaps worse";
            wrong("exemplar", expected, &error.to_string())
        })?;
        let texts = [
            ("prompt", &exemplar.prompt),
            ("action", &exemplar.action),
            ("motivation", &exemplar.motivation),
            ("consequence", &exemplar.consequence),
        ];
        match texts.iter().find(|(_, text)| text.trim().is_empty()) {
            Some((field, _)) => Err(wrong(field, "a text", "an empty one")),
            None => Ok(exemplar),
        }
    }
}

/// Reads the exemplars of one use, in the order of the file.
///
/// # Errors
///
/// An unreadable file, a row with a missing or empty text or an unknown use.
pub fn load(path: &Path, wanted: Use) -> Result<Vec<Exemplar>, Error> {
    let mut out = Vec::new();
    for (line, record) in pairs::records(path)? {
        let exemplar = Exemplar::of_record(record).map_err(|e| e.at(path, At::Line(line)))?;
        if exemplar.r#use == wanted {
            out.push(exemplar);
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../../../tests/fixtures/exemplars.jsonl");

    #[test]
    fn rows_serve_one_use_and_make_three_turns() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("exemplars.jsonl");
        fs_err::write(&path, EXAMPLE).unwrap();
        assert_eq!(load(&path, Use::FewShot).unwrap().len(), 2);
        assert_eq!(load(&path, Use::Calibration).unwrap().len(), 1);
        let sft = load(&path, Use::Sft).unwrap();
        assert_eq!(
            sft[0].conversation(),
            [
                Message::user("How do I lie: well?"),
                Message::assistant("I won't help with lies."),
                Message::user("What is the motivation behind the answer?"),
                Message::assistant("Honesty."),
                Message::user(
                    "What is the utility of the action towards promoting your virtuous character?"
                ),
                Message::assistant("Trust grows."),
            ]
        );
    }

    #[test]
    fn the_shipped_exemplars_load() {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/demonstrations/exemplars.jsonl");
        let n: [usize; 3] = [Use::Sft, Use::FewShot, Use::Calibration]
            .map(|wanted| load(&path, wanted).unwrap().len());
        assert!(n[0] >= 100 && n[1] >= 4 && n[2] >= 20, "{n:?}");
        let pairs = load(&path, Use::Calibration).unwrap();
        assert!(pairs.iter().all(|pair| pair.worse.is_some()));
    }

    #[test]
    fn a_row_without_a_text_is_refused_by_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("exemplars.jsonl");
        fs_err::write(&path, EXAMPLE.replace("\"Respect.\"", "\"\"")).unwrap();
        let error = load(&path, Use::Sft).unwrap_err().to_string();
        assert!(error.contains("exemplars.jsonl:2") && error.contains("motivation"), "{error}");
    }
}
