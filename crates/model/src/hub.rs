//! Models and data files of the Hugging Face hub, downloaded into its cache and verified; and uploads ([`Hub::push`]).
//!
//! Downloads go through `hf-hub`, into a folder of their own; a file enters the cache (same layout as Python's
//! `huggingface_hub`, so both share downloads) only after its size and hash agree with what the repository's
//! commit says. A cut or replaced body therefore never passes for a complete file, and no name a server
//! sends can lead outside the cache.
//!
//! Environment, as in Python: `HF_TOKEN` (or `HF_TOKEN_PATH`, or the token of `hf auth login`), `HF_ENDPOINT`,
//! `HF_HUB_CACHE`, `HF_HOME`, `HF_HUB_OFFLINE`.

mod upload;

use std::io::{ErrorKind, Read as _};
use std::path::{Component, Path, PathBuf};
use std::sync::Mutex;

use fs_err::File;
use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
use hf_hub::repository::{RepoTreeEntry, RepoType};
use hf_hub::{HFClient, HFClientSync, HFError, HFRepositorySync};
use sha2::{Digest as _, Sha256};

use crate::Error;
use crate::checkpoint::shards_of_index;
pub use upload::{Content, Pushed, RepositoryKind, Upload};

/// The branch taken when none is named.
pub const DEFAULT_REVISION: &str = "main";
/// Files of a repository looked at; model repositories have a few dozen.
const MAX_FILES: usize = 10_000;
/// How often a broken transfer is tried in all.
const ATTEMPTS: usize = 3;
const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Endings of a dataset's files that this project reads.
const DATA_ENDINGS: [&str; 4] = [".jsonl", ".jsonl.gz", ".json", ".parquet"];
/// Read by the loader where they exist.
const OPTIONAL: [&str; 4] = [
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// Access to the hub and its cache.
#[derive(Debug)]
pub struct Hub {
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
struct RemoteFile {
    path: String,
    size: u64,
    /// Git's id of the file, or of the pointer that stands for it.
    oid: String,
    /// Stored outside git (LFS or Xet): `oid` is the id of a pointer naming the SHA-256.
    is_pointer: bool,
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
        Self::with(HFClient::builder(), offline)
    }

    /// A hub with its address, cache and token given; `offline` never touches the network.
    ///
    /// # Errors
    ///
    /// [`Error::Hub`] if the client cannot be made.
    pub fn with(client: hf_hub::HFClientBuilder, offline: bool) -> Result<Self, Error> {
        let fail =
            |error: HFError| Error::Hub { what: "client".to_owned(), reason: error.to_string() };
        let client = client.build().map_err(fail)?;
        let (endpoint, cache) = (client.endpoint().to_owned(), client.cache_dir().to_owned());
        let client = HFClientSync::from_inner(client).map_err(fail)?;
        Ok(Self { client, endpoint, cache, offline })
    }

    /// Makes sure the cache holds everything needed to run a model, and returns its snapshot directory:
    /// configuration, tokenizer, chat template, and safetensors weights (whole or in shards).
    ///
    /// # Errors
    ///
    /// [`Error::Hub`] if the repository cannot be reached, is gated, lacks a file, or sends one that is not what
    /// its commit says; [`Error::Pickle`] if its weights exist as pickle only.
    pub fn model(&self, id: &str, revision: Option<&str>) -> Result<PathBuf, Error> {
        let (owner, name) = split_id(id)?;
        let repository = self.client.model(owner, name);
        let snapshot = self.snapshot(&repository, id, revision, || {
            repository.info().revision(revision.unwrap_or(DEFAULT_REVISION)).send().map(|it| it.sha)
        })?;
        let names: Vec<&str> = snapshot.files.iter().map(|file| file.path.as_str()).collect();
        let mut wanted = vec![CONFIG, TOKENIZER];
        wanted.extend(OPTIONAL.iter().filter(|name| names.contains(name)));
        wanted.push(weights_file(id, &self.page(&repository), &names)?);
        let directory = self.fetch(&repository, id, &snapshot, &wanted)?;
        if wanted.contains(&INDEX) {
            let shards = shards_of_index(&directory.join(INDEX))?;
            let shards: Vec<&str> = shards.keys().map(String::as_str).collect();
            self.fetch(&repository, id, &snapshot, &shards)?;
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
        let (owner, name) = split_id(id)?;
        let repository = self.client.dataset(owner, name);
        let snapshot = self.snapshot(&repository, id, revision, || {
            repository.info().revision(revision.unwrap_or(DEFAULT_REVISION)).send().map(|it| it.sha)
        })?;
        let is_data = |path: &str| DATA_ENDINGS.iter().any(|ending| path.ends_with(ending));
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
        self.fetch(&repository, id, &snapshot, &wanted)
    }

    /// The commit a revision stands for and its files; offline, what the cache has of it.
    fn snapshot<T: RepoType>(
        &self,
        repository: &HFRepositorySync<T>,
        id: &str,
        revision: Option<&str>,
        commit: impl FnOnce() -> Result<Option<String>, HFError>,
    ) -> Result<Snapshot, Error> {
        let revision = revision.unwrap_or(DEFAULT_REVISION);
        let fail = |reason: String| Error::Hub { what: format!("{id}@{revision}"), reason };
        safe_rel_path(revision).map_err(&fail)?;
        let folder = self.folder(repository);
        if self.offline {
            return cached_snapshot(&folder, revision).map_err(|reason| {
                fail(format!("{reason}, and HF_HUB_OFFLINE forbids downloading it"))
            });
        }
        let explain = |error: &HFError| explain(error, &self.page(repository));
        let commit = match commit() {
            Ok(Some(commit)) => commit,
            Ok(None) => return Err(fail("the hub named no commit for this revision".to_owned())),
            Err(error @ HFError::Request { .. }) => {
                // No connection at all: what was verified before is as good as ever.
                return match cached_snapshot(&folder, revision) {
                    Ok(snapshot) => {
                        tracing::warn!(id, revision, %error, "hub out of reach, using the cached copy");
                        Ok(snapshot)
                    }
                    Err(_) => Err(fail(explain(&error))),
                };
            }
            Err(error) => return Err(fail(explain(&error))),
        };
        if !is_hex(&commit, 40) {
            return Err(fail(format!("expected a commit of 40 hex digits, found {commit:?}")));
        }
        let listed = repository
            .list_tree()
            .revision(commit.as_str())
            .recursive(true)
            .limit(MAX_FILES)
            .send()
            .map_err(|error| fail(explain(&error)))?;
        let mut files = Vec::new();
        for entry in listed {
            if let RepoTreeEntry::File { path, size, oid, lfs, .. } = entry {
                if !is_hex(&oid, 40) {
                    return Err(fail(format!("expected a git id for {path:?}, found {oid:?}")));
                }
                let size = lfs.as_ref().and_then(|lfs| lfs.size).unwrap_or(size);
                files.push(RemoteFile { path, size, oid, is_pointer: lfs.is_some() });
            }
        }
        let directory = folder.join("snapshots").join(&commit);
        let revision = (commit != revision).then(|| revision.to_owned());
        Ok(Snapshot { commit, revision, directory, files, online: true })
    }

    /// Downloads what the snapshot directory does not have yet of `wanted`.
    fn fetch<T: RepoType>(
        &self,
        repository: &HFRepositorySync<T>,
        id: &str,
        snapshot: &Snapshot,
        wanted: &[&str],
    ) -> Result<PathBuf, Error> {
        let mut missing = Vec::new();
        for &name in wanted {
            let fail = |reason: String| Error::Hub { what: format!("{id}: {name}"), reason };
            let relative = safe_rel_path(name).map_err(&fail)?;
            let file = snapshot.files.iter().find(|file| file.path == name).ok_or_else(|| {
                let place = if snapshot.online { "the repository" } else { "the cache" };
                fail(format!("no such file in {place} (commit {})", snapshot.commit))
            })?;
            let cached = fs_err::metadata(snapshot.directory.join(&relative));
            let complete = cached.is_ok_and(|found| found.is_file() && found.len() == file.size);
            if snapshot.online && !complete {
                missing.push((file, relative));
            }
        }
        if !snapshot.online {
            return Ok(snapshot.directory.clone());
        }
        let folder = self.folder(repository);
        let blobs = folder.join("blobs");
        fs_err::create_dir_all(&blobs)?;
        if !missing.is_empty() {
            let bytes: u64 = missing.iter().map(|(file, _)| file.size).sum();
            tracing::info!(
                id,
                commit = snapshot.commit,
                files = missing.len(),
                bytes,
                "downloading"
            );
        }
        let progress = hf_hub::progress::Progress::new(Bar::new(
            missing.iter().map(|(file, _)| file.size).sum(),
        ));
        for (file, relative) in missing {
            let lock = self.lock(&folder, &file.oid)?;
            let blob = match cached_blob(&blobs, file)? {
                Some(blob) => blob,
                None => self.download(repository, id, snapshot, file, &blobs, &progress)?,
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

    /// One file into `blobs`, verified; returns its name there.
    fn download<T: RepoType>(
        &self,
        repository: &HFRepositorySync<T>,
        id: &str,
        snapshot: &Snapshot,
        file: &RemoteFile,
        blobs: &Path,
        progress: &hf_hub::progress::Progress,
    ) -> Result<String, Error> {
        let fail = |reason: String| Error::Hub { what: format!("{id}: {}", file.path), reason };
        // Under the lock of this file, so a leftover is a killed download's.
        let part = blobs.join(format!("{}.part", file.oid));
        let mut reason = String::new();
        for attempt in 1..=ATTEMPTS {
            if part.exists() {
                fs_err::remove_dir_all(&part)?;
            }
            fs_err::create_dir(&part)?;
            let sent = repository
                .download_file()
                .filename(file.path.as_str())
                .local_dir(part.clone())
                .revision(snapshot.commit.as_str())
                .progress(progress.clone())
                .send();
            let verified = match sent {
                Ok(path) => verify(&path, file).map(|blob| (path, blob)),
                Err(error) if is_broken_transfer(&error) => Err(error.to_string()),
                Err(error) => {
                    fs_err::remove_dir_all(&part)?;
                    return Err(fail(explain(&error, &self.page(repository))));
                }
            };
            match verified {
                Ok((path, blob)) => {
                    File::open(&path)?.sync_all()?;
                    fs_err::rename(&path, blobs.join(&blob))?;
                    fs_err::remove_dir_all(&part)?;
                    return Ok(blob);
                }
                Err(error) => {
                    tracing::warn!(id, file = file.path, attempt, error, "download failed");
                    reason = error;
                }
            }
        }
        fs_err::remove_dir_all(&part)?;
        Err(fail(format!("{reason} (tried {ATTEMPTS} times)")))
    }

    /// Where the cache keeps a repository.
    fn folder<T: RepoType>(&self, repository: &HFRepositorySync<T>) -> PathBuf {
        let plural = repository.repo_type().plural();
        let folder = format!("{plural}--{}", repository.repo_path().replace('/', "--"));
        self.cache.join(folder)
    }

    /// The repository's page, for messages.
    fn page<T: RepoType>(&self, repository: &HFRepositorySync<T>) -> String {
        let prefix = repository.repo_type().url_prefix();
        format!("{}/{prefix}{}", self.endpoint, repository.repo_path())
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
pub(crate) fn safe_rel_path(name: &str) -> Result<PathBuf, String> {
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

/// What the cache holds of a revision.
fn cached_snapshot(folder: &Path, revision: &str) -> Result<Snapshot, String> {
    let commit = if is_hex(revision, 40) {
        revision.to_owned()
    } else {
        fs_err::read_to_string(folder.join("refs").join(revision))
            .map(|text| text.trim().to_owned())
            .map_err(|_| "not in the cache".to_owned())?
    };
    if !is_hex(&commit, 40) {
        return Err(format!("the cache names a commit {commit:?}"));
    }
    let directory = folder.join("snapshots").join(&commit);
    let mut files = Vec::new();
    list(&directory, "", &mut files).map_err(|error| format!("not in the cache: {error}"))?;
    Ok(Snapshot { commit, revision: None, directory, files, online: false })
}

/// Lists the files under `directory`, by paths that begin with `prefix`.
fn list(directory: &Path, prefix: &str, files: &mut Vec<RemoteFile>) -> Result<(), std::io::Error> {
    for entry in fs_err::read_dir(directory)? {
        let entry = entry?;
        let Some(name) = entry.file_name().to_str().map(str::to_owned) else { continue };
        let path = format!("{prefix}{name}");
        // Follows the link into `blobs`; one that leads nowhere is a file that is not there.
        match fs_err::metadata(entry.path()) {
            Ok(found) if found.is_dir() => list(&entry.path(), &format!("{path}/"), files)?,
            Ok(found) => files.push(RemoteFile {
                path,
                size: found.len(),
                oid: String::new(),
                is_pointer: false,
            }),
            Err(_) => {}
        }
    }
    Ok(())
}

/// The name under which `blobs` already has this file's content: Git's id, or the SHA-256 whose pointer has that id.
fn cached_blob(blobs: &Path, file: &RemoteFile) -> Result<Option<String>, Error> {
    for entry in fs_err::read_dir(blobs)? {
        let entry = entry?;
        let Some(name) = entry.file_name().to_str().map(str::to_owned) else { continue };
        let is_it = match file.is_pointer {
            false => name == file.oid,
            true => is_hex(&name, 64) && pointer_id(&name, file.size) == file.oid,
        };
        if !is_it {
            continue; // another file's, or a download of another process, which may be gone by now
        }
        match fs_err::metadata(entry.path()) {
            Ok(found) if found.is_file() && found.len() == file.size => return Ok(Some(name)),
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
    }
    Ok(None)
}

/// Compares a downloaded file with what the commit says of it; returns its name in `blobs`, or what is wrong.
fn verify(path: &Path, file: &RemoteFile) -> Result<String, String> {
    let reader = |error: std::io::Error| error.to_string();
    let found = fs_err::symlink_metadata(path).map_err(reader)?;
    if !found.is_file() || found.len() != file.size {
        return Err(format!("expected {} bytes, got {}", file.size, found.len()));
    }
    let mut content = File::open(path).map_err(reader)?;
    let mut sha256 = Sha256::new();
    let mut git = git_hasher(file.size);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match content.read(&mut buffer).map_err(reader)? {
            0 => break,
            n if file.is_pointer => sha256.update(&buffer[..n]),
            n => git.update(&buffer[..n]),
        }
    }
    let (blob, oid) = if file.is_pointer {
        let sha256 = hex(&sha256.finalize());
        let oid = pointer_id(&sha256, file.size);
        (sha256, oid)
    } else {
        let oid = hex(&git.finalize());
        (oid.clone(), oid)
    };
    match oid == file.oid {
        true => Ok(blob),
        false => Err(format!("its content hash {blob} is not the one its commit names")),
    }
}

/// Git's id of a file: SHA-1 over a header with the size, then the content.
fn git_hasher(size: u64) -> sha1::Sha1 {
    sha1::Sha1::new_with_prefix(format!("blob {size}\0"))
}

/// Git's id of the pointer that stands for a large file.
///
/// # Source
///
/// Git LFS specification, `docs/spec.md`: the pointer's three lines.
fn pointer_id(sha256: &str, size: u64) -> String {
    let text =
        format!("version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n");
    let mut git = git_hasher(text.len() as u64);
    git.update(text.as_bytes());
    hex(&git.finalize())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Makes `directory/relative` a link to a blob, as `huggingface_hub` does. Others may be reading the file: what is
/// right already stays, and at every moment there is either the old one or the new one.
fn link(directory: &Path, relative: &Path, blobs: &Path, blob: &str) -> Result<(), Error> {
    let place = directory.join(relative);
    let resolved = fs_err::canonicalize(&place);
    if resolved
        .is_ok_and(|found| fs_err::canonicalize(blobs.join(blob)).is_ok_and(|it| it == found))
    {
        return Ok(());
    }
    fs_err::create_dir_all(place.parent().expect("lies in the snapshot"))?;
    let depth = relative.components().count();
    let target: PathBuf = std::iter::repeat_n("..", depth + 1).collect();
    // Under the lock of this file, so a leftover is a killed process's.
    let new = blobs.join(format!("{blob}.link"));
    if fs_err::symlink_metadata(&new).is_ok() {
        fs_err::remove_file(&new)?;
    }
    fs_err::os::unix::fs::symlink(target.join("blobs").join(blob), &new)?;
    fs_err::rename(&new, &place)?;
    Ok(())
}

/// Errors of a connection that broke, which another attempt may mend.
fn is_broken_transfer(error: &HFError) -> bool {
    match error {
        HFError::Request { .. } | HFError::Xet { .. } => true,
        HFError::Http { context } => context.status.is_server_error(),
        _ => false,
    }
}

/// What went wrong and what to do about it.
fn explain(error: &HFError, page: &str) -> String {
    match error {
        HFError::AuthRequired { .. } => format!(
            "not accessible: the repository does not exist, is private, or is gated; check the name, accept its \
             conditions at {page} if it asks for that, and set HF_TOKEN to a token of that account"
        ),
        HFError::Forbidden { .. } => format!(
            "access is gated and the account of HF_TOKEN has none: accept the conditions at {page} with it"
        ),
        HFError::RepoNotFound { .. } => format!("no such repository: {page}"),
        HFError::RevisionNotFound { revision, .. } => {
            format!("no such repository or revision {revision:?}: {page}")
        }
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
    text
}

/// Shows hf-hub's progress in megabytes.
struct Bar {
    progress: arete_records::progress::Progress,
    /// Bytes shown, and bytes done of the file under way.
    state: Mutex<(u64, u64)>,
}

const MEGABYTE: u64 = 1_000_000;

impl Bar {
    fn new(bytes: u64) -> Self {
        let total = bytes.div_ceil(MEGABYTE);
        let progress = arete_records::progress::start("downloading", "MB", total);
        Self { progress, state: Mutex::new((0, 0)) }
    }
}

impl ProgressHandler for Bar {
    fn on_progress(&self, event: &ProgressEvent) {
        let done = match event {
            ProgressEvent::Download(DownloadEvent::Progress { files }) => {
                files.first().map_or(0, |file| file.bytes_completed)
            }
            ProgressEvent::Download(DownloadEvent::AggregateProgress {
                bytes_completed, ..
            }) => *bytes_completed,
            _ => return,
        };
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (before, previous) = *state;
        let bytes = before + done.saturating_sub(previous);
        *state = (bytes, done);
        self.progress.inc(bytes / MEGABYTE - before / MEGABYTE);
    }
}

#[cfg(test)]
mod tests;
