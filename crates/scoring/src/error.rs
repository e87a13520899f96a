//! The crate's one error type.

use std::path::PathBuf;

use arete_records::{Class, Classified};
use arete_stage::interrupt::Interrupted;

/// Why scoring, reporting or diagnosing failed.
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

    /// A model could not be loaded or run.
    #[error(transparent)]
    Model(#[from] arete_model::Error),

    /// A signal asked to stop.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),

    /// A file does not hold what it should.
    #[error("{}: {field}: expected {expected}, found {found}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The part of it.
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

    /// A reward model gave a score that is no number.
    #[error(
        "the {aspect} reward model's score of {model}'s reply to prompt {prompt_id} is {score}"
    )]
    NonFinite {
        /// Which reward model (or `yardstick`).
        aspect: String,
        /// Whose reply.
        model: String,
        /// To which prompt.
        prompt_id: String,
        /// NaN or infinite.
        score: f64,
    },

    /// A chart could not be drawn.
    #[error("chart {name}: {reason}")]
    Chart {
        /// The chart's file name.
        name: String,
        /// What the drawing library says.
        reason: String,
    },
}

impl Classified for Error {
    fn class(&self) -> Option<Class> {
        Some(match self {
            Self::Io(_) => return None,
            Self::Records(error) => return error.class(),
            Self::Refused(refusal) => return refusal.class(),
            Self::Stage(error) => return error.class(),
            Self::Model(error) => return error.class(),
            Self::Interrupted(interrupted) => return interrupted.class(),
            Self::File { .. } => Class::Data,
            Self::Setting { .. } => Class::Setting,
            Self::NonFinite { .. } | Self::Chart { .. } => Class::Other,
        })
    }
}

/// What an error of this crate, or of those below it, is for the caller.
pub fn class_of(cause: &(dyn std::error::Error + 'static)) -> Option<Class> {
    match cause.downcast_ref::<Error>() {
        Some(error) => error.class(),
        None => arete_model::class_of(cause),
    }
}
