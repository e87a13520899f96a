//! The contract between Arete's stages: the words, rows and files they exchange, and their statistics.
//!
//! Stages meet in files. This crate owns them: the [names](Aspect) that a constitution gives, one struct per [row](rows),
//! [Parquet](parquet) in and out (feature `parquet`, on by default), [atomic] writing, reading [files] of strangers,
//! [content hashes](hashes), the [statistics](stats) that stages share, and how a failure [counts](Class). No tensors and no
//! command lines here.

pub mod atomic;
mod class;
mod error;
pub mod files;
pub mod hashes;
pub mod jsonl;
#[cfg(feature = "parquet")]
pub mod left_out;
mod message;
mod names;
#[cfg(feature = "parquet")]
pub mod parquet;
pub mod progress;
pub mod proxy;
pub mod redact;
pub mod rows;
#[cfg(feature = "statistics")]
pub mod score_stats;
pub mod sealed;
#[cfg(feature = "statistics")]
pub mod stats;
#[cfg(feature = "parquet")]
pub mod table;
mod turn_rows;
mod vocabulary;

pub use class::{At, Class, Classified, Refusal, class_of, memory_refused};
pub use error::Error;
pub use message::{
    Message, Role, fill_splits, fold_of, hex, normalise, opening_id, prompt_id, split_of,
};
pub use names::{Aspect, MAX_NAME_BYTES, NAME_RULE, Virtue};
#[cfg(feature = "statistics")]
pub use score_stats::ScoreStats;
pub use vocabulary::{FinishReason, Split};
