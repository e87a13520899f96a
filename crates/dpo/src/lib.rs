//! Direct preference optimisation: a LoRA policy that finds the better of two conversations likelier than its start does.
//!
//! Inputs: `preferences/<aspect>/{train,validation}.parquet` of all aspects (or those named), or one file of labelled pairs; a base
//! model, on which PPO would start. Outputs, in one directory: `adapter/` (peft), `merged/` (a Hugging Face model), `evaluation.json`,
//! `metrics.jsonl`, `run.json`.
//!
//! Method: see [`loss`]. The reference is the base with the adapter off, its log-probabilities computed once a pair. The tokens
//! that count are those the policy would write itself after the last message that both sides share, end of turn
//! included. Deviations from TRL's `DPOTrainer`: what the template writes (the user's turns of a chain, what follows an
//! end of turn) does not count; a reply that the token limit cut has no end of turn; a pair is one packed tree, whose common
//! prompt is computed once; labels may be soft; `label_smoothing` is that of conservative DPO; a step's loss is one mean over
//! its pairs however it is cut into forward passes; sides that are identical after cutting are left out and counted.

pub mod bench;
pub mod config;
pub mod data;
pub mod loss;
pub mod model;
pub mod objective;
mod stage;

pub use config::Config;
pub use data::PairSource;
pub use stage::{dry_run, train};
