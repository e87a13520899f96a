//! The servers: which are there, which adapter they hold, and the proof of it.
//!
//! An adapter is written under a name and a path that were never used before, loaded by every server that is there (all or
//! none: what fails is taken back), proved by the [canary](crate::canary::Canary) on each, and the one before is unloaded. What earlier, killed
//! attempts of the same run left on the servers and on disk is removed at the start. A server that cannot be reached is left out until it
//! comes back, with the adapter and a canary; one that answers with other weights is refused by name.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arete_records::hex;
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::canary::{self, Canary, Known, Verdict};
use crate::config::{EngineArgs, ServerConfig};
use crate::dialect::{self, Card, Dialect, MODELS, Prompt};
use crate::http::{Failure, FailureKind, Http};
use crate::{Error, pool};

/// What the names of this program's adapters begin with.
const OURS: &str = "arete-";

/// Tokens that a list of models is read for.
const LIST_TOKENS: usize = 256;

/// Pause between looks at a server that does not answer.
pub(crate) const PAUSE: Duration = Duration::from_millis(500);

/// A server.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) link: Arc<Link>,
    /// Why it is left out for now; none while it works.
    pub(crate) down: Option<String>,
    /// What it answered to the canary: as the base, and with the adapter that it has now.
    base: Option<Vec<f64>>,
    own: Option<Vec<f64>>,
}

/// How a server is reached, shared by threads.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) http: Arc<Http>,
    pub(crate) dialect: Dialect,
    /// The name of the base there.
    pub(crate) base: String,
}

/// An adapter that the servers hold.
#[derive(Clone, Debug)]
pub(crate) struct Loaded {
    /// Its name.
    pub(crate) name: String,
    /// Where it was written.
    path: PathBuf,
    /// The same place as the servers know it.
    there: String,
    /// The canary's values under it, computed here.
    values: Vec<f64>,
    /// And under the one before, if the servers held one.
    before: Option<Vec<f64>>,
}

/// What makes up servers' proofs.
#[derive(Clone, Debug)]
pub(crate) struct Proof {
    canary: Canary,
    tolerance: f64,
}

/// The servers of a run.
#[derive(Debug)]
pub struct Fleet {
    pub(crate) servers: Vec<Server>,
    pub(crate) config: ServerConfig,
    pub(crate) wait_s: f64,
    proof: Proof,
    /// Where adapters are written, and how the servers call that place.
    dir: PathBuf,
    there: PathBuf,
    /// What the names of this run's adapters begin with, and of this attempt's.
    run: String,
    attempt: String,
    n_loaded: u64,
    pub(crate) loaded: Option<Loaded>,
}

/// Who uses the servers.
#[derive(Clone, Copy, Debug)]
pub struct Tenant<'a> {
    /// What tells this run from all others: its adapters' names follow from it.
    pub run: &'a str,
    /// Where adapters go unless the settings name a place.
    pub dir: &'a Path,
    /// Whether this process removes what earlier attempts left; of several processes of a run, one does.
    pub is_first: bool,
}

/// Why a server could not be brought up.
#[derive(Debug)]
pub(crate) enum Trouble {
    Failure(&'static str, Failure),
    Weights(String, Verdict),
}

/// What a server answered to the canary: as the base, and with the adapter.
#[derive(Clone, Debug, Default)]
pub(crate) struct Answers {
    base: Option<Vec<f64>>,
    own: Option<Vec<f64>>,
}

impl Fleet {
    /// Waits for every server, finds the model on each, removes what earlier attempts of this run left, and proves that each
    /// answers with the base.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`]; [`Error::Server`] for a server that does not come, [`Error::Weights`] for one with another base.
    pub fn connect(
        args: &EngineArgs,
        config: &ServerConfig,
        tenant: Tenant<'_>,
        canary: Canary,
    ) -> Result<Self, Error> {
        args.check()?;
        let urls = args.urls().unwrap_or_default();
        if urls.is_empty() {
            let (expected, got) = ("at least one server".to_owned(), "none".to_owned());
            return Err(Error::Setting { name: "engine_urls", expected, got });
        }
        let own_dir = args.engine_adapter_dir.as_deref().unwrap_or(tenant.dir);
        fs_err::create_dir_all(own_dir)?;
        let dir = fs_err::canonicalize(own_dir)?;
        let there = args.engine_server_dir.clone().unwrap_or_else(|| dir.clone());
        let run = format!("{OURS}{}-", &hex(&Sha256::digest(tenant.run))[..10]);
        let attempt = format!("{run}{}", attempt_name());
        let https: Vec<Http> = urls
            .iter()
            .map(|url| Http::new("engine_urls", url, config))
            .collect::<Result<_, _>>()?;
        let mut links: Vec<Option<Arc<Link>>> = vec![None; https.len()];
        let (dialect, wait_s) = (args.engine_dialect, args.engine_wait_s);
        let (named, prefix) = (args.engine_model.clone(), run.clone());
        let open = move |http: &Arc<Http>| first_look(http, named.as_deref(), wait_s);
        let https: Vec<Arc<Http>> = https.into_iter().map(Arc::new).collect();
        let mut found: Vec<Option<(String, Vec<Card>)>> = vec![None; https.len()];
        pool::each(https.len(), https.clone(), open, |at, cards| {
            found[at] = Some(cards);
            Ok::<_, Error>(())
        })?;
        let mut left = Vec::new();
        for ((link, http), found) in links.iter_mut().zip(https).zip(found) {
            let (base, cards) = found.expect("every server was asked");
            let own = Arc::new(Link { http, dialect, base });
            let old = cards.into_iter().filter(|card| card.name.starts_with(&prefix));
            left.extend(old.map(|card| (Arc::clone(&own), card.name)));
            *link = Some(own);
        }
        if tenant.is_first {
            remove_dirs(&dir, &run)?;
        } else {
            left.clear();
        }
        let servers = links
            .into_iter()
            .flatten()
            .map(|link| Server { link, down: None, base: None, own: None })
            .collect();
        let proof = Proof { canary, tolerance: args.engine_tolerance };
        let (n_loaded, loaded, config) = (0, None, config.clone());
        let mut fleet =
            Self { servers, config, wait_s, proof, dir, there, run, attempt, n_loaded, loaded };
        fleet.unload_all(left)?;
        for result in fleet.bring_up_all(None)? {
            result?;
        }
        tracing::info!(
            servers = fleet.servers.len(),
            dialect = dialect.name(),
            adapters = %fleet.dir.display(),
            "engines answer with this base"
        );
        Ok(fleet)
    }

    /// The text that servers are proved by.
    #[must_use]
    pub fn canary(&self) -> &Canary {
        &self.proof.canary
    }

    /// Name of the adapter that the servers hold.
    #[must_use]
    pub fn adapter(&self) -> Option<&str> {
        self.loaded.as_ref().map(|loaded| loaded.name.as_str())
    }

    /// Holds for loaded what another process of this run loaded, and proved.
    pub fn adopt(&mut self, name: &str, values: Vec<f64>) {
        let before = self.loaded.take().map(|loaded| loaded.values);
        let (path, there) = (self.dir.join(name), self.there.join(name).display().to_string());
        self.loaded = Some(Loaded { name: name.to_owned(), path, there, values, before });
    }

    /// Has every server hold the adapter that `write` writes into a directory, whose values of the canary are `values`; the one
    /// before goes.
    ///
    /// # Errors
    ///
    /// What `write` returns; [`Error::Server`], [`Error::Weights`]: then no server holds it; [`Error::NoneLeft`].
    pub fn load<E: From<Error>>(
        &mut self,
        values: Vec<f64>,
        write: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<Verdict, E> {
        self.n_loaded += 1;
        let name = format!("{}-v{:06}", self.attempt, self.n_loaded);
        let path = self.dir.join(&name);
        write(&path)?;
        let there = self.there.join(&name).display().to_string();
        let before = self.loaded.as_ref().map(|loaded| loaded.values.clone());
        let loaded = Loaded { name, path, there, values, before };
        Ok(self.load_written(loaded)?)
    }

    fn load_written(&mut self, loaded: Loaded) -> Result<Verdict, Error> {
        let results = self.bring_up_all(Some(&loaded))?;
        let mut worst: Option<Verdict> = None;
        let mut failed = None;
        for result in results {
            match result {
                Ok(Some(verdict)) => {
                    if worst.is_none_or(|worst| verdict.difference > worst.difference) {
                        worst = Some(verdict);
                    }
                }
                Ok(None) => {}
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        if let Some(error) = failed {
            // All or none.
            let taken_back = self.links().map(|link| (link, loaded.name.clone())).collect();
            self.unload_all(taken_back)?;
            remove_dir(&loaded.path)?;
            return Err(error);
        }
        let Some(verdict) = worst else {
            remove_dir(&loaded.path)?;
            return Err(self.none_left());
        };
        tracing::info!(
            adapter = loaded.name,
            servers = self.links().count(),
            canary_difference = verdict.difference,
            canary_step = verdict.step,
            "engines answer with the new weights"
        );
        let old = self.loaded.replace(loaded);
        if let Some(old) = old {
            self.unload_all(self.links().map(|link| (link, old.name.clone())).collect())?;
            remove_dir(&old.path)?;
        }
        Ok(verdict)
    }

    /// Lets go of the adapter, on the servers and on disk.
    ///
    /// # Errors
    ///
    /// A directory that cannot be removed; a signal. A server that does not answer is no error.
    pub fn close(mut self) -> Result<(), Error> {
        if let Some(old) = self.loaded.take() {
            self.unload_all(self.links().map(|link| (link, old.name.clone())).collect())?;
        }
        remove_dirs(&self.dir, &self.run)
    }

    /// The servers that work.
    fn links(&self) -> impl Iterator<Item = Arc<Link>> {
        self.servers.iter().filter(|server| server.down.is_none()).map(|s| Arc::clone(&s.link))
    }

    pub(crate) fn proof(&self) -> Proof {
        self.proof.clone()
    }

    /// What the server of this number answered before.
    pub(crate) fn answers(&self, at: usize) -> Answers {
        let Server { base, own, .. } = &self.servers[at];
        Answers { base: base.clone(), own: own.clone() }
    }

    /// Notes that a server has been brought up.
    pub(crate) fn is_up(&mut self, at: usize, answers: Answers) {
        let server = &mut self.servers[at];
        if server.down.take().is_some() {
            tracing::info!(server = server.link.http.at(""), "back, with the adapter proved");
        }
        (server.base, server.own) = (answers.base, answers.own);
    }

    /// Notes that a server does not answer.
    pub(crate) fn is_down(&mut self, at: usize, reason: &str) {
        let server = &mut self.servers[at];
        if server.down.is_none() {
            tracing::warn!(
                server = server.link.http.at(""),
                reason,
                "left out until it comes back"
            );
        }
        server.down = Some(reason.to_owned());
    }

    /// The error where no server is left.
    pub(crate) fn none_left(&self) -> Error {
        let reasons = self.servers.iter().rev().find_map(|server| server.down.clone());
        let reason = reasons.unwrap_or_default();
        Error::NoneLeft { n: self.servers.len(), waited_s: self.wait_s, reason }
    }

    /// Brings up every server side by side: those that are down, too, with one look. A server that cannot be reached is left out; the
    /// results are those of the others.
    fn bring_up_all(
        &mut self,
        loaded: Option<&Loaded>,
    ) -> Result<Vec<Result<Option<Verdict>, Error>>, Error> {
        struct Job {
            link: Arc<Link>,
            answers: Answers,
            attempts: usize,
        }
        let job = |(at, server): (usize, &Server)| Job {
            link: Arc::clone(&server.link),
            answers: self.answers(at),
            attempts: if server.down.is_some() { 1 } else { self.config.attempts },
        };
        let jobs: Vec<Job> = self.servers.iter().enumerate().map(job).collect();
        let (proof, wanted) = (self.proof(), loaded.cloned());
        let work = move |job: &Job| {
            let Job { link, answers, attempts } = job;
            Ok::<_, Error>(bring_up(link, answers, wanted.as_ref(), &proof, *attempts))
        };
        type Outcome = Result<(Answers, Option<Verdict>), Trouble>;
        let mut outcomes: Vec<Option<Outcome>> = Vec::new();
        outcomes.resize_with(jobs.len(), || None);
        pool::each(jobs.len(), jobs, work, |at, outcome| {
            outcomes[at] = Some(outcome);
            Ok(())
        })?;
        let mut results = Vec::new();
        for (at, outcome) in outcomes.into_iter().flatten().enumerate() {
            match outcome {
                Ok((answers, verdict)) => {
                    self.is_up(at, answers);
                    results.push(Ok(verdict));
                }
                Err(trouble) => match trouble.error(&self.servers[at].link) {
                    // At the start every server must be there.
                    Err(reason) if loaded.is_some() => self.is_down(at, &reason),
                    Err(reason) => {
                        let url = self.servers[at].link.http.at("");
                        results.push(Err(Error::Server { url, what: "canary", reason }));
                    }
                    Ok(error) => results.push(Err(error)),
                },
            }
        }
        Ok(results)
    }

    /// Unloads adapters from servers; one that will not is told of, and is no error.
    fn unload_all(&self, jobs: Vec<(Arc<Link>, String)>) -> Result<(), Error> {
        let work = |(link, name): &(Arc<Link>, String)| {
            let Link { http, dialect, .. } = &**link;
            let body = json!({ "lora_name": name });
            let sent =
                http.attempts(2, "unload", || http.send(dialect.unload_path(), Some(&body), 1));
            Ok::<_, Error>(sent.err().map(|failure| (http.at(""), name.clone(), failure)))
        };
        pool::each(jobs.len(), jobs, work, |_, refused| {
            // One that it does not know is not there.
            if let Some((server, adapter, failure)) = refused
                && failure.status != Some(404)
            {
                tracing::warn!(server, adapter, reason = failure.reason, "not unloaded");
            }
            Ok(())
        })
    }
}

impl Trouble {
    /// The error of a server that answered; the reason of one that could not be reached, itself or through what stands before it.
    pub(crate) fn error(self, link: &Link) -> Result<Error, String> {
        match self {
            Self::Weights(weights, verdict) => {
                Ok(Error::Weights { url: link.http.at(""), weights, verdict })
            }
            Self::Failure(_, failure)
                if failure.kind == FailureKind::Passing
                    && matches!(failure.status, None | Some(502..=504)) =>
            {
                Err(failure.reason)
            }
            Self::Failure(what, failure) => Ok(link.http.error("", what, &failure)),
        }
    }
}

/// Waits for a server, and finds the base's name there and all that it lists.
fn first_look(
    http: &Arc<Http>,
    named: Option<&str>,
    wait_s: f64,
) -> Result<(String, Vec<Card>), Error> {
    let started = Instant::now();
    let cards = loop {
        let failure = match list(http) {
            Ok(cards) => break cards,
            Err(failure) => failure,
        };
        let is_over = started.elapsed().as_secs_f64() + PAUSE.as_secs_f64() > wait_s;
        if failure.kind != FailureKind::Passing || is_over {
            return Err(http.error(MODELS, "list of models", &failure));
        }
        std::thread::sleep(PAUSE);
    };
    let bases: Vec<&str> =
        cards.iter().filter(|card| card.parent.is_none()).map(|card| card.name.as_str()).collect();
    let base = match (named, bases.as_slice()) {
        (Some(named), _) if bases.contains(&named) => named.to_owned(),
        (None, [only]) => (*only).to_owned(),
        _ => {
            return Err(Error::Setting {
                name: "engine_model",
                expected: format!("the name of a model that {} serves", http.at("")),
                got: format!("{}; it serves {}", named.unwrap_or("none"), bases.join(", ")),
            });
        }
    };
    Ok((base, cards))
}

fn list(http: &Http) -> Result<Vec<Card>, Failure> {
    dialect::cards(&http.json(MODELS, None, LIST_TOKENS)?)
}

/// Has a server hold the adapter, if one is wanted and it does not hold it already, and proves it; without one, proves the base.
pub(crate) fn bring_up(
    link: &Link,
    before: &Answers,
    loaded: Option<&Loaded>,
    proof: &Proof,
    attempts: usize,
) -> Result<(Answers, Option<Verdict>), Trouble> {
    let Link { http, dialect, .. } = link;
    let base = match &before.base {
        Some(base) => base.clone(),
        None => {
            let base = ask_canary(link, None, proof, attempts)?;
            // Judged as if the base were the new weights: there is nothing else that it could be.
            let Canary { base: own, is_rounded, .. } = &proof.canary;
            let is_rounded = *is_rounded;
            let known = Known { new: own, base: (own, None), before: None, is_rounded };
            let verdict = canary::judge(&base, &known, proof.tolerance);
            if !verdict.is_good() {
                return Err(Trouble::Weights(format!("the base ({})", link.base), verdict));
            }
            base
        }
    };
    let Some(loaded) = loaded else {
        return Ok((Answers { base: Some(base), own: None }, None));
    };
    let body = json!({ "lora_name": loaded.name, "lora_path": loaded.there });
    let load = || match http.send(dialect.load_path(), Some(&body), 1) {
        Ok(_) => Ok(()),
        Err(failure) if dialect::is_loaded_already(&failure) => {
            match list(http)?.iter().find(|card| card.name == loaded.name) {
                // By an attempt whose answer was lost, or by another process of this run.
                Some(card) if card.path.as_ref() == Some(&loaded.there) => Ok(()),
                _ => Err(failure),
            }
        }
        Err(failure) => Err(dialect::of_loading(*dialect, failure)),
    };
    http.attempts(attempts, "load", load)
        .map_err(|failure| Trouble::Failure("loading an adapter", failure))?;
    let own = ask_canary(link, Some(&loaded.name), proof, attempts)?;
    let then = before.own.as_deref().filter(|_| loaded.before.is_some());
    let known = Known {
        new: &loaded.values,
        base: (&proof.canary.base, Some(&base)),
        before: loaded.before.as_deref().map(|values| (values, then)),
        is_rounded: proof.canary.is_rounded,
    };
    let verdict = canary::judge(&own, &known, proof.tolerance);
    if !verdict.is_good() {
        return Err(Trouble::Weights(loaded.name.clone(), verdict));
    }
    Ok((Answers { base: Some(base), own: Some(own) }, Some(verdict)))
}

/// A server's values of the canary's text.
fn ask_canary(
    link: &Link,
    adapter: Option<&str>,
    proof: &Proof,
    attempts: usize,
) -> Result<Vec<f64>, Trouble> {
    let Link { http, dialect, base } = link;
    let token_ids = &proof.canary.token_ids;
    // Never from what the server remembers of this text.
    let salt = format!("canary-{}", attempt_name());
    let body = dialect.read(&Prompt { base, adapter, token_ids, salt: &salt });
    let ask = || {
        let answer = http.json(dialect.sample_path(), Some(&body), token_ids.len())?;
        dialect.values(&answer, token_ids)
    };
    http.attempts(attempts, "canary", ask).map_err(|failure| Trouble::Failure("canary", failure))
}

/// What no other attempt is called.
fn attempt_name() -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.map_or(0, |since| since.as_nanos());
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let hash = Sha256::digest(format!("{now} {} {number}", std::process::id()));
    hex(&hash[..4])
}

/// Removes the directories of this run's adapters.
fn remove_dirs(dir: &Path, run: &str) -> Result<(), Error> {
    for entry in fs_err::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(run) {
            remove_dir(&entry.path())?;
        }
    }
    Ok(())
}

fn remove_dir(path: &Path) -> Result<(), Error> {
    if path.exists() {
        fs_err::remove_dir_all(path)?;
    }
    Ok(())
}
