//! A client of OpenAI-compatible servers (vLLM, llama.cpp, …): replies through
//! `/v1/chat/completions`, verdicts from its `top_logprobs`.
//!
//! A server's answers are someone else's input: whatever is not what was asked for is an error
//! that says so (replies) or a counted abstention (verdicts, written ones too). A reply that the
//! server's content filter broke off counts as one that was cut. Refusals that pass (429, 5xx, a
//! cut or slow connection) are tried again, with growing pauses.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use arete_records::{FinishReason, Message};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{Chain, Drawing, Labels, Parts, Query, Reply};
use crate::Error;
use crate::judge::verdict::LabelMass;

/// Largest reply that is read.
const MAX_REPLY_BYTES: u64 = 16 << 20;

/// As many candidates as the OpenAI interface allows to ask for.
const TOP_LOGPROBS: u32 = 20;

/// Environment variable of the server's key; never a flag, which other users of the machine see.
const KEY_VARIABLE: &str = "OPENAI_API_KEY";

/// How a server is talked to.
#[derive(Debug, Clone, PartialEq, clap::Args, serde::Serialize, serde::Deserialize)]
pub struct ServerConfig {
    /// Requests in flight at a server at once
    #[arg(long, default_value_t = 16, value_name = "N")]
    pub concurrency: usize,
    /// Attempts at a request before giving up
    #[arg(long, default_value_t = 6, value_name = "N")]
    pub attempts: usize,
    /// Seconds a server may take for one answer
    #[arg(long, default_value_t = 120.0, value_name = "S")]
    pub timeout_s: f64,
    /// Seconds to wait before the second attempt; doubled before each further one
    #[arg(long, default_value_t = 0.5, value_name = "S")]
    pub backoff_s: f64,
}

/// A server and the model it serves.
#[derive(Debug)]
pub struct ServerEngine {
    agent: ureq::Agent,
    endpoint: String,
    model: String,
    key: Option<Secret>,
    config: ServerConfig,
    abstentions: AtomicUsize,
}

/// A text that is never printed.
struct Secret(String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

/// Why one request failed, and whether another attempt makes sense.
struct Failure {
    reason: String,
    kind: FailureKind,
    /// Seconds the server asked to wait.
    wait_s: Option<f64>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum FailureKind {
    /// Another attempt may succeed.
    Passing,
    /// The server will not take this one request (too long for its model, say), or answers it with
    /// nonsense.
    Request,
    /// No request will succeed.
    Lasting,
}

impl Failure {
    fn new(kind: FailureKind, reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), kind, wait_s: None }
    }

    fn lasting(reason: impl Into<String>) -> Self {
        Self::new(FailureKind::Lasting, reason)
    }

    fn passing(reason: impl Into<String>) -> Self {
        Self::new(FailureKind::Passing, reason)
    }
}

impl ServerEngine {
    /// Prepares to talk to `url` (with or without `/v1`); asks it for one short reply, and for
    /// log-probabilities if verdicts will be read from them.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] for an impossible setting, [`Error::Server`] if the probe fails.
    pub fn connect(
        url: &str,
        model: &str,
        config: &ServerConfig,
        needs_logprobs: bool,
    ) -> Result<Self, Error> {
        let setting = |name, expected: &str, got: String| {
            Err(Error::Setting { name, expected: expected.to_owned(), got })
        };
        if config.concurrency == 0 || config.attempts == 0 {
            return setting("concurrency, attempts", "at least 1", "0".to_owned());
        }
        if !(config.timeout_s > 0.0
            && config.timeout_s < 1e6
            && (0.0..1e4).contains(&config.backoff_s))
        {
            let got = format!("{} and {}", config.timeout_s, config.backoff_s);
            return setting("timeout_s, backoff_s", "positive seconds", got);
        }
        if !(url.starts_with("http://") || url.starts_with("https://")) {
            return setting(
                "engine_url, judge_url",
                "an address with http:// or https://",
                url.to_owned(),
            );
        }
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(Duration::from_secs_f64(config.timeout_s)))
            .http_status_as_error(false)
            .max_redirects(0) // a redirect could carry the key elsewhere
            .build()
            .into();
        let base = url.trim_end_matches('/');
        let base = base.strip_suffix("/v1").unwrap_or(base);
        let engine = Self {
            agent,
            endpoint: format!("{base}/v1/chat/completions"),
            model: model.to_owned(),
            key: std::env::var(KEY_VARIABLE).ok().filter(|key| !key.is_empty()).map(Secret),
            config: config.clone(),
            abstentions: AtomicUsize::new(0),
        };
        engine.probe(needs_logprobs)?;
        Ok(engine)
    }

    /// The served model's name.
    pub fn name(&self) -> &str {
        &self.model
    }

    /// Verdicts so far that made no sense and were counted as abstentions.
    pub fn n_abstentions(&self) -> usize {
        self.abstentions.load(Ordering::Relaxed)
    }

    fn probe(&self, needs_logprobs: bool) -> Result<(), Error> {
        let hello = [Message::user("Reply with the letter A.")];
        if !needs_logprobs {
            let body = self.reply_request(&hello, 1, 0.0, 1.0, 0);
            return self.ask("probe", &body, |answer| read_reply(answer).map(drop));
        }
        let body = self.verdict_request(&hello);
        let masses = self.ask("probe for top_logprobs", &body, |answer| {
            read_candidates(answer).map_err(|reason| {
                Failure::lasting(format!(
                    "{reason}; the server gives no usable log-probabilities: use --method \
                     pairwise-text, or a server that does (vLLM, llama.cpp)"
                ))
            })
        })?;
        tracing::debug!(candidates = masses.len(), "the server gives log-probabilities");
        Ok(())
    }

    pub(super) fn chains_each(
        &self,
        chains: &[Chain],
        drawing: &Drawing,
        done: &mut dyn FnMut(usize, Vec<Vec<Reply>>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if drawing.sampling.top_k != 0 {
            tracing::debug!("top_k is sent as an extension of the OpenAI interface");
        }
        let jobs: Vec<(usize, usize)> = chains
            .iter()
            .enumerate()
            .flat_map(|(idx, chain)| (0..chain.samples.len()).map(move |sample| (idx, sample)))
            .collect();
        let mut parts = Parts::of(chains);
        let ask = |&(idx, sample): &(usize, usize)| {
            self.chain(&chains[idx], chains[idx].samples[sample], drawing)
        };
        self.each(&jobs, ask, |job, replies| {
            let (idx, sample) = jobs[job];
            match parts.put(idx, sample, replies) {
                Some(whole) => done(idx, whole),
                None => Ok(()),
            }
        })
    }

    /// One sample of one chain, turn by turn.
    fn chain(&self, chain: &Chain, sample: u64, drawing: &Drawing) -> Result<Vec<Reply>, Error> {
        let mut messages = chain.messages.clone();
        let mut replies = Vec::new();
        let mut questions = chain.questions.iter();
        loop {
            let seed = request_seed(drawing.seed, chain.key, sample, replies.len());
            let sampling = drawing.sampling;
            let mut body = self.reply_request(
                &messages,
                drawing.max_new_tokens,
                sampling.temperature,
                sampling.top_p,
                seed,
            );
            if sampling.top_k != 0 {
                body["top_k"] = json!(sampling.top_k);
            }
            let reply = match self.attempt("reply", &body, read_reply) {
                Err(failure) if drawing.is_verdict && failure.kind == FailureKind::Request => {
                    self.abstain(&failure.reason);
                    Reply { text: String::new(), finish_reason: FinishReason::Length, n_tokens: 0 }
                }
                other => other.map_err(|failure| self.error("reply", failure))?,
            };
            messages.push(Message::assistant(reply.text.as_str()));
            replies.push(reply);
            match questions.next() {
                Some(question) => messages.push(Message::user(question.as_str())),
                None => return Ok(replies),
            }
        }
    }

    pub(super) fn label_masses(
        &self,
        queries: &[Query],
        labels: Labels,
    ) -> Result<Vec<LabelMass>, Error> {
        let mut out = vec![LabelMass { first: 0.0, second: 0.0 }; queries.len()];
        let ask = |query: &Query| {
            let body = self.verdict_request(&query.messages);
            let asked = self.attempt("verdict", &body, |answer| {
                read_candidates(answer)
                    .and_then(|candidates| masses(&candidates, labels))
                    .map_err(|reason| Failure::new(FailureKind::Request, reason))
            });
            match asked {
                Ok(mass) => Ok(mass),
                // What does not make sense will not make sense next time: abstain, and count.
                Err(Failure { kind: FailureKind::Request, reason, .. }) => {
                    self.abstain(&reason);
                    Ok(LabelMass { first: 0.0, second: 0.0 })
                }
                Err(failure) => Err(self.error("verdict", failure)),
            }
        };
        self.each(queries, ask, |idx, mass| {
            out[idx] = mass;
            Ok(())
        })?;
        Ok(out)
    }

    fn abstain(&self, reason: &str) {
        self.abstentions.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(reason, "no verdict, counted as an abstention");
    }

    fn reply_request(
        &self,
        messages: &[Message],
        max_tokens: usize,
        temperature: f64,
        top_p: f64,
        seed: u64,
    ) -> Value {
        json!({
            "model": self.model, "messages": messages, "max_tokens": max_tokens,
            "temperature": temperature, "top_p": top_p, "seed": seed, "n": 1, "stream": false,
        })
    }

    fn verdict_request(&self, messages: &[Message]) -> Value {
        // At temperature 1 the log-probabilities are the model's own with every server.
        json!({
            "model": self.model, "messages": messages, "max_tokens": 1, "temperature": 1.0,
            "top_p": 1.0, "seed": 0, "n": 1, "stream": false,
            "logprobs": true, "top_logprobs": TOP_LOGPROBS,
        })
    }

    /// Works on every job with bounded concurrency. `done` receives results as they come, with the
    /// job's index. The first error stops the work; of those that came, the earliest job's is returned.
    fn each<J: Sync, R: Send>(
        &self,
        jobs: &[J],
        work: impl Fn(&J) -> Result<R, Error> + Sync,
        mut done: impl FnMut(usize, R) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let next = AtomicUsize::new(0);
        let (sender, results) = std::sync::mpsc::channel();
        let mut failed: Option<(usize, Error)> = None;
        std::thread::scope(|scope| {
            for _ in 0..self.config.concurrency.min(jobs.len()) {
                let (sender, next, work) = (sender.clone(), &next, &work);
                scope.spawn(move || {
                    loop {
                        let idx = next.fetch_add(1, Ordering::Relaxed);
                        let Some(job) = jobs.get(idx) else { return };
                        if sender.send((idx, work(job))).is_err() {
                            return;
                        }
                    }
                });
            }
            drop(sender);
            for (idx, result) in results {
                if let Err(error) = result.and_then(|result| done(idx, result)) {
                    next.store(jobs.len(), Ordering::Relaxed); // no job begins any more
                    if failed.as_ref().is_none_or(|(earliest, _)| idx < *earliest) {
                        failed = Some((idx, error));
                    }
                }
            }
        });
        failed.map_or(Ok(()), |(_, error)| Err(error))
    }

    /// Sends a request until `read` accepts its answer.
    fn ask<T>(
        &self,
        what: &'static str,
        body: &Value,
        read: impl Fn(&Value) -> Result<T, Failure>,
    ) -> Result<T, Error> {
        self.attempt(what, body, read).map_err(|failure| self.error(what, failure))
    }

    fn error(&self, what: &'static str, failure: Failure) -> Error {
        Error::Server { url: self.endpoint.clone(), what, reason: failure.reason }
    }

    /// Sends a request until `read` accepts its answer, or another attempt would be vain.
    fn attempt<T>(
        &self,
        what: &'static str,
        body: &Value,
        read: impl Fn(&Value) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut pause_s = self.config.backoff_s;
        for attempt in 1.. {
            let failure = match self.post(body).and_then(|answer| read(&answer)) {
                Ok(value) => return Ok(value),
                Err(failure) => failure,
            };
            if failure.kind != FailureKind::Passing {
                return Err(failure);
            }
            if attempt >= self.config.attempts {
                let reason = format!("{} ({attempt} attempts)", failure.reason);
                return Err(Failure { reason, ..failure });
            }
            tracing::debug!(what, attempt, reason = failure.reason, "trying again");
            let wait_s = failure.wait_s.unwrap_or(pause_s).min(self.config.timeout_s);
            std::thread::sleep(Duration::from_secs_f64(wait_s));
            pause_s *= 2.0;
        }
        unreachable!("the loop returns")
    }

    fn post(&self, body: &Value) -> Result<Value, Failure> {
        let mut request = self.agent.post(&self.endpoint);
        if let Some(Secret(key)) = &self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        let mut response =
            request.send_json(body).map_err(|error| Failure::passing(error.to_string()))?;
        let status = response.status().as_u16();
        let wait_s = response
            .headers()
            .get("retry-after")
            .and_then(|value| value.to_str().ok()?.parse::<f64>().ok())
            .filter(|seconds| (0.0..=600.0).contains(seconds));
        let text = response
            .body_mut()
            .with_config()
            .limit(MAX_REPLY_BYTES)
            .read_to_string()
            .map_err(|error| Failure::passing(format!("reply broken off: {error}")))?;
        match status {
            200..=299 => serde_json::from_str(&text).map_err(|error| {
                Failure::new(FailureKind::Request, format!("reply is not JSON: {error}"))
            }),
            408 | 425 | 429 | 500..=599 => {
                Err(Failure { wait_s, ..Failure::passing(refusal(status, &text)) })
            }
            400 | 413 | 422 => Err(Failure::new(FailureKind::Request, refusal(status, &text))),
            _ => Err(Failure::lasting(refusal(status, &text))),
        }
    }
}

fn refusal(status: u16, text: &str) -> String {
    let short: String = text.chars().take(200).collect();
    format!("status {status}: {}", short.trim())
}

/// A seed for one request, which is the same whatever else is asked.
fn request_seed(seed: u64, key: u64, sample: u64, turn: usize) -> u64 {
    let mut hash = Sha256::new();
    for part in [seed, key, sample, turn as u64] {
        hash.update(part.to_le_bytes());
    }
    let digest = hash.finalize();
    // 31 bits: some servers take no more.
    u64::from(u32::from_le_bytes([digest[0], digest[1], digest[2], digest[3]]) >> 1)
}

/// The first choice's text, why it ended, and how many tokens it took.
fn read_reply(answer: &Value) -> Result<Reply, Failure> {
    let missing =
        |field: &str| Failure::new(FailureKind::Request, format!("reply without {field}"));
    let choice = &answer["choices"][0];
    if choice["finish_reason"] == "content_filter" {
        tracing::warn!("the server's content filter broke a reply off: it counts as cut");
        let n_tokens = answer["usage"]["completion_tokens"].as_u64().unwrap_or(0);
        let text = choice["message"]["content"].as_str().unwrap_or_default();
        return Ok(Reply {
            text: text.trim().to_owned(),
            finish_reason: FinishReason::Length,
            n_tokens: usize::try_from(n_tokens).unwrap_or(0),
        });
    }
    let text = choice["message"]["content"]
        .as_str()
        .ok_or_else(|| missing("choices[0].message.content"))?;
    let finish_reason = match choice["finish_reason"].as_str() {
        Some("stop") => FinishReason::Stop,
        Some("length") => FinishReason::Length,
        other => {
            let reason = format!("finish_reason: expected stop or length, got {other:?}");
            return Err(Failure::new(FailureKind::Request, reason));
        }
    };
    let n_tokens = answer["usage"]["completion_tokens"]
        .as_u64()
        .and_then(|n| usize::try_from(n).ok())
        .ok_or_else(|| missing("usage.completion_tokens"))?;
    Ok(Reply { text: text.trim().to_owned(), finish_reason, n_tokens })
}

/// The first token's candidates: text and log-probability.
fn read_candidates(answer: &Value) -> Result<Vec<(String, f64)>, String> {
    let at = "choices[0].logprobs.content[0].top_logprobs";
    let candidates = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        .as_array()
        .filter(|candidates| !candidates.is_empty())
        .ok_or_else(|| format!("expected {at}, got none"))?;
    candidates
        .iter()
        .map(|candidate| {
            let token = candidate["token"].as_str();
            let logprob = candidate["logprob"].as_f64();
            token
                .zip(logprob)
                .filter(|(_, logprob)| *logprob <= 1e-3) // NaN fails too
                .map(|(token, logprob)| (token.to_owned(), logprob))
                .ok_or_else(|| {
                    format!("{at}: expected a token and its log-probability, got {candidate}")
                })
        })
        .collect()
}

/// Adds up the candidates that spell a label.
fn masses(candidates: &[(String, f64)], labels: Labels) -> Result<LabelMass, String> {
    let mass = |label: &str| -> f64 {
        let spells = |token: &str| token.trim_start_matches([' ', 'Ġ', '▁']) == label;
        candidates.iter().filter(|(token, _)| spells(token)).map(|(_, logprob)| logprob.exp()).sum()
    };
    let mass = LabelMass { first: mass(labels.first), second: mass(labels.second) };
    let total: f64 = candidates.iter().map(|(_, logprob)| logprob.exp()).sum();
    if total > 1.0 + 1e-2 {
        return Err(format!("log-probabilities add up to a probability of {total:.3}"));
    }
    Ok(mass)
}
