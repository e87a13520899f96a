//! A client of OpenAI-compatible servers (vLLM, llama.cpp, …): replies through
//! `/v1/chat/completions`, verdicts from its `top_logprobs`.
//!
//! A server's answers are someone else's input: whatever is not what was asked for is an error
//! that says so (replies) or a counted abstention (verdicts). Refusals that pass (429, 5xx, a cut
//! or slow connection) are tried again, with growing pauses.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use arete_records::{FinishReason, Message};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{Chain, Drawing, Labels, Query, Reply};
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
    passing: bool,
    /// Seconds the server asked to wait.
    wait_s: Option<f64>,
}

impl Failure {
    fn lasting(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), passing: false, wait_s: None }
    }

    fn passing(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), passing: true, wait_s: None }
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

    pub(super) fn chains(
        &self,
        chains: &[Chain],
        drawing: &Drawing,
    ) -> Result<Vec<Vec<Vec<Reply>>>, Error> {
        if drawing.sampling.top_k != 0 {
            tracing::debug!("top_k is sent as an extension of the OpenAI interface");
        }
        let jobs: Vec<(usize, u64)> = chains
            .iter()
            .enumerate()
            .flat_map(|(idx, chain)| chain.samples.iter().map(move |&sample| (idx, sample)))
            .collect();
        let replies =
            self.each(&jobs, |&(idx, sample)| self.chain(&chains[idx], sample, drawing))?;
        let mut out: Vec<Vec<Vec<Reply>>> = vec![Vec::new(); chains.len()];
        for ((idx, _), replies) in jobs.into_iter().zip(replies) {
            out[idx].push(replies);
        }
        Ok(out)
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
            let reply = self.ask("reply", &body, read_reply)?;
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
        self.each(queries, |query| {
            let body = self.verdict_request(&query.messages);
            let mass = self.ask("verdict", &body, |answer| {
                // What does not make sense will not make sense next time: abstain, and count.
                Ok(read_candidates(answer).and_then(|candidates| masses(&candidates, labels)))
            })?;
            Ok(mass.unwrap_or_else(|reason| {
                self.abstentions.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(reason, "verdict makes no sense, counted as an abstention");
                LabelMass { first: 0.0, second: 0.0 }
            }))
        })
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

    /// Works on every job with bounded concurrency; results in the order of the jobs.
    fn each<J: Sync, R: Send>(
        &self,
        jobs: &[J],
        work: impl Fn(&J) -> Result<R, Error> + Sync,
    ) -> Result<Vec<R>, Error> {
        let next = AtomicUsize::new(0);
        let results: Vec<Mutex<Option<Result<R, Error>>>> =
            jobs.iter().map(|_| Mutex::new(None)).collect();
        std::thread::scope(|scope| {
            for _ in 0..self.config.concurrency.min(jobs.len()) {
                scope.spawn(|| {
                    loop {
                        let idx = next.fetch_add(1, Ordering::Relaxed);
                        let Some(job) = jobs.get(idx) else { return };
                        let result = work(job);
                        if result.is_err() {
                            next.store(jobs.len(), Ordering::Relaxed); // the others stop too
                        }
                        *results[idx].lock().expect("no thread panics holding it") = Some(result);
                    }
                });
            }
        });
        let mut out = Vec::with_capacity(jobs.len());
        let mut finished: Vec<Option<Result<R, Error>>> = results
            .into_iter()
            .map(|slot| slot.into_inner().expect("no thread panics holding it"))
            .collect();
        if let Some(failed) = finished.iter().position(|result| matches!(result, Some(Err(_)))) {
            let Some(Err(error)) = finished.swap_remove(failed) else {
                unreachable!("position found an error")
            };
            return Err(error);
        }
        for result in finished.into_iter().flatten() {
            out.push(result?);
        }
        Ok(out)
    }

    /// Sends a request until `read` accepts its answer.
    fn ask<T>(
        &self,
        what: &'static str,
        body: &Value,
        read: impl Fn(&Value) -> Result<T, Failure>,
    ) -> Result<T, Error> {
        let mut pause_s = self.config.backoff_s;
        for attempt in 1.. {
            let failure = match self.post(body).and_then(|answer| read(&answer)) {
                Ok(value) => return Ok(value),
                Err(failure) => failure,
            };
            if !failure.passing || attempt >= self.config.attempts {
                return Err(Error::Server {
                    url: self.endpoint.clone(),
                    what,
                    reason: match failure.passing {
                        true => format!("{} ({attempt} attempts)", failure.reason),
                        false => failure.reason,
                    },
                });
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
            200..=299 => serde_json::from_str(&text)
                .map_err(|error| Failure::lasting(format!("reply is not JSON: {error}"))),
            408 | 425 | 429 | 500..=599 => {
                Err(Failure { reason: refusal(status, &text), passing: true, wait_s })
            }
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
    let missing = |field: &str| Failure::lasting(format!("reply without {field}"));
    let choice = &answer["choices"][0];
    let text = choice["message"]["content"]
        .as_str()
        .ok_or_else(|| missing("choices[0].message.content"))?;
    let finish_reason = match choice["finish_reason"].as_str() {
        Some("stop") => FinishReason::Stop,
        Some("length") => FinishReason::Length,
        other => {
            let reason = format!("finish_reason: expected stop or length, got {other:?}");
            return Err(Failure::lasting(reason));
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
