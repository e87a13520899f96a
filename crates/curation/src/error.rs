//! The crate's one error type: each variant names its cause, and says what, where, expected and found.

use std::path::PathBuf;

use arete_records::{Class, Classified};

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

    /// A setting, or a place in a file, was refused.
    #[error(transparent)]
    Refused(#[from] arete_records::Refusal),

    /// A recipe, a setting or an output directory was refused.
    #[error(transparent)]
    Stage(#[from] arete_stage::Error),

    /// The local model could not be loaded or run.
    #[error(transparent)]
    Model(#[from] arete_model::Error),

    /// A signal asked the stage to stop.
    #[error(transparent)]
    Interrupted(#[from] arete_stage::interrupt::Interrupted),

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
         themselves: {finish_rates}; of the pairs {advice}"
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

impl Classified for Error {
    fn class(&self) -> Option<Class> {
        match self {
            Self::Io(_) => Some(Class::System),
            Self::Records(error) => error.class(),
            Self::Refused(refusal) => refusal.class(),
            Self::Stage(error) => error.class(),
            Self::Interrupted(signal) => signal.class(),
            Self::Setting { .. } => Some(Class::Setting),
            Self::Server { .. } => Some(Class::Unavailable),
            Self::Model(error) => error.class(),
            Self::Record { .. }
            | Self::File { .. }
            | Self::TooFewPairs { .. }
            | Self::Shards { .. } => Some(Class::Data),
        }
    }
}

/// What an error of this crate, or of those below it, is for the caller.
pub fn class_of(cause: &(dyn std::error::Error + 'static)) -> Option<Class> {
    match cause.downcast_ref::<Error>() {
        Some(error) => error.class(),
        None => arete_model::class_of(cause),
    }
}
