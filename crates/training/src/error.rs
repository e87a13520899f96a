//! The crate's one error type.

use std::path::PathBuf;

use arete_records::{Class, Classified};
use arete_stage::interrupt::Interrupted;

/// Why training stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Reading or writing a file failed; the message names the path.
    #[error(transparent)]
    Io(#[from] std::io::Error),

    /// A record file is unusable.
    #[error(transparent)]
    Records(#[from] arete_records::Error),

    /// A recipe, a setting or an output directory was refused.
    #[error(transparent)]
    Stage(#[from] arete_stage::Error),

    /// The model refused.
    #[error(transparent)]
    Model(#[from] arete_model::Error),

    /// A pass with gradients does not fit the memory, however little of it is kept.
    #[error(
        "out of memory in a training pass, with blocks run again in the backward pass (recompute): {what}; set \
         micro_batch_tokens below {micro_batch_tokens} (no pass is smaller than its longest example) or nf4 = true"
    )]
    OutOfMemory {
        /// How much was asked for and where, as libtorch says it.
        what: String,
        /// Most tokens of a pass, as it was set.
        micro_batch_tokens: usize,
    },

    /// SIGINT or SIGTERM; a full checkpoint was written.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),

    /// A loss or gradient is NaN or infinite. The optimiser and the checkpoints have not seen it.
    #[error("step {step}: {what} is not finite; the last checkpoint is intact")]
    NonFinite {
        /// The step that was being computed, from 1.
        step: u64,
        /// The loss, or the name of the first tensor whose gradient is not finite.
        what: String,
    },

    /// The processes that train together do not come together, or do not agree.
    #[error("processes that train together: {what}")]
    Ranks {
        /// What went wrong, with the rank.
        what: String,
    },

    /// A checkpoint's contents are not what this run needs.
    #[error("{}: {field}: expected {expected}, got {got}", path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// The part of it.
        field: String,
        /// What would have been accepted.
        expected: String,
        /// What is there.
        got: String,
    },

    /// A value given by the caller cannot be used.
    #[error("{name}: expected {expected}, got {got}")]
    Invalid {
        /// The argument or option.
        name: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What was given.
        got: String,
    },
}

// As the model says it, which tells memory that was refused from all else.
impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Self::Model(error.into())
    }
}

impl AsRef<dyn std::error::Error> for Error {
    fn as_ref(&self) -> &(dyn std::error::Error + 'static) {
        self
    }
}

impl Classified for Error {
    fn class(&self) -> Option<Class> {
        match self {
            Self::Io(_) | Self::Ranks { .. } => Some(Class::System),
            Self::Records(error) => error.class(),
            Self::Stage(error) => error.class(),
            Self::Model(error) => error.class(),
            Self::Interrupted(interrupted) => interrupted.class(),
            Self::OutOfMemory { .. } => Some(Class::Memory),
            Self::NonFinite { .. } => Some(Class::Other),
            Self::Checkpoint { .. } => Some(Class::Data),
            Self::Invalid { .. } => Some(Class::Setting),
        }
    }
}

/// What the outermost known cause of a stage's error is.
pub fn class_within(error: &anyhow::Error) -> Option<Class> {
    error.chain().find_map(|cause| class_of(cause).or_else(|| arete_stage::exit::class_of(cause)))
}

/// What an error of this crate, or of those below it, is for the caller.
pub fn class_of(cause: &(dyn std::error::Error + 'static)) -> Option<Class> {
    match cause.downcast_ref::<Error>() {
        Some(error) => error.class(),
        None => arete_model::class_of(cause),
    }
}
