//! Reward models that a pooling server scores with: adapters and heads over one base (vLLM's `/classify`, else `/pooling`).
//!
//! What a reward model reads is decided here, by its reading rule, and sent as tokens; the server gives one number for each. At the start
//! every server's scores of a few conversations are compared with those of the reward models here, and again when one that was lost is back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use arete_records::hex;
use arete_records::table::shortened;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::config::ServerConfig;
use crate::dialect::{self, Dialect, MODELS};
use crate::http::{Failure, Http};
use crate::journal::ScoreJournal;
use crate::spread::{Server, Spread};
use crate::{Error, pool};

/// Conversations in one request.
const TOGETHER: usize = 8;

/// Tokens for which an answer of scores is read.
const ANSWER_TOKENS: usize = 64;

/// A reward model to be served.
#[derive(Clone, Debug)]
pub struct Served {
    /// What the run calls it.
    pub name: String,
    /// Its adapter's directory.
    pub adapter: PathBuf,
}

/// Servers of reward models.
#[derive(Debug)]
pub struct Scorers {
    servers: Spread<Scorer>,
    proofs: Arc<Mutex<Vec<Proof>>>,
    /// The served names, by the run's.
    names: BTreeMap<String, String>,
}

/// A server.
#[derive(Debug)]
struct Scorer {
    http: Http,
    /// Where it scores.
    path: OnceLock<&'static str>,
    /// The reward models that it is to hold: served names, and paths of their adapters.
    wanted: Vec<(String, String)>,
    /// What its scores are held against.
    proofs: Arc<Mutex<Vec<Proof>>>,
}

/// Scores of a reward model here.
#[derive(Clone, Debug)]
struct Proof {
    model: String,
    sequences: Vec<Vec<i64>>,
    own: Vec<f64>,
    std: f64,
    /// The largest mean difference that is taken for rounding, in standard deviations.
    limit: f64,
}

impl Scorers {
    /// Has every server hold every reward model, under a name that follows from its weights: what is there already stays.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`], [`Error::Server`].
    pub fn connect(
        urls: &[String],
        config: &ServerConfig,
        rewards: &[Served],
    ) -> Result<Self, Error> {
        let mut names = BTreeMap::new();
        let mut wanted = Vec::new();
        for Served { name, adapter } in rewards {
            let served = served_name(name, adapter)?;
            names.insert(name.clone(), served.clone());
            let path = fs_err::canonicalize(adapter)?.display().to_string();
            wanted.push((served, path));
        }
        let proofs: Arc<Mutex<Vec<Proof>>> = Arc::default();
        let scorer = |url: &String| {
            Ok(Arc::new(Scorer {
                http: Http::new("reward_urls", url, config)?,
                path: OnceLock::new(),
                wanted: wanted.clone(),
                proofs: Arc::clone(&proofs),
            }))
        };
        let servers: Vec<Arc<Scorer>> = urls.iter().map(scorer).collect::<Result<_, Error>>()?;
        if servers.is_empty() {
            let (expected, got) = ("at least one server".to_owned(), "none".to_owned());
            return Err(Error::Setting { name: "reward_urls", expected, got });
        }
        let attempts = config.attempts;
        let open = move |scorer: &Arc<Scorer>| {
            scorer.open(attempts).map_err(|(what, failure)| scorer.http.error("", what, &failure))
        };
        pool::each(servers.len(), servers.clone(), open, |_, ()| Ok::<_, Error>(()))?;
        Ok(Self { servers: Spread::new(servers, config), proofs, names })
    }

    /// How many servers there are.
    #[must_use]
    pub fn n_servers(&self) -> usize {
        self.servers.servers().len()
    }

    /// The score of each token sequence by the reward model of that name. What the journal knows is not asked for.
    ///
    /// # Errors
    ///
    /// [`Error::Server`] if no server scores a sequence; a journal that cannot be written.
    pub fn scores(
        &self,
        name: &str,
        sequences: &[Vec<i64>],
        journal: &mut ScoreJournal,
    ) -> Result<Vec<f64>, Error> {
        let model = self.names.get(name).map_or(name, String::as_str);
        let request = |sequence: &Vec<i64>| ScoreJournal::request(model, sequence);
        let requests: Vec<String> = sequences.iter().map(request).collect();
        let is_new = |(request, _): &(&String, &Vec<i64>)| journal.score(request).is_none();
        let new: Vec<(&String, &Vec<i64>)> =
            requests.iter().zip(sequences).filter(is_new).collect();
        let asked: Vec<Vec<i64>> = new.iter().map(|(_, sequence)| (*sequence).clone()).collect();
        let found = self.scores_of(model, &asked)?;
        for ((request, _), score) in new.into_iter().zip(found) {
            journal.append(request.clone(), score)?;
        }
        let known = |request: &String| journal.score(request).expect("asked for a moment ago");
        Ok(requests.iter().map(known).collect())
    }

    /// Compares every server's scores of `sequences` with those of the reward model here; the largest mean difference, in standard
    /// deviations of `std`.
    ///
    /// # Errors
    ///
    /// [`Error::Scores`] naming a server that differs by more than `limit`; as [`Scorers::scores`].
    pub fn check(
        &self,
        name: &str,
        sequences: &[Vec<i64>],
        own: &[f64],
        std: f64,
        limit: f64,
    ) -> Result<f64, Error> {
        let model = self.names.get(name).map_or(name, String::as_str).to_owned();
        let proof = Proof { model, sequences: sequences.to_vec(), own: own.to_vec(), std, limit };
        let mut largest = 0.0f64;
        let (compared, servers) = (proof.clone(), self.servers.servers());
        let compare = move |scorer: &Arc<Scorer>| {
            let difference = scorer.http.attempt("scores", || scorer.difference(&compared));
            difference.map_err(|failure| scorer.http.error(scorer.path(), "scores", &failure))
        };
        pool::each(servers.len(), servers.to_vec(), compare, |at, difference| {
            largest = largest.max(difference);
            if difference <= limit {
                return Ok(()); // NaN fails
            }
            let url = servers[at].http.at(servers[at].path());
            Err(Error::Scores { url, name: name.to_owned(), difference, limit })
        })?;
        self.proofs.lock().unwrap_or_else(PoisonError::into_inner).push(proof);
        Ok(largest)
    }

    fn scores_of(&self, model: &str, sequences: &[Vec<i64>]) -> Result<Vec<f64>, Error> {
        let jobs: Vec<Vec<Vec<i64>>> = sequences.chunks(TOGETHER).map(<[_]>::to_vec).collect();
        let mut parts: Vec<Vec<f64>> = vec![Vec::new(); jobs.len()];
        let (servers, model) = (self.servers.clone(), model.to_owned());
        let work = move |part: &Vec<Vec<i64>>| {
            let scores = servers.ask("scores", |scorer| scorer.scores(&model, part));
            scores.map_err(|(scorer, failure)| scorer.http.error(scorer.path(), "scores", &failure))
        };
        pool::each(self.servers.concurrency(), jobs, work, |at, scores| {
            parts[at] = scores;
            Ok::<_, Error>(())
        })?;
        Ok(parts.concat())
    }
}

impl Server for Scorer {
    fn http(&self) -> &Http {
        &self.http
    }

    /// Has it hold the reward models again, and its scores be those of the reward models here.
    fn look(&self) -> Result<(), Failure> {
        self.open(1).map_err(|(_, failure)| failure)?;
        let proofs = self.proofs.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for proof in &proofs {
            let difference = self.difference(proof)?;
            if difference.is_nan() || difference > proof.limit {
                return Err(Failure::lasting(format!(
                    "it is back with other scores of {}: a mean difference of {difference:.4} standard deviations",
                    proof.model
                )));
            }
        }
        Ok(())
    }
}

impl Scorer {
    fn path(&self) -> &'static str {
        self.path.get().copied().unwrap_or("/classify")
    }

    /// Has it hold every reward model, and finds out where it scores; what could not be done, if something could not.
    fn open(&self, attempts: usize) -> Result<(), (&'static str, Failure)> {
        let Self { http, wanted, .. } = self;
        let list = || dialect::cards(&http.json(MODELS, None, 256)?);
        let listed = http
            .attempts(attempts, "list of models", list)
            .map_err(|failure| ("list of models", failure))?;
        let is_there = |name: &String| listed.iter().any(|card| &card.name == name);
        for (name, path) in wanted.iter().filter(|(name, _)| !is_there(name)) {
            http.attempts(attempts, "load", || load(http, name, path))
                .map_err(|failure| ("loading a reward model", failure))?;
        }
        let Some((model, _)) = wanted.first() else { return Ok(()) };
        let classify = ask(http, "/classify", model, &[vec![0]]);
        let is_elsewhere = |failure: &Failure| matches!(failure.status, Some(404 | 405 | 501));
        let path = if classify.is_err_and(|failure| is_elsewhere(&failure)) {
            "/pooling"
        } else {
            "/classify"
        };
        self.path.get_or_init(|| path);
        Ok(())
    }

    fn scores(&self, model: &str, sequences: &[Vec<i64>]) -> Result<Vec<f64>, Failure> {
        ask(&self.http, self.path(), model, sequences)
    }

    /// The mean difference of its scores from those of the reward model here, in standard deviations.
    fn difference(&self, proof: &Proof) -> Result<f64, Failure> {
        let Proof { model, sequences, own, std, .. } = proof;
        let found = self.scores(model, sequences)?;
        let sum: f64 = found.iter().zip(own).map(|(found, own)| (found - own).abs()).sum();
        #[expect(clippy::cast_precision_loss, reason = "a few conversations")]
        Ok(sum / own.len().max(1) as f64 / std)
    }
}

/// The name of a reward model with these weights.
fn served_name(name: &str, adapter: &Path) -> Result<String, Error> {
    let weights = adapter.join("adapter_model.safetensors");
    let sum = arete_records::hashes::sha256_file(&weights)?;
    let place = Sha256::digest(fs_err::canonicalize(adapter)?.display().to_string());
    Ok(format!("arete-reward-{name}-{}-{}", &sum[..8], &hex(&place)[..4]))
}

/// Has a server hold a reward model.
fn load(http: &Http, name: &str, path: &str) -> Result<(), Failure> {
    let dialect = Dialect::Vllm;
    let body = json!({ "lora_name": name, "lora_path": path });
    match http.send(dialect.load_path(), Some(&body), 1) {
        Err(failure) if dialect::is_loaded_already(&failure) => Ok(()),
        Err(failure) => Err(dialect::of_loading(dialect, failure)),
        Ok(_) => Ok(()),
    }
}

fn ask(http: &Http, path: &str, model: &str, sequences: &[Vec<i64>]) -> Result<Vec<f64>, Failure> {
    let mut body = json!({
        "model": model, "input": sequences, "use_activation": false, "add_special_tokens": false,
    });
    if path == "/pooling" {
        body["task"] = json!("classify");
    }
    let answer = http.json(path, Some(&body), ANSWER_TOKENS * sequences.len())?;
    read(&answer, sequences.len())
}

/// The scores that an answer holds, one for each sequence: what has several labels is no reward model's.
fn read(answer: &Value, n: usize) -> Result<Vec<f64>, Failure> {
    let number = |values: &Value| match values {
        Value::Array(values) => match values.as_slice() {
            [one] => one.as_f64().or_else(|| one[0].as_f64()),
            _ => None,
        },
        one => one.as_f64(),
    };
    let score = |entry: &Value| {
        let values = ["probs", "data"].into_iter().find_map(|key| entry.get(key))?;
        let at = usize::try_from(entry["index"].as_u64()?).ok()?;
        Some((at, number(values)?))
    };
    let found = answer["data"].as_array().filter(|found| found.len() == n);
    let found: Option<BTreeMap<usize, f64>> =
        found.and_then(|found| found.iter().map(score).collect());
    found
        .filter(|found| found.keys().copied().eq(0..n))
        .map(|found| found.into_values().collect())
        .ok_or_else(|| {
            Failure::lasting(format!(
                "expected a score for each of {n} conversations, of one label: {}",
                shortened(answer)
            ))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_number_for_each_conversation_is_a_score() {
        let classify = json!({"data": [
            {"index": 1, "label": "LABEL_0", "probs": [-0.5], "num_classes": 1},
            {"index": 0, "label": "LABEL_0", "probs": [2.25], "num_classes": 1},
        ]});
        assert_eq!(read(&classify, 2).unwrap(), [2.25, -0.5]);
        let pooling = json!({"data": [{"index": 0, "object": "pooling", "data": [1.5]}]});
        assert_eq!(read(&pooling, 1).unwrap(), [1.5]);
        for (wrong, n) in [
            (json!({"data": [{"index": 0, "probs": [0.4, 0.6]}]}), 1),
            (json!({"data": [{"index": 0, "probs": [0.4]}, {"index": 0, "probs": [0.4]}]}), 2),
            (json!({"data": [{"index": 0, "probs": [null]}]}), 1),
            (json!({"data": [{"index": 0, "probs": [0.4]}]}), 2),
            (json!({"object": "error"}), 1),
        ] {
            assert!(read(&wrong, n).is_err(), "{wrong}");
        }
    }
}
