//! The crate's one error type: each variant names its cause, and says what, where, expected and found.

use std::path::PathBuf;

use arete_records::{Class, Classified, memory_refused};

/// Why loading, running or writing a model failed.
///
/// Everything here is something the user can act on (a bad file, a bad value, a full disk); broken
/// invariants of this crate panic instead.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Reading or writing a file failed; the message names the path.
    #[error(transparent)]
    Io(#[from] std::io::Error),

    /// Writing or hashing files failed; the message names the path.
    #[error(transparent)]
    Records(#[from] arete_records::Error),

    /// A run's `run.json` was refused.
    #[cfg(feature = "cli")]
    #[error(transparent)]
    Stage(#[from] arete_stage::Error),

    /// libtorch refused an operation (out of memory, no such device, …).
    #[error("libtorch: {}", of_libtorch(.0))]
    Torch(tch::TchError),

    /// libtorch did not get the memory it asked for, on the device or the host.
    #[error("libtorch: {what}{}", if what.contains("GPU") || what.contains("CUDA") { crate::cuda::Surroundings::current().to_string() } else { String::new() })]
    OutOfMemory {
        /// How much was asked for and where, as libtorch says it.
        what: String,
    },

    /// More memory than there is, found before any is asked for.
    #[error("{what}")]
    NoRoom {
        /// What needs how much, how much there is, and what can be done.
        what: String,
    },

    /// The GPU cannot be used: a library is missing, a kernel does not compile, a launch failed.
    #[error(transparent)]
    Cuda(#[from] crate::cuda::CudaError),

    /// A file is not what it should be: damaged, hostile, or from an incompatible writer.
    #[error("{}: {field}: expected {expected}, found {found}", path.display())]
    Field {
        /// The offending file.
        path: PathBuf,
        /// The part of the file (a key, a header field, a tensor name).
        field: String,
        /// What would have been accepted.
        expected: String,
        /// What is there.
        found: String,
    },

    /// The checkpoint's architecture is not one this crate runs.
    #[error(
        "{}: {field}: unsupported architecture {found}, supported: {supported}",
        path.display()
    )]
    Architecture {
        /// The file that names the architecture.
        path: PathBuf,
        /// The key that names it.
        field: String,
        /// The architecture found.
        found: String,
        /// Every supported architecture, separated by commas.
        supported: String,
    },

    /// A tensor the model needs is not in the checkpoint.
    #[error("{}: tensor `{name}` is missing", path.display())]
    MissingTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor's Hugging Face name.
        name: String,
    },

    /// A tensor in a checkpoint has another shape than the configuration implies.
    #[error("{}: tensor `{name}`: expected shape {expected:?}, found {found:?}", path.display())]
    TensorShape {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor's Hugging Face name.
        name: String,
        /// The shape the configuration implies.
        expected: Vec<i64>,
        /// The shape stored.
        found: Vec<i64>,
    },

    /// A tensor argument has the wrong shape or dtype.
    #[error("{name}: expected shape {expected:?}, got {got:?}")]
    Shape {
        /// The argument.
        name: &'static str,
        /// The shape that would have been accepted.
        expected: Vec<i64>,
        /// The shape passed.
        got: Vec<i64>,
    },

    /// A pickle file was named; opening one can run any code, so it is never opened.
    #[error(
        "{}: this is a pickle file, which can run any code when opened; \
         convert it where you trust it, then name the new directory: {command}",
        path.display()
    )]
    Pickle {
        /// The pickle file.
        path: PathBuf,
        /// The command that converts it to safetensors.
        command: String,
    },

    /// A path or id given for a model is none of the accepted kinds.
    #[error("{given}: expected {expected}, found {found}")]
    Source {
        /// What the user gave.
        given: String,
        /// The kinds of model accepted.
        expected: &'static str,
        /// What it is instead.
        found: String,
    },

    /// The hub could not be reached, or answered with an error.
    #[error("hub: {what}: {reason}")]
    Hub {
        /// The repository and file asked for.
        what: String,
        /// What went wrong and what to do about it.
        reason: String,
    },

    /// A tokenizer could not be built from its file, or failed on a text.
    #[error("{}: tokenizer: {reason}", path.display())]
    Tokenizer {
        /// The file the tokenizer comes from.
        path: PathBuf,
        /// What went wrong.
        reason: String,
    },

    /// A text is larger than this crate encodes or decodes in one piece.
    #[error("text of {bytes} bytes: expected at most {limit}")]
    TextTooLong {
        /// The text's size.
        bytes: usize,
        /// The most that is accepted.
        limit: usize,
    },

    /// A model has no chat template, so conversations cannot be rendered for it.
    #[error(
        "{}: no chat template: expected chat_template.jinja, or `chat_template` in \
         tokenizer_config.json or the GGUF's metadata; this is probably not a chat model",
        path.display()
    )]
    NoTemplate {
        /// Where a template was looked for.
        path: PathBuf,
    },

    /// A chat template does not compile, or fails on a conversation.
    #[error("{}: chat template: {reason}", path.display())]
    Template {
        /// The file the template comes from.
        path: PathBuf,
        /// What went wrong, with the line where known.
        reason: String,
    },

    /// A chat template refused a conversation by `raise_exception`.
    #[error("{}: chat template refused the conversation: {message}", path.display())]
    TemplateRefused {
        /// The file the template comes from.
        path: PathBuf,
        /// The template's own message.
        message: String,
    },

    /// A chat template did more work, or wrote more, than any honest template needs.
    #[error("{}: chat template: expected at most {limit} {what}, it wanted more", path.display())]
    TemplateBudget {
        /// The file the template comes from.
        path: PathBuf,
        /// What ran out.
        what: &'static str,
        /// The budget.
        limit: u64,
    },

    /// A computed number is NaN or infinite.
    #[error("{what} is not finite")]
    NonFinite {
        /// The number.
        what: String,
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

impl Error {
    /// A [`Error::Field`] from anything printable.
    pub(crate) fn field(
        path: &std::path::Path,
        field: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        Self::Field {
            path: path.to_path_buf(),
            field: field.into(),
            expected: expected.into(),
            found: found.into(),
        }
    }

    /// An I/O error whose message names `path`, for calls `fs_err` does not wrap.
    #[cfg(feature = "hub")]
    pub(crate) fn io(path: &std::path::Path, error: &std::io::Error) -> Self {
        Self::Io(std::io::Error::new(error.kind(), format!("{}: {error}", path.display())))
    }
}

// By hand: as a source of this error it would be printed once more, with the stack of libtorch's functions.
impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        match memory_refused(&error.to_string()) {
            Some(what) => Self::OutOfMemory { what },
            None => Self::Torch(error),
        }
    }
}

/// What libtorch says, with the driver and the GPU where it speaks of them.
fn of_libtorch(error: &tch::TchError) -> String {
    let line = first_line(error);
    let of_gpu = ["CUDA", "cuda", "cuBLAS", "CUBLAS"].iter().any(|sign| line.contains(sign));
    if of_gpu { format!("{line}{}", crate::cuda::Surroundings::current()) } else { line }
}

/// What libtorch says, without the stack of its own functions.
fn first_line(error: &tch::TchError) -> String {
    let text = match error {
        tch::TchError::Torch(text) => text.clone(),
        other => other.to_string(),
    };
    text.lines().next().unwrap_or_default().to_owned()
}

impl Classified for Error {
    fn class(&self) -> Option<Class> {
        match self {
            Self::Records(error) => error.class(),
            #[cfg(feature = "cli")]
            Self::Stage(error) => error.class(),
            Self::Io(error) => error.class(),
            Self::OutOfMemory { .. } | Self::NoRoom { .. } => Some(Class::Memory),
            Self::Torch(_) | Self::NonFinite { .. } | Self::Cuda(_) => Some(Class::Other),
            Self::Hub { .. } => Some(Class::Unavailable),
            Self::Invalid { .. } | Self::Source { .. } => Some(Class::Setting),
            _ => Some(Class::Data),
        }
    }
}

/// What an error of this crate, or of those below it, is for the caller.
pub fn class_of(cause: &(dyn std::error::Error + 'static)) -> Option<Class> {
    match cause.downcast_ref::<Error>() {
        Some(error) => error.class(),
        None => arete_records::class_of(cause),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_gpu_is_told_from_other_failures_of_libtorch() {
        let text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB\nException raised from malloc";
        let full = Error::from(tch::TchError::Torch(text.to_owned()));
        assert!(
            matches!(&full, Error::OutOfMemory { what } if what.contains("2.00 GiB")),
            "{full:?}"
        );
        assert_eq!(full.class(), Some(Class::Memory));
        let other =
            Error::from(tch::TchError::Torch("CUDA error: an illegal memory access\nx".to_owned()));
        assert_eq!(other.class(), Some(Class::Other));
        assert!(other.to_string().starts_with("libtorch: CUDA error: an illegal memory access"));
    }
}
