//! Settings of the stage: flags, and the `[dpo]` table of a recipe.

use arete_training::{ComputeArgs, LoopArgs, LoraArgs};
use serde::{Deserialize, Serialize};

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

/// What happens to a conversation longer than `max_length`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum OverLength {
    /// Its last `max_length` tokens are kept. Both sides of a pair lose the same tokens where these are common to both.
    TruncateLeft,
    /// Its first `max_length` tokens are kept (TRL's `keep_start`).
    TruncateRight,
    /// The pair is left out.
    Drop,
}

/// What the loss aims at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Label {
    /// The chosen side wins with probability `chosen_prob`.
    Soft,
    /// The chosen side wins (TRL).
    Hard,
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
