//! JSON files of models: objects that Python may have written.
//!
//! Python's `json` writes numbers that are not finite as `NaN`, `Infinity` and `-Infinity`, which JSON does not have. They
//! are read as the texts `"NaN"`, …: a key that nobody asks for does no harm, and one that should be a number is refused by
//! name.

use std::path::Path;

use arete_records::files;
use serde_json::{Map, Value};

use crate::Error;

/// The words of Python's `json` that are not JSON.
const WORDS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// Reads a small JSON file that holds an object.
///
/// # Errors
///
/// [`Error::Field`] if it is no such file, [`Error::Records`] if it is no regular one of at most `max_bytes`.
pub fn read_object(path: &Path, max_bytes: u64) -> Result<Map<String, Value>, Error> {
    let bytes = files::read_capped(path, max_bytes)?;
    let parsed = serde_json::from_slice(&bytes).or_else(|error| {
        with_words_quoted(&bytes).map_or(Err(error), |text| serde_json::from_slice(&text))
    });
    match parsed {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::field(path, "content", "a JSON object", "another JSON value")),
        Err(error) => {
            let found = stand_in(&bytes).map_or_else(|| error.to_string(), str::to_owned);
            Err(Error::field(path, "content", "JSON", found))
        }
    }
}

/// What lies in place of a file that was not downloaded, by its first bytes; none if it is no such.
pub(crate) fn stand_in(bytes: &[u8]) -> Option<&'static str> {
    let begin = bytes.trim_ascii_start();
    let begins = |text: &str| {
        begin.get(..text.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(text.as_bytes()))
    };
    if begins("version https://git-lfs") {
        return Some(
            "a pointer of git-lfs in place of the file: run `git lfs pull`, or download it anew",
        );
    }
    let is_page = ["<!doctype", "<html", "<head", "<?xml", "<!--"].into_iter().any(begins);
    is_page
        .then_some("a web page in place of the file: download it anew, signed in if that is needed")
}

/// Whether a value stands for a number that is not finite.
pub(crate) fn is_word(value: &Value) -> bool {
    value.as_str().is_some_and(|text| WORDS.contains(&text))
}

/// The same JSON with Python's words in quotes; none if there are none.
fn with_words_quoted(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(bytes.len() + 16);
    let (mut at, mut in_text, mut found) = (0, false, false);
    while at < bytes.len() {
        let rest = &bytes[at..];
        let word = WORDS.iter().find(|word| !in_text && rest.starts_with(word.as_bytes()));
        if let Some(word) = word {
            out.extend([b"\"", word.as_bytes(), b"\""].concat());
            at += word.len();
            found = true;
            continue;
        }
        match rest[0] {
            b'"' => in_text = !in_text,
            b'\\' if in_text && rest.len() > 1 => {
                out.push(b'\\');
                at += 1;
            }
            _ => {}
        }
        out.push(bytes[at]);
        at += 1;
    }
    found.then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Map<String, Value>, Error> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs_err::write(file.path(), text).unwrap();
        read_object(file.path(), 1000)
    }

    #[test]
    fn what_was_not_downloaded_is_named() {
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
        for (text, named) in [
            (pointer, Some("git lfs pull")),
            ("<!DOCTYPE html><html>", Some("web page")),
            ("\n<html><head>", Some("web page")),
            ("version", None),
            ("<|im_end|>", None),
            ("", None),
        ] {
            assert_eq!(stand_in(text.as_bytes()).is_some(), named.is_some(), "{text}");
            let message = read(text).unwrap_err().to_string();
            assert!(named.is_none_or(|named| message.contains(named)), "{message}");
        }
    }

    #[test]
    fn pythons_words_are_texts_and_texts_stay() {
        let map =
            read(r#"{"a": NaN, "b": [-Infinity, 1], "c": "NaN \" NaN", "Infinity": Infinity}"#)
                .unwrap();
        let expected = serde_json::json!({"a": "NaN", "b": ["-Infinity", 1], "c": "NaN \" NaN", "Infinity": "Infinity"});
        assert_eq!(Value::Object(map.clone()), expected);
        assert!(is_word(&map["a"]) && !is_word(&map["c"]));
        for wrong in ["{\"a\": nan}", "{\"a\": NaNs}", "NaN", "{\"a\": \"", "{\"a\": \"\\"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
