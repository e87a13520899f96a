//! A client of OpenAI-compatible servers (vLLM, llama.cpp, …): replies through
//! `/v1/chat/completions`, verdicts from its `top_logprobs`, or from the labels' own probabilities where it gives these.
//!
//! A server's answers are someone else's input. What passes (429, 5xx, a cut or slow connection, a page or a reported error
//! with status 200) is tried again, with growing pauses, and ends the work if it lasts; nothing of it is kept. A request that
//! the server refuses for itself (too long, filtered), or answers with something that is no reply, is that request's own
//! matter: its item is left out, or its verdict an abstention. A reply that the server's content filter broke off counts as
//! one that was cut. Requests run in threads of their own, so that a signal is answered while a server hangs.
//! Of several servers any may answer; one that is lost costs the requests in flight, which others are asked for.

mod answer;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, bail};
use arete_engine::http::{Failure, FailureKind, Http};
use arete_engine::spread::{self, Spread};
use arete_engine::{pool, request_seed};
use arete_records::redact::redacted;
use arete_records::{FinishReason, Message, Refusal};
use serde_json::{Value, json};

use super::{Chain, Drawing, Labels, Outcome, Parts, Query, Refused, Reply};
use crate::judge::verdict::{LabelMass, MIN_MASS};

/// As many candidates as the OpenAI interface allows to ask for.
const TOP_LOGPROBS: u32 = 20;

/// Where replies and verdicts are asked for.
const CHAT: &str = "/v1/chat/completions";

/// What addresses are called in settings.
const ADDRESSES: &str = "engine_url, judge_url";

pub use arete_engine::ServerConfig;

/// Servers, one or several, and the model that they serve. Shared by the threads of requests.
#[derive(Debug, Clone)]
pub struct ServerEngine {
    servers: Spread<Client>,
    model: String,
    tally: Arc<Tally>,
}

/// What came of verdicts beside them.
#[derive(Debug, Default)]
struct Tally {
    abstentions: AtomicUsize,
    /// What verdicts began with instead of a label, and how often.
    instead: Mutex<BTreeMap<String, usize>>,
}

/// One of the servers.
#[derive(Debug)]
struct Client {
    http: Http,
    model: String,
    needs_logprobs: bool,
    dialect: Mutex<Dialect>,
    /// The tokens that spell each label, where the server gives the probability of any token that is asked for.
    label_ids: Mutex<BTreeMap<&'static str, Vec<i64>>>,
}

/// In what a server differs from others, found by the probe.
#[derive(Debug, Clone, Copy)]
struct Dialect {
    /// The name of the limit of tokens.
    max_tokens: &'static str,
    /// Candidates that may be asked for.
    top_logprobs: u32,
}

/// The labels that judges are asked for.
const LABELS: [Labels; 2] = [Labels::AB, Labels::YES_NO];

impl ServerEngine {
    /// Prepares to talk to one server: [`ServerEngine::connect_all`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn connect(
        url: &str,
        model: &str,
        config: &ServerConfig,
        needs_logprobs: bool,
    ) -> Result<Self> {
        Self::connect_all(&[url.to_owned()], model, config, needs_logprobs)
    }

    /// Prepares to talk to `urls` (with or without `/v1`); asks each for one short reply, and for
    /// log-probabilities if verdicts will be read from them. From then on any of them may answer a request.
    ///
    /// # Errors
    ///
    /// A refused setting for an impossible setting, no address or one that is there twice; the server's failure if its probe
    /// fails.
    pub fn connect_all(
        urls: &[String],
        model: &str,
        config: &ServerConfig,
        needs_logprobs: bool,
    ) -> Result<Self> {
        let is_twice = |(at, url): &(usize, &String)| urls[..*at].contains(url);
        if urls.is_empty() || urls.iter().enumerate().any(|place| is_twice(&place)) {
            let got = if urls.is_empty() { "none".to_owned() } else { urls.join(", ") };
            bail!(Refusal::setting(ADDRESSES, "servers, each once", redacted(&got)));
        }
        let client = |url: &String| -> Result<Arc<Client>> {
            Ok(Arc::new(Client {
                http: Http::new(ADDRESSES, url, config)?,
                model: model.to_owned(),
                needs_logprobs,
                label_ids: Mutex::default(),
                dialect: Mutex::new(Dialect {
                    max_tokens: "max_tokens",
                    top_logprobs: TOP_LOGPROBS,
                }),
            }))
        };
        let clients: Vec<Arc<Client>> = urls.iter().map(client).collect::<Result<_>>()?;
        let open = |client: &Arc<Client>| client.open();
        pool::each(clients.len(), clients.clone(), open, |_, ()| Ok::<_, anyhow::Error>(()))?;
        read_alike(&clients);
        let servers = Spread::new(clients, config);
        Ok(Self { servers, model: model.to_owned(), tally: Arc::default() })
    }

    /// The served model's name.
    pub fn name(&self) -> &str {
        &self.model
    }

    /// Verdicts so far that made no sense and were counted as abstentions.
    pub fn n_abstentions(&self) -> usize {
        self.tally.abstentions.load(Ordering::Relaxed)
    }

    /// What verdicts began with instead of a label, the most frequent first.
    pub(super) fn instead(&self) -> Vec<(String, usize)> {
        let instead = self.tally.instead.lock().unwrap_or_else(PoisonError::into_inner);
        super::by_frequency(&instead)
    }

    pub(super) fn chains_each(
        &self,
        chains: &[Chain],
        drawing: &Drawing,
        done: &mut dyn FnMut(usize, Outcome) -> Result<()>,
    ) -> Result<()> {
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
        let (engine, own, drawing) = (self.clone(), chains.to_vec(), *drawing);
        let ask = move |&(idx, sample): &(usize, usize)| {
            engine.chain(&own[idx], own[idx].samples[sample], &drawing)
        };
        pool::each(self.servers.concurrency(), jobs.clone(), ask, |job, replies| {
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

    pub(super) fn label_masses(&self, queries: &[Query], labels: Labels) -> Result<Vec<LabelMass>> {
        let mut out = vec![LabelMass { first: 0.0, second: 0.0 }; queries.len()];
        let engine = self.clone();
        let ask = move |query: &Query| engine.label_mass(query, labels);
        pool::each(self.servers.concurrency(), queries.to_vec(), ask, |idx, mass| {
            out[idx] = mass;
            Ok(())
        })?;
        Ok(out)
    }

    /// One sample of one chain, turn by turn; why the server will not have it, if it will not.
    fn chain(
        &self,
        chain: &Chain,
        sample: u64,
        drawing: &Drawing,
    ) -> Result<Result<Vec<Reply>, Refused>> {
        let mut messages = chain.messages.clone();
        let mut replies = Vec::new();
        let mut questions = chain.questions.iter();
        loop {
            let seed = request_seed(drawing.seed, chain.key, sample, replies.len());
            let asked = self.servers.ask("reply", |server| server.reply(&messages, drawing, seed));
            let reply = match asked {
                Ok(reply) => reply,
                Err((server, failure)) if failure.kind != FailureKind::Request => {
                    bail!(server.error("reply", &failure));
                }
                Err((_, failure)) if drawing.is_verdict => {
                    self.tally.abstain(&failure.reason);
                    Reply { text: String::new(), finish_reason: FinishReason::Length, n_tokens: 0 }
                }
                Err((_, failure)) => return Ok(Err(Refused(failure.reason))),
            };
            messages.push(Message::assistant(reply.text.as_str()));
            replies.push(reply);
            match questions.next() {
                Some(question) => messages.push(Message::user(question.as_str())),
                None => return Ok(Ok(replies)),
            }
        }
    }

    fn label_mass(&self, query: &Query, labels: Labels) -> Result<LabelMass> {
        let asked = self.servers.ask("verdict", |server| server.verdict(&query.messages, labels));
        match asked {
            Ok((mass, candidates)) => {
                if mass.first + mass.second < MIN_MASS {
                    self.tally.count_instead(&candidates);
                }
                Ok(mass)
            }
            // What does not make sense will not make sense next time: abstain, and count.
            Err((_, Failure { kind: FailureKind::Request, reason, .. })) => {
                self.tally.abstain(&reason);
                Ok(LabelMass { first: 0.0, second: 0.0 })
            }
            Err((server, failure)) => bail!(server.error("verdict", &failure)),
        }
    }
}

/// Has verdicts of all servers be read from the labels' own probabilities, or of none: which server answers is to change nothing.
fn read_alike(clients: &[Arc<Client>]) {
    if clients.iter().any(|client| client.labels().is_empty()) {
        clients.iter().for_each(|client| client.labels().clear());
    } else {
        tracing::info!("the judge's server gives every label's own probability");
    }
}

impl Tally {
    fn abstain(&self, reason: &str) {
        self.abstentions.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(reason, "no verdict, counted as an abstention");
    }

    fn count_instead(&self, candidates: &[(String, f64)]) {
        if let Some(token) = answer::most_probable(candidates) {
            let mut instead = self.instead.lock().unwrap_or_else(PoisonError::into_inner);
            *instead.entry(token.to_owned()).or_insert(0) += 1;
        }
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

impl spread::Server for Client {
    fn http(&self) -> &Http {
        &self.http
    }

    fn look(&self) -> Result<(), Failure> {
        self.probe()
    }
}

impl Client {
    fn dialect(&self) -> Dialect {
        *self.dialect.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn labels(&self) -> MutexGuard<'_, BTreeMap<&'static str, Vec<i64>>> {
        self.label_ids.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for one short reply, in the dialect that the server takes.
    fn open(&self) -> Result<()> {
        let what = if self.needs_logprobs { "probe for top_logprobs" } else { "probe" };
        while let Err(failure) = self.http.attempt(what, || self.probe()) {
            let Some(dialect) = self.dialect().other(&failure) else {
                bail!(self.error(what, &failure));
            };
            tracing::debug!(?dialect, reason = failure.reason, "the server wants another dialect");
            *self.dialect.lock().unwrap_or_else(PoisonError::into_inner) = dialect;
        }
        if self.needs_logprobs {
            self.learn_labels();
        }
        Ok(())
    }

    fn probe(&self) -> Result<(), Failure> {
        let hello = [Message::user("Reply with the letter A.")];
        if !self.needs_logprobs {
            // At temperature 1: some servers know no 0.
            let found = self.ask(&self.reply_request(&hello, 1, 1.0, 1.0), 1)?;
            // One token is not enough for a model that thinks first; that is no fault of the server.
            return if answer::is_thought(&found) {
                Ok(())
            } else {
                answer::reply(&found).map(drop)
            };
        }
        let found = self.ask(&self.verdict_request(&hello, Labels::AB), 1)?;
        let candidates = answer::candidates(&found).map_err(|reason| {
            Failure::lasting(format!(
                "{reason}; the server gives no usable log-probabilities: use --method \
                 pairwise-text, or a server that does (vLLM, llama.cpp)"
            ))
        })?;
        let mass =
            answer::masses(&candidates, Labels::AB).map_or(0.0, |mass| mass.first + mass.second);
        if mass < MIN_MASS {
            tracing::warn!(
                instead = answer::most_probable(&candidates).unwrap_or_default(),
                "asked for the letter A, the judge begins with something else: its verdicts may all be abstentions"
            );
        }
        Ok(())
    }

    fn reply(&self, messages: &[Message], drawing: &Drawing, seed: u64) -> Result<Reply, Failure> {
        let Drawing { sampling, max_new_tokens, .. } = *drawing;
        let (temperature, top_p) = (sampling.temperature, sampling.top_p);
        let mut body = self.reply_request(messages, max_new_tokens, temperature, top_p);
        body["seed"] = json!(seed);
        if sampling.top_k != 0 {
            body["top_k"] = json!(sampling.top_k);
        }
        answer::reply(&self.ask(&body, max_new_tokens)?)
    }

    fn verdict(
        &self,
        messages: &[Message],
        labels: Labels,
    ) -> Result<(LabelMass, Vec<(String, f64)>), Failure> {
        answer::verdict(&self.ask(&self.verdict_request(messages, labels), 1)?, labels)
    }

    fn reply_request(
        &self,
        messages: &[Message],
        max_tokens: usize,
        temperature: f64,
        top_p: f64,
    ) -> Value {
        let mut body = json!({
            "model": self.model, "messages": messages, "temperature": temperature, "n": 1, "stream": false,
        });
        body[self.dialect().max_tokens] = json!(max_tokens);
        if top_p < 1.0 {
            body["top_p"] = json!(top_p); // 1 is what it is without, and some servers refuse it
        }
        body
    }

    /// Finds out whether the server gives the probabilities of the labels' own tokens, however improbable they are (vLLM's
    /// `logprob_token_ids`): then verdicts are read from these and not from the most probable candidates.
    fn learn_labels(&self) {
        let labels = LABELS.iter().flat_map(|labels| [labels.first, labels.second]);
        let found: Option<BTreeMap<&'static str, Vec<i64>>> = labels
            .map(|label| {
                let spelled = [label.to_owned(), format!(" {label}")];
                let ids: Vec<i64> = spelled.iter().filter_map(|text| self.token(text)).collect();
                (!ids.is_empty()).then_some((label, ids))
            })
            .collect();
        let Some(found) = found else { return };
        let n_ids = [Labels::AB.first, Labels::AB.second].map(|label| found[label].len());
        *self.labels() = found;
        // A server that does not know the key ignores it, and gives as many candidates as ever.
        let body = self.verdict_request(&[Message::user("Reply with the letter A.")], Labels::AB);
        let asked = self.http.attempt("probe for logprob_token_ids", || {
            let found = self.ask(&body, 1)?;
            answer::candidates(&found).map_err(|reason| Failure::new(FailureKind::Request, reason))
        });
        let spelled = |candidates: &[(String, f64)], label: &str| {
            candidates.iter().filter(|(token, _)| answer::spells(token, label)).count()
        };
        let has_all = asked.is_ok_and(|candidates| {
            candidates.len() <= 1 + n_ids.iter().sum::<usize>()
                && spelled(&candidates, Labels::AB.first) >= n_ids[0]
                && spelled(&candidates, Labels::AB.second) >= n_ids[1]
        });
        if !has_all {
            self.labels().clear();
        }
    }

    /// The one token that a text is, if it is one and the server tells.
    fn token(&self, text: &str) -> Option<i64> {
        let body = json!({ "model": self.model, "prompt": text, "add_special_tokens": false });
        let answer = self.http.json("/tokenize", Some(&body), 1).ok()?;
        match answer["tokens"].as_array()?.as_slice() {
            [one] => one.as_i64(),
            _ => None,
        }
    }

    fn verdict_request(&self, messages: &[Message], labels: Labels) -> Value {
        // At temperature 1 the log-probabilities are the model's own with every server. Which token is drawn is not read, so there
        // is no seed: vLLM 0.32 on the CPU ends when the prompt of a seeded request is computed in parts.
        let mut body = self.reply_request(messages, 1, 1.0, 1.0);
        body["logprobs"] = json!(true);
        body["top_logprobs"] = json!(self.dialect().top_logprobs);
        let known = self.labels();
        if !known.is_empty() {
            let ids = [labels.first, labels.second].into_iter().flat_map(|label| &known[label]);
            body["logprob_token_ids"] = json!(ids.collect::<Vec<_>>());
        }
        body
    }

    fn error(&self, what: &'static str, failure: &Failure) -> arete_engine::Error {
        self.http.error(CHAT, what, failure)
    }

    /// What the server answers to a request: one attempt.
    fn ask(&self, body: &Value, max_tokens: usize) -> Result<Value, Failure> {
        let answer = self.http.json(CHAT, Some(body), max_tokens)?;
        answer::reported(&answer).map_or(Ok(answer), Err)
    }
}

/// The reply in an answer of status 200.
///
/// # Errors
///
/// Why it is none, in words for a message.
pub fn reply_of(body: &str) -> Result<Reply, String> {
    let reply = answer::parse(body).and_then(|answer| answer::reply(&answer));
    reply.map_err(|failure| failure.reason)
}

/// What an answer of status 200 gives either label.
///
/// # Errors
///
/// Why it is no verdict, in words for a message.
pub fn label_mass_of(body: &str, labels: Labels) -> Result<LabelMass, String> {
    let verdict = answer::parse(body).and_then(|answer| answer::verdict(&answer, labels));
    verdict.map(|(mass, _)| mass).map_err(|failure| failure.reason)
}
