//! Rows of this stage's own files, beside the `scores.parquet` that all stages know.

use std::sync::Arc;

use arete_chain::sample::SampledChain;
use arete_records::Aspect;
use arete_records::parquet::{FieldRef, Row};
use arrow::datatypes::{DataType, Field};
use serde::{Deserialize, Serialize};

/// A row of `coherence.parquet`: one reply, and how the base finds it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CoherenceRow {
    /// Who replied.
    pub model: String,
    /// To which prompt.
    pub prompt_id: String,
    /// In which turn.
    pub aspect: Aspect,
    /// log P of the sampled tokens (end of turn included) under the base, summed, nats; at temperature 1, after the same
    /// prompt and the model's own earlier turns.
    pub base_logprob: f32,
    /// Number of those tokens: all that were sampled. Of a model with another vocabulary than the base's, tokens of the
    /// reply's text in the base's vocabulary.
    pub n_base_tokens: i32,
    /// Part of its runs of four words that stood in it before; null below four words.
    pub repeated_4grams: Option<f32>,
    /// Whether it has no text.
    pub empty: bool,
}

/// A row of `policy_preferences.parquet`: how probable a policy finds the two sides of a labelled pair.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PolicyPreferenceRow {
    /// The policy.
    pub model: String,
    /// Row or line of the pair in its file, from 1.
    pub pair: i32,
    /// Mean log P per token of the chosen reply, nats.
    pub logprob_chosen: f32,
    /// Mean log P per token of the rejected reply, nats.
    pub logprob_rejected: f32,
    /// Tokens of the chosen reply.
    pub n_tokens_chosen: i32,
    /// Tokens of the rejected reply.
    pub n_tokens_rejected: i32,
}

/// What a unit of scoring leaves behind until all are done.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct MeasureRow {
    pub(crate) prompt_id: String,
    /// A turn, or a virtue in the answer.
    pub(crate) aspect: Aspect,
    /// None of a turn that has no reward model.
    pub(crate) score: Option<f32>,
    pub(crate) base_logprob: f32,
    pub(crate) n_base_tokens: i32,
    /// log P of a turn's sampled tokens under the model less that under the base, at the sampling temperature, nats.
    pub(crate) kl: Option<f32>,
    /// Whether the model's tokens mean nothing to the base, so that the reply's text was tokenised anew.
    pub(crate) retokenised: bool,
}

/// The tokens of a sampled chain, until they are measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct TokensRow {
    pub(crate) prompt_id: String,
    /// SHA-256 of the vocabulary they belong to.
    pub(crate) vocabulary: String,
    /// Prompt, replies and what joins them.
    pub(crate) token_ids: Vec<i32>,
    /// Where the replies begin and end: begin, end, begin, end, begin, end.
    pub(crate) bounds: Vec<i32>,
    /// log P of each reply under the model itself, at the sampling temperature; none where that is 0.
    pub(crate) logprobs: Vec<f32>,
}

impl TokensRow {
    pub(crate) fn of(prompt_id: &str, chain: &SampledChain, vocabulary: &str) -> Self {
        let id = |id: &i64| i32::try_from(*id).expect("vocabularies are far below 2³¹");
        let place = |at: usize| i32::try_from(at).expect("conversations are far below 2³¹ tokens");
        Self {
            prompt_id: prompt_id.to_owned(),
            vocabulary: vocabulary.to_owned(),
            token_ids: chain.token_ids.iter().map(id).collect(),
            bounds: chain
                .replies
                .iter()
                .flat_map(|reply| [place(reply.tokens.start), place(reply.tokens.end)])
                .collect(),
            logprobs: Vec::new(),
        }
    }
}

/// What a unit of the yardstick's scoring leaves behind until all are done.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct YardstickRow {
    pub(crate) prompt_id: String,
    pub(crate) score: f32,
    /// By the second judge, where the yardstick has one.
    pub(crate) words: Option<f32>,
}

fn fields(columns: &[(&str, DataType, bool)]) -> Vec<FieldRef> {
    columns
        .iter()
        .map(|(name, kind, nullable)| Arc::new(Field::new(*name, kind.clone(), *nullable)))
        .collect()
}

const TEXT: DataType = DataType::Utf8;

impl Row for CoherenceRow {
    const NAME: &'static str = "coherence";

    fn fields() -> Vec<FieldRef> {
        fields(&[
            ("model", TEXT, false),
            ("prompt_id", TEXT, false),
            ("aspect", TEXT, false),
            ("base_logprob", DataType::Float32, false),
            ("n_base_tokens", DataType::Int32, false),
            ("repeated_4grams", DataType::Float32, true),
            ("empty", DataType::Boolean, false),
        ])
    }
}

impl Row for PolicyPreferenceRow {
    const NAME: &'static str = "policy preference";

    fn fields() -> Vec<FieldRef> {
        fields(&[
            ("model", TEXT, false),
            ("pair", DataType::Int32, false),
            ("logprob_chosen", DataType::Float32, false),
            ("logprob_rejected", DataType::Float32, false),
            ("n_tokens_chosen", DataType::Int32, false),
            ("n_tokens_rejected", DataType::Int32, false),
        ])
    }
}

impl Row for MeasureRow {
    const NAME: &'static str = "measure";

    fn fields() -> Vec<FieldRef> {
        fields(&[
            ("prompt_id", TEXT, false),
            ("aspect", TEXT, false),
            ("score", DataType::Float32, true),
            ("base_logprob", DataType::Float32, false),
            ("n_base_tokens", DataType::Int32, false),
            ("kl", DataType::Float32, true),
            ("retokenised", DataType::Boolean, false),
        ])
    }
}

impl Row for TokensRow {
    const NAME: &'static str = "sampled tokens";

    fn fields() -> Vec<FieldRef> {
        let list = |kind| DataType::List(Arc::new(Field::new("element", kind, false)));
        let numbers = || list(DataType::Int32);
        fields(&[
            ("prompt_id", TEXT, false),
            ("vocabulary", TEXT, false),
            ("token_ids", numbers(), false),
            ("bounds", numbers(), false),
            ("logprobs", list(DataType::Float32), false),
        ])
    }
}

impl Row for YardstickRow {
    const NAME: &'static str = "yardstick score";

    fn fields() -> Vec<FieldRef> {
        fields(&[
            ("prompt_id", TEXT, false),
            ("score", DataType::Float32, false),
            ("words", DataType::Float32, true),
        ])
    }
}
