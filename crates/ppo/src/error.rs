//! The crate's one error type.

use std::path::PathBuf;

use arete_records::{Class, Classified};
use arete_stage::interrupt::Interrupted;

/// Why PPO stopped.
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

    /// The optimiser, the schedule or a checkpoint refused.
    #[error(transparent)]
    Training(#[from] arete_training::Error),

    /// libtorch refused an operation (out of memory, no such device, …).
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),

    /// SIGINT or SIGTERM; the last iteration's checkpoint was written.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),

    /// A tensor's shape is not what a function asks for.
    #[error("{name}: expected shape {expected:?}, got {got:?}")]
    Shape {
        /// The argument.
        name: &'static str,
        /// The shape asked for.
        expected: Vec<i64>,
        /// The shape given.
        got: Vec<i64>,
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

    /// The prompts are not usable.
    #[error("{}: {field}: expected {expected}, got {got}", path.display())]
    Prompts {
        /// The file.
        path: PathBuf,
        /// The column or the rows meant.
        field: String,
        /// What would have been accepted.
        expected: String,
        /// What is there.
        got: String,
    },

    /// A prompt leaves no room for the replies.
    #[error(
        "{}: prompt {prompt_id}: expected at most {expected} tokens ({context} of the model less {reserved} for the \
         replies), got {got}",
        path.display()
    )]
    PromptTooLong {
        /// The file.
        path: PathBuf,
        /// The prompt.
        prompt_id: String,
        /// Tokens there is room for.
        expected: usize,
        /// The model's positions.
        context: usize,
        /// Tokens the replies and questions may take.
        reserved: usize,
        /// Tokens of the prompt.
        got: usize,
    },

    /// A directory is not a reward model that can be used here.
    #[error("{}: expected {expected}, got {got}", path.display())]
    NotAReward {
        /// The directory or file.
        path: PathBuf,
        /// What would have been accepted.
        expected: &'static str,
        /// What is there.
        got: String,
    },

    /// A reward model gave no number.
    #[error(
        "iteration {iteration}: the {what} for prompt {prompt_id} is {got}, not a finite number"
    )]
    NonFiniteScore {
        /// The iteration; 0 = before the first.
        iteration: u64,
        /// Which score.
        what: String,
        /// The prompt.
        prompt_id: String,
        /// The score.
        got: f64,
    },

    /// A reward model gave no number while its statistics were taken.
    #[error(
        "{what}: expected finite numbers, got {got}; are its weights damaged, or is f16 too narrow for it?"
    )]
    NotANumber {
        /// Whose scores.
        what: String,
        /// The first that is none.
        got: f64,
    },

    /// Sampler and trainer give the same tokens other probabilities, on the CPU.
    #[error(
        "sampler_trainer_difference: expected at most {limit} nats between a token's log-probability when sampled and when trained on, \
         got {difference}; rows of a batch depend on each other here (`arete-model machine` shows the self-tests): report it, \
         use dtype f32, or set allow_disagreement"
    )]
    Disagreement {
        /// The largest difference, in nats.
        difference: f64,
        /// The largest that rounding explains.
        limit: f64,
    },

    /// All conversations score the same: there is nothing to learn from.
    #[error(
        "{what}: expected scores that differ between conversations, got {got} for all {n}; is the reward model trained?"
    )]
    ZeroVariance {
        /// Whose scores.
        what: String,
        /// The score.
        got: f64,
        /// Number of conversations.
        n: usize,
    },

    /// The trainer's first forward pass does not repeat the log-probabilities of the rollout.
    #[error(
        "iteration {iteration}: expected ratio 1 before the first update, got a log-ratio of {got:e}: the forward pass is \
         not deterministic"
    )]
    Ratio {
        /// The iteration.
        iteration: u64,
        /// Largest |log ratio|.
        got: f64,
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
            Self::Interrupted(interrupted) => interrupted.class(),
            Self::Setting { .. } => Some(Class::Setting),
            Self::Prompts { .. }
            | Self::PromptTooLong { .. }
            | Self::NotAReward { .. }
            | Self::NonFiniteScore { .. }
            | Self::ZeroVariance { .. }
            | Self::NotANumber { .. } => Some(Class::Data),
            Self::Torch(_)
            | Self::Shape { .. }
            | Self::Ratio { .. }
            | Self::Disagreement { .. } => Some(Class::Other),
        }
    }
}

/// Checks a tensor's shape at a function's boundary.
pub(crate) fn check_shape(
    name: &'static str,
    tensor: &tch::Tensor,
    expected: &[i64],
) -> Result<(), Error> {
    if tensor.size() == expected {
        return Ok(());
    }
    Err(Error::Shape { name, expected: expected.to_vec(), got: tensor.size() })
}

/// What an error of this crate, or of those below it, is for the caller.
pub fn class_of(cause: &(dyn std::error::Error + 'static)) -> Option<Class> {
    match cause.downcast_ref::<Error>() {
        Some(error) => error.class(),
        None => arete_training::class_of(cause),
    }
}
