//! Files and directories that are there whole or not at all.
//!
//! Everything is written under a temporary name beside its destination, flushed to the disk,
//! renamed, and the directory flushed too. A killed writer leaves `.NAME.tmp-PID-N`, which
//! [`sweep`] removes.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Error;

/// Writes a file whole: temporary file, fsync, rename, fsync of the directory.
///
/// # Errors
///
/// [`Error::Io`]; then the temporary file is gone and an older file of that name is untouched.
pub fn write(path: impl AsRef<Path>, bytes: &[u8]) -> Result<(), Error> {
    let path = path.as_ref();
    let temporary = beside(path, "tmp")?;
    let result = write_and_sync(&temporary, bytes)
        .and_then(|()| fs_err::rename(&temporary, path))
        .and_then(|()| sync_dir(parent(path)));
    if result.is_err() {
        // The first error is the one to report.
        let _ = fs_err::remove_file(&temporary);
    }
    result.map_err(Error::Io)
}

/// A directory filled under a temporary name and renamed into place by [`AtomicDir::commit`].
///
/// Dropped uncommitted, it is removed.
#[derive(Debug)]
pub struct AtomicDir {
    temporary: PathBuf,
    target: PathBuf,
    committed: bool,
}

impl AtomicDir {
    /// Makes the temporary directory beside `target` (whose parents are made if missing).
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if it cannot be made.
    pub fn new(target: impl AsRef<Path>) -> Result<Self, Error> {
        let target = target.as_ref().to_owned();
        fs_err::create_dir_all(parent(&target))?;
        let temporary = beside(&target, "tmp")?;
        fs_err::create_dir(&temporary)?;
        Ok(Self { temporary, target, committed: false })
    }

    /// Where to write the files.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Flushes every file and directory, and renames the directory to its target; an existing
    /// target is renamed aside first and deleted after.
    ///
    /// # Errors
    ///
    /// [`Error::Io`]; then the temporary directory is gone and an existing target is back.
    pub fn commit(mut self) -> Result<(), Error> {
        sync_tree(&self.temporary)?;
        let aside = beside(&self.target, "old")?;
        let replaces = fs_err::symlink_metadata(&self.target).is_ok();
        if replaces {
            fs_err::rename(&self.target, &aside)?;
        }
        if let Err(error) = fs_err::rename(&self.temporary, &self.target) {
            if replaces {
                fs_err::rename(&aside, &self.target)?;
            }
            return Err(Error::Io(error));
        }
        self.committed = true;
        sync_dir(parent(&self.target))?;
        if replaces {
            remove(&aside)?;
        }
        Ok(())
    }
}

impl Drop for AtomicDir {
    fn drop(&mut self) {
        if !self.committed {
            // Best effort: what stays is a leftover that `sweep` removes.
            let _ = fs_err::remove_dir_all(&self.temporary);
        }
    }
}

/// Removes what killed writers left under `dir`, at any depth; a directory that was renamed aside
/// and not yet replaced is put back. Call it under the stage's lock only.
///
/// # Errors
///
/// [`Error::Io`] if something cannot be listed or removed.
pub fn sweep(dir: impl AsRef<Path>) -> Result<(), Error> {
    let dir = dir.as_ref();
    for entry in fs_err::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        match Leftover::of(&path) {
            Some(Leftover::Temporary) => remove(&path)?,
            Some(Leftover::Aside(name)) => {
                let target = dir.join(name);
                if fs_err::symlink_metadata(&target).is_ok() {
                    remove(&path)?;
                } else {
                    fs_err::rename(&path, &target)?;
                }
            }
            None if entry.file_type()?.is_dir() => sweep(&path)?,
            None => {}
        }
    }
    Ok(())
}

/// Whether a file name is that of a temporary file or directory of this module.
pub fn is_leftover(path: &Path) -> bool {
    Leftover::of(path).is_some()
}

enum Leftover {
    Temporary,
    /// Moved aside; holds the name it had.
    Aside(String),
}

impl Leftover {
    /// `.NAME.tmp-PID-N` or `.NAME.old-PID-N`.
    fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.strip_prefix('.')?;
        let (rest, numbers) = name.rsplit_once('.')?;
        let (kind, numbers) = numbers.split_once('-')?;
        let (pid, counter) = numbers.split_once('-')?;
        let is_number = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
        if rest.is_empty() || !is_number(pid) || !is_number(counter) {
            return None;
        }
        match kind {
            "tmp" => Some(Self::Temporary),
            "old" => Some(Self::Aside(rest.to_owned())),
            _ => None,
        }
    }
}

/// A fresh name beside `path`: `.NAME.KIND-PID-N`.
fn beside(path: &Path, kind: &str) -> Result<PathBuf, Error> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().ok_or_else(|| {
        std::io::Error::new(
            std::io::ErrorKind::InvalidInput,
            format!("{}: not the name of a file or directory", path.display()),
        )
    })?;
    let mut fresh = OsString::from(".");
    fresh.push(name);
    let counter = COUNTER.fetch_add(1, Ordering::Relaxed);
    fresh.push(format!(".{kind}-{}-{counter}", std::process::id()));
    Ok(parent(path).join(fresh))
}

/// The directory a path lies in (`.` for a bare name).
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn write_and_sync(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = fs_err::File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn sync_tree(dir: &Path) -> Result<(), Error> {
    for entry in fs_err::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            fs_err::File::open(entry.path())?.sync_all()?;
        }
    }
    sync_dir(dir)?;
    Ok(())
}

/// Makes names in a directory durable.
pub(crate) fn sync_dir(dir: &Path) -> std::io::Result<()> {
    fs_err::File::open(dir)?.sync_all()
}

/// Removes a file or a whole directory.
pub(crate) fn remove(path: &Path) -> Result<(), Error> {
    if fs_err::symlink_metadata(path)?.is_dir() {
        fs_err::remove_dir_all(path)?;
    } else {
        fs_err::remove_file(path)?;
    }
    Ok(())
}
