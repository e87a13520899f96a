//! Rollouts: conversations sampled by the policy, and their log-probabilities under any adapter.

use std::ops::Range;

use arete_chain::batches::{self, Packed};
use arete_model::generate::{self, Request, Sampling, Stream, TurnEnd};
use arete_model::{Adapter, Batch, Chat, Decoder, Model, Tensor, logprobs};
use arete_records::{Aspect, FinishReason, Message};
use arete_stage::interrupt;
use tch::{Device, Kind};

use crate::Error;
use crate::config::RolloutKind;
use crate::journal::Journal;
use crate::prompts::Prompt;

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
    /// Chain or answer.
    pub kind: RolloutKind,
    /// Most tokens sampled in one turn.
    pub max_new_tokens: usize,
    /// Sampling temperature; 0 = greedy.
    pub temperature: f64,
    /// Tokens that end a turn.
    pub stop_ids: Vec<i64>,
    /// Most sequences in flight.
    pub max_rows: usize,
    /// The run's seed.
    pub seed: u64,
}

/// One reply of a conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// Where its tokens lie among the conversation's; the token that ended it is one of them.
    pub tokens: Range<usize>,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

/// A sampled conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversation {
    /// Index of its prompt among those given.
    pub prompt: usize,
    /// Prompt, replies and the questions between them, as sampled.
    pub token_ids: Vec<i64>,
    /// Tokens of the prompt.
    pub n_prompt: usize,
    /// The policy's own turns.
    pub replies: Vec<Reply>,
    /// log P of each own token as the sampler saw it, nats.
    pub sampled_logprob: Vec<f32>,
    /// The conversation as text.
    pub messages: Vec<Message>,
}

impl Conversation {
    /// Positions of the policy's own tokens, in order.
    pub fn own_tokens(&self) -> impl Iterator<Item = usize> {
        self.replies.iter().flat_map(|reply| reply.tokens.clone())
    }

    /// Number of the policy's own tokens.
    pub fn n_own(&self) -> usize {
        self.replies.iter().map(|reply| reply.tokens.len()).sum()
    }

    /// The text of a reply.
    pub fn reply_text(&self, turn: usize) -> &str {
        let n_prompt = self.messages.len() - (2 * self.replies.len() - 1);
        &self.messages[n_prompt + 2 * turn].content
    }

    /// The messages through the reply of a turn.
    pub fn messages_through(&self, turn: usize) -> &[Message] {
        &self.messages[..self.messages.len() - 2 * (self.replies.len() - 1 - turn)]
    }
}

impl Sampler {
    /// Tokens that the questions between turns take at most.
    ///
    /// # Errors
    ///
    /// What the chat template refuses.
    pub fn n_question_tokens(&self, chat: &Chat<'_>) -> Result<usize, Error> {
        let mut total = 0;
        for question in self.questions() {
            total += chat.next_turn(false, question)?.len();
        }
        Ok(total)
    }

    /// What the user says between the turns.
    fn questions(&self) -> impl Iterator<Item = &'static str> {
        let n_questions = self.kind.n_turns() - 1;
        Aspect::ALL.into_iter().filter_map(Aspect::question).take(n_questions)
    }

    /// Samples one conversation for each prompt; conversation i draws from the stream `first + i`. What a journal holds
    /// is not sampled again, and what is sampled is added to it.
    ///
    /// # Errors
    ///
    /// [`Error::Interrupted`] after a signal; [`Error::Model`] if a prompt does not fit or memory runs out;
    /// [`Error::Io`] if the journal cannot be written.
    #[expect(clippy::too_many_arguments, reason = "who samples, what, and from which streams")]
    pub fn sample(
        &self,
        model: &Model,
        chat: &Chat<'_>,
        adapter: Option<&Adapter>,
        prompts: &[&Prompt],
        purpose: Purpose,
        first: u64,
        mut journal: Option<&mut Journal>,
    ) -> Result<Vec<Conversation>, Error> {
        let mut sequences: Vec<Option<generate::Sequence>> = match &mut journal {
            Some(journal) => journal.take_known(),
            None => vec![None; prompts.len()],
        };
        let missing: Vec<usize> =
            (0..prompts.len()).filter(|&idx| sequences[idx].is_none()).collect();
        if missing.len() < prompts.len() {
            let known = prompts.len() - missing.len();
            tracing::info!(known, missing = missing.len(), "rollout continued");
        }
        let extra_tokens = self.n_question_tokens(chat)?;
        let requests: Vec<Request> = missing
            .iter()
            .map(|&idx| Request {
                prompt_ids: prompts[idx].token_ids.clone(),
                streams: vec![purpose.stream(self.seed, first + idx as u64)],
                tails: Vec::new(),
                max_new_tokens: self.max_new_tokens,
                turns: self.kind.n_turns(),
                extra_tokens,
            })
            .collect();
        let questions: Vec<&str> = self.questions().collect();
        let mut next_turn = |end: TurnEnd<'_>| {
            let last = end.completion.token_ids.last();
            let ended = last == Some(&chat.end_of_turn_id());
            chat.next_turn(ended, questions[end.turn])
        };
        let mut finished = |mut sequence: generate::Sequence| -> Result<(), arete_model::Error> {
            sequence.request = missing[sequence.request];
            if let Some(journal) = &mut journal {
                journal.append(&sequence)?;
            }
            let request = sequence.request;
            sequences[request] = Some(sequence);
            match interrupt::check() {
                Ok(()) => Ok(()),
                Err(_) => Err(std::io::Error::from(std::io::ErrorKind::Interrupted).into()),
            }
        };
        let outcome = generate::run(
            &model.decoder,
            Some(&model.tokenizer),
            adapter,
            &requests,
            &self.options(),
            &mut next_turn,
            &mut finished,
        );
        if outcome.is_err() {
            interrupt::check()?; // the signal, rather than what it was wrapped in
        }
        outcome?;
        sequences
            .into_iter()
            .enumerate()
            .map(|(idx, sequence)| {
                let sequence = sequence.expect("generation finishes every sequence");
                conversation(chat, idx, prompts[idx], &sequence, &questions)
            })
            .collect()
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

/// Puts a sampled sequence beside its text.
fn conversation(
    chat: &Chat<'_>,
    idx: usize,
    prompt: &Prompt,
    sequence: &generate::Sequence,
    questions: &[&str],
) -> Result<Conversation, Error> {
    let mut messages = prompt.messages.clone();
    let mut replies = Vec::new();
    let mut sampled_logprob = Vec::new();
    let mut at = prompt.token_ids.len();
    for (turn, completion) in sequence.turns.iter().enumerate() {
        messages.push(Message::assistant(chat.reply_text(&completion.token_ids)?));
        messages.extend(questions.get(turn).map(|question| Message::user(*question)));
        let end = at + completion.token_ids.len();
        replies.push(Reply { tokens: at..end, finish_reason: completion.finish_reason });
        sampled_logprob.extend(&completion.logprobs);
        at = end + sequence.appended.get(turn).map_or(0, Vec::len);
    }
    Ok(Conversation {
        prompt: idx,
        token_ids: sequence.token_ids(&prompt.token_ids),
        n_prompt: prompt.token_ids.len(),
        replies,
        sampled_logprob,
        messages,
    })
}

/// Conversations packed into one forward pass.
#[derive(Debug)]
pub(crate) struct Pack {
    /// Which conversations, by index.
    pub(crate) conversations: Vec<usize>,
    /// Their tokens.
    pub(crate) batch: Batch,
    /// Rows of the policy's own tokens.
    pub(crate) rows: Vec<usize>,
    /// `[n]` i64: the row before each, whose hidden state holds the token's value.
    pub(crate) states: Tensor,
}

impl Pack {
    /// Packs the conversations of `order` into passes of at most `budget` tokens, in that order.
    pub(crate) fn all(
        conversations: &[Conversation],
        order: &[usize],
        budget: usize,
    ) -> Result<Vec<Self>, Error> {
        let n_tokens: Vec<usize> =
            order.iter().map(|&idx| conversations[idx].token_ids.len()).collect();
        let runs = batches::micro_batches(&n_tokens, budget)?;
        Ok(runs.into_iter().map(|run| Self::new(conversations, order[run].to_vec())).collect())
    }

    fn new(all: &[Conversation], conversations: Vec<usize>) -> Self {
        let sequences: Vec<&[i64]> =
            conversations.iter().map(|&idx| all[idx].token_ids.as_slice()).collect();
        // The prompt's last token stays with each conversation: its state comes before the first own token.
        let n_prompt = conversations.iter().map(|&idx| all[idx].n_prompt).min().unwrap_or(0);
        let packed = Packed::new(&sequences, n_prompt.saturating_sub(1));
        let mut rows = Vec::new();
        for (place, &idx) in conversations.iter().enumerate() {
            rows.extend(all[idx].own_tokens().map(|token| packed.row(place, token)));
        }
        let states: Vec<i64> = rows.iter().map(|&row| row as i64 - 1).collect();
        Self { conversations, batch: packed.batch, rows, states: Tensor::from_slice(&states) }
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
/// [`Error::Model`] if memory runs out.
pub fn own_logprobs(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    conversations: &[Conversation],
    temperature: f64,
    budget: usize,
) -> Result<Tensor, Error> {
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
        for (row, conversation) in conversations.iter().enumerate() {
            let column = |token: usize| token - conversation.n_prompt;
            places.extend(
                conversation.own_tokens().map(|token| (row * n_columns + column(token)) as i64),
            );
            last_token.extend(
                conversation.replies.iter().map(|reply| column(reply.tokens.end - 1) as i64),
            );
        }
        let n_rows = conversations.len() as i64;
        Self {
            n_rows,
            n_columns: n_columns as i64,
            places: Tensor::from_slice(&places),
            last_token: Tensor::from_slice(&last_token).view([n_rows, -1]),
        }
    }

    /// T.
    pub fn n_columns(&self) -> i64 {
        self.n_columns
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
