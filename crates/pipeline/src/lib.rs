//! The pipeline on top of the stages: one list of them, and what can be done with it.
//!
//! In: a recipe, a model, prompts. Out: one directory a stage. [`stages`] is the list; [`setup`] resolves a recipe into the
//! stages' own settings; [`steps`] has the stages of every round in order; [`check`] refuses before the first stage what would fail at a later one; [`status`] looks at a run
//! without touching it; [`run`](mod@run) does what is not up to date, each stage in a process of its own; [`memory`] counts what the
//! stages of a recipe take; [`launch`] starts a program as several processes that train together. A stage is its crate's library, called here as its own thin program calls it.

pub mod check;
pub mod cluster;
pub mod diagnosis;
pub mod hello;
pub mod launch;
pub mod memory;
pub mod push;
pub mod run;
pub mod setup;
pub mod shell;
pub mod stages;
pub mod starter;
pub mod status;
pub mod steps;
pub mod sweep;
pub mod wandb;
