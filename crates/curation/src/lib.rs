//! Prompts, Constitutional-AI demonstrations, conversations, judged preference pairs.
//!
//! | subcommand | reads | writes |
//! |---|---|---|
//! | `prompts` | hh-rlhf and its kin, or prompts of our own | `prompts.parquet` |
//! | `demonstrations` | prompts, a model, constitution, exemplars | `demonstrations.parquet` |
//! | `conversations` | prompts, a model | `conversations.parquet` |
//! | `preferences` | conversations, a judge | `judgements.parquet`, `<aspect>/<split>.parquet` |
//! | `calibrate` | labelled pairs, a judge | `calibration.json`, `calibration.md` |
//! | `merge` | the parts of a job array | what the stage itself would have written |
//! | `lessons` | labelled pairs | conversations that train a judge's adapter |
//! | `export` | preferences | hh-rlhf's text form |
//! | `bench` | a model | a table of speeds on stdout |
//!
//! Method: for each prompt, two samples of the chain of the constitution (as shipped answer, motivation, consequence);
//! for each aspect and virtue, a judge compares the two conversations up to that aspect in both
//! orders, and its verdict is read from the logits of the labels, so that a preference for the
//! first place cancels; the virtues' votes make the preference.
//!
//! Deviations from `report.txt`: verdicts from logits in both orders instead of one written verdict
//! (`method = "pairwise-text"`, `orders = "one"` is the report's way); truncated replies are
//! counted, and dropped or trimmed by recipe (`truncated = "keep"` is the report's way).
//!
//! Work proceeds in fixed [units](arete_stage::units) of 32 prompts, each written as a file of its own: a killed
//! run continues, and parts of a job array join to the same bytes.

pub mod bench;
pub mod calibrate;
pub mod config;
pub mod conversations;
pub mod demonstrations;
pub mod engine;
pub mod export;
pub mod judge;
pub mod lessons;
pub mod memory;
pub mod merge;
pub mod preferences;
pub mod prompts;
mod splits;
pub mod stage;
mod words;
