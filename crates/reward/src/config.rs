//! Settings of the stage: flags, and the `[reward]` (or `[yardstick]`) table of a recipe.

use arete_model::{LoraConfig, Target};
use arete_training::runtime::Dtype;
use arete_training::{ScheduleKind, Select};
use clap::ArgAction;
use serde::{Deserialize, Serialize};

/// What happens to a conversation longer than `max_length`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum OverLength {
    /// Its last `max_length` tokens are kept, and with them the answer and its end. Both sides of a pair lose the same
    /// tokens where these are common to both.
    TruncateLeft,
    /// Its first `max_length` tokens are kept (the report's setting; no end of turn is seen).
    TruncateRight,
    /// The pair is left out (TRL's `RewardTrainer`).
    Drop,
}

/// What the loss aims at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Label {
    /// The chosen side wins with probability `chosen_prob`.
    Soft,
    /// The chosen side wins.
    Hard,
}

/// Settings of reward modelling.
#[derive(Clone, Debug, PartialEq, clap::Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Base model (after SFT: the merged SFT directory): a Hugging Face directory, a GGUF file, or a hub id
    #[arg(long)]
    pub model: Option<String>,
    /// LoRA rank (Hu et al. 2021)
    #[arg(long, default_value_t = 16)]
    pub rank: usize,
    /// LoRA alpha; the update is scaled by alpha / rank
    #[arg(long, default_value_t = 32.0)]
    pub alpha: f64,
    /// Linear layers that get an update, separated by commas (all, as in QLoRA)
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Target::ALL)]
    pub targets: Vec<Target>,
    /// Highest learning rate (TRL's RewardConfig: 1e-4; the report: 1.41e-5)
    #[arg(long, default_value_t = 1e-4)]
    pub learning_rate: f64,
    /// How the learning rate falls after the warm-up
    #[arg(long, value_enum, default_value_t = ScheduleKind::Cosine)]
    pub schedule: ScheduleKind,
    /// Part of all steps in which the learning rate rises from 0
    #[arg(long, default_value_t = 0.05)]
    pub warmup_ratio: f64,
    /// Passes over the pairs
    #[arg(long, default_value_t = 2)]
    pub epochs: u64,
    /// Stop after so many steps, whatever the epochs
    #[arg(long)]
    pub max_steps: Option<u64>,
    /// Pairs an optimiser step (the report: 20 · 16 accumulation steps = 320)
    #[arg(long, default_value_t = 20)]
    pub batch_size: usize,
    /// Most tokens in one forward pass (a longer pair goes alone); bounds memory, changes results only by rounding
    #[arg(long, default_value_t = 1024)]
    pub micro_batch_tokens: usize,
    /// Most tokens of a conversation
    #[arg(long, default_value_t = 512)]
    pub max_length: usize,
    /// What happens to longer ones
    #[arg(long, value_enum, default_value_t = OverLength::TruncateLeft)]
    pub over_length: OverLength,
    /// What the loss aims at
    #[arg(long, value_enum, default_value_t = Label::Soft)]
    pub label: Label,
    /// Lead demanded of the chosen score for every vote that the sides differ by
    #[arg(long, default_value_t = 0.0)]
    pub margin_per_vote: f64,
    /// Weight of the penalty (chosen + rejected)² that keeps scores around 0 (Eisenstein et al. 2023 use 0.01); 0 = none
    #[arg(long, default_value_t = 0.01)]
    pub center_rewards_coefficient: f64,
    /// Fewest pairs to train on
    #[arg(long, default_value_t = 20)]
    pub min_pairs: usize,
    /// Control: flip each training pair by the toss of a coin, which leaves nothing to learn
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub shuffle_labels: bool,
    /// With --pairs: train on the held-out fifth as well
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub all_pairs: bool,
    /// Write the merged model (…ForSequenceClassification) as well
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub merge: bool,
    /// Decoupled weight decay
    #[arg(long, default_value_t = 0.0)]
    pub weight_decay: f64,
    /// Largest norm of the gradient; 0 = no clipping
    #[arg(long, default_value_t = 1.0)]
    pub max_grad_norm: f64,
    /// Steps between evaluations on the validation split; 0 = only after the last
    #[arg(long, default_value_t = 20)]
    pub eval_every: u64,
    /// Steps between checkpoints; 0 = only after the last and on a signal
    #[arg(long, default_value_t = 20)]
    pub checkpoint_every: u64,
    /// Newest checkpoints kept while training
    #[arg(long, default_value_t = 2)]
    pub keep_checkpoints: usize,
    /// Weights to end with: of the last step, or of the lowest validation loss
    #[arg(long, value_enum, default_value_t = Select::Last)]
    pub select: Select,
    /// Pack the frozen model's blocks to NF4 while training (QLoRA)
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub nf4: bool,
    /// Quantise the NF4 scales as well
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub double_quantize: bool,
    /// Keep only each block's input for the backward pass and run the block again there: less memory, a third more time
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub recompute: bool,
    /// Number format of the frozen model and of activations
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    /// Where to compute: cpu, cuda, cuda:N, or auto
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// CPU threads; 0 = one a core
    #[arg(long, default_value_t = 0)]
    pub threads: u32,
    /// Seed of the first values and of the order of the data
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl Config {
    /// The adapter's shape.
    pub fn lora(&self) -> LoraConfig {
        LoraConfig { rank: self.rank, alpha: self.alpha, targets: self.targets.clone() }
    }
}
