//! Conversations and labelled pairs of them as other people's files hold them: lists of messages, or hh-rlhf's text form
//! `"\n\nHuman: …\n\nAssistant: …"`; rows of JSON lines or Parquet.

use std::path::Path;

use serde_json::{Map, Value};

use crate::jsonl::{self, NumberedObject};
use crate::{Error, Message, Role, parquet};

const MARKERS: [(&str, Role); 2] = [("Human:", Role::User), ("Assistant:", Role::Assistant)];

/// Reads a conversation written as `"\n\nHuman: …\n\nAssistant: …"`; `None` if the text is none.
///
/// A speaker counts only at the start of the text or after a blank line, so that `Human` or `: `
/// inside a turn survive. A text that begins with `Human:` without the blank line in front, and in
/// which nobody answers, is a plain text about humans. A turn that is opened and left empty (the usual
/// end of a prompt) is dropped.
pub fn parse(text: &str) -> Option<Vec<Message>> {
    let turns = turns(text)?;
    Some(turns.into_iter().filter(|message| !message.content.is_empty()).collect())
}

/// [`parse`], empty turns and all: whether a conversation ends with a reply can be told from its last.
pub fn turns(text: &str) -> Option<Vec<Message>> {
    let text = text.replace("\r\n", "\n");
    let is_marked = text.starts_with("\n\n");
    let text = text.trim();
    let (_, n_marker) = speaker_at(text)?;
    if !is_marked && next_turn(text, n_marker) == text.len() {
        return None;
    }
    let mut turns: Vec<(Role, usize, usize)> = Vec::new(); // role, start and end of the content
    let mut from = 0;
    while let Some((role, length)) = speaker_at(&text[from..]) {
        let start = from + length;
        let end = next_turn(text, start);
        turns.push((role, start, end));
        if end == text.len() {
            break;
        }
        from = end + 2;
    }
    let messages = turns
        .into_iter()
        .map(|(role, start, end)| Message { role, content: text[start..end].trim().to_owned() });
    Some(messages.collect())
}

/// Writes a conversation as `"\n\nHuman: …\n\nAssistant: …"`; a system message leads as plain text.
pub fn format(messages: &[Message]) -> String {
    messages
        .iter()
        .map(|message| match message.role {
            Role::System => message.content.clone(),
            Role::User => format!("\n\nHuman: {}", message.content),
            Role::Assistant => format!("\n\nAssistant: {}", message.content),
        })
        .collect()
}

/// The text without blank lines before a speaker, so that [`parse`] reads it as one turn.
pub fn as_one_turn(text: &str) -> String {
    let mut text = text.replace("\r\n", "\n");
    for (name, _) in MARKERS {
        let (opens, continues) = (format!("\n\n{name}"), format!("\n{name}"));
        while text.contains(&opens) {
            text = text.replace(&opens, &continues);
        }
    }
    text
}

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
    fn new(field: &'static str, expected: impl Into<String>, got: &Value) -> Self {
        Self { field, expected: expected.into(), got: shortened(got) }
    }
}

/// A value for a message: at most 200 characters of it.
pub fn shortened(value: &Value) -> String {
    const MOST: usize = 200;
    let mut text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    if text.chars().count() > MOST {
        text = text.chars().take(MOST).collect::<String>() + "…";
    }
    text
}

/// The conversation in a field: a list of messages, a text in hh-rlhf's form, or a plain text that `role` says.
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
        Value::String(text) => {
            Ok(turns(text)
                .unwrap_or_else(|| vec![Message { role, content: text.trim().to_owned() }]))
        }
        list => serde_json::from_value(list.clone()).map_err(|error| {
            let expected = format!("a text or a list of {{role, content}} ({error})");
            FieldError::new(field, expected, value)
        }),
    }
}

/// The conversations `chosen` and `rejected` of a labelled pair, each with the shared `prompt` (if there is one) before it.
///
/// # Errors
///
/// [`FieldError`] if a field is missing or no conversation.
pub fn pair(object: &Map<String, Value>) -> Result<[Vec<Message>; 2], FieldError> {
    let prompt = match object.get("prompt") {
        None | Some(Value::Null) => Vec::new(),
        Some(value) => messages("prompt", value, Role::User)?,
    };
    let side = |field| {
        let Some(value) = object.get(field) else {
            let names: Vec<&str> = object.keys().map(String::as_str).collect();
            let got = Value::String(names.join(", "));
            return Err(FieldError::new(field, "columns `chosen` and `rejected`", &got));
        };
        let own = messages(field, value, Role::Assistant)?;
        Ok([prompt.as_slice(), &own].concat())
    };
    Ok([side("chosen")?, side("rejected")?])
}

/// The rows of a Parquet file (by its ending) or of JSON lines, `.gz` too, numbered from 1.
///
/// # Errors
///
/// Those of [`parquet::read_json`] and [`jsonl::read`]; [`Error::Json`] for a line that is no object.
pub fn objects(path: impl AsRef<Path>) -> Result<Vec<NumberedObject>, Error> {
    let path = path.as_ref();
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("parquet")) {
        return Ok((1..).zip(parquet::read_json(path)?).collect());
    }
    let object = |(line, value)| match value {
        Value::Object(object) => Ok((line, object)),
        other => Err(Error::Json {
            path: path.to_owned(),
            line,
            expected: "an object".to_owned(),
            got: shortened(&other),
        }),
    };
    jsonl::read(path)?.into_iter().map(object).collect()
}

fn speaker_at(text: &str) -> Option<(Role, usize)> {
    MARKERS.iter().find(|(name, _)| text.starts_with(name)).map(|(name, role)| (*role, name.len()))
}

/// Where the turn that starts at `from` ends: before the blank line that precedes a speaker.
fn next_turn(text: &str, from: usize) -> usize {
    let starts = MARKERS.iter().filter_map(|(name, _)| text[from..].find(&format!("\n\n{name}")));
    starts.min().map_or(text.len(), |at| from + at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn turns_are_split_at_speakers_after_blank_lines_only() {
        let text = "\n\nHuman: What is this: a test?\nHuman: is a word\n\nAssistant: Yes: it is.\n\n\
                    A Human asked.\n\nHuman: ok\n\nAssistant:";
        assert_eq!(
            parse(text).unwrap(),
            vec![
                Message::user("What is this: a test?\nHuman: is a word"),
                Message::assistant("Yes: it is.\n\nA Human asked."),
                Message::user("ok"),
            ]
        );
    }

    #[test]
    fn text_without_a_leading_speaker_is_no_conversation() {
        assert_eq!(parse("What does \"\n\nHuman: hi\" mean?"), None);
        assert_eq!(parse("Just text\n\nHuman: no"), None);
        assert_eq!(parse(""), None);
        assert_eq!(parse("Human: a history of the word. Who wrote it?"), None);
        assert_eq!(parse("\n\nHuman: hello").unwrap(), [Message::user("hello")]);
    }

    #[test]
    fn three_newlines_before_a_speaker_still_separate() {
        let messages = parse("Human: a\n\n\nAssistant: b").unwrap();
        assert_eq!(messages, vec![Message::user("a"), Message::assistant("b")]);
    }

    #[test]
    fn format_is_the_form_of_the_hub() {
        let messages = [Message::user("a"), Message::assistant("b")];
        assert_eq!(format(&messages), "\n\nHuman: a\n\nAssistant: b");
    }

    #[test]
    fn texts_lists_and_replies_after_a_prompt_are_the_same_pair() {
        let row = |text: &str| -> Map<String, Value> { serde_json::from_str(text).unwrap() };
        let texts = row(
            r#"{"chosen": "\n\nHuman: a\n\nb\n\nAssistant: good", "rejected": "\n\nHuman: a\n\nb\n\nAssistant:"}"#,
        );
        let [chosen, rejected] = pair(&texts).unwrap();
        assert_eq!(chosen, [Message::user("a\n\nb"), Message::assistant("good")]);
        assert_eq!(rejected, [Message::user("a\n\nb"), Message::assistant("")]);
        for other in [
            r#"{"prompt": "a\n\nb", "chosen": "good", "rejected": ""}"#,
            r#"{"prompt": [{"role": "user", "content": "a\n\nb"}], "chosen": [{"role": "assistant", "content": "good"}], "rejected": ""}"#,
        ] {
            assert_eq!(pair(&row(other)).unwrap(), [chosen.clone(), rejected.clone()], "{other}");
        }
        let error = pair(&row(r#"{"chosen": "x"}"#)).unwrap_err();
        assert_eq!((error.field, error.got.as_str()), ("rejected", "chosen"));
        let error = pair(&row(r#"{"chosen": 5, "rejected": "x"}"#)).unwrap_err();
        assert!(error.expected.starts_with("a text or a list of {role, content}"), "{error:?}");
    }

    proptest! {
        #[test]
        fn parse_undoes_format(texts in prop::collection::vec("[a-zA-Z:, ]{0,8}[a-z][\n]?[a-z: ]{0,8}[a-z]", 1..6)) {
            let messages: Vec<Message> = texts
                .iter()
                .enumerate()
                .map(|(idx, text)| match idx % 2 {
                    0 => Message::user(text.trim()),
                    _ => Message::assistant(text.trim()),
                })
                .collect();
            prop_assert_eq!(parse(&format(&messages)).unwrap(), messages);
        }
    }
}
