//! The counting itself: what a stage holds all the time, and what each phase needs on top.

use arete_model::adapter::merge::SHARD_BYTES;
use arete_model::{Device, ModelConfig, Target};

use super::{Role, Settings};

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
/// Tokens of one of the chain's further questions with its template.
const QUESTION_TOKENS: u64 = 32;
/// Rows of the vocabulary product held at a time in training and in an evaluation (`csrc/ops.cpp`, the SFT stage).
const VOCABULARY_ROWS: u64 = 256;
const EVALUATION_ROWS: u64 = 512;
/// Prompts of a unit of curation and scoring, samples of each in curation, and units that scoring answers at a time.
const UNIT_PROMPTS: u64 = 32;
const UNIT_SAMPLES: u64 = 2;
const SCORING_UNITS: u64 = 2;
/// Tokens of one exemplar that is shown before a prompt: a question and three replies of some forty tokens.
const EXEMPLAR_TOKENS: u64 = 200;
/// Tokens in one pass of a judge.
const JUDGE_TOKENS: u64 = 2048;

/// What a stage takes, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Need {
    /// Program and libraries, always there.
    pub runtime: u64,
    /// Frozen weights.
    pub weights: u64,
    /// Adapters.
    pub adapters: u64,
    /// Gradients and moments.
    pub optimiser: u64,
    /// Activations, at their largest in some phase.
    pub activations: u64,
    /// Keys and values of sequences in flight.
    pub kv_cache: u64,
    /// What sampling holds beside them.
    pub rollouts: u64,
    /// What each phase holds in all.
    pub phases: Vec<(&'static str, u64)>,
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

    /// The phase that takes most, and its bytes.
    ///
    /// # Panics
    ///
    /// Never: loading is a phase of every stage.
    pub fn peak(&self) -> (&'static str, u64) {
        self.phases.iter().copied().max_by_key(|phase| phase.1).expect("loading is one")
    }
}

/// Bytes of a model's parts in one dtype on one device.
pub(super) struct Counter<'a> {
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
pub(super) struct Pass {
    pub(super) tokens: u64,
    length: u64,
}

impl<'a> Counter<'a> {
    pub(super) fn new(
        config: &'a ModelConfig,
        settings: &'a Settings,
        device: Device,
        stored: u64,
    ) -> Self {
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

    pub(super) fn weights(&self) -> u64 {
        let n_linear: u64 = self.matrices().iter().map(|(outputs, inputs)| outputs * inputs).sum();
        let layer = if self.settings.nf4 {
            n_linear / 2 + self.scales(n_linear / 64)
        } else {
            n_linear * self.size
        };
        let norms = (2 * self.layers + 1) * self.hidden * self.size;
        let angles = (self.config.max_position_embeddings * self.config.head_size * 4) as u64;
        self.vocabulary_bytes() + self.layers * layer + norms + angles
    }

    /// Of blocks of 64: in f32, or on a GPU in eight bits with a factor and an addend for 256.
    fn scales(&self, blocks: u64) -> u64 {
        match self.settings.double_quantize && self.device != Device::Cpu {
            true => blocks + blocks / 256 * 8,
            false => blocks * 4,
        }
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
    pub(super) fn adapter_size(&self) -> u64 {
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
        let per_token = match self.attends_by_rows() {
            // Norms: sum, result, one f32. Attention: rotated queries and keys, values, result, one f32 a head.
            true => {
                let norms = 2 * (2 * hidden * size + 4);
                let attention = (2 * self.queries + 2 * self.keys) * size + 4 * self.heads;
                norms + attention + 3 * inner * size
            }
            // Attention by libtorch's operators: queries, and keys and values repeated for every query head, in f32;
            // probabilities and mask of every head.
            false => {
                let norms = 2 * (2 * hidden * size + 4);
                let attention = 3 * 4 * self.queries + self.queries * size;
                let probabilities = self.heads * pass.length * 4 + pass.length;
                norms + attention + probabilities + 3 * inner * size
            }
        };
        pass.tokens * (per_token + downs)
    }

    /// Whether attention keeps a row's sum and no probabilities: by our kernels on the CPU, by flash attention in 16 bits on a GPU
    /// (from Ampere on).
    fn attends_by_rows(&self) -> bool {
        self.device == Device::Cpu || self.size == 2
    }

    /// On a GPU, the buffer in which the forward pass's thread unpacked: the backward pass has a thread, and a buffer, of its own.
    fn held_buffer(&self) -> u64 {
        if self.device == Device::Cpu { 0 } else { self.unpacked(2) }
    }

    /// What one block holds on its way forward.
    fn forward_layer(&self, pass: Pass) -> u64 {
        let widths = 8 * self.hidden + 2 * self.queries + 2 * self.keys + 3 * self.inner;
        let attention = match self.attends_by_rows() {
            true => 0,
            // Of one sequence: scores, masked scores, probabilities in f32.
            false => 3 * 4 * self.heads * pass.length.min(pass.tokens) * pass.length,
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
        let attention = match (self.device, self.attends_by_rows()) {
            (Device::Cpu, _) => 0,
            // Flash attention's: queries' in f32, keys' and values' of every query head.
            (_, true) => tokens * self.queries * (4 + 2 * self.size),
            (_, false) => 4 * 4 * self.heads * pass.length * pass.length,
        };
        down.max(swiglu).max(gate_up) + attention + self.held_buffer()
    }

    /// Hidden states after the last block: norm, selected rows, and their derivative.
    fn output(&self, pass: Pass, with_vocabulary: bool) -> u64 {
        let states = pass.tokens * self.hidden * self.size;
        if !with_vocabulary {
            return 2 * states;
        }
        let rows = pass.tokens.min(VOCABULARY_ROWS);
        4 * states + rows * self.vocabulary * self.size
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

    /// Gradients, their sum over shards if there are several, and two moments.
    fn optimiser_parts(&self) -> u64 {
        3 + u64::from(self.settings.virtual_shards > 1)
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
pub(super) fn largest_pass(n_items: u64, length: u64, budget: u64) -> Pass {
    Pass { tokens: length * (budget / length).clamp(1, n_items.max(1)), length }
}

/// What a stage needs.
pub(super) fn count(role: Role, counter: &Counter<'_>, prompt_tokens: u64) -> Need {
    let settings = counter.settings;
    let runtime = match counter.device {
        Device::Cpu if counter.size == 2 => CPU_RUNTIME_BYTES + ONEDNN_BYTES,
        Device::Cpu => CPU_RUNTIME_BYTES,
        _ => CUDA_RUNTIME_BYTES,
    };
    let adapter = 4 * counter.adapter_size();
    let n_models = match role {
        _ if !settings.asks_model => 0,
        Role::Conversations if settings.two_models => 2, // one before SFT, one after
        _ => 1,
    };
    let mut need = Need { runtime, weights: n_models * counter.weights(), ..Need::default() };
    need.phase("loading", need.weights, if n_models == 0 { 0 } else { counter.loading() });
    let chain = settings.turns * settings.max_new_tokens + (settings.turns - 1) * QUESTION_TOKENS;
    match role {
        _ if n_models == 0 => {}
        Role::Sft => count_training(&mut need, counter, 1, true),
        Role::Reward => count_training(&mut need, counter, 2, false),
        Role::Dpo => count_training(&mut need, counter, 2, true),
        Role::Ppo => count_ppo(&mut need, counter, prompt_tokens),
        Role::Demonstrations => {
            let prompt_tokens = prompt_tokens + settings.few_shot * EXEMPLAR_TOKENS;
            count_sampling(&mut need, counter, [UNIT_PROMPTS, 1], prompt_tokens, chain, false);
        }
        Role::Conversations => {
            let counts = [UNIT_PROMPTS, UNIT_SAMPLES];
            count_sampling(&mut need, counter, counts, prompt_tokens, chain, false);
        }
        Role::Preferences => {
            let length = prompt_tokens + settings.turns * settings.max_new_tokens;
            let pass = Pass { tokens: JUDGE_TOKENS, length };
            need.activations = counter.without_gradients(pass);
            need.phase_with("judging", need.activations);
        }
        Role::Scoring => {
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
    need.optimiser = counter.optimiser_parts() * adapter;
    let example = sides * settings.max_length;
    let shard = settings.batch_size.div_ceil(settings.virtual_shards);
    let pass = largest_pass(shard, example, settings.micro_batch_tokens);
    let length = settings.max_length;
    let pass = Pass { length, ..pass };
    need.activations = counter.training(pass, with_vocabulary);
    let top = counter.backward_layer(pass);
    need.phase_with("backward pass", need.activations + top);
    if with_vocabulary {
        let logits = EVALUATION_ROWS * counter.vocabulary * counter.size;
        let whole = largest_pass(settings.batch_size, example, settings.micro_batch_tokens);
        let evaluation = counter.without_gradients(Pass { length, ..whole }).max(logits);
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

/// Tokens of a sampled conversation whose every reply is as long as it may be.
pub(super) fn conversation_tokens(settings: &Settings, prompt_tokens: u64) -> u64 {
    let questions = (settings.turns - 1) * QUESTION_TOKENS;
    prompt_tokens + settings.turns * settings.max_new_tokens + questions
}

fn count_ppo(need: &mut Need, counter: &Counter<'_>, prompt_tokens: u64) {
    let settings = counter.settings;
    let adapter = 4 * counter.adapter_size();
    let trained = if settings.own_critic { 2 } else { 1 };
    need.adapters = (trained + 3) * adapter; // policy, critic if it has its own, three reward models
    need.optimiser = counter.optimiser_parts() * trained * adapter;
    let length = conversation_tokens(settings, prompt_tokens);
    let own = length - prompt_tokens;
    let rows = settings.max_rows.min(settings.rollout_size);
    count_sampling(need, counter, [rows, 1], prompt_tokens, own, true);
    let pass = largest_pass(settings.rollout_size, length, settings.micro_batch_tokens);
    need.phase_with("scoring", counter.without_gradients(pass));
    let all = settings.rollout_size * length;
    let keeps = settings.n_minibatches == 1 && all <= settings.keep_graph_tokens;
    let minibatch = settings.rollout_size.div_ceil(settings.n_minibatches);
    let shard = minibatch.div_ceil(settings.virtual_shards);
    let pass = largest_pass(shard, length, settings.micro_batch_tokens);
    let kept = Pass { tokens: if keeps { all } else { pass.tokens }, length };
    need.activations = counter.training(kept, true); // a critic of its own comes when the policy's pass is over
    let top = counter.backward_layer(pass);
    need.phase_with("backward pass", need.activations + top);
    need.phase_with("optimiser step", 2 * adapter);
    if settings.merge && counter.device == Device::Cpu {
        need.phase_with("merging", counter.merging());
    }
}
