//! Settings of the stage: flags, and the `[reward]` (or `[yardstick]`) table of a recipe.

use anyhow::{Result, bail};
use arete_chain::memory::{Demand, Role};
use arete_records::Refusal;
use arete_records::table::Column;
use arete_stage::settings;
use arete_training::{ComputeArgs, Counted, LoopArgs, LoraArgs, Pace, Select};
use clap::ArgAction;
use serde::{Deserialize, Serialize};

pub use arete_training::pairs::{Label, OverLength};

/// Score statistics that rest on fewer replies get a warning.
pub(crate) const MIN_STATS: usize = 64;

/// Settings of reward modelling.
#[derive(Clone, Debug, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct Config {
    /// Base model (after SFT: the merged SFT directory): a Hugging Face directory, a GGUF file, or a hub id
    #[arg(long)]
    pub model: Option<String>,
    /// The adapter's shape.
    #[command(flatten)]
    #[serde(flatten)]
    pub lora: LoraArgs,
    /// Highest learning rate (TRL's RewardConfig: 1e-4; the report: 1.41e-5)
    #[arg(long, default_value_t = 1e-4)]
    pub learning_rate: f64,
    /// Part of all steps in which the learning rate rises from 0
    #[arg(long, default_value_t = 0.05)]
    pub warmup_ratio: f64,
    /// Passes over the pairs
    #[arg(long, default_value_t = 2)]
    pub epochs: u64,
    /// Pairs an optimiser step (the report: 20 · 16 accumulation steps = 320)
    #[arg(long, default_value_t = 20)]
    pub batch_size: usize,
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
    /// Fewest replies of the base that score statistics rest on: where the conversations hold fewer at validation prompts, further
    /// samples of these prompts are drawn; 0 = none are
    #[arg(long, default_value_t = MIN_STATS)]
    pub stats_samples: usize,
    /// Most tokens sampled in one turn of those; default: as the conversations' run.json says, else 96
    #[arg(long)]
    pub stats_max_new_tokens: Option<usize>,
    /// Sampling temperature of those; default: as the conversations' run.json says, else 0.7
    #[arg(long)]
    pub stats_temperature: Option<f64>,
    /// Control: flip each training pair by the toss of a coin, which leaves nothing to learn
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub shuffle_labels: bool,
    /// With --pairs: so many reward models, each trained on the pairs of all folds but its own (folds by opening question): a
    /// cross-fitted yardstick; 0 = one reward model
    #[arg(long, default_value_t = 0, value_name = "K")]
    #[serde(default)]
    pub folds: usize,
    /// With --pairs: train on the held-out fifth as well
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub all_pairs: bool,
    /// With --pairs beside --preferences: most human pairs that are mixed in, for each judged pair to train on
    #[arg(long, default_value_t = 1.0, value_name = "W")]
    #[serde(default = "one")]
    pub pairs_weight: f64,
    /// Aspect that these pairs speak of, where they do not say [default: the answer]
    #[arg(long, value_name = "ASPECT")]
    #[serde(default)]
    pub pairs_aspect: Option<String>,
    /// A column under another name than ours, as prompt=question; may be given more than once
    #[arg(long = "column", value_name = "OURS=THEIRS")]
    #[serde(default)]
    pub column: Option<Vec<Column>>,
    /// Write the merged model (…ForSequenceClassification) as well
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub merge: bool,
    /// The step loop.
    #[command(flatten)]
    #[serde(flatten)]
    pub steps: LoopArgs,
    /// How the frozen model is held, and where it computes.
    #[command(flatten)]
    #[serde(flatten)]
    pub compute: ComputeArgs,
    /// Seed of the first values and of the order of the data
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

fn one() -> f64 {
    1.0
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
        if self.folds == 1 {
            bail!(Refusal::setting("folds", "two or more, or 0 for one reward model", "1"));
        }
        if self.folds > 0 && (self.all_pairs || self.steps.select == Select::Best) {
            let expected = "neither all_pairs nor select = \"best\": no fold may see its own pairs";
            bail!(Refusal::setting("folds", expected, self.folds));
        }
        for (name, value) in [
            ("center_rewards_coefficient", self.center_rewards_coefficient),
            ("pairs_weight", self.pairs_weight),
            ("margin_per_vote", self.margin_per_vote),
        ] {
            settings::not_negative(name, value)?;
        }
        settings::at_least("stats_max_new_tokens", self.stats_max_new_tokens.unwrap_or(1), 1)?;
        // Greedy replies are all the same: they have no spread to measure.
        settings::positive("stats_temperature", self.stats_temperature.unwrap_or(1.0))?;
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
        let merge = Some(self.merge);
        Counted { lora, compute, steps, batch_size, max_length, merge }
            .demand("reward", Role::Reward)
    }
}
