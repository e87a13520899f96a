//! Uploading to a repository of the hub: what differs from its last commit, in one new commit.

use std::path::PathBuf;

use hf_hub::repository::{CommitOperation, RepoType, RepoTypeDataset, RepoTypeModel};
use hf_hub::{HFError, HFRepositorySync};
use sha2::{Digest as _, Sha256};

use super::cache::{git_hasher, hex, pointer_id, verify};
use super::{Hub, RemoteFile, Repository, explain, safe_rel_path, split_id};
use crate::Error;

/// What a repository is for; the hub keeps both apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepositoryKind {
    /// Models and adapters.
    Model,
    /// Data sets.
    Dataset,
}

/// A file to upload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upload {
    /// Its path in the repository.
    pub path: String,
    /// What is in it.
    pub content: Content,
}

/// The bytes of an [`Upload`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Those of a file here.
    File(PathBuf),
    /// These.
    Bytes(Vec<u8>),
}

/// What [`Hub::push`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pushed {
    /// The repository's page.
    pub page: String,
    /// The commit that holds everything now.
    pub commit: String,
    /// Paths that differed and were uploaded; none if the repository held everything already.
    pub changed: Vec<String>,
    /// Weights and tables of the repository that are not among the files; they are left as they are.
    pub stale: Vec<String>,
}

impl Hub {
    /// Makes the repository `id` hold `files`, creating it if need be. Only files that differ from its last commit are
    /// uploaded, all in one commit; if none does, there is no commit.
    ///
    /// # Errors
    ///
    /// [`Error::Hub`] if the hub cannot be reached, refuses the token, or was changed by somebody else meanwhile;
    /// [`Error::Io`] if a file cannot be read.
    pub fn push(
        &self,
        kind: RepositoryKind,
        id: &str,
        private: bool,
        files: &[Upload],
        message: &str,
    ) -> Result<Pushed, Error> {
        let (owner, name) = split_id(id)?;
        let request = Request { kind, id, private, files, message };
        match kind {
            RepositoryKind::Model => {
                self.push_to(&self.client.model(owner, name), RepoTypeModel, &request)
            }
            RepositoryKind::Dataset => {
                self.push_to(&self.client.dataset(owner, name), RepoTypeDataset, &request)
            }
        }
    }

    fn push_to<T: RepoType>(
        &self,
        repository: &HFRepositorySync<T>,
        kind: T,
        request: &Request<'_>,
    ) -> Result<Pushed, Error> {
        let Request { kind: of, id, private, files, message } = *request;
        let read = Repository { kind: of, id };
        let fail = |reason: String| Error::Hub { what: id.to_owned(), reason };
        if self.offline {
            return Err(fail("HF_HUB_OFFLINE forbids uploading".to_owned()));
        }
        for file in files {
            safe_rel_path(&file.path).map_err(fail)?;
        }
        let page = self.page(read);
        let refuse = |error: HFError| fail(explain_upload(&error, &page));
        self.client
            .create_repository()
            .repo_id(id)
            .repo_type(kind)
            .private(private)
            .exist_ok(true)
            .send()
            .map_err(refuse)?;
        let snapshot = self.snapshot(read, None)?;
        if !snapshot.online {
            return Err(fail(format!("{page} cannot be reached")));
        }
        let mut operations = Vec::new();
        let mut changed = Vec::new();
        for file in files {
            let remote = snapshot.files.iter().find(|remote| remote.path == file.path);
            if remote.is_some_and(|remote| file.content.is_that_of(remote)) {
                continue;
            }
            changed.push(file.path.clone());
            operations.push(match &file.content {
                Content::File(path) => {
                    fs_err::metadata(path)?; // hf-hub's own message would not name the file
                    CommitOperation::add_file(file.path.clone(), path.clone())
                }
                Content::Bytes(bytes) => {
                    CommitOperation::add_bytes(file.path.clone(), bytes.clone())
                }
            });
        }
        let is_kept = |remote: &&RemoteFile| files.iter().any(|file| file.path == remote.path);
        let is_content = |path: &str| path.ends_with(".safetensors") || path.ends_with(".parquet");
        let stale = snapshot
            .files
            .iter()
            .filter(|remote| is_content(&remote.path) && !is_kept(remote))
            .map(|remote| remote.path.clone())
            .collect();
        let mut commit = snapshot.commit;
        if !operations.is_empty() {
            // Named as the parent, so that a commit of somebody else in between is noticed rather than overwritten.
            let made = repository
                .create_commit()
                .operations(operations)
                .commit_message(message)
                .parent_commit(commit.clone())
                .send()
                .map_err(refuse)?;
            // An answer is no proof: a portal or a proxy may have given it. Believed is what the branch holds now.
            let now = self.snapshot(read, None)?;
            let holds = |file: &&Upload| {
                let remote = now.files.iter().find(|remote| remote.path == file.path);
                remote.is_some_and(|remote| file.content.is_that_of(remote))
            };
            if let Some(missing) = files.iter().find(|file| !holds(file)) {
                return Err(fail(format!(
                    "not uploaded: {page} said it was, but its branch (commit {}) does not hold {}",
                    now.commit, missing.path
                )));
            }
            let named = made.commit_oid.filter(|named| *named != now.commit);
            if let Some(named) = named {
                tracing::warn!(named, found = now.commit, "the hub named another commit than its branch has now");
            }
            commit = now.commit;
        }
        Ok(Pushed { page, commit, changed, stale })
    }
}

/// The arguments of [`Hub::push`] that do not depend on the kind.
#[derive(Clone, Copy)]
struct Request<'a> {
    kind: RepositoryKind,
    id: &'a str,
    private: bool,
    files: &'a [Upload],
    message: &'a str,
}

impl Content {
    /// Whether the repository's file holds the same bytes.
    fn is_that_of(&self, remote: &RemoteFile) -> bool {
        match self {
            Self::File(path) => verify(path, remote).is_ok(),
            Self::Bytes(bytes) => {
                let size = bytes.len() as u64;
                let oid = if remote.is_pointer {
                    pointer_id(&hex(&Sha256::digest(bytes)), size)
                } else {
                    hex(&git_hasher(size).chain_update(bytes).finalize())
                };
                size == remote.size && oid == remote.oid
            }
        }
    }
}

/// What went wrong with an upload and what to do about it.
fn explain_upload(error: &HFError, page: &str) -> String {
    match error {
        HFError::AuthRequired { .. } => format!(
            "{page} refuses the token: set HF_TOKEN to one of an account that may write there"
        ),
        HFError::Forbidden { .. } => format!(
            "the token of HF_TOKEN may not write to {page}: it needs write access to that repository"
        ),
        error if is_outrun(error) => {
            format!("{page} was changed while files were uploaded: repeat the command")
        }
        other => explain(other, page),
    }
}

/// Whether somebody else's commit came first: 409, or 412 where a parent was named.
fn is_outrun(error: &HFError) -> bool {
    match error {
        HFError::Conflict { .. } => true,
        HFError::Http { context } => context.status.as_u16() == 412,
        _ => false,
    }
}
