//! The crate's one error type.

use std::path::PathBuf;

use arete_records::{Class, Classified};

/// Why training a policy on preferences failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Reading or writing a file failed; the message names the path.
    #[error(transparent)]
    Io(#[from] std::io::Error),

    /// A file of the pipeline is unusable.
    #[error(transparent)]
    Records(#[from] arete_records::Error),

    /// A setting, or a place in a file, was refused.
    #[error(transparent)]
    Refused(#[from] arete_records::Refusal),

    /// A recipe, a setting or an output directory was refused.
    #[error(transparent)]
    Stage(#[from] arete_stage::Error),

    /// The model could not be loaded, run or written.
    #[error(transparent)]
    Model(#[from] arete_model::Error),

    /// Training stopped.
    #[error(transparent)]
    Training(#[from] arete_training::Error),

    /// A conversation cannot be rendered with the model's chat template.
    #[error("{}: row {row} cannot be rendered", path.display())]
    Rendering {
        /// The file.
        path: PathBuf,
        /// The row or line, counted from 1.
        row: usize,
        /// What the template or tokenizer said.
        #[source]
        source: Box<arete_model::Error>,
    },

    /// Too few pairs to train on.
    #[error("{}: expected at least {expected} pairs to train on, got {got} ({reason})", path.display())]
    TooFewPairs {
        /// The file.
        path: PathBuf,
        /// The least that is accepted.
        expected: usize,
        /// How many are left.
        got: usize,
        /// Where the others went.
        reason: String,
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
}

impl Classified for Error {
    fn class(&self) -> Option<Class> {
        match self {
            Self::Io(_) => None,
            Self::Records(error) => error.class(),
            Self::Refused(refusal) => refusal.class(),
            Self::Stage(error) => error.class(),
            Self::Model(error) => error.class(),
            Self::Training(error) => error.class(),
            Self::Setting { .. } => Some(Class::Setting),
            Self::Rendering { .. } | Self::TooFewPairs { .. } => Some(Class::Data),
        }
    }
}

/// What an error of this crate, or of those below it, is for the caller.
pub fn class_of(cause: &(dyn std::error::Error + 'static)) -> Option<Class> {
    match cause.downcast_ref::<Error>() {
        Some(error) => error.class(),
        None => arete_training::class_of(cause),
    }
}
