//! Models and data files of the Hugging Face hub, downloaded into its cache and verified; and uploads ([`Hub::push`]).
//!
//! A file enters the cache (same layout as Python's `huggingface_hub`, so both share downloads) only after its size and
//! hash agree with what the repository's commit says, and is compared with its hash whenever it is used. A cut or replaced
//! body therefore never passes for a complete file, a cut download goes on where it stopped, and no name a server sends can
//! lead outside the cache. Nothing is awaited for ever, and nothing read beyond what is expected. Uploads go through
//! `hf-hub`.
//!
//! Environment, as in Python: `HF_TOKEN` (or `HF_TOKEN_PATH`, or the token of `hf auth login`), `HF_ENDPOINT`,
//! `HF_HUB_CACHE`, `HF_HOME`, `HF_HUB_OFFLINE`.

mod cache;
mod http;
mod upload;

use std::path::{Component, Path, PathBuf};

use arete_records::hashes::HashCache;
use arete_records::redact::redacted;
use fs_err::File;
use hf_hub::{HFClient, HFClientSync, HFError};
use serde_json::Value;

use self::cache::{cached_blob, cached_snapshot, is_sound, link, verify};
pub use self::http::next_page;
use self::http::{Failure, Http, encoded};
use crate::Error;
use crate::checkpoint::shards_of_index;
pub use upload::{Content, Pushed, RepositoryKind, Upload};

/// The branch taken when none is named.
pub const DEFAULT_REVISION: &str = "main";
/// Files of a repository looked at; model repositories have a few dozen.
const MAX_FILES: usize = 10_000;
/// Pages that a list of them may come in.
const MAX_PAGES: usize = 100;
/// How often a file is downloaded in all, if what comes is not what the commit names.
const ATTEMPTS: usize = 2;
const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Endings of a dataset's files that this project reads.
const DATA_ENDINGS: [&str; 10] = [
    ".jsonl",
    ".jsonl.gz",
    ".json",
    ".json.gz",
    ".csv",
    ".csv.gz",
    ".tsv",
    ".tsv.gz",
    ".ndjson",
    ".parquet",
];
/// Files beside a dataset's that hold none of its records.
const NO_DATA: [&str; 4] =
    ["config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"];
/// Read by the loader where they exist.
const OPTIONAL: [&str; 5] = [
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
];

/// Access to the hub and its cache.
#[derive(Debug)]
pub struct Hub {
    http: Http,
    /// For uploads.
    client: HFClientSync,
    endpoint: String,
    cache: PathBuf,
    offline: bool,
}

/// A commit of a repository: its files, and the cache's directory for it.
struct Snapshot {
    commit: String,
    /// The branch or tag that led here.
    revision: Option<String>,
    directory: PathBuf,
    files: Vec<RemoteFile>,
    /// Missing files can be downloaded.
    online: bool,
}

/// One file of a commit, as the repository describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteFile {
    /// Its path in the repository, as it was sent: [`safe_rel_path`] says whether it is one.
    pub path: String,
    /// Its size in bytes.
    pub size: u64,
    /// Git's id of the file, or of the pointer that stands for it.
    oid: String,
    /// Stored outside git (LFS or Xet): `oid` is the id of a pointer naming the SHA-256.
    is_pointer: bool,
}

/// A repository of the hub.
#[derive(Clone, Copy, Debug)]
struct Repository<'a> {
    kind: RepositoryKind,
    id: &'a str,
}

impl Repository<'_> {
    fn plural(self) -> &'static str {
        match self.kind {
            RepositoryKind::Model => "models",
            RepositoryKind::Dataset => "datasets",
        }
    }

    /// What its page's path begins with.
    fn prefix(self) -> &'static str {
        match self.kind {
            RepositoryKind::Model => "",
            RepositoryKind::Dataset => "datasets/",
        }
    }

    /// Its path in the hub's interface.
    fn interface(self) -> String {
        format!("/api/{}/{}", self.plural(), self.id)
    }
}

impl RemoteFile {
    /// The files in a page of the hub's list of them.
    ///
    /// # Errors
    ///
    /// What is wrong with the answer, in words for a message.
    pub fn list(page: &Value) -> Result<Vec<Self>, String> {
        let entries = page.as_array().ok_or("expected a list of files, found another answer")?;
        entries.iter().filter(|entry| entry["type"] == "file").map(Self::of).collect()
    }

    /// An entry of a list of files, or what is wrong with it.
    fn of(entry: &Value) -> Result<Self, String> {
        let path = entry["path"].as_str().ok_or("expected a path for every file, found none")?;
        let oid = entry["oid"].as_str().unwrap_or_default();
        if !is_hex(oid, 40) {
            return Err(format!("expected a git id for {path:?}, found {oid:?}"));
        }
        let lfs = entry.get("lfs").filter(|lfs| !lfs.is_null());
        let size = lfs.and_then(|lfs| lfs["size"].as_u64()).or_else(|| entry["size"].as_u64());
        let size = size.ok_or_else(|| format!("expected a size for {path:?}, found none"))?;
        Ok(Self { path: path.to_owned(), size, oid: oid.to_owned(), is_pointer: lfs.is_some() })
    }
}

impl Hub {
    /// The hub the environment names.
    ///
    /// # Errors
    ///
    /// [`Error::Hub`] if `HF_ENDPOINT` is no address.
    pub fn from_env() -> Result<Self, Error> {
        let offline = std::env::var("HF_HUB_OFFLINE").is_ok_and(|value| {
            ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str())
        });
        Self::with(HFClient::builder(), http::token_of_environment(), offline)
    }

    /// A hub with its address, cache and token given; `offline` never touches the network.
    ///
    /// # Errors
    ///
    /// [`Error::Hub`] if the client cannot be made.
    pub fn with(
        client: hf_hub::HFClientBuilder,
        token: Option<String>,
        offline: bool,
    ) -> Result<Self, Error> {
        let fail = |reason: String| Error::Hub { what: "client".to_owned(), reason };
        let client = match &token {
            Some(token) => client.token(token),
            None => client,
        };
        let client = client.build().map_err(|error| fail(error.to_string()))?;
        let (endpoint, cache) = (client.endpoint().to_owned(), client.cache_dir().to_owned());
        let http = Http::new(&endpoint, token).map_err(fail)?;
        let client = HFClientSync::from_inner(client).map_err(|error| fail(error.to_string()))?;
        Ok(Self { http, client, endpoint, cache, offline })
    }

    /// Makes sure the cache holds everything needed to run a model, and returns its snapshot directory:
    /// configuration, tokenizer, chat template, and safetensors weights (whole or in shards).
    ///
    /// # Errors
    ///
    /// [`Error::Hub`] if the repository cannot be reached, is gated, lacks a file, or sends one that is not what
    /// its commit says; [`Error::Pickle`] if its weights exist as pickle only.
    pub fn model(&self, id: &str, revision: Option<&str>) -> Result<PathBuf, Error> {
        split_id(id)?;
        let repository = Repository { kind: RepositoryKind::Model, id };
        let snapshot = self.snapshot(repository, revision)?;
        let names: Vec<&str> = snapshot.files.iter().map(|file| file.path.as_str()).collect();
        let mut wanted = vec![CONFIG, TOKENIZER];
        wanted.extend(OPTIONAL.iter().filter(|name| names.contains(name)));
        wanted.push(weights_file(id, &self.page(repository), &names)?);
        let directory = self.fetch(repository, &snapshot, &wanted)?;
        if wanted.contains(&INDEX) {
            let shards = shards_of_index(&directory.join(INDEX))?;
            let shards: Vec<&str> = shards.keys().map(String::as_str).collect();
            self.fetch(repository, &snapshot, &shards)?;
        }
        Ok(directory)
    }

    /// Makes sure the cache holds a dataset's files (JSON Lines, JSON or Parquet) whose paths begin with `prefix`,
    /// and returns the snapshot directory they lie in.
    ///
    /// # Errors
    ///
    /// [`Error::Hub`] as [`Hub::model`], or if there are no such files.
    pub fn data_set(
        &self,
        id: &str,
        prefix: &str,
        revision: Option<&str>,
    ) -> Result<PathBuf, Error> {
        split_id(id)?;
        let repository = Repository { kind: RepositoryKind::Dataset, id };
        let snapshot = self.snapshot(repository, revision)?;
        let is_data = |path: &str| {
            let name = path.rsplit('/').next().unwrap_or(path);
            let is_read = DATA_ENDINGS.iter().any(|ending| path.ends_with(ending));
            is_read && !name.starts_with(['.', '_']) && !NO_DATA.contains(&name)
        };
        let in_prefix = |path: &str| {
            path.strip_prefix(prefix.trim_end_matches('/'))
                .is_some_and(|rest| prefix.is_empty() || rest.is_empty() || rest.starts_with('/'))
        };
        let paths = snapshot.files.iter().map(|file| file.path.as_str());
        let wanted: Vec<&str> = paths.filter(|path| is_data(path) && in_prefix(path)).collect();
        if wanted.is_empty() {
            let expected = DATA_ENDINGS.join(", ");
            let reason = format!("no file ends in {expected} (commit {})", snapshot.commit);
            return Err(Error::Hub { what: format!("{id}/{prefix}"), reason });
        }
        self.fetch(repository, &snapshot, &wanted)
    }

    /// The commit a revision stands for and its files; offline, what the cache has of it.
    fn snapshot(
        &self,
        repository: Repository<'_>,
        revision: Option<&str>,
    ) -> Result<Snapshot, Error> {
        let id = repository.id;
        let revision = revision.unwrap_or(DEFAULT_REVISION);
        let fail = |reason: String| Error::Hub { what: format!("{id}@{revision}"), reason };
        safe_rel_path(revision).map_err(&fail)?;
        let folder = self.folder(repository);
        if self.offline {
            return cached_snapshot(&folder, revision).map_err(|reason| {
                fail(format!("{reason}, and HF_HUB_OFFLINE forbids downloading it"))
            });
        }
        let page = self.page(repository);
        let commit = match self.commit(repository, revision) {
            Ok(Some(commit)) => commit,
            Ok(None) => return Err(fail("the hub named no commit for this revision".to_owned())),
            Err(failure @ Failure::Unreachable(_)) => {
                // No connection at all: what was verified before is as good as ever.
                return match cached_snapshot(&folder, revision) {
                    Ok(snapshot) => {
                        let error = refusal(&failure, &page);
                        tracing::warn!(
                            id,
                            revision,
                            error,
                            "hub out of reach, using the cached copy"
                        );
                        Ok(snapshot)
                    }
                    Err(_) => Err(fail(refusal(&failure, &page))),
                };
            }
            Err(failure) => return Err(fail(refusal(&failure, &page))),
        };
        if !is_hex(&commit, 40) {
            return Err(fail(format!("expected a commit of 40 hex digits, found {commit:?}")));
        }
        let files = self
            .tree(repository, &commit)
            .map_err(|failure| fail(refusal(&failure, &page)))?
            .map_err(fail)?;
        let directory = folder.join("snapshots").join(&commit);
        let revision = (commit != revision).then(|| revision.to_owned());
        Ok(Snapshot { commit, revision, directory, files, online: true })
    }

    /// The commit that a revision stands for now.
    fn commit(
        &self,
        repository: Repository<'_>,
        revision: &str,
    ) -> Result<Option<String>, Failure> {
        let path = format!("{}/revision/{}", repository.interface(), encoded(revision, false));
        let answer = self.http.answer(&path)?;
        Ok(answer.body["sha"].as_str().map(str::to_owned))
    }

    /// The files of a commit, or what is wrong with the list.
    fn tree(
        &self,
        repository: Repository<'_>,
        commit: &str,
    ) -> Result<Result<Vec<RemoteFile>, String>, Failure> {
        let mut files = Vec::new();
        let mut page = format!("{}/tree/{commit}?recursive=true", repository.interface());
        for _ in 0..MAX_PAGES {
            let answer = self.http.answer(&page)?;
            match RemoteFile::list(&answer.body) {
                Ok(page) => files.extend(page),
                Err(reason) => return Ok(Err(reason)),
            }
            if files.len() > MAX_FILES {
                return Ok(Err(format!("expected at most {MAX_FILES} files, found more")));
            }
            match answer.next {
                Some(next) => page = next,
                None => return Ok(Ok(files)),
            }
        }
        Ok(Err(format!("expected at most {MAX_PAGES} pages of files, found more")))
    }

    /// Downloads what the snapshot directory does not have yet of `wanted`, or has otherwise than the commit says.
    fn fetch(
        &self,
        repository: Repository<'_>,
        snapshot: &Snapshot,
        wanted: &[&str],
    ) -> Result<PathBuf, Error> {
        let id = repository.id;
        let folder = self.folder(repository);
        let blobs = folder.join("blobs");
        let mut hashes = HashCache::load(&blobs);
        let mut missing = Vec::new();
        for &name in wanted {
            let fail = |reason: String| Error::Hub { what: format!("{id}: {name}"), reason };
            let relative = safe_rel_path(name).map_err(&fail)?;
            let file = snapshot.files.iter().find(|file| file.path == name).ok_or_else(|| {
                let place = if snapshot.online { "the repository" } else { "the cache" };
                fail(format!("no such file in {place} (commit {})", snapshot.commit))
            })?;
            let place = snapshot.directory.join(&relative);
            let cached = fs_err::metadata(&place);
            let complete = cached.is_ok_and(|found| found.is_file() && found.len() == file.size);
            let sound = complete && is_sound(&place, &mut hashes)?;
            if complete && !sound {
                let place = place.display();
                if !snapshot.online {
                    return Err(fail(format!(
                        "{place}: damaged: its contents are not those of its name; remove it, and let it be downloaded again"
                    )));
                }
                tracing::warn!(id, file = name, %place, "damaged in the cache, downloading it again");
                fs_err::remove_file(fs_err::canonicalize(snapshot.directory.join(&relative))?)?;
            }
            if snapshot.online && !sound {
                missing.push((file, relative));
            }
        }
        hashes.save();
        if !snapshot.online {
            return Ok(snapshot.directory.clone());
        }
        fs_err::create_dir_all(&blobs)?;
        let bytes: u64 = missing.iter().map(|(file, _)| file.size).sum();
        if !missing.is_empty() {
            tracing::info!(
                id,
                commit = snapshot.commit,
                files = missing.len(),
                bytes,
                "downloading"
            );
        }
        let mut bar = Bar::new(bytes);
        for (file, relative) in missing {
            let lock = self.lock(&folder, &file.oid)?;
            let blob = match cached_blob(&blobs, file)? {
                Some(blob) => blob,
                None => self.download(repository, snapshot, file, &blobs, &mut bar)?,
            };
            link(&snapshot.directory, &relative, &blobs, &blob)?;
            drop(lock);
        }
        if let Some(revision) = &snapshot.revision {
            let path = folder.join("refs").join(safe_rel_path(revision).expect("checked above"));
            fs_err::create_dir_all(path.parent().expect("refs/ is above"))?;
            arete_records::atomic::write(&path, snapshot.commit.as_bytes())
                .map_err(|error| Error::Io(std::io::Error::other(error)))?;
        }
        Ok(snapshot.directory.clone())
    }

    /// One file into `blobs`, verified; returns its name there. What there is of it stays when the connection breaks, and
    /// the next attempt, of this process or another, goes on from there.
    fn download(
        &self,
        repository: Repository<'_>,
        snapshot: &Snapshot,
        file: &RemoteFile,
        blobs: &Path,
        bar: &mut Bar,
    ) -> Result<String, Error> {
        let id = repository.id;
        let fail = |reason: String| Error::Hub { what: format!("{id}: {}", file.path), reason };
        // Under the lock of this file, so a leftover is a killed download's.
        let part = blobs.join(format!("{}.part", file.oid));
        if part.is_dir() {
            fs_err::remove_dir_all(&part)?; // of a version that downloaded into directories
        }
        let prefix = repository.prefix();
        let path =
            format!("/{prefix}{id}/resolve/{}/{}", snapshot.commit, encoded(&file.path, true));
        let mut reason = String::new();
        for attempt in 1..=ATTEMPTS {
            let sent = self.http.download(&path, &part, file.size, &mut |n| bar.add(n));
            if let Err(failure) = sent {
                if part.metadata().is_ok_and(|found| found.len() == 0) {
                    fs_err::remove_file(&part)?;
                }
                return Err(fail(refusal(&failure, &self.page(repository))));
            }
            match verify(&part, file) {
                Ok(blob) => {
                    fs_err::rename(&part, blobs.join(&blob))?;
                    return Ok(blob);
                }
                Err(error) => {
                    tracing::warn!(id, file = file.path, attempt, error, "download failed");
                    fs_err::remove_file(&part)?;
                    reason = error;
                }
            }
        }
        Err(fail(format!("{reason} (tried {ATTEMPTS} times)")))
    }

    /// Where the cache keeps a repository.
    fn folder(&self, repository: Repository<'_>) -> PathBuf {
        let folder = format!("{}--{}", repository.plural(), repository.id.replace('/', "--"));
        self.cache.join(folder)
    }

    /// The repository's page, for messages.
    fn page(&self, repository: Repository<'_>) -> String {
        let page = format!("{}/{}{}", self.endpoint, repository.prefix(), repository.id);
        redacted(&page).into_owned()
    }

    /// Waits for other downloads of the same file to end.
    fn lock(&self, folder: &Path, oid: &str) -> Result<std::fs::File, Error> {
        let name = folder.file_name().expect("made by `folder`");
        let locks = self.cache.join(".locks").join(name);
        fs_err::create_dir_all(&locks)?;
        let path = locks.join(format!("{oid}.lock"));
        let file = File::create(&path)?.into_parts().0;
        file.lock().map_err(|error| Error::io(&path, &error))?;
        Ok(file)
    }
}

/// A model repository of the hub the environment names; see [`Hub::model`].
///
/// # Errors
///
/// As [`Hub::model`].
pub fn download_model(id: &str, revision: Option<&str>) -> Result<PathBuf, Error> {
    Hub::from_env()?.model(id, revision)
}

/// A dataset of the hub the environment names: `owner/name`, `owner/name@revision`, or either with `/path` behind
/// for a folder or file of it; see [`Hub::data_set`].
///
/// # Errors
///
/// As [`Hub::data_set`].
pub fn data_set(given: &str) -> Result<PathBuf, Error> {
    let mut parts = given.splitn(3, '/');
    let (owner, name) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let (name, revision) = match name.split_once('@') {
        Some((name, revision)) => (name, Some(revision)),
        None => (name, None),
    };
    let prefix = parts.next().unwrap_or_default();
    let directory = Hub::from_env()?.data_set(&format!("{owner}/{name}"), prefix, revision)?;
    Ok(if prefix.is_empty() { directory } else { directory.join(prefix) })
}

/// `owner/name`, both plain enough for a file name.
pub(crate) fn split_id(id: &str) -> Result<(&str, &str), Error> {
    let plain = |part: &str| {
        (1..=96).contains(&part.len())
            && !part.starts_with(['.', '-'])
            && !part.contains("..")
            && !part.contains("--")
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    match id.split_once('/') {
        Some((owner, name)) if plain(owner) && plain(name) => Ok((owner, name)),
        _ => Err(Error::Hub {
            what: id.to_owned(),
            reason: "expected an id of the form owner/name".to_owned(),
        }),
    }
}

/// A path that stays inside the directory it is joined to, on every system.
///
/// # Errors
///
/// What is wrong with it.
pub fn safe_rel_path(name: &str) -> Result<PathBuf, String> {
    let refuse = || Err(format!("expected a plain relative path, found {name:?}"));
    let plain = |part: &str| {
        (1..=255).contains(&part.len())
            && part != "."
            && part != ".."
            && !part.ends_with(['.', ' '])
            && !part.contains(['\\', ':', '<', '>', '|', '?', '*', '"'])
            && !part.chars().any(char::is_control)
    };
    if name.len() > 1024 || !name.split('/').all(plain) {
        return refuse();
    }
    let path = PathBuf::from(name);
    match path.components().all(|part| matches!(part, Component::Normal(_))) {
        true => Ok(path),
        false => refuse(),
    }
}

fn is_hex(text: &str, n: usize) -> bool {
    text.len() == n && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Which file leads to the weights.
fn weights_file(id: &str, page: &str, names: &[&str]) -> Result<&'static str, Error> {
    for known in [WEIGHTS, INDEX] {
        if names.contains(&known) {
            return Ok(known);
        }
    }
    let pickled =
        |name: &&&str| [".bin", ".pt", ".pth", ".ckpt"].iter().any(|ending| name.ends_with(ending));
    if let Some(name) = names.iter().find(pickled) {
        return Err(Error::Pickle {
            path: PathBuf::from(format!("{id}/{name}")),
            command: crate::checkpoint::conversion_command(id),
        });
    }
    let reason = match names.iter().find(|name| name.ends_with(".gguf")) {
        Some(name) => format!("it holds GGUF files only: download {name} and name that file"),
        None => format!("neither {WEIGHTS} nor {INDEX} is in it"),
    };
    Err(Error::Hub { what: format!("{id} ({page})"), reason })
}

/// What came in the way of reading, and what to do about it.
fn refusal(failure: &Failure, page: &str) -> String {
    match failure {
        Failure::Unreachable(reason) => format!("{page} cannot be reached: {reason}"),
        Failure::Broken(reason) => format!("{page}: {reason}"),
        Failure::Refused(401, _) => format!(
            "not accessible: the repository does not exist, is private, or is gated; check the name, accept its \
             conditions at {page} if it asks for that, and set HF_TOKEN to a token of that account"
        ),
        Failure::Refused(403, _) => format!(
            "access is gated and the account of HF_TOKEN has none: accept the conditions at {page} with it"
        ),
        Failure::Refused(404, _) => format!("no such repository, revision or file: {page}"),
        Failure::Refused(0, reason) => reason.clone(),
        Failure::Refused(status, reason) => format!("{page}: status {status}: {reason}"),
    }
}

/// What went wrong with an upload, in general.
fn explain(error: &HFError, page: &str) -> String {
    match error {
        HFError::RepoNotFound { .. } => format!("no such repository: {page}"),
        HFError::Request { source, .. } if source.is_connect() || source.is_timeout() => {
            format!("{} cannot be reached: {}", page, chain(error))
        }
        other => chain(other),
    }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    redacted(&text).into_owned()
}

/// Shows the progress of downloads in megabytes.
struct Bar {
    progress: arete_records::progress::Progress,
    /// Bytes shown.
    bytes: u64,
}

const MEGABYTE: u64 = 1_000_000;

impl Bar {
    fn new(bytes: u64) -> Self {
        let total = bytes.div_ceil(MEGABYTE);
        let progress = arete_records::progress::start("downloading", "MB", total);
        Self { progress, bytes: 0 }
    }

    fn add(&mut self, n: u64) {
        let before = self.bytes;
        self.bytes += n;
        self.progress.inc(self.bytes / MEGABYTE - before / MEGABYTE);
    }
}

#[cfg(test)]
mod tests;
