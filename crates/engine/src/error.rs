//! The crate's one error type.

use arete_records::{Class, Classified};
use arete_stage::interrupt::Interrupted;

use crate::canary::Verdict;

/// Why servers could not do the work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Reading or writing a file failed; the message names the path.
    #[error(transparent)]
    Io(#[from] std::io::Error),

    /// A file could not be written.
    #[error(transparent)]
    Records(#[from] arete_records::Error),

    /// The model here could not be run, or its template refuses a conversation.
    #[error(transparent)]
    Model(#[from] arete_model::Error),

    /// A signal asked the work to stop.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),

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

    /// A server answers with other weights than it should.
    #[error("{url}: canary of {weights}: {verdict}")]
    Weights {
        /// The server.
        url: String,
        /// What it was asked to answer with: an adapter's name, or the base's.
        weights: String,
        /// What its answer looks like.
        verdict: Verdict,
    },

    /// A reward model's server gives other scores than the reward model here.
    #[error(
        "{url}: scores of {name}: expected those of the reward model here within {limit} (reward_tolerance, in standard deviations), \
         got a mean difference of {difference:.4}: is it served over the same base, with its own head, and without an activation?"
    )]
    Scores {
        /// The server.
        url: String,
        /// The reward model.
        name: String,
        /// The mean difference, in standard deviations.
        difference: f64,
        /// The largest that is taken for rounding.
        limit: f64,
    },

    /// Servers give the tokens they sampled other probabilities than the trainer.
    #[error(
        "engine_difference: expected log-probabilities of servers' replies within {limit} nats of the trainer's on the mean of tokens, got \
         {difference:.4} (at most {largest:.3}){hint}"
    )]
    Disagreement {
        /// The mean difference, in nats.
        difference: f64,
        /// The largest of a token.
        largest: f64,
        /// What is allowed.
        limit: f64,
        /// What it looks like, if it looks like something.
        hint: &'static str,
    },

    /// Servers refuse a conversation that must be sampled.
    #[error("engine_urls: {item}: expected a reply, got a refusal: {reason}")]
    Refused {
        /// The conversation.
        item: String,
        /// What the server said.
        reason: String,
    },

    /// Every server is gone.
    #[error(
        "engine_urls: none of {n} servers is left, and none came back within {waited_s:.0} s (engine_wait_s); the last: {reason}"
    )]
    NoneLeft {
        /// How many there were.
        n: usize,
        /// How long was waited for one.
        waited_s: f64,
        /// What the last one failed with.
        reason: String,
    },
}

impl Classified for Error {
    fn class(&self) -> Option<Class> {
        match self {
            Self::Io(_) => Some(Class::System),
            Self::Records(error) => error.class(),
            Self::Model(error) => error.class(),
            Self::Interrupted(signal) => signal.class(),
            Self::Setting { .. } => Some(Class::Setting),
            Self::Server { .. }
            | Self::Weights { .. }
            | Self::Scores { .. }
            | Self::Disagreement { .. }
            | Self::Refused { .. }
            | Self::NoneLeft { .. } => Some(Class::Unavailable),
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
