//! What is counted of the memory that these stages take.

use anyhow::Result;
use arete_chain::memory::{self, Demand, Role, Settings, positive};
use arete_model::{Source, machine};
use arete_records::Refusal;
use serde_json::Value;

use crate::config::ComputeConfig;
use crate::conversations::{ConversationsConfig, PersonaChoice};
use crate::demonstrations::DemonstrationsConfig;
use crate::judge::Method;
use crate::preferences::PreferencesConfig;

fn settings(compute: &ComputeConfig, n_turns: usize) -> Settings {
    let ComputeConfig { dtype, nf4, double_quantize, .. } = *compute;
    Settings { turns: n_turns as u64, double_quantize, ..memory::Settings::new(dtype, nf4) }
}

/// The peak of a stage that loads this model; none where it loads none here.
///
/// # Errors
///
/// A refusal if there is no such model.
pub(crate) fn of_stage(
    demand: Demand,
    model: Option<&str>,
    compute: &ComputeConfig,
) -> Result<Option<Value>> {
    let Some(model) = model.filter(|_| demand.settings.asks_model) else { return Ok(None) };
    let shape = memory::Shape::of(model, Some(&compute.device), memory::PROMPT_TOKENS)?;
    Ok(Some(shape.need(&demand).to_json()))
}

/// Asks whether there is room for the model of a stage before it is loaded, if it is loaded here: a server's has a name alone.
///
/// # Errors
///
/// [`arete_model::Error::NoRoom`] if there is none, a model or device that there is not.
pub(crate) fn admit(
    stage: &str,
    demand: &Demand,
    model: &str,
    compute: &ComputeConfig,
) -> Result<()> {
    if !demand.settings.asks_model {
        return Ok(());
    }
    memory::admit(stage, &Source::parse(model)?, machine::device(&compute.device)?, demand)?;
    Ok(())
}

/// Of answers criticised and revised.
///
/// # Errors
///
/// [`Refusal::BadSetting`] for a size of 0.
pub fn of_demonstrations(config: &DemonstrationsConfig, n_turns: usize) -> Result<Demand, Refusal> {
    let most = config.sampling.max_new_tokens;
    let settings = Settings {
        asks_model: config.source.needs_model() && config.engine_url.is_none(),
        few_shot: config.few_shot as u64,
        max_new_tokens: positive("demonstrations", "max_new_tokens", most)?,
        ..settings(&config.compute, n_turns)
    };
    let keys = &["source", "few_shot", "max_new_tokens", "nf4", "double_quantize", "dtype"];
    Ok(Demand { role: Role::Demonstrations, settings, keys })
}

/// Of chains sampled.
///
/// # Errors
///
/// [`Refusal::BadSetting`] for a size of 0.
pub fn of_conversations(config: &ConversationsConfig, n_turns: usize) -> Result<Demand, Refusal> {
    let most = config.sampling.max_new_tokens;
    let settings = Settings {
        asks_model: config.engine_url.is_none(),
        two_models: config.personas == PersonaChoice::Original,
        max_new_tokens: positive("conversations", "max_new_tokens", most)?,
        ..settings(&config.compute, n_turns)
    };
    let keys = &["personas", "max_new_tokens", "nf4", "double_quantize", "dtype"];
    Ok(Demand { role: Role::Conversations, settings, keys })
}

/// Of a judge that reads turns of so many tokens.
#[must_use]
pub fn of_preferences(config: &PreferencesConfig, n_turns: usize, max_new_tokens: usize) -> Demand {
    let judge = &config.judge;
    let settings = Settings {
        asks_model: config.method != Method::Contrast && judge.urls().is_none(),
        max_new_tokens: max_new_tokens as u64,
        ..settings(&judge.compute, n_turns)
    };
    Demand {
        role: Role::Preferences,
        settings,
        keys: &["method", "nf4", "double_quantize", "dtype"],
    }
}
