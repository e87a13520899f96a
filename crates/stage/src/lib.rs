//! The frame around a stage: recipes, `run.json`, signals, progress, metrics, exit codes. No tensors here.
//!
//! Goes in: a command line, a recipe, an output directory. Comes out: the [resolved settings](recipe), the decision
//! whether there is [work](run), and [one exit code](exit) for every way to fail.

pub mod cli;
pub mod clock;
mod crc;
pub mod dry;
mod error;
pub mod exit;
pub mod inputs;
pub mod interrupt;
mod memory;
pub mod metrics;
mod progress;
mod protobuf;
mod ranges;
pub mod recipe;
pub mod rounds;
pub mod run;
pub mod seal;
pub mod settings;
mod tfevents;
pub mod timings;
pub mod units;
pub mod wandb;

pub use error::Error;
