//! Reading whole files that anyone may have made: regular ones only, and no more of them than a limit.
//!
//! A device or a pipe has no size to look at beforehand and no end; opening a pipe may wait for ever.

use std::io::Read;
use std::path::Path;

use fs_err::File;

use crate::{Error, Refusal};

/// Opens a regular file for reading; links are followed.
///
/// # Errors
///
/// [`Error::Refused`] if it is a directory, a device, a pipe or a socket; [`Error::Io`].
pub fn open_regular(path: &Path) -> Result<File, Error> {
    // Before it is opened: that can block, and does something to some devices.
    let kind = fs_err::metadata(path)?.file_type();
    if kind.is_file() {
        return Ok(File::open(path)?);
    }
    let found = if kind.is_dir() { "a directory" } else { "a device, pipe or socket" };
    Err(Refusal::file(path, "", "a regular file", found).into())
}

/// The bytes of a regular file of at most `limit` bytes.
///
/// # Errors
///
/// As [`open_regular`], and [`Error::Refused`] if there is more in it.
pub fn read_capped(path: &Path, limit: u64) -> Result<Vec<u8>, Error> {
    let file = open_regular(path)?;
    let size = file.metadata()?.len();
    let too_large = |found: String| {
        Err(Refusal::file(path, "file size", format!("at most {limit} bytes"), found).into())
    };
    if size > limit {
        return too_large(format!("{size} bytes"));
    }
    // What the system calls a regular file of no size can still go on (/proc), and a file can grow.
    let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return too_large("more".to_owned());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_are_read_and_only_up_to_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs_err::write(&path, b"12345").unwrap();
        assert_eq!(read_capped(&path, 5).unwrap(), b"12345");
        let refused = |path: &Path, limit| read_capped(path, limit).unwrap_err().to_string();
        assert!(refused(&path, 4).contains("at most 4 bytes, got 5 bytes"));
        // A link is followed, to whatever is there.
        let link = dir.path().join("link");
        fs_err::os::unix::fs::symlink(&path, &link).unwrap();
        assert_eq!(read_capped(&link, 5).unwrap(), b"12345");
        for device in ["/dev/zero", "/dev/null"] {
            fs_err::remove_file(&link).unwrap();
            fs_err::os::unix::fs::symlink(device, &link).unwrap();
            assert!(refused(&link, 5).contains("expected a regular file, got a device"));
        }
        assert!(refused(dir.path(), 5).contains("got a directory"));
        let pipe = dir.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
        assert!(made.success());
        assert!(refused(&pipe, 5).contains("got a device, pipe or socket"));
        // A size of 0 that is none.
        assert!(refused(Path::new("/proc/self/status"), 5).contains("at most 5 bytes, got more"));
        assert!(read_capped(Path::new("/proc/self/status"), 1 << 20).unwrap().len() > 5);
    }
}
