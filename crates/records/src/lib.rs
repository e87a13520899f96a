//! The contract between Arete's stages: what they exchange, and how they read, write and report it.
//!
//! Stages meet in files. This crate owns the files: the [vocabulary](Aspect), one struct per
//! [row](rows), [Parquet](parquet) in and out, [recipes](recipe), [run.json](run), and the
//! arithmetic ([statistics](stats)) and reporting ([metrics], [cli]) they share. No tensors here.

pub mod atomic;
pub mod cli;
pub mod dialogue;
mod error;
pub mod interrupt;
pub mod jsonl;
mod message;
pub mod metrics;
pub mod parquet;
pub mod recipe;
pub mod rows;
pub mod run;
pub mod score_stats;
pub mod stats;
mod tfevents;
pub mod timings;
mod vocabulary;

pub use error::Error;
pub use message::{Message, Role, normalise, prompt_id, split_of};
pub use score_stats::ScoreStats;
pub use vocabulary::{Aspect, FinishReason, Split, Virtue};
