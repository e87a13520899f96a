//! Settings of the stage: flags, and the `[sft]` table of a recipe.

use anyhow::Result;
use arete_chain::memory::{Demand, Role};
use arete_records::Refusal;
use arete_records::table::Column;
use arete_stage::settings;
use arete_training::{ComputeArgs, Counted, LoopArgs, LoraArgs, Pace};
use serde::{Deserialize, Serialize};

/// What happens to a conversation longer than `max_length`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum OverLength {
    /// Its first `max_length` tokens are kept (TRL's default).
    TruncateRight,
    /// It is left out.
    Drop,
}

/// Settings of supervised fine-tuning.
#[derive(Clone, Debug, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct Config {
    /// Model to start from: a Hugging Face directory, a GGUF file, or a hub id
    #[arg(long)]
    pub model: Option<String>,
    /// The adapter's shape.
    #[command(flatten)]
    #[serde(flatten)]
    pub lora: LoraArgs,
    /// Highest learning rate (2e-4, QLoRA's)
    #[arg(long, default_value_t = 2e-4)]
    pub learning_rate: f64,
    /// Part of all steps in which the learning rate rises from 0
    #[arg(long, default_value_t = 0.03)]
    pub warmup_ratio: f64,
    /// Passes over the demonstrations
    #[arg(long, default_value_t = 3)]
    pub epochs: u64,
    /// Conversations an optimiser step
    #[arg(long, default_value_t = 16)]
    pub batch_size: usize,
    /// Most tokens of a conversation
    #[arg(long, default_value_t = 1024)]
    pub max_length: usize,
    /// A column under another name than ours, as prompt=question; may be given more than once
    #[arg(long = "column", value_name = "OURS=THEIRS")]
    #[serde(default)]
    pub column: Option<Vec<Column>>,
    /// What happens to longer ones
    #[arg(long, value_enum, default_value_t = OverLength::TruncateRight)]
    pub over_length: OverLength,
    /// The step loop.
    #[command(flatten)]
    #[serde(flatten)]
    pub steps: LoopArgs,
    /// How the frozen model is held, and where it computes.
    #[command(flatten)]
    #[serde(flatten)]
    pub compute: ComputeArgs,
    /// Seed of the adapter's first values and of the order of the data
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl Config {
    /// Refuses what no training can use.
    ///
    /// # Errors
    ///
    /// A refused setting.
    pub fn check(&self) -> Result<()> {
        let &Self { learning_rate, warmup_ratio, epochs, batch_size, .. } = self;
        self.lora.check()?;
        self.steps.check(Pace { learning_rate, warmup_ratio, epochs, batch_size })?;
        settings::at_least("max_length", self.max_length, 2)?;
        Ok(())
    }

    /// What is counted of the memory that training takes.
    ///
    /// # Errors
    ///
    /// [`Refusal::BadSetting`] for a size of 0.
    pub fn demand(&self) -> Result<Demand, Refusal> {
        let &Self { batch_size, max_length, .. } = self;
        let (lora, compute, steps) = (&self.lora, &self.compute, &self.steps);
        let merge = None;
        Counted { lora, compute, steps, batch_size, max_length, merge }.demand("sft", Role::Sft)
    }
}
