//! Joining the parts of a job array.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde::de::DeserializeOwned;

use crate::stage::{Command, Place, Work};
use crate::{conversations, demonstrations, preferences};

/// Finishes the stage whose parts these are: same bytes as a run without `--shard`.
///
/// # Errors
///
/// Parts that are incomplete, do not belong together, or were made from what has changed since; whatever the stage's own end may fail with.
pub fn merge(parts: &[PathBuf], output: &Path) -> Result<()> {
    let (Command { stage, config, input, model, original }, run) = Command::of_parts(parts)?;
    let place = Place { device: run.device, dtype: run.dtype };
    let work = Work::Adopt { parts: parts.to_owned(), place, inputs: run.inputs };
    match stage.as_str() {
        conversations::STAGE => {
            let model = model.ok_or_else(|| unusable(parts, "names no model"))?;
            let inputs = conversations::Inputs { prompts: input, model, original };
            conversations::run(&settings(parts, config)?, &inputs, output, &work)
        }
        demonstrations::STAGE => {
            let inputs = demonstrations::Inputs { prompts: Some(input), model };
            demonstrations::run(&settings(parts, config)?, &inputs, output, &work)
        }
        preferences::STAGE => {
            let inputs = preferences::Inputs { conversations: input, judge: model };
            preferences::run(&settings(parts, config)?, &inputs, output, &work)
        }
        other => bail!(unusable(parts, &format!("unknown stage {other}"))),
    }
}

fn settings<C: DeserializeOwned>(parts: &[PathBuf], config: serde_json::Value) -> Result<C> {
    Ok(serde_json::from_value(config).map_err(|error| unusable(parts, &error.to_string()))?)
}

fn unusable(parts: &[PathBuf], reason: &str) -> arete_stage::Error {
    let path = parts.first().cloned().unwrap_or_default();
    arete_stage::Error::Shards { path, reason: reason.to_owned() }
}
