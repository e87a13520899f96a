//! Content hashes of files and directories, remembered by size and time of last change.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::message::hex;
use crate::{Error, atomic, files};

/// Name of the file that marks a complete stage.
pub const RUN_JSON: &str = "run.json";

/// Name of the file that marks a stage's work in progress.
pub const STAGE_JSON: &str = "stage.json";

/// Name of the file of wall times, exempt from every comparison of runs.
pub const TIMINGS: &str = "timings.jsonl";

/// Name of the file that says what machine a stage ran on, exempt as well.
pub const MACHINE: &str = "machine.json";

/// Deepest directory that is walked; guards against links that point upwards.
const MAX_DEPTH: usize = 32;

/// A file changed this recently may change again within the same tick of the file system's clock.
const TICK: Duration = Duration::from_millis(50);

/// SHA-256 of a file's contents, in hex.
///
/// # Errors
///
/// [`Error::Io`] if the file cannot be read.
pub fn sha256_file(path: impl AsRef<Path>) -> Result<String, Error> {
    let mut file = fs_err::File::open(path.as_ref())?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        match crate::files::read_some(&mut file, &mut buffer)? {
            0 => return Ok(hex(&hasher.finalize())),
            n_bytes => hasher.update(&buffer[..n_bytes]),
        }
    }
}

/// SHA-256 of a file, or of a directory: of the lines `<sha256>  <relative path>` of its files in
/// order of their paths. Left out are `run.json`, wall times, logs, event files and hidden files.
///
/// # Errors
///
/// [`Error::Io`] if something cannot be read, [`Error::TooDeep`] if a link points upwards.
pub fn sha256_path(path: impl AsRef<Path>) -> Result<String, Error> {
    sha256_tree(path.as_ref(), |file| sha256_file(file))
}

fn sha256_tree(
    path: &Path,
    mut sha256: impl FnMut(&Path) -> Result<String, Error>,
) -> Result<String, Error> {
    let found = fs_err::metadata(path).map_err(|error| match error.kind() {
        // In plain words: it is most often a flag's path, mistyped.
        ErrorKind::NotFound => {
            let message = format!("{}: no such file or directory", path.display());
            std::io::Error::new(ErrorKind::NotFound, message)
        }
        _ => error,
    })?;
    if !found.is_dir() {
        return sha256(path);
    }
    let mut hasher = Sha256::new();
    for file in walk(path, &|_| false)? {
        if !file.rsplit('/').next().is_some_and(is_bookkeeping) {
            let digest = sha256(&path.join(&file))?;
            hasher.update(format!("{digest}  {file}\n"));
        }
    }
    Ok(hex(&hasher.finalize()))
}

/// Every file under a directory, links followed, hidden directories and links and those directories that `skip` names
/// left out: paths relative to it with `/` between names, sorted.
///
/// A hidden link is not followed: an editor's lock is one that leads nowhere, by design. Links that lead nowhere, pipes and devices
/// are no files.
///
/// # Errors
///
/// [`Error::Io`] if a directory cannot be read, [`Error::TooDeep`] if a link points upwards.
pub fn walk(dir: &Path, skip: &dyn Fn(&Path) -> bool) -> Result<Vec<String>, Error> {
    fn visit(
        dir: &Path,
        prefix: &str,
        depth: usize,
        skip: &dyn Fn(&Path) -> bool,
        files: &mut Vec<String>,
    ) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(Error::TooDeep { path: dir.to_owned(), limit: MAX_DEPTH });
        }
        for entry in fs_err::read_dir(dir)? {
            let entry = entry?;
            let path = entry.path();
            let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
            let relative = format!("{prefix}{name}");
            if name.starts_with('.') {
                if entry.file_type()?.is_file() {
                    files.push(relative);
                }
                continue;
            }
            let found = match fs_err::metadata(&path) {
                Err(error)
                    if error.kind() == ErrorKind::NotFound && entry.file_type()?.is_symlink() =>
                {
                    continue;
                }
                found => found?,
            };
            if found.is_dir() {
                if !skip(&path) {
                    visit(&path, &format!("{relative}/"), depth + 1, skip, files)?;
                }
            } else if found.is_file() {
                files.push(relative);
            }
        }
        Ok(())
    }
    let mut files = Vec::new();
    visit(dir, "", 0, skip, &mut files)?;
    files.sort();
    Ok(files)
}

/// Files of the machinery rather than of the results: markers, locks, logs, wall times, the machine.
pub fn is_bookkeeping(name: &str) -> bool {
    name.starts_with('.')
        || name.ends_with(".log")
        || name.contains("tfevents")
        || [RUN_JSON, STAGE_JSON, TIMINGS, MACHINE].contains(&name)
}

/// Hashes of files that have not changed since they were taken: `.hashes.json` beside the output
/// directory, shared by the stages of a run. Losing it costs time only, so its own errors are
/// passed over.
#[derive(Debug)]
pub struct HashCache {
    path: PathBuf,
    entries: BTreeMap<String, Entry>,
    changed: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    stamp: Stamp,
    sha256: String,
}

/// What the system changes whenever a file's contents change. Time of last status change and inode
/// catch copies that preserve the time of last modification.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    size: u64,
    mtime_ns: i64,
    ctime_ns: i64,
    inode: u64,
}

impl HashCache {
    /// The hashes remembered beside `output`; none if there are none, or they cannot be read.
    pub fn load(output: &Path) -> Self {
        let path = match fs_err::canonicalize(output) {
            Ok(output) => atomic::parent(&output).join(".hashes.json"),
            Err(_) => atomic::parent(output).join(".hashes.json"),
        };
        let entries = Self::read(&path);
        Self { path, entries, changed: false }
    }

    fn read(path: &Path) -> BTreeMap<String, Entry> {
        files::read_small(path)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default()
    }

    /// [`sha256_path`], remembered.
    ///
    /// # Errors
    ///
    /// Those of [`sha256_path`].
    pub fn sha256_path(&mut self, path: &Path) -> Result<String, Error> {
        sha256_tree(path, |file| self.sha256_file(file))
    }

    /// [`sha256_file`], remembered.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the file cannot be read.
    pub fn sha256_file(&mut self, path: &Path) -> Result<String, Error> {
        let key = fs_err::canonicalize(path)?.to_string_lossy().into_owned();
        let stamp = Stamp::of(path)?;
        if let Some(entry) = self.entries.get(&key)
            && entry.stamp == stamp
        {
            return Ok(entry.sha256.clone());
        }
        let sha256 = sha256_file(path)?;
        if stamp.is_settled() && Stamp::of(path)? == stamp {
            self.entries.insert(key, Entry { stamp, sha256: sha256.clone() });
            self.changed = true;
        }
        Ok(sha256)
    }

    /// Writes the hashes back, with those other stages took meanwhile, less those of files gone.
    pub fn save(&mut self) {
        if !std::mem::take(&mut self.changed) {
            return;
        }
        let mut entries = Self::read(&self.path);
        entries.append(&mut self.entries.clone());
        entries.retain(|path, _| Path::new(path).exists());
        if let Ok(json) = serde_json::to_vec(&entries)
            && let Err(error) =
                atomic::sweep_beside(&self.path).and_then(|()| atomic::write(&self.path, &json))
        {
            tracing::debug!(%error, "hashes not remembered");
        }
    }
}

impl Stamp {
    fn of(path: &Path) -> Result<Self, Error> {
        let metadata = fs_err::metadata(path)?;
        let ns = |s: i64, ns: i64| s.saturating_mul(1_000_000_000).saturating_add(ns);
        Ok(Self {
            size: metadata.len(),
            mtime_ns: ns(metadata.mtime(), metadata.mtime_nsec()),
            ctime_ns: ns(metadata.ctime(), metadata.ctime_nsec()),
            inode: metadata.ino(),
        })
    }

    /// Whether the last change is long enough ago for the next one to get another time.
    fn is_settled(&self) -> bool {
        let last_change = Duration::from_nanos(self.ctime_ns.max(self.mtime_ns).unsigned_abs());
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .is_ok_and(|now| now.saturating_sub(last_change) > TICK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What editors, notebooks and systems keep beside a file while it is open changes nothing.
    #[test]
    fn what_is_hidden_is_neither_hashed_nor_followed() {
        let dir = tempfile::tempdir().unwrap();
        fs_err::write(dir.path().join("prompts.jsonl"), "{}").unwrap();
        let sum = sha256_path(dir.path()).unwrap();
        std::os::unix::fs::symlink("user@host.17", dir.path().join(".#prompts.jsonl")).unwrap();
        fs_err::create_dir(dir.path().join(".ipynb_checkpoints")).unwrap();
        fs_err::write(dir.path().join(".ipynb_checkpoints/prompts.jsonl"), "{}").unwrap();
        fs_err::write(dir.path().join("._prompts.jsonl"), "x").unwrap();
        // No reader takes these for data.
        std::os::unix::fs::symlink("/dev/zero", dir.path().join("z.jsonl")).unwrap();
        std::os::unix::fs::symlink("nowhere", dir.path().join("gone.jsonl")).unwrap();
        assert_eq!(sha256_path(dir.path()).unwrap(), sum);
        fs_err::write(dir.path().join("more.jsonl"), "{}").unwrap();
        assert_ne!(sha256_path(dir.path()).unwrap(), sum);
    }
}
