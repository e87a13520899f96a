//! Items that a stage leaves out: one bad item never ends a batch of a thousand, and a batch of bad items never passes.
//!
//! What is left out is counted and named, with the reason, in [`FILE`] beside the results; more than a [`SHARE`] of all (or
//! all) stops the stage.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{Error, atomic, jsonl, redact};

/// Name of the file of items left out.
pub const FILE: &str = "left_out.jsonl";

/// The largest share of a stage's items that may be left out for their own fault.
pub const SHARE: f64 = 0.1;

/// So many may be left out in any case, if others remain: of few items, one is more than a share.
const FEW: usize = 2;

/// An item that was left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// What it is known by: a prompt's id, or a row of a file as `file:row`.
    pub item: String,
    /// Why it cannot be used.
    pub reason: String,
}

impl LeftOut {
    /// An item and the reason it is left out for.
    pub fn new(item: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        let reason = reason.to_string();
        let reason = redact::redacted(&reason);
        Self { item: item.into(), reason: redact::cut(&reason).into_owned() }
    }
}

/// Whether so many of so many may be left out.
#[must_use]
pub fn is_share(n_left_out: usize, n_items: usize) -> bool {
    let is_few = n_left_out <= FEW || is_share_of_lines(n_left_out, n_items);
    n_left_out == 0 || n_left_out < n_items && is_few
}

/// Whether so many of a file's lines may hold no record: of few lines none, for then it is another file than was meant.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "counts of lines")]
pub fn is_share_of_lines(n_left_out: usize, n_lines: usize) -> bool {
    n_left_out as f64 <= SHARE * n_lines as f64
}

/// Writes the file of items left out into a stage's output; no file where there are none.
///
/// # Errors
///
/// [`Error::Io`] if it cannot be written.
pub fn write(output: &Path, items: &[LeftOut]) -> Result<(), Error> {
    let path = output.join(FILE);
    if items.is_empty() {
        return match fs_err::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        };
    }
    let mut text = String::new();
    for item in items {
        text.push_str(&serde_json::to_string(item).expect("texts always serialise"));
        text.push('\n');
    }
    tracing::warn!(items = items.len(), file = %path.display(), "left out, with their reasons");
    atomic::write(path, text.as_bytes())
}

/// Reads the items that an earlier stage left out; none where it left none.
///
/// # Errors
///
/// [`Error::Io`] if the file cannot be read, [`Error::Json`] if it is damaged.
pub fn read(dir: &Path) -> Result<Vec<LeftOut>, Error> {
    let path = dir.join(FILE);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let item = |(line, value)| {
        serde_json::from_value(value).map_err(|error| Error::Json {
            path: path.clone(),
            line,
            expected: "an item that was left out".to_owned(),
            got: error.to_string(),
        })
    };
    jsonl::read(&path)?.into_iter().map(item).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenth_may_be_left_out() {
        assert!(is_share(0, 0) && is_share(2, 3) && is_share(100, 1000));
        assert!(is_share_of_lines(0, 0) && is_share_of_lines(1, 10) && !is_share_of_lines(1, 9));
        assert!(!is_share(1, 1) && !is_share(2, 2) && !is_share(3, 29) && !is_share(101, 1000));
    }

    #[test]
    fn items_come_back_with_their_reasons() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(dir.path()).unwrap(), []);
        let items = [LeftOut::new("a", "too long"), LeftOut::new("b", "http://u:p@h refused it")];
        write(dir.path(), &items).unwrap();
        assert_eq!(read(dir.path()).unwrap(), items);
        assert!(items[1].reason.contains("http://***@h"));
        write(dir.path(), &[]).unwrap();
        assert!(!dir.path().join(FILE).exists());
    }
}
