//! The reading rule: what a reward model reads of a conversation, as it was trained to.
//!
//! The reward stage writes it beside the adapter (`reading.json`) and into the `config.json` of a merged model
//! (`arete_reading`). Every reader obeys it: a model trained on closed replies gives an open one, cut by the token limit, a
//! score that means nothing. A reward model of ours without a rule is refused; a foreign one is read whole and closed.

use std::path::{Path, PathBuf};
use std::sync::Once;

use arete_model::{Chat, Error, Model};
use arete_records::{FinishReason, Message, Role, atomic, files};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::trim::last_sentence;

/// Name of the file in a reward model's directory.
pub const FILE: &str = "reading.json";
/// Its key in a merged model's `config.json`.
pub const KEY: &str = "arete_reading";
/// What marks an adapter as ours.
pub(crate) const ADAPTER_META: &str = "arete_adapter.json";
/// What marks a merged reward model as ours.
const MERGED_MARK: &str = "score_mean";
/// Largest `config.json` that is read, in bytes.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// What becomes of a reply that the token limit cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CutReply {
    /// It ends at its last full sentence and is closed; without one, it is closed as it is.
    Trim,
    /// It is closed as it is.
    Close,
    /// Without an end of turn; cut replies before it are closed, as the template has them.
    Open,
}

/// The side on which a conversation loses what exceeds the length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// Its last tokens stay.
    Left,
    /// Its first tokens stay.
    Right,
}

/// Where the head reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReadAt {
    /// At the last token of what is read.
    LastToken,
    /// At the last token that is not this one (padding), as transformers' models for sequence classification do: of theirs, a
    /// model whose padding is its end of turn reads before that.
    LastExcept(i64),
}

/// The contents of `reading.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reading {
    /// SHA-256 of the chat template that renders conversations.
    pub template_sha256: String,
    /// What becomes of a reply that the token limit cut.
    pub cut_reply: CutReply,
    /// Where the head reads.
    pub head: ReadAt,
    /// Most tokens; none = as many as the model has positions.
    pub max_length: Option<usize>,
    /// Where a longer conversation is cut.
    pub cut_side: Side,
}

/// A conversation to score: everything through the reply that is scored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transcript<'a> {
    /// Its messages; the last is the reply.
    pub messages: &'a [Message],
    /// Why its last replies ended, the scored one's reason last. Those before ended by themselves.
    pub finish_reasons: Vec<FinishReason>,
}

impl Reading {
    /// Whole conversations, by `model`'s template.
    #[must_use]
    pub fn whole(model: &Model, cut_reply: CutReply) -> Self {
        let template_sha256 = template_sha256(model);
        let (head, cut_side) = (ReadAt::LastToken, Side::Left);
        Self { template_sha256, cut_reply, head, max_length: None, cut_side }
    }

    /// How a reward model of another program is read: whole, every reply closed, and at the last token that is not padding.
    ///
    /// # Source
    ///
    /// transformers 5.24, `GenericForSequenceClassification.forward`: the last token that is not `config.pad_token_id`.
    #[must_use]
    pub fn foreign(model: &Model) -> Self {
        let whole = Self::whole(model, CutReply::Close);
        match model.config.pad_token_id {
            Some(pad) => Self { head: ReadAt::LastExcept(pad), ..whole },
            None => whole,
        }
    }

    /// The rule of a reward model's directory, adapter or merged model; none for a foreign one.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if it is ours and has no rule, or none that this version knows.
    pub fn read(dir: &Path) -> Result<Option<Self>, Error> {
        let inner = dir.join("adapter");
        let model = if inner.is_dir() { inner } else { dir.to_owned() };
        // Beside the model's files (as uploaded), or beside their directory.
        let beside = [model.join(FILE), model.join("..").join(FILE)];
        if let Some(path) = beside.into_iter().find(|path| path.is_file()) {
            let bytes = files::read_capped(&path, MAX_CONFIG_BYTES)?;
            let value =
                serde_json::from_slice(&bytes).map_err(|error| wrong(&path, "JSON", &error))?;
            return parse(&path, value).map(Some);
        }
        let path = model.join("config.json");
        let mut is_ours = model.join(ADAPTER_META).is_file();
        if path.is_file() {
            let mut config = arete_model::read_json_object(&path, MAX_CONFIG_BYTES)?;
            if let Some(rule) = config.get_mut(KEY) {
                return parse(&path, rule.take()).map(Some);
            }
            is_ours |= config.get(MERGED_MARK).is_some();
        }
        if is_ours {
            return Err(Error::Field {
                path: model,
                field: "reading rule".to_owned(),
                expected: format!("{FILE} beside the adapter, or {KEY} in config.json"),
                found: "none: made by an older version, which read cut replies otherwise than it trained on them; \
                        train it again"
                    .to_owned(),
            });
        }
        Ok(None)
    }

    /// The rule of the reward model in `dir`, which reads with `model`.
    ///
    /// # Errors
    ///
    /// As [`Reading::read`], and [`Error::Field`] if it was trained with another chat template than `model`'s.
    pub fn of(dir: &Path, model: &Model) -> Result<Self, Error> {
        static SAID: Once = Once::new();
        let Some(reading) = Self::read(dir)? else {
            SAID.call_once(|| {
                tracing::warn!(
                    path = %dir.display(),
                    "a reward model of another program: it is read whole, every reply closed, at the last token that is not \
                     padding"
                );
            });
            return Ok(Self::foreign(model));
        };
        let found = template_sha256(model);
        if reading.template_sha256 == found {
            return Ok(reading);
        }
        Err(Error::Field {
            path: dir.to_owned(),
            field: "template_sha256".to_owned(),
            expected: format!(
                "the chat template it was trained with ({})",
                reading.template_sha256
            ),
            found,
        })
    }

    /// Writes `reading.json`.
    ///
    /// # Errors
    ///
    /// [`Error::Records`] if the disk refuses.
    pub fn write(&self, dir: &Path) -> Result<(), Error> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("words and numbers serialise");
        bytes.push(b'\n');
        Ok(atomic::write(dir.join(FILE), &bytes)?)
    }

    /// What is read of a conversation, at most `positions` tokens.
    ///
    /// # Errors
    ///
    /// What the template or the tokenizer refuse.
    pub fn token_ids(
        &self,
        chat: &Chat<'_>,
        transcript: &Transcript<'_>,
        positions: usize,
    ) -> Result<Vec<i64>, Error> {
        let Transcript { messages, finish_reasons } = transcript;
        let is_cut = finish_reasons.last() == Some(&FinishReason::Length);
        let mut token_ids = match self.cut_reply {
            CutReply::Open if is_cut => chat.render_truncated(messages)?,
            CutReply::Open | CutReply::Close => chat.render(messages)?,
            CutReply::Trim => chat.render(&trimmed(messages, finish_reasons))?,
        }
        .token_ids;
        let most = self.max_length.unwrap_or(positions).min(positions);
        match self.cut_side {
            Side::Left => drop(token_ids.drain(..token_ids.len().saturating_sub(most))),
            Side::Right => token_ids.truncate(most),
        }
        if let ReadAt::LastExcept(padding) = self.head {
            // What follows cannot change what is read. Of nothing but padding, the first token is read, as there.
            let last = token_ids.iter().rposition(|&id| id != padding).unwrap_or(0);
            token_ids.truncate(last + 1);
        }
        Ok(token_ids)
    }
}

/// The conversation, its cut replies ended at their last full sentence where they have one.
fn trimmed(messages: &[Message], finish_reasons: &[FinishReason]) -> Vec<Message> {
    let mut out = messages.to_vec();
    let replies = out.iter_mut().rev().filter(|message| message.role == Role::Assistant);
    for (reply, reason) in replies.zip(finish_reasons.iter().rev()) {
        if *reason == FinishReason::Length
            && let Some(kept) = last_sentence(&reply.content)
        {
            reply.content = kept.to_owned();
        }
    }
    out
}

fn template_sha256(model: &Model) -> String {
    let source = model.template.as_ref().map_or("", |template| template.source());
    Sha256::digest(source).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn parse(path: &Path, value: Value) -> Result<Reading, Error> {
    serde_json::from_value(value).map_err(|error| wrong(path, "reading rule", &error))
}

fn wrong(path: &Path, field: &str, error: &serde_json::Error) -> Error {
    Error::Field {
        path: PathBuf::from(path),
        field: field.to_owned(),
        expected: "a reading rule that this version knows (template_sha256, cut_reply, head, max_length, cut_side)"
            .to_owned(),
        found: error.to_string(),
    }
}
