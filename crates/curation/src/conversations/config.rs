//! What can be set about conversations.

use std::path::PathBuf;

use anyhow::{Result, bail};
use arete_engine::{EngineArgs, ServerConfig};
use arete_records::Refusal;
use arete_stage::units::Shard;
use serde::{Deserialize, Serialize};

use super::MOST_SAMPLES;
use crate::config::{ComputeConfig, SamplingConfig, check_servers};

/// Under which system prompts conversations are sampled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum PersonaChoice {
    /// None: both samples are drawn alike.
    None,
    /// Sample 0 under the constitution's virtuous persona, sample 1 under its vicious one (RLCD, Yang et al. 2023).
    Contrast,
    /// None, but sample 1 is drawn from --original, the model before SFT: for models too small to follow a persona (after
    /// ALMoST, Kim et al. 2023, where the better model's reply is the preferred one).
    Original,
}

/// Settings of `conversations`.
#[derive(Debug, Clone, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct ConversationsConfig {
    /// Under which system prompts the two samples are drawn
    #[arg(long, value_enum, default_value = "none")]
    pub personas: PersonaChoice,
    /// Conversations sampled for each prompt, 2 to 8; more than 2 are drawn alike, from --model (personas = "none")
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub samples_per_prompt: usize,
    /// Constitution (TOML): turns, virtues, personas, principles [default: data/constitution.toml]
    #[arg(long, value_name = "FILE")]
    #[serde(default)]
    pub constitution: Option<PathBuf>,
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

impl ConversationsConfig {
    /// Refuses what the stage cannot use, before it begins.
    ///
    /// # Errors
    ///
    /// A refused setting.
    pub fn check(&self) -> Result<()> {
        let n = self.samples_per_prompt;
        let most = if self.personas == PersonaChoice::None { MOST_SAMPLES } else { 2 };
        if !(2..=most).contains(&n) {
            let expected = match most {
                2 => "2 with personas, which tell the two samples apart".to_owned(),
                most => format!("2 to {most}"),
            };
            bail!(Refusal::setting("samples_per_prompt", expected, n));
        }
        self.sampling.check()?;
        check_servers(self.engine_url.as_deref(), &self.engines, &self.server)
    }
}
