//! Labelled pairs: two conversations of which one is known to be better. One reader for the layouts they come in.
//!
//! | columns | layout of |
//! |---|---|
//! | `chosen`, `rejected`: whole conversations, as text or as lists of messages | hh-rlhf, TRL |
//! | `prompt`, and `chosen`, `rejected` that follow it | TRL's explicit prompts, full-hh-rlhf, rm-static, our own preferences |
//! | `prompt`, and `chosen`, `rejected` that begin with it | ultrafeedback_binarized |
//! | `instruction` (with `input`, `history`, `system`) or `conversations`, and `chosen`, `rejected` | Alpaca, ShareGPT |
//! | `instruction`, `completions` with `overall_score` | UltraFeedback: the highest and the lowest |
//! | `prompt`, `answers` with `rank` | Nectar: the first and the last |
//! | `prompt`, `response_0`, `response_1`, `better_response_id` | PKU-SafeRLHF |
//! | `prompt` or `context`, two responses, `preference_strength` or `overall_preference` | HelpSteer2, HelpSteer3 |
//! | `prompt`, `response`, `helpfulness`, a row a reply | HelpSteer: of each prompt the most and the least helpful |
//! | `message_id`, `parent_id`, `role`, `text`, `rank`; or whole trees | OpenAssistant: the first and the last reply to a message |
//! | `text_correct`, `text_incorrect` | hh-rlhf's cousins of BIG-bench (HHH) |
//! | `prompt` with the options (A) and (B), `corrects` | BIG-bench's choices between two (HarmfulVsEthical) |
//! | `question`, `turn`, `context`, `virtue`, `better`, `worse` | our pairs that differ in one virtue (`data/virtues`) |
//! | `prompt`, `action`, …, `worse`, `use` | our exemplars, those of use `calibration` |
//!
//! A `system` text leads a prompt that has none of its own. Columns under other names are given ours
//! ([`arete_records::table::Column`]); a pair without what its sides reply to is refused by name.

mod fields;
mod layouts;
mod whole;

use std::fmt;
use std::path::Path;

use arete_records::jsonl::NumberedObject;
use arete_records::left_out::{self, LeftOut};
use arete_records::rows::PreferenceRow;
use arete_records::table::{self, Column, Unreadable};
use arete_records::{
    Aspect, At, Error, FinishReason, Message, Refusal, Role, Split, Virtue, normalise, parquet,
};
use serde_json::{Map, Value};

use crate::Transcript;
use crate::constitution::{Turns, listed};
use crate::exemplars::{Exemplar, Use};

pub use self::fields::{FieldError, following, lead, messages, present, prompt, question};
use self::fields::{context, last_question};
pub use self::whole::{read_pairs, splits_of_pairs};
pub use arete_records::table::shortened;

/// What is expected of a side that says nothing of what it replies to.
const WHOLE: &str =
    "a whole conversation, or a column `prompt` with what it replies to (--column prompt=NAME)";

/// A conversation to score.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Conversation {
    /// Every turn; the last is the assistant's.
    pub messages: Vec<Message>,
    /// The last reply was cut off: it is rendered without the end of turn.
    pub truncated: bool,
}

impl Conversation {
    /// What a reward model is shown of it.
    pub fn transcript(&self) -> Transcript<'_> {
        let reason = if self.truncated { FinishReason::Length } else { FinishReason::Stop };
        Transcript { messages: &self.messages, finish_reasons: vec![reason] }
    }

    /// Whether an assistant's turn that says something comes last.
    #[must_use]
    pub fn ends_with_reply(&self) -> bool {
        let last = self.messages.last();
        last.is_some_and(|last| last.role == Role::Assistant && !last.content.trim().is_empty())
    }
}

/// What a label speaks of, where its layout says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct About {
    /// The virtue that the better side shows more of.
    pub virtue: Virtue,
    /// The turn of the chain whose reply differs.
    pub aspect: Aspect,
}

/// Two conversations, the first preferred.
#[derive(Clone, Debug, PartialEq)]
pub struct LabelledPair {
    /// Row or line in its file, counted from 1.
    pub row: usize,
    /// The better side, from its first message on.
    pub chosen: Conversation,
    /// The worse side, from its first message on.
    pub rejected: Conversation,
    /// Probability that the chosen side is the better one.
    pub chosen_prob: f32,
    /// Votes for the chosen side less those for the rejected.
    pub vote_lead: i32,
    /// What the label speaks of; none if it is better altogether.
    pub about: Option<About>,
    /// The split that its record names.
    pub split: Option<Split>,
}

impl LabelledPair {
    /// Whether both sides end with a reply.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.chosen.ends_with_reply() && self.rejected.ends_with_reply()
    }
}

/// What two conversations share, and the rest of each.
pub type Parts = (Vec<Message>, Vec<Message>, Vec<Message>);

/// Cuts two conversations where they part; `None` unless a question comes before and replies after.
#[must_use]
pub fn part(better: &[Message], worse: &[Message]) -> Option<Parts> {
    let n = better.iter().zip(worse).take_while(|(a, b)| a == b).count();
    let usable = n > 0
        && better[n - 1].role == Role::User
        && [better, worse].iter().all(|side| {
            side.len() > n && side.last().is_some_and(|last| last.role == Role::Assistant)
        });
    usable.then(|| (better[..n].to_vec(), better[n..].to_vec(), worse[n..].to_vec()))
}

/// The pair in a record (of number `row`), in whichever layout of one record it comes; `None` if it is an exemplar of
/// another use, or prefers neither side.
///
/// Sides need not end with a reply ([`LabelledPair::is_whole`]).
///
/// # Errors
///
/// [`FieldError`] if a field is missing or holds no conversation, or if nothing says what the sides reply to.
pub fn of_record(
    row: usize,
    record: &Map<String, Value>,
) -> Result<Option<LabelledPair>, FieldError> {
    let has = |field: &str| present(record, field).is_some();
    let mut about = None;
    let [chosen, rejected] = if has("chosen") || has("rejected") {
        sides(record, "chosen", "rejected", true)?
    } else if has("chosen_response") && has("rejected_response") {
        sides(record, "chosen_response", "rejected_response", true)?
    } else if has("text_correct") && has("text_incorrect") {
        sides(record, "text_correct", "text_incorrect", false)?
    } else if has("corrects") {
        choice(record)?
    } else if has("better") {
        let (sides, own) = virtue_pair(record)?;
        about = Some(own);
        sides
    } else if let Some(sides) = layouts::sides(record) {
        match sides? {
            Some(sides) => sides,
            None => return Ok(None),
        }
    } else if has("use") {
        let turns = Turns::default();
        let exemplar = Exemplar::of_record(record, &turns)?;
        let Some(worse) = exemplar.worse.as_ref().filter(|_| exemplar.r#use == Use::Calibration)
        else {
            return Ok(None);
        };
        [&exemplar.replies, worse].map(|replies| {
            let mut messages = exemplar.prompt_messages();
            messages.push(Message::assistant(replies.answer(&turns)));
            messages
        })
    } else {
        let expected =
            "chosen and rejected, or the columns of another layout of pairs (docs/file-formats.md)";
        return Err(FieldError::columns("record", expected, record));
    };
    let side = |messages, truncated: &'static str| {
        let truncated = match record.get(truncated) {
            None | Some(Value::Null) => false,
            Some(Value::Bool(truncated)) => *truncated,
            Some(other) => return Err(FieldError::new(truncated, "true or false", other)),
        };
        Ok(Conversation { messages, truncated })
    };
    Ok(Some(LabelledPair {
        row,
        chosen: side(chosen, "truncated_chosen")?,
        rejected: side(rejected, "truncated_rejected")?,
        chosen_prob: chosen_prob(record)?,
        vote_lead: 0,
        about,
        split: named_split(record),
    }))
}

/// The split that a record names, by its own name or one that begins like it (`test_prefs`).
pub fn named_split(record: &Map<String, Value>) -> Option<Split> {
    let name = record.get("split")?.as_str()?.to_ascii_lowercase();
    let begins = |words: &[&str]| words.iter().any(|word| name.starts_with(word));
    if begins(&["train"]) {
        Some(Split::Train)
    } else if begins(&["val", "dev"]) {
        Some(Split::Validation)
    } else {
        begins(&["test", "eval"]).then_some(Split::Test)
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a probability")]
fn chosen_prob(record: &Map<String, Value>) -> Result<f32, FieldError> {
    let value = match record.get("chosen_prob") {
        None | Some(Value::Null) => return Ok(1.0),
        Some(value) => value,
    };
    let wrong = |expected: &str| FieldError::new("chosen_prob", expected, value);
    let chosen_prob = value.as_f64().ok_or_else(|| wrong("a number"))?;
    let is_probability = (0.0..=1.0).contains(&chosen_prob);
    is_probability.then_some(chosen_prob as f32).ok_or_else(|| wrong("a number within 0 to 1"))
}

/// Two conversations, each with the record's `prompt` before it unless it begins with one of its own.
fn sides(
    record: &Map<String, Value>,
    better: &'static str,
    worse: &'static str,
    after_prompt: bool,
) -> Result<[Vec<Message>; 2], FieldError> {
    let prompt = if after_prompt { question(record)?.unwrap_or_default() } else { Vec::new() };
    let is_missing = |field: &&str| present(record, field).is_none();
    if let Some(missing) = [better, worse].into_iter().find(is_missing) {
        let expected = format!("columns `{better}` and `{worse}`");
        return Err(FieldError::columns(missing, expected, record));
    }
    let side = |field: &'static str| {
        let mut own = following(field, &record[field], &prompt)?;
        let opens = own.first().is_some_and(|first| first.role != Role::Assistant);
        if prompt.is_empty() {
            if opens || !own.iter().all(|message| message.role == Role::Assistant) {
                lead(record, &mut own);
                return Ok(own);
            }
            return Err(FieldError::columns(field, WHOLE, record));
        }
        Ok(after(&prompt, own))
    };
    Ok([side(better)?, side(worse)?])
}

/// A prompt with what replies to it. What begins with the prompt, or opens with another turn than a reply where only a reply can
/// follow, is a whole conversation, and has of the prompt only a system text that it lacks.
#[must_use]
pub fn after(prompt: &[Message], own: Vec<Message>) -> Vec<Message> {
    let opens = own.first().is_some_and(|first| first.role != Role::Assistant);
    let follows_question = prompt.last().is_some_and(|last| last.role == Role::User);
    if begins_with(&own, prompt) {
        return own;
    }
    let n_led = if opens && follows_question {
        let has_system = own.iter().any(|message| message.role == Role::System);
        prompt.iter().take_while(|message| message.role == Role::System && !has_system).count()
    } else {
        prompt.len()
    };
    [&prompt[..n_led], &own].concat()
}

fn begins_with(messages: &[Message], prompt: &[Message]) -> bool {
    let same =
        |(a, b): (&Message, &Message)| a.role == b.role && a.content.trim() == b.content.trim();
    messages.len() >= prompt.len() && messages.iter().zip(prompt).all(same)
}

/// A pair that differs in one virtue: both sides reply to the last question of a chain whose earlier replies they share.
fn virtue_pair(record: &Map<String, Value>) -> Result<([Vec<Message>; 2], About), FieldError> {
    let text = |field: &'static str| match record.get(field) {
        Some(Value::String(text)) if !text.trim().is_empty() => Ok(text.trim()),
        Some(other) => Err(FieldError::new(field, "a text that is not empty", other)),
        None => Err(FieldError::columns(field, format!("a column `{field}`"), record)),
    };
    let turns = Turns::default();
    let name = text("turn")?;
    let turn = turns.iter().enumerate().find(|(_, turn)| turn.name.name() == name);
    let (place, turn) = turn.ok_or_else(|| {
        FieldError::new("turn", format!("one of {}", listed(&turns.names())), &record["turn"])
    })?;
    let virtue = Virtue::new(text("virtue")?)
        .map_err(|error| FieldError::new("virtue", error.to_string(), &record["virtue"]))?;
    let context = record.get("context").unwrap_or(&Value::Null);
    let replies: Option<Vec<&str>> = match context {
        Value::Null => Some(Vec::new()),
        Value::Array(replies) => replies.iter().map(Value::as_str).collect(),
        _ => None,
    };
    let replies = replies.filter(|replies| replies.len() == place).ok_or_else(|| {
        let expected = format!("a list of {place} replies, those before turn `{name}`");
        FieldError::new("context", expected, context)
    })?;
    let question = [Message::user(normalise(text("question")?))];
    let side = |field| {
        let replies = [replies.as_slice(), &[text(field)?]].concat();
        Ok(turns.conversation(&question, &replies))
    };
    Ok(([side("better")?, side("worse")?], About { virtue, aspect: turn.name }))
}

/// The two options of a question, the right one first.
fn choice(record: &Map<String, Value>) -> Result<[Vec<Message>; 2], FieldError> {
    let prompt = record.get("prompt").unwrap_or(&Value::Null);
    let text = prompt.as_str().ok_or_else(|| FieldError::new("prompt", "a text", prompt))?;
    let (question, options) = options_of(text).ok_or_else(|| {
        FieldError::new("prompt", "a question with the options (A) and (B)", prompt)
    })?;
    let better = match record["corrects"][0].as_str().map(str::trim) {
        Some("(A)") => 0,
        Some("(B)") => 1,
        _ => return Err(FieldError::new("corrects", "(A) or (B)", &record["corrects"])),
    };
    let side =
        |idx: usize| vec![Message::user(&*question), Message::assistant(options[idx].as_str())];
    Ok([side(better), side(1 - better)])
}

/// The question and the two options of "… (A) … (B) … The answer is:".
fn options_of(text: &str) -> Option<(String, [String; 2])> {
    // From the end: the conversation in question may list options of its own.
    let (rest, b) = text.rsplit_once("\n (B)")?;
    let (question, a) = rest.rsplit_once("\n (A)")?;
    if b.contains("\n (C)") {
        return None;
    }
    let b = b.rsplit_once("The answer is").map_or(b, |(b, _)| b);
    let clean = |text: &str| {
        text.trim().trim_start_matches("[[[").trim_end_matches("]]]").trim().to_owned()
    };
    Some((question.trim().to_owned(), [clean(a), clean(b)]))
}

/// The records of a file in any format ([`table::read`]), numbered from 1.
///
/// # Errors
///
/// Those of [`table::read`].
pub fn records(path: impl AsRef<Path>) -> Result<Vec<NumberedObject>, Error> {
    table::read(path)
}

/// The pairs of a file, and what is not among them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PairFile {
    /// The pairs, in the order of the file.
    pub pairs: Vec<LabelledPair>,
    /// Records read.
    pub n_records: usize,
    /// Records that cannot be used, with the reasons.
    pub left_out: Vec<LeftOut>,
}

/// Reads a file of pairs, in any of the layouts above. Records that cannot be used are left out, unless they are more than a
/// [share](left_out::is_share) of all.
///
/// # Errors
///
/// [`Error::Refused`] for the first record that cannot be used, if there are too many of them; as [`table::read_renamed`].
pub fn read_file(path: &Path, columns: &[Column]) -> Result<PairFile, Error> {
    let table = table::read_renamed(path, columns)?;
    let (n_records, records) = (table.n_rows(), table.records);
    let layouts::Found { pairs, mut wrong, even } = if layouts::are_trees(&records) {
        with_splits(layouts::trees(&records), &records)
    } else if layouts::are_rated(&records) {
        with_splits(layouts::rated(&records), &records)
    } else {
        let mut found = layouts::Found::default();
        for (row, record) in &records {
            match of_record(*row, record) {
                Ok(Some(pair)) => found.pairs.push(pair),
                // An exemplar of another use is no pair.
                Ok(None) if record.contains_key("use") => {}
                Ok(None) => found.even.push(*row),
                Err(error) => found.wrong.push((*row, error)),
            }
        }
        found
    };
    wrong.extend(unreadable(table.unreadable));
    let mut left_out = leave_out(path, wrong, n_records)?;
    if !even.is_empty() {
        tracing::info!(file = %path.display(), records = even.len(), "records that prefer neither side are left out");
    }
    left_out.extend(even.into_iter().map(|row| of_row(path, row, "prefers neither side")));
    Ok(PairFile { pairs, n_records, left_out })
}

/// Pairs that several records make have the split that the record of their row names.
fn with_splits(mut found: layouts::Found, records: &[NumberedObject]) -> layouts::Found {
    for pair in &mut found.pairs {
        let at = records.binary_search_by_key(&pair.row, |(row, _)| *row);
        pair.split = at.ok().and_then(|at| named_split(&records[at].1));
    }
    found
}

/// How many human pairs a weight allows beside so many judged ones.
#[must_use]
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a number of pairs"
)]
pub fn beside(n_judged: usize, weight: f64) -> usize {
    (weight * n_judged as f64).round() as usize
}

/// A row of a file that is left out, and why.
#[must_use]
pub fn of_row(path: &Path, row: usize, reason: impl fmt::Display) -> LeftOut {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    LeftOut::new(format!("{name}:{row}"), reason)
}

/// Lines of a file that hold no record, as records that cannot be used.
pub fn unreadable(lines: Vec<(usize, Unreadable)>) -> impl Iterator<Item = (usize, FieldError)> {
    lines.into_iter().map(|(line, unreadable)| (line, FieldError::unreadable(unreadable)))
}

/// Records of a file that cannot be used, as items left out.
///
/// # Errors
///
/// [`Error::Refused`] for the first of them, if they are more than a share of all `n_records`.
pub fn leave_out(
    path: &Path,
    mut wrong: Vec<(usize, FieldError)>,
    n_records: usize,
) -> Result<Vec<LeftOut>, Error> {
    wrong.sort_by_key(|(row, _)| *row);
    let n_wrong = wrong.len();
    if !left_out::is_share(n_wrong, n_records) {
        let (row, error) = wrong.into_iter().next().expect("more than none");
        let FieldError { field, expected, got } = error;
        let got = match n_wrong {
            1 => got,
            _ => format!("{got} ({n_wrong} of {n_records} records cannot be used)"),
        };
        return Err(Refusal::at(path, At::Row(row), field, expected, got).into());
    }
    Ok(wrong
        .into_iter()
        .map(|(row, error)| {
            let reason = error.to_string();
            let FieldError { field, expected, got } = error;
            tracing::warn!(file = %path.display(), row, field, expected, got, "record left out");
            of_row(path, row, &reason)
        })
        .collect())
}

/// [`read_file`], the pairs alone.
///
/// # Errors
///
/// As [`read_file`].
pub fn read(path: &Path) -> Result<Vec<LabelledPair>, Error> {
    Ok(read_file(path, &[])?.pairs)
}

/// The question that a record of prompts asks, with the conversation around it, in whichever layout it comes; `None` of a
/// record that asks nothing (a reply in a tree of messages).
///
/// # Errors
///
/// [`FieldError`] if no field is one of a prompt, or one holds no conversation.
pub fn conversation_of(record: &Map<String, Value>) -> Result<Option<Vec<Message>>, FieldError> {
    let present = |field: &str| present(record, field);
    if let Some(text) = layouts::opening(record) {
        return Ok(Some(vec![Message::user(text)]));
    }
    if record.contains_key("message_id") && record.contains_key("parent_id") {
        return Ok(None);
    }
    if let Some(context) = context(record) {
        return prompt("context", context).map(Some);
    }
    if let Some(question) = question(record)? {
        return Ok(Some(around(record, &question).unwrap_or(question)));
    }
    if let Some(value) = present("chosen") {
        let mut own = messages("chosen", value, Role::Assistant)?;
        if own.iter().all(|message| message.role == Role::Assistant) {
            return Err(FieldError::columns("chosen", WHOLE, record));
        }
        lead(record, &mut own);
        return Ok(Some(own));
    }
    for field in ["messages", "conversation", "text"] {
        if let Some(value) = present(field) {
            let mut own = messages(field, value, Role::User)?;
            lead(record, &mut own);
            return Ok(Some(own));
        }
    }
    let expected = "one of the columns prompt, messages, conversations, conversation, instruction, chosen, text, or another that is named \
                    (--column prompt=NAME)";
    Err(FieldError::columns("record", expected, record))
}

/// The conversation of a record that asks `question` in it: its list of messages, or one of its sides where that is whole.
fn around(record: &Map<String, Value>, question: &[Message]) -> Option<Vec<Message>> {
    let asked = last_question(question)?;
    ["messages", "chosen"].into_iter().find_map(|field| {
        let list = present(record, field).filter(|value| value.is_array())?;
        let mut own = messages(field, list, Role::Assistant).ok()?;
        let asks =
            |message: &Message| message.role == Role::User && message.content.trim() == asked;
        let is_around = own.iter().any(asks);
        lead(record, &mut own);
        is_around.then_some(own)
    })
}

/// Reads our own `preferences/<aspect>/<split>.parquet`.
///
/// # Errors
///
/// [`Error::Refused`] if a probability or a side cannot be; what the file's reader says.
pub fn read_preferences(path: &Path) -> Result<Vec<LabelledPair>, Error> {
    let rows: Vec<PreferenceRow> = parquet::read(path)?;
    let mut pairs = Vec::with_capacity(rows.len());
    for (row, preference) in (1..).zip(rows) {
        let refuse =
            |field, expected: &str, got| Refusal::at(path, At::Row(row), field, expected, got);
        if !(0.0..=1.0).contains(&preference.chosen_prob) {
            let got = preference.chosen_prob.to_string();
            return Err(refuse("chosen_prob", "a number within 0 to 1", got).into());
        }
        let side = |field, own: &[Message], truncated| {
            let messages = [preference.prompt.as_slice(), own].concat();
            if messages.last().is_none_or(|last| last.role != Role::Assistant) {
                let roles: Vec<&str> = messages.iter().map(|m| m.role.name()).collect();
                let expected = "a conversation that ends with the assistant's reply";
                return Err(refuse(field, expected, roles.join(", ")));
            }
            Ok(Conversation { messages, truncated })
        };
        pairs.push(LabelledPair {
            row,
            chosen: side("chosen", &preference.chosen, preference.truncated_chosen)?,
            rejected: side("rejected", &preference.rejected, preference.truncated_rejected)?,
            chosen_prob: preference.chosen_prob,
            vote_lead: preference.score_chosen - preference.score_rejected,
            about: None,
            split: None,
        });
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(text: &str) -> Map<String, Value> {
        serde_json::from_str(text).unwrap()
    }

    fn pair(text: &str) -> [Vec<Message>; 2] {
        let pair = of_record(1, &record(text)).unwrap().unwrap();
        [pair.chosen.messages, pair.rejected.messages]
    }

    fn refused(text: &str) -> FieldError {
        of_record(1, &record(text)).unwrap_err()
    }

    fn conversations(question: &str, better: &str, worse: &str) -> [Vec<Message>; 2] {
        [better, worse].map(|reply| vec![Message::user(question), Message::assistant(reply)])
    }

    #[test]
    fn texts_lists_and_replies_after_a_prompt_are_the_same_pair() {
        for text in [
            r#"{"chosen": "\n\nHuman: a\n\nb\n\nAssistant: good", "rejected": "\n\nHuman: a\n\nb\n\nAssistant:"}"#,
            r#"{"prompt": "a\n\nb", "chosen": "good", "rejected": ""}"#,
            r#"{"prompt": null, "chosen": "\n\nHuman: a\n\nb\n\nAssistant: good", "rejected": "\n\nHuman: a\n\nb\n\nAssistant:"}"#,
            r#"{"prompt": [{"role": "user", "content": "a\n\nb"}], "chosen": [{"role": "assistant", "content": "good"}], "rejected": ""}"#,
        ] {
            assert_eq!(pair(text), conversations("a\n\nb", "good", ""), "{text}");
        }
        let error = refused(r#"{"chosen": "x"}"#);
        assert_eq!((error.field, error.got.as_str()), ("rejected", "chosen"));
        let error = refused(r#"{"chosen": 5, "rejected": "x"}"#);
        assert!(error.expected.starts_with("a text or a list of {role, content}"), "{error:?}");
    }

    #[test]
    fn nulls_of_other_layouts_and_whole_floats_change_nothing() {
        let pku = r#"{"chosen": null, "prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1.0}"#;
        assert_eq!(pair(pku), conversations("q", "b", "a"));
        let messages = r#"{"chosen": [{"role": null, "from": "human", "content": null, "value": "q"}, {"role": "assistant", "content": "a"}],
            "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}], "answers": null}"#;
        assert_eq!(pair(messages), conversations("q", "a", "b"));
        let error = refused(
            r#"{"prompt": "q", "chosen": "a", "rejected": "b", "truncated_chosen": "yes"}"#,
        );
        assert_eq!((error.field, &*error.got), ("truncated_chosen", "yes"));
    }

    /// Our own export writes a system text so.
    #[test]
    fn a_system_text_leads_wherever_it_stands() {
        let [better, worse] = conversations("q", "a", "b").map(|mut side| {
            side.insert(0, Message::system("Be kind."));
            side
        });
        let side = |messages: &[Message]| crate::dialogue::format(messages);
        let text =
            serde_json::json!({"chosen": side(&better), "rejected": side(&worse)}).to_string();
        assert_eq!(pair(&text), [better.clone(), worse.clone()]);
        let column = r#"{"system": "Be kind.", "chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}"#;
        assert_eq!(pair(column), [better.clone(), worse]);
        let asked = conversation_of(&record(r#"{"prompt": "Be kind.\n\nHuman: q\n\nAssistant:"}"#));
        assert_eq!(asked.unwrap().unwrap(), better[..2]);
        // A question that quotes a conversation stays a question.
        let quoted = "Go on:\n\nHuman: q\n\nAssistant: a";
        let text = serde_json::json!({"prompt": quoted}).to_string();
        assert_eq!(conversation_of(&record(&text)).unwrap().unwrap(), [Message::user(quoted)]);
        // A list of passages is no conversation.
        let passages = r#"{"prompt": "q", "context": ["a passage", "another"]}"#;
        assert_eq!(conversation_of(&record(passages)).unwrap().unwrap(), [Message::user("q")]);
    }

    /// TRL's form with an explicit prompt: what a reply quotes is a part of it.
    #[test]
    fn a_reply_that_quotes_a_conversation_stays_a_reply() {
        for quoted in
            ["Sure! Here is one:\n\nHuman: Hi\n\nAssistant: Hello", "Human: Hi\n\nAssistant: Hello"]
        {
            let text = serde_json::json!({"prompt": "Write a dialogue.", "chosen": quoted, "rejected": "No."});
            assert_eq!(pair(&text.to_string()), conversations("Write a dialogue.", quoted, "No."));
        }
        let repeats = "Human: q\n\nAssistant: a";
        let text = serde_json::json!({"prompt": "q", "chosen": repeats, "rejected": "b"});
        assert_eq!(pair(&text.to_string()), conversations("q", "a", "b"));
    }

    #[test]
    fn public_layouts_keep_what_is_asked_about() {
        let of = |text: &str| conversation_of(&record(text)).map(Option::unwrap);
        let dolly = r#"{"instruction": "When?", "context": "In 2000.", "response": "2000"}"#;
        assert_eq!(of(dolly).unwrap(), [Message::user("When?\nIn 2000.")]);
        let orca = r#"{"system_prompt": "Be brief.", "prompt": "Why?", "response": "So."}"#;
        assert_eq!(of(orca).unwrap(), [Message::system("Be brief."), Message::user("Why?")]);
        let turns = r#"[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]"#;
        let all = [Message::user("q"), Message::assistant("a"), Message::user("r")];
        // UltraChat, Tulu, lmsys-chat; and a list that a table of texts keeps as text.
        for text in [
            format!(r#"{{"prompt": "q", "messages": {turns}}}"#),
            format!(r#"{{"prompt": "r", "chosen": {turns}}}"#),
            format!(r#"{{"conversation": {turns}}}"#),
            format!(r#"{{"messages": {}}}"#, Value::from(turns)),
        ] {
            assert_eq!(of(&text).unwrap(), all, "{text}");
        }
        let error = of(r#"{"messages": "[{'role': 'user', 'content': 'q'}]"}"#).unwrap_err();
        assert!(error.expected.contains("as JSON"), "{error}");
    }

    #[test]
    fn what_prefers_neither_side_is_named_and_a_split_that_is_named_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.jsonl");
        let row = |better: i64, split: &str| {
            let (q, a) = (format!("question {better}{split}"), "a");
            serde_json::json!({"prompt": q, "response_0": a, "response_1": "b", "better_response_id": better, "split": split})
        };
        let rows =
            [row(0, "test_prefs"), row(-1, "train"), row(1, "train")].map(|row| row.to_string());
        fs_err::write(&path, rows.join("\n")).unwrap();
        let (pairs, left_out) = read_pairs(&path, &[]).unwrap();
        assert_eq!(splits_of_pairs(&pairs), [Split::Test, Split::Train]);
        let rated = |text: &str, mark: i64| serde_json::json!({"prompt": "q", "response": text, "helpfulness": mark, "split": "Test"});
        let helpful = dir.path().join("helpsteer.jsonl");
        fs_err::write(&helpful, format!("{}\n{}\n", rated("a", 1), rated("b", 4))).unwrap();
        assert_eq!(read_pairs(&helpful, &[]).unwrap().0[0].split, Some(Split::Test));
        let left: Vec<(&str, &str)> = left_out.iter().map(|l| (&*l.item, &*l.reason)).collect();
        assert_eq!(left, [("x.jsonl:2", "prefers neither side")]);
    }

    /// The layout of HuggingFaceH4/ultrafeedback_binarized.
    #[test]
    fn whole_sides_are_not_put_after_their_own_prompt() {
        let lists = r#"{"prompt": "Is it fair?",
            "chosen": [{"role": "user", "content": "Is it fair? "}, {"role": "assistant", "content": "Ask first."}],
            "rejected": [{"role": "user", "content": "Is it fair?"}, {"role": "assistant", "content": "Who cares."}]}"#;
        let [chosen, rejected] = pair(lists);
        assert_eq!((chosen.len(), rejected.len()), (2, 2));
        assert_eq!(rejected, conversations("Is it fair?", "", "Who cares.")[1]);
        let texts = r#"{"prompt": "Is it fair?", "chosen": "\n\nHuman: Is it fair?\n\nAssistant: Ask first.",
            "rejected": "\n\nHuman: Is it fair?\n\nAssistant: Who cares."}"#;
        assert_eq!(pair(texts), conversations("Is it fair?", "Ask first.", "Who cares."));
        // The prompt is the last question alone, the sides are whole: with a system's message, say.
        let system = r#"{"prompt": "Is it fair?",
            "chosen": [{"role": "system", "content": "s"}, {"role": "user", "content": "Is it fair?"}, {"role": "assistant", "content": "Ask."}],
            "rejected": "No."}"#;
        let [chosen, rejected] = pair(system);
        assert_eq!(chosen.len(), 3);
        assert_eq!(rejected, conversations("Is it fair?", "", "No.")[1]);
        // A system's text of the record leads whole sides, too.
        let led = lists.replacen('{', r#"{"system": "Be brief.", "#, 1);
        let [chosen, _] = pair(&led);
        assert_eq!(chosen[0], Message::system("Be brief."));
        assert_eq!(chosen[1..], conversations("Is it fair? ", "Ask first.", "")[0]);
        // After a reply a question may follow: such sides continue their prompt.
        let continued = r#"{"prompt": "\n\nHuman: a\n\nAssistant: b", "chosen": "\n\nHuman: c\n\nAssistant: d", "rejected": "\n\nHuman: c\n\nAssistant: e"}"#;
        assert_eq!(pair(continued).map(|side| side.len()), [4, 4]);
    }

    /// The layouts of Dahoas/full-hh-rlhf and Dahoas/rm-static.
    #[test]
    fn a_turn_opened_by_the_prompt_is_the_replys() {
        let one = r#"{"prompt": "\n\nHuman: Is it fair?\n\nAssistant:", "response": " Ask.", "chosen": " Ask.", "rejected": " Who cares."}"#;
        assert_eq!(pair(one), conversations("Is it fair?", "Ask.", "Who cares."));
        let more = r#"{"prompt": "\n\nHuman: Is it fair?\n\nAssistant: Why?\n\nHuman: I need it.\n\nAssistant:", "chosen": " Ask.", "rejected": " Who cares."}"#;
        let [chosen, _] = pair(more);
        let roles: Vec<Role> = chosen.iter().map(|message| message.role).collect();
        assert_eq!(roles, [Role::User, Role::Assistant, Role::User, Role::Assistant]);
        assert_eq!(chosen[3].content, "Ask.");
        let list = r#"{"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}], "chosen": "x", "rejected": "y"}"#;
        assert_eq!(pair(list), conversations("q", "x", "y"));
    }

    /// The layout of Intel/orca_dpo_pairs.
    #[test]
    fn replies_to_nothing_are_named_with_the_columns_there_are() {
        let orca = r#"{"system": "", "question": "Is it fair?", "chosen": "Ask.", "rejected": "Who cares."}"#;
        let error = refused(orca);
        assert_eq!(error.field, "chosen");
        assert_eq!(
            error.expected,
            "a whole conversation, or a column `prompt` with what it replies to (--column prompt=NAME)"
        );
        assert_eq!(error.got, "system, question, chosen, rejected");
        let list = r#"{"chosen": [{"role": "assistant", "content": "x"}], "rejected": "y"}"#;
        assert_eq!(refused(list).field, "chosen");
    }

    #[test]
    fn pairs_that_differ_in_a_virtue_continue_the_chain() {
        let action = r#"{"question": " q ", "turn": "action", "context": [], "virtue": "honesty", "better": "yes", "worse": "no", "vice": "excess", "split": "train"}"#;
        assert_eq!(pair(action), conversations("q", "yes", "no"));
        let consequence = r#"{"question": "q", "turn": "consequence", "context": ["a", "m"], "virtue": "humility", "better": "yes", "worse": "no"}"#;
        let found = of_record(1, &record(consequence)).unwrap().unwrap();
        let (virtue, aspect) = (Virtue::new("humility").unwrap(), Aspect::CONSEQUENCE);
        assert_eq!(found.about, Some(About { virtue, aspect }));
        let texts: Vec<&str> =
            found.rejected.messages.iter().map(|message| message.content.as_str()).collect();
        let asked = [
            "What is the motivation behind the answer?",
            "What is the utility of the action towards promoting your virtuous character?",
        ];
        assert_eq!(texts, ["q", "a", asked[0], "m", asked[1], "no"]);
        for (from, to, field) in [
            ("[\"a\", \"m\"]", "[\"a\"]", "context"),
            ("\"consequence\"", "\"end\"", "turn"),
            ("\"humility\"", "\"Humility!\"", "virtue"),
            ("\"no\"", "\" \"", "worse"),
            ("\"question\"", "\"text\"", "question"),
        ] {
            assert_eq!(refused(&consequence.replace(from, to)).field, field);
        }
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/virtues/pairs.jsonl");
        let pairs = read(&path).unwrap();
        assert_eq!(pairs.len(), 1675);
        assert!(pairs.iter().all(|pair| pair.is_whole() && pair.about.is_some()));
    }

    #[test]
    fn files_name_the_row_and_keep_its_number() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs.jsonl");
        let good = r#"{"prompt": "q", "chosen": "x", "rejected": "y", "chosen_prob": 0.7}"#;
        fs_err::write(&path, format!("\n{good}\n")).unwrap();
        let pairs = read(&path).unwrap();
        assert_eq!((pairs[0].row, pairs[0].chosen_prob, pairs[0].vote_lead), (2, 0.7, 0));
        assert!(pairs[0].is_whole());
        fs_err::write(&path, good.replace("0.7", "1.5")).unwrap();
        let error = read(&path).unwrap_err();
        assert!(matches!(error, Error::Refused(Refusal::BadFile { at: At::Row(1), .. })));
        let text = error.to_string();
        assert!(
            text.ends_with(": row 1: chosen_prob: expected a number within 0 to 1, got 1.5"),
            "{text}"
        );
    }
}
