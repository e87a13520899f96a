//! What is done of a rollout by each process for its part, put together on all of them: sampling, scoring, log-probabilities.
//!
//! A conversation depends on its own random stream alone, and a token's numbers on what stands before it: on the CPU it does not
//! matter, to the bit, who computes which part.

use std::ops::Range;

use arete_chain::reward_model::Base;
use arete_chain::sample;
use arete_model::generate::Sequence;
use arete_model::{Adapter, Chat, Decoder, Model, Tensor};
use arete_records::{FinishReason, Message};
use arete_stage::interrupt;
use arete_training::{Ranks, shards};
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::journal::Journal;
use crate::prompts::Prompt;
use crate::rollout::{Conversation, Purpose, Reply, Sampler, own_logprobs};
use crate::scorer::RewardModels;

/// Who samples, from what.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Policy<'a> {
    pub(crate) ranks: &'a Ranks,
    pub(crate) model: &'a Model,
    pub(crate) chat: &'a Chat<'a>,
    pub(crate) adapter: Option<&'a Adapter>,
}

/// [`Sampler::sample`], each process a run of the prompts.
///
/// # Errors
///
/// As there; a signal on one process is one on all.
pub(crate) fn sample<'a>(
    policy: Policy<'a>,
    sampler: &'a Sampler,
    prompts: &[&'a Prompt],
    purpose: Purpose,
    first: u64,
    journal: Option<&mut Journal>,
) -> Result<Vec<Conversation>, Error> {
    let Policy { ranks, model, chat, adapter } = policy;
    if ranks.n_ranks() == 1 {
        let journal = journal.map(|journal| journal as &mut dyn sample::Journal);
        return sampler.sample(model, chat, adapter, prompts, purpose, first, journal);
    }
    let own = ranks.own_part(prompts.len());
    let first = first + (own.start * sampler.samples_per_prompt) as u64;
    let mut journal = journal.map(|journal| Part { journal, requests: own.clone() });
    let journal = journal.as_mut().map(|part| part as &mut dyn sample::Journal);
    let sampled = match &prompts[own.clone()] {
        [] => Ok(Vec::new()),
        own => sampler.sample(model, chat, adapter, own, purpose, first, journal),
    };
    let mut sampled = ranks.agree(sampled, signal_of)?;
    sampled.iter_mut().for_each(|conversation| conversation.prompt += own.start);
    let sent: Vec<Sent> = sampled.into_iter().map(Sent::from).collect();
    let sent = serde_json::to_vec(&sent).expect("numbers and text serialise");
    let mut all = Vec::new();
    for part in ranks.gather(&sent)? {
        let part: Vec<Sent> = serde_json::from_slice(&part).map_err(|error| {
            let what = format!("conversations of another version: {error}");
            arete_training::Error::Ranks { what }
        })?;
        all.extend(part.into_iter().map(Conversation::from));
    }
    Ok(all)
}

/// Fails on every process once a signal has come in on any. Call it where stopping loses nothing.
///
/// # Errors
///
/// [`Error::Interrupted`] with the signal.
pub(crate) fn check_interrupt(ranks: &Ranks) -> Result<(), Error> {
    ranks.agree(interrupt::check().map_err(Error::from), signal_of)
}

fn signal_of(error: &Error) -> Option<i32> {
    match error {
        Error::Interrupted(interrupted) => Some(interrupted.signal),
        _ => None,
    }
}

/// [`RewardModels::raw_scores`], each process a run of the conversations.
///
/// # Errors
///
/// As there.
pub(crate) fn raw_scores(
    ranks: &Ranks,
    rewards: &RewardModels,
    base: Base<'_>,
    conversations: &[Conversation],
) -> Result<(Vec<Vec<f64>>, usize), Error> {
    if ranks.n_ranks() == 1 {
        return rewards.raw_scores(base, conversations);
    }
    let own = &conversations[ranks.own_part(conversations.len())];
    let (scores, n_tokens) = match own {
        [] => (Vec::new(), 0),
        own => rewards.raw_scores(base, own)?,
    };
    let n_read: usize =
        ranks.gather_f64(&[n_tokens as f64])?.into_iter().flatten().map(|n| n as usize).sum();
    Ok((shards::gather(ranks, &scores)?, n_read))
}

/// [`own_logprobs`], each process a run of the conversations.
///
/// # Errors
///
/// As there.
pub(crate) fn logprobs(
    ranks: &Ranks,
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    conversations: &[Conversation],
    temperature: f64,
    budget: usize,
) -> Result<Tensor, Error> {
    if ranks.n_ranks() == 1 {
        return own_logprobs(decoder, adapter, conversations, temperature, budget);
    }
    let own = &conversations[ranks.own_part(conversations.len())];
    let own: Vec<f32> = match own {
        [] => Vec::new(),
        own => Vec::try_from(own_logprobs(decoder, adapter, own, temperature, budget)?)?,
    };
    let all = ranks.gather(&to_bytes(&own))?;
    Ok(Tensor::from_slice(&all.iter().flat_map(|part| from_bytes(part)).collect::<Vec<f32>>()))
}

/// Numbers as they travel.
pub(crate) fn to_bytes(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// And as they arrive.
pub(crate) fn from_bytes(bytes: &[u8]) -> impl Iterator<Item = f32> + '_ {
    bytes.chunks(4).map(|four| f32::from_le_bytes(four.try_into().expect("four bytes")))
}

/// The journal of a rollout as a part of its prompts sees it.
struct Part<'a> {
    journal: &'a mut Journal,
    requests: Range<usize>,
}

impl sample::Journal for Part<'_> {
    /// What an earlier attempt with another number of processes left of other parts is theirs to sample.
    fn take_known(&mut self) -> Vec<Sequence> {
        let mut known = self.journal.take_known();
        known.retain(|sequence| self.requests.contains(&sequence.request));
        known.iter_mut().for_each(|sequence| sequence.request -= self.requests.start);
        known
    }

    fn append(&mut self, sequence: &Sequence) -> std::io::Result<()> {
        let request = sequence.request + self.requests.start;
        self.journal.append(&Sequence { request, ..sequence.clone() })
    }
}

/// A conversation as it travels; log-probabilities as bits, which no parser rounds.
#[derive(Serialize, Deserialize)]
struct Sent {
    prompt: usize,
    token_ids: Vec<i64>,
    n_prompt: usize,
    replies: Vec<(Range<usize>, FinishReason)>,
    logprob_bits: Vec<u32>,
    messages: Vec<Message>,
}

impl From<Conversation> for Sent {
    fn from(own: Conversation) -> Self {
        let Conversation { prompt, token_ids, n_prompt, replies, sampled_logprob, messages } = own;
        Self {
            prompt,
            token_ids,
            n_prompt,
            replies: replies.into_iter().map(|r| (r.tokens, r.finish_reason)).collect(),
            logprob_bits: sampled_logprob.into_iter().map(f32::to_bits).collect(),
            messages,
        }
    }
}

impl From<Sent> for Conversation {
    fn from(sent: Sent) -> Self {
        let Sent { prompt, token_ids, n_prompt, replies, logprob_bits, messages } = sent;
        let reply = |(tokens, finish_reason)| Reply { tokens, finish_reason };
        Self {
            prompt,
            token_ids,
            n_prompt,
            replies: replies.into_iter().map(reply).collect(),
            sampled_logprob: logprob_bits.into_iter().map(f32::from_bits).collect(),
            messages,
        }
    }
}
