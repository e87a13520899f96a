//! What is done of a rollout by each process for its part, put together on all of them: sampling, scoring, log-probabilities.
//!
//! A conversation depends on its own random stream alone, and a token's numbers on what stands before it: on the CPU it does not
//! matter, to the bit, who computes which part.

use std::ops::Range;

use anyhow::Result;
use arete_chain::reward_model::Base;
use arete_chain::sample;
use arete_model::generate::Sequence;
use arete_model::{Adapter, Chat, Decoder, Model, Tensor};
use arete_records::{Class, FinishReason, Message};
use arete_stage::interrupt;
use arete_training::{Ranks, shards};
use serde::{Deserialize, Serialize};

use crate::engines::Serving;
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
    /// Servers that sample in this process's place, and the version of the policy that they are asked for.
    pub(crate) serving: Option<Serving<'a>>,
}

/// What was sampled.
#[derive(Debug)]
pub(crate) struct Sampled {
    pub(crate) conversations: Vec<Conversation>,
    /// Tokens that were sampled now and not by an earlier attempt.
    pub(crate) n_tokens: usize,
}

/// [`Sampler::sample`], each process a run of the prompts; by servers, if there are any.
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
) -> Result<Sampled> {
    let ranks = policy.ranks;
    let n_samples = sampler.samples_per_prompt;
    let known: Vec<bool> = (0..prompts.len() * n_samples)
        .map(|idx| journal.as_ref().is_some_and(|journal| journal.knows(idx)))
        .collect();
    let own = ranks.own_part(prompts.len());
    let first = first + (own.start * n_samples) as u64;
    let mut counted = None;
    let sampled = match (&prompts[own.clone()], policy.serving) {
        ([], None) => Ok(Vec::new()),
        (own, Some(serving)) => {
            serving.sample(policy, &sampler.request(own, purpose, first)).map(|(out, counts)| {
                counted = Some(counts.n_sampled);
                out
            })
        }
        (own_prompts, None) => {
            let mut journal = journal.map(|journal| Part { journal, requests: own.clone() });
            let journal = journal.as_mut().map(|part| part as &mut dyn sample::Journal);
            let Policy { model, chat, adapter, .. } = policy;
            sampler.sample(model, chat, adapter, own_prompts, purpose, first, journal)
        }
    };
    let conversations = if ranks.n_ranks() == 1 {
        sampled?
    } else {
        let mut sampled = ranks.agree(sampled, signal_of)?;
        sampled.iter_mut().for_each(|conversation| conversation.prompt += own.start);
        gathered(ranks, sampled)?
    };
    let n_tokens = match counted {
        Some(n) => ranks.gather_f64(&[n as f64])?.into_iter().flatten().sum::<f64>() as usize,
        None => {
            let new = conversations.iter().zip(&known).filter(|(_, is_known)| !**is_known);
            new.map(|(conversation, _)| conversation.n_own()).sum()
        }
    };
    Ok(Sampled { conversations, n_tokens })
}

/// The conversations of all processes, on each.
fn gathered(ranks: &Ranks, own: Vec<Conversation>) -> Result<Vec<Conversation>> {
    let sent: Vec<Sent> = own.into_iter().map(Sent::from).collect();
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
/// A signal with the signal.
pub(crate) fn check_interrupt(ranks: &Ranks) -> Result<()> {
    ranks.agree(interrupt::check().map_err(anyhow::Error::from), signal_of)
}

pub(crate) fn signal_of(error: &anyhow::Error) -> Option<i32> {
    match arete_training::class_within(error) {
        Some(Class::Signal(signal)) => Some(signal),
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
) -> Result<(Vec<Vec<f64>>, usize)> {
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
) -> Result<Tensor> {
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
