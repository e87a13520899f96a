//! Sampling conversations: one sampler for every stage that lets a model reply, in one turn or in those of a chain.
//!
//! A conversation is drawn from random streams of its own and depends on nothing else, so a sampler may pack, join and
//! reorder as it likes, and what a [`Journal`] remembers need not be sampled again.

use std::collections::BTreeMap;
use std::ops::Range;

use arete_model::generate::{self, Options, Request, Sequence, Stream, TurnEnd};
use arete_model::{Adapter, Chat, Error, Model};
use arete_records::rows::{ConversationRow, PromptRow, TurnRow};
use arete_records::{Aspect, FinishReason, Message};

/// Most starts that are joined over one shared prefix: few enough to find room in the batch together.
const JOINED: usize = 16;

/// The part of the random streams' keys that belongs to a prompt: the same for every model. An id is 16 hex digits,
/// other files' ids are hashed (FNV-1a).
#[must_use]
pub fn key_of(prompt_id: &str) -> u64 {
    u64::from_str_radix(prompt_id, 16).unwrap_or_else(|_| {
        prompt_id.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
    })
}

/// A conversation to continue: the first reply to its messages, then a reply to each question.
#[derive(Clone, Debug)]
pub struct Start<'a> {
    /// What the first reply answers.
    pub messages: &'a [Message],
    /// The messages as tokens.
    pub prompt_ids: Vec<i64>,
    /// What is asked after each reply but the last.
    pub questions: Vec<&'a str>,
    /// One sample each.
    pub streams: Vec<Stream>,
}

impl<'a> Start<'a> {
    /// Renders the messages.
    ///
    /// # Errors
    ///
    /// What the chat template or the tokenizer refuse.
    pub fn new(
        chat: &Chat<'_>,
        messages: &'a [Message],
        questions: Vec<&'a str>,
        streams: Vec<Stream>,
    ) -> Result<Self, Error> {
        Ok(Self { messages, prompt_ids: chat.render_prompt(messages)?, questions, streams })
    }
}

/// One reply of a conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// Where its tokens lie among the conversation's; the token that ended it is one of them.
    pub tokens: Range<usize>,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

/// A sampled conversation, as text and as the tokens that were sampled: text in tokens anew may be other tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct SampledChain {
    /// Index of its start among those given.
    pub prompt: usize,
    /// Prompt, replies and the questions between them, as sampled.
    pub token_ids: Vec<i64>,
    /// Tokens of the prompt.
    pub n_prompt: usize,
    /// The model's own turns.
    pub replies: Vec<Reply>,
    /// log P of each own token as the sampler saw it, nats.
    pub sampled_logprob: Vec<f32>,
    /// The conversation as text.
    pub messages: Vec<Message>,
}

impl SampledChain {
    /// Puts a sampled sequence beside its text.
    ///
    /// # Errors
    ///
    /// Tokens that the tokenizer does not have.
    pub fn new(chat: &Chat<'_>, start: &Start<'_>, sequence: &Sequence) -> Result<Self, Error> {
        let Sequence { request: prompt, turns, appended, .. } = sequence;
        let mut token_ids = start.prompt_ids.clone();
        let mut messages = start.messages.to_vec();
        let (mut replies, mut sampled_logprob) = (Vec::new(), Vec::new());
        for (turn, completion) in turns.iter().enumerate() {
            messages.push(Message::assistant(chat.reply_text(&completion.token_ids)?));
            messages.extend(start.questions.get(turn).map(|question| Message::user(*question)));
            let begin = token_ids.len();
            token_ids.extend(&completion.token_ids);
            let tokens = begin..token_ids.len();
            replies.push(Reply { tokens, finish_reason: completion.finish_reason });
            sampled_logprob.extend(&completion.logprobs);
            token_ids.extend(appended.get(turn).into_iter().flatten());
        }
        let n_prompt = start.prompt_ids.len();
        Ok(Self { prompt: *prompt, token_ids, n_prompt, replies, sampled_logprob, messages })
    }

    /// Positions of the model's own tokens, in order.
    pub fn own_tokens(&self) -> impl Iterator<Item = usize> {
        self.replies.iter().flat_map(|reply| reply.tokens.clone())
    }

    /// Number of the model's own tokens.
    #[must_use]
    pub fn n_own(&self) -> usize {
        self.replies.iter().map(|reply| reply.tokens.len()).sum()
    }

    /// The text of a reply.
    #[must_use]
    pub fn reply_text(&self, turn: usize) -> &str {
        let n_prompt = self.messages.len() - (2 * self.replies.len() - 1);
        &self.messages[n_prompt + 2 * turn].content
    }

    /// The messages through the reply of a turn.
    #[must_use]
    pub fn messages_through(&self, turn: usize) -> &[Message] {
        &self.messages[..self.messages.len() - 2 * (self.replies.len() - 1 - turn)]
    }

    /// The chain as a row: sample `sample` of `prompt`, its replies those of `turns`.
    ///
    /// # Panics
    ///
    /// If there are not as many replies as turns.
    #[must_use]
    pub fn row(
        &self,
        prompt: &PromptRow,
        turns: &[Aspect],
        sample: i32,
        seed: u64,
    ) -> ConversationRow {
        assert_eq!(self.replies.len(), turns.len(), "a reply a turn");
        let turn = |(place, (&aspect, reply)): (usize, (&Aspect, &Reply))| TurnRow {
            aspect,
            text: self.reply_text(place).to_owned(),
            finish_reason: reply.finish_reason,
            n_tokens: i32::try_from(reply.tokens.len()).unwrap_or(i32::MAX),
        };
        ConversationRow {
            prompt_id: prompt.prompt_id.clone(),
            split: prompt.split,
            sample,
            persona: None,
            messages: self.messages.clone(),
            turns: turns.iter().zip(&self.replies).enumerate().map(turn).collect(),
            seed,
        }
    }
}

/// Remembers sequences as they end, so that a stopped run need not sample them again.
pub trait Journal {
    /// The sequences of an earlier attempt at the same starts; `request` is the start, `stream` the sample.
    fn take_known(&mut self) -> Vec<Sequence>;

    /// Adds a sequence that ended.
    ///
    /// # Errors
    ///
    /// What the file system says.
    fn append(&mut self, sequence: &Sequence) -> std::io::Result<()>;
}

/// Who replies, and how replies are drawn.
#[derive(Debug)]
pub struct Sampler<'a> {
    /// The model.
    pub model: &'a Model,
    /// Its chat template.
    pub chat: &'a Chat<'a>,
    /// What is over the model's weights.
    pub adapter: Option<&'a Adapter>,
    /// How tokens are drawn, what ends a turn, and how many sequences are in flight.
    pub options: Options,
    /// Most tokens sampled in one turn.
    pub max_new_tokens: usize,
    /// Whether neighbouring starts that begin alike are computed once up to where they part.
    pub joins: bool,
}

/// Start and sample of every stream of a request.
type Places = Vec<(usize, usize)>;

impl Sampler<'_> {
    /// Tokens that the questions take at most.
    ///
    /// # Errors
    ///
    /// What the chat template refuses.
    pub fn n_question_tokens(chat: &Chat<'_>, questions: &[&str]) -> Result<usize, Error> {
        questions
            .iter()
            .try_fold(0, |total, question| Ok(total + chat.next_turn(false, question)?.len()))
    }

    /// Tokens of a conversation whose every reply is as long as it may be.
    ///
    /// # Errors
    ///
    /// What the chat template refuses.
    pub fn n_longest(&self, start: &Start<'_>) -> Result<usize, Error> {
        let n_questions = Self::n_question_tokens(self.chat, &start.questions)?;
        let n_sampled = (1 + start.questions.len()) * self.max_new_tokens;
        Ok(start.prompt_ids.len() + n_sampled + n_questions)
    }

    /// Samples every start; the conversations by start and sample.
    ///
    /// # Errors
    ///
    /// A start that does not fit the model's positions, an impossible setting.
    pub fn all(&self, starts: &[Start<'_>]) -> Result<Vec<Vec<SampledChain>>, Error> {
        let mut out: Vec<Vec<Option<SampledChain>>> =
            starts.iter().map(|start| vec![None; start.streams.len()]).collect();
        self.each(starts, None, &mut |sample, chain| -> Result<(), Error> {
            let prompt = chain.prompt;
            out[prompt][sample] = Some(chain);
            Ok(())
        })?;
        let whole = |chain: Option<_>| chain.expect("generation finishes every sequence");
        Ok(out.into_iter().map(|samples| samples.into_iter().map(whole).collect()).collect())
    }

    /// Samples every start and hands over each conversation, with its sample's number, as it ends: those that the
    /// journal knows first, the others in no promised order. What is sampled is added to the journal.
    ///
    /// # Errors
    ///
    /// As [`Sampler::all`]; a journal that cannot be written; what `ended` returns, which stops the sampling.
    pub fn each<E: From<Error> + std::fmt::Display>(
        &self,
        starts: &[Start<'_>],
        mut journal: Option<&mut dyn Journal>,
        ended: &mut dyn FnMut(usize, SampledChain) -> Result<(), E>,
    ) -> Result<(), E> {
        let known = journal.as_mut().map(|journal| journal.take_known()).unwrap_or_default();
        let mut missing: Vec<Vec<usize>> =
            starts.iter().map(|start| (0..start.streams.len()).collect()).collect();
        let n_all: usize = missing.iter().map(Vec::len).sum();
        for sequence in known {
            let (idx, sample) = (sequence.request, sequence.stream);
            missing[idx].retain(|&other| other != sample);
            ended(sample, SampledChain::new(self.chat, &starts[idx], &sequence)?)?;
        }
        let n_missing: usize = missing.iter().map(Vec::len).sum();
        if n_missing < n_all {
            tracing::info!(known = n_all - n_missing, missing = n_missing, "sampling continued");
        }
        let (requests, places) = self.requests(starts, missing)?;
        let mut next_turn = |end: TurnEnd<'_>| {
            let end_was_sampled =
                end.completion.token_ids.last() == Some(&self.chat.end_of_turn_id());
            let (idx, _) = places[end.request][end.stream];
            self.chat.next_turn(end_was_sampled, starts[idx].questions[end.turn])
        };
        let mut failed = None;
        let mut finished = |mut sequence: Sequence| {
            let (idx, sample) = places[sequence.request][sequence.stream];
            (sequence.request, sequence.stream) = (idx, sample);
            if let Some(journal) = &mut journal {
                journal.append(&sequence)?;
            }
            let chain = SampledChain::new(self.chat, &starts[idx], &sequence)?;
            ended(sample, chain).map_err(|error| {
                // Ends the run; what is told to the caller is the error itself.
                let stop = Error::Io(std::io::Error::other(error.to_string()));
                failed = Some(error);
                stop
            })
        };
        let outcome = generate::run(
            &self.model.decoder,
            Some(&self.model.tokenizer),
            self.adapter,
            &requests,
            &self.options,
            &mut next_turn,
            &mut finished,
        );
        match failed {
            Some(error) => Err(error),
            None => Ok(outcome?),
        }
    }

    /// The samples that are missing as requests, joined where starts begin alike.
    fn requests(
        &self,
        starts: &[Start<'_>],
        missing: Vec<Vec<usize>>,
    ) -> Result<(Vec<Request>, Vec<Places>), Error> {
        let mut n_question_tokens = BTreeMap::new();
        let (mut requests, mut places) = (Vec::new(), Vec::new());
        for (idx, (start, samples)) in starts.iter().zip(missing).enumerate() {
            if samples.is_empty() {
                continue;
            }
            let questions = start.questions.as_slice();
            if !n_question_tokens.contains_key(questions) {
                let n_tokens = Self::n_question_tokens(self.chat, questions)?;
                n_question_tokens.insert(questions, n_tokens);
            }
            requests.push(Request {
                prompt_ids: start.prompt_ids.clone(),
                streams: samples.iter().map(|&sample| start.streams[sample]).collect(),
                tails: Vec::new(),
                max_new_tokens: self.max_new_tokens,
                turns: 1 + questions.len(),
                extra_tokens: n_question_tokens[questions],
            });
            places.push(samples.into_iter().map(|sample| (idx, sample)).collect());
        }
        Ok(if self.joins { joined(requests, places) } else { (requests, places) })
    }
}

/// Joins requests whose neighbours begin alike: the questions about a pair of samples, say, share everything up to the virtue
/// asked about, which is then computed once.
fn joined(requests: Vec<Request>, places: Vec<Places>) -> (Vec<Request>, Vec<Places>) {
    let mut out: Vec<(Request, Places)> = Vec::new();
    for (request, place) in requests.into_iter().zip(places) {
        let tails = |tail: &[i64]| vec![tail.to_vec(); place.len()];
        if let Some((group, group_place)) = out.last_mut() {
            let shared = group
                .prompt_ids
                .iter()
                .zip(&request.prompt_ids)
                .take_while(|(a, b)| a == b)
                .count();
            let fits = group_place.len() + place.len() <= JOINED;
            // Half of it at least: a smaller share is what unlike questions have, such as a system prompt.
            if fits && 2 * shared >= request.prompt_ids.len() {
                let rest = group.prompt_ids.split_off(shared);
                for tail in &mut group.tails {
                    tail.splice(..0, rest.iter().copied());
                }
                group.tails.extend(tails(&request.prompt_ids[shared..]));
                group.streams.extend(request.streams);
                group.extra_tokens = group.extra_tokens.max(request.extra_tokens);
                group_place.extend(place);
                continue;
            }
        }
        out.push((Request { tails: tails(&[]), ..request }, place));
    }
    out.into_iter().unzip()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_id_is_the_key_of_its_streams() {
        assert_eq!(key_of("00000000000000ff"), 255);
        assert_ne!(key_of("foreign-1"), key_of("foreign-2"));
    }

    #[test]
    fn questions_that_begin_alike_are_joined() {
        let request = |prompt_ids: &[i64], sample| Request {
            prompt_ids: prompt_ids.to_vec(),
            streams: vec![Stream { seed: 0, prompt: 0, sample }],
            tails: Vec::new(),
            max_new_tokens: 1,
            turns: 1,
            extra_tokens: 0,
        };
        let asked: [&[i64]; 5] =
            [&[1, 2, 3, 4], &[1, 2, 3, 5, 6], &[1, 2, 7], &[1, 8, 9, 9], &[1, 8, 9]];
        let requests = (0..).zip(asked).map(|(sample, ids)| request(ids, sample)).collect();
        let alone = (0..asked.len()).map(|idx| vec![(idx, 0)]).collect();
        let (joined, places) = joined(requests, alone);
        assert_eq!(places, [vec![(0, 0), (1, 0), (2, 0)], vec![(3, 0), (4, 0)]]);
        assert_eq!(joined[0].prompt_ids, [1, 2]);
        assert_eq!(joined[0].tails, [vec![3, 4], vec![3, 5, 6], vec![7]]);
        assert_eq!(
            (&joined[1].prompt_ids[..], &joined[1].tails),
            (&[1, 8, 9][..], &vec![vec![9], vec![]])
        );
        for (request, place) in joined.iter().zip(&places) {
            for (stream, &(idx, _)) in place.iter().enumerate() {
                assert_eq!([&request.prompt_ids[..], &request.tails[stream]].concat(), asked[idx]);
                assert_eq!(request.streams[stream].sample, idx as u64);
            }
        }
    }
}
