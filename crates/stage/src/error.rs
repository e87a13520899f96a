//! Why a stage cannot begin or end: recipes, settings, output directories.

use std::path::PathBuf;

/// Why a recipe, an output directory or a file of the frame was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The system refused to read or write; the message names the path.
    #[error(transparent)]
    Io(#[from] std::io::Error),

    /// A file of records was refused.
    #[error(transparent)]
    Records(#[from] arete_records::Error),

    /// A signal came in while an input was awaited.
    #[error(transparent)]
    Interrupted(#[from] crate::interrupt::Interrupted),

    /// Files of units do not add up to a whole.
    #[error("{}: {reason}", path.display())]
    Shards {
        /// The directory concerned.
        path: PathBuf,
        /// What is missing or contradictory.
        reason: String,
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

    /// A file that a stage made has been changed since.
    #[error(
        "{}: not as stage `{stage}` left it (run.json in {}): expected SHA-256 {expected}, got {got}; run that stage \
         again, or name a copy elsewhere if the change is meant",
        path.display(), dir.display()
    )]
    ChangedInput {
        /// The file.
        path: PathBuf,
        /// The stage that made it.
        stage: String,
        /// The directory of that stage.
        dir: PathBuf,
        /// Its hash when that stage ended.
        expected: String,
        /// Its hash now.
        got: String,
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
}

fn nearest_hint(nearest: Option<&str>, known: &str) -> String {
    match nearest {
        Some(nearest) => format!(", did you mean `{nearest}`? (known: {known})"),
        None => format!(", known: {known}"),
    }
}
