//! Settings that several subcommands share, and what of settings is recorded. Each stage's own stand in its folder.

use std::path::PathBuf;

use anyhow::{Result, bail};
use arete_engine::{EngineArgs, ServerConfig};
use arete_model::generate::Sampling;
use arete_model::machine::{self, Dtype};
use arete_model::{LoadOptions, Source};
use arete_records::Refusal;
use arete_stage::settings;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Where a local model computes, and in which number format.
#[derive(Debug, Clone, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct ComputeConfig {
    /// Where to compute: cpu, cuda, cuda:N, or auto
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Number format of weights and activations
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    /// Pack the model's matrices to four bits (NF4) at load
    #[arg(long, num_args = 0..=1, default_value_t = false, default_missing_value = "true",
          action = clap::ArgAction::Set, value_name = "BOOL")]
    pub nf4: bool,
    /// Quantise the NF4 scales as well
    #[arg(long, num_args = 0..=1, default_value_t = false, default_missing_value = "true",
          action = clap::ArgAction::Set, value_name = "BOOL")]
    #[serde(default)]
    pub double_quantize: bool,
}

impl ComputeConfig {
    /// As the model crate takes it.
    ///
    /// # Errors
    ///
    /// The model's failure if there is no such device.
    pub fn load_options(&self) -> Result<LoadOptions> {
        let device = machine::device(&self.device)?;
        Ok(machine::load_options(device, self.dtype, self.nf4, self.double_quantize))
    }
}

/// How replies are sampled.
#[derive(Debug, Clone, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct SamplingConfig {
    /// Most tokens sampled in one turn
    #[arg(long, default_value_t = 96, value_name = "N")]
    pub max_new_tokens: usize,
    /// Sampling temperature; 0 takes the most probable token
    #[arg(long, default_value_t = 0.7, value_name = "T")]
    pub temperature: f64,
    /// Only the k most probable tokens; 0 for all
    #[arg(long, default_value_t = 0, value_name = "K")]
    pub top_k: usize,
    /// Only the smallest set of tokens with this probability mass; 1 for all
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    pub top_p: f64,
    /// Seed of the random streams
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl SamplingConfig {
    /// Refuses what no sampler can do.
    ///
    /// # Errors
    ///
    /// A refused setting.
    pub fn check(&self) -> Result<(), Refusal> {
        settings::at_least("max_new_tokens", self.max_new_tokens, 1)?;
        settings::not_negative("temperature", self.temperature)?;
        settings::positive_fraction("top_p", self.top_p)
    }

    /// As the engines take it.
    pub fn drawing(&self) -> crate::engine::Drawing {
        crate::engine::Drawing {
            seed: self.seed,
            sampling: Sampling {
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
            },
            max_new_tokens: self.max_new_tokens,
            is_verdict: false,
        }
    }
}

/// What becomes of replies that the token limit cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Truncated {
    /// They are left out.
    Drop,
    /// They are cut at the last full sentence and the turn is closed; without one, left out.
    Trim,
    /// They stay as they are, as in the report.
    Keep,
}

/// Refuses servers of both kinds at once, and what no server can be asked with.
///
/// # Errors
///
/// A refused setting.
pub fn check_servers(url: Option<&str>, engines: &EngineArgs, server: &ServerConfig) -> Result<()> {
    engines.check()?;
    server.check()?;
    if url.is_some() && engines.urls().is_some() {
        bail!(Refusal::setting(
            "engine_url",
            "none together with engine_urls: text from one server, or tokens from several",
            "both",
        ));
    }
    Ok(())
}

/// The settings that results depend on, for `run.json`: without paths of inputs (their contents are
/// hashed), without where servers stand and how they are talked to, without what is not set.
///
/// # Panics
///
/// Never: the configurations serialise to tables.
pub fn recorded(config: &impl Serialize) -> Value {
    const LEFT_OUT: [&str; 7] = [
        "constitution",
        "exemplars",
        "judge_adapter",
        "engine_url",
        "judge_url",
        "calibration",
        "pairs",
    ];
    let mut value = serde_json::to_value(config).expect("configurations always serialise");
    EngineArgs::record_in(&mut value);
    let table = value.as_object_mut().expect("configurations are tables");
    table.retain(|key, value| !LEFT_OUT.contains(&key.as_str()) && !value.is_null());
    if table.get("nf4") != Some(&Value::Bool(true)) {
        table.remove("double_quantize"); // scales of which there are none
    }
    value
}

/// A model's entry among a stage's inputs (one on the hub is downloaded); the name of a server's model goes into the settings
/// instead.
///
/// # Errors
///
/// No such model, or a download that fails.
pub fn record_model(
    name: &str,
    model: &str,
    remote: bool,
    settings: &mut Value,
    inputs: &mut Vec<(String, PathBuf)>,
) -> Result<()> {
    if remote {
        settings[name] = Value::String(model.to_owned());
    } else if let Some(path) = Source::fetch(model)?.local_path() {
        inputs.push((name.to_owned(), path.to_owned()));
    }
    Ok(())
}
