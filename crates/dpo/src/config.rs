//! Settings of the stage: flags, and the `[dpo]` table of a recipe.

use anyhow::{Result, bail};
use arete_chain::memory::{Demand, Role};
use arete_records::Refusal;
use arete_records::table::Column;
use arete_stage::settings;
use arete_training::{ComputeArgs, Counted, LoopArgs, LoraArgs, Pace};
use serde::{Deserialize, Serialize};

pub use arete_training::pairs::{Label, OverLength};

/// What a pair's lead is compared with (TRL's names).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum LossType {
    /// −log σ(beta · lead), the lead in nats of whole replies (Rafailov et al. 2023).
    Sigmoid,
    /// (lead − 1 / (2 beta))², the lead in nats a token (Azar et al. 2023, with the length as TRL divides by it).
    Ipo,
    /// −log σ(beta · lead), the lead in nats a token: long replies gain nothing by their length (Lambert et al. 2024 use beta = 5).
    SigmoidNorm,
}

/// Settings of direct preference optimisation.
#[derive(Clone, Debug, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct Config {
    /// Base model (after SFT: the merged SFT directory): a Hugging Face directory, a GGUF file, or a hub id
    #[arg(long)]
    pub model: Option<String>,
    /// Aspects whose pairs are trained on, separated by commas (all that the preferences have)
    #[arg(long, value_delimiter = ',', value_name = "ASPECT")]
    #[serde(default)]
    pub aspects: Vec<String>,
    /// With --pairs: a column under another name than ours, as prompt=question; may be given more than once
    #[arg(long = "column", value_name = "OURS=THEIRS")]
    #[serde(default)]
    pub column: Option<Vec<Column>>,
    /// The adapter's shape.
    #[command(flatten)]
    #[serde(flatten)]
    pub lora: LoraArgs,
    /// What a pair's lead over the reference is compared with
    #[arg(long, value_enum, default_value_t = LossType::Sigmoid)]
    pub loss_type: LossType,
    /// How strongly the policy is held to the reference, per nat (TRL: 0.1); with `ipo` the paper's τ
    #[arg(long, default_value_t = 0.1)]
    pub beta: f64,
    /// Probability that a label is wrong, below one half (conservative DPO, Mitchell 2023)
    #[arg(long, default_value_t = 0.0)]
    pub label_smoothing: f64,
    /// What the loss aims at
    #[arg(long, value_enum, default_value_t = Label::Soft)]
    pub label: Label,
    /// Highest learning rate (TRL's example with LoRA: 5e-6)
    #[arg(long, default_value_t = 5e-6)]
    pub learning_rate: f64,
    /// Part of all steps in which the learning rate rises from 0 (Alignment Handbook)
    #[arg(long, default_value_t = 0.1)]
    pub warmup_ratio: f64,
    /// Passes over the pairs
    #[arg(long, default_value_t = 1)]
    pub epochs: u64,
    /// Pairs an optimiser step
    #[arg(long, default_value_t = 16)]
    pub batch_size: usize,
    /// Most tokens of a conversation
    #[arg(long, default_value_t = 512)]
    pub max_length: usize,
    /// What happens to longer ones
    #[arg(long, value_enum, default_value_t = OverLength::TruncateLeft)]
    pub over_length: OverLength,
    /// Fewest pairs to train on
    #[arg(long, default_value_t = 20)]
    pub min_pairs: usize,
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
        settings::positive("beta", self.beta)?;
        if !(0.0..0.5).contains(&self.label_smoothing) {
            let expected = "a probability below one half";
            bail!(Refusal::setting("label_smoothing", expected, self.label_smoothing));
        }
        Ok(())
    }

    /// Columns of a file of pairs under other names than ours.
    pub(crate) fn columns(&self) -> &[Column] {
        self.column.as_deref().unwrap_or_default()
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
        Counted { lora, compute, steps, batch_size, max_length, merge }.demand("dpo", Role::Dpo)
    }
}
