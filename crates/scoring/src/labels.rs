//! How the labels of a run's reward models came about, as far as it makes comparisons circular.

use std::path::Path;

use anyhow::Result;
use arete_stage::run::RunJson;
use serde_json::Value;

use crate::summary::Labels;

/// From what the stages beside the reward models recorded; none if they are not there.
///
/// # Errors
///
/// The stage's refusal if a record is there but damaged.
pub(crate) fn of(rewards: &Path) -> Result<Option<Labels>> {
    let Some(run) = rewards.parent() else { return Ok(None) };
    let setting = |stage: &str, name: &str| -> Result<Option<String>> {
        let dir = run.join(stage);
        if !dir.join("run.json").is_file() {
            return Ok(None);
        }
        let config = RunJson::read(&dir)?.config;
        Ok(config.get(name).and_then(Value::as_str).map(str::to_owned))
    };
    let method = setting("preferences", "method")?;
    let personas = setting("conversations", "personas")?;
    Ok(method.zip(personas).map(|(method, personas)| Labels { method, personas }))
}
