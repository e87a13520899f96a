//! Where a model comes from, as users name it.

use std::path::{Path, PathBuf};

use crate::Error;

/// Endings of files that Python's pickle would open.
pub(super) const PICKLE_ENDINGS: [&str; 5] = ["bin", "pt", "pth", "ckpt", "pkl"];

/// Where a model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A Hugging Face directory: `config.json`, safetensors, tokenizer.
    Directory(PathBuf),
    /// A GGUF file.
    Gguf(PathBuf),
    /// A hub repository.
    Hub {
        /// `owner/name`.
        id: String,
        /// Branch, tag or commit; `main` if absent.
        revision: Option<String>,
    },
}

impl Source {
    /// [`Source::parse`], and what lies on the hub is downloaded: then it is the directory of the snapshot, whose files can be
    /// hashed as any others, so that a branch that moves on is noticed.
    ///
    /// # Errors
    ///
    /// As [`Source::parse`]; [`Error::Hub`] if the download fails.
    pub fn fetch(given: &str) -> Result<Self, Error> {
        Ok(match Self::parse(given)? {
            Self::Hub { id, revision } => Self::Directory(download(&id, revision.as_deref())?),
            local => local,
        })
    }

    /// The directory or file of the model, unless it is on the hub.
    pub fn local_path(&self) -> Option<&Path> {
        match self {
            Self::Directory(path) | Self::Gguf(path) => Some(path),
            Self::Hub { .. } => None,
        }
    }

    /// Reads what a user gives as `--model`: a directory, a `.gguf` file, or a hub id (`owner/name`, `owner/name@revision`).
    ///
    /// # Errors
    ///
    /// [`Error::Pickle`] for a pickle file, [`Error::Source`] for anything else.
    pub fn parse(given: &str) -> Result<Self, Error> {
        let path = Path::new(given);
        let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
        if path.is_dir() {
            return Ok(Self::Directory(path.to_path_buf()));
        }
        if PICKLE_ENDINGS.contains(&ending) {
            return Err(pickle(path));
        }
        if path.is_file() {
            if ending.eq_ignore_ascii_case("gguf") {
                return Ok(Self::Gguf(path.to_path_buf()));
            }
            return Err(source_error(given, "another file (for safetensors name the directory)"));
        }
        let (id, revision) = match given.split_once('@') {
            Some((id, revision)) => (id, Some(revision.to_owned())),
            None => (given, None),
        };
        let part = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        match id.split_once('/') {
            Some((owner, name))
                if part(owner) && part(name) && !ending.eq_ignore_ascii_case("gguf") =>
            {
                Ok(Self::Hub { id: id.to_owned(), revision })
            }
            _ => Err(source_error(given, "nothing of that name")),
        }
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Directory(path) | Self::Gguf(path) => write!(formatter, "{}", path.display()),
            Self::Hub { id, revision: None } => formatter.write_str(id),
            Self::Hub { id, revision: Some(revision) } => write!(formatter, "{id}@{revision}"),
        }
    }
}

/// The directory of a hub model's snapshot, downloaded where it is not here yet.
pub(super) fn download(id: &str, revision: Option<&str>) -> Result<PathBuf, Error> {
    #[cfg(feature = "hub")]
    return crate::hub::download_model(id, revision);
    #[cfg(not(feature = "hub"))]
    Err(Error::Source {
        given: revision.map_or(id.to_owned(), |revision| format!("{id}@{revision}")),
        expected: "a local model (built without the feature `hub`)",
        found: "a hub id".to_owned(),
    })
}

fn source_error(given: &str, found: &str) -> Error {
    Error::Source {
        given: given.to_owned(),
        expected: "a Hugging Face directory, a .gguf file or a hub id (owner/name)",
        found: found.to_owned(),
    }
}

pub(super) fn pickle(path: &Path) -> Error {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.display().to_string(),
        _ => ".".to_owned(),
    };
    Error::Pickle { path: path.to_path_buf(), command: conversion_command(&directory) }
}

/// The command that turns a directory or repository of pickle files into one of safetensors.
pub(crate) fn conversion_command(from: &str) -> String {
    let name = from.trim_end_matches('/').rsplit('/').next().unwrap_or("model");
    let to = if name == "." || name.is_empty() { "model" } else { name };
    format!(
        "python -c \"import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; \
         a, b = sys.argv[1:]; M.from_pretrained(a).save_pretrained(b); T.from_pretrained(a).save_pretrained(b)\" \
         '{from}' '{to}-safetensors'"
    )
}
