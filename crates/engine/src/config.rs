//! What can be set about servers; the same keys in every stage's table that has them.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Error;
use crate::dialect::Dialect;

/// How a server is talked to.
#[derive(Debug, Clone, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct ServerConfig {
    /// Requests in flight at a server at once
    #[arg(long, default_value_t = 16, value_name = "N")]
    #[serde(default = "defaults::concurrency")]
    pub concurrency: usize,
    /// Attempts at a request before giving up
    #[arg(long, default_value_t = 6, value_name = "N")]
    #[serde(default = "defaults::attempts")]
    pub attempts: usize,
    /// Seconds a server may take for one answer
    #[arg(long, default_value_t = 120.0, value_name = "S")]
    #[serde(default = "defaults::timeout_s")]
    pub timeout_s: f64,
    /// Seconds to wait before the second attempt; doubled before each further one
    #[arg(long, default_value_t = 0.5, value_name = "S")]
    #[serde(default = "defaults::backoff_s")]
    pub backoff_s: f64,
}

/// The same values for settings that were written before there were servers in their stage.
mod defaults {
    pub(super) fn concurrency() -> usize {
        16
    }
    pub(super) fn attempts() -> usize {
        6
    }
    pub(super) fn timeout_s() -> f64 {
        120.0
    }
    pub(super) fn backoff_s() -> f64 {
        0.5
    }
    /// Logits of some tens, rounded to bfloat16 by two programs: 0.06 on the mean was seen with SmolLM2.
    pub(super) fn tolerance() -> f64 {
        0.15
    }
    pub(super) fn wait_s() -> f64 {
        120.0
    }
}

impl ServerConfig {
    /// Refuses what cannot be.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`].
    pub fn check(&self) -> Result<(), Error> {
        let setting = |name, expected: &str, got: String| {
            Err(Error::Setting { name, expected: expected.to_owned(), got })
        };
        if self.concurrency == 0 || self.attempts == 0 {
            return setting("concurrency, attempts", "at least 1", "0".to_owned());
        }
        if !(self.timeout_s > 0.0 && self.timeout_s < 1e6 && (0.0..1e4).contains(&self.backoff_s)) {
            let got = format!("{} and {}", self.timeout_s, self.backoff_s);
            return setting("timeout_s, backoff_s", "positive seconds", got);
        }
        Ok(())
    }
}

/// The servers that sample in the model's place.
#[derive(Debug, Clone, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct EngineArgs {
    /// Servers (vLLM, SGLang) that hold the model and sample instead of this process, separated by commas: tokens in and out,
    /// adapters loaded at run time, proved by a canary (docs/engines.md)
    #[arg(long, value_delimiter = ',', value_name = "URL,…")]
    #[serde(default)]
    pub engine_urls: Option<Vec<String>>,
    /// Directory for adapters that the servers are to load, which they must see, too [default: engines/ in the output]
    #[arg(long, value_name = "DIR")]
    #[serde(default)]
    pub engine_adapter_dir: Option<PathBuf>,
    /// The same directory as the servers know it, if they know it by another path
    #[arg(long, value_name = "DIR")]
    #[serde(default)]
    pub engine_server_dir: Option<PathBuf>,
    /// Name under which the servers hold the model; default: the only one that they list
    #[arg(long, value_name = "NAME")]
    #[serde(default)]
    pub engine_model: Option<String>,
    /// What the servers are
    #[arg(long, value_enum, default_value_t = Dialect::Vllm)]
    #[serde(default)]
    pub engine_dialect: Dialect,
    /// Most that a server's log-probabilities of the canary's text may differ from those here, nats, on the mean of tokens
    #[arg(long, default_value_t = defaults::tolerance(), value_name = "NATS")]
    #[serde(default = "defaults::tolerance")]
    pub engine_tolerance: f64,
    /// Seconds to wait for a server that does not answer: at the start, and when none is left
    #[arg(long, default_value_t = defaults::wait_s(), value_name = "S")]
    #[serde(default = "defaults::wait_s")]
    pub engine_wait_s: f64,
}

/// Keys of [`EngineArgs`] and [`ServerConfig`]: where servers stand and how they are talked to changes no result.
const KEYS: [&str; 11] = [
    "engine_urls",
    "engine_adapter_dir",
    "engine_server_dir",
    "engine_model",
    "engine_dialect",
    "engine_tolerance",
    "engine_wait_s",
    "concurrency",
    "attempts",
    "timeout_s",
    "backoff_s",
];

impl EngineArgs {
    /// The addresses; none if this process samples.
    #[must_use]
    pub fn urls(&self) -> Option<&[String]> {
        self.engine_urls.as_deref().filter(|urls| !urls.is_empty())
    }

    /// Refuses what cannot be.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`].
    pub fn check(&self) -> Result<(), Error> {
        let setting = |name, expected: &str, got: String| {
            Err(Error::Setting { name, expected: expected.to_owned(), got })
        };
        for (name, value) in
            [("engine_tolerance", self.engine_tolerance), ("engine_wait_s", self.engine_wait_s)]
        {
            if !(0.0..1e6).contains(&value) {
                return setting(name, "a number of at least 0", value.to_string());
            }
        }
        let urls = self.urls().unwrap_or_default();
        let twice = urls.iter().enumerate().find(|(at, url)| urls[..*at].contains(url));
        match twice {
            Some((_, url)) => setting("engine_urls", "each server once", url.clone()),
            None => Ok(()),
        }
    }

    /// Takes these settings out of a stage's recorded ones, and puts in what does change results: that servers sampled, and of
    /// which kind.
    pub fn record_in(recorded: &mut Value) {
        let Value::Object(recorded) = recorded else { return };
        let has_servers = recorded
            .get("engine_urls")
            .and_then(Value::as_array)
            .is_some_and(|urls| !urls.is_empty());
        let dialect = recorded.get("engine_dialect").cloned().filter(|_| has_servers);
        recorded.retain(|key, _| !KEYS.contains(&key.as_str()));
        recorded.extend(dialect.map(|dialect| ("engines".to_owned(), dialect)));
    }
}
