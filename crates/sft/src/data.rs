//! Demonstrations as token sequences with the tokens to imitate marked.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use arete_chain::pairs::{self, FieldError};
use arete_model::Chat;
use arete_records::left_out::{self, LeftOut};
use arete_records::rows::DemonstrationRow;
use arete_records::table::{self, Column};
use arete_records::{At, Message, Role, Split, fill_splits, parquet, split_of};
use arete_training::not_rendered;
use serde_json::{Map, Value};

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
    /// Conversations that the template refuses.
    pub left_out: Vec<LeftOut>,
}

/// The file that `path` (a file, or a stage's directory) stands for.
pub fn file_of(path: &Path) -> PathBuf {
    if path.is_dir() { path.join(FILE) } else { path.to_owned() }
}

/// Reads demonstrations: `demonstrations.parquet`, or a file of any format that [`table`] reads with `messages` (or
/// `conversation`, or `conversations` as ShareGPT has them), `prompt` and `completion` (texts, hh-rlhf's form too, or lists of messages), or
/// `instruction`, `input` and `output` (Alpaca's); and optionally `split`, without which the split is that of the prompt
/// (80/10/10 by its hash, and none without a row where there are enough). Rows that are no such conversation are left out
/// and named, unless they are too many.
///
/// # Errors
///
/// A file's failure if the file cannot be read, or too many rows are no such conversation.
pub fn read(path: &Path, columns: &[Column]) -> Result<(Vec<Demonstration>, Vec<LeftOut>)> {
    let path = &file_of(path);
    if path.file_name().is_some_and(|name| name == FILE) {
        let rows: Vec<DemonstrationRow> = parquet::read(path)?;
        let mut out = Vec::new();
        for (idx, DemonstrationRow { split, messages, .. }) in rows.into_iter().enumerate() {
            let row = Demonstration { row: idx + 1, split, messages, n_context: 0 };
            check(&row).map_err(|error| error.at(path, At::Row(row.row)))?;
            out.push(row);
        }
        return Ok((out, Vec::new()));
    }
    let table = table::read_renamed(path, columns)?;
    let n_records = table.n_rows();
    let (mut out, mut drawn) = (Vec::new(), Vec::new());
    let mut wrong: Vec<(usize, FieldError)> = pairs::unreadable(table.unreadable).collect();
    for (row, object) in &table.records {
        match parse(*row, object) {
            Ok((demonstration, names_split)) => {
                drawn.push(!names_split);
                out.push(demonstration);
            }
            Err(error) => wrong.push((*row, error)),
        }
    }
    fill(&mut out, &drawn);
    let left_out = pairs::leave_out(path, wrong, n_records)?;
    Ok((out, left_out))
}

/// Gives every split a row where no row names its own: rows of one opening question stay together.
fn fill(rows: &mut [Demonstration], drawn: &[bool]) {
    if drawn.iter().any(|drawn| !drawn) {
        return;
    }
    let opening = |row: &Demonstration| {
        let asked = row.messages.iter().find(|message| message.role == Role::User);
        asked.map_or_else(String::new, |message| message.content.trim().to_owned())
    };
    let mut items: Vec<(String, Split)> =
        rows.iter().map(|row| (opening(row), row.split)).collect();
    fill_splits(&mut items);
    for (row, (_, split)) in rows.iter_mut().zip(items) {
        row.split = split;
    }
}

/// A row's conversation, and whether it names its split.
fn parse(row: usize, object: &Map<String, Value>) -> Result<(Demonstration, bool), FieldError> {
    let present = |field: &str| pairs::present(object, field);
    let reply =
        ["completion", "output", "response"].into_iter().find(|field| present(field).is_some());
    let list =
        ["messages", "conversation"].into_iter().find_map(|field| Some((field, present(field)?)));
    let whole = match (list, present("conversations")) {
        (Some(list), _) => Some(list),
        (None, Some(value)) if reply.is_none() || ends_with_reply(value) => {
            Some(("conversations", value))
        }
        _ => None,
    };
    let (messages, n_context) = if let Some((field, value)) = whole {
        let mut messages = pairs::messages(field, value, Role::User)?;
        pairs::lead(object, &mut messages);
        (messages, 0)
    } else {
        let missing = |field| {
            let expected = "a column `messages`, or `prompt` and `completion`";
            FieldError::columns(field, expected, object)
        };
        let prompt = pairs::question(object)?.ok_or_else(|| missing("prompt"))?;
        let reply = reply.ok_or_else(|| missing("completion"))?;
        let own = pairs::following(reply, &object[reply], &prompt)?;
        (pairs::after(&prompt, own), prompt.len())
    };
    let (split, names_split) = match present("split") {
        None => (split_of(&messages), false),
        Some(value) => {
            let wrong = || FieldError::new("split", "train, validation or test", value);
            (pairs::named_split(object).ok_or_else(wrong)?, true)
        }
    };
    let row = Demonstration { row, split, messages, n_context };
    check(&row)?;
    Ok((row, names_split))
}

/// Whether the assistant speaks last in a conversation: no other field's reply follows it.
fn ends_with_reply(conversation: &Value) -> bool {
    let own = pairs::messages("conversations", conversation, Role::User).unwrap_or_default();
    own.last().is_some_and(|last| last.role == Role::Assistant)
}

fn check(row: &Demonstration) -> Result<(), FieldError> {
    if row.messages[row.n_context.min(row.messages.len())..]
        .iter()
        .any(|message| message.role == Role::Assistant)
    {
        return Ok(());
    }
    let roles: Vec<&str> = row.messages.iter().map(|message| message.role.name()).collect();
    let expected = "a conversation with an assistant's turn".to_owned();
    Err(FieldError { field: "messages", expected, got: roles.join(", ") })
}

/// Renders and tokenises the demonstrations of one split. Those that the template refuses are left out and named, unless they are
/// too many.
///
/// # Errors
///
/// If the template refuses more than a [share](left_out::is_share) of them; fewer are left out and named.
pub fn tokenize(
    path: &Path,
    demonstrations: &[Demonstration],
    split: Split,
    chat: &Chat<'_>,
    max_length: usize,
    over_length: OverLength,
) -> Result<Examples> {
    let mut out = Examples::default();
    let own = || demonstrations.iter().filter(|row| row.split == split);
    let n_rows = own().count();
    for row in own() {
        let mut example = match render(row, chat) {
            Ok(example) => example,
            Err(error) => {
                let path = file_of(path);
                let reason = format!("cannot be rendered: {error}");
                out.left_out.push(pairs::of_row(&path, row.row, reason));
                if !left_out::is_share(out.left_out.len(), n_rows) {
                    return Err(error).with_context(|| not_rendered(&path, row.row));
                }
                continue;
            }
        };
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
