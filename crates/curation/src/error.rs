//! The crate's one error type: each variant names its cause, and says what, where, expected and found.

use std::path::PathBuf;

/// Why curation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Reading or writing a file failed; the message names the path.
    #[error(transparent)]
    Io(#[from] std::io::Error),

    /// A file of the pipeline could not be read or written.
    #[error(transparent)]
    Records(#[from] arete_records::Error),

    /// The local model could not be loaded or run.
    #[error(transparent)]
    Model(#[from] arete_model::Error),

    /// A signal asked the stage to stop.
    #[error(transparent)]
    Interrupted(#[from] arete_records::interrupt::Interrupted),

    /// A record of an input file is not what it should be.
    #[error("{}:{line}: {field}: expected {expected}, found {found}", path.display())]
    Record {
        /// The offending file.
        path: PathBuf,
        /// The line or row, counted from 1.
        line: usize,
        /// The key or column.
        field: String,
        /// What would have been accepted.
        expected: String,
        /// What is there.
        found: String,
    },

    /// A file as a whole is not what it should be.
    #[error("{}: {field}: expected {expected}, found {found}", path.display())]
    File {
        /// The offending file or directory.
        path: PathBuf,
        /// What is wrong about it.
        field: String,
        /// What would have been accepted.
        expected: String,
        /// What is there.
        found: String,
    },

    /// A setting cannot be used.
    #[error("{name}: expected {expected}, got {got}")]
    Setting {
        /// The flag or recipe key.
        name: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What was given.
        got: String,
    },

    /// Too few pairs are left to train a reward model on.
    #[error(
        "{aspect}: {left} pairs left of {total}, expected at least {needed}; replies that ended by \
         themselves: {finish_rates}; {advice}"
    )]
    TooFewPairs {
        /// The aspect.
        aspect: arete_records::Aspect,
        /// Pairs left.
        left: usize,
        /// Pairs before anything was dropped.
        total: usize,
        /// The least that is accepted.
        needed: usize,
        /// The share of finished replies, turn by turn.
        finish_rates: String,
        /// What would help.
        advice: String,
    },

    /// A server could not be used.
    #[error("{url}: {what}: {reason}")]
    Server {
        /// The address asked.
        url: String,
        /// What was asked for.
        what: &'static str,
        /// What went wrong.
        reason: String,
    },

    /// Shards do not add up to a whole.
    #[error("{}: {reason}", path.display())]
    Shards {
        /// The directory concerned.
        path: PathBuf,
        /// What is missing or contradictory.
        reason: String,
    },
}

impl arete_records::cli::ExitClass for Error {
    fn exit_class(&self) -> Option<u8> {
        use arete_records::cli::code;
        match self {
            Self::Io(_) => Some(code::IO),
            Self::Records(error) => error.exit_class(),
            Self::Interrupted(signal) => u8::try_from(128 + signal.signal).ok(),
            Self::Setting { .. } => Some(code::USAGE),
            Self::Server { .. } => Some(code::UNAVAILABLE),
            Self::Model(error) => model_class(error),
            Self::Record { .. }
            | Self::File { .. }
            | Self::TooFewPairs { .. }
            | Self::Shards { .. } => Some(code::BAD_DATA),
        }
    }
}

/// The model crate's errors: the system's refusals apart, a model or text that cannot be used.
fn model_class(error: &arete_model::Error) -> Option<u8> {
    use arete_records::cli::code;
    match error {
        arete_model::Error::Io(_) => Some(code::IO),
        arete_model::Error::Torch(_) => None,
        arete_model::Error::Hub { .. } => Some(code::UNAVAILABLE),
        _ => Some(code::BAD_DATA),
    }
}
