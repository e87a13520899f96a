//! Setting results aside: what another run left is moved to `OUTPUT.old-N`, never removed.

use std::path::Path;

use arete_records::atomic;
use arete_records::hashes::{RUN_JSON, STAGE_JSON};

use super::origin::Origin;
use super::{is_stage_dir, write_stage_json};
use crate::Error;

/// Moves what an earlier run of the stage left to `OUTPUT.old-N`, so that nothing is lost: every file but the foreign ones,
/// logs, and what is hidden. Links are left alone and not followed: no stage makes any. A kill half-way is noticed by
/// the mark in `stage.json`, and the rest goes to the same place.
pub(super) fn set_aside(
    output: &Path,
    origin: &Origin,
    foreign: &[String],
    aside: Option<String>,
) -> Result<(), Error> {
    for file in foreign {
        tracing::warn!(file, "left alone: not made by this stage");
    }
    let mut files = Vec::new();
    own_files(output, "", &mut files)?;
    files.retain(|file| !foreign.contains(file) && file != STAGE_JSON);
    let aside = match aside {
        Some(aside) => aside,
        None => first_free(output)?,
    };
    write_stage_json(output, origin, foreign, Some(&aside))?;
    let place = atomic::parent(&fs_err::canonicalize(output)?).join(&aside);
    // First of all the mark of a complete stage; what is aside is complete, too, once all of it is there.
    files.sort_by_key(|file| file != RUN_JSON);
    for file in &files {
        let target = place.join(file);
        fs_err::create_dir_all(atomic::parent(&target))?;
        fs_err::rename(output.join(file), target)?;
    }
    if !files.is_empty() {
        tracing::info!(place = %place.display(), "what was there was set aside");
    }
    remove_empty_dirs(output, &place)
}

/// Copies a finished run's files to `OUTPUT.old-N`: results that work goes on from are kept as they were. Its mark comes last.
pub(super) fn copy_aside<'a>(
    output: &Path,
    files: impl Iterator<Item = &'a String>,
) -> Result<(), Error> {
    let place = atomic::parent(&fs_err::canonicalize(output)?).join(first_free(output)?);
    for file in files.map(String::as_str).chain([RUN_JSON]) {
        let target = place.join(file);
        fs_err::create_dir_all(atomic::parent(&target))?;
        fs_err::copy(output.join(file), target)?;
    }
    tracing::info!(place = %place.display(), "what was there was copied");
    Ok(())
}

/// The first `NAME.old-N` beside a directory that is not taken.
fn first_free(output: &Path) -> Result<String, Error> {
    let output = fs_err::canonicalize(output)?;
    let name = output.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let free = (1u32..).map(|n| format!("{name}.old-{n}"));
    let mut free = free.filter(|name| !atomic::parent(&output).join(name).exists());
    Ok(free.next().expect("there are more numbers than directories"))
}

/// Regular files under `dir` that a stage may have made, relative to it; hidden files, logs and nested stages are not among them.
fn own_files(dir: &Path, prefix: &str, files: &mut Vec<String>) -> Result<(), Error> {
    for entry in fs_err::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let (relative, kind) = (format!("{prefix}{name}"), entry.file_type()?);
        if kind.is_symlink() {
            tracing::warn!(link = relative, "left alone: a link, which no stage makes");
        } else if kind.is_dir() {
            if !name.starts_with('.') && !is_stage_dir(&entry.path()) {
                own_files(&entry.path(), &format!("{relative}/"), files)?;
            }
        } else if !name.starts_with('.') && !name.ends_with(".log") {
            files.push(relative);
        }
    }
    Ok(())
}

/// Removes the directories whose files have all been moved to `place`; others that are empty were so before.
fn remove_empty_dirs(dir: &Path, place: &Path) -> Result<(), Error> {
    for entry in fs_err::read_dir(dir)? {
        let entry = entry?;
        let (path, moved) = (entry.path(), place.join(entry.file_name()));
        if entry.file_type()?.is_dir() && moved.is_dir() && !is_stage_dir(&path) {
            remove_empty_dirs(&path, &moved)?;
            if fs_err::read_dir(&path)?.next().is_none() {
                fs_err::remove_dir(&path)?;
            }
        }
    }
    Ok(())
}
