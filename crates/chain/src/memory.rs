//! The memory that a use of a model takes, counted from shapes before anything is loaded.
//!
//! A stage holds some things all the time (weights, adapters, optimiser) and passes through phases (loading, sampling, passes
//! with gradients, the optimiser's step, merging) that each need more on top; its peak is the worst of them. What a pass keeps
//! is counted tensor by tensor from `csrc/ops.cpp` and `decoder.rs`. Lengths are those at which the recipe cuts, so the figure is
//! an upper bound where the data are shorter. On the CPU the figure is the process's resident memory (tests/plan.rs holds it to
//! 15 % of what is measured); on CUDA it is the GPU's, counted and not yet measured.

mod count;
mod fit;
mod room;

use std::path::Path;

use arete_model::machine::Dtype;
use arete_model::{
    Checkpoint, Device, Error, Kind, ModelConfig, Source, Target, default_dtype, read_json_object,
};
use arete_records::{Refusal, files};
use serde_json::{Value, json};

pub use self::count::Need;
use self::count::{Counter, count};
pub use self::room::{IGNORE, Room, Start, admit};

/// Tokens of a prompt with its template, where nobody says.
pub const PROMPT_TOKENS: u64 = 128;

/// Which way of using a model is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Answers criticised and revised.
    Demonstrations,
    /// Supervised fine-tuning.
    Sft,
    /// Chains sampled.
    Conversations,
    /// A judge asked.
    Preferences,
    /// Reward models trained.
    Reward,
    /// A policy trained on preferences.
    Dpo,
    /// A policy trained against reward models.
    Ppo,
    /// Models scored.
    Scoring,
}

/// What of a stage's settings matters for memory; what a stage has no setting for is as small as can be.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Whether a local model is loaded at all.
    pub asks_model: bool,
    /// Whether a second one is.
    pub two_models: bool,
    /// Examples shown before a prompt.
    pub few_shot: u64,
    /// LoRA rank.
    pub rank: u64,
    /// Layers with an update.
    pub targets: Vec<Target>,
    /// Examples a step.
    pub batch_size: u64,
    /// Most tokens of a pass.
    pub micro_batch_tokens: u64,
    /// Most tokens of an example.
    pub max_length: u64,
    /// Most tokens sampled in a turn.
    pub max_new_tokens: u64,
    /// Turns of the chain.
    pub turns: u64,
    /// Conversations of an iteration.
    pub rollout_size: u64,
    /// Optimiser steps that these are cut into.
    pub n_minibatches: u64,
    /// Whether the critic has an adapter of its own.
    pub own_critic: bool,
    /// Tokens up to which the graph of a rollout is kept.
    pub keep_graph_tokens: u64,
    /// Most sequences sampled at a time.
    pub max_rows: u64,
    /// Whether the merged model is written.
    pub merge: bool,
    /// Parts of a batch.
    pub virtual_shards: u64,
    /// Whether the blocks are packed to four bits.
    pub nf4: bool,
    /// Whether the scales of these are packed, too: on a GPU, whose kernels read them so.
    pub double_quantize: bool,
    /// Whether blocks are run again for the backward pass.
    pub recompute: bool,
    /// Number format.
    pub dtype: Dtype,
}

impl Settings {
    /// As small as can be.
    pub fn new(dtype: Dtype, nf4: bool) -> Self {
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
            double_quantize: false,
            recompute: false,
            dtype,
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
#[derive(Clone, Debug)]
pub struct Demand {
    /// The way.
    pub role: Role,
    /// The settings.
    pub settings: Settings,
    /// Names of those settings in a recipe.
    pub keys: &'static [&'static str],
}

/// A setting of a stage that cannot be 0: no pass and no batch can hold nothing.
///
/// # Errors
///
/// [`Refusal::BadSetting`] naming it.
pub fn positive(stage: &str, key: &str, value: usize) -> Result<u64, Refusal> {
    match value {
        0 => Err(Refusal::setting(format!("[{stage}] {key}"), "at least 1", 0)),
        value => Ok(value as u64),
    }
}

/// Sizes of a training stage.
#[derive(Clone, Copy, Debug)]
pub struct Training {
    /// Numbers in the adapter.
    pub adapter: u64,
    /// Examples a step.
    pub batch_size: u64,
    /// Parts of a batch.
    pub shards: u64,
    /// Turns of a conversation that is sampled.
    pub turns: u64,
    /// Tokens of a prompt.
    pub prompt: u64,
    /// Most tokens of a sequence.
    pub length: u64,
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
    pub fn of(model: &str, device: Option<&str>, prompt_tokens: u64) -> Result<Self, Error> {
        let (config, stored) = shape(model)?;
        let device = match device.unwrap_or("cpu") {
            name if name.starts_with("cuda") => Device::Cuda(0),
            "cpu" | "auto" => Device::Cpu,
            other => {
                return Err(Error::Invalid {
                    name: "device",
                    expected: "cpu, cuda or auto".to_owned(),
                    got: other.to_owned(),
                });
            }
        };
        Ok(Self { config, stored, device, prompt_tokens })
    }

    /// What a stage takes.
    pub fn need(&self, demand: &Demand) -> Need {
        self.need_with(demand.role, &demand.settings)
    }

    /// What a way of using the model takes with these settings.
    pub fn need_with(&self, role: Role, settings: &Settings) -> Need {
        let counter = Counter::new(&self.config, settings, self.device, self.stored);
        count(role, &counter, self.prompt_tokens)
    }

    /// The sizes of what a training stage learns, and from what.
    pub fn training(&self, demand: &Demand) -> Training {
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

fn shape(model: &str) -> Result<(ModelConfig, u64), Error> {
    let path = Path::new(model);
    if path.extension().is_some_and(|extension| extension == "json") {
        let map = read_json_object(path, files::MAX_SMALL_BYTES)?;
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

impl Need {
    /// The peak and where it comes, for a plan in JSON.
    pub fn to_json(&self) -> Value {
        let (phase, bytes) = self.peak();
        json!({ "peak_bytes": bytes, "peak_phase": phase })
    }
}

#[cfg(test)]
mod tests;
