//! Reward models: a scalar head and a LoRA adapter that prefer the better of two conversations.
//!
//! Inputs: `preferences/<name>/{train,validation}.parquet`, a set of a turn or a virtue each, or human pairs in the hub's hh-rlhf
//! form; a base model. Outputs, in one directory a set: `adapter/` (peft, SEQ_CLS with the head), `score_stats.json`, `evaluation.json`,
//! with `--merge` `merged/` (a `…ForSequenceClassification` directory), `metrics.jsonl`, `run.json`. With `--folds K` human pairs make
//! K of them, each trained without the questions of its own fold, and the card of both judges, `yardstick.json`.
//!
//! Method: Bradley–Terry (see [`loss`]); the input is the whole chat template of a conversation, the score is read at its
//! last token. Deviations from TRL's `RewardTrainer`: chosen and rejected are one packed tree whose common tokens
//! are computed once; over-long conversations are cut or dropped as told, not silently dropped; rows whose sides
//! are identical after cutting are left out and counted; labels may be soft.

pub mod bench;
pub mod config;
pub mod data;
mod dry;
mod folds;
pub mod loss;
pub mod model;
pub mod objective;
pub mod score;
mod sets;
mod stage;
mod statistics;

pub use config::Config;
pub use dry::dry_run;
pub use stage::{PreferenceSource, TrainInputs, train};
