//! Rollouts: conversations sampled by the policy, and their log-probabilities under any adapter.

use anyhow::Result;
use arete_chain::Turns;
use arete_chain::sample::{self, Start};
use arete_engine::chains::{Asked, Weights};
use arete_model::generate::{self, Sampling, Stream};
use arete_model::{Adapter, Chat, Decoder, Model, Tensor, logprobs};
use arete_stage::interrupt;
use tch::{Device, Kind};

use crate::config::RolloutKind;
use crate::engines::Request;
use crate::packs::Pack;
use crate::prompts::Prompt;

pub use arete_chain::sample::{Reply, SampledChain as Conversation};

/// What a sequence of random numbers is for; keeps rollouts, probes and statistics apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Rollouts to learn from.
    Rollout,
    /// Probes on validation prompts.
    Probe,
    /// Conversations of the reference that standardise scores.
    Statistics,
}

impl Purpose {
    /// The counter of a stream: rollouts are counted over the whole run, so no two conversations share one.
    fn stream(self, seed: u64, counter: u64) -> Stream {
        let sample = match self {
            Self::Rollout => 0,
            Self::Probe => 1,
            Self::Statistics => 2,
        };
        Stream { seed, prompt: counter, sample }
    }
}

/// How conversations are sampled.
#[derive(Clone, Debug)]
pub struct Sampler {
    /// The turns of the chain.
    pub turns: Turns,
    /// Chain or answer.
    pub kind: RolloutKind,
    /// Most tokens sampled in one turn.
    pub max_new_tokens: usize,
    /// Sampling temperature; 0 = greedy.
    pub temperature: f64,
    /// Tokens that end a turn.
    pub stop_ids: Vec<i64>,
    /// Conversations of each prompt.
    pub samples_per_prompt: usize,
    /// Most sequences in flight.
    pub max_rows: usize,
    /// The run's seed.
    pub seed: u64,
}

impl Sampler {
    /// Tokens that the questions between turns take at most.
    ///
    /// # Errors
    ///
    /// What the chat template refuses.
    pub fn n_question_tokens(&self, chat: &Chat<'_>) -> Result<usize> {
        Ok(sample::Sampler::n_question_tokens(chat, &self.questions())?)
    }

    /// What the user says between the turns.
    fn questions(&self) -> Vec<&str> {
        let n_turns = self.kind.n_turns(self.turns.len());
        self.turns.questions().into_iter().take(n_turns - 1).collect()
    }

    /// Samples `samples_per_prompt` conversations for each prompt, one prompt's after the other's; conversation i draws from the
    /// stream `first + i`. What a journal holds is not sampled again, and what is sampled is added to it.
    ///
    /// # Errors
    ///
    /// A signal after a signal; The model's failure if a prompt does not fit or memory runs out;
    /// The system's failure if the journal cannot be written.
    #[expect(clippy::too_many_arguments, reason = "who samples, what, and from which streams")]
    pub fn sample<'a>(
        &'a self,
        model: &'a Model,
        chat: &'a Chat<'a>,
        adapter: Option<&'a Adapter>,
        prompts: &[&'a Prompt],
        purpose: Purpose,
        first: u64,
        journal: Option<&mut dyn sample::Journal>,
    ) -> Result<Vec<Conversation>> {
        let n_samples = self.samples_per_prompt;
        let starts = self.starts(prompts, purpose, first);
        let sampler = sample::Sampler {
            model,
            chat,
            adapter,
            options: self.options(),
            max_new_tokens: self.max_new_tokens,
            joins: false,
        };
        let mut conversations = vec![None; prompts.len() * n_samples];
        sampler.each(&starts, journal, &mut |sample, conversation| -> Result<()> {
            let idx = conversation.prompt * n_samples + sample;
            conversations[idx] = Some(conversation);
            Ok(interrupt::check()?)
        })?;
        let whole = |conversation: Option<_>| conversation.expect("every start ends");
        Ok(conversations.into_iter().map(whole).collect())
    }

    /// What servers are asked for in place of [`Sampler::sample`].
    pub(crate) fn request<'a>(
        &'a self,
        prompts: &[&'a Prompt],
        purpose: Purpose,
        first: u64,
    ) -> Request<'a> {
        let weights = if purpose == Purpose::Statistics { Weights::Base } else { Weights::Adapter };
        let asked = Asked {
            weights,
            sampling: Sampling::at(self.temperature),
            stop_ids: self.stop_ids.clone(),
            max_new_tokens: self.max_new_tokens,
        };
        Request { starts: self.starts(prompts, purpose, first), asked, purpose }
    }

    /// A start for each prompt; conversation i draws from the stream `first + i`.
    fn starts<'a>(
        &'a self,
        prompts: &[&'a Prompt],
        purpose: Purpose,
        first: u64,
    ) -> Vec<Start<'a>> {
        let n_samples = self.samples_per_prompt;
        let stream = |conversation| purpose.stream(self.seed, first + conversation as u64);
        let start = |(idx, prompt): (usize, &&'a Prompt)| Start {
            messages: &prompt.messages,
            prompt_ids: prompt.token_ids.clone(),
            questions: self.questions(),
            streams: (idx * n_samples..(idx + 1) * n_samples).map(stream).collect(),
        };
        prompts.iter().enumerate().map(start).collect()
    }

    fn options(&self) -> generate::Options {
        generate::Options {
            sampling: Sampling::at(self.temperature),
            stop_ids: self.stop_ids.clone(),
            stop_strings: Vec::new(),
            max_rows: self.max_rows,
        }
    }
}

/// log P of every own token under an adapter (none = the reference), in the order of conversations.
///
/// # Shapes
///
/// - result: `[n]` f32 on the CPU, nats, at `temperature`.
///
/// # Errors
///
/// The model's failure if memory runs out.
pub fn own_logprobs(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    conversations: &[Conversation],
    temperature: f64,
    budget: usize,
) -> Result<Tensor> {
    let _guard = tch::no_grad_guard();
    let order: Vec<usize> = (0..conversations.len()).collect();
    let mut parts = Vec::new();
    for pack in Pack::all(conversations, &order, budget)? {
        let hidden = decoder.forward(&pack.batch, adapter)?;
        let out = logprobs::of_rows(decoder, &hidden, &pack.batch, &pack.rows, temperature, false)?;
        parts.push(out.logprob.to_device(Device::Cpu));
    }
    Ok(Tensor::cat(&parts, 0))
}

/// Where the own tokens of a rollout lie in `[B, T]` tensors; T counts from the end of each prompt.
#[derive(Debug)]
pub struct Layout {
    n_rows: i64,
    n_columns: i64,
    /// `[n]` i64: flat place of each own token.
    places: Tensor,
    /// `[n]` i64: conversation and reply of each own token, replies counted through all conversations.
    conversations: Tensor,
    replies: Tensor,
    /// `[B, K]` i64: column of the last token of each reply.
    pub last_token: Tensor,
}

impl Layout {
    /// The layout of conversations with equally many replies each.
    pub fn new(conversations: &[Conversation]) -> Self {
        let width = |c: &Conversation| c.token_ids.len() - c.n_prompt;
        let n_columns = conversations.iter().map(width).max().unwrap_or(0);
        let mut places = Vec::new();
        let mut last_token = Vec::new();
        let (mut conversation_of, mut reply_of, mut n_replies) = (Vec::new(), Vec::new(), 0i64);
        for (row, conversation) in conversations.iter().enumerate() {
            let column = |token: usize| token - conversation.n_prompt;
            places.extend(
                conversation.own_tokens().map(|token| (row * n_columns + column(token)) as i64),
            );
            for reply in &conversation.replies {
                conversation_of.extend(std::iter::repeat_n(row as i64, reply.tokens.len()));
                reply_of.extend(std::iter::repeat_n(n_replies, reply.tokens.len()));
                n_replies += 1;
            }
            last_token.extend(
                conversation.replies.iter().map(|reply| column(reply.tokens.end - 1) as i64),
            );
        }
        let n_rows = conversations.len() as i64;
        Self {
            n_rows,
            n_columns: n_columns as i64,
            places: Tensor::from_slice(&places),
            conversations: Tensor::from_slice(&conversation_of),
            replies: Tensor::from_slice(&reply_of),
            last_token: Tensor::from_slice(&last_token).view([n_rows, -1]),
        }
    }

    /// T.
    pub fn n_columns(&self) -> i64 {
        self.n_columns
    }

    /// `[n]` i64: what each own token belongs to: its reply, or its conversation as a whole; counted through all conversations.
    pub fn units(&self, per_turn: bool) -> &Tensor {
        if per_turn { &self.replies } else { &self.conversations }
    }

    /// `[n]` to `[B, T]`, 0 where no own token is.
    pub fn spread(&self, flat: &Tensor) -> Tensor {
        Tensor::zeros([self.n_rows * self.n_columns], (flat.kind(), Device::Cpu))
            .index_copy(0, &self.places, flat)
            .view([self.n_rows, self.n_columns])
    }

    /// `[B, T]` to `[n]`.
    pub fn gather(&self, spread: &Tensor) -> Tensor {
        spread.reshape([-1]).index_select(0, &self.places)
    }

    /// `[B, T]` bool: true on the policy's own tokens.
    pub fn valid(&self) -> Tensor {
        self.spread(&Tensor::ones([self.places.numel() as i64], (Kind::Bool, Device::Cpu)))
    }
}
