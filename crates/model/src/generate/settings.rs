//! What is asked of generation, and what comes back.

use arete_records::FinishReason;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::{Deserialize, Serialize};

use crate::Error;

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

    pub(super) fn check(&self) -> Result<(), Error> {
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
    pub(super) fn rng(self) -> ChaCha8Rng {
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
    /// Most turns of a sequence (1 = one answer, 3 = the chain).
    pub turns: usize,
    /// Most tokens put between the turns of one sequence ([`Generator::reply`](super::Generator::reply)), in all.
    pub extra_tokens: usize,
}

impl Request {
    /// One answer of at most `max_new_tokens` a stream.
    pub fn new(prompt_ids: Vec<i64>, streams: Vec<Stream>, max_new_tokens: usize) -> Self {
        Self { prompt_ids, streams, tails: Vec::new(), max_new_tokens, turns: 1, extra_tokens: 0 }
    }
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
    /// Most sequences in flight; [`Options::BY_MEMORY`] leaves it to the device.
    pub max_rows: usize,
}

impl Options {
    /// As many sequences in flight as a GPU's free memory holds; 64 on the CPU, whose caches hold no more.
    pub const BY_MEMORY: usize = 0;

    /// Sequences in flight by memory, no stop strings.
    pub fn new(sampling: Sampling, stop_ids: Vec<i64>) -> Self {
        Self { sampling, stop_ids, stop_strings: Vec::new(), max_rows: Self::BY_MEMORY }
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        self.sampling.check()?;
        if self.stop_strings.iter().any(String::is_empty) {
            return Err(Error::Invalid {
                name: "stop strings",
                expected: "at least one character each".to_owned(),
                got: "an empty one".to_owned(),
            });
        }
        Ok(())
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
