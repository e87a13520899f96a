//! Sampling the three-turn chain.

use arete_model::generate::{self, Options, Request, Sampling, Sequence, Stream, TurnEnd};
use arete_model::{Adapter, Chat, Model, chain};
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

/// One sampled reply.
struct Reply {
    text: String,
    finish_reason: FinishReason,
    n_tokens: i32,
}

/// Samples `drawing.n_samples` chains for every prompt; rows in the order of prompts and samples. Prompts that, with the
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
) -> Result<Vec<ConversationRow>, Error> {
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
    let mut chains: Vec<Vec<Vec<Reply>>> = requests
        .iter()
        .map(|request| request.streams.iter().map(|_| Vec::new()).collect())
        .collect();
    let mut next_turn = |end: TurnEnd<'_>| {
        let end_was_sampled = end.completion.token_ids.last() == Some(&chat.end_of_turn_id());
        chat.next_turn(end_was_sampled, questions[end.turn])
    };
    let mut finished = |sequence: Sequence| {
        let replies = &mut chains[sequence.request][sequence.stream];
        for turn in sequence.turns {
            replies.push(Reply {
                text: chat.reply_text(&turn.token_ids)?,
                finish_reason: turn.finish_reason,
                n_tokens: i32::try_from(turn.token_ids.len()).unwrap_or(i32::MAX),
            });
        }
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
        for (sample, replies) in (0..).zip(samples) {
            rows.push(row(prompt, sample, replies, drawing.seed));
        }
    }
    Ok(rows)
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
        max_new_tokens: drawing.max_new_tokens,
        turns: Aspect::ALL.len(),
        extra_tokens,
    })
}

fn row(prompt: &PromptRow, sample: i32, replies: Vec<Reply>, seed: u64) -> ConversationRow {
    let Ok([action, motivation, consequence]) = <[Reply; 3]>::try_from(replies) else {
        unreachable!("a chain of three turns has three replies");
    };
    let messages =
        chain::conversation(&prompt.prompt, [&action.text, &motivation.text, &consequence.text]);
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
