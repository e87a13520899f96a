//! The crate's one error type: each variant names its cause, and says what, where, expected and got.

use std::path::PathBuf;

/// Why reading or writing records failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Reading or writing a file failed; the message names the path.
    #[error(transparent)]
    Io(#[from] std::io::Error),

    /// A word that should be one of a few.
    #[error("unknown {what} `{got}`, expected one of: {expected}")]
    Name {
        /// The kind of word.
        what: &'static str,
        /// Every accepted word, separated by commas.
        expected: String,
        /// The word found.
        got: String,
    },

    /// A name of a turn or a virtue that cannot be one.
    #[error("{what} `{got}`: expected {expected}")]
    BadName {
        /// The kind of name.
        what: &'static str,
        /// The name found.
        got: String,
        /// What would have been accepted.
        expected: String,
    },

    /// A file is damaged, or claims more than its size can hold.
    #[error("{}: {what}: expected {expected}, got {got}", path.display())]
    Damaged {
        /// The offending file.
        path: PathBuf,
        /// The part of the file.
        what: String,
        /// What would have been accepted.
        expected: String,
        /// What is there.
        got: String,
    },

    /// The Parquet library refused a file.
    #[error("{}: not readable as Parquet: {reason}", path.display())]
    Parquet {
        /// The offending file.
        path: PathBuf,
        /// What the library said.
        reason: String,
    },

    /// A Parquet file lacks a column.
    #[error("{}: column `{column}` is missing: expected {expected}, got columns {got}", path.display())]
    MissingColumn {
        /// The offending file.
        path: PathBuf,
        /// The missing column.
        column: String,
        /// Its type.
        expected: String,
        /// The columns that are there, separated by commas.
        got: String,
    },

    /// A Parquet column has another type than the rows.
    #[error("{}: column `{column}`: expected {expected}, got {got}", path.display())]
    ColumnType {
        /// The offending file.
        path: PathBuf,
        /// The column.
        column: String,
        /// The type the rows need.
        expected: String,
        /// The type in the file.
        got: String,
    },

    /// A value in a Parquet file does not fit its row.
    #[error("{}: rows {first_row}..{end_row}: {reason}", path.display())]
    Row {
        /// The offending file.
        path: PathBuf,
        /// First row of the block that holds the value, counted from 0.
        first_row: usize,
        /// One past the last row of that block.
        end_row: usize,
        /// What is wrong, with the column's name.
        reason: String,
    },

    /// Rows that cannot be written as Parquet (a bug of the caller, or text beyond 2 GiB a block).
    #[error("{}: not writable as Parquet: {reason}", path.display())]
    Write {
        /// The file that was to be written.
        path: PathBuf,
        /// What the library said.
        reason: String,
    },

    /// A JSON document or a line of JSON lines is malformed.
    #[error("{}:{line}: expected {expected}, got {got}", path.display())]
    Json {
        /// The offending file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What would have been accepted.
        expected: String,
        /// What is there.
        got: String,
    },

    /// A place in a file was refused.
    #[error(transparent)]
    Refused(#[from] crate::Refusal),

    /// A directory is nested deeper than any stage writes.
    #[error("{}: nested deeper than {limit} directories: take out the link that points upwards, if it is one", path.display())]
    TooDeep {
        /// The directory.
        path: PathBuf,
        /// The limit.
        limit: usize,
    },
}

impl Error {
    /// Whether the operating system refused something (exit code 74), as opposed to bad data (65).
    pub fn is_io(&self) -> bool {
        matches!(self, Self::Io(_))
    }
}
