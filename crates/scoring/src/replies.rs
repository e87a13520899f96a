//! Sampling the chain from the prompts of a file.

use arete_chain::Turns;
use arete_chain::sample::{SampledChain, Sampler, Start, key_of};
use arete_model::generate::{Options, Sampling, Stream};
use arete_model::{Adapter, Model};
use arete_records::rows::{ConversationRow, PromptRow};

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
) -> Result<Vec<(ConversationRow, SampledChain)>, Error> {
    let chat = model.chat()?;
    let options = Options::new(drawing.sampling, model.stop_ids()?);
    let max_new_tokens = drawing.max_new_tokens;
    let sampler = Sampler { model, chat: &chat, adapter, options, max_new_tokens, joins: false };
    let (mut fitting, mut starts) = (Vec::new(), Vec::new());
    for prompt in prompts {
        let (seed, key) = (drawing.seed, key_of(&prompt.prompt_id));
        let stream = |sample| Stream { seed, prompt: key, sample };
        let streams = (0..drawing.n_samples as u64).map(stream).collect();
        let start = Start::new(&chat, &prompt.prompt, turns.questions(), streams)?;
        let longest = sampler.n_longest(&start)?;
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
    let mut out = Vec::new();
    for (prompt, chains) in fitting.into_iter().zip(sampler.all(&starts)?) {
        for (sample, chain) in (0..).zip(chains) {
            out.push((chain.row(prompt, &turns.names(), sample, drawing.seed), chain));
        }
    }
    Ok(out)
}
