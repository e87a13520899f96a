//! Parquet in and out: rows are structs, columns are checked, hostile files are refused.
//!
//! Bytes are a function of the rows alone. `datasets.load_dataset` reads the files: the schema
//! carries its features under the key `huggingface`.

mod guard;
mod schema;

use std::collections::{HashMap, HashSet};
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use arrow::datatypes::Schema;
use parquet::arrow::ArrowWriter;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderOptions, ParquetRecordBatchReaderBuilder};
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

pub use arrow::datatypes::FieldRef;

use crate::{Error, atomic, files};

/// Rows per row group and per block handed to the encoder; the hub's viewer likes them small.
const ROWS_PER_GROUP: usize = 10_000;

/// Rows decoded at a time.
const ROWS_PER_BATCH: usize = 1024;

/// A struct that is one row of a Parquet file.
pub trait Row: Serialize + DeserializeOwned {
    /// The row's name, for messages.
    const NAME: &'static str;

    /// The columns, in order; of a row that has columns for every turn, those of the shipped turns.
    fn fields() -> Vec<FieldRef>;

    /// The columns that these rows are written to.
    ///
    /// # Errors
    ///
    /// Says which row has other columns than the first.
    fn fields_of(rows: &[Self]) -> Result<Vec<FieldRef>, String> {
        let _ = rows;
        Ok(Self::fields())
    }

    /// The columns that are read from a file with this schema.
    fn fields_in(schema: &Schema) -> Vec<FieldRef> {
        let _ = schema;
        Self::fields()
    }
}

/// Writes rows to a Parquet file, atomically; equal rows give equal bytes.
///
/// # Errors
///
/// [`Error::Io`] if the file cannot be written, [`Error::Write`] if a row does not fit its columns, or the rows are more than
/// a reader takes.
pub fn write<T: Row>(path: impl AsRef<Path>, rows: &[T]) -> Result<(), Error> {
    let path = path.as_ref();
    let bytes = encode(rows).map_err(|reason| Error::Write {
        path: path.to_owned(),
        reason: format!("{} rows: {reason}", T::NAME),
    })?;
    atomic::write(path, &bytes)?;
    // One rule of size for writer and reader: what reading would refuse is no file.
    guarded::<()>(path, |_| Ok(Vec::new())).map(drop).or_else(|error| {
        // What the system refused says nothing about the file, which the next attempt writes anew.
        fs_err::remove_file(path)?;
        if error.is_io() {
            return Err(error); // the system refused, not the file
        }
        Err(Error::Write {
            path: path.to_owned(),
            reason: format!("reading it would fail: {error}"),
        })
    })
}

fn encode<T: Row>(rows: &[T]) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    let fields = T::fields_of(rows)?;
    let features = schema::huggingface_features(&fields);
    let metadata = HashMap::from([("huggingface".to_owned(), features.clone())]);
    let schema = Arc::new(Schema::new_with_metadata(fields.clone(), metadata));
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(3)?))
        .set_created_by("arete-records".to_owned())
        .set_max_row_group_row_count(Some(ROWS_PER_GROUP))
        .set_key_value_metadata(Some(vec![KeyValue::new("huggingface".to_owned(), features)]))
        .build();
    let mut bytes = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut bytes, Arc::clone(&schema), Some(properties))?;
    for block in rows.chunks(ROWS_PER_GROUP) {
        let batch = serde_arrow::to_record_batch(&fields, &block)?;
        writer.write(&batch.with_schema(Arc::clone(&schema))?)?;
    }
    writer.close()?;
    Ok(bytes)
}

/// Reads all rows of a Parquet file. Columns are found by name, in any order; columns that the
/// row does not have are ignored.
///
/// # Errors
///
/// [`Error::Io`] if the file cannot be read; [`Error::MissingColumn`], [`Error::ColumnType`] if
/// its columns are not the row's; [`Error::Damaged`], [`Error::Parquet`], [`Error::Row`] if its
/// contents are broken or claim more than the file's size makes plausible.
pub fn read<T: Row>(path: impl AsRef<Path>) -> Result<Vec<T>, Error> {
    let path = path.as_ref();
    guarded(path, |builder| {
        let mut columns = Vec::new();
        for expected in T::fields_in(builder.schema()) {
            columns.push(schema::find_column(path, builder.schema(), &expected)?);
        }
        read_columns(path, builder, columns)
    })
}

/// Whether a file begins as Parquet does.
///
/// # Errors
///
/// [`Error::Io`].
pub fn begins_like_it(path: &Path) -> Result<bool, Error> {
    let mut head = Vec::new();
    fs_err::File::open(path)?.take(guard::MAGIC.len() as u64).read_to_end(&mut head)?;
    Ok(head == guard::MAGIC)
}

/// Reads any Parquet file as JSON rows. Columns of a type that JSON has no notion of (binary data)
/// are left out, with a warning.
///
/// # Errors
///
/// [`Error::Io`] if the file cannot be read; [`Error::Damaged`], [`Error::Parquet`],
/// [`Error::Row`] if its contents are broken or claim more than the file's size makes plausible.
pub fn read_json(path: impl AsRef<Path>) -> Result<Vec<Map<String, Value>>, Error> {
    let path = path.as_ref();
    guarded(path, |builder| {
        let mut columns = Vec::new();
        let mut names = HashSet::new();
        for (column, field) in builder.schema().fields().iter().enumerate() {
            if !names.insert(field.name()) {
                return Err(Error::Damaged {
                    path: path.to_owned(),
                    what: "columns".to_owned(),
                    expected: "each name once".to_owned(),
                    got: format!("two of the name `{}`", field.name()),
                });
            }
            if schema::fits_json(field.data_type()) {
                columns.push(column);
            } else {
                tracing::warn!(
                    path = %path.display(), column = field.name(), r#type = %field.data_type(),
                    "column left out: its type has no JSON form"
                );
            }
        }
        if columns.is_empty() {
            let types = builder.schema().fields().iter();
            let found = types.map(|field| format!("`{}` of {}", field.name(), field.data_type()));
            return Err(Error::Damaged {
                path: path.to_owned(),
                what: "columns".to_owned(),
                expected: "at least one whose values have a JSON form (texts, numbers, lists and structs of them)".to_owned(),
                got: found.collect::<Vec<_>>().join(", "),
            });
        }
        read_columns(path, builder, columns)
    })
}

type Builder = ParquetRecordBatchReaderBuilder<std::fs::File>;

/// Opens a file after checking what it claims, and turns panics of the Parquet library (it has
/// some left on damaged files) into errors.
fn guarded<T>(
    path: &Path,
    read: impl FnOnce(Builder) -> Result<Vec<T>, Error>,
) -> Result<Vec<T>, Error> {
    let file = files::open_regular(path)?; // its end is read first
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        guard::check_footer(path, &file)?;
        // The embedded Arrow schema is one more format that could lie; Parquet's own types suffice.
        let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
        let file = file.into_parts().0;
        let builder = Builder::try_new_with_options(file.try_clone()?, options)
            .map_err(|error| parquet_error(path, &error))?;
        guard::check_contents(path, &file, builder.metadata())?;
        read(builder)
    }));
    outcome.unwrap_or_else(|panic| {
        let reason = (panic.downcast_ref::<String>().map(String::as_str))
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("the Parquet library gave up");
        Err(parquet_error(path, &reason))
    })
}

fn read_columns<T: DeserializeOwned>(
    path: &Path,
    builder: Builder,
    columns: Vec<usize>,
) -> Result<Vec<T>, Error> {
    let mask = ProjectionMask::roots(builder.parquet_schema(), columns);
    let reader = builder
        .with_projection(mask)
        .with_batch_size(ROWS_PER_BATCH)
        .build()
        .map_err(|error| parquet_error(path, &error))?;
    let mut rows: Vec<T> = Vec::new();
    for batch in reader {
        let batch = batch.map_err(|error| parquet_error(path, &error))?;
        let block: Vec<T> = serde_arrow::from_record_batch(&batch).map_err(|error| Error::Row {
            path: path.to_owned(),
            first_row: rows.len(),
            end_row: rows.len() + batch.num_rows(),
            reason: error.to_string(),
        })?;
        rows.extend(block);
    }
    Ok(rows)
}

fn parquet_error(path: &Path, reason: &dyn std::fmt::Display) -> Error {
    let reason = reason.to_string();
    // The library hands on what the system refused (too many open files, …) as text, in the standard library's words.
    match reason.contains("(os error ") {
        true => Error::Io(std::io::Error::other(format!("{}: {reason}", path.display()))),
        false => Error::Parquet { path: path.to_owned(), reason },
    }
}

#[cfg(test)]
mod tests;
