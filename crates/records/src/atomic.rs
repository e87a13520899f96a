//! Files and directories that are there whole or not at all, and never at the cost of someone else's.
//!
//! Everything is written under a temporary name beside its destination, flushed to the disk, put in place by one step of the
//! file system, and the directory flushed too. What was there under the name of a directory changes places with the new one,
//! so that no moment is without it. Nothing is removed but what has the names of what replaces it ([`AtomicDir::commit`]), or
//! not even that ([`AtomicDir::commit_beside`]).
//!
//! A killed writer leaves `.NAME.tmp-PID-N`, which it held locked while it lived: [`sweep`] and [`sweep_beside`] remove it.

use std::ffi::OsString;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use fs_err::File;
use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::Error;

/// Writes a file whole: temporary file, fsync, rename, fsync of the directory.
///
/// # Errors
///
/// [`Error::Io`]; then the temporary file is gone and an older file of that name is untouched.
pub fn write(path: impl AsRef<Path>, bytes: &[u8]) -> Result<(), Error> {
    let path = path.as_ref();
    let (temporary, mut file) = claim(path, |temporary| File::create_new(temporary))?;
    let result = file
        .write_all(bytes)
        .and_then(|()| file.sync_all())
        .and_then(|()| fs_err::rename(&temporary, path))
        .and_then(|()| sync_dir(parent(path)));
    if result.is_err() {
        // The first error is the one to report.
        let _ = fs_err::remove_file(&temporary);
    }
    result.map_err(Error::Io)
}

/// A directory filled under a temporary name and put in place by [`AtomicDir::commit`] or [`AtomicDir::commit_beside`].
///
/// Dropped uncommitted, it is removed.
#[derive(Debug)]
pub struct AtomicDir {
    temporary: PathBuf,
    target: PathBuf,
    committed: bool,
    /// Held while this process lives: others do not take its directory for one that a kill left.
    _lock: File,
}

impl AtomicDir {
    /// Makes the temporary directory beside `target` (whose parents are made if missing), after [`sweep_beside`].
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if it cannot be made.
    pub fn new(target: impl AsRef<Path>) -> Result<Self, Error> {
        let target = target.as_ref().to_owned();
        fs_err::create_dir_all(parent(&target))?;
        sweep_beside(&target)?;
        let (temporary, lock) = claim(&target, |temporary| {
            fs_err::create_dir(temporary)?;
            File::open(temporary)
        })?;
        Ok(Self { temporary, target, committed: false, _lock: lock })
    }

    /// Where to write the files.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Flushes every file and directory, and puts the directory in its place: for directories of this program's own, whose
    /// earlier contents it wrote itself. A target whose files all have the names of new ones is removed; any other is someone's,
    /// and set aside as [`AtomicDir::commit_beside`] does.
    ///
    /// # Errors
    ///
    /// [`Error::Io`]; then the temporary directory is gone and an existing target is as it was.
    pub fn commit(mut self) -> Result<(), Error> {
        sync_tree(&self.temporary)?;
        if !is_taken(&self.target) {
            fs_err::rename(&self.temporary, &self.target)?;
        } else if replaces(&self.temporary, &self.target)? {
            self.exchange(Some("old"))?;
        } else {
            self.set_aside()?;
        }
        self.committed = true;
        Ok(sync_dir(parent(&self.target))?)
    }

    /// Flushes every file and directory, and puts the directory in its place, wherever a user names it. What is there under that
    /// name, whosever it is, moves to `NAME.old-N`, whole, and its new path is returned; links are not followed. Where the same
    /// files are there already, byte for byte, they stay, and nothing is written.
    ///
    /// # Errors
    ///
    /// [`Error::Io`]; then the temporary directory is gone and an existing target is as it was.
    pub fn commit_beside(mut self) -> Result<Option<PathBuf>, Error> {
        sync_tree(&self.temporary)?;
        let mut aside = None;
        if !is_taken(&self.target) {
            fs_err::rename(&self.temporary, &self.target)?;
        } else if is_empty_dir(&self.target)? {
            self.exchange(Some("old"))?;
        } else if are_equal(&self.temporary, &self.target)? {
            return Ok(None); // dropped
        } else {
            aside = Some(self.set_aside()?);
        }
        self.committed = true;
        sync_dir(parent(&self.target))?;
        Ok(aside)
    }

    /// The new directory and the old change places; the old one then goes to a free `NAME.old-N`.
    fn set_aside(&self) -> Result<PathBuf, Error> {
        self.exchange(None)
    }

    /// Puts the new directory under its name. The old one is removed if `remove` says under which kind of name it may be met
    /// by [`sweep`], else it is set aside; where it went.
    fn exchange(&self, remove: Option<&str>) -> Result<PathBuf, Error> {
        let Self { temporary, target, .. } = self;
        if remove.is_none() {
            // The new one waits under the name that the old one will have: no sweep takes that away.
            let aside = first_free(target, temporary)?;
            match renameat_with(CWD, &aside, CWD, target, RenameFlags::EXCHANGE) {
                Ok(()) => return Ok(aside),
                Err(error) if is_unsupported(error) => fs_err::rename(&aside, temporary)?,
                Err(error) => {
                    fs_err::rename(&aside, temporary)?;
                    return Err(rename_error(target, error));
                }
            }
        } else {
            match renameat_with(CWD, temporary, CWD, target, RenameFlags::EXCHANGE) {
                Ok(()) => {
                    remove_own(temporary)?;
                    return Ok(temporary.clone());
                }
                Err(error) if is_unsupported(error) => {}
                Err(error) => return Err(rename_error(target, error)),
            }
        }
        self.exchange_in_two_steps(remove)
    }

    /// As [`AtomicDir::exchange`] where the file system cannot: a kill between leaves a name that [`sweep`] knows.
    fn exchange_in_two_steps(&self, remove: Option<&str>) -> Result<PathBuf, Error> {
        let Self { temporary, target, .. } = self;
        let waiting = beside(target, remove.unwrap_or("keep"))?;
        fs_err::rename(target, &waiting)?;
        if let Err(error) = fs_err::rename(temporary, target) {
            fs_err::rename(&waiting, target)?;
            return Err(Error::Io(error));
        }
        match remove {
            Some(_) => remove_own(&waiting).map(|()| waiting),
            None => first_free(target, &waiting),
        }
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

/// Whether a name of a file or directory is that of something set aside (`NAME.old-N`): no result any more, and the user's to remove.
#[must_use]
pub fn is_set_aside(name: &str) -> bool {
    name.contains(".old-")
}

/// Renames `from` to the first `NAME.old-N` beside `target` that is not taken.
fn first_free(target: &Path, from: &Path) -> Result<PathBuf, Error> {
    let name = target.file_name().map(OsString::from).unwrap_or_default();
    for n in 1u32.. {
        let mut free = name.clone();
        free.push(format!(".old-{n}"));
        let free = parent(target).join(free);
        match renameat_with(CWD, from, CWD, &free, RenameFlags::NOREPLACE) {
            Ok(()) => return Ok(free),
            Err(rustix::io::Errno::EXIST) => {}
            Err(error) if is_unsupported(error) && !is_taken(&free) => {
                fs_err::rename(from, &free)?;
                return Ok(free);
            }
            Err(error) if is_unsupported(error) => {}
            Err(error) => return Err(rename_error(from, error)),
        }
    }
    unreachable!("there are more numbers than directories")
}

/// Whether the file system has no such rename.
fn is_unsupported(error: rustix::io::Errno) -> bool {
    use rustix::io::Errno;
    [Errno::INVAL, Errno::NOSYS, Errno::OPNOTSUPP].contains(&error)
}

fn rename_error(path: &Path, error: rustix::io::Errno) -> Error {
    let error = std::io::Error::from(error);
    Error::Io(std::io::Error::new(error.kind(), format!("renaming {}: {error}", path.display())))
}

fn is_taken(path: &Path) -> bool {
    fs_err::symlink_metadata(path).is_ok()
}

fn is_empty_dir(path: &Path) -> Result<bool, Error> {
    Ok(fs_err::symlink_metadata(path)?.is_dir() && fs_err::read_dir(path)?.next().is_none())
}

/// Regular files and links under `dir`, links not followed, by their paths below it.
fn names_below(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    fn visit(dir: &Path, prefix: &Path, out: &mut Vec<PathBuf>) -> Result<(), Error> {
        for entry in fs_err::read_dir(dir)? {
            let entry = entry?;
            let relative = prefix.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                visit(&entry.path(), &relative, out)?;
            } else {
                out.push(relative);
            }
        }
        Ok(())
    }
    let mut out = Vec::new();
    visit(dir, Path::new(""), &mut out)?;
    out.sort();
    Ok(out)
}

/// Whether every file below `old` has the name of one below `new`, and none is a link or a device.
fn replaces(new: &Path, old: &Path) -> Result<bool, Error> {
    if !fs_err::symlink_metadata(old)?.is_dir() {
        return Ok(false);
    }
    let names = names_below(new)?;
    for name in names_below(old)? {
        let is_file = fs_err::symlink_metadata(old.join(&name))?.is_file();
        if !is_file || names.binary_search(&name).is_err() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether two directories hold the same files with the same bytes, and nothing else.
fn are_equal(new: &Path, old: &Path) -> Result<bool, Error> {
    if !replaces(new, old)? {
        return Ok(false);
    }
    let names = names_below(new)?;
    if names != names_below(old)? {
        return Ok(false);
    }
    for name in names {
        if !have_equal_bytes(&new.join(&name), &old.join(&name))? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn have_equal_bytes(a: &Path, b: &Path) -> Result<bool, Error> {
    let (mut a, mut b) = (File::open(a)?, File::open(b)?);
    if a.metadata()?.len() != b.metadata()?.len() {
        return Ok(false);
    }
    let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    loop {
        let n = crate::files::read_some(&mut a, &mut left)?;
        if n == 0 {
            return Ok(true);
        }
        match b.read_exact(&mut right[..n]) {
            Ok(()) if left[..n] == right[..n] => {}
            Err(error) if error.kind() != ErrorKind::UnexpectedEof => return Err(error.into()),
            _ => return Ok(false),
        }
    }
}

/// Removes what killed writers left under `dir`, at any depth; what was moved aside and not yet replaced is put back. Call it
/// under the stage's lock only.
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
            Some(leftover) => leftover.clear(&path)?,
            None if entry.file_type()?.is_dir() => sweep(&path)?,
            None => {}
        }
    }
    Ok(())
}

/// Removes what killed writers of `path` left beside it, under no lock but theirs: what a living process writes stays.
///
/// # Errors
///
/// [`Error::Io`] if something cannot be listed or removed.
pub fn sweep_beside(path: &Path) -> Result<(), Error> {
    let name = path.file_name().unwrap_or_default();
    let mut left = Vec::new();
    for entry in fs_err::read_dir(parent(path))? {
        let entry = entry?;
        let found = entry.path();
        if let Some(leftover) = Leftover::of(&found)
            && name == leftover.name.as_str()
            && entry.file_type().is_ok_and(|kind| kind.is_dir() || kind.is_file())
        {
            left.push((found, leftover));
        }
    }
    let mut locks = Vec::with_capacity(left.len());
    for (found, leftover) in &left {
        if leftover.kind != Kind::Temporary {
            continue;
        }
        match File::open(found) {
            Ok(file) if file.file().try_lock().is_ok() => locks.push(file),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            _ => return Ok(()), // a living writer's, or locks are not to be had here
        }
    }
    for (found, leftover) in left {
        match leftover.clear(&found) {
            Err(Error::Io(error)) if error.kind() == ErrorKind::NotFound => {} // others sweep, too
            other => other?,
        }
    }
    drop(locks);
    Ok(())
}

/// Whether a file name is that of a temporary file or directory of this module.
pub fn is_leftover(path: &Path) -> bool {
    Leftover::of(path).is_some()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Not finished.
    Temporary,
    /// Replaced, to be removed.
    Old,
    /// Replaced, to be kept.
    Keep,
}

/// What a kill left: `.NAME.tmp-PID-N`, `.NAME.old-PID-N` or `.NAME.keep-PID-N`.
struct Leftover {
    kind: Kind,
    /// The name it had or was to have.
    name: String,
}

impl Leftover {
    fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.strip_prefix('.')?;
        let (rest, numbers) = name.rsplit_once('.')?;
        let (kind, numbers) = numbers.split_once('-')?;
        let (pid, counter) = numbers.split_once('-')?;
        let is_number = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
        if rest.is_empty() || !is_number(pid) || !is_number(counter) {
            return None;
        }
        let kind = match kind {
            "tmp" => Kind::Temporary,
            "old" => Kind::Old,
            "keep" => Kind::Keep,
            _ => return None,
        };
        Some(Self { kind, name: rest.to_owned() })
    }

    /// Removes it, puts it back under its name, or sets it aside.
    fn clear(&self, path: &Path) -> Result<(), Error> {
        let target = parent(path).join(&self.name);
        match self.kind {
            Kind::Temporary => remove_own(path),
            _ if !is_taken(&target) => Ok(fs_err::rename(path, &target)?),
            Kind::Old => remove_own(path),
            Kind::Keep => first_free(&target, path).map(drop),
        }
    }
}

/// Makes a temporary file or directory of this process beside `path`, and locks it where the file system can.
fn claim(
    path: &Path,
    make: impl Fn(&Path) -> std::io::Result<File>,
) -> Result<(PathBuf, File), Error> {
    loop {
        let temporary = beside(path, "tmp")?;
        let file = make(&temporary)?;
        let _ = file.file().try_lock(); // without locks nothing is swept either
        // Whoever swept between the two steps has taken it away.
        let here = fs_err::symlink_metadata(&temporary).ok();
        if here.is_some_and(|here| file.metadata().is_ok_and(|own| own.ino() == here.ino())) {
            return Ok((temporary, file));
        }
    }
}

/// A fresh name beside `path`: `.NAME.KIND-PID-N`.
fn beside(path: &Path, kind: &str) -> Result<PathBuf, Error> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().ok_or_else(|| {
        std::io::Error::new(
            ErrorKind::InvalidInput,
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

fn sync_tree(dir: &Path) -> Result<(), Error> {
    for entry in fs_err::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            File::open(entry.path())?.sync_all()?;
        }
    }
    sync_dir(dir)?;
    Ok(())
}

/// Makes names in a directory durable. Some file systems (CIFS, sshfs, some of FUSE) do that on their own and know no
/// such call for a directory: their refusal is passed over, as databases and git do.
///
/// # Errors
///
/// What else the system refuses, with the directory's path.
pub fn sync_dir(dir: &Path) -> std::io::Result<()> {
    // The error as the system gave it: its number tells.
    match fs_err::File::open(dir)?.into_parts().0.sync_all() {
        Err(error) if is_unknown_call(&error) => {
            tracing::debug!(dir = %dir.display(), %error, "the file system does not flush directories");
            Ok(())
        }
        other => other.map_err(|error| {
            let text = format!("flushing the directory {}: {error}", dir.display());
            std::io::Error::new(error.kind(), text)
        }),
    }
}

/// Whether the file system does not know a call, as opposed to failing at it.
fn is_unknown_call(error: &std::io::Error) -> bool {
    // EINVAL, ENOTSUP and ENOSYS, as libc numbers them on Linux.
    const UNKNOWN: [i32; 3] = [22, 95, 38];
    error.kind() == std::io::ErrorKind::Unsupported
        || error.raw_os_error().is_some_and(|code| UNKNOWN.contains(&code))
}

/// Removes a file or a whole directory of this program's; links in it are removed, not followed.
fn remove_own(path: &Path) -> Result<(), Error> {
    if fs_err::symlink_metadata(path)?.is_dir() {
        fs_err::remove_dir_all(path)?;
    } else {
        fs_err::remove_file(path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
