//! Scoring: how a run's models compare, the page that shows it, and the diagnosis of a run that went nowhere.
//!
//! Inputs: the files of a run (`prompts`, `reward`, `ppo`, …), the models. Outputs: `scores.parquet`, `coherence.parquet`,
//! `replies/<model>.parquet`, `summary.json`; `report.html` with its charts as SVG; the diagnosis as text.
//!
//! Method: every model answers the test prompts with the chain of turns from the same random streams; each aspect's
//! reward model scores the conversation up to that aspect's reply; Score = μ − 0.5 σ over all 3n scores, as the
//! report has it. Deviations from the report: f64 instead of half precision, standardised scores and each
//! aspect beside the raw Score, paired bootstrap intervals clustered by prompt, a coherence guard, and, if there is
//! one, the answers' scores by a yardstick that no training saw. A run is judged by one comparison that its recipe names before
//! it (`endpoint`), read at equal length; what the labels themselves were made of is marked as circular.

pub mod best_of;
pub mod coherence;
pub mod compare;
pub mod config;
pub mod distil;
pub mod doctor;
pub mod dry;
pub mod endpoint;
pub mod front;
pub mod gold;
mod labels;
pub mod policies;
pub mod replies;
pub mod report;
pub mod rewards;
pub mod rows;
pub mod run_files;
pub mod score;
mod servers;
pub mod summary;
pub mod table;

use arete_chain::verdicts as judge;
pub use config::ScoreConfig;
pub use report::{ReportInputs, report};
pub use run_files::RunFiles;
pub use score::{ScoreInputs, score};
