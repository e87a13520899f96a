//! The memory that each stage of a recipe takes, counted from shapes before anything is loaded.
//!
//! A stage holds some things all the time (weights, adapters, optimiser) and passes through phases (loading, sampling, passes
//! with gradients, the optimiser's step, merging) that each need more on top; its peak is the worst of them. What a pass keeps
//! is counted tensor by tensor from `csrc/ops.cpp` and `decoder.rs`. Lengths are those at which the recipe cuts, so the figure is
//! an upper bound where the data are shorter. On the CPU the figure is the process's resident memory (tests/plan.rs holds it to
//! 15 % of what is measured); on CUDA it is the GPU's, counted and not yet measured. Settings are those that the stages would get.

mod count;
mod table;

use std::path::Path;

use anyhow::Result;
use arete_chain::Turns;
use arete_chain::constitution::Constitution;
use arete_curation::conversations::{ConversationsConfig, PersonaChoice};
use arete_curation::demonstrations::DemonstrationsConfig;
use arete_curation::judge::Method;
use arete_curation::preferences::PreferencesConfig;
use arete_model::machine::Dtype;
use arete_model::{Checkpoint, Device, Kind, ModelConfig, Source, Target, default_dtype};
use arete_ppo::config::{CriticKind, RolloutKind};
use arete_scoring::ScoreConfig;
use arete_stage::exit::{BadInput, Usage};
use arete_training::{ComputeArgs, LoraArgs};
use serde_json::{Map, Value};

pub use self::count::Need;
use self::count::{Counter, count};
pub use self::table::{json, text};
use crate::setup::Setup;

/// Part of a GPU's nominal size that programs can have; the driver keeps the rest.
const USABLE: f64 = 0.95;
/// GPUs in the table, in GB.
pub const GPU_SIZES_GB: [u64; 4] = [16, 24, 40, 80];

/// Which way of using a model is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Demonstrations,
    Sft,
    Conversations,
    Preferences,
    Reward,
    Dpo,
    Ppo,
    Scoring,
}

/// What of a stage's settings matters for memory; what a stage has no setting for is as small as can be.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Whether a local model is loaded at all, and whether a second one is.
    asks_model: bool,
    two_models: bool,
    few_shot: u64,
    rank: u64,
    targets: Vec<Target>,
    batch_size: u64,
    micro_batch_tokens: u64,
    max_length: u64,
    max_new_tokens: u64,
    turns: u64,
    rollout_size: u64,
    n_minibatches: u64,
    own_critic: bool,
    keep_graph_tokens: u64,
    max_rows: u64,
    merge: bool,
    virtual_shards: u64,
    nf4: bool,
    recompute: bool,
    dtype: Dtype,
}

impl Settings {
    fn new(dtype: Dtype, nf4: bool) -> Self {
        Self {
            asks_model: true,
            two_models: false,
            few_shot: 0,
            rank: 0,
            targets: Vec::new(),
            batch_size: 1,
            micro_batch_tokens: 1,
            max_length: 1,
            max_new_tokens: 1,
            turns: 3,
            rollout_size: 1,
            n_minibatches: 1,
            own_critic: false,
            keep_graph_tokens: 0,
            max_rows: 1,
            merge: false,
            virtual_shards: 1,
            nf4,
            recompute: false,
            dtype,
        }
    }

    fn training(lora: &LoraArgs, compute: &ComputeArgs) -> Self {
        Self {
            rank: lora.rank as u64,
            targets: lora.targets.clone(),
            recompute: compute.recompute,
            ..Self::new(compute.dtype, compute.nf4)
        }
    }

    fn dtype(&self, device: Device) -> Kind {
        match self.dtype {
            Dtype::F32 => Kind::Float,
            Dtype::Bf16 => Kind::BFloat16,
            Dtype::F16 if device != Device::Cpu => Kind::Half,
            Dtype::F16 | Dtype::Auto => default_dtype(device),
        }
    }
}

/// What is to be counted of a stage: the way it uses the model, and the settings that matter.
#[derive(Debug)]
pub struct Demand {
    role: Role,
    settings: Settings,
    /// Names of those settings in a recipe.
    keys: &'static [&'static str],
}

/// The demand of a stage with the settings that a setup gives it.
pub type DemandOf = fn(&Setup) -> Result<Demand>;

/// Turns of the chain that the constitution asks for.
fn n_turns(setup: &Setup) -> Result<u64> {
    let config: ConversationsConfig = setup.settings("conversations")?;
    let turns = match config.constitution.filter(|path| path.is_file()) {
        Some(path) => Constitution::load(&path)?.turns,
        None => Turns::default(),
    };
    Ok(turns.len() as u64)
}

/// No pass and no batch can hold nothing.
fn positive(stage: &str, key: &str, value: usize) -> Result<u64> {
    match value {
        0 => Err(BadInput(format!("[{stage}] {key}: expected at least 1, got 0")).into()),
        value => Ok(value as u64),
    }
}

pub(crate) fn demonstrations(setup: &Setup) -> Result<Demand> {
    let config: DemonstrationsConfig = setup.settings("demonstrations")?;
    let settings = Settings {
        asks_model: config.source.needs_model() && config.engine_url.is_none(),
        few_shot: config.few_shot as u64,
        turns: n_turns(setup)?,
        max_new_tokens: positive(
            "demonstrations",
            "max_new_tokens",
            config.sampling.max_new_tokens,
        )?,
        ..Settings::new(config.compute.dtype, config.compute.nf4)
    };
    let keys = &["source", "few_shot", "max_new_tokens", "nf4", "dtype"];
    Ok(Demand { role: Role::Demonstrations, settings, keys })
}

pub(crate) fn sft(setup: &Setup) -> Result<Demand> {
    let config: arete_sft::Config = setup.settings("sft")?;
    let settings = Settings {
        batch_size: positive("sft", "batch_size", config.batch_size)?,
        micro_batch_tokens: positive("sft", "micro_batch_tokens", config.steps.micro_batch_tokens)?,
        max_length: positive("sft", "max_length", config.max_length)?,
        virtual_shards: positive("sft", "virtual_shards", config.steps.shards.virtual_shards)?,
        merge: true,
        ..Settings::training(&config.lora, &config.compute)
    };
    Ok(Demand { role: Role::Sft, settings, keys: &TRAINING_KEYS[..8] })
}

const TRAINING_KEYS: [&str; 9] = [
    "rank",
    "targets",
    "batch_size",
    "micro_batch_tokens",
    "max_length",
    "nf4",
    "recompute",
    "dtype",
    "merge",
];

pub(crate) fn conversations(setup: &Setup) -> Result<Demand> {
    let config: ConversationsConfig = setup.settings("conversations")?;
    let settings = Settings {
        asks_model: config.engine_url.is_none(),
        two_models: config.personas == PersonaChoice::Original,
        turns: n_turns(setup)?,
        max_new_tokens: positive(
            "conversations",
            "max_new_tokens",
            config.sampling.max_new_tokens,
        )?,
        ..Settings::new(config.compute.dtype, config.compute.nf4)
    };
    let keys = &["personas", "max_new_tokens", "nf4", "dtype"];
    Ok(Demand { role: Role::Conversations, settings, keys })
}

pub(crate) fn preferences(setup: &Setup) -> Result<Demand> {
    let config: PreferencesConfig = setup.settings("preferences")?;
    // What is judged is as long as what is sampled.
    let sampled: ConversationsConfig = setup.settings("conversations")?;
    let judge = &config.judge;
    let settings = Settings {
        asks_model: config.method != Method::Contrast && judge.judge_url.is_none(),
        turns: n_turns(setup)?,
        max_new_tokens: sampled.sampling.max_new_tokens as u64,
        ..Settings::new(judge.compute.dtype, judge.compute.nf4)
    };
    Ok(Demand { role: Role::Preferences, settings, keys: &["method", "nf4", "dtype"] })
}

pub(crate) fn reward(setup: &Setup) -> Result<Demand> {
    let config: arete_reward::Config = setup.settings("reward")?;
    let settings = Settings {
        batch_size: positive("reward", "batch_size", config.batch_size)?,
        micro_batch_tokens: positive(
            "reward",
            "micro_batch_tokens",
            config.steps.micro_batch_tokens,
        )?,
        max_length: positive("reward", "max_length", config.max_length)?,
        virtual_shards: positive("reward", "virtual_shards", config.steps.shards.virtual_shards)?,
        merge: config.merge,
        ..Settings::training(&config.lora, &config.compute)
    };
    Ok(Demand { role: Role::Reward, settings, keys: &TRAINING_KEYS })
}

pub(crate) fn dpo(setup: &Setup) -> Result<Demand> {
    let config: arete_dpo::Config = setup.settings("dpo")?;
    let settings = Settings {
        batch_size: positive("dpo", "batch_size", config.batch_size)?,
        micro_batch_tokens: positive("dpo", "micro_batch_tokens", config.steps.micro_batch_tokens)?,
        max_length: positive("dpo", "max_length", config.max_length)?,
        virtual_shards: positive("dpo", "virtual_shards", config.steps.shards.virtual_shards)?,
        merge: true,
        ..Settings::training(&config.lora, &config.compute)
    };
    Ok(Demand { role: Role::Dpo, settings, keys: &TRAINING_KEYS[..8] })
}

pub(crate) fn ppo(setup: &Setup) -> Result<Demand> {
    let config: arete_ppo::Config = setup.settings("ppo")?;
    let at_least_one = |key, value| positive("ppo", key, value);
    let settings = Settings {
        micro_batch_tokens: at_least_one("micro_batch_tokens", config.micro_batch_tokens)?,
        max_new_tokens: at_least_one("max_new_tokens", config.max_new_tokens)?,
        turns: if config.rollout == RolloutKind::Chain { n_turns(setup)? } else { 1 },
        rollout_size: at_least_one("rollout_size", config.rollout_size)?,
        n_minibatches: at_least_one("n_minibatches", config.n_minibatches)?,
        own_critic: config.value == CriticKind::Adapter,
        keep_graph_tokens: config.keep_graph_tokens as u64,
        max_rows: at_least_one("max_rows", config.max_rows)?,
        merge: config.merge,
        virtual_shards: at_least_one("virtual_shards", config.shards.virtual_shards)?,
        ..Settings::training(&config.lora, &config.compute)
    };
    let keys = &[
        "rollout",
        "max_new_tokens",
        "rollout_size",
        "n_minibatches",
        "value",
        "rank",
        "targets",
        "merge",
        "micro_batch_tokens",
        "keep_graph_tokens",
        "max_rows",
        "nf4",
        "recompute",
        "dtype",
    ];
    Ok(Demand { role: Role::Ppo, settings, keys })
}

pub(crate) fn scoring(setup: &Setup) -> Result<Demand> {
    let config: ScoreConfig = setup.settings("scoring")?;
    // Policy and reward models are adapters of these shapes.
    let policy: arete_ppo::Config = setup.settings("ppo")?;
    let settings = Settings {
        rank: policy.lora.rank as u64,
        targets: policy.lora.targets,
        micro_batch_tokens: positive("scoring", "micro_batch_tokens", config.micro_batch_tokens)?,
        turns: n_turns(setup)?,
        max_new_tokens: positive("scoring", "max_new_tokens", config.max_new_tokens)?,
        ..Settings::new(config.dtype, config.nf4)
    };
    let keys = &["max_new_tokens", "micro_batch_tokens", "nf4", "dtype"];
    Ok(Demand { role: Role::Scoring, settings, keys })
}

/// Sizes of a training stage.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Training {
    /// Numbers in the adapter.
    pub(crate) adapter: u64,
    /// Examples a step.
    pub(crate) batch_size: u64,
    /// Parts of a batch.
    pub(crate) shards: u64,
    /// Turns of a conversation that is sampled.
    pub(crate) turns: u64,
    /// Tokens of a prompt.
    pub(crate) prompt: u64,
    /// Most tokens of a sequence.
    pub(crate) length: u64,
}

/// A model's shape on a device, with prompts of some length.
#[derive(Debug)]
pub struct Shape {
    config: ModelConfig,
    /// Bytes of a number as its files store it.
    stored: u64,
    device: Device,
    prompt_tokens: u64,
}

impl Shape {
    /// Of a model: a directory, a GGUF file, a hub id (whose weights are then downloaded), or a `config.json` alone,
    /// which is taken to stand for weights of 16 bits.
    ///
    /// # Errors
    ///
    /// No such model, or one that is none; a device of another name than `cpu`, `auto` (taken for the CPU) or `cuda`.
    pub fn of(model: &str, device: Option<&str>, prompt_tokens: u64) -> Result<Self> {
        let (config, stored) = shape(model)?;
        let device = match device.unwrap_or("cpu") {
            name if name.starts_with("cuda") => Device::Cuda(0),
            "cpu" | "auto" => Device::Cpu,
            other => {
                let message = format!("--device: expected cpu or cuda, got {other}");
                return Err(Usage(message).into());
            }
        };
        Ok(Self { config, stored, device, prompt_tokens })
    }

    /// What a stage takes.
    pub fn need(&self, demand: &Demand) -> Need {
        self.need_with(demand.role, &demand.settings)
    }

    fn need_with(&self, role: Role, settings: &Settings) -> Need {
        let counter = Counter::new(&self.config, settings, self.device, self.stored);
        count(role, &counter, self.prompt_tokens)
    }

    /// The sizes of what a training stage learns, and from what.
    pub(crate) fn training(&self, demand: &Demand) -> Training {
        let settings = &demand.settings;
        let counter = Counter::new(&self.config, settings, self.device, self.stored);
        let length = match demand.role {
            Role::Ppo => count::conversation_tokens(settings, self.prompt_tokens),
            _ => settings.max_length,
        };
        Training {
            adapter: counter.adapter_size(),
            batch_size: settings.batch_size,
            shards: settings.virtual_shards,
            turns: settings.turns,
            prompt: self.prompt_tokens,
            length,
        }
    }

    /// Whether the device is the CPU, and memory the process's.
    pub fn is_on_cpu(&self) -> bool {
        self.device == Device::Cpu
    }

    /// Tokens of a prompt.
    pub fn prompt_tokens(&self) -> u64 {
        self.prompt_tokens
    }

    /// Bytes of the model written with every matrix dense, as a merge does.
    pub fn dense_bytes(&self) -> u64 {
        let settings = Settings::new(Dtype::Auto, false);
        Counter::new(&self.config, &settings, self.device, self.stored).weights()
    }
}

fn shape(model: &str) -> Result<(ModelConfig, u64)> {
    let path = Path::new(model);
    if path.extension().is_some_and(|extension| extension == "json") {
        let text = fs_err::read_to_string(path)?;
        let map: Map<String, Value> = serde_json::from_str(&text)
            .map_err(|error| BadInput(format!("{model}: expected a config.json: {error}")))?;
        return Ok((ModelConfig::from_json(path, &map)?, 2));
    }
    if path.is_dir() && path.join("config.json").is_file() {
        let config = ModelConfig::from_directory(path)?;
        // Weights that are not there yet, or not whole, are no hindrance: the plan comes before the download.
        let weights = Checkpoint::open(&Source::Directory(path.to_path_buf())).ok();
        return Ok((config, weights.map_or(2, |weights| stored_bytes(&weights))));
    }
    let checkpoint = Checkpoint::open(&Source::parse(model)?)?;
    Ok((checkpoint.config().clone(), stored_bytes(&checkpoint)))
}

/// Bytes of a number as it is read: in f32 from GGUF, whose tensors are unpacked.
fn stored_bytes(checkpoint: &Checkpoint) -> u64 {
    checkpoint.stored_kind().unwrap_or(Kind::Float).elt_size_in_bytes() as u64
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
            let need = |settings: &Settings| shape.need_with(demand.role, settings).peak().1;
            (size_gb, fit(usable, demand.keys, &demand.settings, need))
        });
        let (fits, need) = (fits.collect(), shape.need(&demand));
        planned.push(Planned { name: stage.name, need, settings, fits });
    }
    Ok(planned)
}

/// A change of one setting that saves memory.
type Change = fn(&mut Settings) -> Option<String>;

/// Changes in the order in which we would make them: those that cost least first.
const CHANGES: [Change; 5] = [
    |s| (!std::mem::replace(&mut s.recompute, true)).then(|| "recompute = true".to_owned()),
    |s| (!std::mem::replace(&mut s.nf4, true)).then(|| "nf4 = true".to_owned()),
    |s| {
        let old = std::mem::replace(&mut s.keep_graph_tokens, 0);
        (old > 0).then(|| "keep_graph_tokens = 0".to_owned())
    },
    |s| {
        let new = s.micro_batch_tokens.min(512);
        let old = std::mem::replace(&mut s.micro_batch_tokens, new);
        (old > new).then(|| format!("micro_batch_tokens = {new}"))
    },
    |s| {
        let new = s.max_rows.min(8);
        let old = std::mem::replace(&mut s.max_rows, new);
        (old > new).then(|| format!("max_rows = {new}"))
    },
];

/// Whether a stage fits into `bytes`: `Ok` with the changes that it takes (none if it fits as it is), `Err` with what it
/// needs even after all of them.
fn fit(
    bytes: u64,
    keys: &[&str],
    settings: &Settings,
    need: impl Fn(&Settings) -> u64,
) -> Result<Vec<String>, u64> {
    let (mut settings, mut changes) = (settings.clone(), Vec::new());
    if need(&settings) <= bytes {
        return Ok(changes);
    }
    for change in CHANGES {
        let before = settings.clone();
        let Some(text) = change(&mut settings) else { continue };
        let key = text.split(' ').next().unwrap_or_default();
        if !keys.contains(&key) || need(&settings) >= need(&before) {
            settings = before;
            continue;
        }
        changes.push(text);
        if need(&settings) <= bytes {
            return Ok(changes);
        }
    }
    Err(need(&settings))
}

#[cfg(test)]
mod tests;
