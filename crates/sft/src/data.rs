//! Demonstrations as token sequences with the tokens to imitate marked.

use std::path::{Path, PathBuf};

use arete_chain::pairs::{self, FieldError};
use arete_model::Chat;
use arete_records::rows::DemonstrationRow;
use arete_records::{At, Message, Refusal, Role, Split, parquet, split_of};
use serde_json::{Map, Value};

use crate::Error;
use crate::config::OverLength;

/// Name of the file looked for in a directory.
const FILE: &str = "demonstrations.parquet";

/// A conversation to imitate.
#[derive(Clone, Debug, PartialEq)]
pub struct Demonstration {
    /// Row or line in its file, counted from 1.
    pub row: usize,
    /// Which part of the data it belongs to.
    pub split: Split,
    /// The whole conversation.
    pub messages: Vec<Message>,
    /// Leading messages that are context: their assistant turns are not imitated.
    pub n_context: usize,
}

/// A tokenised conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// The tokens.
    pub token_ids: Vec<i64>,
    /// True on the tokens that count in the loss; never the first.
    pub target: Vec<bool>,
}

impl Example {
    /// Tokens that count.
    pub fn n_targets(&self) -> usize {
        self.target.iter().filter(|&&target| target).count()
    }
}

/// Tokenised conversations of one split, and what happened to the others.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Examples {
    /// In file order.
    pub examples: Vec<Example>,
    /// Conversations that were cut.
    pub n_truncated: usize,
    /// Conversations left out for their length.
    pub n_dropped: usize,
    /// Conversations left out because cutting left nothing to imitate.
    pub n_empty: usize,
}

/// The file that `path` (a file, or a stage's directory) stands for.
pub fn file_of(path: &Path) -> PathBuf {
    if path.is_dir() { path.join(FILE) } else { path.to_owned() }
}

/// Reads demonstrations: `demonstrations.parquet`, or a Parquet or JSON-lines (`.jsonl`, `.jsonl.gz`, `.json`) file with
/// `messages`, or `prompt` and `completion` (texts or lists of messages), and optionally `split`; without it the split is
/// that of the prompt (80/10/10 by its hash).
///
/// # Errors
///
/// [`Error::Records`] if the file cannot be read, [`Error::Refused`] if a row is not such a conversation.
pub fn read(path: &Path) -> Result<Vec<Demonstration>, Error> {
    let path = &file_of(path);
    if path.file_name().is_some_and(|name| name == FILE) {
        let rows: Vec<DemonstrationRow> = parquet::read(path)?;
        return rows
            .into_iter()
            .enumerate()
            .map(|(idx, DemonstrationRow { split, messages, .. })| {
                let row = Demonstration { row: idx + 1, split, messages, n_context: 0 };
                check(path, row)
            })
            .collect();
    }
    let rows = pairs::records(path)?;
    rows.into_iter().map(|(row, object)| check(path, parse(path, row, &object)?)).collect()
}

fn parse(path: &Path, row: usize, object: &Map<String, Value>) -> Result<Demonstration, Error> {
    let refused = |error: FieldError| error.at(path, At::Row(row));
    let (messages, n_context) = if let Some(value) = object.get("messages") {
        (pairs::messages("messages", value, Role::User).map_err(refused)?, 0)
    } else {
        let part = |field| {
            object.get(field).ok_or_else(|| {
                let expected = "a column `messages`, or `prompt` and `completion`";
                refused(FieldError::columns(field, expected, object))
            })
        };
        let mut all = pairs::prompt("prompt", part("prompt")?).map_err(refused)?;
        let n_context = all.len();
        let completion = part("completion")?;
        all.extend(pairs::messages("completion", completion, Role::Assistant).map_err(refused)?);
        (all, n_context)
    };
    let split = match object.get("split") {
        None | Some(Value::Null) => split_of(&messages),
        Some(value) => serde_json::from_value(value.clone())
            .map_err(|_| refused(FieldError::new("split", "train, validation or test", value)))?,
    };
    Ok(Demonstration { row, split, messages, n_context })
}

fn check(path: &Path, row: Demonstration) -> Result<Demonstration, Error> {
    if row.messages[row.n_context.min(row.messages.len())..]
        .iter()
        .any(|message| message.role == Role::Assistant)
    {
        return Ok(row);
    }
    let roles: Vec<&str> = row.messages.iter().map(|message| message.role.name()).collect();
    let expected = "a conversation with an assistant's turn";
    Err(Refusal::at(path, At::Row(row.row), "messages", expected, roles.join(", ")).into())
}

/// Renders and tokenises the demonstrations of one split.
///
/// # Errors
///
/// [`Error::Rendering`] if the template refuses a conversation.
pub fn tokenize(
    path: &Path,
    demonstrations: &[Demonstration],
    split: Split,
    chat: &Chat<'_>,
    max_length: usize,
    over_length: OverLength,
) -> Result<Examples, Error> {
    let mut out = Examples::default();
    for row in demonstrations.iter().filter(|row| row.split == split) {
        let mut example = render(row, chat).map_err(|source| Error::Rendering {
            path: file_of(path),
            row: row.row,
            source: Box::new(source),
        })?;
        if example.token_ids.len() > max_length {
            if over_length == OverLength::Drop {
                out.n_dropped += 1;
                continue;
            }
            example.token_ids.truncate(max_length);
            example.target.truncate(max_length);
            out.n_truncated += 1;
        }
        if example.n_targets() == 0 {
            out.n_empty += 1;
            continue;
        }
        out.examples.push(example);
    }
    Ok(out)
}

fn render(row: &Demonstration, chat: &Chat<'_>) -> Result<Example, arete_model::Error> {
    let rendered = chat.render(&row.messages)?;
    let mut target = rendered.own;
    if row.messages[..row.n_context].iter().any(|message| message.role == Role::Assistant) {
        let n_context = chat.render_prompt(&row.messages[..row.n_context])?.len().min(target.len());
        target[..n_context].fill(false);
    }
    if let Some(first) = target.first_mut() {
        *first = false; // nothing predicts it
    }
    Ok(Example { token_ids: rendered.token_ids, target })
}
