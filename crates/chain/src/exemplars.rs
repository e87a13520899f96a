//! Exemplary replies to every turn of the chain, of our own writing, some beside a worse one. Each row serves one
//! use only: what trains a model never examines a judge.

use std::collections::BTreeMap;
use std::path::Path;

use arete_records::{Aspect, At, Error, Message, files, normalise, prompt_id, split_of};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::constitution::{Turns, listed};
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

/// The replies of a chain by the names of its turns; later ones may be missing.
///
/// The answer may always be called `action`, whatever the constitution calls its first turn, so that exemplars serve
/// constitutions of other turns as far as they need answers alone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Replies(BTreeMap<String, String>);

impl Replies {
    /// Of the keys of a record that name turns.
    fn of(record: &Map<String, Value>, turns: &Turns) -> Result<Self, FieldError> {
        let mut replies = BTreeMap::new();
        for name in turns.names().iter().chain([&Aspect::ACTION]).map(|aspect| aspect.name()) {
            match record.get(name) {
                None | Some(Value::Null) => {}
                Some(Value::String(text)) => {
                    replies.insert(name.to_owned(), text.clone());
                }
                Some(other) => return Err(FieldError::new(name, "a text", other)),
            }
        }
        Ok(Self(replies))
    }

    /// The reply of the turn at `place`, trimmed; none if it is missing or empty.
    pub fn at(&self, turns: &Turns, place: usize) -> Option<&str> {
        let name = turns.iter().nth(place)?.name;
        let own = self.0.get(name.name());
        let text = own.or_else(|| self.0.get(Aspect::ACTION.name()).filter(|_| place == 0))?;
        Some(text.trim()).filter(|text| !text.is_empty())
    }

    /// The replies through the turn at `place`; none if one of them is missing.
    pub fn through(&self, turns: &Turns, place: usize) -> Option<Vec<&str>> {
        (0..=place).map(|place| self.at(turns, place)).collect()
    }

    /// The answer; empty if it is missing.
    pub fn answer(&self, turns: &Turns) -> &str {
        self.at(turns, 0).unwrap_or("")
    }
}

/// A row of the exemplars file.
#[derive(Debug, Clone)]
pub struct Exemplar {
    /// The question.
    pub prompt: String,
    /// The reply of every turn it has one of: of the answer at least, of every turn if it is to be imitated.
    pub replies: Replies,
    /// What the row may be used for.
    pub r#use: Use,
    /// A worse chain to compare with.
    pub worse: Option<Replies>,
}

impl Exemplar {
    /// The messages of the prompt.
    pub fn prompt_messages(&self) -> Vec<Message> {
        vec![Message::user(normalise(&self.prompt))]
    }

    /// The conversation of the chain, as far as it has replies.
    pub fn conversation(&self, turns: &Turns) -> Vec<Message> {
        let replies = (0..turns.len()).map_while(|place| self.replies.at(turns, place));
        turns.conversation(&self.prompt_messages(), &replies.collect::<Vec<_>>())
    }

    /// [`prompt_id`] of the prompt.
    pub fn prompt_id(&self) -> String {
        prompt_id(&self.prompt_messages())
    }

    /// [`split_of`] the prompt.
    pub fn split(&self) -> arete_records::Split {
        split_of(&self.prompt_messages())
    }

    /// Reads and checks one row; `turns` are the constitution's.
    ///
    /// # Errors
    ///
    /// [`FieldError`] for a missing or empty text, an unknown use, a worse chain with a turn that there is not.
    pub fn of_record(record: &Map<String, Value>, turns: &Turns) -> Result<Self, FieldError> {
        let wrong = |field: &'static str, expected: &str, got: &str| FieldError {
            field,
            expected: expected.to_owned(),
            got: got.to_owned(),
        };
        let prompt = match record.get("prompt") {
            Some(Value::String(prompt)) if !prompt.trim().is_empty() => prompt.clone(),
            Some(Value::String(_)) => return Err(wrong("prompt", "a text", "an empty one")),
            Some(other) => return Err(FieldError::new("prompt", "a text", other)),
            None => return Err(wrong("prompt", "a text", "none")),
        };
        let r#use = record.get("use").cloned().unwrap_or(Value::Null);
        let r#use: Use = serde_json::from_value(r#use.clone())
            .map_err(|_| FieldError::new("use", "sft, few_shot or calibration", &r#use))?;
        let replies = Replies::of(record, turns)?;
        for (place, turn) in turns.iter().enumerate() {
            let is_there = record.contains_key(turn.name.name());
            if (place == 0 || is_there) && replies.at(turns, place).is_none() {
                let got = if is_there { "an empty one" } else { "none" };
                return Err(wrong(turn.name.name(), "a text", got));
            }
        }
        let worse = match record.get("worse") {
            None | Some(Value::Null) => None,
            Some(Value::Object(worse)) => {
                let worse_replies = Replies::of(worse, turns)?;
                if let Some(key) = worse.keys().find(|key| !worse_replies.0.contains_key(*key)) {
                    // The turns of another constitution are left out, as those of the better side are.
                    let is_turn = |key: &str| Aspect::new(key).is_ok() && record.contains_key(key);
                    if !is_turn(key) {
                        let expected = format!("replies of the turns {}", listed(&turns.names()));
                        return Err(wrong("worse", &expected, key));
                    }
                }
                if worse_replies.answer(turns).is_empty() {
                    return Err(wrong("worse", "an answer to compare with", "none"));
                }
                Some(worse_replies)
            }
            Some(other) => return Err(FieldError::new("worse", "a worse chain", other)),
        };
        Ok(Self { prompt, replies, r#use, worse })
    }
}

/// Reads the exemplars of one use, in the order of the file.
///
/// # Errors
///
/// An unreadable file, a row with a missing or empty text or an unknown use.
pub fn load(path: &Path, wanted: Use, turns: &Turns) -> Result<Vec<Exemplar>, Error> {
    let path = &files::shipped(path);
    let mut out = Vec::new();
    for (line, record) in pairs::records(path)? {
        let exemplar =
            Exemplar::of_record(&record, turns).map_err(|e| e.at(path, At::Line(line)))?;
        if exemplar.r#use != wanted {
            continue;
        }
        let missing =
            turns.iter().enumerate().find(|(at, _)| exemplar.replies.at(turns, *at).is_none());
        if let (Use::Sft, Some((_, turn))) = (wanted, missing) {
            return Err(FieldError {
                field: turn.name.name(),
                expected: "a text: what is imitated has a reply to every turn of the constitution \
                           (demonstrations need no exemplars with source = \"self\")"
                    .to_owned(),
                got: "none".to_owned(),
            }
            .at(path, At::Line(line))
            .into());
        }
        out.push(exemplar);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turns() -> Turns {
        Turns::default()
    }

    const EXAMPLE: &str = include_str!("../../../tests/fixtures/exemplars.jsonl");

    #[test]
    fn rows_serve_one_use_and_make_three_turns() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("exemplars.jsonl");
        fs_err::write(&path, EXAMPLE).unwrap();
        assert_eq!(load(&path, Use::FewShot, &turns()).unwrap().len(), 2);
        assert_eq!(load(&path, Use::Calibration, &turns()).unwrap().len(), 1);
        let sft = load(&path, Use::Sft, &turns()).unwrap();
        assert_eq!(
            sft[0].conversation(&turns()),
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
    fn exemplars_of_other_turns_have_an_answer_at_least() {
        let dir = tempfile::tempdir().unwrap();
        let constitution = dir.path().join("constitution.toml");
        let text = "[[turn]]\nname = \"deed\"\n[[turn]]\nname = \"why\"\nquestion = \"Why?\"\n\
                    [virtues]\nren = \"Which is kinder?\"";
        fs_err::write(&constitution, text).unwrap();
        let turns = crate::Constitution::load(&constitution).unwrap().turns;
        let path = dir.path().join("exemplars.jsonl");
        // Ours name the answer `action` and have no `why`: they show answers, and cannot be imitated.
        fs_err::write(&path, EXAMPLE).unwrap();
        let shots = load(&path, Use::FewShot, &turns).unwrap();
        assert_eq!(shots[0].replies.answer(&turns), "Please don't.");
        assert_eq!(shots[0].worse.as_ref().unwrap().answer(&turns), "Take it and run.");
        let error = load(&path, Use::Sft, &turns).unwrap_err().to_string();
        assert!(error.contains("exemplars.jsonl:1: why: expected a text"), "{error}");
        let own = r#"{"prompt": "p", "deed": " Wait. ", "why": "It is right.", "use": "sft"}"#;
        fs_err::write(&path, own).unwrap();
        let own = load(&path, Use::Sft, &turns).unwrap();
        let expected = ["p", "Wait.", "Why?", "It is right."];
        let conversation = own[0].conversation(&turns);
        assert_eq!(conversation.iter().map(|m| m.content.as_str()).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn the_shipped_exemplars_load() {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/demonstrations/exemplars.jsonl");
        let n: [usize; 3] = [Use::Sft, Use::FewShot, Use::Calibration]
            .map(|wanted| load(&path, wanted, &turns()).unwrap().len());
        assert!(n[0] >= 100 && n[1] >= 4 && n[2] >= 20, "{n:?}");
        let pairs = load(&path, Use::Calibration, &turns()).unwrap();
        assert!(pairs.iter().all(|pair| pair.worse.is_some()));
    }

    #[test]
    fn a_row_without_a_text_is_refused_by_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("exemplars.jsonl");
        fs_err::write(&path, EXAMPLE.replace("\"Respect.\"", "\"\"")).unwrap();
        let error = load(&path, Use::Sft, &turns()).unwrap_err().to_string();
        assert!(error.contains("exemplars.jsonl:2") && error.contains("motivation"), "{error}");
    }
}
