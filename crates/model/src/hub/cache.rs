//! The hub's cache on this machine: blobs under the hash of their contents, snapshots that link to them.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use arete_records::files::read_some;
use arete_records::hashes::HashCache;
use fs_err::File;
use sha2::{Digest as _, Sha256};

use super::{RemoteFile, Snapshot, is_hex};
use crate::Error;

/// What the cache holds of a revision.
pub(super) fn cached_snapshot(folder: &Path, revision: &str) -> Result<Snapshot, String> {
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
pub(super) fn list(
    directory: &Path,
    prefix: &str,
    files: &mut Vec<RemoteFile>,
) -> Result<(), std::io::Error> {
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
pub(super) fn cached_blob(blobs: &Path, file: &RemoteFile) -> Result<Option<String>, Error> {
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

/// Whether a file of the cache is what its blob's name says: Git's id of its contents, or their SHA-256.
pub(super) fn is_sound(place: &Path, hashes: &mut HashCache) -> Result<bool, Error> {
    let blob = fs_err::canonicalize(place)?;
    let Some(name) = blob.file_name().and_then(|name| name.to_str()) else { return Ok(true) };
    if is_hex(name, 64) {
        return Ok(hashes.sha256_file(&blob)? == name);
    }
    if !is_hex(name, 40) {
        return Ok(true); // a cache without links names its files otherwise
    }
    let bytes = fs_err::read(&blob)?;
    let git = git_hasher(bytes.len() as u64).chain_update(&bytes);
    Ok(hex(&git.finalize()) == name)
}

/// Compares a downloaded file with what the commit says of it; returns its name in `blobs`, or what is wrong.
pub(super) fn verify(path: &Path, file: &RemoteFile) -> Result<String, String> {
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
        match read_some(&mut content, &mut buffer).map_err(reader)? {
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
pub(super) fn git_hasher(size: u64) -> sha1::Sha1 {
    sha1::Sha1::new_with_prefix(format!("blob {size}\0"))
}

/// Git's id of the pointer that stands for a large file.
///
/// # Source
///
/// Git LFS specification, `docs/spec.md`: the pointer's three lines.
pub(super) fn pointer_id(sha256: &str, size: u64) -> String {
    let text =
        format!("version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n");
    let mut git = git_hasher(text.len() as u64);
    git.update(text.as_bytes());
    hex(&git.finalize())
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Makes `directory/relative` a link to a blob, as `huggingface_hub` does. Others may be reading the file: what is
/// right already stays, and at every moment there is either the old one or the new one.
pub(super) fn link(
    directory: &Path,
    relative: &Path,
    blobs: &Path,
    blob: &str,
) -> Result<(), Error> {
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
