//! What can be set about prompts.

use anyhow::Result;
use arete_records::table::Column;
use arete_stage::settings;
use serde::{Deserialize, Serialize};

use super::Context;

/// Settings of `prompts`.
#[derive(Debug, Clone, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct PromptsConfig {
    /// How much of a conversation becomes the prompt
    #[arg(long, value_enum, default_value = "opening")]
    pub context: Context,
    /// Most prompts to keep, spread evenly over the inputs; 0 keeps all
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub limit: usize,
    /// Most prompts of the training split, which conversations, SFT and PPO learn from; 0 keeps all
    #[arg(long, default_value_t = 0, value_name = "N")]
    #[serde(default)]
    pub max_train: usize,
    /// Most prompts of the validation split, which probes and reward model evaluation read; 0 keeps all
    #[arg(long, default_value_t = 0, value_name = "N")]
    #[serde(default)]
    pub max_validation: usize,
    /// Most prompts of the test split, which only scoring reads; 0 keeps all
    #[arg(long, default_value_t = 0, value_name = "N")]
    #[serde(default)]
    pub max_test: usize,
    /// Longer prompts (in characters) are left out and counted
    #[arg(long, default_value_t = 2000, value_name = "N")]
    pub max_chars: usize,
    /// Name to record as every prompt's source, instead of what the records say
    #[arg(long, value_name = "NAME")]
    #[serde(default)]
    pub source: Option<String>,
    /// A column under another name than ours, as prompt=question; may be given more than once
    #[arg(long = "column", value_name = "OURS=THEIRS")]
    #[serde(default)]
    pub column: Option<Vec<Column>>,
    /// Seed of the spread
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl PromptsConfig {
    /// Refuses what the stage cannot use, before it begins.
    ///
    /// # Errors
    ///
    /// A refused setting.
    pub fn check(&self) -> Result<()> {
        Ok(settings::at_least("max_chars", self.max_chars, 1)?)
    }
}
