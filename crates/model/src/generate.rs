//! Batched generation: sequences enter and leave the batch as they end, prompts are computed once and forked (also
//! the beginning that a prompt has in common with one in flight), turns continue on the same cache.
//!
//! Every sequence draws from its own counter-based stream (ChaCha, keyed by seed, prompt and sample; one draw a
//! token), and the decoder gives the same bits for a row whatever its neighbours are: a completion does not
//! depend on the batch it was sampled in.

use std::collections::VecDeque;

use arete_records::FinishReason;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::batch::Tables;
use crate::cache::{Cache, Run};
use crate::decoder::Decoder;
use crate::lora::{Adapter, PreparedLayer};
use crate::ops::SampleSettings;
use crate::tokenizer::Tokenizer;
use crate::{Error, ops, random};

mod prefixes;
use prefixes::Prefixes;

/// How tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most probable token.
    pub temperature: f64,
    /// Only the k most probable tokens; 0 for all.
    pub top_k: usize,
    /// Only the smallest set of tokens with this mass (after top-k); 1 for all.
    pub top_p: f64,
}

impl Sampling {
    /// The most probable token, always.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: 0, top_p: 1.0 };

    /// The whole distribution at `temperature`.
    pub fn at(temperature: f64) -> Self {
        Self { temperature, top_k: 0, top_p: 1.0 }
    }

    fn check(&self) -> Result<(), Error> {
        let bad = |name, expected: &str, got: f64| {
            Err(Error::Invalid { name, expected: expected.to_owned(), got: got.to_string() })
        };
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return bad("temperature", "a number of at least 0", self.temperature);
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return bad("top-p", "a number above 0 and at most 1", self.top_p);
        }
        Ok(())
    }
}

/// The key of a sequence's random stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stream {
    /// The run's seed.
    pub seed: u64,
    /// Which prompt.
    pub prompt: u64,
    /// Which sample of it.
    pub sample: u64,
}

impl Stream {
    fn rng(self) -> ChaCha8Rng {
        let mut key = [0u8; 32];
        for (slot, part) in key.chunks_exact_mut(8).zip([self.seed, self.prompt, self.sample, 1]) {
            slot.copy_from_slice(&part.to_le_bytes());
        }
        ChaCha8Rng::from_seed(key)
    }
}

/// A prompt and the sequences to sample from it.
#[derive(Clone, Debug)]
pub struct Request {
    /// The tokens given.
    pub prompt_ids: Vec<i64>,
    /// One sequence each; the prompt is computed once.
    pub streams: Vec<Stream>,
    /// What is given to each stream after the prompt; empty if nothing is.
    pub tails: Vec<Vec<i64>>,
    /// Most tokens sampled in one turn.
    pub max_new_tokens: usize,
    /// Turns sampled (1 = one answer, 3 = the chain).
    pub turns: usize,
    /// Most tokens that `next_turn` appends to one sequence, in all.
    pub extra_tokens: usize,
}

/// What holds for every request of a run.
#[derive(Clone, Debug)]
pub struct Options {
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Tokens that end a turn (end of turn, end of text).
    pub stop_ids: Vec<i64>,
    /// Texts that end a turn, special tokens as they are written (`<|im_end|>`); none may be empty, and they need a
    /// tokenizer. The text stays in the completion.
    pub stop_strings: Vec<String>,
    /// Most sequences in flight.
    pub max_rows: usize,
}

impl Options {
    /// 64 sequences in flight, no stop strings.
    pub fn new(sampling: Sampling, stop_ids: Vec<i64>) -> Self {
        Self { sampling, stop_ids, stop_strings: Vec::new(), max_rows: 64 }
    }
}

/// One sampled turn.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// Sampled tokens, the stop token included.
    pub token_ids: Vec<i64>,
    /// log P of each at the sampling temperature, over the whole vocabulary (before top-k and top-p), nats.
    pub logprobs: Vec<f32>,
    /// `Stop` at a stop token or text, `Length` at `max_new_tokens`.
    pub finish_reason: FinishReason,
}

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

    /// True where [`Sequence::token_ids`] was sampled.
    pub fn own_mask(&self, n_prompt: usize) -> Vec<bool> {
        let mut out = vec![false; n_prompt];
        for (turn, completion) in self.turns.iter().enumerate() {
            out.resize(out.len() + completion.token_ids.len(), true);
            if let Some(appended) = self.appended.get(turn) {
                out.resize(out.len() + appended.len(), false);
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

/// Samples every request.
///
/// `next_turn` gives the tokens that lead from an ended turn to the next one; `finished` receives sequences as they
/// end, which is not the order of the requests.
///
/// # Errors
///
/// A prompt that is empty or does not fit the model's positions, an impossible setting, or whatever the callbacks
/// return.
pub fn run(
    decoder: &Decoder,
    tokenizer: Option<&Tokenizer>,
    adapter: Option<&Adapter>,
    requests: &[Request],
    options: &Options,
    next_turn: &mut dyn FnMut(TurnEnd<'_>) -> Result<Vec<i64>, Error>,
    finished: &mut dyn FnMut(Sequence) -> Result<(), Error>,
) -> Result<(), Error> {
    let callbacks = Callbacks { next_turn, finished, sampled: &mut |_| Ok(()) };
    sample_all(decoder, tokenizer, adapter, requests, options, callbacks)
}

/// Samples one answer; `sampled` receives each token as it is drawn.
///
/// # Errors
///
/// As [`run`]; [`Error::Invalid`] unless the request asks for one stream and one turn.
pub fn stream(
    decoder: &Decoder,
    tokenizer: Option<&Tokenizer>,
    adapter: Option<&Adapter>,
    request: &Request,
    options: &Options,
    sampled: &mut dyn FnMut(i64) -> Result<(), Error>,
) -> Result<Completion, Error> {
    if request.streams.len() != 1 || request.turns != 1 {
        return Err(Error::Invalid {
            name: "request",
            expected: "one stream and one turn".to_owned(),
            got: format!("{} streams, {} turns", request.streams.len(), request.turns),
        });
    }
    let mut completion = None;
    let callbacks = Callbacks {
        next_turn: &mut |_| Ok(Vec::new()),
        finished: &mut |mut sequence| {
            completion = sequence.turns.pop();
            Ok(())
        },
        sampled,
    };
    sample_all(decoder, tokenizer, adapter, std::slice::from_ref(request), options, callbacks)?;
    Ok(completion.expect("the one sequence ended"))
}

/// What the caller wants to know while sequences grow.
struct Callbacks<'a> {
    next_turn: &'a mut dyn FnMut(TurnEnd<'_>) -> Result<Vec<i64>, Error>,
    finished: &'a mut dyn FnMut(Sequence) -> Result<(), Error>,
    sampled: &'a mut dyn FnMut(i64) -> Result<(), Error>,
}

fn sample_all(
    decoder: &Decoder,
    tokenizer: Option<&Tokenizer>,
    adapter: Option<&Adapter>,
    requests: &[Request],
    options: &Options,
    mut callbacks: Callbacks<'_>,
) -> Result<(), Error> {
    let _guard = tch::no_grad_guard();
    options.sampling.check()?;
    if options.stop_strings.iter().any(String::is_empty) {
        return Err(Error::Invalid {
            name: "stop strings",
            expected: "at least one character each".to_owned(),
            got: "an empty one".to_owned(),
        });
    }
    for request in requests {
        check_request(decoder, request)?;
    }
    let prepared = adapter.map(|adapter| {
        (0..decoder.n_layers())
            .map(|layer| adapter.prepare(decoder.config(), layer, decoder.kind()))
            .collect()
    });
    let capacity = capacity(requests, options.max_rows.max(1));
    let mut engine = Engine {
        decoder,
        tokenizer,
        prepared,
        requests,
        options,
        cache: Cache::new(decoder, capacity)?,
        waiting: (0..requests.len()).collect(),
        prefixes: Prefixes::default(),
        active: Vec::new(),
    };
    while engine.step(&mut callbacks)? {}
    Ok(())
}

/// Samples single answers; sequences come back in the order of requests and streams.
///
/// # Errors
///
/// As [`run`].
pub fn complete(
    decoder: &Decoder,
    tokenizer: Option<&Tokenizer>,
    adapter: Option<&Adapter>,
    requests: &[Request],
    options: &Options,
) -> Result<Vec<Vec<Completion>>, Error> {
    let mut out: Vec<Vec<Option<Completion>>> =
        requests.iter().map(|request| vec![None; request.streams.len()]).collect();
    let mut finished = |mut sequence: Sequence| {
        out[sequence.request][sequence.stream] = sequence.turns.pop();
        Ok(())
    };
    let mut next_turn = |_: TurnEnd<'_>| Ok(Vec::new());
    run(decoder, tokenizer, adapter, requests, options, &mut next_turn, &mut finished)?;
    let ended = |completion: Option<Completion>| completion.expect("run finishes every sequence");
    Ok(out.into_iter().map(|streams| streams.into_iter().map(ended).collect()).collect())
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

/// Slots of the prompt and of all streams.
fn all_slots(request: &Request) -> usize {
    let own = (0..request.streams.len()).map(|stream| own_slots(request, stream));
    own.fold(request.prompt_ids.len(), usize::saturating_add)
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

/// Slots for `max_rows` sequences of the largest requests, or for all of them if that is less.
fn capacity(requests: &[Request], max_rows: usize) -> usize {
    let all: usize = requests.iter().map(all_slots).sum();
    let largest = requests.iter().map(all_slots).max().unwrap_or(0);
    let per_row = requests
        .iter()
        .map(|request| all_slots(request).div_ceil(request.streams.len().max(1)))
        .max()
        .unwrap_or(0);
    all.min(per_row.saturating_mul(max_rows).max(largest)).max(1)
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
    turns: Vec<Completion>,
    appended: Vec<Vec<i64>>,
    current: Completion,
}

struct Engine<'a> {
    decoder: &'a Decoder,
    tokenizer: Option<&'a Tokenizer>,
    prepared: Option<Vec<PreparedLayer>>,
    requests: &'a [Request],
    options: &'a Options,
    cache: Cache,
    waiting: VecDeque<usize>,
    prefixes: Prefixes,
    active: Vec<Active>,
}

/// The rows of one step, as the decoder takes them.
#[derive(Default)]
struct Rows {
    token_ids: Vec<i64>,
    positions: Vec<i64>,
    slots: Vec<i64>,
    segments: Vec<[i64; 5]>,
    spans: Vec<[i64; 2]>,
}

impl Rows {
    /// Adds tokens at `position`, stored from `slot` on, that see `seen` (the own tokens last).
    fn push(
        &mut self,
        token_ids: &[i64],
        position: usize,
        slot: usize,
        seen: impl Iterator<Item = Run>,
    ) -> usize {
        let row = self.token_ids.len();
        let n = token_ids.len();
        let first_span = self.spans.len();
        self.spans.extend(seen.map(|run| [run.start as i64, run.length as i64]));
        let n_spans = self.spans.len() - first_span;
        self.segments.push([
            row as i64,
            n as i64,
            position as i64,
            first_span as i64,
            n_spans as i64,
        ]);
        self.token_ids.extend_from_slice(token_ids);
        self.positions.extend((position..position + n).map(|p| p as i64));
        self.slots.extend((slot..slot + n).map(|s| s as i64));
        row + n - 1
    }
}

impl Engine<'_> {
    /// Computes one token for every sequence in flight; false when nothing is left.
    fn step(&mut self, callbacks: &mut Callbacks<'_>) -> Result<bool, Error> {
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
        let hidden = self.forward(&rows)?; // [N, D]
        let logits = self.logits(&hidden, &last_rows)?; // [active, V]
        let uniform: Vec<f64> =
            self.active.iter_mut().map(|sequence| random::uniform(&mut sequence.rng)).collect();
        let sampling = self.options.sampling;
        let settings = SampleSettings {
            temperature: sampling.temperature as f32,
            top_k: sampling.top_k as i64,
            top_p: sampling.top_p as f32,
        };
        let (tokens, logprobs) = ops::sample(&logits, &uniform, &vec![settings; uniform.len()])?;
        let mut still = Vec::with_capacity(self.active.len());
        for ((mut sequence, token), logprob) in
            std::mem::take(&mut self.active).into_iter().zip(tokens).zip(logprobs)
        {
            if !logprob.is_finite() {
                return Err(Error::NonFinite {
                    what: format!(
                        "log-probability of a sampled token (request {})",
                        sequence.request
                    ),
                });
            }
            sequence.current.token_ids.push(token);
            sequence.current.logprobs.push(logprob);
            (callbacks.sampled)(token)?;
            if self.advance(&mut sequence, token, callbacks.next_turn)? {
                still.push(sequence);
            } else {
                self.release(&sequence);
                (callbacks.finished)(Sequence {
                    request: sequence.request,
                    stream: sequence.stream,
                    turns: sequence.turns,
                    appended: sequence.appended,
                })?;
            }
        }
        self.active = still;
        Ok(!self.active.is_empty() || !self.waiting.is_empty())
    }

    /// Lets waiting requests in while rows and slots last; their prompts join this step.
    fn admit(&mut self, rows: &mut Rows, last_rows: &mut Vec<i64>) {
        while let Some(&idx) = self.waiting.front() {
            let request = &self.requests[idx];
            let room = self.active.is_empty()
                || self.active.len() + request.streams.len() <= self.options.max_rows;
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
                    turns: Vec::new(),
                    appended: Vec::new(),
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

    /// Takes in a sampled token; true while the sequence goes on.
    fn advance(
        &self,
        sequence: &mut Active,
        token: i64,
        next_turn: &mut dyn FnMut(TurnEnd<'_>) -> Result<Vec<i64>, Error>,
    ) -> Result<bool, Error> {
        let request = &self.requests[sequence.request];
        let stopped = self.options.stop_ids.contains(&token) || self.at_stop_string(sequence)?;
        if !stopped && sequence.current.token_ids.len() < request.max_new_tokens {
            sequence.pending.push(token);
            return Ok(true);
        }
        let mut completion = std::mem::replace(&mut sequence.current, empty_completion());
        completion.finish_reason = if stopped { FinishReason::Stop } else { FinishReason::Length };
        let turn = sequence.turns.len();
        let more = turn + 1 < request.turns;
        if more {
            let appended = next_turn(TurnEnd {
                request: sequence.request,
                stream: sequence.stream,
                turn,
                completion: &completion,
            })?;
            let used: usize = sequence.appended.iter().map(Vec::len).sum();
            if used + appended.len() > request.extra_tokens || appended.is_empty() {
                return Err(Error::Invalid {
                    name: "next turn",
                    expected: format!("1 to {} tokens", request.extra_tokens - used),
                    got: format!("{} tokens", appended.len()),
                });
            }
            self.decoder.check_tokens(&appended)?;
            sequence.pending.push(token);
            sequence.pending.extend(&appended);
            sequence.appended.push(appended);
        }
        sequence.turns.push(completion);
        Ok(more)
    }

    fn at_stop_string(&self, sequence: &Active) -> Result<bool, Error> {
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
        let text = tokenizer.decode_with_special(&sequence.current.token_ids)?;
        Ok(self.options.stop_strings.iter().any(|stop| text.contains(stop.as_str())))
    }

    fn forward(&self, rows: &Rows) -> Result<Tensor, Error> {
        let decoder = self.decoder;
        let device = decoder.device();
        let tables = Tables::new(&rows.segments, &rows.spans, &[0, rows.segments.len() as i64]);
        let positions = Tensor::from_slice(&rows.positions).to_device(device);
        let slots = Tensor::from_slice(&rows.slots).to_device(device);
        let mut hidden = decoder.embed(&Tensor::from_slice(&rows.token_ids).to_device(device)); // [N, D]
        let mut delta: Option<Tensor> = None;
        for (idx, (keys, values)) in self.cache.layers.iter().enumerate() {
            let adapter = self.prepared.as_ref().map(|layers| &layers[idx]);
            let attend = |qkv: &Tensor| {
                let (cos_sin, config) = (decoder.cos_sin(), decoder.config());
                ops::cached_attention(
                    qkv, &positions, cos_sin, &tables, &slots, keys, values, config,
                )
            };
            let (stream, added) = decoder.block(idx, &hidden, delta.as_ref(), adapter, attend)?;
            (hidden, delta) = (stream, Some(added));
        }
        let delta = delta.expect("a decoder has at least one block");
        decoder.final_norm(&hidden, &delta)
    }

    /// Logits of the given rows; sequences that share a row (a prompt's last token) share its product.
    fn logits(&self, hidden: &Tensor, last_rows: &[i64]) -> Result<Tensor, Error> {
        let mut distinct = last_rows.to_vec();
        distinct.dedup();
        let rows = Tensor::from_slice(&distinct).to_device(hidden.device());
        let logits = self.decoder.logits(&hidden.index_select(0, &rows))?;
        if distinct.len() == last_rows.len() {
            return Ok(logits);
        }
        let mut at = 0;
        let back: Vec<i64> = last_rows
            .iter()
            .map(|row| {
                while distinct[at] != *row {
                    at += 1;
                }
                at as i64
            })
            .collect();
        Ok(logits.index_select(0, &Tensor::from_slice(&back).to_device(hidden.device())))
    }
}

fn empty_completion() -> Completion {
    Completion { token_ids: Vec::new(), logprobs: Vec::new(), finish_reason: FinishReason::Length }
}
