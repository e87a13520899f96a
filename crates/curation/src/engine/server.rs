//! A client of OpenAI-compatible servers (vLLM, llama.cpp, …): replies through
//! `/v1/chat/completions`, verdicts from its `top_logprobs`.
//!
//! A server's answers are someone else's input. What passes (429, 5xx, a cut or slow connection, a page or a reported error
//! with status 200) is tried again, with growing pauses, and ends the work if it lasts; nothing of it is kept. A request that
//! the server refuses for itself (too long, filtered), or answers with something that is no reply, is that request's own
//! matter: its item is left out, or its verdict an abstention. A reply that the server's content filter broke off counts as
//! one that was cut. Requests run in threads of their own, so that a signal is answered while a server hangs.

mod answer;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arete_records::proxy;
use arete_records::redact::{self, redacted};
use arete_records::{FinishReason, Message};
use arete_stage::interrupt;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{Chain, Drawing, Labels, Outcome, Parts, Query, Refused, Reply};
use crate::Error;
use crate::judge::verdict::{LabelMass, MIN_MASS};

/// Largest answer that is read, for each token asked for and besides: text of tokens escaped in JSON, candidates, thoughts.
const BYTES_PER_TOKEN: u64 = 4 << 10;
const MOST_OTHER_BYTES: u64 = 256 << 10;

/// As many candidates as the OpenAI interface allows to ask for.
const TOP_LOGPROBS: u32 = 20;

/// How often a signal is looked for while answers are awaited.
const LOOK: Duration = Duration::from_millis(100);

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
    client: Arc<Client>,
    concurrency: usize,
}

/// What requests need, shared by their threads.
#[derive(Debug)]
struct Client {
    agent: ureq::Agent,
    endpoint: String,
    model: String,
    key: Option<Secret>,
    config: ServerConfig,
    /// The proxy between, for messages.
    proxy: Option<String>,
    dialect: Mutex<Dialect>,
    abstentions: AtomicUsize,
    /// What verdicts began with instead of a label, and how often.
    instead: Mutex<BTreeMap<String, usize>>,
}

/// In what a server differs from others, found by the probe.
#[derive(Debug, Clone, Copy)]
struct Dialect {
    /// The name of the limit of tokens.
    max_tokens: &'static str,
    /// Candidates that may be asked for.
    top_logprobs: u32,
}

/// A text that is never printed.
struct Secret(String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

/// Why one request failed, and whether another attempt makes sense.
#[derive(Debug)]
struct Failure {
    reason: String,
    kind: FailureKind,
    /// Seconds the server asked to wait.
    wait_s: Option<f64>,
    /// The model thought, and came to no reply.
    thinks: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    /// The reason is a server's word, which may hold what it was sent.
    fn new(kind: FailureKind, reason: impl AsRef<str>) -> Self {
        Self { reason: redacted(reason.as_ref()).into_owned(), kind, wait_s: None, thinks: false }
    }

    fn lasting(reason: impl AsRef<str>) -> Self {
        Self::new(FailureKind::Lasting, reason)
    }

    fn passing(reason: impl AsRef<str>) -> Self {
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
                redacted(url).into_owned(),
            );
        }
        let key = key_of(std::env::var(KEY_VARIABLE).ok())?;
        if let Some(secret) = redact::userinfo(url) {
            let password = secret.split_once(':').map_or(secret, |(_, password)| password);
            redact::hide(password);
        }
        let (proxy, proxy_name) = proxy_of(url)?;
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(Duration::from_secs_f64(config.timeout_s)))
            .http_status_as_error(false)
            .max_redirects(0) // a redirect could carry the key elsewhere
            .proxy(proxy)
            .build()
            .into();
        let base = url.trim_end_matches('/');
        let base = base.strip_suffix("/v1").unwrap_or(base);
        let client = Client {
            agent,
            endpoint: format!("{base}/v1/chat/completions"),
            model: model.to_owned(),
            key,
            config: config.clone(),
            proxy: proxy_name,
            dialect: Mutex::new(Dialect { max_tokens: "max_tokens", top_logprobs: TOP_LOGPROBS }),
            abstentions: AtomicUsize::new(0),
            instead: Mutex::default(),
        };
        let engine = Self { client: Arc::new(client), concurrency: config.concurrency };
        engine.probed(needs_logprobs)
    }

    /// The served model's name.
    pub fn name(&self) -> &str {
        &self.client.model
    }

    /// Verdicts so far that made no sense and were counted as abstentions.
    pub fn n_abstentions(&self) -> usize {
        self.client.abstentions.load(Ordering::Relaxed)
    }

    /// What verdicts began with instead of a label, the most frequent first.
    pub(super) fn instead(&self) -> Vec<(String, usize)> {
        let instead = self.client.instead.lock().unwrap_or_else(PoisonError::into_inner);
        super::by_frequency(&instead)
    }

    /// Asks for one short reply, in the dialect that the server takes.
    fn probed(self, needs_logprobs: bool) -> Result<Self, Error> {
        loop {
            let asked = Arc::clone(&self.client);
            let mut outcome = Ok(());
            let probe = move |(): &()| Ok(asked.probe(needs_logprobs));
            self.each(vec![()], probe, |_, found| {
                outcome = found;
                Ok(())
            })?;
            let failure = match outcome {
                Ok(()) => return Ok(self),
                Err(failure) => failure,
            };
            let Some(dialect) = self.client.dialect().other(&failure) else {
                let what = if needs_logprobs { "probe for top_logprobs" } else { "probe" };
                return Err(self.client.error(what, failure));
            };
            tracing::debug!(?dialect, reason = failure.reason, "the server wants another dialect");
            *self.client.dialect.lock().unwrap_or_else(PoisonError::into_inner) = dialect;
        }
    }

    pub(super) fn chains_each(
        &self,
        chains: &[Chain],
        drawing: &Drawing,
        done: &mut dyn FnMut(usize, Outcome) -> Result<(), Error>,
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
        let mut refused = vec![false; chains.len()];
        let (client, own, drawing) = (Arc::clone(&self.client), chains.to_vec(), *drawing);
        let ask = move |&(idx, sample): &(usize, usize)| {
            client.chain(&own[idx], own[idx].samples[sample], &drawing)
        };
        self.each(jobs.clone(), ask, |job, replies| {
            let (idx, sample) = jobs[job];
            match replies {
                // The first sample that is refused decides; the chain's others are of no use.
                Err(_) if refused[idx] => Ok(()),
                Err(reason) => {
                    refused[idx] = true;
                    done(idx, Err(reason))
                }
                Ok(replies) => match parts.put(idx, sample, replies) {
                    Some(whole) => done(idx, Ok(whole)),
                    None => Ok(()),
                },
            }
        })
    }

    pub(super) fn label_masses(
        &self,
        queries: &[Query],
        labels: Labels,
    ) -> Result<Vec<LabelMass>, Error> {
        let mut out = vec![LabelMass { first: 0.0, second: 0.0 }; queries.len()];
        let client = Arc::clone(&self.client);
        let ask = move |query: &Query| client.label_mass(query, labels);
        self.each(queries.to_vec(), ask, |idx, mass| {
            out[idx] = mass;
            Ok(())
        })?;
        Ok(out)
    }

    /// Works on every job with bounded concurrency. `done` receives results as they come, with the
    /// job's index. The first error stops the work; of those that came, the earliest job's is returned. A signal stops it
    /// at once: requests under way are left to themselves, and nothing of them is kept.
    fn each<J: Send + Sync + 'static, R: Send + 'static>(
        &self,
        jobs: Vec<J>,
        work: impl Fn(&J) -> Result<R, Error> + Send + Sync + 'static,
        mut done: impl FnMut(usize, R) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (n_jobs, next) = (jobs.len(), Arc::new(AtomicUsize::new(0)));
        let (shared, (sender, results)) = (Arc::new((jobs, work)), channel());
        for _ in 0..self.concurrency.min(n_jobs) {
            let (sender, next, shared) = (sender.clone(), Arc::clone(&next), Arc::clone(&shared));
            std::thread::spawn(move || {
                let (jobs, work) = &*shared;
                loop {
                    let idx = next.fetch_add(1, Ordering::Relaxed);
                    let Some(job) = jobs.get(idx) else { return };
                    if sender.send((idx, work(job))).is_err() {
                        return;
                    }
                }
            });
        }
        drop((sender, shared));
        let mut failed: Option<(usize, Error)> = None;
        loop {
            let (idx, result) = match results.recv_timeout(LOOK) {
                Ok(found) => found,
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    if let Err(interrupted) = interrupt::check() {
                        next.store(n_jobs, Ordering::Relaxed);
                        return Err(interrupted.into());
                    }
                    continue;
                }
            };
            if let Err(error) = result.and_then(|result| done(idx, result)) {
                next.store(n_jobs, Ordering::Relaxed); // no job begins any more
                if failed.as_ref().is_none_or(|(earliest, _)| idx < *earliest) {
                    failed = Some((idx, error));
                }
            }
        }
        failed.map_or(Ok(()), |(_, error)| Err(error))
    }
}

impl Dialect {
    /// The dialect to try after a failure, if the failure is one of dialect.
    fn other(self, failure: &Failure) -> Option<Self> {
        const FEWER: u32 = 5;
        if failure.kind != FailureKind::Request {
            return None;
        }
        if self.max_tokens == "max_tokens" && failure.reason.contains("max_completion_tokens") {
            return Some(Self { max_tokens: "max_completion_tokens", ..self });
        }
        let too_many = self.top_logprobs > FEWER && failure.reason.contains("top_logprobs");
        too_many.then_some(Self { top_logprobs: FEWER, ..self })
    }
}

/// The key of the environment, without the line end that a file of it ends with.
fn key_of(key: Option<String>) -> Result<Option<Secret>, Error> {
    let Some(key) = key.map(|key| key.trim().to_owned()).filter(|key| !key.is_empty()) else {
        return Ok(None);
    };
    redact::hide(&key);
    if key.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
        return Ok(Some(Secret(key)));
    }
    Err(Error::Setting {
        name: KEY_VARIABLE,
        expected: "a key in plain letters, without line ends inside".to_owned(),
        got: "one that cannot be sent".to_owned(),
    })
}

/// The proxy that leads to an address, and its name for messages.
fn proxy_of(url: &str) -> Result<(Option<ureq::Proxy>, Option<String>), Error> {
    let Some((name, value)) = proxy::of(url, |name| std::env::var(name).ok()) else {
        return Ok((None, None));
    };
    let shown = format!("{} of {name}", redacted(&value));
    match ureq::Proxy::new(&value) {
        Ok(proxy) => Ok((Some(proxy), Some(shown))),
        Err(error) => Err(Error::Setting {
            name: "http_proxy, https_proxy, all_proxy",
            expected: "the address of a proxy".to_owned(),
            got: format!("{shown} ({error})"),
        }),
    }
}

impl Client {
    fn dialect(&self) -> Dialect {
        *self.dialect.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn probe(&self, needs_logprobs: bool) -> Result<(), Failure> {
        let hello = [Message::user("Reply with the letter A.")];
        if !needs_logprobs {
            // At temperature 1: some servers know no 0.
            let body = self.reply_request(&hello, 1, 1.0, 1.0, 0);
            return match self.attempt("probe", &body, 1, answer::reply) {
                // One token is not enough for a model that thinks first; that is no fault of the server.
                Err(failure) if failure.thinks => Ok(()),
                other => other.map(drop),
            };
        }
        let body = self.verdict_request(&hello);
        let candidates = self.attempt("probe for top_logprobs", &body, 1, |found| {
            answer::candidates(found).map_err(|reason| {
                Failure::lasting(format!(
                    "{reason}; the server gives no usable log-probabilities: use --method \
                     pairwise-text, or a server that does (vLLM, llama.cpp)"
                ))
            })
        })?;
        let mass = answer::masses(&candidates, Labels::AB).map_or(0.0, |mass| mass.first + mass.second);
        if mass < MIN_MASS {
            tracing::warn!(
                instead = answer::most_probable(&candidates).unwrap_or_default(),
                "asked for the letter A, the judge begins with something else: its verdicts may all be abstentions"
            );
        }
        Ok(())
    }

    /// One sample of one chain, turn by turn; why the server will not have it, if it will not.
    fn chain(
        &self,
        chain: &Chain,
        sample: u64,
        drawing: &Drawing,
    ) -> Result<Result<Vec<Reply>, Refused>, Error> {
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
            let reply = match self.attempt("reply", &body, drawing.max_new_tokens, answer::reply) {
                Ok(reply) => reply,
                Err(failure) if failure.kind != FailureKind::Request => {
                    return Err(self.error("reply", failure));
                }
                Err(failure) if drawing.is_verdict => {
                    self.abstain(&failure.reason);
                    Reply { text: String::new(), finish_reason: FinishReason::Length, n_tokens: 0 }
                }
                Err(failure) => return Ok(Err(Refused(failure.reason))),
            };
            messages.push(Message::assistant(reply.text.as_str()));
            replies.push(reply);
            match questions.next() {
                Some(question) => messages.push(Message::user(question.as_str())),
                None => return Ok(Ok(replies)),
            }
        }
    }

    fn label_mass(&self, query: &Query, labels: Labels) -> Result<LabelMass, Error> {
        let body = self.verdict_request(&query.messages);
        let asked = self.attempt("verdict", &body, 1, |found| {
            let request = |reason: String| Failure::new(FailureKind::Request, reason);
            let candidates = answer::candidates(found).map_err(request)?;
            let mass = answer::masses(&candidates, labels).map_err(request)?;
            Ok((mass, candidates))
        });
        match asked {
            Ok((mass, candidates)) => {
                if mass.first + mass.second < MIN_MASS
                    && let Some(token) = answer::most_probable(&candidates)
                {
                    let mut instead = self.instead.lock().unwrap_or_else(PoisonError::into_inner);
                    *instead.entry(token.to_owned()).or_insert(0) += 1;
                }
                Ok(mass)
            }
            // What does not make sense will not make sense next time: abstain, and count.
            Err(Failure { kind: FailureKind::Request, reason, .. }) => {
                self.abstain(&reason);
                Ok(LabelMass { first: 0.0, second: 0.0 })
            }
            Err(failure) => Err(self.error("verdict", failure)),
        }
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
        let mut body = json!({
            "model": self.model, "messages": messages, "temperature": temperature, "seed": seed, "n": 1, "stream": false,
        });
        body[self.dialect().max_tokens] = json!(max_tokens);
        if top_p < 1.0 {
            body["top_p"] = json!(top_p); // 1 is what it is without, and some servers refuse it
        }
        body
    }

    fn verdict_request(&self, messages: &[Message]) -> Value {
        // At temperature 1 the log-probabilities are the model's own with every server.
        let mut body = self.reply_request(messages, 1, 1.0, 1.0, 0);
        body["logprobs"] = json!(true);
        body["top_logprobs"] = json!(self.dialect().top_logprobs);
        body
    }

    fn error(&self, what: &'static str, failure: Failure) -> Error {
        let reason = match &self.proxy {
            Some(proxy) => format!("{} (through the proxy {proxy})", failure.reason),
            None => failure.reason,
        };
        Error::Server { url: redacted(&self.endpoint).into_owned(), what, reason }
    }

    /// Sends a request until `read` accepts its answer, or another attempt would be vain.
    fn attempt<T>(
        &self,
        what: &'static str,
        body: &Value,
        max_tokens: usize,
        read: impl Fn(&Value) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut pause_s = self.config.backoff_s;
        for attempt in 1.. {
            let failure = match self.post(body, max_tokens).and_then(|answer| read(&answer)) {
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

    fn post(&self, body: &Value, max_tokens: usize) -> Result<Value, Failure> {
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
        let limit = MOST_OTHER_BYTES + BYTES_PER_TOKEN * max_tokens as u64;
        let text = match response.body_mut().with_config().limit(limit).read_to_string() {
            Ok(text) => text,
            Err(ureq::Error::BodyExceedsLimit(_)) => {
                let reason = format!("an answer of more than {limit} bytes to {max_tokens} tokens asked for");
                return Err(Failure::new(FailureKind::Request, reason));
            }
            Err(error) => return Err(Failure::passing(format!("reply broken off: {error}"))),
        };
        let kind = match status {
            200..=299 => {
                // A page (a login, a proxy's excuse) comes from between us and the server, and passes.
                let answer: Value = serde_json::from_str(&text).map_err(|error| {
                    Failure::passing(format!("reply is not JSON: {error}: {}", short(&text)))
                })?;
                return answer::reported(&answer).map_or(Ok(answer), Err);
            }
            status => answer::kind_of_status(u64::from(status)),
        };
        Err(Failure { wait_s, ..Failure::new(kind, format!("status {status}: {}", short(&text))) })
    }
}

fn short(text: &str) -> String {
    // Redacted before it is cut: half a key is a secret, too.
    redacted(text).trim().chars().take(200).collect()
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
