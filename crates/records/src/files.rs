//! Reading whole files that anyone may have made: regular ones only, and no more of them than a limit.
//!
//! A device or a pipe has no size to look at beforehand and no end; opening a pipe may wait for ever.

use std::io::Read;
use std::path::{Path, PathBuf};

use fs_err::File;

use crate::{Error, Refusal};

/// Opens a regular file for reading; links are followed.
///
/// # Errors
///
/// [`Error::Refused`] if it is a directory, a device, a pipe or a socket; [`Error::Io`].
pub fn open_regular(path: &Path) -> Result<File, Error> {
    // Before it is opened: that can block, and does something to some devices.
    let kind = std::fs::metadata(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            let message = format!("{}: no such file or directory", path.display());
            std::io::Error::new(error.kind(), message)
        }
        _ => std::io::Error::new(error.kind(), format!("{}: {error}", path.display())),
    });
    let kind = kind?.file_type();
    if kind.is_file() {
        return Ok(File::open(path)?);
    }
    let found = if kind.is_dir() { "a directory" } else { "a device, pipe or socket" };
    Err(Refusal::file(path, "", "a regular file", found).into())
}

/// A file or folder that ships with the programs (`data/…`), wherever they are called: in the working directory, else in the
/// checkout or the installation that this program lies in; the path as it is where there is none.
#[must_use]
pub fn shipped(path: &Path) -> PathBuf {
    if path.is_absolute() || path.exists() || !path.starts_with("data") {
        return path.to_owned();
    }
    let program = std::env::current_exe().unwrap_or_default();
    // target/release/arete of a checkout, target/release/deps of its tests; bin/arete of an installation.
    let roots = ["../..", "../../..", "../share/arete"];
    let folder = program.parent().unwrap_or(Path::new(""));
    let found = roots.iter().map(|root| folder.join(root).join(path)).find(|path| path.exists());
    found.unwrap_or_else(|| path.to_owned())
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

/// As [`Read::read`], which a signal may interrupt: then it is asked again, as [`Read::read_exact`] does.
///
/// # Errors
///
/// Any other of the reader's.
pub fn read_some(reader: &mut impl Read, buffer: &mut [u8]) -> std::io::Result<usize> {
    loop {
        match reader.read(buffer) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// Largest file of settings or results that is read whole; honest ones have kilobytes, tables of words some megabytes.
pub const MAX_SMALL_BYTES: u64 = 64 << 20;

/// [`read_capped`] at [`MAX_SMALL_BYTES`].
///
/// # Errors
///
/// As [`read_capped`].
pub fn read_small(path: &Path) -> Result<Vec<u8>, Error> {
    read_capped(path, MAX_SMALL_BYTES)
}

/// The text of a regular file of at most `limit` bytes.
///
/// # Errors
///
/// As [`read_capped`], and [`Error::Refused`] if it is not UTF-8.
pub fn read_text(path: &Path, limit: u64) -> Result<String, Error> {
    String::from_utf8(read_capped(path, limit)?).map_err(|error| {
        let found = format!("an invalid byte at offset {}", error.utf8_error().valid_up_to());
        Refusal::file(path, "text", "UTF-8", found).into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_does_not_end_reading() {
        struct Interrupted(u8);
        impl Read for Interrupted {
            fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
                self.0 += 1;
                match self.0 {
                    1 | 2 => Err(std::io::ErrorKind::Interrupted.into()),
                    3 => (&b"abc"[..]).read(buffer),
                    _ => Err(std::io::ErrorKind::PermissionDenied.into()),
                }
            }
        }
        let (mut reader, mut buffer) = (Interrupted(0), [0; 8]);
        assert_eq!(read_some(&mut reader, &mut buffer).unwrap(), 3);
        assert_eq!(&buffer[..3], b"abc");
        let error = read_some(&mut reader, &mut buffer).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn only_regular_files_are_read_and_only_up_to_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs_err::write(&path, b"12345").unwrap();
        assert_eq!(read_capped(&path, 5).unwrap(), b"12345");
        assert_eq!(read_text(&path, 5).unwrap(), "12345");
        let bytes = dir.path().join("bytes");
        fs_err::write(&bytes, b"12\xff").unwrap();
        let message = read_text(&bytes, 5).unwrap_err().to_string();
        assert!(message.contains("expected UTF-8, got an invalid byte at offset 2"), "{message}");
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
