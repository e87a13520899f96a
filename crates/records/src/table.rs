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
        Some(Format::Csv) => separated(path, b','),
        Some(Format::Tsv) => separated(path, b'\t'),
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
fn separated(path: &Path, separator: u8) -> Result<Vec<NumberedObject>, Error> {
    let text = jsonl::read_text(path)?;
    let mut reader = csv::ReaderBuilder::new().delimiter(separator).from_reader(text.as_bytes());
    let wrong = |error: csv::Error| {
        let line = error.position().map_or(1, |position| usize::try_from(position.line()).unwrap_or(1));
        Error::Json {
            path: path.to_owned(),
            line,
            expected: "as many cells as the head has names".to_owned(),
            got: error.to_string(),
        }
    };
    let names: Vec<String> = reader.headers().map_err(wrong)?.iter().map(str::to_owned).collect();
    let mut rows: Vec<Vec<Value>> = Vec::new();
    for record in reader.records() {
        let record = record.map_err(wrong)?;
        let cell = |cell: &str| if cell.is_empty() { Value::Null } else { cell.into() };
        rows.push(record.iter().map(cell).collect());
    }
    for column in 0..names.len() {
        numbers(rows.iter_mut().filter_map(|row| row.get_mut(column)));
    }
    let record = |row: Vec<Value>| names.iter().cloned().zip(row).collect::<Map<_, _>>();
    Ok((1..).zip(rows.into_iter().map(record)).collect())
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
