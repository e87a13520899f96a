//! `inspect --plan`: the memory that each stage of a recipe takes, counted from shapes before anything is loaded.
//!
//! A stage holds some things all the time (weights, adapters, optimiser) and passes through phases (loading, sampling, passes
//! with gradients, the optimiser's step, merging) that each need more on top; its peak is the worst of them. What a pass keeps
//! is counted tensor by tensor from `csrc/ops.cpp` and `decoder.rs`. Lengths are those at which the recipe cuts, so the plan is
//! an upper bound where the data are shorter. On the CPU the figure is the process's resident memory (tests/plan.rs holds it to
//! 15 % of what is measured); on CUDA it is the GPU's, counted and not yet measured.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use arete_model::merge::SHARD_BYTES;
use arete_model::{Checkpoint, Device, Kind, ModelConfig, Source, Target, default_dtype};

/// Program, libtorch and the code it touches: 131 MiB were measured with a model of no size to speak of, 30 more with one of 135M.
const CPU_RUNTIME_BYTES: u64 = 161 << 20;
/// oneDNN, which multiplies in bf16 on the CPU: its generated code and packing buffers; the difference between the stages of
/// `tests/plan.rs` in bf16 and f32.
const ONEDNN_BYTES: u64 = 45 << 20;
/// What the allocator holds in holes between the tensors of a pass: SFT, a reward model and PPO on SmolLM2 were measured to take
/// 25 %, 41 % and 4 % more than their tensors. Weights, which come first and stay, leave none.
const HOLES_PERCENT: u64 = 15;
/// CUDA context, cuBLAS handles and workspaces: usual figures, not measured here.
const CUDA_RUNTIME_BYTES: u64 = 700 << 20;
/// Part of a GPU's nominal size that programs can have; the driver keeps the rest.
const USABLE: f64 = 0.95;
/// GPUs in the table, in GB.
const GPU_SIZES_GB: [u64; 4] = [16, 24, 40, 80];
/// Tokens of the chain's two questions with their template.
const QUESTION_TOKENS: u64 = 64;
/// Rows of the vocabulary product held at a time in training and in an evaluation (`csrc/ops.cpp`, the SFT stage).
const VOCABULARY_ROWS: u64 = 256;
const EVALUATION_ROWS: u64 = 512;
/// Prompts of a unit of curation and scoring, samples of each in curation, and units that scoring answers at a time.
const UNIT_PROMPTS: u64 = 32;
const UNIT_SAMPLES: u64 = 2;
const SCORING_UNITS: u64 = 2;
/// Tokens of one exemplar that is shown before a prompt: a question and three replies of some forty tokens.
const EXEMPLAR_TOKENS: u64 = 200;
/// Tokens in one pass of a judge, and sequences in flight while sampling, where no setting says otherwise.
const JUDGE_TOKENS: u64 = 2048;
const SAMPLING_ROWS: u64 = 64;

/// What the plan is asked about.
#[derive(Debug, clap::Args)]
pub(crate) struct PlanArgs {
    /// Count the memory of every stage, and say on which GPUs each fits
    #[arg(long)]
    pub(crate) plan: bool,
    /// With --plan: recipe whose settings are counted (default: the stages' own)
    #[arg(long, value_name = "FILE", requires = "plan")]
    recipe: Option<PathBuf>,
    /// With --plan: cpu or cuda [default: the recipe's, else cpu]
    #[arg(long, value_name = "DEVICE", requires = "plan")]
    device: Option<String>,
    /// With --plan: tokens of a prompt with its template
    #[arg(
        long,
        value_name = "N",
        default_value_t = 128,
        value_parser = clap::value_parser!(u64).range(1..),
        requires = "plan"
    )]
    prompt_tokens: u64,
    /// With --plan: JSON instead of tables
    #[arg(long, requires = "plan")]
    json: bool,
}

/// A stage that holds a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Demonstrations,
    Sft,
    Conversations,
    Preferences,
    Reward,
    Ppo,
    Scoring,
}

impl Stage {
    const ALL: [Self; 7] = [
        Self::Demonstrations,
        Self::Sft,
        Self::Conversations,
        Self::Preferences,
        Self::Reward,
        Self::Ppo,
        Self::Scoring,
    ];

    /// Its name, which is that of its table in a recipe.
    fn name(self) -> &'static str {
        match self {
            Self::Demonstrations => "demonstrations",
            Self::Sft => "sft",
            Self::Conversations => "conversations",
            Self::Preferences => "preferences",
            Self::Reward => "reward",
            Self::Ppo => "ppo",
            Self::Scoring => "scoring",
        }
    }

    /// Its settings that matter for memory.
    fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Demonstrations => &["source", "few_shot", "max_new_tokens", "nf4", "dtype"],
            Self::Sft => &[
                "rank",
                "targets",
                "batch_size",
                "micro_batch_tokens",
                "max_length",
                "nf4",
                "recompute",
                "dtype",
            ],
            Self::Conversations => &["personas", "max_new_tokens", "nf4", "dtype"],
            Self::Preferences => &["nf4", "dtype"],
            Self::Reward => &[
                "rank",
                "targets",
                "batch_size",
                "micro_batch_tokens",
                "max_length",
                "merge",
                "nf4",
                "recompute",
                "dtype",
            ],
            Self::Ppo => &[
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
            ],
            Self::Scoring => &["max_new_tokens", "micro_batch_tokens", "nf4", "dtype"],
        }
    }

    /// The stage's own defaults; tests/plan.rs holds them to those of the programs.
    fn defaults(self) -> Settings {
        let base = Settings {
            source: Demonstrated::Mix,
            few_shot: 2,
            personas: Personas::None,
            rank: 16,
            targets: Target::ALL.to_vec(),
            batch_size: 16,
            micro_batch_tokens: 2048,
            max_length: 1024,
            max_new_tokens: 96,
            rollout: Rollout::Chain,
            rollout_size: 32,
            n_minibatches: 1,
            value: Critic::Trunk,
            keep_graph_tokens: 4096,
            max_rows: SAMPLING_ROWS,
            merge: true,
            nf4: false,
            recompute: false,
            dtype: Dtype::Auto,
        };
        match self {
            Self::Sft => Settings { micro_batch_tokens: 1024, ..base },
            Self::Reward => Settings {
                batch_size: 20,
                micro_batch_tokens: 1024,
                max_length: 512,
                merge: false,
                ..base
            },
            _ => base,
        }
    }
}

/// Settings of any stage, under the names of recipes.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Settings {
    source: Demonstrated,
    few_shot: u64,
    personas: Personas,
    rank: u64,
    targets: Vec<Target>,
    batch_size: u64,
    micro_batch_tokens: u64,
    max_length: u64,
    max_new_tokens: u64,
    rollout: Rollout,
    rollout_size: u64,
    n_minibatches: u64,
    value: Critic,
    keep_graph_tokens: u64,
    max_rows: u64,
    merge: bool,
    nf4: bool,
    recompute: bool,
    dtype: Dtype,
}

/// Who writes the demonstrations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Demonstrated {
    #[serde(rename = "self")]
    Revised,
    Own,
    Mix,
}

/// Under which system prompts, and by which models, conversations are sampled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Personas {
    None,
    Contrast,
    Original,
}

/// What PPO's policy is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Rollout {
    Chain,
    Answer,
}

/// Where PPO's critic reads its values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Critic {
    Trunk,
    TrunkDetached,
    Adapter,
}

/// A stage's compute dtype.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Dtype {
    Auto,
    F32,
    Bf16,
    F16,
}

impl Settings {
    /// A stage's settings as its recipe has them. Keys the plan does not need are the stage's to check.
    fn of(stage: Stage, tables: &toml::Table, path: &Path) -> anyhow::Result<Self> {
        let settings = serde_json::to_value(stage.defaults()).expect("numbers and words");
        let Value::Object(mut settings) = settings else { unreachable!("a struct is an object") };
        for name in ["run", stage.name()] {
            let Some(toml::Value::Table(table)) = tables.get(name) else { continue };
            for (key, value) in table.iter().filter(|(key, _)| stage.keys().contains(&key.as_str()))
            {
                let value = serde_json::to_value(value).context("a recipe's value")?;
                let blame = |what: String| {
                    arete_stage::exit::BadInput(format!(
                        "{}: [{name}] {key}: {what}",
                        path.display()
                    ))
                };
                // No graph may be kept and no exemplar shown; nothing else can be none.
                let may_be_none = ["keep_graph_tokens", "few_shot"].contains(&key.as_str());
                if value.as_u64() == Some(0) && !may_be_none {
                    return Err(blame("expected at least 1, got 0".to_owned()).into());
                }
                settings.insert(key.clone(), value);
                serde_json::from_value::<Self>(Value::Object(settings.clone()))
                    .map_err(|error| blame(error.to_string()))?;
            }
        }
        Ok(serde_json::from_value(Value::Object(settings)).expect("checked key by key"))
    }

    /// The settings that matter for `stage`.
    fn of_interest(&self, stage: Stage) -> Map<String, Value> {
        let Ok(Value::Object(all)) = serde_json::to_value(self) else {
            unreachable!("a struct is an object")
        };
        all.into_iter().filter(|(key, _)| stage.keys().contains(&key.as_str())).collect()
    }

    fn dtype(&self, device: Device) -> Kind {
        match self.dtype {
            Dtype::F32 => Kind::Float,
            Dtype::Bf16 => Kind::BFloat16,
            Dtype::F16 if device != Device::Cpu => Kind::Half,
            Dtype::F16 | Dtype::Auto => default_dtype(device),
        }
    }

    fn turns(&self) -> u64 {
        match self.rollout {
            Rollout::Chain => 3,
            Rollout::Answer => 1,
        }
    }
}

/// What a stage takes, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Need {
    /// Always there.
    runtime: u64,
    weights: u64,
    adapters: u64,
    optimiser: u64,
    /// At its largest, in some phase.
    activations: u64,
    kv_cache: u64,
    rollouts: u64,
    /// What each phase holds in all.
    phases: Vec<(&'static str, u64)>,
}

impl Need {
    /// A phase that holds `rest` beside the program and `weights`.
    fn phase(&mut self, name: &'static str, weights: u64, rest: u64) {
        self.phases.push((name, self.runtime + weights + rest + rest * HOLES_PERCENT / 100));
    }

    /// A phase that holds `more` beside all that a stage always has.
    fn phase_with(&mut self, name: &'static str, more: u64) {
        self.phase(name, self.weights, self.adapters + self.optimiser + more);
    }

    fn peak(&self) -> (&'static str, u64) {
        self.phases.iter().copied().max_by_key(|phase| phase.1).expect("loading is one")
    }
}

/// Bytes of a model's parts in one dtype on one device.
struct Counter<'a> {
    config: &'a ModelConfig,
    settings: &'a Settings,
    device: Device,
    /// Bytes of a number in the compute dtype.
    size: u64,
    /// Bytes of a number as the checkpoint stores it.
    stored: u64,
    // Widths, in elements.
    hidden: u64,
    inner: u64,
    queries: u64,
    keys: u64,
    heads: u64,
    layers: u64,
    vocabulary: u64,
}

/// A forward pass over `tokens` rows, in sequences of `length`.
#[derive(Clone, Copy)]
struct Pass {
    tokens: u64,
    length: u64,
}

impl<'a> Counter<'a> {
    fn new(config: &'a ModelConfig, settings: &'a Settings, device: Device, stored: u64) -> Self {
        let size = |n: usize| n as u64;
        Self {
            config,
            settings,
            device,
            size: settings.dtype(device).elt_size_in_bytes() as u64,
            stored,
            hidden: size(config.hidden_size),
            inner: size(config.intermediate_size),
            queries: size(config.num_heads * config.head_size),
            keys: size(config.num_kv_heads * config.head_size),
            heads: size(config.num_heads),
            layers: size(config.num_layers),
            vocabulary: size(config.vocab_size),
        }
    }

    /// Outputs and inputs of a block's four matrices as they are held: query, key and value in one, gate and up in one.
    fn matrices(&self) -> [(u64, u64); 4] {
        [
            (self.queries + 2 * self.keys, self.hidden),
            (self.hidden, self.queries),
            (2 * self.inner, self.hidden),
            (self.hidden, self.inner),
        ]
    }

    fn vocabulary_bytes(&self) -> u64 {
        let matrices = if self.config.tie_word_embeddings { 1 } else { 2 };
        matrices * self.vocabulary * self.hidden * self.size
    }

    fn dense_layer_bytes(&self) -> u64 {
        self.matrices().iter().map(|(outputs, inputs)| outputs * inputs * self.size).sum()
    }

    fn weights(&self) -> u64 {
        let n_linear: u64 = self.matrices().iter().map(|(outputs, inputs)| outputs * inputs).sum();
        let layer = if self.settings.nf4 {
            n_linear / 2 + n_linear / 64 * 4 // codes, and a scale in f32 per block of 64
        } else {
            n_linear * self.size
        };
        let norms = (2 * self.layers + 1) * self.hidden * self.size;
        let angles = (self.config.max_position_embeddings * self.config.head_size * 4) as u64;
        self.vocabulary_bytes() + self.layers * layer + norms + angles
    }

    /// What the reading of one matrix takes on top: as stored, converted, and joined with its neighbours.
    fn loading(&self) -> u64 {
        let matrix = self.inner * self.hidden;
        if self.settings.nf4 {
            matrix * (self.stored + 2)
        } else {
            matrix * (4 * self.size + self.stored)
        }
    }

    /// Largest matrix of a block, unpacked for a product: nothing where it is dense already.
    fn unpacked(&self, matrix: usize) -> u64 {
        let (outputs, inputs) = self.matrices()[matrix];
        if self.settings.nf4 { outputs * inputs * self.size } else { 0 }
    }

    /// Numbers in an adapter.
    fn adapter_size(&self) -> u64 {
        let pair = |target: &Target| {
            let (outputs, inputs) = target.size(self.config);
            (outputs + inputs) as u64 * self.settings.rank
        };
        self.layers * self.settings.targets.iter().map(pair).sum::<u64>()
    }

    /// Ranks of a block's four matrices: those of the layers joined in each, added up.
    fn ranks(&self) -> [u64; 4] {
        let groups: [&[Target]; 4] = [
            &[Target::Q, Target::K, Target::V],
            &[Target::O],
            &[Target::Gate, Target::Up],
            &[Target::Down],
        ];
        groups.map(|group| {
            let chosen = group.iter().filter(|target| self.settings.targets.contains(target));
            chosen.count() as u64 * self.settings.rank
        })
    }

    /// A block's adapter as a pass takes it: factors joined (B block-diagonal), in the compute dtype.
    fn prepared_layer(&self) -> u64 {
        let ranks = self.ranks().into_iter();
        let elements = |((outputs, inputs), rank): ((u64, u64), u64)| (outputs + inputs) * rank;
        self.matrices().into_iter().zip(ranks).map(elements).sum::<u64>() * self.size
    }

    /// What one block keeps of a pass for its backward pass (see `csrc/ops.cpp`).
    fn kept_layer(&self, pass: Pass) -> u64 {
        let (hidden, inner, size) = (self.hidden, self.inner, self.size);
        let downs = self.ranks().iter().sum::<u64>() * size;
        let per_token = match self.device {
            // Norms: sum, result, one f32. Attention: rotated queries and keys, values, result, one f32 a head.
            Device::Cpu => {
                let norms = 2 * (2 * hidden * size + 4);
                let attention = (2 * self.queries + 2 * self.keys) * size + 4 * self.heads;
                norms + attention + 3 * inner * size
            }
            // libtorch's operators: norms in f32 beside their results; queries, and keys and values repeated for every
            // query head, in f32; probabilities and mask of every head; gate, up, their activation and product.
            _ => {
                let norms = 2 * (8 * hidden + hidden * size);
                let attention = 3 * 4 * self.queries + self.queries * size;
                let probabilities = self.heads * pass.length * 4 + pass.length;
                norms + attention + probabilities + 4 * inner * size
            }
        };
        pass.tokens * (per_token + downs)
    }

    /// What one block holds on its way forward.
    fn forward_layer(&self, pass: Pass) -> u64 {
        let widths = 8 * self.hidden + 2 * self.queries + 2 * self.keys + 3 * self.inner;
        let attention = match self.device {
            Device::Cpu => 0,
            // Of one sequence: scores, masked scores, probabilities in f32.
            _ => 3 * 4 * self.heads * pass.length.min(pass.tokens) * pass.length,
        };
        pass.tokens * widths * self.size + attention + self.unpacked(2)
    }

    /// What the backward pass through the topmost block takes beside what was kept, some of which it has freed by then.
    fn backward_layer(&self, pass: Pass) -> u64 {
        let (hidden, inner) = (self.hidden * self.size, self.inner * self.size);
        let tokens = pass.tokens;
        let down = tokens * (hidden + inner) + self.unpacked(3);
        let swiglu = tokens * 2 * inner;
        let gate_up = (tokens * 2 * hidden + self.unpacked(2)).saturating_sub(tokens * inner);
        let attention = match self.device {
            Device::Cpu => 0,
            _ => 4 * 4 * self.heads * pass.length * pass.length,
        };
        down.max(swiglu).max(gate_up) + attention
    }

    /// Hidden states after the last block: norm, selected rows, and their derivative.
    fn output(&self, pass: Pass, with_vocabulary: bool) -> u64 {
        let states = pass.tokens * self.hidden * self.size;
        if !with_vocabulary {
            return 2 * states;
        }
        let rows = pass.tokens.min(VOCABULARY_ROWS);
        4 * states + rows * self.vocabulary * self.logit_bytes()
    }

    /// Of one row of logits, its probabilities beside it where libtorch's operators compute them.
    fn logit_bytes(&self) -> u64 {
        if self.device == Device::Cpu { self.size } else { 3 * 4 + self.size }
    }

    /// What training keeps for the backward pass of `kept` tokens, and what comes on top.
    fn training(&self, kept: Pass, with_vocabulary: bool) -> u64 {
        let prepared = self.prepared_layer();
        let blocks = if self.settings.recompute {
            let inputs = kept.tokens * self.layers * self.hidden * self.size;
            let stream = kept.tokens * 5 * self.hidden * self.size;
            inputs + stream + self.kept_layer(kept) + prepared
        } else {
            self.layers * (self.kept_layer(kept) + prepared)
        };
        blocks + self.output(kept, with_vocabulary)
    }

    fn without_gradients(&self, pass: Pass) -> u64 {
        self.forward_layer(pass) + self.prepared_layer() + pass.tokens * self.hidden * self.size
    }

    fn kv_cache(&self, slots: u64) -> u64 {
        2 * slots * self.keys * self.size * self.layers
    }

    /// Sampling's transients: the prompts' pass, the adapter prepared for every block, logits (on the CPU too).
    fn sampling(&self, prompts: Pass, rows: u64, with_adapter: bool) -> u64 {
        let adapter = if with_adapter { self.layers * self.prepared_layer() } else { 0 };
        let logits = rows * self.vocabulary * self.size;
        (self.forward_layer(prompts)).max(logits) + adapter
    }

    /// Merging: a shard waiting to be written and one matrix in the making; then a block at a time.
    fn merging(&self) -> u64 {
        let written = self.size.min(self.stored); // as `merge::output_dtype`
        let dense = (self.vocabulary_bytes() + self.layers * self.dense_layer_bytes()) / self.size
            * written;
        let matrix = self.inner * self.hidden * (4 + 4 + written);
        let writing = dense.min(SHARD_BYTES as u64) + matrix;
        writing.max(self.vocabulary_bytes() + self.dense_layer_bytes() + self.loading())
    }
}

/// `n_items` of `length` tokens in passes of at most `budget`: the largest pass.
fn largest_pass(n_items: u64, length: u64, budget: u64) -> Pass {
    Pass { tokens: length * (budget / length).clamp(1, n_items.max(1)), length }
}

/// What a stage needs.
fn count(stage: Stage, counter: &Counter<'_>, prompt_tokens: u64) -> Need {
    let settings = counter.settings;
    let runtime = match counter.device {
        Device::Cpu if counter.size == 2 => CPU_RUNTIME_BYTES + ONEDNN_BYTES,
        Device::Cpu => CPU_RUNTIME_BYTES,
        _ => CUDA_RUNTIME_BYTES,
    };
    let adapter = 4 * counter.adapter_size();
    let n_models = match stage {
        Stage::Demonstrations if settings.source == Demonstrated::Own => 0,
        Stage::Conversations if settings.personas == Personas::Original => 2, // one before SFT, one after
        _ => 1,
    };
    let mut need = Need { runtime, weights: n_models * counter.weights(), ..Need::default() };
    need.phase("loading", need.weights, if n_models == 0 { 0 } else { counter.loading() });
    let chain = 3 * settings.max_new_tokens + QUESTION_TOKENS;
    match stage {
        Stage::Sft => count_training(&mut need, counter, 1, true),
        Stage::Reward => count_training(&mut need, counter, 2, false),
        Stage::Ppo => count_ppo(&mut need, counter, prompt_tokens),
        Stage::Demonstrations if n_models == 0 => {}
        Stage::Demonstrations => {
            let prompt_tokens = prompt_tokens + settings.few_shot * EXEMPLAR_TOKENS;
            count_sampling(&mut need, counter, [UNIT_PROMPTS, 1], prompt_tokens, chain, false);
        }
        Stage::Conversations => {
            let counts = [UNIT_PROMPTS, UNIT_SAMPLES];
            count_sampling(&mut need, counter, counts, prompt_tokens, chain, false);
        }
        Stage::Preferences => {
            let length = prompt_tokens + 3 * Stage::Conversations.defaults().max_new_tokens;
            let pass = Pass { tokens: JUDGE_TOKENS, length };
            need.activations = counter.without_gradients(pass);
            need.phase_with("judging", need.activations);
        }
        Stage::Scoring => {
            need.adapters = 4 * adapter; // the policy and three reward models
            let counts = [SCORING_UNITS * UNIT_PROMPTS, 1];
            count_sampling(&mut need, counter, counts, prompt_tokens, chain, true);
            let length = prompt_tokens + chain;
            let pass = largest_pass(UNIT_PROMPTS, length, settings.micro_batch_tokens);
            need.activations = counter.without_gradients(pass);
            need.phase_with("scoring", need.activations);
        }
    }
    need
}

/// Sampling of so many prompts and samples of each, which take `own` tokens a sample after the prompt.
fn count_sampling(
    need: &mut Need,
    counter: &Counter<'_>,
    [n_prompts, n_samples]: [u64; 2],
    prompt_tokens: u64,
    own: u64,
    with_adapter: bool,
) {
    let prompts = Pass { tokens: n_prompts * prompt_tokens, length: prompt_tokens };
    need.kv_cache = counter.kv_cache(n_prompts * (prompt_tokens + n_samples * own));
    need.rollouts = counter.sampling(prompts, n_prompts * n_samples, with_adapter);
    need.phase_with("sampling", need.kv_cache + need.rollouts);
}

/// SFT (one sequence an example) and reward modelling (two, and no vocabulary).
fn count_training(need: &mut Need, counter: &Counter<'_>, sides: u64, with_vocabulary: bool) {
    let settings = counter.settings;
    let adapter = 4 * counter.adapter_size();
    need.adapters = adapter;
    need.optimiser = 3 * adapter; // gradients and two moments
    let example = sides * settings.max_length;
    let pass = largest_pass(settings.batch_size, example, settings.micro_batch_tokens);
    let pass = Pass { length: settings.max_length, ..pass };
    need.activations = counter.training(pass, with_vocabulary);
    let top = counter.backward_layer(pass);
    need.phase_with("backward pass", need.activations + top);
    if with_vocabulary {
        let logits = EVALUATION_ROWS * counter.vocabulary * counter.size;
        let evaluation = counter.without_gradients(pass).max(logits);
        need.phase_with("evaluation", evaluation);
    }
    need.phase_with("optimiser step", 2 * adapter);
    // SFT lets go of its model before it merges.
    let (merges, held) = match with_vocabulary {
        true => (true, 0),
        false => (settings.merge, need.weights),
    };
    if merges && counter.device == Device::Cpu {
        need.phase("merging", held, need.adapters + need.optimiser + counter.merging());
    }
}

fn count_ppo(need: &mut Need, counter: &Counter<'_>, prompt_tokens: u64) {
    let settings = counter.settings;
    let adapter = 4 * counter.adapter_size();
    let trained = if settings.value == Critic::Adapter { 2 } else { 1 };
    need.adapters = (trained + 3) * adapter; // policy, critic if it has its own, three reward models
    need.optimiser = 3 * trained * adapter;
    let questions = if settings.turns() == 3 { QUESTION_TOKENS } else { 0 };
    let own = settings.turns() * settings.max_new_tokens + questions;
    let length = prompt_tokens + own;
    let rows = settings.max_rows.min(settings.rollout_size);
    count_sampling(need, counter, [rows, 1], prompt_tokens, own, true);
    let pass = largest_pass(settings.rollout_size, length, settings.micro_batch_tokens);
    need.phase_with("scoring", counter.without_gradients(pass));
    let all = settings.rollout_size * length;
    let keeps = settings.n_minibatches == 1 && all <= settings.keep_graph_tokens;
    let kept = Pass { tokens: if keeps { all } else { pass.tokens }, length };
    need.activations = counter.training(kept, true); // a critic of its own comes when the policy's pass is over
    let top = counter.backward_layer(pass);
    need.phase_with("backward pass", need.activations + top);
    need.phase_with("optimiser step", 2 * adapter);
    if settings.merge && counter.device == Device::Cpu {
        need.phase_with("merging", counter.merging());
    }
}

/// A stage's plan.
struct Planned {
    stage: Stage,
    need: Need,
    settings: Settings,
    /// For each size in GB: the changes it takes, or the bytes needed even so.
    fits: Vec<(u64, Result<Vec<String>, u64>)>,
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
    stage: Stage,
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
        if !stage.keys().contains(&key) || need(&settings) >= need(&before) {
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

/// A model's shape, and the bytes of a number as its files store it; a `config.json` alone is enough, and is taken to stand
/// for weights of 16 bits.
fn shape(model: &str) -> anyhow::Result<(ModelConfig, u64)> {
    let path = Path::new(model);
    if path.extension().is_some_and(|extension| extension == "json") {
        let text = fs_err::read_to_string(path)?;
        let map: Map<String, Value> = serde_json::from_str(&text).map_err(|error| {
            arete_stage::exit::BadInput(format!("{model}: expected a config.json: {error}"))
        })?;
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

pub(crate) fn run(model: &str, arguments: &PlanArgs) -> anyhow::Result<()> {
    let (config, stored) = shape(model)?;
    let (tables, path) = match &arguments.recipe {
        None => (toml::Table::new(), PathBuf::new()),
        Some(path) => {
            let text = fs_err::read_to_string(path)?;
            let tables = toml::from_str(&text).map_err(|error| {
                arete_stage::exit::BadInput(format!("{}: {error}", path.display()))
            })?;
            (tables, path.clone())
        }
    };
    let named = tables.get("run").and_then(|run| run.get("device")).and_then(toml::Value::as_str);
    let device = match arguments.device.as_deref().or(named).unwrap_or("cpu") {
        name if name.starts_with("cuda") => Device::Cuda(0),
        "cpu" | "auto" => Device::Cpu,
        other => anyhow::bail!(arete_stage::exit::Usage(format!(
            "--device: expected cpu or cuda, got {other}"
        ))),
    };
    let mut stages = Vec::new();
    for stage in Stage::ALL {
        let settings = Settings::of(stage, &tables, &path)?;
        let need = |settings: &Settings| {
            let counter = Counter::new(&config, settings, device, stored);
            count(stage, &counter, arguments.prompt_tokens)
        };
        let fits = GPU_SIZES_GB
            .into_iter()
            .map(|size_gb| {
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "a whole number of bytes is wanted, and the sizes are positive"
                )]
                let usable = (size_gb as f64 * 1e9 * USABLE) as u64;
                (size_gb, fit(usable, stage, &settings, |settings| need(settings).peak().1))
            })
            .collect();
        stages.push(Planned { stage, need: need(&settings), settings, fits });
    }
    let text = if arguments.json {
        let stages: Map<String, Value> = stages
            .iter()
            .map(|planned| (planned.stage.name().to_owned(), as_json(planned)))
            .collect();
        let device = if device == Device::Cpu { "cpu" } else { "cuda" };
        let plan = json!({
            "device": device,
            "prompt_tokens": arguments.prompt_tokens,
            "stages": stages,
        });
        serde_json::to_string_pretty(&plan)? + "\n"
    } else {
        let mut text = table(&stages);
        text += if device == Device::Cpu {
            "\nResident memory of the process, in GB.\n"
        } else {
            "\nMemory of the GPU, in GB: counted, not measured.\n"
        };
        text + &format!(
            "Prompts of {} tokens; other lengths are those at which the recipe cuts.\n",
            arguments.prompt_tokens
        )
    };
    std::io::stdout().lock().write_all(text.as_bytes()).context("writing to stdout")
}

fn as_json(planned: &Planned) -> Value {
    let Planned { stage, need, settings, fits } = planned;
    let fits: Map<String, Value> = fits
        .iter()
        .map(|(size_gb, fit)| {
            let fit = match fit {
                Ok(changes) => json!({"fits": true, "changes": changes}),
                Err(bytes) => json!({"fits": false, "needs_bytes": bytes}),
            };
            (format!("{size_gb}"), fit)
        })
        .collect();
    let phases: Map<String, Value> =
        need.phases.iter().map(|(name, bytes)| ((*name).to_owned(), json!(bytes))).collect();
    let (peak_phase, peak_bytes) = need.peak();
    json!({
        "settings": settings.of_interest(*stage),
        "runtime_bytes": need.runtime,
        "weights_bytes": need.weights,
        "adapters_bytes": need.adapters,
        "optimiser_bytes": need.optimiser,
        "activations_bytes": need.activations,
        "kv_cache_bytes": need.kv_cache,
        "rollouts_bytes": need.rollouts,
        "phases_bytes": phases,
        "peak_phase": peak_phase,
        "peak_bytes": peak_bytes,
        "fits_gb": fits,
    })
}

fn table(stages: &[Planned]) -> String {
    #[expect(clippy::cast_precision_loss, reason = "shown with two places")]
    let gb = |bytes: u64| format!("{:.2}", bytes as f64 / 1e9);
    let mut text = String::from(
        "| stage | runtime | weights | adapters | optimiser | activations | KV cache | rollouts | peak | in |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
    );
    for Planned { stage, need, .. } in stages {
        let (phase, peak) = need.peak();
        let parts = [
            need.runtime,
            need.weights,
            need.adapters,
            need.optimiser,
            need.activations,
            need.kv_cache,
            need.rollouts,
            peak,
        ];
        let parts = parts.map(gb).join(" | ");
        text += &format!("| {} | {parts} | {phase} |\n", stage.name());
    }
    text += "\n| stage |";
    for size_gb in GPU_SIZES_GB {
        text += &format!(" {size_gb} GB |");
    }
    text += "\n|---|---|---|---|---|\n";
    for Planned { stage, fits, .. } in stages {
        text += &format!("| {} |", stage.name());
        for (_, fit) in fits {
            text += &match fit {
                Ok(changes) if changes.is_empty() => " fits |".to_owned(),
                Ok(changes) => format!(" with {} |", changes.join(", ")),
                Err(bytes) => format!(" no: {} GB at least |", gb(*bytes)),
            };
        }
        text += "\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Stage::Sft.defaults()
    }

    /// Mistral-7B: 7,241,732,096 parameters, as published; 2 × 32,000 × 4,096 in the vocabulary, 266,240 in norms.
    #[test]
    fn the_weights_of_mistral_7b_are_counted_right() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/goldens/config/mistral_7b_instruct_v0.2.json");
        let (config, stored) = shape(path.to_str().unwrap()).unwrap();
        let cuda = Device::Cuda(0);
        let dense = settings();
        let angles = 32_768 * 128 * 4;
        let counted = Counter::new(&config, &dense, cuda, stored).weights();
        assert_eq!(counted - angles, 2 * 7_241_732_096);
        // Four bits and a sixteenth of four bytes for each of the blocks' numbers.
        let packed = Settings { nf4: true, ..dense };
        let blocks = 7_241_732_096 - 2 * 32_000 * 4096 - 266_240;
        let counted = Counter::new(&config, &packed, cuda, stored).weights();
        assert_eq!(counted - angles, 2 * (2 * 32_000 * 4096 + 266_240) + blocks / 2 + blocks / 16);
        // peft 0.21: 41,943,040 trainable parameters at rank 16 on all seven layers.
        assert_eq!(Counter::new(&config, &packed, cuda, stored).adapter_size(), 41_943_040);
    }

    #[test]
    fn directories_are_counted_as_they_are_stored() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/llama_untied");
        let stored = |directory: &Path| shape(directory.to_str().unwrap()).unwrap().1;
        assert_eq!(stored(&golden), 4, "f32");
        let directory = tempfile::tempdir().unwrap();
        let half = directory.path().join("half");
        let extra = Map::new();
        let source = Source::Directory(golden);
        arete_model::merge::write_model(&source, None, None, &half, Kind::BFloat16, None, extra)
            .unwrap();
        assert_eq!(stored(&half), 2);
        fs_err::remove_file(half.join("model.safetensors")).unwrap();
        assert_eq!(stored(&half), 2, "a configuration alone");
    }

    #[test]
    fn changes_are_made_until_it_fits_and_no_further() {
        let need = |s: &Settings| {
            1000 - 300 * u64::from(s.recompute)
                - 400 * u64::from(s.nf4)
                - u64::from(s.micro_batch_tokens == 512)
        };
        let fit = |bytes| fit(bytes, Stage::Sft, &settings(), need);
        assert_eq!(fit(1000), Ok(vec![]));
        assert_eq!(fit(700), Ok(vec!["recompute = true".to_owned()]));
        let both = ["recompute = true", "nf4 = true"].map(str::to_owned).to_vec();
        assert_eq!(fit(300), Ok(both));
        assert_eq!(fit(200), Err(299));
    }

    #[test]
    fn passes_hold_whole_items() {
        assert_eq!(largest_pass(16, 100, 2048).tokens, 1600);
        assert_eq!(largest_pass(16, 300, 2048).tokens, 1800);
        assert_eq!(largest_pass(16, 3000, 2048).tokens, 3000);
    }

    #[test]
    fn a_recipe_with_a_wrong_value_is_blamed() {
        let tables: toml::Table = toml::from_str("[sft]\nrank = \"x\"").unwrap();
        let error = Settings::of(Stage::Sft, &tables, Path::new("r.toml")).unwrap_err();
        assert!(error.to_string().starts_with("r.toml: [sft] rank: "), "{error}");
        let tables: toml::Table =
            toml::from_str("[run]\ndtype = \"f32\"\n[reward]\ntargets = [\"q\", \"v\"]").unwrap();
        let reward = Settings::of(Stage::Reward, &tables, Path::new("r.toml")).unwrap();
        assert_eq!((reward.targets, reward.dtype), (vec![Target::Q, Target::V], Dtype::F32));
        for (stage, recipe, words) in [
            (Stage::Sft, "[sft]\nmax_length = 0", "r.toml: [sft] max_length: expected at least 1"),
            (Stage::Ppo, "[ppo]\nmax_new_tokens = 0", "[ppo] max_new_tokens: expected at least 1"),
            (Stage::Ppo, "[ppo]\nrollout = \"chian\"", "expected `chain` or `answer`"),
            (Stage::Ppo, "[ppo]\nvalue = \"adaptor\"", "[ppo] value: unknown variant `adaptor`"),
            (Stage::Scoring, "[run]\ndtype = \"float32\"", "[run] dtype: unknown variant"),
        ] {
            let tables: toml::Table = toml::from_str(recipe).unwrap();
            let error = Settings::of(stage, &tables, Path::new("r.toml")).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
        let words =
            "[ppo]\nkeep_graph_tokens = 0\nvalue = \"trunk_detached\"\nrollout = \"answer\"";
        let ppo = Settings::of(Stage::Ppo, &toml::from_str(words).unwrap(), Path::new("r.toml"));
        let ppo = ppo.unwrap();
        assert_eq!((ppo.keep_graph_tokens, ppo.turns()), (0, 1));
        assert_eq!(ppo.value, Critic::TrunkDetached);
    }
}
