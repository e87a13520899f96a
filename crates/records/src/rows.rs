//! One struct per Parquet file that stages exchange; fields in column order.

use serde::{Deserialize, Serialize};

pub use crate::turn_rows::{ConversationRow, RolloutRow, RolloutTurn, TurnRow};
use crate::{Aspect, FinishReason, Message, Split, Virtue};

/// A row of `prompts.parquet`: a question to answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PromptRow {
    /// [`crate::prompt_id`] of `prompt`.
    pub prompt_id: String,
    /// [`crate::split_of`] `prompt`.
    pub split: Split,
    /// Where the prompt came from (a file name or a data set's id).
    pub source: String,
    /// The messages to answer; the last is the user's.
    pub prompt: Vec<Message>,
}

/// One critique and revision of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// The principle the answer was measured by.
    pub principle: String,
    /// What is wrong with the answer.
    pub critique: String,
    /// The better answer.
    pub revision: String,
}

/// A row of `demonstrations.parquet`: a conversation to imitate, and how it came about.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DemonstrationRow {
    /// Id of the prompt.
    pub prompt_id: String,
    /// Split of the prompt.
    pub split: Split,
    /// `self` (the model's own revision) or `own` (a shipped exemplar).
    pub source: String,
    /// The first answer, before any revision.
    pub initial: String,
    /// Critiques and revisions, in order.
    pub rounds: Vec<Round>,
    /// The conversation to imitate.
    pub messages: Vec<Message>,
}

/// A row of `judgements.parquet`: one virtue's verdict on the two samples of a prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JudgementRow {
    /// Id of the prompt.
    pub prompt_id: String,
    /// Split of the prompt.
    pub split: Split,
    /// What was judged.
    pub aspect: Aspect,
    /// By which virtue.
    pub virtue: Virtue,
    /// How the verdict was read (for instance `pairwise-logits`).
    pub method: String,
    /// The judge's name.
    pub judge: String,
    /// P(sample 0 preferred | sample 0 shown first); null = abstained.
    pub p_ab: Option<f32>,
    /// P(sample 1 preferred | sample 1 shown first); null = abstained.
    pub p_ba: Option<f32>,
    /// P(sample 0 preferred), order-debiased; null = abstained.
    pub p_sample0: Option<f32>,
    /// The preferred sample, 0 or 1; null = too close to call, or abstained.
    pub vote: Option<i32>,
}

/// A row of `preferences/<aspect>/<split>.parquet`: a pair for training a reward model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PreferenceRow {
    /// What both sides share.
    pub prompt: Vec<Message>,
    /// The better side, everything after `prompt`.
    pub chosen: Vec<Message>,
    /// The worse side, everything after `prompt`.
    pub rejected: Vec<Message>,
    /// Votes for `chosen`, at most one a virtue.
    pub score_chosen: i32,
    /// Votes for `rejected`, at most one a virtue.
    pub score_rejected: i32,
    /// Mean over virtues of P(chosen preferred); may be below ½.
    pub chosen_prob: f32,
    /// Id of the prompt.
    pub prompt_id: String,
    /// Whether the chosen side's own reply ends where the token limit cut it (a trimmed one ends with a sentence).
    pub truncated_chosen: bool,
    /// The same of the rejected side's.
    pub truncated_rejected: bool,
}

/// A row of `scores.parquet`: one reward model's score of one model's reply to a test prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScoreRow {
    /// The scored model: `original`, `sft`, `final`, …
    pub model: String,
    /// Id of the prompt.
    pub prompt_id: String,
    /// The reply's aspect, and with it the reward model.
    pub aspect: Aspect,
    /// Raw score.
    pub score: f32,
    /// Standardised score.
    pub z: f32,
    /// Of an answer, score of the yardstick, if there is one: in standard deviations of its held-out human replies.
    pub yardstick: Option<f32>,
    /// The same of the yardstick's second judge, a bag of words and length.
    pub yardstick_words: Option<f32>,
    /// Tokens sampled for the reply.
    pub n_tokens: i32,
    /// Why the reply ended.
    pub finish_reason: FinishReason,
}
