//! Lines of JSON in and out.

use std::io::Write;
use std::path::Path;

use anyhow::Context;
use arete_records::Message;
use serde::Deserialize;
use serde_json::Value;

use arete_model::{Chat, Error, Model};

/// One line of input.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Line {
    /// A conversation, through the chat template.
    Messages { messages: Vec<Message> },
    /// Text as it is.
    Text { text: String },
}

/// The lines of a file with their numbers.
pub(crate) fn read(path: &Path) -> anyhow::Result<Vec<(usize, Line)>> {
    arete_records::jsonl::read(path)?
        .into_iter()
        .map(|(number, value)| match serde_json::from_value(value) {
            Ok(Line::Messages { messages }) if messages.is_empty() => {
                Err(bad(path, number, "expected at least one message, found none"))
            }
            Ok(line) => Ok((number, line)),
            Err(_) => {
                let expected =
                    "expected {\"messages\": [{\"role\": …, \"content\": …}]} or {\"text\": …}";
                Err(bad(path, number, expected))
            }
        })
        .collect()
}

fn bad(path: &Path, number: usize, what: &str) -> anyhow::Error {
    arete_stage::exit::BadInput(format!("{}, line {number}: {what}", path.display())).into()
}

/// A conversation or text as tokens, by `render`; an error names the line.
pub(crate) fn token_ids(
    path: &Path,
    (number, line): &(usize, Line),
    model: &Model,
    chat: Option<&Chat<'_>>,
    render: impl Fn(&Chat<'_>, &[Message]) -> Result<Vec<i64>, Error>,
) -> anyhow::Result<Vec<i64>> {
    let ids = match (line, chat) {
        (Line::Text { text }, _) => model.tokenizer.encode(text, true),
        (Line::Messages { messages }, Some(chat)) => render(chat, messages),
        (Line::Messages { messages }, None) => {
            model.chat().and_then(|chat| render(&chat, messages))
        }
    };
    let ids = ids.and_then(|ids| model.decoder.check_length(ids.len()).map(|()| ids));
    ids.map_err(|error| bad(path, *number, &error.to_string()))
}

/// Writes one line to stdout at once: whoever reads may be waiting.
pub(crate) fn print(value: &Value) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{value}").and_then(|()| out.flush()).context("writing to stdout")
}
