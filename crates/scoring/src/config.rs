//! Settings of `score`: flags, and the `[scoring]` table of a recipe.

use anyhow::Result;
use arete_chain::memory::{self, Demand, Role};
use arete_engine::{EngineArgs, ServerConfig};
use arete_model::Target;
use arete_model::generate::Sampling;
use arete_model::machine::{self, Dtype};
use arete_model::{LoadOptions, LoraConfig, Source};
use arete_records::Refusal;
use arete_records::table::Column;
use arete_stage::settings;
use clap::ArgAction;
use serde::{Deserialize, Serialize};

use crate::endpoint::{self, Endpoint};

/// Settings of scoring.
#[derive(Clone, Debug, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct ScoreConfig {
    /// Most test prompts to answer, the first of the file; 0 = all of them
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub n_prompts: usize,
    /// Most tokens sampled in one turn (as the conversations the reward models learned from)
    #[arg(long, default_value_t = 96, value_name = "N")]
    pub max_new_tokens: usize,
    /// Sampling temperature; 0 takes the most probable token
    #[arg(long, default_value_t = 0.7, value_name = "T")]
    pub temperature: f64,
    /// Only the k most probable tokens; 0 = all
    #[arg(long, default_value_t = 0, value_name = "K")]
    pub top_k: usize,
    /// Only the smallest set of tokens with this probability mass; 1 = all
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    pub top_p: f64,
    /// Most labelled pairs of --pairs to use, the first of the file; 0 = all of them
    #[arg(long, default_value_t = 200, value_name = "N")]
    pub max_pairs: usize,
    /// The one comparison that the run is judged by, named before it: LAST - FIRST, TURN (answer, all, or its name),
    /// MEASURE (yardstick, bag of words, score; each also "… at equal length")
    #[arg(long, default_value = endpoint::DEFAULT, value_name = "WORDS")]
    pub primary: String,
    /// A column under another name than ours, as prompt=question; may be given more than once
    #[arg(long = "column", value_name = "OURS=THEIRS")]
    #[serde(default)]
    pub column: Option<Vec<Column>>,
    /// Redraws of every bootstrap
    #[arg(long, default_value_t = 10_000, value_name = "N")]
    pub draws: usize,
    /// Most tokens in one forward pass (a longer conversation goes alone); changes scores only by rounding
    #[arg(long, default_value_t = 2048, value_name = "N")]
    pub micro_batch_tokens: usize,
    /// Pack every model's blocks to NF4 at load (as the reward models' base was, if it was)
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub nf4: bool,
    /// Quantise the NF4 scales as well
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub double_quantize: bool,
    /// Number format of weights and activations
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    /// Servers that answer the prompts for the base and adapters over it.
    #[command(flatten)]
    #[serde(flatten)]
    pub engines: EngineArgs,
    /// How they are talked to.
    #[command(flatten)]
    #[serde(flatten)]
    pub server: ServerConfig,
    /// Where to compute: cpu, cuda, cuda:N, or auto
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// CPU threads; 0 = one a core
    #[arg(long, default_value_t = 0)]
    pub threads: u32,
    /// Seed of the replies' random streams and of the bootstrap
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl ScoreConfig {
    /// Refuses settings that no run can use.
    ///
    /// # Errors
    ///
    /// A refused setting.
    pub fn check(&self) -> Result<()> {
        for (name, value) in [
            ("max_new_tokens", self.max_new_tokens),
            ("draws", self.draws),
            ("micro_batch_tokens", self.micro_batch_tokens),
        ] {
            settings::at_least(name, value, 1)?;
        }
        settings::not_negative("temperature", self.temperature)?;
        settings::positive_fraction("top_p", self.top_p)?;
        self.engines.check()?;
        self.server.check()?;
        self.endpoint().map(|_| ())
    }

    /// The primary endpoint.
    ///
    /// # Errors
    ///
    /// A refused setting if it is none.
    pub fn endpoint(&self) -> Result<Endpoint> {
        let refused = |expected: String| Refusal::setting("primary", expected, &self.primary);
        Ok(self.primary.parse().map_err(refused)?)
    }

    /// How replies are drawn.
    pub fn sampling(&self) -> Sampling {
        Sampling { temperature: self.temperature, top_k: self.top_k, top_p: self.top_p }
    }

    /// How models are loaded; sets the number of CPU threads.
    ///
    /// # Errors
    ///
    /// The model's failure if there is no such device.
    pub fn load_options(&self) -> Result<LoadOptions> {
        machine::set_threads(self.threads);
        let device = machine::device(&self.device)?;
        Ok(machine::load_options(device, self.dtype, self.nf4, self.double_quantize))
    }
}

impl ScoreConfig {
    /// [`ScoreConfig::demand`] with policies and reward models taken for adapters of the usual shape.
    ///
    /// # Errors
    ///
    /// As [`ScoreConfig::demand`].
    pub fn usual_demand(&self, n_turns: usize) -> Result<Demand, Refusal> {
        let LoraConfig { rank, targets, .. } = LoraConfig::default();
        self.demand(n_turns, rank, &targets)
    }

    /// Asks whether there is room before a model is loaded.
    ///
    /// # Errors
    ///
    /// [`arete_model::Error::NoRoom`] if there is none, a model or device that there is not.
    pub(crate) fn admit(&self, base: &Source, n_turns: usize) -> Result<()> {
        let device = machine::device(&self.device)?;
        memory::admit("scoring", base, device, &self.usual_demand(n_turns)?)?;
        Ok(())
    }

    /// What is counted of the memory that scoring takes, with so many turns in a chain; policies and reward models are adapters of
    /// this rank on these layers.
    ///
    /// # Errors
    ///
    /// [`Refusal::BadSetting`] for a size of 0.
    pub fn demand(
        &self,
        n_turns: usize,
        rank: usize,
        targets: &[Target],
    ) -> Result<Demand, Refusal> {
        let positive = |key, value| memory::positive("scoring", key, value);
        let settings = memory::Settings {
            rank: rank as u64,
            targets: targets.to_vec(),
            micro_batch_tokens: positive("micro_batch_tokens", self.micro_batch_tokens)?,
            turns: n_turns as u64,
            max_new_tokens: positive("max_new_tokens", self.max_new_tokens)?,
            double_quantize: self.double_quantize,
            ..memory::Settings::new(self.dtype, self.nf4)
        };
        let keys = &["max_new_tokens", "micro_batch_tokens", "nf4", "double_quantize", "dtype"];
        Ok(Demand { role: Role::Scoring, settings, keys })
    }
}
