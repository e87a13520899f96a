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

    /// A recipe is not TOML.
    #[error("{}: not readable as a recipe: {reason}", path.display())]
    Recipe {
        /// The recipe.
        path: PathBuf,
        /// What is wrong, with line and column.
        reason: String,
    },

    /// A recipe has a table that no stage reads.
    #[error("{}: unknown table `[{table}]`{}", path.display(), nearest_hint(nearest.as_deref(), known))]
    UnknownTable {
        /// The recipe.
        path: PathBuf,
        /// The table found.
        table: String,
        /// The nearest known table, if any is near.
        nearest: Option<String>,
        /// Every known table, separated by commas.
        known: String,
    },

    /// A recipe's table has a key that the stage does not read.
    #[error("{}: unknown key `{key}` in `[{table}]`{}", path.display(), nearest_hint(nearest.as_deref(), known))]
    UnknownKey {
        /// The recipe.
        path: PathBuf,
        /// The table.
        table: String,
        /// The key found.
        key: String,
        /// The nearest known key, if any is near.
        nearest: Option<String>,
        /// Every known key, separated by commas.
        known: String,
    },

    /// A recipe's value does not fit its key.
    #[error("{}: key `{key}` in `[{table}]`: {reason}, got {got}", path.display())]
    RecipeValue {
        /// The recipe.
        path: PathBuf,
        /// The table.
        table: String,
        /// The key.
        key: String,
        /// The value found.
        got: String,
        /// What serde said (it names the expected type).
        reason: String,
    },

    /// Flags that the stage's configuration cannot hold.
    #[error("configuration of `{stage}`: {reason}")]
    Config {
        /// The stage.
        stage: String,
        /// What is wrong.
        reason: String,
    },

    /// Another process works in the output directory.
    #[error("{}: another process (pid {pid}) is working in this directory", path.display())]
    Locked {
        /// The directory.
        path: PathBuf,
        /// The other process, or `unknown`.
        pid: String,
    },

    /// An output directory holds files that no stage of ours made.
    #[error(
        "{}: not empty and not made by a stage (found `{found}`, no run.json): choose another \
         output directory or empty it",
        path.display()
    )]
    ForeignOutput {
        /// The directory.
        path: PathBuf,
        /// One of the files in it.
        found: String,
    },

    /// An output directory holds the results, or the unfinished work, of another stage.
    #[error(
        "{}: holds the results of stage `{owner}`, expected those of `{stage}` or nothing: choose \
         another output directory",
        path.display()
    )]
    OtherStage {
        /// The directory.
        path: PathBuf,
        /// The stage that made what is there.
        owner: String,
        /// The stage that was to write.
        stage: String,
    },

    /// An unfinished run left checkpoints, and an input has changed since.
    #[error(
        "{}: {checkpoint} was made with another input `{input}`: expected SHA-256 {expected}, got {got}; give \
         the old one back to go on from there, or remove this directory to start anew",
        path.display()
    )]
    StaleCheckpoints {
        /// The directory.
        path: PathBuf,
        /// One of the checkpoints in it.
        checkpoint: String,
        /// The input that has changed.
        input: String,
        /// Its hash when the run began.
        expected: String,
        /// Its hash now.
        got: String,
    },

    /// A directory is nested deeper than any stage writes.
    #[error("{}: nested deeper than {limit} directories", path.display())]
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

fn nearest_hint(nearest: Option<&str>, known: &str) -> String {
    match nearest {
        Some(nearest) => format!(", did you mean `{nearest}`? (known: {known})"),
        None => format!(", known: {known}"),
    }
}
