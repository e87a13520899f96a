//! Sampling the chain from the prompts of a file.

use anyhow::Result;
use arete_chain::Turns;
use arete_chain::sample::{SampledChain, Sampler, Start, key_of};
use arete_model::generate::{Options, Sampling, Stream};
use arete_model::{Adapter, Chat, Model};
use arete_records::rows::{ConversationRow, PromptRow};

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

/// Samples `drawing.n_samples` chains for every prompt, in the order of prompts and samples: as rows, and as they were
/// sampled. Prompts that, with the longest replies, exceed the model's positions have none.
///
/// # Errors
///
/// Whatever the model or its template refuse.
pub fn sample_chains(
    model: &Model,
    adapter: Option<&Adapter>,
    prompts: &[PromptRow],
    turns: &Turns,
    drawing: &Drawing,
) -> Result<Vec<(ConversationRow, SampledChain)>> {
    let chat = model.chat()?;
    let options = Options::new(drawing.sampling, model.stop_ids()?);
    let max_new_tokens = drawing.max_new_tokens;
    let sampler = Sampler { model, chat: &chat, adapter, options, max_new_tokens, joins: false };
    let (fitting, starts) = starts(model, &chat, prompts, turns, drawing)?;
    Ok(rows(&fitting, sampler.all(&starts)?, turns, drawing))
}

/// The prompts that fit the model with the longest replies, and the chains that begin with them.
///
/// # Errors
///
/// What the template refuses.
pub(crate) fn starts<'a>(
    model: &Model,
    chat: &Chat<'_>,
    prompts: &'a [PromptRow],
    turns: &'a Turns,
    drawing: &Drawing,
) -> Result<(Vec<&'a PromptRow>, Vec<Start<'a>>)> {
    let n_questions = Sampler::n_question_tokens(chat, &turns.questions())?;
    let n_replies = turns.len() * drawing.max_new_tokens;
    let (mut fitting, mut starts) = (Vec::new(), Vec::new());
    for prompt in prompts {
        let (seed, key) = (drawing.seed, key_of(&prompt.prompt_id));
        let stream = |sample| Stream { seed, prompt: key, sample };
        let streams = (0..drawing.n_samples as u64).map(stream).collect();
        let start = Start::new(chat, &prompt.prompt, turns.questions(), streams)?;
        let longest = start.prompt_ids.len() + n_replies + n_questions;
        if longest > model.config.max_position_embeddings {
            tracing::warn!(
                prompt_id = prompt.prompt_id,
                longest,
                "prompt left out: it does not fit the model"
            );
            continue;
        }
        fitting.push(prompt);
        starts.push(start);
    }
    Ok((fitting, starts))
}

/// Chains by prompt and sample as rows, and as they were sampled.
pub(crate) fn rows(
    prompts: &[&PromptRow],
    chains: Vec<Vec<SampledChain>>,
    turns: &Turns,
    drawing: &Drawing,
) -> Vec<(ConversationRow, SampledChain)> {
    let mut out = Vec::new();
    for (prompt, chains) in prompts.iter().zip(chains) {
        for (sample, chain) in (0..).zip(chains) {
            out.push((chain.row(prompt, &turns.names(), sample, drawing.seed), chain));
        }
    }
    out
}
