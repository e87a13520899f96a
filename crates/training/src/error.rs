//! The crate's one error type.

use std::path::PathBuf;

use arete_records::cli::{ExitClass, code};
use arete_records::interrupt::Interrupted;

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

    /// The model refused.
    #[error(transparent)]
    Model(#[from] arete_model::Error),

    /// libtorch refused an operation (out of memory, no such device, …).
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),

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

impl ExitClass for Error {
    fn exit_class(&self) -> Option<u8> {
        match self {
            Self::Io(_) => Some(code::IO),
            Self::Records(error) => error.exit_class(),
            Self::Model(error) => model_exit_class(error),
            Self::Interrupted(interrupted) => u8::try_from(128 + interrupted.signal).ok(),
            Self::Torch(_) | Self::NonFinite { .. } => Some(code::FAILURE),
            Self::Checkpoint { .. } => Some(code::BAD_DATA),
            Self::Invalid { .. } => Some(code::USAGE),
        }
    }
}

/// The exit code of a program that fails with an error of the model crate.
pub fn model_exit_class(error: &arete_model::Error) -> Option<u8> {
    error.exit_class()
}
