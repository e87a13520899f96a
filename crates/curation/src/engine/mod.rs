//! Who answers: a model in this process, or an OpenAI-compatible server.

pub mod fleet;
pub mod local;
pub mod server;

use std::collections::BTreeMap;

use anyhow::Result;
use arete_model::generate::Sampling;
use arete_records::{FinishReason, Message, Refusal};
use arete_stage::exit::Unavailable;

use crate::judge::verdict::LabelMass;

pub use self::fleet::FleetEngine;
pub use self::local::LocalEngine;
pub use self::server::ServerEngine;

/// A conversation to continue: the first reply to `messages`, then a reply to each question.
#[derive(Debug, Clone)]
pub struct Chain {
    /// What the first reply answers.
    pub messages: Vec<Message>,
    /// What is asked after each reply but the last.
    pub questions: Vec<String>,
    /// The prompt's part of the key of the random streams.
    pub key: u64,
    /// The samples to draw: each one's part of the key of its stream.
    pub samples: Vec<u64>,
}

/// How replies are drawn.
#[derive(Debug, Clone, Copy)]
pub struct Drawing {
    /// The run's seed.
    pub seed: u64,
    /// Temperature, top-k, top-p.
    pub sampling: Sampling,
    /// Most tokens of one reply.
    pub max_new_tokens: usize,
    /// The replies are verdicts: a server that refuses one gives an abstention (an empty, counted reply), no error.
    pub is_verdict: bool,
}

/// One reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// What was said, without what ends the turn.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Tokens sampled.
    pub n_tokens: usize,
}

/// A question to a judge, and how its reply begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    /// What the judge is told.
    pub messages: Vec<Message>,
    /// Words put into the judge's mouth, after which its label is read; a server is not given any.
    pub opening: String,
}

/// The two answers a judge chooses from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Labels {
    /// Spelling of the first.
    pub first: &'static str,
    /// Spelling of the second.
    pub second: &'static str,
}

impl Labels {
    /// Of a comparison.
    pub const AB: Self = Self { first: "A", second: "B" };
    /// Of a question about one answer.
    pub const YES_NO: Self = Self { first: "Yes", second: "No" };
}

/// Why a server will not have a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused(pub String);

/// What became of a chain: the replies of each sample, or why there are none.
pub type Outcome = Result<Vec<Vec<Reply>>, Refused>;

/// Texts by how often they were counted, the most frequent first.
pub(crate) fn by_frequency(counts: &BTreeMap<String, usize>) -> Vec<(String, usize)> {
    let mut counts: Vec<(String, usize)> =
        counts.iter().map(|(text, n)| (text.clone(), *n)).collect();
    counts.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    counts
}

/// The samples of every chain as they come in, in any order.
struct Parts(Vec<Vec<Option<Vec<Reply>>>>);

impl Parts {
    fn of(chains: &[Chain]) -> Self {
        Self(chains.iter().map(|chain| vec![None; chain.samples.len()]).collect())
    }

    /// Takes in a sample; all of its chain if that was the last.
    fn put(&mut self, chain: usize, sample: usize, replies: Vec<Reply>) -> Option<Vec<Vec<Reply>>> {
        let samples = &mut self.0[chain];
        samples[sample] = Some(replies);
        if samples.iter().any(Option::is_none) {
            return None;
        }
        std::mem::take(samples).into_iter().collect()
    }
}

/// A model that talks and judges.
#[derive(Debug)]
pub enum Engine {
    /// In this process.
    Local(Box<LocalEngine>),
    /// Behind an OpenAI-compatible address.
    Server(ServerEngine),
    /// In this process, but that servers sample for it.
    Fleet(Box<FleetEngine>),
}

impl Engine {
    /// Draws every sample of every chain: replies by chain, sample and turn.
    ///
    /// # Errors
    ///
    /// The local model's, or a server that fails after all retries or refuses one of the chains.
    pub fn chains(&self, chains: &[Chain], drawing: &Drawing) -> Result<Vec<Vec<Vec<Reply>>>> {
        let refused =
            |Refused(reason)| Unavailable(format!("{}: reply: {reason}", self.name())).into();
        self.outcomes(chains, drawing)?
            .into_iter()
            .map(|outcome| outcome.map_err(refused))
            .collect()
    }

    /// [`Engine::chains`], each of which a server may refuse.
    ///
    /// # Errors
    ///
    /// The local model's, or a server that fails after all retries.
    pub fn outcomes(&self, chains: &[Chain], drawing: &Drawing) -> Result<Vec<Outcome>> {
        let mut out = vec![Ok(Vec::new()); chains.len()];
        self.chains_each(chains, drawing, &mut |idx, outcome| {
            out[idx] = outcome;
            Ok(())
        })?;
        Ok(out)
    }

    /// [`Engine::chains`] that hands over each chain (by its index) when its last sample has ended:
    /// as many sequences as the engine takes stay in flight until the last chain has begun.
    ///
    /// # Errors
    ///
    /// As [`Engine::chains`], or what `done` returns, which ends the work.
    pub fn chains_each(
        &self,
        chains: &[Chain],
        drawing: &Drawing,
        done: &mut dyn FnMut(usize, Outcome) -> Result<()>,
    ) -> Result<()> {
        match self {
            Self::Local(engine) => engine.chains_each(chains, drawing, done),
            Self::Server(engine) => engine.chains_each(chains, drawing, done),
            Self::Fleet(engine) => engine.chains_each(chains, drawing, done),
        }
    }

    /// The probability of each label as the next token, for every query.
    ///
    /// A query that the model cannot take (longer than its positions) and an answer of a server that
    /// makes no sense are abstentions: both masses 0.
    ///
    /// # Errors
    ///
    /// The local model's, or a server that fails after all retries.
    pub fn label_masses(&self, queries: &[Query], labels: Labels) -> Result<Vec<LabelMass>> {
        match self {
            Self::Local(engine) => engine.label_masses(queries, labels),
            Self::Server(engine) => engine.label_masses(queries, labels),
            Self::Fleet(engine) => engine.model().label_masses(queries, labels),
        }
    }

    /// Questions so far that a server refused, or answered with nonsense: counted as abstentions.
    pub fn n_refused(&self) -> usize {
        match self {
            Self::Local(_) | Self::Fleet(_) => 0,
            Self::Server(engine) => engine.n_abstentions(),
        }
    }

    /// What verdicts began with instead of a label, the most frequent first.
    pub fn instead(&self) -> Vec<(String, usize)> {
        match self {
            Self::Local(engine) => engine.instead(),
            Self::Server(engine) => engine.instead(),
            Self::Fleet(engine) => engine.model().instead(),
        }
    }

    /// Σ log P of each conversation's last message given what precedes it, in nats; NaN of a
    /// conversation longer than the model's positions.
    ///
    /// # Errors
    ///
    /// The local model's; A refused setting for a server, which does not tell.
    pub fn reply_logprobs(&self, conversations: &[Vec<Message>]) -> Result<Vec<f64>> {
        match self {
            Self::Local(engine) => engine.reply_logprobs(conversations),
            Self::Fleet(engine) => engine.model().reply_logprobs(conversations),
            Self::Server(_) => Err(Refusal::setting(
                "method",
                "a method that a server can serve",
                "likelihood, which needs a local model",
            )
            .into()),
        }
    }

    /// Whether the messages and so many new tokens fit the model's positions. A server decides
    /// for itself.
    ///
    /// # Errors
    ///
    /// A template or tokenizer that refuses the messages.
    pub fn fits(&self, chain: &Chain, max_new_tokens: usize) -> Result<bool> {
        match self {
            Self::Local(engine) => engine.fits(chain, max_new_tokens),
            Self::Fleet(engine) => engine.model().fits(chain, max_new_tokens),
            Self::Server(_) => Ok(true),
        }
    }

    /// Tokens of a conversation's prompt; `None` if only a server knows.
    ///
    /// # Errors
    ///
    /// A template or tokenizer that refuses the messages.
    pub fn n_tokens(&self, messages: &[Message]) -> Result<Option<usize>> {
        match self {
            Self::Local(engine) => engine.n_tokens(messages).map(Some),
            Self::Fleet(engine) => engine.model().n_tokens(messages).map(Some),
            Self::Server(_) => Ok(None),
        }
    }

    /// The model's name for the `judge` column.
    pub fn name(&self) -> &str {
        match self {
            Self::Local(engine) => engine.name(),
            Self::Server(engine) => engine.name(),
            Self::Fleet(engine) => engine.model().name(),
        }
    }
}
