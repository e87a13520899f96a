//! Settings of the stage: flags, and the `[sft]` table of a recipe.

use arete_model::{LoraConfig, Target};
use arete_training::runtime::Dtype;
use arete_training::{ScheduleKind, Select};
use clap::ArgAction;
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
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Model to start from: a Hugging Face directory, a GGUF file, or a hub id
    #[arg(long)]
    pub model: Option<String>,
    /// LoRA rank (Hu et al. 2021; 16 as in the Alignment Handbook's QLoRA recipes)
    #[arg(long, default_value_t = 16)]
    pub rank: usize,
    /// LoRA alpha; the update is scaled by alpha / rank
    #[arg(long, default_value_t = 32.0)]
    pub alpha: f64,
    /// Linear layers that get an update, separated by commas (all, as in QLoRA)
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Target::ALL)]
    pub targets: Vec<Target>,
    /// Highest learning rate (2e-4, QLoRA's)
    #[arg(long, default_value_t = 2e-4)]
    pub learning_rate: f64,
    /// How the learning rate falls after the warm-up
    #[arg(long, value_enum, default_value_t = ScheduleKind::Cosine)]
    pub schedule: ScheduleKind,
    /// Part of all steps in which the learning rate rises from 0
    #[arg(long, default_value_t = 0.03)]
    pub warmup_ratio: f64,
    /// Passes over the demonstrations
    #[arg(long, default_value_t = 3)]
    pub epochs: u64,
    /// Stop after so many steps, whatever the epochs
    #[arg(long)]
    pub max_steps: Option<u64>,
    /// Conversations an optimiser step
    #[arg(long, default_value_t = 16)]
    pub batch_size: usize,
    /// Most tokens in one forward pass (a longer conversation goes alone); bounds memory, changes results only by rounding
    #[arg(long, default_value_t = 1024)]
    pub micro_batch_tokens: usize,
    /// Most tokens of a conversation
    #[arg(long, default_value_t = 1024)]
    pub max_length: usize,
    /// What happens to longer ones
    #[arg(long, value_enum, default_value_t = OverLength::TruncateRight)]
    pub over_length: OverLength,
    /// Decoupled weight decay of the adapter
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
    /// Seed of the adapter's first values and of the order of the data
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl Config {
    /// The adapter's shape.
    pub fn lora(&self) -> LoraConfig {
        LoraConfig { rank: self.rank, alpha: self.alpha, targets: self.targets.clone() }
    }
}
