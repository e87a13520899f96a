//! Seals of work in progress: the hash of a finished file in a hidden file beside it, until `run.json` holds it. What does
//! not fit its seal is made anew, or refused by name where it cannot be.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use arete_records::hashes::sha256_file;
use arete_records::left_out::LeftOut;
use arete_records::{atomic, files};
use serde::{Deserialize, Serialize};

use crate::Error;

/// What the names of seals end with; they begin with a dot.
pub(crate) const ENDING: &str = ".seal";

/// What vouches for a file.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Seal {
    /// SHA-256 of the file.
    sha256: String,
    /// Items of a unit of work that are not among its rows, with the reasons.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) left_out: Vec<LeftOut>,
}

impl Seal {
    pub(crate) fn path(file: &Path) -> PathBuf {
        let name = file.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        file.with_file_name(format!(".{name}{ENDING}"))
    }

    pub(crate) fn write(file: &Path, left_out: &[LeftOut]) -> Result<(), Error> {
        let seal = Self { sha256: sha256_file(file)?, left_out: left_out.to_vec() };
        let json = serde_json::to_vec(&seal).expect("plain data always serialises");
        Ok(atomic::write(Self::path(file), &json)?)
    }

    /// The seal of a file that is there and whole. What the system refuses to read is not damaged: an error.
    pub(crate) fn of(file: &Path) -> Result<Option<Self>, Error> {
        let Some(bytes) = if_any(files::read_small(&Self::path(file)))? else { return Ok(None) };
        let Ok(seal) = serde_json::from_slice::<Self>(&bytes) else { return Ok(None) };
        let Some(sha256) = if_any(sha256_file(file))? else { return Ok(None) };
        Ok((sha256 == seal.sha256).then_some(seal))
    }

    /// [`Seal::of`], with a warning where the file is there and not whole.
    pub(crate) fn of_own(file: &Path) -> Result<Option<Self>, Error> {
        let seal = Self::of(file)?;
        if seal.is_none() && file.exists() {
            tracing::warn!(file = %file.display(), "damaged, or its hash was not written: it is made anew");
        }
        Ok(seal)
    }
}

/// None for what is not there, or is no file.
fn if_any<T>(read: Result<T, arete_records::Error>) -> Result<Option<T>, Error> {
    match read {
        Ok(found) => Ok(Some(found)),
        Err(arete_records::Error::Io(error)) if error.kind() != ErrorKind::NotFound => {
            Err(Error::Io(error))
        }
        Err(_) => Ok(None),
    }
}

/// Seals a file that a stage at work will not change any more.
///
/// # Errors
///
/// [`Error::Io`] if it cannot be read, or the seal not written.
pub fn write(file: &Path) -> Result<(), Error> {
    Seal::write(file, &[])
}

/// Checks every sealed file of a directory; one without a seal was not finished.
///
/// # Errors
///
/// [`Error::Records`] naming a file that is not as it was sealed.
pub fn check_all(dir: &Path) -> Result<(), Error> {
    if !dir.is_dir() {
        return Ok(());
    }
    for entry in fs_err::read_dir(dir)? {
        let path = entry?.path();
        if path.is_file() && Seal::path(&path).is_file() && Seal::of(&path)?.is_none() {
            let what = "SHA-256 of a file of an unfinished run".to_owned();
            let expected = "the one it was written with".to_owned();
            let got = "another: damaged; remove the directory of the run to start anew".to_owned();
            return Err(arete_records::Error::Damaged { path, what, expected, got }.into());
        }
    }
    Ok(())
}

/// Removes the seals in a directory and those below that `skip` does not name: `run.json` vouches from now on.
pub(crate) fn remove_all(dir: &Path, skip: &dyn Fn(&Path) -> bool) -> Result<(), Error> {
    for entry in fs_err::read_dir(dir)? {
        let entry = entry?;
        let (path, kind) = (entry.path(), entry.file_type()?);
        let name = entry.file_name().to_string_lossy().into_owned();
        if kind.is_dir() && !name.starts_with('.') && !skip(&path) {
            remove_all(&path, skip)?;
        } else if kind.is_file() && name.starts_with('.') && name.ends_with(ENDING) {
            fs_err::remove_file(path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flipped_bit_breaks_the_seal() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("rows.parquet");
        fs_err::write(&file, "rows").unwrap();
        check_all(dir.path()).unwrap();
        write(&file).unwrap();
        check_all(dir.path()).unwrap();
        for at in 0..32 {
            let mut bytes = b"rows".to_vec();
            bytes[at / 8] ^= 1 << (at % 8);
            fs_err::write(&file, bytes).unwrap();
            let error = check_all(dir.path()).unwrap_err().to_string();
            assert!(error.contains("rows.parquet") && error.contains("damaged"), "{error}");
        }
        // What cannot be read is not called damaged: a folder in the place of the file stands for a disk that fails.
        fs_err::remove_file(&file).unwrap();
        assert!(Seal::of(&file).unwrap().is_none(), "gone");
        fs_err::create_dir(&file).unwrap();
        assert!(matches!(Seal::of(&file), Err(Error::Io(_))));
        fs_err::remove_dir(&file).unwrap();
        fs_err::write(&file, "rows").unwrap();
        remove_all(dir.path(), &|_| false).unwrap();
        check_all(dir.path()).unwrap();
        assert!(!Seal::path(&file).exists());
    }
}
