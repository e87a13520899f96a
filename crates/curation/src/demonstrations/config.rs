//! What can be set about demonstrations.

use std::path::PathBuf;

use anyhow::Result;
use arete_engine::{EngineArgs, ServerConfig};
use arete_stage::settings;
use arete_stage::units::Shard;
use serde::{Deserialize, Serialize};

use crate::config::{ComputeConfig, SamplingConfig, Truncated, check_servers};

/// Where demonstrations come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DemonstrationSource {
    /// The model's own revisions.
    #[value(name = "self")]
    #[serde(rename = "self")]
    Revised,
    /// The shipped exemplars.
    Own,
    /// Both.
    Mix,
}

impl DemonstrationSource {
    /// Whether a model and prompts are needed.
    pub fn needs_model(self) -> bool {
        self != Self::Own
    }

    /// Whether the exemplars are needed.
    pub fn needs_exemplars(self) -> bool {
        self != Self::Revised
    }
}

/// How many turns a demonstration has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Explained {
    /// The answer alone.
    Answer,
    /// Answer, motivation, consequence.
    Chain,
}

/// Settings of `demonstrations`.
#[derive(Debug, Clone, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct DemonstrationsConfig {
    /// Where demonstrations come from: the model's own revisions, the shipped exemplars, or both
    #[arg(long, value_enum, default_value = "mix")]
    pub source: DemonstrationSource,
    /// Rounds of critique and revision
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub rounds: usize,
    /// Exemplary answers shown before the question
    #[arg(long, default_value_t = 2, value_name = "K")]
    pub few_shot: usize,
    /// Explained of the model's own demonstrations
    #[arg(long, value_enum, default_value = "chain")]
    pub turns: Explained,
    /// What becomes of revisions that the token limit cut
    #[arg(long, value_enum, default_value = "trim")]
    pub truncated: Truncated,
    /// Constitution (TOML): turns, virtues, personas, principles [default: data/constitution.toml]
    #[arg(long, value_name = "FILE")]
    #[serde(default)]
    pub constitution: Option<PathBuf>,
    /// Exemplary replies (JSON lines)
    #[arg(long, default_value = "data/demonstrations/exemplars.jsonl", value_name = "FILE")]
    pub exemplars: PathBuf,
    /// Address of an OpenAI-compatible server that generates instead of a local model: text in and out
    #[arg(long, value_name = "URL")]
    #[serde(default)]
    pub engine_url: Option<String>,
    /// Part i of n of a job array
    #[arg(long, value_name = "I/N")]
    #[serde(default)]
    pub shard: Option<Shard>,
    /// How replies are sampled.
    #[command(flatten)]
    #[serde(flatten)]
    pub sampling: SamplingConfig,
    /// Where the model computes.
    #[command(flatten)]
    #[serde(flatten)]
    pub compute: ComputeConfig,
    /// Servers that sample for the local model.
    #[command(flatten)]
    #[serde(flatten)]
    pub engines: EngineArgs,
    /// How a server is talked to.
    #[command(flatten)]
    #[serde(flatten)]
    pub server: ServerConfig,
}

impl DemonstrationsConfig {
    /// Refuses what the stage cannot use, before it begins.
    ///
    /// # Errors
    ///
    /// A refused setting.
    pub fn check(&self) -> Result<()> {
        if !self.source.needs_model() {
            return Ok(());
        }
        settings::at_least("rounds", self.rounds, 1)?;
        self.sampling.check()?;
        check_servers(self.engine_url.as_deref(), &self.engines, &self.server)
    }
}
