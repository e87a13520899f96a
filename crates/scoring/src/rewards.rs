//! Reward models at work, and what the base finds probable.

use std::ops::Range;
use std::path::{Path, PathBuf};

use arete_chain::aspect_conversation;
use arete_model::{
    Adapter, Batch, Chat, Decoder, Model, Nf4Options, ScalarHead, SegmentIdx, Source,
    adapter_files, logprobs,
};
use arete_records::rows::ConversationRow;
use arete_records::{Aspect, FinishReason, Message};
use tch::{Device, Kind, Tensor};

use crate::Error;
use crate::policies::{base_of_adapter, load_adapter};
use crate::rows::TokensRow;

/// The adapter's directory inside a reward model's directory (or that directory itself).
pub(crate) fn adapter_dir(dir: &Path) -> PathBuf {
    let inner = dir.join("adapter");
    if inner.is_dir() { inner } else { dir.to_owned() }
}

/// A scalar head with the adapter it reads through (none if merged into the model).
#[derive(Debug)]
pub struct RewardModel {
    adapter: Option<Adapter>,
    head: ScalarHead,
}

impl RewardModel {
    /// Reads the reward model in `dir` (with `adapter/` in it, or an adapter itself) over `model`.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] if a file is unusable or belongs to another base, [`Error::File`] if there is no head.
    pub fn load(dir: &Path, name: &str, model: &Model) -> Result<Self, Error> {
        let dir = adapter_dir(dir);
        let loaded = load_adapter(&dir, name, model)?;
        let head = loaded.head.ok_or_else(|| Error::File {
            path: dir,
            field: "score head".to_owned(),
            expected: "an adapter that saved its head (modules_to_save)".to_owned(),
            found: "none".to_owned(),
        })?;
        Ok(Self { adapter: Some(loaded.adapter), head })
    }

    /// The head of a merged reward model.
    ///
    /// # Errors
    ///
    /// [`Error::File`] if `model` has none.
    pub fn merged(model: &Model, path: &Path) -> Result<Self, Error> {
        let head = model.head.as_ref().ok_or_else(|| Error::File {
            path: path.to_owned(),
            field: "score.weight".to_owned(),
            expected: "a …ForSequenceClassification model".to_owned(),
            found: "none".to_owned(),
        })?;
        let head = ScalarHead { weight: head.weight.shallow_clone() };
        Ok(Self { adapter: None, head })
    }

    /// The scores of conversations through the reply of `aspect`; `chat` is `model`'s.
    ///
    /// # Errors
    ///
    /// As [`reward_input`] and [`RewardModel::scores`].
    pub(crate) fn conversation_scores(
        &self,
        model: &Model,
        chat: &Chat<'_>,
        rows: &[ConversationRow],
        aspect: Aspect,
        micro_batch_tokens: usize,
    ) -> Result<Vec<f64>, Error> {
        let limit = model.config.max_position_embeddings;
        let sequences: Vec<Vec<i64>> = rows
            .iter()
            .map(|row| reward_input(chat, row, aspect, limit))
            .collect::<Result<_, _>>()?;
        self.scores(&model.decoder, &sequences, micro_batch_tokens)
    }

    /// The score of every sequence, read at its last token.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] if a sequence is longer than the model's positions.
    pub fn scores(
        &self,
        decoder: &Decoder,
        sequences: &[Vec<i64>],
        micro_batch_tokens: usize,
    ) -> Result<Vec<f64>, Error> {
        let _guard = tch::no_grad_guard();
        let lengths: Vec<usize> = sequences.iter().map(Vec::len).collect();
        let mut out = Vec::with_capacity(sequences.len());
        for range in micro_batches(&lengths, micro_batch_tokens) {
            let part = &sequences[range];
            let batch = Batch::from_sequences(part);
            let rows: Vec<i64> =
                (0..part.len()).map(|idx| batch.last_row(SegmentIdx(idx)) as i64).collect();
            let hidden = decoder.forward(&batch, self.adapter.as_ref())?; // [N, D]
            let rows = Tensor::from_slice(&rows).to_device(hidden.device());
            out.extend(numbers(&self.head.forward(&hidden.index_select(0, &rows)))?);
        }
        Ok(out)
    }
}

/// Where a reward model with a base of its own lies: merged, or an adapter and what it belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct YardstickPlace {
    /// The merged model, or the base.
    pub source: Source,
    /// The adapter over the base.
    pub adapter: Option<PathBuf>,
    /// How the base is held: as in the adapter's training, whatever the recipe does with its own models, so that every recipe
    /// is measured by the same numbers.
    pub nf4: Option<Nf4Options>,
}

impl YardstickPlace {
    /// `base`: of the adapter, if it is not the one that the adapter names.
    ///
    /// # Errors
    ///
    /// [`Error::File`] if the adapter names no base; [`Error::Model`] if that cannot be a model or the adapter's files are
    /// damaged.
    pub(crate) fn resolve(dir: &Path, base: Option<&str>) -> Result<Self, Error> {
        if dir.join("config.json").is_file() {
            return Ok(Self {
                source: Source::Directory(dir.to_owned()),
                adapter: None,
                nf4: None,
            });
        }
        let adapter = adapter_dir(dir);
        let base = match base {
            Some(base) => base.to_owned(),
            None => base_of_adapter(&adapter)?,
        };
        let nf4 = adapter_files::packing(&adapter)?;
        Ok(Self { source: Source::fetch(&base)?, adapter: Some(adapter), nf4 })
    }

    /// Its files, for hashing, by name.
    pub(crate) fn files(&self) -> impl Iterator<Item = (String, PathBuf)> {
        [("yardstick base", self.source.local_path()), ("yardstick", self.adapter.as_deref())]
            .into_iter()
            .filter_map(|(name, path)| Some((name.to_owned(), path?.to_owned())))
    }

    /// The reward model over `model`, which is the loaded [`YardstickPlace::source`].
    ///
    /// # Errors
    ///
    /// As [`RewardModel::load`] and [`RewardModel::merged`].
    pub(crate) fn reward_model(&self, model: &Model) -> Result<RewardModel, Error> {
        match &self.adapter {
            Some(dir) => RewardModel::load(dir, "yardstick", model),
            None => RewardModel::merged(
                model,
                self.source.local_path().unwrap_or(Path::new("yardstick")),
            ),
        }
    }
}

/// Consecutive groups of at most `budget` tokens; a longer sequence is a group of its own.
pub(crate) fn micro_batches(lengths: &[usize], budget: usize) -> Vec<Range<usize>> {
    let mut out = Vec::new();
    let (mut start, mut n_tokens) = (0, 0);
    for (idx, length) in lengths.iter().enumerate() {
        if idx > start && n_tokens + length > budget {
            out.push(start..idx);
            (start, n_tokens) = (idx, 0);
        }
        n_tokens += length;
    }
    if start < lengths.len() {
        out.push(start..lengths.len());
    }
    out
}

/// Numbers of a tensor `[n]`, in f64.
fn numbers(values: &Tensor) -> Result<Vec<f64>, Error> {
    let values = values.to_kind(Kind::Double).to_device(Device::Cpu);
    Ok(Vec::<f64>::try_from(values).map_err(arete_model::Error::from)?)
}

/// What a reward model reads of a conversation for one aspect: everything through that aspect's reply, without an end of
/// turn if the reply was cut off. Longer than `limit` tokens, the beginning goes.
///
/// # Errors
///
/// What the template or the tokenizer refuse.
pub fn reward_input(
    chat: &Chat<'_>,
    row: &ConversationRow,
    aspect: Aspect,
    limit: usize,
) -> Result<Vec<i64>, Error> {
    let messages = aspect_conversation(&row.messages, aspect)?;
    let mut token_ids = render(chat, messages, row.finish_reason(aspect))?.token_ids;
    if token_ids.len() > limit {
        token_ids.drain(..token_ids.len() - limit);
    }
    Ok(token_ids)
}

fn render(
    chat: &Chat<'_>,
    messages: &[Message],
    finish_reason: FinishReason,
) -> Result<arete_model::Rendered, Error> {
    Ok(match finish_reason {
        FinishReason::Stop => chat.render(messages)?,
        FinishReason::Length => chat.render_truncated(messages)?,
    })
}

/// The log-probability of a reply: summed over its own tokens (its end of turn included), nats, and their number.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ReplyLogprob {
    /// Σ log P.
    pub sum: f64,
    /// Number of tokens.
    pub n_tokens: usize,
}

impl ReplyLogprob {
    /// Per token; none of no token.
    pub fn mean(&self) -> Option<f64> {
        (self.n_tokens > 0).then(|| self.sum / self.n_tokens as f64)
    }
}

/// Tokens, and which of them belong to which reply.
#[derive(Debug)]
pub(crate) struct Marked {
    token_ids: Vec<i64>,
    /// Own tokens of each reply of interest.
    replies: Vec<Vec<usize>>,
}

/// The sampled replies of a chain; what lies beyond `limit` tokens is cut off.
pub(crate) fn sampled_chain(row: &TokensRow, limit: usize) -> Marked {
    let mut token_ids: Vec<i64> = row.token_ids.iter().copied().map(i64::from).collect();
    token_ids.truncate(limit);
    let place = |at: i32| usize::try_from(at).unwrap_or(0).min(token_ids.len());
    let replies = row
        .bounds
        .chunks_exact(2)
        .map(|bounds| (place(bounds[0])..place(bounds[1])).collect())
        .collect();
    Marked { token_ids, replies }
}

/// The three replies of a chain, their text tokenised anew.
pub(crate) fn marked_chain(
    chat: &Chat<'_>,
    row: &ConversationRow,
    limit: usize,
) -> Result<Marked, Error> {
    let n_messages = row.messages.len();
    // The replies stand at n − 5, n − 3, n − 1.
    let starts = [n_messages - 5, n_messages - 3, n_messages - 1];
    mark(chat, &row.messages, &starts, row.finish_reason_consequence, limit)
}

/// The last reply of a conversation.
pub(crate) fn marked_last(
    chat: &Chat<'_>,
    messages: &[Message],
    limit: usize,
) -> Result<Marked, Error> {
    mark(chat, messages, &[messages.len() - 1], FinishReason::Stop, limit)
}

/// Tokens of a conversation, those of the replies at `places` marked. What lies beyond `limit` tokens is cut off.
fn mark(
    chat: &Chat<'_>,
    messages: &[Message],
    places: &[usize],
    finish_reason: FinishReason,
    limit: usize,
) -> Result<Marked, Error> {
    let mut rendered = render(chat, messages, finish_reason)?;
    rendered.token_ids.truncate(limit);
    rendered.own.truncate(limit);
    let mut starts = Vec::new();
    for &place in places {
        // Nothing predicts the first token of all.
        starts.push(chat.render_prompt(&messages[..place])?.len().max(1));
    }
    let mut replies = Vec::new();
    for (idx, &start) in starts.iter().enumerate() {
        let end =
            starts.get(idx + 1).map_or(rendered.own.len(), |&next| next.min(rendered.own.len()));
        replies.push((start..end).filter(|&at| rendered.own[at]).collect());
    }
    Ok(Marked { token_ids: rendered.token_ids, replies })
}

/// log P of every marked reply, at temperature 1.
///
/// # Errors
///
/// [`Error::Model`] if a sequence is longer than the model's positions.
pub(crate) fn reply_logprobs(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    sequences: &[Marked],
    micro_batch_tokens: usize,
) -> Result<Vec<Vec<ReplyLogprob>>, Error> {
    let _guard = tch::no_grad_guard();
    let lengths: Vec<usize> = sequences.iter().map(|marked| marked.token_ids.len()).collect();
    let mut out = Vec::with_capacity(sequences.len());
    for range in micro_batches(&lengths, micro_batch_tokens) {
        let part = &sequences[range];
        let token_ids: Vec<&[i64]> =
            part.iter().map(|marked| marked.token_ids.as_slice()).collect();
        let batch = Batch::from_sequences(&token_ids);
        let mut rows = Vec::new();
        for (idx, marked) in part.iter().enumerate() {
            let first = batch.rows(SegmentIdx(idx)).start;
            rows.extend(marked.replies.iter().flatten().map(|at| first + at));
        }
        let values = if rows.is_empty() {
            Vec::new()
        } else {
            let hidden = decoder.forward(&batch, adapter)?; // [N, D]
            numbers(&logprobs::of_rows(decoder, &hidden, &batch, &rows, 1.0, false)?.logprob)?
        };
        let mut values = values.into_iter();
        for marked in part {
            let reply = |tokens: &Vec<usize>| ReplyLogprob {
                sum: values.by_ref().take(tokens.len()).sum(),
                n_tokens: tokens.len(),
            };
            out.push(marked.replies.iter().map(reply).collect());
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn micro_batches_keep_the_order_and_the_budget() {
        assert_eq!(micro_batches(&[4, 4, 4, 9, 1, 1], 8), [0..2, 2..3, 3..4, 4..6]);
        assert_eq!(micro_batches(&[20], 8), std::slice::from_ref(&(0..1)));
        assert!(micro_batches(&[], 8).is_empty());
    }
}
