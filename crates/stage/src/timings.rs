//! Wall times, the one thing of a run that is never the same twice: `timings.jsonl`, append only.

use std::io::Write;
use std::path::Path;

use serde_json::{Map, Value};

use crate::Error;

pub use arete_records::hashes::TIMINGS as FILE;

/// Appends `{"what":…,"seconds":…,…fields}` to `timings.jsonl` in `dir`.
///
/// # Errors
///
/// [`Error::Io`] if the line cannot be appended.
pub fn log(
    dir: impl AsRef<Path>,
    what: &str,
    seconds: f64,
    fields: &[(&str, Value)],
) -> Result<(), Error> {
    let mut line = Map::new();
    line.insert("what".to_owned(), what.into());
    line.insert("seconds".to_owned(), seconds.into());
    line.extend(fields.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
    let mut text = Value::Object(line).to_string();
    text.push('\n');
    let path = dir.as_ref().join(FILE);
    let mut file = fs_err::OpenOptions::new().create(true).append(true).open(path)?;
    file.write_all(text.as_bytes())?; // one write a line: lines of two processes do not mix
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_appended() {
        let dir = tempfile::tempdir().unwrap();
        log(dir.path(), "sampling", 1.5, &[("n_tokens", 700.into())]).unwrap();
        log(dir.path(), "judging", 0.25, &[]).unwrap();
        assert_eq!(
            fs_err::read_to_string(dir.path().join(FILE)).unwrap(),
            "{\"what\":\"sampling\",\"seconds\":1.5,\"n_tokens\":700}\n\
             {\"what\":\"judging\",\"seconds\":0.25}\n"
        );
    }
}
