//! Batched generation: sequences enter and leave the batch as they end, prompts are computed once and forked (also
//! the beginning that a prompt has in common with one in flight), turns continue on the same cache.
//!
//! Every sequence draws from its own counter-based stream (ChaCha, keyed by seed, prompt and sample; one draw a
//! token), and the decoder gives the same bits for a row whatever its neighbours are: a completion does not
//! depend on the batch it was sampled in.

use std::collections::{HashMap, VecDeque};

use arete_records::FinishReason;
use rand_chacha::ChaCha8Rng;

use crate::adapter::lora::{Adapter, PreparedLayer};
use crate::cache::{Cache, Run};
use crate::decoder::Decoder;
use crate::text::tokenizer::Tokenizer;
use crate::{Error, random};

#[cfg(all(test, feature = "cuda"))]
mod launch_budget;
mod prefixes;
mod rows;
mod settings;
mod step;
use prefixes::Prefixes;
pub use settings::{Completion, Options, Request, Sampling, Stream};
use step::{Drawn, Rows};

/// One sampled sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    /// Index of the request.
    pub request: usize,
    /// Index of the stream within the request.
    pub stream: usize,
    /// The sampled turns.
    pub turns: Vec<Completion>,
    /// Tokens put after each turn but the last.
    pub appended: Vec<Vec<i64>>,
}

impl Sequence {
    /// The prompt and everything after it.
    pub fn token_ids(&self, prompt_ids: &[i64]) -> Vec<i64> {
        let mut out = prompt_ids.to_vec();
        for (turn, completion) in self.turns.iter().enumerate() {
            out.extend(&completion.token_ids);
            if let Some(appended) = self.appended.get(turn) {
                out.extend(appended);
            }
        }
        out
    }
}

/// A turn that just ended, with another one to come.
#[derive(Debug)]
pub struct TurnEnd<'a> {
    /// Index of the request.
    pub request: usize,
    /// Index of the stream within the request.
    pub stream: usize,
    /// The turn that ended, from 0.
    pub turn: usize,
    /// What was sampled in it.
    pub completion: &'a Completion,
}

/// A turn that ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended {
    /// Index of the request.
    pub request: usize,
    /// Index of the stream within the request.
    pub stream: usize,
    /// The turn, from 0.
    pub turn: usize,
    /// What was sampled in it.
    pub completion: Completion,
}

/// Samples requests: an iterator of the turns as they end, which is not the order of the requests.
///
/// After a turn that is not its request's last, [`Generator::reply`] gives the sequence what comes next, and another turn of
/// it follows; a sequence that gets no reply before the next turn is asked for has ended. Whoever pulls keeps their own
/// errors: nothing of theirs runs in here.
///
/// ```no_run,standalone_crate
/// # use arete_model::generate::{Generator, Options, Request, Sampling, Stream};
/// # fn f(model: &arete_model::Model, prompt_ids: Vec<i64>, question_ids: &[i64]) -> Result<(), arete_model::Error> {
/// let streams = (0..4).map(|sample| Stream { seed: 1, prompt: 0, sample }).collect();
/// let requests = [Request { turns: 2, extra_tokens: 20, ..Request::new(prompt_ids, streams, 60) }];
/// let options = Options::new(Sampling::at(0.7), model.stop_ids()?);
/// let mut generator = Generator::new(&model.decoder, Some(&model.tokenizer), None, &requests, &options)?;
/// while let Some(ended) = generator.next() {
///     if ended?.turn == 0 {
///         generator.reply(question_ids)?;
///     }
/// }
/// # Ok(()) }
/// ```
pub struct Generator<'a> {
    decoder: &'a Decoder,
    tokenizer: Option<&'a Tokenizer>,
    prepared: Option<Vec<PreparedLayer>>,
    requests: &'a [Request],
    options: &'a Options,
    cache: Cache,
    /// Most sequences in flight.
    max_rows: usize,
    waiting: VecDeque<usize>,
    prefixes: Prefixes,
    active: Vec<Active>,
    /// Indices in `active` of turns that ended and were not handed over yet.
    ended: VecDeque<usize>,
    /// The one handed over last.
    handed: Option<usize>,
}

impl std::fmt::Debug for Generator<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generator")
            .field("requests", &self.requests.len())
            .field("waiting", &self.waiting.len())
            .field("in_flight", &self.active.len())
            .finish_non_exhaustive()
    }
}

impl<'a> Generator<'a> {
    /// Checks the requests and makes room for them; nothing is computed yet.
    ///
    /// # Errors
    ///
    /// A prompt that is empty or does not fit the model's positions, an impossible setting, a reward model.
    pub fn new(
        decoder: &'a Decoder,
        tokenizer: Option<&'a Tokenizer>,
        adapter: Option<&Adapter>,
        requests: &'a [Request],
        options: &'a Options,
    ) -> Result<Self, Error> {
        let _guard = tch::no_grad_guard();
        options.check()?;
        decoder.head()?;
        for request in requests {
            check_request(decoder, request)?;
        }
        let prepare = |adapter: &Adapter| -> Result<Vec<_>, Error> {
            (0..decoder.n_layers())
                .map(|layer| adapter.prepare(decoder.config(), layer, decoder.kind()))
                .collect()
        };
        let prepared = adapter.map(prepare).transpose()?;
        let wanted = rows::in_flight(decoder, requests, options.max_rows);
        let (cache, max_rows) = rows::tried_smaller(wanted, |max_rows| {
            Cache::new(decoder, rows::capacity(requests, max_rows))
        })?;
        Ok(Self {
            decoder,
            tokenizer,
            prepared,
            requests,
            options,
            cache,
            max_rows,
            waiting: (0..requests.len()).collect(),
            prefixes: Prefixes::default(),
            active: Vec::new(),
            ended: VecDeque::new(),
            handed: None,
        })
    }

    /// Puts tokens after the turn that was handed over last, and lets its sequence sample another one.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if that was the request's last turn or has its reply already, or if the tokens are none, are more
    /// than the request's `extra_tokens`, or are not the model's.
    pub fn reply(&mut self, token_ids: &[i64]) -> Result<(), Error> {
        let bad = |expected: String, got: String| Error::Invalid { name: "reply", expected, got };
        let Some(idx) = self.handed else {
            return Err(bad("one for each turn that was handed over".to_owned(), "another".into()));
        };
        let sequence = &mut self.active[idx];
        let request = &self.requests[sequence.request];
        if sequence.turn == request.turns {
            return Err(bad(format!("{} turns", request.turns), "one more".to_owned()));
        }
        let left = request.extra_tokens - sequence.n_extra;
        if token_ids.is_empty() || token_ids.len() > left {
            return Err(bad(format!("1 to {left} tokens"), format!("{} tokens", token_ids.len())));
        }
        self.decoder.check_tokens(token_ids)?;
        sequence.n_extra += token_ids.len();
        sequence.pending.extend(token_ids);
        sequence.grows = true;
        self.handed = None;
        Ok(())
    }

    /// Lets go of the sequences that ended, and computes one token for every other; false when nothing is left.
    fn step(&mut self) -> Result<bool, Error> {
        let _guard = tch::no_grad_guard();
        self.handed = None;
        for sequence in std::mem::take(&mut self.active) {
            if sequence.grows {
                self.active.push(sequence);
            } else {
                self.release(&sequence);
            }
        }
        let mut rows = Rows::default();
        let mut last_rows = Vec::new(); // one per active sequence
        for sequence in &mut self.active {
            let n = sequence.pending.len();
            let own = Run { start: sequence.own.start, length: sequence.cached + n };
            let n_prompt = self.requests[sequence.request].prompt_ids.len();
            let row = rows.push(
                &sequence.pending,
                n_prompt + sequence.cached,
                sequence.own.start + sequence.cached,
                self.prefixes.runs(sequence.prefix).chain([own]),
            );
            sequence.cached += n;
            sequence.pending.clear();
            last_rows.push(row as i64);
        }
        self.admit(&mut rows, &mut last_rows);
        if self.active.is_empty() {
            return Ok(false);
        }
        let uniform: Vec<f64> =
            self.active.iter_mut().map(|sequence| random::uniform(&mut sequence.rng)).collect();
        let Drawn { tokens, logprobs, logits } = self.draw(&rows, &last_rows, &uniform)?;
        for (idx, (token, logprob)) in tokens.into_iter().zip(logprobs).enumerate() {
            let sequence = &mut self.active[idx];
            let request = sequence.request;
            if !logprob.is_finite() {
                let what = format!("logits of request {request}");
                self.decoder.check_finite(&what, &logits)?;
                let what = format!("log-probability of a sampled token (request {request})");
                return Err(Error::NonFinite { what });
            }
            sequence.current.token_ids.push(token);
            sequence.current.logprobs.push(logprob);
            sequence.pending.push(token);
            let n_sampled = sequence.current.token_ids.len();
            let stopped = self.options.stop_ids.contains(&token)
                || self.at_stop_string(&self.active[idx].current.token_ids)?;
            if stopped || n_sampled == self.requests[request].max_new_tokens {
                let sequence = &mut self.active[idx];
                sequence.grows = false;
                sequence.current.finish_reason =
                    if stopped { FinishReason::Stop } else { FinishReason::Length };
                self.ended.push_back(idx);
            }
        }
        Ok(true)
    }

    /// Hands over an ended turn.
    fn hand_over(&mut self, idx: usize) -> Ended {
        let sequence = &mut self.active[idx];
        let completion = std::mem::replace(&mut sequence.current, empty_completion());
        let (request, stream, turn) = (sequence.request, sequence.stream, sequence.turn);
        sequence.turn += 1;
        self.handed = Some(idx);
        Ended { request, stream, turn, completion }
    }

    /// Lets go of everything: nothing follows an error.
    fn abandon(&mut self) {
        self.waiting.clear();
        self.active.clear();
        self.ended.clear();
        self.handed = None;
    }

    /// Lets waiting requests in while rows and slots last; their prompts join this step.
    fn admit(&mut self, rows: &mut Rows, last_rows: &mut Vec<i64>) {
        while let Some(&idx) = self.waiting.front() {
            let request = &self.requests[idx];
            let room = self.active.is_empty()
                || self.active.len() + request.streams.len() <= self.max_rows;
            if !room {
                break;
            }
            // Its last token is always computed: the first sampled token is drawn after it.
            let n_prompt = request.prompt_ids.len();
            let shared = self.prefixes.shared(&request.prompt_ids[..n_prompt - 1]);
            let n_shared: usize = shared.iter().map(|part| part.run.length).sum();
            let Some(rest) = self.cache.allocate(n_prompt - n_shared) else { break };
            let mut own = Vec::with_capacity(request.streams.len());
            while own.len() < request.streams.len() {
                match self.cache.allocate(own_slots(request, own.len())) {
                    Some(run) => own.push(run),
                    None => break,
                }
            }
            if own.len() < request.streams.len() {
                own.into_iter().for_each(|run| self.cache.release(run));
                self.cache.release(rest);
                assert!(!self.active.is_empty(), "an empty cache holds the largest request");
                break;
            }
            self.waiting.pop_front();
            let prefix = self.prefixes.insert(&request.prompt_ids, shared, rest, own.len());
            let prompt_row = rows.push(
                &request.prompt_ids[n_shared..],
                n_shared,
                rest.start,
                self.prefixes.runs(prefix),
            );
            for (stream, own) in own.into_iter().enumerate() {
                let tail = tail(request, stream);
                let row = if tail.is_empty() {
                    prompt_row
                } else {
                    let given = Run { start: own.start, length: tail.len() };
                    let seen = self.prefixes.runs(prefix).chain([given]);
                    rows.push(tail, n_prompt, own.start, seen)
                };
                last_rows.push(row as i64);
                self.active.push(Active {
                    request: idx,
                    stream,
                    prefix,
                    own,
                    cached: tail.len(),
                    pending: Vec::new(),
                    rng: request.streams[stream].rng(),
                    turn: 0,
                    n_extra: 0,
                    grows: true,
                    current: empty_completion(),
                });
            }
        }
    }

    fn release(&mut self, sequence: &Active) {
        self.cache.release(sequence.own);
        for run in self.prefixes.leave(sequence.prefix) {
            self.cache.release(run);
        }
    }

    /// Whether a text among the sampled tokens ends the turn.
    fn at_stop_string(&self, sampled: &[i64]) -> Result<bool, Error> {
        if self.options.stop_strings.is_empty() {
            return Ok(false);
        }
        let Some(tokenizer) = self.tokenizer else {
            return Err(Error::Invalid {
                name: "stop strings",
                expected: "a tokenizer to read them with".to_owned(),
                got: "none".to_owned(),
            });
        };
        let text = tokenizer.decode_with_special(sampled)?;
        Ok(self.options.stop_strings.iter().any(|stop| text.contains(stop.as_str())))
    }
}

impl Iterator for Generator<'_> {
    type Item = Result<Ended, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(idx) = self.ended.pop_front() {
                return Some(Ok(self.hand_over(idx)));
            }
            match self.step() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => {
                    self.abandon();
                    return Some(Err(error));
                }
            }
        }
    }
}

/// Samples every request, with callbacks: what [`Generator`] gives, for callers that have no errors of their own.
///
/// `next_turn` gives the tokens that lead from an ended turn to the next one; `finished` receives sequences as they
/// end, which is not the order of the requests.
///
/// # Errors
///
/// As [`Generator::new`] and [`Generator::reply`], or whatever the callbacks return.
pub fn run(
    decoder: &Decoder,
    tokenizer: Option<&Tokenizer>,
    adapter: Option<&Adapter>,
    requests: &[Request],
    options: &Options,
    next_turn: &mut dyn FnMut(TurnEnd<'_>) -> Result<Vec<i64>, Error>,
    finished: &mut dyn FnMut(Sequence) -> Result<(), Error>,
) -> Result<(), Error> {
    let _guard = tch::no_grad_guard();
    let mut generator = Generator::new(decoder, tokenizer, adapter, requests, options)?;
    let mut growing = HashMap::new();
    while let Some(ended) = generator.next() {
        let Ended { request, stream, turn, completion } = ended?;
        let mut sequence = growing.remove(&(request, stream)).unwrap_or_else(|| Sequence {
            request,
            stream,
            turns: Vec::new(),
            appended: Vec::new(),
        });
        if turn + 1 == requests[request].turns {
            sequence.turns.push(completion);
            finished(sequence)?;
        } else {
            let appended = next_turn(TurnEnd { request, stream, turn, completion: &completion })?;
            generator.reply(&appended)?;
            sequence.turns.push(completion);
            sequence.appended.push(appended);
            growing.insert((request, stream), sequence);
        }
    }
    Ok(())
}

/// Samples one answer; `sampled` receives each token as it is drawn.
///
/// # Errors
///
/// As [`Generator::new`], or what `sampled` returns; [`Error::Invalid`] unless the request asks for one stream and one turn.
pub fn stream<E: From<Error>>(
    decoder: &Decoder,
    tokenizer: Option<&Tokenizer>,
    adapter: Option<&Adapter>,
    request: &Request,
    options: &Options,
    sampled: &mut dyn FnMut(i64) -> Result<(), E>,
) -> Result<Completion, E> {
    if request.streams.len() != 1 || request.turns != 1 {
        return Err(E::from(Error::Invalid {
            name: "request",
            expected: "one stream and one turn".to_owned(),
            got: format!("{} streams, {} turns", request.streams.len(), request.turns),
        }));
    }
    let requests = std::slice::from_ref(request);
    let mut generator = Generator::new(decoder, tokenizer, adapter, requests, options)?;
    while generator.step()? {
        let token = generator.active[0].current.token_ids.last();
        sampled(*token.expect("a step draws one token a sequence"))?;
        if let Some(idx) = generator.ended.pop_front() {
            return Ok(generator.hand_over(idx).completion);
        }
    }
    unreachable!("a sequence in flight ends at the latest at max_new_tokens")
}

/// Samples single answers; sequences come back in the order of requests and streams.
///
/// # Errors
///
/// As [`Generator::new`].
pub fn complete(
    decoder: &Decoder,
    tokenizer: Option<&Tokenizer>,
    adapter: Option<&Adapter>,
    requests: &[Request],
    options: &Options,
) -> Result<Vec<Vec<Completion>>, Error> {
    let mut out: Vec<Vec<Option<Completion>>> =
        requests.iter().map(|request| vec![None; request.streams.len()]).collect();
    for ended in Generator::new(decoder, tokenizer, adapter, requests, options)? {
        let Ended { request, stream, completion, .. } = ended?;
        out[request][stream] = Some(completion);
    }
    let whole = |completion: Option<Completion>| completion.expect("every sequence ends");
    Ok(out.into_iter().map(|streams| streams.into_iter().map(whole).collect()).collect())
}

/// What a stream is given after the prompt.
fn tail(request: &Request, stream: usize) -> &[i64] {
    request.tails.get(stream).map_or(&[], Vec::as_slice)
}

/// Slots a stream of the request needs beyond the prompt; more than any model has where they cannot be counted.
fn own_slots(request: &Request, stream: usize) -> usize {
    let sampled = request.turns.saturating_mul(request.max_new_tokens);
    sampled.saturating_add(request.extra_tokens).saturating_add(tail(request, stream).len())
}

fn check_request(decoder: &Decoder, request: &Request) -> Result<(), Error> {
    let Request { prompt_ids, streams, max_new_tokens, turns, .. } = request;
    if prompt_ids.is_empty() || streams.is_empty() || *turns == 0 || *max_new_tokens == 0 {
        return Err(Error::Invalid {
            name: "request",
            expected: "at least one prompt token, one stream, one turn and one new token"
                .to_owned(),
            got: format!(
                "{} prompt tokens, {} streams, {turns} turns, {max_new_tokens} new tokens",
                prompt_ids.len(),
                streams.len(),
            ),
        });
    }
    if !(request.tails.is_empty() || request.tails.len() == streams.len()) {
        return Err(Error::Invalid {
            name: "request",
            expected: format!("no tail, or one for each of {} streams", streams.len()),
            got: format!("{} tails", request.tails.len()),
        });
    }
    decoder.check_tokens(&request.prompt_ids)?;
    for (stream, _) in streams.iter().enumerate() {
        decoder.check_tokens(tail(request, stream))?;
        decoder
            .check_length(request.prompt_ids.len().saturating_add(own_slots(request, stream)))?;
    }
    Ok(())
}

/// A sequence in flight.
struct Active {
    request: usize,
    stream: usize,
    prefix: usize,
    own: Run,
    /// Tokens of `own` that are in the cache.
    cached: usize,
    /// Tokens to compute next; the last one's hidden state predicts the next token.
    pending: Vec<i64>,
    rng: ChaCha8Rng,
    /// The turn that grows, or the next one.
    turn: usize,
    /// Tokens of all replies.
    n_extra: usize,
    /// False from the end of a turn until its reply.
    grows: bool,
    current: Completion,
}

fn empty_completion() -> Completion {
    Completion { token_ids: Vec::new(), logprobs: Vec::new(), finish_reason: FinishReason::Length }
}
