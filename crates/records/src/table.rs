//! Tables of records as people keep them: JSON lines, a JSON array, CSV, plain text, Parquet; text ones gzipped too.
//!
//! What each gives is what `datasets.load_dataset` gives, as JSON: an object a record, numbered from 1.

use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::jsonl::{self, NumberedObject};
use crate::{At, Error, Refusal, parquet};

/// How a file holds its records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Format {
    /// One JSON object a line, or one JSON array of objects.
    Json,
    /// A head line with the columns' names, then a record a line; `,` between cells.
    Csv,
    /// The same with tabs between cells.
    Tsv,
    /// A text a line, in a column `text`.
    Text,
    /// Apache Parquet.
    Parquet,
}

/// Endings of the names of files that hold records, and what they say of it.
const ENDINGS: [(&str, Format); 8] = [
    (".jsonl", Format::Json),
    (".ndjson", Format::Json),
    (".json", Format::Json),
    (".csv", Format::Csv),
    (".tsv", Format::Tsv),
    (".txt", Format::Text),
    (".text", Format::Text),
    (".parquet", Format::Parquet),
];

/// The endings that are read, for messages.
pub const READABLE: &str = ".jsonl, .json, .csv, .tsv, .txt (each .gz too) or .parquet";

impl Format {
    /// The format that a file's name stands for.
    #[must_use]
    pub fn of(path: &Path) -> Option<Self> {
        split_name(path).1
    }
}

/// A file's name without the endings that say how it is kept.
#[must_use]
pub fn stem(path: &Path) -> String {
    split_name(path).0
}

fn split_name(path: &Path) -> (String, Option<Format>) {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let without = |ending: &str, name: &str| {
        let n = name.len().checked_sub(ending.len()).filter(|n| name.is_char_boundary(*n))?;
        name[n..].eq_ignore_ascii_case(ending).then(|| name[..n].to_owned())
    };
    let plain = without(".gz", &name);
    for (ending, format) in ENDINGS {
        let is_packed = plain.is_some() && format != Format::Parquet;
        let name = if is_packed { plain.as_deref().unwrap_or(&name) } else { &name };
        if let Some(stem) = without(ending, name) {
            return (stem, Some(format));
        }
    }
    (name, None)
}

/// A column under another name than ours, written `ours=theirs`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Column {
    ours: String,
    theirs: String,
}

impl FromStr for Column {
    type Err = Refusal;

    fn from_str(text: &str) -> Result<Self, Refusal> {
        let names = text.split_once('=').map(|(ours, theirs)| (ours.trim(), theirs.trim()));
        match names {
            Some((ours, theirs)) if !ours.is_empty() && !theirs.is_empty() => {
                Ok(Self { ours: ours.to_owned(), theirs: theirs.to_owned() })
            }
            _ => Err(Refusal::setting("column", "ours=theirs, as prompt=question", text)),
        }
    }
}

impl TryFrom<String> for Column {
    type Error = Refusal;

    fn try_from(text: String) -> Result<Self, Refusal> {
        text.parse()
    }
}

impl From<Column> for String {
    fn from(column: Column) -> Self {
        format!("{}={}", column.ours, column.theirs)
    }
}

/// Reads the records of a file, in the format that its name says (JSON where it says none).
///
/// # Errors
///
/// [`Error::Io`] if the file cannot be read; [`Error::Json`], [`Error::Damaged`], [`Error::Parquet`] and their kin if it
/// is not what its name says, or would take far more memory than its size makes plausible.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<NumberedObject>, Error> {
    let path = path.as_ref();
    match Format::of(path) {
        Some(Format::Parquet) => Ok((1..).zip(parquet::read_json(path)?).collect()),
        Some(Format::Csv) => separated(path, ','),
        Some(Format::Tsv) => separated(path, '\t'),
        Some(Format::Text) => lines(path),
        Some(Format::Json) | None => {
            let object = |(line, value)| match value {
                Value::Object(object) => Ok((line, object)),
                other => Err(Error::Json {
                    path: path.to_owned(),
                    line,
                    expected: "an object".to_owned(),
                    got: shortened(&other),
                }),
            };
            jsonl::read_any(path)?.into_iter().map(object).collect()
        }
    }
}

/// [`read`], with columns renamed to ours.
///
/// # Errors
///
/// As [`read`]; [`Error::Refused`] if no record has a column that was named.
pub fn read_renamed(path: impl AsRef<Path>, columns: &[Column]) -> Result<Vec<NumberedObject>, Error> {
    let path = path.as_ref();
    let mut records = read(path)?;
    for Column { ours, theirs } in columns {
        if let Some((_, first)) = records.first()
            && records.iter().all(|(_, record)| !record.contains_key(theirs))
        {
            let names: Vec<&str> = first.keys().map(String::as_str).collect();
            let expected = format!("a column `{theirs}`, which `{ours}={theirs}` names");
            return Err(Refusal::file(path, "column", expected, names.join(", ")).into());
        }
    }
    for (_, record) in &mut records {
        // All are taken out before any is put back, so that two columns can change places.
        let taken: Vec<(&String, Value)> = columns
            .iter()
            .filter_map(|column| Some((&column.ours, record.remove(&column.theirs)?)))
            .collect();
        for (ours, value) in taken {
            record.insert(ours.clone(), value);
        }
    }
    Ok(records)
}

/// A text a line; blank lines are none.
fn lines(path: &Path) -> Result<Vec<NumberedObject>, Error> {
    let text = jsonl::read_text(path)?;
    let numbered = (1..).zip(text.lines());
    Ok(numbered
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(number, line)| {
            (number, Map::from_iter([("text".to_owned(), Value::String(line.to_owned()))]))
        })
        .collect())
}

/// Cells between separators, quoted as RFC 4180 says. As pandas reads it, and with it `datasets`: an empty cell is null,
/// and a column of which every other cell is a number holds numbers.
fn separated(path: &Path, separator: char) -> Result<Vec<NumberedObject>, Error> {
    let text = jsonl::read_text(path)?;
    let wrong = |line, expected: String, got: String| Error::Json {
        path: path.to_owned(),
        line,
        expected,
        got,
    };
    let mut records = cells(&text, separator)
        .map_err(|line| wrong(line, "a quote that closes".to_owned(), "none to the end".to_owned()))?
        .into_iter();
    let Some((_, names)) = records.next() else { return Ok(Vec::new()) };
    let mut rows: Vec<Vec<Value>> = Vec::new();
    for (line, record) in records {
        if record.len() != names.len() {
            let expected = format!("{} cells, as the head has names", names.len());
            return Err(wrong(line, expected, record.len().to_string()));
        }
        let cell = |cell: String| if cell.is_empty() { Value::Null } else { cell.into() };
        rows.push(record.into_iter().map(cell).collect());
    }
    for column in 0..names.len() {
        numbers(rows.iter_mut().filter_map(|row| row.get_mut(column)));
    }
    let record = |row: Vec<Value>| names.iter().cloned().zip(row).collect::<Map<_, _>>();
    Ok((1..).zip(rows.into_iter().map(record)).collect())
}

/// The cells of every record, with the number of its first line; blank lines are none.
///
/// A quote that stands first in a cell opens it, two inside are one, and what separates cells and lines is text until the
/// quote closes.
///
/// # Errors
///
/// The line of a quote that never closes.
///
/// # Source
///
/// RFC 4180, section 2; line ends of every system.
fn cells(text: &str, separator: char) -> Result<Vec<(usize, Vec<String>)>, usize> {
    let (mut records, mut record, mut cell) = (Vec::new(), Vec::new(), String::new());
    let (mut line, mut first_line) = (1, 1);
    let (mut is_quoted, mut was_quoted) = (false, false);
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        line += usize::from(c == '\n');
        match c {
            '"' if is_quoted && chars.peek() == Some(&'"') => cell.extend(chars.next()),
            '"' if is_quoted => is_quoted = false,
            c if is_quoted => cell.push(c),
            '"' if cell.is_empty() && !was_quoted => (is_quoted, was_quoted) = (true, true),
            c if c == separator => {
                record.push(std::mem::take(&mut cell));
                was_quoted = false;
            }
            '\r' if chars.peek() == Some(&'\n') => {}
            '\n' => {
                if !record.is_empty() || !cell.is_empty() || was_quoted {
                    record.push(std::mem::take(&mut cell));
                    records.push((first_line, std::mem::take(&mut record)));
                }
                (was_quoted, first_line) = (false, line);
            }
            c => cell.push(c),
        }
    }
    if is_quoted {
        return Err(first_line);
    }
    if !record.is_empty() || !cell.is_empty() || was_quoted {
        record.push(cell);
        records.push((first_line, record));
    }
    Ok(records)
}

/// Makes a column's cells numbers if all of them are.
fn numbers<'a>(cells: impl Iterator<Item = &'a mut Value>) {
    let number = |cell: &Value| match cell {
        Value::Null => Some(Value::Null),
        Value::String(text) => {
            let text = text.trim();
            let whole = text.parse::<i64>().ok().map(Value::from);
            whole.or_else(|| text.parse::<f64>().ok().filter(|x| x.is_finite()).map(Value::from))
        }
        _ => None,
    };
    let cells: Vec<&mut Value> = cells.collect();
    if let Some(found) = cells.iter().map(|cell| number(cell)).collect::<Option<Vec<Value>>>() {
        for (cell, number) in cells.into_iter().zip(found) {
            *cell = number;
        }
    }
}

/// A value for a message: at most 200 characters of it.
#[must_use]
pub fn shortened(value: &Value) -> String {
    const MOST: usize = 200;
    let mut text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    if text.chars().count() > MOST {
        text = text.chars().take(MOST).collect::<String>() + "…";
    }
    text
}

/// Refuses a row of a table.
#[must_use]
pub fn refuse(path: &Path, row: usize, field: &str, expected: &str, got: &str) -> Refusal {
    Refusal::at(path, At::Row(row), field, expected, got)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_those_of_rfc_4180() {
        let read = |text: &str| {
            let records = cells(text, ',').unwrap();
            records.into_iter().map(|(line, cells)| (line, cells.join("|"))).collect::<Vec<_>>()
        };
        let text = "a,b\r\n1,\"x, \"\"y\"\"\n z\"\n\n,\n\"\",say \"hi\"";
        let expected = [(1, "a|b"), (2, "1|x, \"y\"\n z"), (5, "|"), (6, "|say \"hi\"")];
        assert_eq!(read(text), expected.map(|(line, text)| (line, text.to_owned())));
        assert_eq!(read(""), []);
        assert_eq!(cells("a\n\"open\n", ','), Err(2));
    }

    #[test]
    fn a_name_says_how_a_file_is_kept() {
        for (name, stem, format) in [
            ("a.b.jsonl", "a.b", Some(Format::Json)),
            ("a.JSONL.gz", "a", Some(Format::Json)),
            ("a.csv.gz", "a", Some(Format::Csv)),
            ("a.parquet", "a", Some(Format::Parquet)),
            ("a.parquet.gz", "a.parquet.gz", None),
            ("a.gz", "a.gz", None),
            ("a", "a", None),
        ] {
            assert_eq!(split_name(Path::new(name)), (stem.to_owned(), format), "{name}");
        }
    }

    #[test]
    fn columns_can_change_places() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.csv");
        fs_err::write(&path, "a,b\n1,x\n").unwrap();
        let columns: Vec<Column> = ["a=b", "b=a"].map(|text| text.parse().unwrap()).into();
        let (_, record) = read_renamed(&path, &columns).unwrap().remove(0);
        assert_eq!((&record["a"], &record["b"]), (&"x".into(), &1.into()));
        assert!("a".parse::<Column>().is_err() && "=b".parse::<Column>().is_err());
        fs_err::write(&path, "a,b\n1\n").unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("x.csv:2: expected 2 cells"), "{error}");
    }
}
