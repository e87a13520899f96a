//! JSON lines and JSON arrays, plain or gzipped, read with the number of every value, within a budget of memory.

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

/// Largest text that is read in one piece: a JSON array, a CSV file, a list of texts.
const MAX_TEXT_BYTES: u64 = 2 << 30;

/// Values in memory are larger than their text, most where the text is all brackets and commas. Any file may take this
/// much, and so many times its size.
const MIN_VALUE_BYTES: u64 = 512 << 20;
const MAX_VALUE_RATIO: u64 = 8;

/// What a value takes besides its text, with the room that a growing list keeps free.
pub(crate) const VALUE_BYTES: u64 = 160;

/// The memory that the values of one file may take.
pub(crate) struct Budget {
    limit: u64,
    used: u64,
}

impl Budget {
    pub(crate) fn of(n_file_bytes: u64) -> Self {
        let limit = MIN_VALUE_BYTES.saturating_add(n_file_bytes.saturating_mul(MAX_VALUE_RATIO));
        Self { limit, used: 0 }
    }

    /// Takes what the values of a text will need; an error if that is more than is left.
    fn take(&mut self, path: &Path, line: usize, text: &str) -> Result<(), Error> {
        self.take_bytes(path, line, text.len() as u64 + VALUE_BYTES * n_values(text))
    }

    /// The same of so many bytes.
    pub(crate) fn take_bytes(
        &mut self,
        path: &Path,
        line: usize,
        n_bytes: u64,
    ) -> Result<(), Error> {
        self.used = self.used.saturating_add(n_bytes);
        if self.used <= self.limit {
            return Ok(());
        }
        Err(Error::Damaged {
            path: path.to_owned(),
            what: format!("values through line {line}"),
            expected: format!("at most {} bytes of memory for a file of its size", self.limit),
            got: "more".to_owned(),
        })
    }
}

/// At most so many values a JSON text has: one, and one more behind every bracket, comma or colon outside strings.
fn n_values(text: &str) -> u64 {
    let (mut n, mut in_string, mut escaped) = (1, false, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'[' | b'{' | b',' | b':' if !in_string => n += 1,
            _ => {}
        }
    }
    n
}

/// A file opened for reading, unpacked on the way if it is gzipped.
struct Opened {
    reader: Box<dyn Read>,
    /// Size of the file as it lies there.
    n_bytes: u64,
    /// Most bytes it may unpack to; none of a plain file.
    unpacked_limit: Option<u64>,
}

/// How a gzip stream begins; no text does.
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// What other packed files begin with.
const OTHER_PACKINGS: [(&[u8], &str); 4] = [
    (b"\x28\xb5\x2f\xfd", "Zstandard"),
    (b"\xfd7zXZ\0", "xz"),
    (b"BZh", "bzip2"),
    (b"PK\x03\x04", "zip"),
];

/// Opens a file, gzipped if its name or its first bytes say so: downloads and pipes have no names to go by.
fn open(path: &Path) -> Result<Opened, Error> {
    let mut file = fs_err::File::open(path)?;
    let n_bytes = file.metadata()?.len();
    let mut head = Vec::new();
    (&mut file).take(8).read_to_end(&mut head)?;
    if let Some((_, packing)) = OTHER_PACKINGS.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Err(Error::Damaged {
            path: path.to_owned(),
            what: "text".to_owned(),
            expected: "plain or gzipped".to_owned(),
            got: format!("a file packed by {packing}: unpack it first"),
        });
    }
    let is_named = path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gz"));
    let is_gzipped = is_named || head.starts_with(&GZIP);
    let whole = std::io::Cursor::new(head).chain(file);
    if is_gzipped {
        let limit = MIN_UNPACKED_BYTES.max(n_bytes.saturating_mul(MAX_RATIO));
        let reader = Box::new(MultiGzDecoder::new(BufReader::new(whole)));
        return Ok(Opened { reader, n_bytes, unpacked_limit: Some(limit) });
    }
    Ok(Opened { reader: Box::new(whole), n_bytes, unpacked_limit: None })
}

/// Reads a whole text (gzipped or not), without a byte order mark.
///
/// # Errors
///
/// As [`read`], and if it is longer than two GiB.
pub(crate) fn read_text(path: &Path) -> Result<String, Error> {
    let Opened { reader, unpacked_limit, .. } = open(path)?;
    let limit = unpacked_limit.unwrap_or(MAX_TEXT_BYTES).min(MAX_TEXT_BYTES);
    let mut bytes = Vec::new();
    (reader.take(limit + 1).read_to_end(&mut bytes))
        .map_err(|error| read_error(path, 1, error, unpacked_limit.is_some()))?;
    if bytes.len() as u64 > limit {
        return Err(Error::Damaged {
            path: path.to_owned(),
            what: "text".to_owned(),
            expected: format!("at most {limit} bytes for a file of its size"),
            got: "more".to_owned(),
        });
    }
    if bytes.starts_with(b"\xef\xbb\xbf") {
        bytes.drain(..3);
    }
    String::from_utf8(bytes).map_err(|error| {
        let valid = error.utf8_error().valid_up_to();
        let line = 1 + error.as_bytes()[..valid].iter().filter(|byte| **byte == b'\n').count();
        Error::Json {
            path: path.to_owned(),
            line,
            expected: "UTF-8".to_owned(),
            got: format!("invalid byte at offset {valid}"),
        }
    })
}

/// A value of a file, or why its line holds none, with the number of the line (or row) from 1.
pub(crate) type Numbered = (usize, Result<Value, Unreadable>);

/// Why a line holds no value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// What would have been read.
    pub expected: String,
    /// What is there.
    pub got: String,
}

impl Unreadable {
    /// As the fault of a file.
    pub(crate) fn at(self, path: &Path, line: usize) -> Error {
        Error::Json { path: path.to_owned(), line, expected: self.expected, got: self.got }
    }
}

/// Reads JSON lines, the elements of one JSON array, or documents one after the other: whichever the file holds.
///
/// # Errors
///
/// As [`read`]; [`Error::Json`] for an array that is none.
pub fn read_any(path: &Path) -> Result<Vec<(usize, Value)>, Error> {
    all_good(path, numbered(path)?)
}

/// [`read_any`], a line that holds no value named in its place.
pub(crate) fn numbered(path: &Path) -> Result<Vec<Numbered>, Error> {
    let first = {
        let Opened { reader, unpacked_limit, .. } = open(path)?;
        let bytes = BufReader::new(reader.take(MAX_LINE_BYTES)).bytes();
        let mut first = None;
        for byte in bytes {
            let byte =
                byte.map_err(|error| read_error(path, 1, error, unpacked_limit.is_some()))?;
            if !byte.is_ascii_whitespace() && !b"\xef\xbb\xbf".contains(&byte) {
                first = Some(byte);
                break;
            }
        }
        first
    };
    if first != Some(b'[') {
        let lines = lines(path)?;
        return Ok(match lines.first() {
            Some((_, Err(_))) if first == Some(b'{') => documents(path)?.unwrap_or(lines),
            _ => lines,
        });
    }
    let n_bytes = fs_err::metadata(path)?.len();
    let text = read_text(path)?;
    Budget::of(n_bytes).take(path, 1, &text)?;
    match parse(&text) {
        Ok(Value::Array(items)) => Ok((1..).zip(items.into_iter().map(Ok)).collect()),
        Ok(_) => unreachable!("it begins with a bracket"),
        Err(error) => Err(Error::Json {
            path: path.to_owned(),
            line: error.line(),
            expected: "one JSON array, or one JSON value a line".to_owned(),
            got: error.to_string(),
        }),
    }
}

/// The documents of a file, one after the other however their lines are broken, numbered from 1; none if it is not made of such.
fn documents(path: &Path) -> Result<Option<Vec<Numbered>>, Error> {
    let n_bytes = fs_err::metadata(path)?.len();
    let Ok(text) = read_text(path) else { return Ok(None) }; // what lines say of it stands
    Budget::of(n_bytes).take(path, 1, &text)?;
    let text = without_non_numbers(&text).unwrap_or(text);
    let values: Result<Vec<Value>, _> =
        serde_json::Deserializer::from_str(&text).into_iter().collect();
    Ok(values.ok().map(|values| (1..).zip(values.into_iter().map(Ok)).collect()))
}

/// Reads JSON lines (gzipped or not): each value with its line number from 1.
/// Blank lines are skipped.
///
/// # Errors
///
/// [`Error::Io`] if the file cannot be read, [`Error::Damaged`] if its gzip stream is cut or
/// broken, it unpacks to far more than text would, a line is too long, or its values would take far more memory than its
/// size makes plausible, [`Error::Json`] on a line that is not UTF-8 or not JSON.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<(usize, Value)>, Error> {
    let path = path.as_ref();
    all_good(path, lines(path)?)
}

/// The values, if every line holds one.
fn all_good(path: &Path, numbered: Vec<Numbered>) -> Result<Vec<(usize, Value)>, Error> {
    let value = |(line, value): Numbered| match value {
        Ok(value) => Ok((line, value)),
        Err(unreadable) => Err(unreadable.at(path, line)),
    };
    numbered.into_iter().map(value).collect()
}

/// [`read`], lines that hold no value named in their place.
fn lines(path: &Path) -> Result<Vec<Numbered>, Error> {
    let Opened { reader, n_bytes, unpacked_limit } = open(path)?;
    let gzipped = unpacked_limit.is_some();
    let mut budget = Budget::of(n_bytes);
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
        match std::str::from_utf8(&line) {
            Ok(text) if text.trim().is_empty() => {}
            Ok(text) => {
                budget.take(path, line_number, text)?;
                values.push((line_number, value_of(text, line_number)));
            }
            Err(error) => {
                let got = format!("invalid byte at offset {} of the line", error.valid_up_to());
                values.push((line_number, Err(Unreadable { expected: "UTF-8".to_owned(), got })));
            }
        }
    }
    Ok(values)
}

/// The value of a line.
fn value_of(text: &str, line_number: usize) -> Result<Value, Unreadable> {
    parse(text).map_err(|error| {
        let is_document = line_number == 1 && error.is_eof() && text.starts_with(['[', '{']);
        let expected = if is_document { "one JSON value a line" } else { "one JSON value" };
        Unreadable { expected: expected.to_owned(), got: error.to_string() }
    })
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

    /// `datasets` goes by the first bytes as well: a download, or what comes through a pipe, has any name.
    #[test]
    fn packed_files_are_told_by_their_first_bytes() {
        let text = b"{\"a\": 1}\n";
        for name in ["a.jsonl", "stdin", "a.JSONL.GZ"] {
            let (_dir, path) = file(name, &gzip(text));
            assert_eq!(read_any(&path).unwrap(), vec![(1, json!({"a": 1}))], "{name}");
            assert_eq!(read_text(&path).unwrap().as_bytes(), text, "{name}");
        }
        let bomb = gzip(&vec![b' '; 80 << 20]);
        let (_dir, path) = file("small.csv", &bomb);
        assert!(read_text(&path).unwrap_err().to_string().contains("at most"));
        for (head, packing) in [
            (&b"\x28\xb5\x2f\xfd\x04\x58"[..], "Zstandard"),
            (b"\xfd7zXZ\0\0\x04", "xz"),
            (b"BZh91AY&SY", "bzip2"),
            (b"PK\x03\x04\x14\0", "zip"),
        ] {
            let (_dir, path) = file("a.jsonl", head);
            let error = read_any(&path).unwrap_err().to_string();
            assert!(error.contains(packing) && error.contains("unpack it first"), "{error}");
        }
        let (_dir, path) = file("a.jsonl.gz", text);
        assert!(read(&path).unwrap_err().to_string().contains("a complete gzip file"));
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
    fn an_array_is_its_elements() {
        let text = b" \n[\n {\"prompt\": \"q\", \"score\": NaN},\n {\"prompt\": \"r\"}\n]\n";
        let expected =
            vec![(1, json!({"prompt": "q", "score": null})), (2, json!({"prompt": "r"}))];
        let (_dir, path) = file("array.json", text);
        assert_eq!(read_any(&path).unwrap(), expected);
        let (_dir, path) = file("array.json.gz", &gzip(text));
        assert_eq!(read_any(&path).unwrap(), expected);
        let (_dir, path) = file("lines.json", b"{\"a\": 1}\n{\"a\": 2}\n");
        assert_eq!(read_any(&path).unwrap().len(), 2);
        // What `load_dataset("json")` reads as well.
        for between in ["", "\n", " \n\n"] {
            let documents = format!("{{\n \"a\": 1\n}}{between}{{\"a\":\n NaN}}\n");
            let (_dir, path) = file("documents.json", documents.as_bytes());
            let expected = vec![(1, json!({"a": 1})), (2, json!({"a": null}))];
            assert_eq!(read_any(&path).unwrap(), expected, "{documents}");
        }
        let (_dir, path) = file("cut.json", b"{\n \"a\": 1\n}\n{\n");
        let error = read_any(&path).unwrap_err().to_string();
        assert!(error.contains("cut.json:1: expected one JSON value a line"), "{error}");
        let (_dir, path) = file("cut.json", b"[\n {\"prompt\": \"q\"},\n");
        let error = read_any(&path).unwrap_err().to_string();
        assert!(error.contains("cut.json:3: expected one JSON array"), "{error}");
    }

    /// One MB that unpacks to lists of 128 million numbers would take 4 GB.
    #[test]
    fn lists_that_would_fill_the_memory_are_refused_before_they_do() {
        let line = format!("[{}0]\n", "0,".repeat(8 << 20));
        for name in ["amplify.jsonl.gz", "amplify.json.gz"] {
            let (_dir, path) = file(name, &gzip(line.as_bytes()));
            let error = if name.contains("jsonl") { read(&path) } else { read_any(&path) };
            let error = error.unwrap_err().to_string();
            assert!(error.contains("bytes of memory for a file of its size"), "{error}");
        }
        // Text as people write it takes what it is.
        let row = format!("{{\"prompt\": \"{}\"}}\n", "a, b: [c] ".repeat(1 << 10));
        let (_dir, path) = file("text.jsonl", row.repeat(1 << 10).as_bytes());
        assert_eq!(read(&path).unwrap().len(), 1 << 10);
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
