//! Settings of the stage: flags, and the `[ppo]` table of a recipe.

use std::fmt;
use std::str::FromStr;

use arete_training::{ComputeArgs, LoraArgs, ScheduleKind, Select};
use clap::ArgAction;
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::kl::{KlControl, KlController};
use crate::reward::{Ensemble, Placement};

/// What the policy is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum RolloutKind {
    /// Every turn of the constitution; each reward model scores its own reply.
    Chain,
    /// The answer alone, scored by its own reward model.
    Answer,
}

impl RolloutKind {
    /// Replies in a conversation, of a chain of so many turns.
    pub fn n_turns(self, n_chain: usize) -> usize {
        match self {
            Self::Chain => n_chain,
            Self::Answer => 1,
        }
    }
}

/// Where the critic reads its values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum CriticKind {
    /// A head on the policy's hidden states; its gradients reach the policy's adapter too.
    Trunk,
    /// A head on the policy's hidden states that leaves the adapter to the policy.
    TrunkDetached,
    /// A head on an adapter of its own: another forward and backward pass, and one more forward pass in the first update.
    Adapter,
}

/// A reward computed by rule, for tests and for trying out the machinery.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ProgrammedReward {
    /// Part of a reply's letters that are this one, upper and lower case alike.
    Letter(char),
    /// −|n − target| / target, n = tokens sampled for the reply.
    Length(usize),
}

impl FromStr for ProgrammedReward {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("expected letter:<letter> or length:<tokens>, got {text}");
        match text.split_once(':').ok_or_else(wrong)? {
            ("letter", letter) => {
                let mut letters = letter.chars();
                match (letters.next(), letters.next()) {
                    (Some(letter), None) if letter.is_alphabetic() => {
                        Ok(Self::Letter(letter.to_ascii_lowercase()))
                    }
                    _ => Err(wrong()),
                }
            }
            ("length", target) => {
                target.parse().ok().filter(|n| *n > 0).map(Self::Length).ok_or_else(wrong)
            }
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for ProgrammedReward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Letter(letter) => write!(f, "letter:{letter}"),
            Self::Length(target) => write!(f, "length:{target}"),
        }
    }
}

impl TryFrom<String> for ProgrammedReward {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<ProgrammedReward> for String {
    fn from(reward: ProgrammedReward) -> Self {
        reward.to_string()
    }
}

/// Settings of PPO.
#[derive(Clone, Debug, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct Config {
    /// Base model (after SFT: the merged SFT directory): a Hugging Face directory, a GGUF file, or a hub id
    #[arg(long)]
    pub model: Option<String>,
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
    /// Weight of the KL penalty in the reward (TRL: 0.05)
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
    /// Stop an iteration's updates once ½·mean((new − old log-probability)²) exceeds this; 0 = never
    #[arg(long, default_value_t = 0.1)]
    pub target_kl: f64,
    /// Bring advantages to mean 0 and variance 1 over the rollout
    #[arg(long, default_value_t = true, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub whiten_advantages: bool,
    /// Bring token rewards to variance 1 over the rollout, keeping their mean (Ziegler et al. 2019; off in TRL)
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub whiten_rewards: bool,
    /// How the standardised scores of the reward models become one
    #[arg(long, value_enum, default_value_t = Ensemble::Mean)]
    pub ensemble: Ensemble,
    /// λ of the ensemble mean_minus_std
    #[arg(long, default_value_t = 0.5)]
    pub ensemble_std_weight: f64,
    /// Where scores are paid out in a chain; min and mean_minus_std need final
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
    /// Conversations of the reference sampled to standardise a reward model that has no score_stats.json
    #[arg(long, default_value_t = 64)]
    pub stats_samples: usize,
    /// Reward by rule instead of reward models: `letter:LETTER` or `length:TOKENS`
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
    /// How the frozen model is held, and where it computes.
    #[command(flatten)]
    #[serde(flatten)]
    pub compute: ComputeArgs,
    /// Seed of the adapter's first values, of the order of prompts and of sampling
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
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

    /// Temperature of probes.
    pub fn probe_temperature(&self) -> f64 {
        self.probe_temperature.unwrap_or(self.temperature)
    }

    /// Checks what cannot be said by types.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] naming the key.
    pub fn check(&self) -> Result<(), Error> {
        let positive = |name, value: f64| {
            check(name, value.is_finite() && value > 0.0, "a number above 0", &value)
        };
        let not_negative = |name, value: f64| {
            check(name, value.is_finite() && value >= 0.0, "a number of at least 0", &value)
        };
        positive("temperature", self.temperature)?;
        positive("clip_range", self.clip_range)?;
        positive("value_clip_range", self.value_clip_range)?;
        positive("kl_target", self.kl_target)?;
        positive("kl_horizon", self.kl_horizon)?;
        for (name, value) in [
            ("learning_rate", self.learning_rate),
            ("value_learning_rate", self.value_learning_rate),
            ("kl_coef", self.kl_coef),
            ("value_coef", self.value_coef),
            ("target_kl", self.target_kl),
            ("ensemble_std_weight", self.ensemble_std_weight),
            ("missing_eos_penalty", self.missing_eos_penalty),
            ("score_clip", self.score_clip),
            ("max_grad_norm", self.max_grad_norm),
            ("weight_decay", self.weight_decay),
            ("probe_temperature", self.probe_temperature()),
        ] {
            not_negative(name, value)?;
        }
        // The coefficient is multiplied by 1 ± 0.2 · rollout_size / kl_horizon, which must stay above 0.
        let slow =
            self.kl_control == KlControl::Fixed || self.kl_horizon >= self.rollout_size as f64;
        check("kl_horizon", slow, "at least rollout_size", &self.kl_horizon)?;
        for (name, value) in [("gamma", self.gamma), ("lambda", self.lambda)] {
            check(name, (0.0..=1.0).contains(&value), "a number within 0 to 1", &value)?;
        }
        for (name, value) in [
            ("max_new_tokens", self.max_new_tokens),
            ("rollout_size", self.rollout_size),
            ("n_minibatches", self.n_minibatches),
            ("micro_batch_tokens", self.micro_batch_tokens),
            ("probe_prompts", self.probe_prompts),
            ("stats_samples", self.stats_samples),
            ("max_rows", self.max_rows),
        ] {
            check(name, value > 0, "at least 1", &value)?;
        }
        check("iterations", self.iterations > 0, "at least 1", &self.iterations)?;
        check("epochs", self.epochs > 0, "at least 1", &self.epochs)?;
        check(
            "value_warmup",
            self.value_warmup < self.iterations,
            &format!("fewer than the {} iterations, or the policy never learns", self.iterations),
            &self.value_warmup,
        )?;
        let moves = self.kl_control == KlControl::Fixed || self.kl_coef > 0.0;
        check("kl_coef", moves, "a number above 0, for kl_control = adaptive multiplies it", &0)?;
        check(
            "n_minibatches",
            self.rollout_size.is_multiple_of(self.n_minibatches),
            &format!("a divisor of rollout_size ({})", self.rollout_size),
            &self.n_minibatches,
        )?;
        let mixes_turns = self.ensemble != Ensemble::Mean && self.rollout == RolloutKind::Chain;
        check(
            "placement",
            !(mixes_turns && self.placement == Placement::PerTurn),
            "final, for an ensemble other than mean over a chain",
            &"per_turn",
        )
    }
}

fn check(
    name: &'static str,
    is_good: bool,
    expected: &str,
    got: &impl fmt::Display,
) -> Result<(), Error> {
    if is_good {
        return Ok(());
    }
    Err(Error::Setting { name, expected: expected.to_owned(), got: got.to_string() })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

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
    fn programmed_rewards_are_read_and_written() {
        for text in ["letter:e", "length:24"] {
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
