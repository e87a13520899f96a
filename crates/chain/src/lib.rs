//! The domain over the model: the conversations that every stage samples, reads, judges and scores.
//!
//! One way each to build a [conversation](constitution::Turns::conversation), to end a [cut reply](trim), to sample a chain, to read a reward model, to read
//! labelled pairs. Stages call these; they never write their own.

pub mod batches;
pub mod constitution;
pub mod conversation;
pub mod dialogue;
pub mod exemplars;
pub mod members;
pub mod memory;
pub mod pairs;
pub mod reading;
pub mod reward_model;
pub mod rulers;
pub mod sample;
pub mod trim;
pub mod verdicts;
pub mod words;
pub mod yardstick;

pub use constitution::{Constitution, Turn, Turns};
pub use conversation::{prompt_of, through, through_aspect};
pub use members::Member;
pub use reading::{CutReply, Reading, Transcript};
pub use reward_model::RewardModel;
pub use rulers::{NullRulers, Ruled};
pub use yardstick::Yardstick;
