//! Supervised fine-tuning: a LoRA adapter that imitates demonstrations, and the model merged with it.
//!
//! Inputs: `demonstrations.parquet` (rows of split `train`; `validation` for evaluation), or any Parquet or JSON-lines
//! file with `messages`, or `prompt` and `completion`; a chat model. Outputs, in one directory: `adapter/` (peft),
//! `merged/` (a Hugging Face model, the base of every later stage), `metrics.jsonl`, `run.json`.
//!
//! Method: the mean of −log P over the tokens the assistant would write itself, the end of turn included
//! (`arete_model::chain` marks them). Deviations from TRL's `SFTTrainer` with `assistant_only_loss`: sequences are packed
//! without padding, and while training `mean_token_accuracy` is taken over at most [`ACCURACY_ROWS`] evenly spaced target
//! tokens a step, because the product with the vocabulary would cost more than the number is worth (in evaluations it
//! is over all of them).

pub mod bench;
pub mod config;
pub mod data;
pub mod objective;
mod stage;

pub use config::Config;
pub use objective::ACCURACY_ROWS;
pub use stage::{dry_run, train};
