//! JSON lines, plain or gzipped, read with the line number of every value.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use flate2::read::MultiGzDecoder;
use serde_json::{Map, Value};

use crate::Error;

/// An object of a file with the number of its line (or row) from 1.
pub type NumberedObject = (usize, Map<String, Value>);

/// Longest line that is read, in bytes: prompts of a megabyte pass, bombs do not.
const MAX_LINE_BYTES: u64 = 64 << 20;

/// A gzipped file may unpack to this many bytes whatever its size, and to so many times its size: text packs to a
/// tenth, a bomb to a thousandth.
const MIN_UNPACKED_BYTES: u64 = 64 << 20;
const MAX_RATIO: u64 = 256;

/// Reads JSON lines (gzipped if the name ends in `.gz`): each value with its line number from 1.
/// Blank lines are skipped.
///
/// # Errors
///
/// [`Error::Io`] if the file cannot be read, [`Error::Damaged`] if its gzip stream is cut or
/// broken, it unpacks to far more than text would, or a line is too long, [`Error::Json`] on a line that is not UTF-8 or not JSON.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<(usize, Value)>, Error> {
    let path = path.as_ref();
    let file = fs_err::File::open(path)?;
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gz")) {
        let n_packed = file.metadata()?.len();
        let limit = MIN_UNPACKED_BYTES.max(n_packed.saturating_mul(MAX_RATIO));
        read_lines(path, MultiGzDecoder::new(BufReader::new(file)), Some(limit))
    } else {
        read_lines(path, file, None)
    }
}

/// `unpacked_limit`: most bytes of a gzipped file.
fn read_lines(
    path: &Path,
    reader: impl Read,
    unpacked_limit: Option<u64>,
) -> Result<Vec<(usize, Value)>, Error> {
    let gzipped = unpacked_limit.is_some();
    let mut reader = BufReader::with_capacity(1 << 16, reader);
    let mut n_unpacked = 0;
    let mut values = Vec::new();
    let mut line = Vec::new();
    for line_number in 1.. {
        line.clear();
        let n_bytes = (&mut reader)
            .take(MAX_LINE_BYTES + 1)
            .read_until(b'\n', &mut line)
            .map_err(|error| read_error(path, line_number, error, gzipped))?;
        if n_bytes == 0 {
            break;
        }
        n_unpacked += n_bytes as u64;
        if let Some(limit) = unpacked_limit.filter(|limit| n_unpacked > *limit) {
            return Err(Error::Damaged {
                path: path.to_owned(),
                what: "gzip stream".to_owned(),
                expected: format!("at most {limit} bytes unpacked for a file of its size"),
                got: format!("more, at line {line_number}; unpack it if that is right"),
            });
        }
        if n_bytes as u64 > MAX_LINE_BYTES {
            return Err(Error::Damaged {
                path: path.to_owned(),
                what: format!("line {line_number}"),
                expected: format!("at most {MAX_LINE_BYTES} bytes"),
                got: "more".to_owned(),
            });
        }
        if line_number == 1 && line.starts_with(b"\xef\xbb\xbf") {
            line.drain(..3); // byte order mark
        }
        let text = std::str::from_utf8(&line).map_err(|error| Error::Json {
            path: path.to_owned(),
            line: line_number,
            expected: "UTF-8".to_owned(),
            got: format!("invalid byte at offset {} of the line", error.valid_up_to()),
        })?;
        if text.trim().is_empty() {
            continue;
        }
        let value = parse(text).map_err(|error| {
            let is_document = line_number == 1 && error.is_eof() && text.starts_with(['[', '{']);
            let expected = if is_document {
                "one JSON value a line, not one document over many lines"
            } else {
                "one JSON value"
            };
            Error::Json {
                path: path.to_owned(),
                line: line_number,
                expected: expected.to_owned(),
                got: error.to_string(),
            }
        })?;
        values.push((line_number, value));
    }
    Ok(values)
}

/// Parses a line. What Python writes for numbers that JSON has no word for (`NaN`, `Infinity`) is null.
fn parse(text: &str) -> Result<Value, serde_json::Error> {
    serde_json::from_str(text).or_else(|error| match without_non_numbers(text) {
        Some(text) => serde_json::from_str(&text),
        None => Err(error),
    })
}

/// The text with `NaN`, `Infinity` and `-Infinity` outside strings as `null`; `None` without any.
fn without_non_numbers(text: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len());
    let (mut rest, mut in_string, mut found) = (text, false, false);
    while let Some(c) = rest.chars().next() {
        let word = ["NaN", "-Infinity", "Infinity"].into_iter().find(|word| rest.starts_with(word));
        let n_bytes = match word {
            Some(word) if !in_string => {
                out.push_str("null");
                found = true;
                rest = &rest[word.len()..];
                continue;
            }
            _ if in_string && c == '\\' => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            _ => c.len_utf8(),
        };
        in_string ^= c == '"';
        out.push_str(&rest[..n_bytes]);
        rest = &rest[n_bytes..];
    }
    found.then_some(out)
}

/// A broken gzip stream is the file's fault (bad data), everything else the system's.
fn read_error(path: &Path, line: usize, error: std::io::Error, gzipped: bool) -> Error {
    use std::io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
    if gzipped && matches!(error.kind(), InvalidData | InvalidInput | UnexpectedEof) {
        Error::Damaged {
            path: path.to_owned(),
            what: format!("gzip stream at line {line}"),
            expected: "a complete gzip file".to_owned(),
            got: error.to_string(),
        }
    } else {
        Error::Io(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use serde_json::json;
    use std::io::Write;
    use std::path::PathBuf;

    fn file(name: &str, bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        fs_err::write(&path, bytes).unwrap();
        (dir, path)
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn values_carry_their_line_numbers() {
        let text = b"\xef\xbb\xbf{\"a\": 1}\r\n\n  \n[2]\n\"no line end\"";
        let expected = vec![(1, json!({"a": 1})), (4, json!([2])), (5, json!("no line end"))];
        let (_dir, path) = file("plain.jsonl", text);
        assert_eq!(read(&path).unwrap(), expected);
        let (_dir, path) = file("packed.jsonl.gz", &gzip(text));
        assert_eq!(read(&path).unwrap(), expected);
    }

    #[test]
    fn concatenated_gzip_members_are_one_file() {
        let packed = [gzip(b"1\n"), gzip(b"2\n")].concat();
        let (_dir, path) = file("two.jsonl.gz", &packed);
        assert_eq!(read(&path).unwrap(), vec![(1, json!(1)), (2, json!(2))]);
    }

    #[test]
    fn an_empty_file_has_no_values() {
        let (_dir, path) = file("empty.jsonl", b"");
        assert_eq!(read(&path).unwrap(), vec![]);
    }

    #[test]
    fn broken_json_names_file_and_line() {
        let (_dir, path) = file("broken.jsonl", b"{}\n{\"a\": }\n");
        let error = read(&path).unwrap_err();
        assert!(matches!(error, Error::Json { line: 2, .. }), "{error}");
        assert!(error.to_string().contains("broken.jsonl:2: expected one JSON value"), "{error}");
    }

    #[test]
    fn what_python_writes_for_no_number_is_null() {
        let line = r#"{"prompt": "NaN \" Infinity", "score": NaN, "low": -Infinity, "all": [Infinity, 1]}"#;
        let (_dir, path) = file("nan.jsonl", line.as_bytes());
        let value =
            json!({"prompt": "NaN \" Infinity", "score": null, "low": null, "all": [null, 1]});
        assert_eq!(read(&path).unwrap(), vec![(1, value)]);
        let (_dir, path) = file("word.jsonl", b"{\"a\": Nan}");
        assert!(read(&path).is_err());
    }

    #[test]
    fn a_document_over_many_lines_is_told_from_json_lines() {
        for text in ["[\n {\"prompt\": \"q\"}\n]\n", "{\n \"prompt\": \"q\"\n}\n"] {
            let (_dir, path) = file("array.json", text.as_bytes());
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains("array.json:1: expected one JSON value a line"), "{error}");
        }
    }

    #[test]
    fn invalid_utf8_names_file_and_line() {
        let (_dir, path) = file("latin1.jsonl", b"{}\n\"caf\xe9\"\n");
        let error = read(&path).unwrap_err().to_string();
        let expected = "latin1.jsonl:2: expected UTF-8, got invalid byte at offset 4 of the line";
        assert!(error.ends_with(expected), "{error}");
    }

    #[test]
    fn a_cut_or_damaged_gzip_file_is_bad_data_at_every_length() {
        let packed = gzip(b"{\"prompt\": \"May I?\"}\n{\"prompt\": \"Should I?\"}\n");
        for length in 0..packed.len() {
            let (_dir, path) = file("cut.jsonl.gz", &packed[..length]);
            match read(&path) {
                Err(Error::Damaged { .. }) => {}
                other => panic!("cut at {length}: {other:?}"),
            }
        }
        let (_dir, path) = file("text.jsonl.gz", b"{}\n");
        assert!(matches!(read(&path), Err(Error::Damaged { .. })));
    }

    #[test]
    fn a_bomb_is_not_unpacked_to_its_end() {
        let mut blank = vec![b' '; 1 << 20];
        blank.push(b'\n');
        let packed = gzip(&blank.repeat(66));
        let (_dir, path) = file("bomb.jsonl.gz", &packed);
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("at most 67108864 bytes unpacked"), "{error}");
        let (_dir, path) = file("blank.jsonl.gz", &gzip(&blank.repeat(60)));
        assert_eq!(read(&path).unwrap(), vec![]);
    }

    #[test]
    fn deep_nesting_is_refused_not_followed() {
        let (_dir, path) = file("deep.jsonl", "[".repeat(1 << 20).as_bytes());
        assert!(matches!(read(&path), Err(Error::Json { line: 1, .. })));
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = read("no/such/file.jsonl").unwrap_err();
        assert!(error.is_io() && error.to_string().contains("no/such/file.jsonl"), "{error}");
    }
}
