//! Settings that several subcommands share, and what of settings is recorded. Each stage's own stand in its folder.

use std::path::PathBuf;

use arete_model::generate::Sampling;
use arete_model::machine::{self, Dtype};
use arete_model::{LoadOptions, Source};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Error;

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
}

impl ComputeConfig {
    /// As the model crate takes it.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] if there is no such device.
    pub fn load_options(&self) -> Result<LoadOptions, Error> {
        let device = machine::device(&self.device)?;
        Ok(machine::load_options(device, self.dtype, self.nf4, true))
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

/// The settings that results depend on, for `run.json`: without paths of inputs (their contents are
/// hashed), without where a server stands and how it is talked to, without what is not set.
///
/// # Panics
///
/// Never: the configurations serialise to tables.
pub fn recorded(config: &impl Serialize) -> Value {
    const LEFT_OUT: [&str; 11] = [
        "constitution",
        "exemplars",
        "judge_adapter",
        "engine_url",
        "judge_url",
        "calibration",
        "pairs",
        "concurrency",
        "attempts",
        "timeout_s",
        "backoff_s",
    ];
    let mut value = serde_json::to_value(config).expect("configurations always serialise");
    let table = value.as_object_mut().expect("configurations are tables");
    table.retain(|key, value| !LEFT_OUT.contains(&key.as_str()) && !value.is_null());
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
) -> Result<(), Error> {
    if remote {
        settings[name] = Value::String(model.to_owned());
    } else if let Some(path) = Source::fetch(model)?.local_path() {
        inputs.push((name.to_owned(), path.to_owned()));
    }
    Ok(())
}
