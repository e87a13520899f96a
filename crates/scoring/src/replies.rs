//! Sampling the three-turn chain.

use std::ops::Range;

use arete_chain::conversation;
use arete_model::generate::{self, Options, Request, Sampling, Sequence, Stream, TurnEnd};
use arete_model::{Adapter, Chat, Model};
use arete_records::rows::{ConversationRow, PromptRow};
use arete_records::{Aspect, FinishReason};

use crate::Error;

/// How chains are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drawing {
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Most tokens sampled in one turn.
    pub max_new_tokens: usize,
    /// Seed of the random streams.
    pub seed: u64,
    /// Chains for each prompt.
    pub n_samples: usize,
}

/// The part of the random streams' keys that belongs to a prompt: the same for every model. An id is 16 hex digits,
/// other files' ids are hashed (FNV-1a).
fn key_of(prompt_id: &str) -> u64 {
    u64::from_str_radix(prompt_id, 16).unwrap_or_else(|_| {
        prompt_id.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
    })
}

/// A sampled chain, as text and as the tokens that were sampled: text in tokens anew may be other tokens.
#[derive(Clone, Debug)]
pub struct SampledChain {
    /// What was said.
    pub row: ConversationRow,
    /// Prompt, replies and what joins them.
    pub token_ids: Vec<i64>,
    /// Where the replies are in `token_ids`, sampled ends of turn included.
    pub replies: [Range<usize>; 3],
}

/// One sampled reply.
struct Reply {
    text: String,
    finish_reason: FinishReason,
    n_tokens: i32,
}

/// One sampled sequence.
struct Chain {
    replies: [Reply; 3],
    token_ids: Vec<i64>,
    ranges: [Range<usize>; 3],
}

/// Samples `drawing.n_samples` chains for every prompt, in the order of prompts and samples. Prompts that, with the
/// longest replies, exceed the model's positions have none.
///
/// # Errors
///
/// Whatever the model or its template refuse.
pub fn sample_chains(
    model: &Model,
    adapter: Option<&Adapter>,
    prompts: &[PromptRow],
    drawing: &Drawing,
) -> Result<Vec<SampledChain>, Error> {
    let chat = model.chat()?;
    let questions: Vec<&str> = Aspect::ALL.iter().filter_map(|aspect| aspect.question()).collect();
    let mut extra_tokens = 0;
    for question in &questions {
        extra_tokens += chat.next_turn(false, question)?.len();
    }
    let (mut fitting, mut requests) = (Vec::new(), Vec::new());
    for prompt in prompts {
        let request = request(&chat, prompt, drawing, extra_tokens)?;
        let longest =
            request.prompt_ids.len() + request.turns * request.max_new_tokens + extra_tokens;
        if longest > model.config.max_position_embeddings {
            tracing::warn!(
                prompt_id = prompt.prompt_id,
                longest,
                "prompt left out: it does not fit the model"
            );
            continue;
        }
        fitting.push(prompt);
        requests.push(request);
    }
    let mut chains: Vec<Vec<Option<Chain>>> =
        requests.iter().map(|request| request.streams.iter().map(|_| None).collect()).collect();
    let mut next_turn = |end: TurnEnd<'_>| {
        let end_was_sampled = end.completion.token_ids.last() == Some(&chat.end_of_turn_id());
        chat.next_turn(end_was_sampled, questions[end.turn])
    };
    let mut finished = |sequence: Sequence| {
        let prompt_ids = &requests[sequence.request].prompt_ids;
        chains[sequence.request][sequence.stream] = Some(chain_of(&chat, &sequence, prompt_ids)?);
        Ok(())
    };
    let options = Options::new(drawing.sampling, model.stop_ids()?);
    generate::run(
        &model.decoder,
        None,
        adapter,
        &requests,
        &options,
        &mut next_turn,
        &mut finished,
    )?;
    let mut rows = Vec::new();
    for (prompt, samples) in fitting.into_iter().zip(chains) {
        for (sample, chain) in (0..).zip(samples) {
            let Chain { replies, token_ids, ranges } =
                chain.expect("generation finishes every sequence");
            let row = row(prompt, sample, replies, drawing.seed);
            rows.push(SampledChain { row, token_ids, replies: ranges });
        }
    }
    Ok(rows)
}

fn chain_of(
    chat: &Chat<'_>,
    sequence: &Sequence,
    prompt_ids: &[i64],
) -> Result<Chain, arete_model::Error> {
    let (mut replies, mut ranges) = (Vec::new(), Vec::new());
    let mut start = prompt_ids.len();
    for (turn, completion) in sequence.turns.iter().enumerate() {
        replies.push(Reply {
            text: chat.reply_text(&completion.token_ids)?,
            finish_reason: completion.finish_reason,
            n_tokens: i32::try_from(completion.token_ids.len()).unwrap_or(i32::MAX),
        });
        let end = start + completion.token_ids.len();
        ranges.push(start..end);
        start = end + sequence.appended.get(turn).map_or(0, Vec::len);
    }
    let three = "a chain of three turns has three replies";
    Ok(Chain {
        replies: replies.try_into().ok().expect(three),
        token_ids: sequence.token_ids(prompt_ids),
        ranges: ranges.try_into().expect(three),
    })
}

fn request(
    chat: &Chat<'_>,
    prompt: &PromptRow,
    drawing: &Drawing,
    extra_tokens: usize,
) -> Result<Request, Error> {
    let (seed, key) = (drawing.seed, key_of(&prompt.prompt_id));
    Ok(Request {
        prompt_ids: chat.render_prompt(&prompt.prompt)?,
        streams: (0..drawing.n_samples as u64)
            .map(|sample| Stream { seed, prompt: key, sample })
            .collect(),
        tails: Vec::new(),
        max_new_tokens: drawing.max_new_tokens,
        turns: Aspect::ALL.len(),
        extra_tokens,
    })
}

fn row(prompt: &PromptRow, sample: i32, replies: [Reply; 3], seed: u64) -> ConversationRow {
    let [action, motivation, consequence] = replies;
    let messages =
        conversation(&prompt.prompt, [&action.text, &motivation.text, &consequence.text]);
    ConversationRow {
        prompt_id: prompt.prompt_id.clone(),
        split: prompt.split,
        sample,
        persona: None,
        messages,
        finish_reason_action: action.finish_reason,
        finish_reason_motivation: motivation.finish_reason,
        finish_reason_consequence: consequence.finish_reason,
        n_tokens_action: action.n_tokens,
        n_tokens_motivation: motivation.n_tokens,
        n_tokens_consequence: consequence.n_tokens,
        action: action.text,
        motivation: motivation.text,
        consequence: consequence.text,
        seed,
    }
}
