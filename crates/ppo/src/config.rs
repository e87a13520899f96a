//! Settings of the stage: flags, and the `[ppo]` table of a recipe.

mod check;
mod words;

use arete_chain::memory::{self, Demand, Role};
use arete_engine::{EngineArgs, ServerConfig};
use arete_records::Refusal;
use arete_training::{ComputeArgs, LoraArgs, ScheduleKind, Select, ShardArgs};
use clap::ArgAction;
use serde::{Deserialize, Serialize};

pub use self::words::{Aggregation, Algorithm, CriticKind, ProgrammedReward, RolloutKind, Weights};
use crate::kl::{KlControl, KlController};
use crate::reward::{Ensemble, Placement};

/// Settings of PPO.
#[derive(Clone, Debug, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct Config {
    /// Base model (after SFT: the merged SFT directory): a Hugging Face directory, a GGUF file, or a hub id
    #[arg(long)]
    pub model: Option<String>,
    /// Where advantages come from: a critic (ppo), or the other samples of the same prompt (rloo: TRL's RLOOTrainer, Ahmadian et al.
    /// 2024; grpo: TRL's GRPOTrainer, Shao et al. 2024), which train no critic and leave every value_* key without effect
    #[arg(long, value_enum, default_value_t = Algorithm::Ppo)]
    pub algorithm: Algorithm,
    /// The chain of all turns, or the answer alone
    #[arg(long, value_enum, default_value_t = RolloutKind::Chain)]
    pub rollout: RolloutKind,
    /// Most tokens sampled in one turn (the report: 32, which cuts most replies)
    #[arg(long, default_value_t = 96)]
    pub max_new_tokens: usize,
    /// Sampling temperature; old, new and reference log-probabilities use it too (TRL: 0.7)
    #[arg(long, default_value_t = 0.7)]
    pub temperature: f64,
    /// Rollouts, each followed by its updates
    #[arg(long, default_value_t = 50)]
    pub iterations: u64,
    /// Conversations in a rollout
    #[arg(long, default_value_t = 32)]
    pub rollout_size: usize,
    /// Conversations of each prompt in a rollout, which rloo and grpo compare with each other (TRL: rloo 2, grpo 8); divides
    /// rollout_size
    #[arg(long, default_value_t = 1)]
    pub samples_per_prompt: usize,
    /// Optimiser steps in one pass over a rollout; divides rollout_size
    #[arg(long, default_value_t = 1)]
    pub n_minibatches: usize,
    /// Passes over each rollout (TRL: 4, OpenRLHF and verl: 1)
    #[arg(long, default_value_t = 2)]
    pub epochs: u64,
    /// Highest learning rate of the policy's adapter (usual for LoRA: 1e-5 to 5e-5; full fine-tuning in TRL: 3e-6)
    #[arg(long, default_value_t = 5e-5)]
    pub learning_rate: f64,
    /// Highest learning rate of the critic
    #[arg(long, default_value_t = 1e-4)]
    pub value_learning_rate: f64,
    /// Iterations at the start in which only the critic learns (verl's critic_warmup)
    #[arg(long, default_value_t = 1)]
    pub value_warmup: u64,
    /// How the learning rates fall over the iterations
    #[arg(long, value_enum, default_value_t = ScheduleKind::Linear)]
    pub schedule: ScheduleKind,
    /// Part of all iterations in which the learning rates rise from 0
    #[arg(long, default_value_t = 0.0)]
    pub warmup_ratio: f64,
    /// Weight of the KL penalty: in the reward (k1, TRL: 0.05), with grpo in the loss (k3, TRL: 0)
    #[arg(long, default_value_t = 0.05)]
    pub kl_coef: f64,
    /// Whether that weight stays or follows kl_target
    #[arg(long, value_enum, default_value_t = KlControl::Fixed)]
    pub kl_control: KlControl,
    /// Wanted KL in nats, summed over a conversation's own tokens (Ziegler et al. 2019: 6)
    #[arg(long, default_value_t = 6.0)]
    pub kl_target: f64,
    /// Conversations over which the weight may change by a fifth (Ziegler et al. 2019)
    #[arg(long, default_value_t = 10_000.0)]
    pub kl_horizon: f64,
    /// The ratio counts within 1 ± this (Schulman et al. 2017)
    #[arg(long, default_value_t = 0.2)]
    pub clip_range: f64,
    /// The value counts within this of its old one (TRL: 0.2)
    #[arg(long, default_value_t = 0.2)]
    pub value_clip_range: f64,
    /// Weight of the value loss (TRL: 0.1)
    #[arg(long, default_value_t = 0.1)]
    pub value_coef: f64,
    /// Discount per token
    #[arg(long, default_value_t = 1.0)]
    pub gamma: f64,
    /// Decay of generalised advantage estimation (OpenRLHF, verl: 1). Below 1, a critic that knows nothing yet and scores above 0
    /// press towards short replies: the end of a turn gets more of the score than the tokens before it
    #[arg(long, default_value_t = 1.0)]
    pub lambda: f64,
    /// Weigh each token's loss (with rloo: each reply's) by P(trainer) / P(sampler), at most this, where sampler and trainer are two
    /// programs (TRL's vllm_importance_sampling_clip_max: 3); 0 = off
    #[arg(long, default_value_t = 0.0)]
    pub importance_cap: f64,
    /// Stop an iteration's updates once ½·mean((new − old log-probability)²) exceeds this; 0 = never
    #[arg(long, default_value_t = 0.1)]
    pub target_kl: f64,
    /// Subtract the mean of what is paid at each turn, over the rollout, before advantages are estimated by a critic: scores that
    /// lie above 0 all alike then press towards nothing, whatever the critic knows yet
    #[arg(long, default_value_t = true, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub center_scores: bool,
    /// Bring advantages to mean 0 and variance 1 over the own tokens of a rollout; default: with ppo (TRL), not with rloo and grpo
    /// (TRL), whose groups centre them already
    #[arg(long, num_args = 0..=1, default_missing_value = "true")]
    pub whiten_advantages: Option<bool>,
    /// Bring token rewards to variance 1 over the rollout, keeping their mean (Ziegler et al. 2019; off in TRL)
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub whiten_rewards: bool,
    /// How the standardised scores of the reward models become one
    #[arg(long, value_enum, default_value_t = Ensemble::Mean)]
    pub ensemble: Ensemble,
    /// Weights of the reward models in mean, mean_minus_std and soft_min, by name; a model that is not named weighs 1, one that
    /// weighs 0 is read and logged only (recipe: { action = 1, motivation = 0.5 })
    #[arg(long, value_name = "NAME=WEIGHT,…")]
    pub weights: Option<Weights>,
    /// How several rewards are compared within a group, with rloo and grpo (TRL's multi_objective_aggregation; GDPO)
    #[arg(long, value_enum, default_value_t = Aggregation::SumThenNormalize)]
    pub aggregation: Aggregation,
    /// λ of the ensemble mean_minus_std
    #[arg(long, default_value_t = 0.5)]
    pub ensemble_std_weight: f64,
    /// τ of the ensemble soft_min, in standard deviations: near 0 it is min, far above the scores' spread it is mean
    #[arg(long, default_value_t = 1.0)]
    pub soft_min_temperature: f64,
    /// Take from each standardised score what the reply's length explains of it among the replies of the model that the run starts
    /// from (a line, by least squares; Singhal et al. 2023 find most of what reward models reward to be length)
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub length_residual: bool,
    /// Where scores are paid out in a chain; every ensemble but mean needs final
    #[arg(long, value_enum, default_value_t = Placement::PerTurn)]
    pub placement: Placement,
    /// Subtracted from the standardised score of a reply that the token limit cut (TRL recommends 1)
    #[arg(long, default_value_t = 1.0)]
    pub missing_eos_penalty: f64,
    /// Standardised scores count within ± this (OpenRLHF: 10); 0 = all
    #[arg(long, default_value_t = 10.0)]
    pub score_clip: f64,
    /// Where the critic reads its values
    #[arg(long, value_enum, default_value_t = CriticKind::Trunk)]
    pub value: CriticKind,
    /// The shape of the policy's adapter, and of the critic's if it has one.
    #[command(flatten)]
    #[serde(flatten)]
    pub lora: LoraArgs,
    /// Decoupled weight decay
    #[arg(long, default_value_t = 0.0)]
    pub weight_decay: f64,
    /// Largest norm of the gradient, of policy and critic each; 0 = no clipping (OpenRLHF, verl: 1)
    #[arg(long, default_value_t = 1.0)]
    pub max_grad_norm: f64,
    /// Iterations between probes on validation prompts; 0 = only before the first and after the last
    #[arg(long, default_value_t = 10)]
    pub probe_every: u64,
    /// Validation prompts in a probe
    #[arg(long, default_value_t = 32)]
    pub probe_prompts: usize,
    /// Sampling temperature of probes, 0 = greedy; default: that of the rollouts
    #[arg(long)]
    pub probe_temperature: Option<f64>,
    /// Conversations of the reference sampled to standardise a reward model that has no score_stats.json, and for length_residual
    #[arg(long, default_value_t = 64)]
    pub stats_samples: usize,
    /// Reward by rule instead of reward models: `letter:LETTER`, `length:TOKENS`, and the controls `constant` and `coin`, beside
    /// which reward models are not read
    #[arg(long, value_name = "RULE")]
    pub programmed_reward: Option<ProgrammedReward>,
    /// Iterations between checkpoints; 0 = only with probes, after the last and on a signal
    #[arg(long, default_value_t = 1)]
    pub checkpoint_every: u64,
    /// Newest checkpoints kept while training
    #[arg(long, default_value_t = 2)]
    pub keep_checkpoints: usize,
    /// Weights to end with: of the last iteration, or of the best probe
    #[arg(long, value_enum, default_value_t = Select::Best)]
    pub select: Select,
    /// Write the merged model as well
    #[arg(long, default_value_t = true, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub merge: bool,
    /// Most tokens in one forward pass; bounds memory, changes results only by rounding
    #[arg(long, default_value_t = 2048)]
    pub micro_batch_tokens: usize,
    /// A rollout of at most so many tokens keeps the activations of its first pass for the first update, which saves a pass;
    /// changes nothing but memory and time
    #[arg(long, default_value_t = 4096)]
    pub keep_graph_tokens: usize,
    /// Most sequences sampled at once; changes nothing but memory and time
    #[arg(long, default_value_t = 64)]
    pub max_rows: usize,
    /// Go on, with a warning, where sampler and trainer disagree on the CPU (docs/numerics.md); elsewhere that is never an error
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    #[serde(default)]
    pub allow_disagreement: bool,
    /// Most that log-probabilities of servers' replies may differ from the trainer's, nats, on the mean of a rollout's tokens
    #[arg(long, default_value_t = default_difference(), value_name = "NATS")]
    #[serde(default = "default_difference")]
    pub engine_difference: f64,
    /// Servers that sample in this process's place.
    #[command(flatten)]
    #[serde(flatten)]
    pub engines: EngineArgs,
    /// How they are talked to.
    #[command(flatten)]
    #[serde(flatten)]
    pub server: ServerConfig,
    /// Servers (vLLM, the base served as a sequence classifier) that score with the reward models' adapters instead of this process,
    /// separated by commas; compared with the reward models here at the start (docs/engines.md)
    #[arg(long, value_delimiter = ',', value_name = "URL,…")]
    #[serde(default)]
    pub reward_urls: Option<Vec<String>>,
    /// Most that servers' scores may differ from the reward models' here, in standard deviations, on the mean of a few conversations
    #[arg(long, default_value_t = default_tolerance(), value_name = "STD")]
    #[serde(default = "default_tolerance")]
    pub reward_tolerance: f64,
    /// The cut of a minibatch.
    #[command(flatten)]
    #[serde(flatten)]
    pub shards: ShardArgs,
    /// How the frozen model is held, and where it computes.
    #[command(flatten)]
    #[serde(flatten)]
    pub compute: ComputeArgs,
    /// Seed of the adapter's first values, of the order of prompts and of sampling
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// Rounding of two programs in bfloat16 stays below it.
fn default_difference() -> f64 {
    0.15
}

/// A tenth of what tells replies apart.
fn default_tolerance() -> f64 {
    0.1
}

impl Config {
    /// How the KL coefficient changes.
    pub fn kl_controller(&self) -> KlController {
        match self.kl_control {
            KlControl::Fixed => KlController::Fixed,
            KlControl::Adaptive => {
                KlController::Adaptive { target: self.kl_target, horizon: self.kl_horizon }
            }
        }
    }

    /// Whether advantages are whitened.
    pub fn whitens(&self) -> bool {
        self.whiten_advantages.unwrap_or(!self.algorithm.is_group())
    }

    /// Prompts of a rollout.
    pub fn n_prompts(&self) -> usize {
        self.rollout_size / self.samples_per_prompt
    }

    /// Whether each turn of a chain is paid by itself.
    pub fn pays_per_turn(&self) -> bool {
        self.placement == Placement::PerTurn && self.rollout == RolloutKind::Chain
    }

    /// Servers of reward models; none if this process scores.
    pub fn reward_urls(&self) -> Option<&[String]> {
        self.reward_urls.as_deref().filter(|urls| !urls.is_empty())
    }

    /// Temperature of probes.
    pub fn probe_temperature(&self) -> f64 {
        self.probe_temperature.unwrap_or(self.temperature)
    }
}

/// Names of the settings that count for memory.
const KEYS: [&str; 15] = [
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
    "double_quantize",
    "recompute",
    "dtype",
];

impl Config {
    /// What is counted of the memory that training takes, with so many turns in a chain.
    ///
    /// # Errors
    ///
    /// [`Refusal::BadSetting`] for a size of 0.
    pub fn demand(&self, n_turns: usize) -> Result<Demand, Refusal> {
        let positive = |key, value| memory::positive("ppo", key, value);
        let settings = memory::Settings {
            micro_batch_tokens: positive("micro_batch_tokens", self.micro_batch_tokens)?,
            max_new_tokens: positive("max_new_tokens", self.max_new_tokens)?,
            turns: if self.rollout == RolloutKind::Chain { n_turns as u64 } else { 1 },
            rollout_size: positive("rollout_size", self.rollout_size)?,
            n_minibatches: positive("n_minibatches", self.n_minibatches)?,
            own_critic: self.value == CriticKind::Adapter,
            keep_graph_tokens: self.keep_graph_tokens as u64,
            max_rows: positive("max_rows", self.max_rows)?,
            merge: self.merge,
            virtual_shards: positive("virtual_shards", self.shards.virtual_shards)?,
            ..self.compute.counted(&self.lora)
        };
        Ok(Demand { role: Role::Ppo, settings, keys: &KEYS })
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        config: Config,
    }

    fn config(args: &[&str]) -> Config {
        Cli::try_parse_from([&["ppo"], args].concat()).unwrap().config
    }

    #[test]
    fn the_defaults_pass() {
        config(&[]).check().unwrap();
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        for (args, message) in [
            (
                &["--n-minibatches", "3"][..],
                "n_minibatches: expected a divisor of rollout_size (32), got 3",
            ),
            (
                &["--ensemble", "min"][..],
                "placement: expected final, for an ensemble other than mean over a chain, got per_turn",
            ),
            (&["--temperature", "0"][..], "temperature: expected a number above 0, got 0"),
            (
                &["--iterations", "1"][..],
                "value_warmup: expected fewer than the 1 iterations, or the policy never learns, got 1",
            ),
            (
                &["--kl-control", "adaptive", "--kl-coef", "0"][..],
                "kl_coef: expected a number above 0, for kl_control = adaptive multiplies it, got 0",
            ),
            (
                &["--value-learning-rate=-1"][..],
                "value_learning_rate: expected a number of at least 0, got -1",
            ),
            (&["--lambda", "1.5"][..], "lambda: expected a number within 0 to 1, got 1.5"),
            (&["--iterations", "0"][..], "iterations: expected at least 1, got 0"),
        ] {
            assert_eq!(config(args).check().unwrap_err().to_string(), message);
        }
        config(&["--ensemble", "min", "--rollout", "answer"]).check().unwrap();
        config(&["--ensemble", "mean_minus_std", "--placement", "final"]).check().unwrap();
    }

    #[test]
    fn weights_come_from_a_recipes_table_and_a_flag_replaces_them() {
        let dir = tempfile::tempdir().unwrap();
        let recipe = dir.path().join("recipe.toml");
        fs_err::write(&recipe, "[ppo]\nweights = { action = 1, motivation = 0.5 }\n").unwrap();
        let weights = |flags: &[&str]| {
            let matches = Cli::command().get_matches_from([&["ppo"], flags].concat());
            let config: Config =
                arete_stage::recipe::resolve(&matches, "ppo", Some(&recipe)).unwrap();
            // As run.json has it, and back.
            let json = serde_json::to_value(&config).unwrap();
            assert_eq!(serde_json::from_value::<Config>(json.clone()).unwrap(), config);
            json["weights"].as_str().unwrap().to_owned()
        };
        assert_eq!(weights(&[]), "action=1,motivation=0.5");
        assert_eq!(weights(&["--weights", "motivation=3"]), "motivation=3");
        for text in ["action", "action=", "=1", "action=x", "action=1,action=2"] {
            assert!(text.parse::<Weights>().is_err(), "{text}");
        }
    }

    #[test]
    fn programmed_rewards_are_read_and_written() {
        for text in ["letter:e", "length:24", "constant", "coin"] {
            assert_eq!(text.parse::<ProgrammedReward>().unwrap().to_string(), text);
        }
        assert_eq!("letter:E".parse(), Ok(ProgrammedReward::Letter('e')));
        for text in ["letter:", "letter:ab", "length:0", "length:x", "words:3", "e"] {
            assert!(text.parse::<ProgrammedReward>().is_err(), "{text}");
        }
        let config = config(&["--programmed-reward", "letter:e"]);
        let json = serde_json::to_value(&config).unwrap();
        assert_eq!(json["programmed_reward"], "letter:e");
        assert_eq!(serde_json::from_value::<Config>(json).unwrap(), config);
    }
}
