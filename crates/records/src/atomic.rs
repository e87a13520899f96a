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
pub fn parent(path: &Path) -> &Path {
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

/// Makes names in a directory durable. Some file systems (CIFS, sshfs, some of FUSE) do that on their own and know no
/// such call for a directory: their refusal is passed over, as databases and git do.
pub(crate) fn sync_dir(dir: &Path) -> std::io::Result<()> {
    // The error as the system gave it: its number tells.
    match fs_err::File::open(dir)?.into_parts().0.sync_all() {
        Err(error) if is_unknown_call(&error) => {
            tracing::debug!(dir = %dir.display(), %error, "the file system does not flush directories");
            Ok(())
        }
        other => other,
    }
}

/// Whether the file system does not know a call, as opposed to failing at it.
fn is_unknown_call(error: &std::io::Error) -> bool {
    // EINVAL, ENOTSUP and ENOSYS, as libc numbers them on Linux.
    const UNKNOWN: [i32; 3] = [22, 95, 38];
    error.kind() == std::io::ErrorKind::Unsupported
        || error.raw_os_error().is_some_and(|code| UNKNOWN.contains(&code))
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs_err::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn write_replaces_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        write(&path, b"one").unwrap();
        write(&path, b"two").unwrap();
        assert_eq!(fs_err::read(&path).unwrap(), b"two");
        assert_eq!(names(dir.path()), ["a.txt"]);
    }

    #[test]
    fn a_write_that_fails_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("taken");
        fs_err::create_dir(&target).unwrap();
        fs_err::write(target.join("inside"), b"kept").unwrap();
        // A file cannot replace a directory: the rename fails after the temporary file is written.
        let error = write(&target, b"bytes").unwrap_err();
        assert!(error.is_io() && error.to_string().contains("taken"), "{error}");
        assert_eq!(names(dir.path()), ["taken"]);
        assert!(write(dir.path().join("no/such/dir"), b"").is_err());
        assert!(write(dir.path().join(".."), b"").is_err());
        assert_eq!(names(dir.path()), ["taken"]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn what_was_written_is_read(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("x");
            write(&path, &bytes).unwrap();
            prop_assert_eq!(fs_err::read(&path).unwrap(), bytes);
            prop_assert_eq!(names(dir.path()), ["x"]);
        }
    }

    #[test]
    fn a_directory_appears_whole_and_replaces_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("new/model");
        let first = AtomicDir::new(&target).unwrap();
        fs_err::write(first.path().join("old.txt"), b"1").unwrap();
        assert!(!target.exists());
        first.commit().unwrap();
        let second = AtomicDir::new(&target).unwrap();
        fs_err::create_dir(second.path().join("sub")).unwrap();
        fs_err::write(second.path().join("sub/new.txt"), b"2").unwrap();
        second.commit().unwrap();
        assert_eq!(names(&target), ["sub"]);
        assert_eq!(names(&dir.path().join("new")), ["model"]);
    }

    #[test]
    fn a_dropped_directory_is_gone_and_the_old_one_stays() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("model");
        fs_err::create_dir(&target).unwrap();
        let fresh = AtomicDir::new(&target).unwrap();
        fs_err::write(fresh.path().join("half.txt"), b"1").unwrap();
        drop(fresh);
        assert_eq!(names(dir.path()), ["model"]);
    }

    #[test]
    fn sweep_removes_what_killed_writers_left_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let sub = dir.path().join("sub");
        fs_err::create_dir(&sub).unwrap();
        fs_err::write(sub.join(".a.parquet.tmp-4711-0"), b"").unwrap();
        fs_err::create_dir(sub.join(".merged.tmp-4711-1")).unwrap();
        fs_err::write(sub.join(".merged.tmp-4711-1/x"), b"").unwrap();
        let kept = [".a.tmp", ".a.tmp-", ".a.tmp-1", ".a.tmp-1-x", "a.tmp-1-2", ".tmp-1-2"];
        for name in kept {
            fs_err::write(sub.join(name), b"").unwrap();
        }
        sweep(dir.path()).unwrap();
        let mut expected = kept.map(str::to_owned).to_vec();
        expected.sort();
        assert_eq!(names(&sub), expected);
    }

    #[test]
    fn sweep_puts_back_a_directory_whose_replacement_never_came() {
        let dir = tempfile::tempdir().unwrap();
        // Killed between the two renames of `commit`.
        fs_err::create_dir(dir.path().join(".model.old-4711-1")).unwrap();
        fs_err::write(dir.path().join(".model.old-4711-1/weights"), b"w").unwrap();
        fs_err::create_dir(dir.path().join(".model.tmp-4711-0")).unwrap();
        // Killed after both, before the old one was deleted.
        fs_err::create_dir(dir.path().join("other")).unwrap();
        fs_err::create_dir(dir.path().join(".other.old-4711-3")).unwrap();
        sweep(dir.path()).unwrap();
        assert_eq!(names(dir.path()), ["model", "other"]);
        assert_eq!(fs_err::read(dir.path().join("model/weights")).unwrap(), b"w");
    }

    /// CIFS, sshfs and some of FUSE answer EINVAL when a directory is to be flushed; a disk that fails answers EIO.
    #[test]
    fn what_a_file_system_does_not_know_is_told_from_what_fails() {
        for (code, unknown) in [(22, true), (95, true), (38, true), (5, false), (28, false)] {
            let error = std::io::Error::from_raw_os_error(code);
            assert_eq!(is_unknown_call(&error), unknown, "{code}");
        }
    }
}
