//! What the stages of this crate would do, for `--dry-run`.

use std::path::Path;

use anyhow::Result;
use arete_chain::Turns;
use arete_chain::constitution::carried_by_reward_models;
use arete_chain::memory::{PROMPT_TOKENS, Shape};
use arete_records::rows::PromptRow;
use arete_records::{Split, parquet};
use arete_stage::dry::DryRun;
use arete_stage::run::asking;
use serde_json::{Value, json};

use crate::distil::{self, DistilInputs};
use crate::{ReportInputs, ScoreConfig, ScoreInputs, report, score};

/// What [`score()`] would do; nothing is written.
///
/// # Errors
///
/// As [`score()`], as far as it shows before a model is loaded.
pub fn of_score(config: &ScoreConfig, inputs: &ScoreInputs) -> Result<DryRun> {
    let found = asking(|| score(config, inputs).map(drop))?;
    let [_, _, test] = n_prompts(&inputs.prompts)?;
    let asked = if config.n_prompts == 0 { test } else { test.min(config.n_prompts) };
    Ok(DryRun::new("scoring", config, found)
        .counting("test", test)
        .counting("prompts", asked)
        .counting("models", inputs.models.len())
        .taking(Some(memory(config, &inputs.base, &inputs.rewards)?)))
}

/// What [`distil::run`] would do; nothing is written.
///
/// # Errors
///
/// As [`distil::run`], as far as it shows before a model is loaded.
pub fn of_distil(config: &ScoreConfig, n: usize, inputs: &DistilInputs) -> Result<DryRun> {
    let found = asking(|| distil::run(config, n, inputs))?;
    let [train, validation, _] = n_prompts(&inputs.prompts)?;
    Ok(DryRun::new("distil", config, found)
        .counting("train", train)
        .counting("validation", validation)
        .counting("samples", n)
        .taking(Some(memory(config, &inputs.base, &inputs.rewards)?)))
}

/// What [`report()`] would do; nothing is written.
///
/// # Errors
///
/// As [`report()`], as far as it shows before a page is drawn.
pub fn of_report(inputs: &ReportInputs) -> Result<DryRun> {
    let found = asking(|| report(inputs).map(drop))?;
    Ok(DryRun::new("report", &json!({ "max_samples": inputs.max_samples }), found))
}

/// Prompts of each split.
fn n_prompts(path: &Path) -> Result<[usize; 3]> {
    let path = if path.is_dir() { path.join("prompts.parquet") } else { path.to_owned() };
    let rows: Vec<PromptRow> = parquet::read(&path)?;
    Ok(Split::ALL.map(|split| rows.iter().filter(|row| row.split == split).count()))
}

fn memory(config: &ScoreConfig, base: &str, rewards: &Path) -> Result<Value> {
    let turns = carried_by_reward_models(rewards)?.map_or_else(Turns::default, |own| own.turns);
    let shape = Shape::of(base, Some(&config.device), PROMPT_TOKENS)?;
    Ok(shape.need(&config.usual_demand(turns.len())?).to_json())
}
