//! Tables of records as people keep them: JSON lines, a JSON array, CSV, plain text, Parquet; text ones gzipped too.
//!
//! What each gives is what `datasets.load_dataset` gives, as JSON: an object a record, numbered from 1.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use crate::jsonl::Unreadable;
use crate::jsonl::{self, Budget, NumberedObject, VALUE_BYTES};
use crate::{At, Error, Refusal, left_out, parquet};

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

impl Column {
    /// Refuses names of columns where there is no file of the user's whose columns they could name.
    ///
    /// # Errors
    ///
    /// [`Refusal`] of the setting `column`.
    pub fn check_used(columns: Option<&[Self]>, file: Option<&Path>) -> Result<(), Refusal> {
        match (columns.unwrap_or_default().first(), file) {
            (Some(Self { ours, theirs }), None) => {
                let expected = "none without --pairs, the file whose columns it names";
                Err(Refusal::setting("column", expected, format!("{ours}={theirs}")))
            }
            _ => Ok(()),
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

/// The records of a file, and the lines that hold none.
#[derive(Debug, Default)]
pub struct Table {
    /// Its records, with their rows or lines from 1.
    pub records: Vec<NumberedObject>,
    /// Lines that hold no record, and why; of a damaged file, or of one bad line among a thousand.
    pub unreadable: Vec<(usize, Unreadable)>,
}

impl Table {
    /// Records and lines that hold none.
    #[must_use]
    pub fn n_rows(&self) -> usize {
        self.records.len() + self.unreadable.len()
    }
}

/// Reads the records of a file, in the format that its name says. Where it says none, as that of a pipe's contents, it is Parquet
/// if it begins like it, else JSON.
///
/// # Errors
///
/// [`Error::Io`] if the file cannot be read; [`Error::Json`], [`Error::Damaged`], [`Error::Parquet`] and their kin if it
/// is not what its name says, or would take far more memory than its size makes plausible.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<NumberedObject>, Error> {
    let path = path.as_ref();
    let Table { records, unreadable } = read_usable(path)?;
    match unreadable.into_iter().next() {
        Some((line, unreadable)) => Err(unreadable.at(path, line)),
        None => Ok(records),
    }
}

/// [`read`], lines that hold no record beside those that do.
fn read_usable(path: &Path) -> Result<Table, Error> {
    if path.is_dir() {
        return Err(Refusal::file(path, "", format!("a file: {READABLE}"), "a directory").into());
    }
    let format = match Format::of(path) {
        None if parquet::begins_like_it(path)? => Some(Format::Parquet),
        format => format,
    };
    match format {
        Some(Format::Parquet) => Ok(Table {
            records: (1..).zip(parquet::read_json(path)?).collect(),
            unreadable: Vec::new(),
        }),
        Some(Format::Csv) => separated(path, ','),
        Some(Format::Tsv) => separated(path, '\t'),
        Some(Format::Text) => Ok(Table { records: lines(path)?, unreadable: Vec::new() }),
        Some(Format::Json) | None => {
            let mut table = Table::default();
            for (line, value) in jsonl::numbered(path)? {
                match value {
                    Ok(Value::Object(object)) => table.records.push((line, object)),
                    Ok(other) => {
                        let (expected, got) = ("an object".to_owned(), shortened(&other));
                        table.unreadable.push((line, Unreadable { expected, got }));
                    }
                    Err(unreadable) => table.unreadable.push((line, unreadable)),
                }
            }
            Ok(table)
        }
    }
}

/// Reads a file of the user's, with columns renamed to ours; lines that hold no record are named beside those that do.
///
/// # Errors
///
/// As [`read`], but for a [share](left_out::is_share_of_lines) of such lines; [`Error::Refused`] if no record has a column that was named.
pub fn read_renamed(path: impl AsRef<Path>, columns: &[Column]) -> Result<Table, Error> {
    let path = path.as_ref();
    let mut table = read_usable(path)?;
    if !left_out::is_share_of_lines(table.unreadable.len(), table.n_rows()) {
        let (line, unreadable) = table.unreadable.swap_remove(0);
        return Err(unreadable.at(path, line));
    }
    let records = &mut table.records;
    let mut renamed: Vec<(&String, String)> = Vec::with_capacity(columns.len());
    for Column { ours, theirs } in columns {
        let Some((_, first)) = records.first() else { break };
        let has_it = records.iter().any(|(_, record)| record.contains_key(theirs));
        // Blanks around a name in the head line are seldom meant.
        let name =
            if has_it { Some(theirs) } else { first.keys().find(|key| key.trim() == theirs) };
        let Some(name) = name else {
            let names: Vec<String> = first.keys().map(|key| format!("`{key}`")).collect();
            let expected = format!("a column `{theirs}`, which `{ours}={theirs}` names");
            return Err(Refusal::file(path, "column", expected, names.join(", ")).into());
        };
        renamed.push((ours, name.clone()));
    }
    for (_, record) in records {
        // All are taken out before any is put back, so that two columns can change places.
        let taken: Vec<(&String, Value)> =
            renamed.iter().filter_map(|(ours, name)| Some((*ours, record.remove(name)?))).collect();
        for (ours, value) in taken {
            record.insert(ours.clone(), value);
        }
    }
    Ok(table)
}

/// A text a line; blank lines are none.
fn lines(path: &Path) -> Result<Vec<NumberedObject>, Error> {
    let text = jsonl::read_text(path)?;
    let mut budget = Budget::of(fs_err::metadata(path)?.len());
    let mut records = Vec::new();
    // Line ends of every system, one by one: a blank line has a number, too.
    for (number, line) in (1..).zip(text.lines().flat_map(|line| line.split('\r'))) {
        if line.trim().is_empty() {
            continue;
        }
        budget.take_bytes(path, number, line.len() as u64 + 2 * VALUE_BYTES)?;
        records
            .push((number, Map::from_iter([("text".to_owned(), Value::String(line.to_owned()))])));
    }
    Ok(records)
}

/// What a cell takes besides its text, as it is read and again as a value under its name.
const CELL_BYTES: usize = 96;

/// Cells that are null, as pandas reads them (`pandas.read_csv`, `na_values`).
const NULLS: [&str; 19] = [
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
    "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
];

/// Cells between separators, quoted as RFC 4180 says. As pandas reads it, and with it `datasets`: a word for what is missing is
/// null, a column of which every other cell is a number holds numbers, one of True and False truth values, and a name that comes
/// again has `.1` after it.
fn separated(path: &Path, separator: char) -> Result<Table, Error> {
    let text = jsonl::read_text(path)?;
    let mut budget = Budget::of(fs_err::metadata(path)?.len());
    let n_cells = text.chars().filter(|c| [separator, '\n', '\r'].contains(c)).count();
    budget.take_bytes(path, 1, (text.len() + n_cells * CELL_BYTES) as u64)?;
    let mut records = cells(&text, separator)
        .map_err(|line| {
            let (expected, got) = ("a quote that closes".to_owned(), "none to the end".to_owned());
            Unreadable { expected, got }.at(path, line)
        })?
        .into_iter();
    let Some((_, names)) = records.next() else { return Ok(Table::default()) };
    let names = distinct(names);
    let row_bytes: usize = names.iter().map(|name| name.len() + CELL_BYTES).sum();
    let (mut numbers_of_rows, mut rows) = (Vec::new(), Vec::<Vec<Value>>::new());
    let mut unreadable = Vec::new();
    for (row, (line, record)) in (1..).zip(records) {
        if record.len() != names.len() {
            let expected = format!("{} cells, as the head has names", names.len());
            unreadable.push((
                row,
                Unreadable { expected, got: format!("{} on line {line}", record.len()) },
            ));
            continue;
        }
        budget.take_bytes(path, line, row_bytes as u64)?;
        let cell = |cell: String| if NULLS.contains(&&*cell) { Value::Null } else { cell.into() };
        rows.push(record.into_iter().map(cell).collect());
        numbers_of_rows.push(row);
    }
    for column in 0..names.len() {
        let mut cells: Vec<&mut Value> =
            rows.iter_mut().filter_map(|row| row.get_mut(column)).collect();
        typed(&mut cells, number);
        typed(&mut cells, truth);
    }
    let record = |row: Vec<Value>| names.iter().cloned().zip(row).collect::<Map<_, _>>();
    let records = numbers_of_rows.into_iter().zip(rows.into_iter().map(record)).collect();
    Ok(Table { records, unreadable })
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
        line += usize::from(c == '\n' || (c == '\r' && chars.peek() != Some(&'\n')));
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
            '\n' | '\r' => {
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

/// Names of columns: those that come again are numbered, past what other columns are called, and those without one say where they stand.
///
/// # Source
///
/// pandas 3.1, `parsers.pyx`, `_get_header`.
fn distinct(names: Vec<String>) -> Vec<String> {
    let named = |(idx, name): (usize, String)| match name.as_str() {
        "" => format!("Unnamed: {idx}"),
        _ => name,
    };
    let names: Vec<String> = names.into_iter().enumerate().map(named).collect();
    let given: HashSet<&str> = names.iter().map(String::as_str).collect();
    let mut n_seen: HashMap<String, usize> = HashMap::new();
    let own = |name: &String| {
        let mut own = name.clone();
        let mut n = n_seen.get(name).copied().unwrap_or(0);
        while n > 0 {
            n_seen.insert(name.clone(), n + 1);
            own = format!("{name}.{n}");
            let is_taken = given.contains(&*own);
            n = if is_taken { n + 1 } else { n_seen.get(&own).copied().unwrap_or(0) };
        }
        n_seen.insert(own.clone(), n + 1);
        own
    };
    names.iter().map(own).collect()
}

/// Makes a column's cells values of another type if all of them are, nulls aside.
fn typed(cells: &mut [&mut Value], of: fn(&str) -> Option<Value>) {
    let value = |cell: &Value| match cell {
        Value::Null => Some(Value::Null),
        Value::String(text) => of(text.trim()),
        _ => None,
    };
    if let Some(found) = cells.iter().map(|cell| value(cell)).collect::<Option<Vec<Value>>>() {
        for (cell, value) in cells.iter_mut().zip(found) {
            **cell = value;
        }
    }
}

/// A number. What is infinite has no number in a record: it stays a text among numbers, which its row is refused for.
fn number(text: &str) -> Option<Value> {
    let whole = text.parse::<i64>().ok().map(Value::from);
    whole.or_else(|| {
        let number = text.parse::<f64>().ok()?;
        Some(if number.is_finite() { Value::from(number) } else { Value::from(text) })
    })
}

fn truth(text: &str) -> Option<Value> {
    match text {
        "True" | "TRUE" | "true" => Some(Value::Bool(true)),
        "False" | "FALSE" | "false" => Some(Value::Bool(false)),
        _ => None,
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
    use serde_json::json;

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
    fn what_unpacks_to_many_cells_is_refused_before_it_takes_the_memory() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            let file = fs_err::File::create(&path).unwrap();
            let mut packer = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
            std::io::Write::write_all(&mut packer, text.as_bytes()).unwrap();
            packer.finish().unwrap();
            read(&path).unwrap_err().to_string()
        };
        assert!(write("x.txt.gz", &"a\n".repeat(4_000_000)).contains("bytes of memory"));
        assert!(write("x.csv.gz", &"a,\n".repeat(4_000_000)).contains("bytes of memory"));
        let names = vec!["n".repeat(1000); 1000].join(",");
        let rows = format!("{}\n", ",".repeat(999)).repeat(1000);
        assert!(write("y.csv.gz", &format!("{names}\n{rows}")).contains("bytes of memory"));
    }

    #[test]
    fn texts_have_the_line_ends_of_every_system() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.txt");
        fs_err::write(&path, "a\r\nb\rc\n\nd").unwrap();
        let found = read(&path).unwrap();
        let texts: Vec<_> =
            found.iter().map(|(line, r)| (*line, r["text"].as_str().unwrap())).collect();
        assert_eq!(texts, [(1, "a"), (2, "b"), (3, "c"), (5, "d")]);
    }

    #[test]
    fn columns_can_change_places() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.csv");
        fs_err::write(&path, "a,b\n1,x\n").unwrap();
        let columns: Vec<Column> = ["a=b", "b=a"].map(|text| text.parse().unwrap()).into();
        let (_, record) = read_renamed(&path, &columns).unwrap().records.remove(0);
        assert_eq!((&record["a"], &record["b"]), (&"x".into(), &1.into()));
        assert!("a".parse::<Column>().is_err() && "=b".parse::<Column>().is_err());
        assert!(Column::check_used(Some(&columns), None).is_err());
        assert!(Column::check_used(Some(&columns), Some(&path)).is_ok());
        assert!(Column::check_used(None, None).is_ok());
        fs_err::write(&path, "a, b \n1,x\n").unwrap();
        let (_, record) = read_renamed(&path, &columns[..1]).unwrap().records.remove(0);
        assert_eq!((&record["a"], record.len()), (&"x".into(), 1));
        let error = read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("expected a file") && error.contains("a directory"), "{error}");
        fs_err::write(&path, "a,b\n1\n").unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("x.csv:1: expected 2 cells"), "{error}");
        assert!(error.contains("got 1 on line 2"), "{error}");
    }

    /// What pandas 3.0 reads of the same bytes, but for its `inf`, which has no number in a record.
    #[test]
    fn cells_have_the_types_that_pandas_gives_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.csv");
        let text = "a,a,n,t,x,i\nNA,b,0.5,True,true story,1\n\"nan\",None,NaN,False,no,inf\n";
        for text in [text.to_owned(), text.replace('\n', "\r")] {
            fs_err::write(&path, text).unwrap();
            let read: Vec<Value> =
                read(&path).unwrap().into_iter().map(|(_, r)| r.into()).collect();
            let first =
                json!({"a": null, "a.1": "b", "n": 0.5, "t": true, "x": "true story", "i": 1});
            let second =
                json!({"a": null, "a.1": null, "n": null, "t": false, "x": "no", "i": "inf"});
            assert_eq!(read, [first, second]);
        }
    }

    /// `pandas.read_csv(…).columns` of pandas 3.1.
    #[test]
    fn columns_have_the_names_that_pandas_gives_them() {
        for (head, expected) in [
            ("a,a,a", "a a.1 a.2"),
            ("a,a,a.1", "a a.2 a.1"),
            ("a.1,a,a", "a.1 a a.2"),
            ("a,a,a.1,a.1", "a a.2 a.1 a.1.1"),
            ("a,a.1,a,a,a.1,a.2", "a a.1 a.3 a.4 a.1.1 a.2"),
            ("a,a.1.1,a.1,a.1,a", "a a.1.1 a.1 a.1.2 a.2"),
        ] {
            assert_eq!(distinct(head.split(',').map(str::to_owned).collect()).join(" "), expected);
        }
        assert_eq!(distinct(vec![String::new(), "a".to_owned()]), ["Unnamed: 0", "a"]);
    }

    #[test]
    fn a_line_that_holds_no_record_is_named_beside_those_that_do() {
        let dir = tempfile::tempdir().unwrap();
        let lines = [
            (
                "x.jsonl",
                &b"{\"a\": 1}\n{broken\n[1, 2]\n\xff\n{\"a\": 2}\n"[..],
                [1, 5],
                ["one JSON value", "an object", "UTF-8"],
            ),
            ("x.csv", &b"a,b\n1,2\n3\n4,5,6\n,\n7,8,9\n"[..], [1, 4], ["2 cells"; 3]),
        ];
        for (name, text, rows, expected) in lines {
            let path = dir.path().join(name);
            fs_err::write(&path, text).unwrap();
            let table = read_usable(&path).unwrap();
            let found: Vec<usize> = table.records.iter().map(|(row, _)| *row).collect();
            assert_eq!((found, table.n_rows()), (rows.into(), 5), "{name}");
            for ((_, unreadable), expected) in table.unreadable.iter().zip(expected) {
                assert!(unreadable.expected.contains(expected), "{unreadable:?}");
            }
            assert!(read(&path).is_err() && read_renamed(&path, &[]).is_err(), "{name}");
        }
    }
}
