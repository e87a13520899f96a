//! Reward models at work, and what the base finds probable.

use anyhow::Result;
use arete_chain::batches::micro_batches;
use arete_chain::constitution::Turns;
use arete_chain::reward_model::{Base, read_stats};
use arete_chain::{Member, RewardModel, Transcript, prompt_of, through_aspect};
use arete_model::{Adapter, Batch, Chat, Decoder, Model, SegmentIdx, logprobs};
use arete_records::rows::ConversationRow;
use arete_records::score_stats::{self, ScoreStats};
use arete_records::{Aspect, FinishReason, Message, Refusal};
use tch::{Device, Kind, Tensor};

use crate::rows::TokensRow;

/// A reward model with the turn that it reads, and what standardises its scores.
pub(crate) type StandardisedModel = (Aspect, RewardModel, ScoreStats);

/// The members of an ensemble over `model`.
///
/// # Errors
///
/// As [`read_stats`] and [`RewardModel::over`]; a refusal of one without statistics.
pub(crate) fn standardised(
    members: &[Member],
    turns: &Turns,
    model: &Model,
) -> Result<Vec<StandardisedModel>> {
    let of_member = |Member { name, turn, dir }: &Member| {
        let stats = read_stats(dir, Some(model))?.ok_or_else(|| {
            let expected = "statistics to standardise with";
            Refusal::file(dir.join(score_stats::FILE), "std", expected, "none")
        })?;
        Ok((turns.names()[*turn], RewardModel::over(dir, name.name(), model)?, stats))
    };
    members.iter().map(of_member).collect()
}

/// The scores of conversations through the reply of each aspect, an entry a conversation.
///
/// # Errors
///
/// A refusal if a row is no chain; The model's failure if a conversation cannot be read.
pub fn aspect_scores(
    reward: &RewardModel,
    base: Base<'_>,
    rows: &[ConversationRow],
    aspects: &[Aspect],
) -> Result<Vec<Vec<f64>>> {
    let mut transcripts = Vec::with_capacity(rows.len() * aspects.len());
    for row in rows {
        for &aspect in aspects {
            let (messages, finish_reasons) = through_aspect(row, aspect)?;
            transcripts.push(Transcript { messages, finish_reasons });
        }
    }
    let (scores, _) = reward.scores(base, &transcripts)?;
    Ok(scores.chunks(aspects.len()).map(<[f64]>::to_vec).collect())
}

/// What the yardstick reads of each row: everything through the answer.
///
/// # Errors
///
/// A refusal if a row is no chain.
pub(crate) fn answers(rows: &[ConversationRow]) -> Result<Vec<Transcript<'_>>> {
    rows.iter()
        .map(|row| {
            let answer = row.aspects().next().ok_or_else(|| {
                arete_records::Refusal::setting("turns", "a chain with an answer", "none")
            })?;
            let (messages, finish_reasons) = through_aspect(row, answer)?;
            Ok(Transcript { messages, finish_reasons })
        })
        .collect()
}

/// Numbers of a tensor `[n]`, in f64.
fn numbers(values: &Tensor) -> Result<Vec<f64>> {
    let values = values.to_kind(Kind::Double).to_device(Device::Cpu);
    Ok(Vec::<f64>::try_from(values).map_err(arete_model::Error::from)?)
}

fn render(
    chat: &Chat<'_>,
    messages: &[Message],
    finish_reason: FinishReason,
) -> Result<arete_model::Rendered> {
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

/// The replies of a chain, their text tokenised anew.
pub(crate) fn marked_chain(chat: &Chat<'_>, row: &ConversationRow, limit: usize) -> Result<Marked> {
    let n_prompt = prompt_of(&row.messages, row.turns.len())?.len();
    // A reply, a question, a reply, …
    let starts: Vec<usize> = (n_prompt..row.messages.len()).step_by(2).collect();
    let last = row.turns.last().map_or(FinishReason::Stop, |turn| turn.finish_reason);
    mark(chat, &row.messages, &starts, last, limit)
}

/// The last reply of a conversation.
pub(crate) fn marked_last(chat: &Chat<'_>, messages: &[Message], limit: usize) -> Result<Marked> {
    mark(chat, messages, &[messages.len() - 1], FinishReason::Stop, limit)
}

/// Tokens of a conversation, those of the replies at `places` marked. What lies beyond `limit` tokens is cut off.
fn mark(
    chat: &Chat<'_>,
    messages: &[Message],
    places: &[usize],
    finish_reason: FinishReason,
    limit: usize,
) -> Result<Marked> {
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

/// log P of every marked reply, at a temperature above 0.
///
/// # Errors
///
/// The model's failure if a sequence is longer than the model's positions.
pub(crate) fn reply_logprobs(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    sequences: &[Marked],
    temperature: f64,
    micro_batch_tokens: usize,
) -> Result<Vec<Vec<ReplyLogprob>>> {
    let _guard = tch::no_grad_guard();
    let lengths: Vec<usize> = sequences.iter().map(|marked| marked.token_ids.len()).collect();
    let mut out = Vec::with_capacity(sequences.len());
    for range in micro_batches(&lengths, micro_batch_tokens)? {
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
            numbers(
                &logprobs::of_rows(decoder, &hidden, &batch, &rows, temperature, false)?.logprob,
            )?
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
