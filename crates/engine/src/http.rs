//! What every client of a server shares: requests with time-outs, sizes that are capped, keys that are never shown, attempts
//! with growing pauses, and which failures pass.
//!
//! A server's answers are someone else's input. What passes (429, 5xx, a cut or slow connection, a page with status 200) is
//! tried again; what the server refuses for the request itself is that request's own matter; anything else ends the work.

use std::time::Duration;

use arete_records::proxy;
use arete_records::redact::{self, redacted};
use serde_json::Value;

use crate::Error;
use crate::config::ServerConfig;

/// Largest answer that is read, for each token asked for and besides: text of tokens escaped in JSON, candidates, thoughts.
const BYTES_PER_TOKEN: u64 = 4 << 10;
const MOST_OTHER_BYTES: u64 = 256 << 10;

/// Environment variable of the servers' key; never a flag, which other users of the machine see.
const KEY_VARIABLE: &str = "OPENAI_API_KEY";

/// A text that is never printed.
struct Secret(String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

/// Why one request failed, and whether another attempt makes sense.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What went wrong, without secrets.
    pub reason: String,
    /// Whether another attempt makes sense.
    pub kind: FailureKind,
    /// Seconds the server asked to wait.
    pub wait_s: Option<f64>,
    /// The answer's status, if there was an answer.
    pub status: Option<u16>,
}

/// What a failure says of the next attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// Another attempt may succeed.
    Passing,
    /// The server will not take this one request (too long for its model, say), or answers it with nonsense.
    Request,
    /// No request will succeed.
    Lasting,
}

impl Failure {
    /// The reason is a server's word, which may hold what it was sent.
    pub fn new(kind: FailureKind, reason: impl AsRef<str>) -> Self {
        let reason = short(reason.as_ref());
        Self { reason, kind, wait_s: None, status: None }
    }

    /// No request will succeed.
    pub fn lasting(reason: impl AsRef<str>) -> Self {
        Self::new(FailureKind::Lasting, reason)
    }

    /// Another attempt may succeed.
    pub fn passing(reason: impl AsRef<str>) -> Self {
        Self::new(FailureKind::Passing, reason)
    }
}

/// What a status says of the next attempt.
#[must_use]
pub fn kind_of_status(status: u64) -> FailureKind {
    match status {
        408 | 425 | 429 | 500..=599 => FailureKind::Passing,
        400 | 413 | 422 => FailureKind::Request,
        _ => FailureKind::Lasting,
    }
}

/// A server's address, and how it is talked to.
#[derive(Debug)]
pub struct Http {
    agent: ureq::Agent,
    base: String,
    key: Option<Secret>,
    config: ServerConfig,
    /// The proxy between, for messages.
    proxy: Option<String>,
}

impl Http {
    /// Prepares to talk to `url` (with or without `/v1`), which the user knows as `setting`.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] for an impossible setting, address, key or proxy.
    pub fn new(setting: &'static str, url: &str, config: &ServerConfig) -> Result<Self, Error> {
        config.check()?;
        let has_scheme = ["http://", "https://"].iter().any(|scheme| url.starts_with(scheme));
        if !has_scheme || url.contains(['?', '#']) {
            return Err(Error::Setting {
                name: setting,
                expected: "an address with http:// or https://, and nothing behind its path"
                    .to_owned(),
                got: redact::shown_address(url),
            });
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
        let base = base.strip_suffix("/v1").unwrap_or(base).to_owned();
        Ok(Self { agent, base, key, config: config.clone(), proxy: proxy_name })
    }

    /// The address of a path, without secrets.
    #[must_use]
    pub fn at(&self, path: &str) -> String {
        redacted(&format!("{}{path}", self.base)).into_owned()
    }

    /// An error that names the address of a path.
    #[must_use]
    pub fn error(&self, path: &str, what: &'static str, failure: &Failure) -> Error {
        let reason = match &self.proxy {
            Some(proxy) => format!("{} (through the proxy {proxy})", failure.reason),
            None => failure.reason.clone(),
        };
        Error::Server { url: self.at(path), what, reason }
    }

    /// The text that answers a request: a POST of `body`, or a GET. An answer to `max_tokens` tokens may be so long.
    ///
    /// # Errors
    ///
    /// What became of it.
    pub fn send(
        &self,
        path: &str,
        body: Option<&Value>,
        max_tokens: usize,
    ) -> Result<String, Failure> {
        let address = format!("{}{path}", self.base);
        let authorization = self.key.as_ref().map(|Secret(key)| format!("Bearer {key}"));
        let sent = match body {
            Some(body) => {
                let mut request = self.agent.post(&address);
                if let Some(authorization) = authorization {
                    request = request.header("Authorization", authorization);
                }
                request.send_json(body)
            }
            None => {
                let mut request = self.agent.get(&address);
                if let Some(authorization) = authorization {
                    request = request.header("Authorization", authorization);
                }
                request.call()
            }
        };
        let mut response = sent.map_err(|error| Failure::passing(error.to_string()))?;
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
                let reason = format!(
                    "an answer of more than {limit} bytes to {max_tokens} tokens asked for"
                );
                return Err(Failure::new(FailureKind::Request, reason));
            }
            Err(error) => return Err(Failure::passing(format!("reply broken off: {error}"))),
        };
        if (200..300).contains(&status) {
            return Ok(text);
        }
        let kind = kind_of_status(u64::from(status));
        let failure = Failure::new(kind, format!("status {status}: {}", short(&text)));
        Err(Failure { wait_s, status: Some(status), ..failure })
    }

    /// [`Http::send`] for an answer that is JSON.
    ///
    /// # Errors
    ///
    /// As there, and as [`parse`].
    pub fn json(
        &self,
        path: &str,
        body: Option<&Value>,
        max_tokens: usize,
    ) -> Result<Value, Failure> {
        parse(&self.send(path, body, max_tokens)?)
    }

    /// Tries until it succeeds, another attempt would be vain, or the attempts of the settings are spent.
    ///
    /// # Errors
    ///
    /// The last failure.
    pub fn attempt<T>(
        &self,
        what: &str,
        work: impl Fn() -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        self.attempts(self.config.attempts, what, work)
    }

    /// [`Http::attempt`] with another number of attempts.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn attempts<T>(
        &self,
        attempts: usize,
        what: &str,
        work: impl Fn() -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut pause_s = self.config.backoff_s;
        for attempt in 1.. {
            let failure = match work() {
                Ok(value) => return Ok(value),
                Err(failure) => failure,
            };
            if failure.kind != FailureKind::Passing {
                return Err(failure);
            }
            if attempt >= attempts {
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

/// An answer that is JSON.
///
/// # Errors
///
/// A page instead of it (a login, a proxy's excuse) comes from between us and the server, and passes.
pub fn parse(text: &str) -> Result<Value, Failure> {
    serde_json::from_str(text)
        .map_err(|error| Failure::passing(format!("reply is not JSON: {error}: {}", short(text))))
}

/// The beginning of what a server said, without secrets.
#[must_use]
pub fn short(text: &str) -> String {
    const MOST: usize = 600;
    // Redacted before it is cut: half a key is a secret, too.
    let text = redacted(text);
    let mut chars = text.trim().chars();
    let mut short: String = chars.by_ref().take(MOST).collect();
    if chars.next().is_some() {
        short.push('…');
    }
    short
}
