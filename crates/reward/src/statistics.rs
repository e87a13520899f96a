//! Score statistics: where a reward model's scores of the model that PPO starts from lie.
//!
//! They rest on that model's replies to the validation prompts: those among the conversations, and as many more samples of
//! the same prompts as are missing.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use arete_chain::reward_model::sequence_scores;
use arete_chain::sample::{SampledChain, Sampler, Start, key_of};
use arete_chain::{Reading, Transcript, Turns, prompt_of, through_aspect};
use arete_model::generate::{Options, Sampling, Stream};
use arete_model::{Adapter, Chat, Model, ScalarHead};
use arete_records::rows::ConversationRow;
use arete_records::{Aspect, Message, Refusal, ScoreStats, Split, parquet, stats};
use arete_stage::run::RunJson;
use arete_training::not_rendered;
use serde::Serialize;

use crate::Config;

/// The persona of the tuned model among conversations that are another model's as well.
const TUNED: &str = "tuned";
/// Most tokens of a turn, and temperature, where nothing says how the conversations were sampled: PPO's defaults.
const MAX_NEW_TOKENS: usize = 96;
const TEMPERATURE: f64 = 0.7;
/// Samples for statistics are counted from here: no conversation's stream is drawn twice.
const FIRST_SAMPLE: u64 = 1 << 32;
/// Sequences in flight.
const MAX_ROWS: usize = 64;

/// How further replies are sampled.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct StatsSampling {
    /// Fewest replies.
    samples: usize,
    max_new_tokens: usize,
    temperature: f64,
}

impl StatsSampling {
    /// As the settings say, else as the conversations in `conversations` were sampled, else as PPO does by default.
    ///
    /// # Errors
    ///
    /// A refused setting for a temperature or a length that no sampler can use; a damaged `run.json`.
    pub(crate) fn new(config: &Config, conversations: Option<&Path>) -> Result<Self> {
        let run_dir = conversations.and_then(Path::parent);
        let run = match run_dir {
            Some(dir) if dir.join("run.json").is_file() => Some(RunJson::read(dir)?.config),
            _ => None,
        };
        let recorded = |key: &str| run.as_ref().and_then(|config| config.get(key));
        let max_new_tokens = recorded("max_new_tokens").and_then(serde_json::Value::as_u64);
        let max_new_tokens = config
            .stats_max_new_tokens
            .or_else(|| usize::try_from(max_new_tokens?).ok())
            .unwrap_or(MAX_NEW_TOKENS);
        let temperature = config
            .stats_temperature
            .or_else(|| recorded("temperature")?.as_f64())
            .unwrap_or(TEMPERATURE);
        let refuse = |name, expected: &str, got: String| {
            Err(Refusal::setting(name, expected.to_owned(), got).into())
        };
        if max_new_tokens == 0 {
            return refuse("stats_max_new_tokens", "at least 1", "0".to_owned());
        }
        // Greedy replies are all the same: they have no spread to measure.
        if !(temperature.is_finite() && temperature > 0.0) {
            return refuse("stats_temperature", "a number above 0", temperature.to_string());
        }
        Ok(Self { samples: config.stats_samples, max_new_tokens, temperature })
    }
}

/// A validation prompt: what PPO will be asked.
struct Prompt {
    id: String,
    messages: Vec<Message>,
}

/// Conversations to take statistics from.
#[derive(Debug)]
struct Replies {
    sequences: Vec<Vec<i64>>,
    /// The prompt of each, by number.
    prompts: Vec<usize>,
    n_sampled: usize,
}

/// Whose prompts are answered, with which turns, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked<'a> {
    /// The conversations.
    pub(crate) path: &'a Path,
    pub(crate) turns: &'a Turns,
    pub(crate) sampling: StatsSampling,
    pub(crate) seed: u64,
}

/// The base's replies to the validation prompts; what is sampled is sampled once for all aspects.
#[derive(Debug, Default)]
pub(crate) struct BaseReplies {
    sampled: OnceCell<Vec<SampledChain>>,
}

/// The reward model whose scores are meant, and how it reads.
pub(crate) struct Scored<'a> {
    pub(crate) model: &'a Model,
    pub(crate) chat: &'a Chat<'a>,
    pub(crate) adapter: &'a Adapter,
    pub(crate) head: &'a ScalarHead,
    pub(crate) reading: &'a Reading,
    pub(crate) micro_batch_tokens: usize,
}

impl Scored<'_> {
    /// Scores of token sequences.
    pub(crate) fn scores(&self, sequences: &[Vec<i64>]) -> Result<Vec<f64>> {
        let (decoder, adapter) = (&self.model.decoder, Some(self.adapter));
        let budget = self.micro_batch_tokens;
        Ok(sequence_scores(decoder, adapter, self.head, sequences, budget)?)
    }

    fn read(&self, transcript: &Transcript<'_>) -> Result<Vec<i64>, arete_model::Error> {
        let context = self.model.config.max_position_embeddings;
        self.reading.token_ids(self.chat, transcript, context)
    }
}

impl BaseReplies {
    /// Statistics over replies of a turn to the validation prompts; none if there is no validation prompt.
    pub(crate) fn statistics(
        &self,
        asked: Asked<'_>,
        aspect: Aspect,
        scored: &Scored<'_>,
    ) -> Result<Option<ScoreStats>> {
        let Asked { path, turns, sampling, .. } = asked;
        let rows: Vec<ConversationRow> = parquet::read(path)?;
        let prompts = validation_prompts(&rows)?;
        if prompts.is_empty() {
            return Ok(None);
        }
        let mut replies = own_replies(&rows, &prompts, path, aspect, scored)?;
        let n_missing = sampling.samples.saturating_sub(replies.sequences.len());
        if n_missing > 0 {
            let chains = match self.sampled.get() {
                Some(chains) => chains,
                None => {
                    let chains = sample_more(&prompts, n_missing, scored, asked)?;
                    self.sampled.get_or_init(|| chains)
                }
            };
            let place = turns.place(aspect).expect("reward models are of the chain's turns");
            for chain in chains {
                let through = &chain.replies[..=place];
                let transcript = Transcript {
                    messages: chain.messages_through(place),
                    finish_reasons: through.iter().map(|reply| reply.finish_reason).collect(),
                };
                replies.sequences.push(scored.read(&transcript)?);
                replies.prompts.push(chain.prompt);
                replies.n_sampled += 1;
            }
        }
        if replies.sequences.is_empty() {
            return Ok(None);
        }
        let n = replies.sequences.len();
        if n < crate::config::MIN_STATS {
            let wanted = crate::config::MIN_STATS;
            tracing::warn!(n, wanted, "score statistics rest on few replies");
        }
        let scores = scored.scores(&replies.sequences)?;
        let mut distinct = replies.prompts.clone();
        distinct.sort_unstable();
        distinct.dedup();
        let base = &scored.model.base_sha256;
        Ok(Some(ScoreStats {
            n_prompts: distinct.len(),
            source: source(&replies, sampling),
            standard_error: stats::clustered_error(&scores, &replies.prompts),
            ..ScoreStats::of(&scores, Split::Validation.name(), base)
        }))
    }
}

/// Whose replies they are, in words.
fn source(replies: &Replies, sampling: StatsSampling) -> String {
    let StatsSampling { max_new_tokens, temperature, .. } = sampling;
    match replies.n_sampled {
        0 => "the base's replies".to_owned(),
        n => format!(
            "the base's replies, {n} of them sampled for this (temperature {temperature}, at most {max_new_tokens} tokens a turn)"
        ),
    }
}

/// Every validation prompt once, in the order of the rows.
fn validation_prompts(rows: &[ConversationRow]) -> Result<Vec<Prompt>> {
    let mut out: Vec<Prompt> = Vec::new();
    let mut seen = std::collections::BTreeSet::new();
    for row in rows.iter().filter(|row| row.split == Split::Validation) {
        if seen.insert(&row.prompt_id) {
            let messages = prompt_of(&row.messages, row.turns.len())?.to_vec();
            out.push(Prompt { id: row.prompt_id.clone(), messages });
        }
    }
    Ok(out)
}

/// The base's own samples among the conversations, through the aspect's reply, read as PPO and scoring read them. What another
/// model said, or the base under a persona that PPO will not see, is left out.
fn own_replies(
    rows: &[ConversationRow],
    prompts: &[Prompt],
    path: &Path,
    aspect: Aspect,
    scored: &Scored<'_>,
) -> Result<Replies> {
    let numbers: BTreeMap<&str, usize> =
        prompts.iter().enumerate().map(|(idx, prompt)| (prompt.id.as_str(), idx)).collect();
    let mut out = Replies { sequences: Vec::new(), prompts: Vec::new(), n_sampled: 0 };
    for (idx, row) in rows.iter().enumerate() {
        let is_own = row.persona.as_deref().is_none_or(|persona| persona == TUNED);
        if row.split != Split::Validation || !is_own {
            continue;
        }
        let (messages, finish_reasons) = through_aspect(row, aspect)?;
        let transcript = Transcript { messages, finish_reasons };
        let read = scored.read(&transcript).with_context(|| not_rendered(path, idx + 1))?;
        out.sequences.push(read);
        out.prompts.push(numbers[row.prompt_id.as_str()]);
    }
    Ok(out)
}

/// `n` further chains of the base, one prompt after the other and again from the first.
fn sample_more(
    prompts: &[Prompt],
    n: usize,
    scored: &Scored<'_>,
    asked: Asked<'_>,
) -> Result<Vec<SampledChain>> {
    let Asked { turns, sampling, seed, .. } = asked;
    let Scored { model, chat, .. } = scored;
    let sampler = Sampler {
        model,
        chat,
        adapter: None,
        options: Options {
            sampling: Sampling::at(sampling.temperature),
            stop_ids: model.stop_ids()?,
            stop_strings: Vec::new(),
            max_rows: MAX_ROWS,
        },
        max_new_tokens: sampling.max_new_tokens,
        joins: false,
    };
    tracing::info!(
        replies = n,
        prompts = prompts.len(),
        temperature = sampling.temperature,
        "sampling replies of the base for score statistics"
    );
    let mut starts = Vec::new();
    for (idx, prompt) in prompts.iter().enumerate() {
        let n_samples = n / prompts.len() + usize::from(idx < n % prompts.len());
        if n_samples == 0 {
            break; // and none after it: chains keep their prompts' numbers
        }
        let stream =
            |k: usize| Stream { seed, prompt: key_of(&prompt.id), sample: FIRST_SAMPLE + k as u64 };
        let streams = (0..n_samples).map(stream).collect();
        starts.push(Start::new(chat, &prompt.messages, turns.questions(), streams)?);
    }
    Ok(sampler.all(&starts)?.into_iter().flatten().collect())
}
