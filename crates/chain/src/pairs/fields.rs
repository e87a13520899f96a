//! Conversations as fields of records hold them: texts, lists of messages in the dialects of the hub, single messages.

use std::fmt;
use std::path::Path;

use arete_records::table::{Unreadable, shortened};
use arete_records::{At, Message, Refusal, Role};
use serde_json::{Map, Value};

use crate::dialogue;

/// A field that does not hold what it should.
#[derive(Debug, Clone, PartialEq)]
pub struct FieldError {
    /// The field's name.
    pub field: &'static str,
    /// What would have been accepted.
    pub expected: String,
    /// What is there, shortened.
    pub got: String,
}

impl FieldError {
    /// Refuses a field for its value.
    pub fn new(field: &'static str, expected: impl Into<String>, got: &Value) -> Self {
        Self { field, expected: expected.into(), got: shortened(got) }
    }

    /// Refuses a record for the columns it has.
    pub fn columns(
        field: &'static str,
        expected: impl Into<String>,
        record: &Map<String, Value>,
    ) -> Self {
        let names: Vec<&str> = record.keys().map(String::as_str).collect();
        Self { field, expected: expected.into(), got: shortened(&names.join(", ").into()) }
    }

    /// Refuses a line that holds no record.
    pub fn unreadable(line: Unreadable) -> Self {
        Self { field: "record", expected: line.expected, got: line.got }
    }

    /// The same, with its place in a file.
    #[must_use]
    pub fn at(self, path: &Path, at: At) -> Refusal {
        Refusal::at(path, at, self.field, self.expected, self.got)
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: expected {}, got {}", self.field, self.expected, self.got)
    }
}

/// The conversation in a field: a list of messages (or one message), a text in hh-rlhf's form, or a plain text that `role`
/// says.
///
/// A message is `{role, content}`, or `{from, value}` as ShareGPT has it; its content a text, or a list of parts of which
/// each is a text.
///
/// # Errors
///
/// [`FieldError`] if it is none of these.
pub fn messages(
    field: &'static str,
    value: &Value,
    role: Role,
) -> Result<Vec<Message>, FieldError> {
    match value {
        Value::String(text) if is_list_as_text(field, text) => {
            let written = "a text or a list of {role, content} (as JSON, not as Python writes it)";
            let parsed: Vec<Value> =
                serde_json::from_str(text).map_err(|_| FieldError::new(field, written, value))?;
            parsed.iter().map(|item| message(field, item)).collect()
        }
        Value::String(text) => Ok(dialogue::turns(text)
            .or_else(|| led_by_system(text, role))
            .unwrap_or_else(|| vec![Message { role, content: text.trim().to_owned() }])),
        Value::Array(items) => items.iter().map(|item| message(field, item)).collect(),
        Value::Object(_) => Ok(vec![message(field, value)?]),
        other => Err(FieldError::new(field, "a text or a list of {role, content}", other)),
    }
}

/// Whether a text is a list of messages that was written out, as a table of texts makes of one.
fn is_list_as_text(field: &str, text: &str) -> bool {
    let is_of_messages = ["messages", "conversations", "conversation"].contains(&field);
    let text = text.trim_start();
    let opens =
        |open: &str| text.strip_prefix('[').is_some_and(|rest| rest.trim_start().starts_with(open));
    is_of_messages && (opens("{\"") || opens("{'"))
}

/// The messages in a field that follow `prompt`: a reply, or a whole conversation which repeats the prompt's last question. Another
/// text with speakers in it is a reply that quotes a conversation, unless it is marked as one by a blank line before the first.
///
/// # Errors
///
/// As [`messages`].
pub fn following(
    field: &'static str,
    value: &Value,
    prompt: &[Message],
) -> Result<Vec<Message>, FieldError> {
    let own = messages(field, value, Role::Assistant)?;
    let Value::String(text) = value else { return Ok(own) };
    let Some(asked) = last_question(prompt) else { return Ok(own) };
    let repeats = |message: &Message| message.content.trim() == asked;
    let first = own.first().map_or(Role::Assistant, |first| first.role);
    let is_marked = first == Role::User && text.replace("\r\n", "\n").starts_with("\n\n");
    if first == Role::Assistant || is_marked || own.iter().any(repeats) {
        return Ok(own);
    }
    Ok(vec![Message::assistant(text.trim())])
}

/// What the human asked last.
pub(super) fn last_question(messages: &[Message]) -> Option<&str> {
    let asked = messages.iter().rev().find(|message| message.role == Role::User)?;
    Some(asked.content.trim())
}

/// A conversation in hh-rlhf's form after a system text, as our own export writes it. A question that merely quotes such a
/// conversation is none: a prompt must open the reply that is asked for.
fn led_by_system(text: &str, role: Role) -> Option<Vec<Message>> {
    let turns = dialogue::turns_after_system(text)?;
    let last = turns.last()?;
    let opens_reply = last.role == Role::Assistant && last.content.is_empty();
    (role == Role::Assistant || opens_reply).then_some(turns)
}

/// The conversation in a field that a reply is to follow: a turn of the assistant's opened at its end is that reply's.
///
/// # Errors
///
/// As [`messages`].
pub fn prompt(field: &'static str, value: &Value) -> Result<Vec<Message>, FieldError> {
    let mut prompt = messages(field, value, Role::User)?;
    prompt.pop_if(|last| last.role == Role::Assistant && last.content.trim().is_empty());
    Ok(prompt)
}

/// Parts of messages that templates show and that no [`Message`] holds: without them it would be another conversation.
const LOST: [&str; 5] =
    ["tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"];

fn says_something(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::String(text) => !text.trim().is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => map.values().any(says_something),
        Value::Bool(_) | Value::Number(_) => true,
    }
}

fn message(field: &'static str, item: &Value) -> Result<Message, FieldError> {
    let wrong = |expected: &str| {
        let expected = format!("a text or a list of {{role, content}} ({expected})");
        Err(FieldError::new(field, expected, item))
    };
    let Value::Object(map) = item else { return wrong("a message is an object") };
    if let Some(lost) = LOST.into_iter().find(|name| present(map, name).is_some_and(says_something))
    {
        return wrong(&format!("`{lost}` would be lost: no message here has it"));
    }
    let first = |names: [&str; 3]| names.into_iter().find_map(|name| present(map, name));
    let role = match first(["role", "from", "speaker"]).and_then(Value::as_str) {
        Some(name) => match name.to_ascii_lowercase().as_str() {
            "system" | "developer" => Role::System,
            "user" | "human" | "prompter" => Role::User,
            "assistant" | "gpt" | "bot" | "chatgpt" | "model" => Role::Assistant,
            _ => return wrong("a role is system, user or assistant, or one of their other names"),
        },
        None => return wrong("a message has a role"),
    };
    match first(["content", "value", "text"]) {
        Some(Value::String(content)) => Ok(Message { role, content: content.clone() }),
        Some(Value::Array(parts)) => {
            match parts.iter().map(text_of_part).collect::<Option<String>>() {
                Some(content) => Ok(Message { role, content }),
                None => {
                    wrong("each part of a content is a text: {\"type\": \"text\", \"text\": …}")
                }
            }
        }
        _ => wrong("a content is a text, or a list of texts"),
    }
}

/// The text of a part of a content; none of an image or another thing that is no text.
fn text_of_part(part: &Value) -> Option<&str> {
    match part {
        Value::String(text) => Some(text),
        Value::Object(map) => {
            let is_text = map.get("type").is_none_or(|kind| kind == "text");
            map.get("text").and_then(Value::as_str).filter(|_| is_text)
        }
        _ => None,
    }
}

/// The question of a record: its `prompt`; `conversations` as ShareGPT has them; or an `instruction` with its `input`, as
/// Alpaca has them. A `system` text leads, unless the question has one of its own. None if the record has none of these.
///
/// # Errors
///
/// As [`messages`].
pub fn question(record: &Map<String, Value>) -> Result<Option<Vec<Message>>, FieldError> {
    let present = |field: &str| present(record, field);
    let mut question = if let Some(value) = present("prompt") {
        prompt("prompt", value)?
    } else if let Some(value) = present("conversations") {
        prompt("conversations", value)?
    } else if let Some(value) = present("instruction") {
        let mut messages = history(record)?;
        messages.push(Message::user(instruction(record, value)?));
        messages
    } else {
        return Ok(None);
    };
    lead(record, &mut question);
    Ok(Some(question))
}

/// A field's value. A null is none: where records or messages of several forms were put together, each has one for every field of
/// the others.
pub fn present<'a>(record: &'a Map<String, Value>, field: &str) -> Option<&'a Value> {
    record.get(field).filter(|value| !value.is_null())
}

/// Puts the record's `system` text (or `system_prompt`, as OpenOrca has it) before a conversation that has none of its own.
pub fn lead(record: &Map<String, Value>, messages: &mut Vec<Message>) {
    let named = ["system", "system_prompt"].into_iter().find_map(|name| present(record, name));
    let system = named.and_then(Value::as_str).map_or("", str::trim);
    let leads = !system.is_empty() && !messages.is_empty();
    if leads && messages.iter().all(|message| message.role != Role::System) {
        messages.insert(0, Message::system(system));
    }
}

/// The record's list of messages named `context`; none where that is something else, as a list of passages.
pub(super) fn context(record: &Map<String, Value>) -> Option<&Value> {
    let is_messages = |value: &&Value| {
        value
            .as_array()
            .is_some_and(|items| !items.is_empty() && items.iter().all(Value::is_object))
    };
    record.get("context").filter(is_messages)
}

/// An instruction and its input, a line each.
fn instruction(record: &Map<String, Value>, value: &Value) -> Result<String, FieldError> {
    let wrong = |field, value| FieldError::new(field, "a text", value);
    let asked = value.as_str().ok_or_else(|| wrong("instruction", value))?.trim();
    // dolly calls the text that is asked about `context`.
    let input = match present(record, "input") {
        None => record.get("context").and_then(Value::as_str).unwrap_or_default().trim(),
        Some(value) => value.as_str().ok_or_else(|| wrong("input", value))?.trim(),
    };
    Ok([asked, input].into_iter().filter(|text| !text.is_empty()).collect::<Vec<_>>().join("\n"))
}

/// Earlier rounds of an Alpaca record: `history` is a list of [question, reply].
fn history(record: &Map<String, Value>) -> Result<Vec<Message>, FieldError> {
    let Some(value) = present(record, "history") else {
        return Ok(Vec::new());
    };
    let rounds: Vec<[String; 2]> = serde_json::from_value(value.clone())
        .map_err(|_| FieldError::new("history", "a list of [question, reply]", value))?;
    Ok(rounds
        .into_iter()
        .flat_map(|[asked, reply]| [Message::user(asked), Message::assistant(reply)])
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<Message>, FieldError> {
        messages("messages", &serde_json::from_str(text).unwrap(), Role::User)
    }

    #[test]
    fn dialects_of_messages_are_one() {
        let expected = [Message::system("s"), Message::user("q"), Message::assistant("a")];
        for text in [
            r#"[{"role":"system","content":"s"},{"role":"user","content":"q","name":null},{"role":"assistant","content":"a"}]"#,
            r#"[{"from":"system","value":"s"},{"from":"human","value":"q"},{"from":"gpt","value":"a"}]"#,
            r#"[{"role":"system","content":[{"type":"text","text":"s"}]},{"role":"user","content":[{"type":"text","text":"q"}]},{"role":"assistant","content":["a"]}]"#,
        ] {
            assert_eq!(read(text).unwrap(), expected, "{text}");
        }
        assert_eq!(read(r#"{"role":"user","content":"q"}"#).unwrap(), [Message::user("q")]);
        for (text, expected) in [
            (r#"[{"role":"tool","content":"x"}]"#, "a role is"),
            (r#"[{"role":"user","content":[{"type":"image","image":"x"}]}]"#, "each part"),
            (r#"[{"role":"user","content":null}]"#, "a content is"),
            (r#"[{"content":"x"}]"#, "has a role"),
            (r#"["x"]"#, "is an object"),
            ("5", "a text or a list"),
        ] {
            assert!(read(text).unwrap_err().expected.contains(expected), "{text}");
        }
    }

    #[test]
    fn questions_of_alpaca_and_sharegpt() {
        let asked = |text: &str| question(&serde_json::from_str(text).unwrap()).unwrap();
        let alpaca = r#"{"instruction": "Translate.", "input": "Hund", "output": "dog", "system": "Be brief.", "history": [["a", "b"]]}"#;
        assert_eq!(
            asked(alpaca).unwrap(),
            [
                Message::system("Be brief."),
                Message::user("a"),
                Message::assistant("b"),
                Message::user("Translate.\nHund")
            ]
        );
        assert_eq!(
            asked(r#"{"instruction": "Go.", "input": ""}"#).unwrap(),
            [Message::user("Go.")]
        );
        let sharegpt = r#"{"conversations": [{"from": "human", "value": "q"}], "system": ""}"#;
        assert_eq!(asked(sharegpt).unwrap(), [Message::user("q")]);
        assert_eq!(asked(r#"{"question": "q"}"#), None);
    }
}
