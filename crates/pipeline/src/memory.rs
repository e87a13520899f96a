//! The memory that each stage of a recipe takes, counted from shapes before anything is loaded.
//!
//! [`arete_chain::memory`] counts; each stage's crate says what of its settings matters. Settings are those that the stages would get.

mod table;

use anyhow::Result;
use arete_chain::Turns;
use arete_chain::constitution::Constitution;
pub use arete_chain::memory::{Demand, IGNORE, Need, Room, Shape, Training};
use arete_curation::conversations::ConversationsConfig;
use arete_scoring::ScoreConfig;
use serde_json::{Map, Value};

pub use self::table::{json, text};
use crate::setup::Setup;

/// Part of a GPU's nominal size that programs can have; the driver keeps the rest.
const USABLE: f64 = 0.95;
/// GPUs in the table, in GB.
pub const GPU_SIZES_GB: [u64; 4] = [16, 24, 40, 80];

/// The demand of a stage with the settings that a setup gives it.
pub type DemandOf = fn(&Setup) -> Result<Demand>;

/// Turns of the chain that the constitution asks for.
fn n_turns(setup: &Setup) -> Result<usize> {
    let config: ConversationsConfig = setup.settings("conversations")?;
    let turns = match config.constitution.filter(|path| path.is_file()) {
        Some(path) => Constitution::load(&path)?.turns,
        None => Turns::default(),
    };
    Ok(turns.len())
}

pub(crate) fn demonstrations(setup: &Setup) -> Result<Demand> {
    let config = setup.settings("demonstrations")?;
    Ok(arete_curation::memory::of_demonstrations(&config, n_turns(setup)?)?)
}

pub(crate) fn sft(setup: &Setup) -> Result<Demand> {
    Ok(setup.settings::<arete_sft::Config>("sft")?.demand()?)
}

pub(crate) fn conversations(setup: &Setup) -> Result<Demand> {
    let config = setup.settings("conversations")?;
    Ok(arete_curation::memory::of_conversations(&config, n_turns(setup)?)?)
}

pub(crate) fn preferences(setup: &Setup) -> Result<Demand> {
    // What is judged is as long as what is sampled.
    let sampled: ConversationsConfig = setup.settings("conversations")?;
    let (config, most) = (setup.settings("preferences")?, sampled.sampling.max_new_tokens);
    Ok(arete_curation::memory::of_preferences(&config, n_turns(setup)?, most))
}

pub(crate) fn reward(setup: &Setup) -> Result<Demand> {
    Ok(setup.settings::<arete_reward::Config>("reward")?.demand()?)
}

pub(crate) fn dpo(setup: &Setup) -> Result<Demand> {
    Ok(setup.settings::<arete_dpo::Config>("dpo")?.demand()?)
}

pub(crate) fn ppo(setup: &Setup) -> Result<Demand> {
    Ok(setup.settings::<arete_ppo::Config>("ppo")?.demand(n_turns(setup)?)?)
}

pub(crate) fn scoring(setup: &Setup) -> Result<Demand> {
    let config: ScoreConfig = setup.settings("scoring")?;
    // Policy and reward models are adapters of these shapes.
    let policy: arete_ppo::Config = setup.settings("ppo")?;
    Ok(config.demand(n_turns(setup)?, policy.lora.rank, &policy.lora.targets)?)
}

/// A stage's plan.
#[derive(Debug)]
pub struct Planned {
    /// The stage.
    pub name: &'static str,
    /// What it takes.
    pub need: Need,
    /// Its settings that matter for that.
    settings: Map<String, Value>,
    /// For each size in GB: the changes it takes, or the bytes needed even so.
    fits: Vec<(u64, Result<Vec<String>, u64>)>,
}

/// The memory of every stage that is in and loads a model.
///
/// # Errors
///
/// Settings that are refused.
pub fn plan(setup: &Setup, shape: &Shape) -> Result<Vec<Planned>> {
    let mut planned = Vec::new();
    for stage in setup.stages()? {
        let Some(demand) = stage.demand else { continue };
        let demand = demand(setup)?;
        let Value::Object(mut settings) = (stage.settings)(setup)? else {
            unreachable!("settings are a table")
        };
        settings.retain(|key, _| demand.keys.contains(&key.as_str()));
        let fits = GPU_SIZES_GB.into_iter().map(|size_gb| {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a whole number of bytes is wanted, and the sizes are positive"
            )]
            let usable = (size_gb as f64 * 1e9 * USABLE) as u64;
            (size_gb, shape.fitting(&demand, usable))
        });
        let (fits, need) = (fits.collect(), shape.need(&demand));
        planned.push(Planned { name: stage.name, need, settings, fits });
    }
    Ok(planned)
}

#[cfg(test)]
mod tests;
