//! The learning half of an iteration: forward passes of policy and critic, and the clipped steps.

use arete_model::{Adapter, Decoder, LoraConfig, Pass, ScalarHead, Tensor, logprobs};
use arete_training::order::permutation;
use arete_training::{AdamW, AdamWConfig};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use crate::config::{Config, Value};
use crate::loss::{policy_loss, value_loss};
use crate::rollout::{Conversation, Pack};
use crate::{Error, config};

/// First loss scale of an f16 run, and the steps without overflow after which it doubles (PyTorch's `GradScaler`).
const FIRST_LOSS_SCALE: f64 = 65536.0;
const LOSS_SCALE_GROWTH_STEPS: u64 = 2000;

/// What estimates the value of a state.
#[derive(Debug)]
pub enum Critic {
    /// A head on the policy's hidden states.
    Trunk {
        /// The head.
        head: ScalarHead,
        /// Whether its gradients stop there.
        detached: bool,
    },
    /// A head on an adapter of its own.
    Adapter {
        /// The adapter.
        adapter: Adapter,
        /// The head.
        head: ScalarHead,
    },
}

/// Policy and critic over one base.
#[derive(Debug)]
pub struct Models<'a> {
    /// The base.
    pub decoder: &'a Decoder,
    /// The policy's adapter.
    pub policy: Adapter,
    /// The critic.
    pub critic: Critic,
    temperature: f64,
    recompute: bool,
}

/// Which of the two learn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Learning {
    /// Policy and critic.
    Both,
    /// The critic alone, while it warms up.
    Critic,
    /// Neither: values only.
    Neither,
}

/// What the policy says of a pack.
struct PolicyPass<'a> {
    /// `[N, D]`: hidden states, for a critic on the same trunk.
    hidden: Tensor,
    /// `[n]` f32 on the CPU.
    logprob: Tensor,
    /// `[n]` f32 on the CPU; empty unless asked for.
    entropy: Tensor,
    /// For the backward pass, if the policy learns.
    pass: Option<Pass<'a>>,
}

/// What the critic says of a pack.
struct CriticPass<'a> {
    /// `[n]` f32 on the CPU.
    value: Tensor,
    /// For the backward pass through an adapter of its own, if that learns.
    pass: Option<Pass<'a>>,
}

/// Forward passes over a pack, kept for their backward passes.
struct Graph<'a> {
    policy: PolicyPass<'a>,
    /// None: computed when the policy's pass is over and its memory free again.
    critic: Option<CriticPass<'a>>,
}

impl<'a> Models<'a> {
    /// A policy that is the reference still, and a critic that says 0.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] if the adapter's shape is impossible.
    pub fn new(decoder: &'a Decoder, config: &Config) -> Result<Self, Error> {
        let lora: LoraConfig = config.lora.config();
        let (model, device) = (decoder.config(), decoder.device());
        let adapter = |name| -> Result<Adapter, Error> {
            let mut adapter = Adapter::new(name, model, &lora, config.seed, device)?;
            adapter.set_trainable(true);
            Ok(adapter)
        };
        let mut head = ScalarHead::zeros(model.hidden_size, device);
        head.set_trainable(true);
        let critic = match config.value {
            Value::Trunk => Critic::Trunk { head, detached: false },
            Value::TrunkDetached => Critic::Trunk { head, detached: true },
            config::Value::Adapter => Critic::Adapter { adapter: adapter("value")?, head },
        };
        Ok(Self {
            decoder,
            policy: adapter("policy")?,
            critic,
            temperature: config.temperature,
            recompute: config.compute.recompute,
        })
    }

    fn policy_pass<'s>(
        &'s self,
        pack: &'s Pack,
        learning: Learning,
        want_entropy: bool,
    ) -> Result<PolicyPass<'s>, Error> {
        let batch = &pack.batch;
        let (hidden, pass) = if learning == Learning::Both {
            let pass = self.decoder.pass(batch, &self.policy, self.recompute)?;
            (pass.hidden.shallow_clone(), Some(pass))
        } else {
            let _guard = tch::no_grad_guard();
            (self.decoder.forward(batch, Some(&self.policy))?, None)
        };
        let out = logprobs::of_rows(
            self.decoder,
            &hidden,
            batch,
            &pack.rows,
            self.temperature,
            want_entropy,
        )?;
        Ok(PolicyPass {
            hidden,
            logprob: out.logprob.to_device(Device::Cpu),
            entropy: out.entropy.to_device(Device::Cpu),
            pass,
        })
    }

    /// `trunk`: the policy's hidden states of the same pack.
    fn critic_pass<'s>(
        &'s self,
        pack: &'s Pack,
        trunk: &Tensor,
        learns: bool,
    ) -> Result<CriticPass<'s>, Error> {
        let _guard = (!learns).then(tch::no_grad_guard);
        let (hidden, head, pass) = match &self.critic {
            Critic::Trunk { head, detached: false } => (trunk.shallow_clone(), head, None),
            Critic::Trunk { head, detached: true } => (trunk.detach(), head, None),
            Critic::Adapter { adapter, head } if learns => {
                let pass = self.decoder.pass(&pack.batch, adapter, self.recompute)?;
                (pass.hidden.shallow_clone(), head, Some(pass))
            }
            Critic::Adapter { adapter, head } => {
                (self.decoder.forward(&pack.batch, Some(adapter))?, head, None)
            }
        };
        let states = pack.states.to_device(self.decoder.device());
        let value = head.forward(&hidden.index_select(0, &states)).to_device(Device::Cpu);
        Ok(CriticPass { value, pass })
    }

    /// The critic's pass shares nothing with the policy's, and both learn: one after the other, memory holds one alone.
    fn in_turn(&self, learning: Learning) -> bool {
        learning == Learning::Both && matches!(self.critic, Critic::Adapter { .. })
    }

    /// The tensors that learn as policy, and as critic.
    fn parameters(&self) -> [Vec<(String, Tensor)>; 2] {
        let (head, mut critic) = match &self.critic {
            Critic::Trunk { head, .. } => (head, Vec::new()),
            Critic::Adapter { adapter, head } => (head, adapter.parameters()),
        };
        critic.push(("score.weight".to_owned(), head.weight.shallow_clone()));
        [self.policy.parameters(), critic]
    }
}

/// The minibatches of one pass over a rollout, packed.
#[derive(Debug)]
struct Epoch {
    minibatches: Vec<Vec<Pack>>,
}

/// The rollout as the policy and the critic saw it before any step.
pub struct FirstPass<'a> {
    /// `[n]` f32: log P of every own token, in the order of conversations; nats.
    pub old_logprob: Tensor,
    /// `[n]` f32: value of the state before each.
    pub old_value: Tensor,
    /// `[n]` f32: entropy of the policy there; nats.
    pub entropy: Tensor,
    /// Kept for the first update.
    graphs: Option<Vec<Graph<'a>>>,
}

impl std::fmt::Debug for FirstPass<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FirstPass").field("keeps_graphs", &self.graphs.is_some()).finish()
    }
}

/// A rollout, packed for learning.
#[derive(Debug)]
pub struct Lessons {
    epochs: Vec<Epoch>,
    /// Flat places of each conversation's own tokens: from, to.
    own: Vec<(usize, usize)>,
    /// The first pass can be kept for the first update.
    keep: bool,
}

impl Lessons {
    /// Packs a rollout for every epoch; a fresh order each, where there are several minibatches.
    ///
    /// # Errors
    ///
    /// [`Error::Training`] if the token budget is 0.
    pub fn new(
        conversations: &[Conversation],
        config: &Config,
        iteration: u64,
    ) -> Result<Self, Error> {
        let n = conversations.len();
        let epochs = (0..config.epochs)
            .map(|epoch| {
                let order = if config.n_minibatches == 1 {
                    (0..n).collect()
                } else {
                    permutation(config.seed, &format!("minibatches/{iteration}/{epoch}"), n)
                };
                let minibatches = order
                    .chunks(n / config.n_minibatches)
                    .map(|part| Pack::all(conversations, part, config.micro_batch_tokens))
                    .collect::<Result<_, Error>>()?;
                Ok(Epoch { minibatches })
            })
            .collect::<Result<_, Error>>()?;
        let mut at = 0;
        let own = conversations
            .iter()
            .map(|conversation| {
                let from = at;
                at += conversation.n_own();
                (from, at)
            })
            .collect();
        let n_tokens: usize = conversations.iter().map(|c| c.token_ids.len()).sum();
        let keep = config.n_minibatches == 1 && n_tokens <= config.keep_graph_tokens;
        Ok(Self { epochs, own, keep })
    }

    /// Own tokens in all.
    pub fn n_own(&self) -> usize {
        self.own.last().map_or(0, |(_, end)| *end)
    }

    /// `[n]` i64: flat places of a pack's own tokens.
    fn places(&self, pack: &Pack) -> Tensor {
        let places: Vec<i64> = pack
            .conversations
            .iter()
            .flat_map(|&idx| self.own[idx].0 as i64..self.own[idx].1 as i64)
            .collect();
        Tensor::from_slice(&places)
    }

    /// What policy and critic say before any step; keeps the graphs if they are the first update's.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] if memory runs out.
    pub fn first_pass<'s>(
        &'s self,
        models: &'s Models<'_>,
        learning: Learning,
    ) -> Result<FirstPass<'s>, Error> {
        let learning = if self.keep { learning } else { Learning::Neither };
        let empty = || Tensor::zeros([self.n_own() as i64], (Kind::Float, Device::Cpu));
        let (mut old_logprob, mut old_value, mut entropy) = (empty(), empty(), empty());
        let mut graphs = Vec::new();
        let in_turn = models.in_turn(learning);
        for pack in self.epochs[0].minibatches.iter().flatten() {
            let policy = models.policy_pass(pack, learning, true)?;
            let learns = learning != Learning::Neither && !in_turn;
            let critic = models.critic_pass(pack, &policy.hidden, learns)?;
            let places = self.places(pack);
            let _guard = tch::no_grad_guard();
            let _ = old_logprob.index_copy_(0, &places, &policy.logprob);
            let _ = old_value.index_copy_(0, &places, &critic.value);
            let _ = entropy.index_copy_(0, &places, &policy.entropy);
            if self.keep {
                graphs.push(Graph { policy, critic: (!in_turn).then_some(critic) });
            }
        }
        let graphs = self.keep.then_some(graphs);
        Ok(FirstPass { old_logprob, old_value, entropy, graphs })
    }
}

/// What the steps learn from, beside the first pass; `[n]` f32 each, in the order of conversations.
#[derive(Debug)]
pub struct Targets {
    /// Whitened, if that is wanted.
    pub advantage: Tensor,
    /// Raw.
    pub returns: Tensor,
}

/// The optimisers of policy and critic.
#[derive(Debug)]
pub struct Optimisers {
    /// Of the policy's adapter.
    pub policy: AdamW,
    /// Of the critic.
    pub critic: AdamW,
    /// The part of their state that is not tensors.
    pub scale: LossScale,
}

/// Factor of the loss in f16, whose small gradients would vanish otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    /// The factor; none in other formats.
    pub factor: Option<f64>,
    /// Steps since it last changed.
    pub n_good: u64,
}

/// Learning rates of an iteration.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// The policy's.
    pub policy: f64,
    /// The critic's.
    pub critic: f64,
}

impl Optimisers {
    /// Fresh optimisers for both.
    ///
    /// # Errors
    ///
    /// [`Error::Training`] if memory runs out.
    pub fn new(models: &Models<'_>, config: &Config) -> Result<Self, Error> {
        let adamw = AdamWConfig { weight_decay: config.weight_decay, ..AdamWConfig::default() };
        let [policy, critic] = models.parameters();
        let scaled = models.decoder.kind() == Kind::Half;
        Ok(Self {
            policy: AdamW::new(policy, adamw)?,
            critic: AdamW::new(critic, adamw)?,
            scale: LossScale { factor: scaled.then_some(FIRST_LOSS_SCALE), n_good: 0 },
        })
    }

    fn zero_grad(&mut self) {
        self.policy.zero_grad();
        self.critic.zero_grad();
    }

    /// Takes the gradients at hand; their norms, or none if an f16 overflow made this step be skipped.
    fn step(
        &mut self,
        learning: Learning,
        rates: Rates,
        max_norm: Option<f64>,
        iteration: u64,
    ) -> Result<Option<[f64; 2]>, Error> {
        if let Some(factor) = self.scale.factor {
            self.policy.scale_gradients(1.0 / factor);
            self.critic.scale_gradients(1.0 / factor);
            let mut overflow = false;
            for part in [&self.policy, &self.critic] {
                match part.gradient_norm(iteration) {
                    Ok(_) => {}
                    Err(arete_training::Error::NonFinite { .. }) => overflow = true,
                    Err(error) => return Err(error.into()),
                }
            }
            if overflow && factor > 1.0 {
                tracing::warn!(iteration, factor, "overflow in f16, step skipped");
                self.zero_grad();
                self.scale = LossScale { factor: Some(0.5 * factor), n_good: 0 };
                return Ok(None);
            }
            self.scale.n_good += 1;
            if self.scale.n_good == LOSS_SCALE_GROWTH_STEPS {
                self.scale = LossScale { factor: Some(2.0 * factor), n_good: 0 };
            }
        }
        // Both are looked at before either changes.
        self.critic.gradient_norm(iteration)?;
        let policy = match learning {
            Learning::Both => self.policy.step(rates.policy, max_norm, iteration)?,
            Learning::Critic | Learning::Neither => 0.0,
        };
        let critic = self.critic.step(rates.critic, max_norm, iteration)?;
        Ok(Some([policy, critic]))
    }
}

/// What the steps of an iteration came to; means over its steps (losses, norms) and own tokens (the rest).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct UpdateReport {
    /// Optimiser steps taken.
    pub n_steps: u64,
    /// Clipped surrogate loss.
    pub policy_loss: f64,
    /// Clipped value loss, before its coefficient.
    pub value_loss: f64,
    /// ½ · mean (log ratio)².
    pub approx_kl: f64,
    /// Part of the tokens whose ratio was clipped.
    pub clip_fraction: f64,
    /// Part of the tokens whose value was clipped.
    pub value_clip_fraction: f64,
    /// Mean ratio.
    pub ratio: f64,
    /// Variance of the ratio.
    pub ratio_variance: f64,
    /// Gradient norm of the policy before clipping.
    pub policy_grad_norm: f64,
    /// Gradient norm of the critic before clipping.
    pub value_grad_norm: f64,
    /// Largest |log ratio| before the first step: 0.
    pub first_log_ratio: f64,
    /// The policy drifted beyond `target_kl`: the rest of the steps was left out.
    pub stopped_early: bool,
}

/// Sums over the tokens of one minibatch.
#[derive(Default)]
struct Sums {
    n_tokens: f64,
    policy_loss: f64,
    value_loss: f64,
    squared_log_ratio: f64,
    n_clipped: f64,
    n_value_clipped: f64,
    ratio: f64,
    squared_ratio: f64,
    max_log_ratio: f64,
}

impl Sums {
    fn add(&mut self, other: &Self) {
        self.n_tokens += other.n_tokens;
        self.policy_loss += other.policy_loss;
        self.value_loss += other.value_loss;
        self.squared_log_ratio += other.squared_log_ratio;
        self.n_clipped += other.n_clipped;
        self.n_value_clipped += other.n_value_clipped;
        self.ratio += other.ratio;
        self.squared_ratio += other.squared_ratio;
        self.max_log_ratio = self.max_log_ratio.max(other.max_log_ratio);
    }
}

/// Takes the iteration's steps.
///
/// # Errors
///
/// [`Error::Ratio`] if the first ratio is not 1 (on the CPU; elsewhere a warning);
/// [`arete_training::Error::NonFinite`] if a loss or gradient is not finite, before it reaches the weights.
#[expect(clippy::too_many_arguments, reason = "each is a part of its own of the iteration")]
pub fn update(
    models: &Models<'_>,
    optimisers: &mut Optimisers,
    lessons: &Lessons,
    first: FirstPass<'_>,
    targets: &Targets,
    config: &Config,
    learning: Learning,
    rates: Rates,
    iteration: u64,
) -> Result<UpdateReport, Error> {
    let FirstPass { old_logprob, old_value, mut graphs, .. } = first;
    let mut report = UpdateReport::default();
    let mut total = Sums::default();
    let mut n_minibatches = 0.0;
    let max_norm = (config.max_grad_norm > 0.0).then_some(config.max_grad_norm);
    'epochs: for (epoch, minibatches) in lessons.epochs.iter().enumerate() {
        for (place, packs) in minibatches.minibatches.iter().enumerate() {
            let is_first = epoch == 0 && place == 0;
            let n_tokens: usize = packs.iter().map(|pack| pack.rows.len()).sum();
            let mut sums = Sums { n_tokens: n_tokens as f64, ..Sums::default() };
            let mut kept = graphs.take().map(Vec::into_iter);
            for pack in packs {
                let graph = match kept.as_mut().and_then(Iterator::next) {
                    Some(graph) => graph,
                    None => {
                        Graph { policy: models.policy_pass(pack, learning, false)?, critic: None }
                    }
                };
                let places = lessons.places(pack);
                let part = Part {
                    old_logprob: old_logprob.index_select(0, &places),
                    old_value: old_value.index_select(0, &places),
                    advantage: targets.advantage.index_select(0, &places),
                    returns: targets.returns.index_select(0, &places),
                };
                let scale = optimisers.scale.factor.unwrap_or(1.0);
                let pass = PackPass { models, pack, learning, config, scale, iteration };
                pass.learn(graph, &part, &mut sums)?;
            }
            if is_first {
                report.first_log_ratio = sums.max_log_ratio;
                check_first_ratio(models, sums.max_log_ratio, iteration)?;
            }
            let approx_kl = 0.5 * sums.squared_log_ratio / sums.n_tokens;
            total.add(&sums);
            n_minibatches += 1.0;
            if config.target_kl > 0.0 && approx_kl > config.target_kl {
                optimisers.zero_grad();
                report.stopped_early = true;
                tracing::info!(
                    iteration,
                    epoch,
                    approx_kl,
                    "policy drifted far enough, updates stopped"
                );
                break 'epochs;
            }
            if let Some([policy, critic]) = optimisers.step(learning, rates, max_norm, iteration)? {
                report.n_steps += 1;
                report.policy_grad_norm += policy;
                report.value_grad_norm += critic;
            }
        }
    }
    let n_steps = report.n_steps.max(1) as f64;
    report.policy_grad_norm /= n_steps;
    report.value_grad_norm /= n_steps;
    let n = total.n_tokens;
    report.policy_loss = total.policy_loss / n_minibatches;
    report.value_loss = total.value_loss / n_minibatches;
    report.approx_kl = 0.5 * total.squared_log_ratio / n;
    report.clip_fraction = total.n_clipped / n;
    report.value_clip_fraction = total.n_value_clipped / n;
    report.ratio = total.ratio / n;
    report.ratio_variance = (total.squared_ratio / n - report.ratio * report.ratio).max(0.0);
    Ok(report)
}

/// A pack's share of the rollout's numbers.
struct Part {
    old_logprob: Tensor,
    old_value: Tensor,
    advantage: Tensor,
    returns: Tensor,
}

/// One pack of a minibatch on its way through the losses.
struct PackPass<'a> {
    models: &'a Models<'a>,
    pack: &'a Pack,
    learning: Learning,
    config: &'a Config,
    /// Factor of the loss.
    scale: f64,
    iteration: u64,
}

impl PackPass<'_> {
    /// Adds the pack's gradients and sums.
    fn learn(&self, graph: Graph<'_>, part: &Part, sums: &mut Sums) -> Result<(), Error> {
        let Graph { policy, critic } = graph;
        let policy_loss = self.policy_loss(&policy.logprob, part, sums)?;
        if self.models.in_turn(self.learning) {
            let pass = policy.pass.expect("the policy learns");
            pass.backward(&policy_loss)?;
            let critic = self.models.critic_pass(self.pack, &policy.hidden, true)?;
            let value_loss = self.value_loss(&critic.value, part, sums)?;
            return Ok(critic.pass.expect("the critic learns").backward(&value_loss)?);
        }
        let critic = match critic {
            Some(critic) => critic,
            None => self.models.critic_pass(self.pack, &policy.hidden, true)?,
        };
        let value_loss = self.value_loss(&critic.value, part, sums)?;
        match (policy.pass, critic.pass) {
            // One pass, one backward: the head's gradients flow into the trunk, or stop where it was detached.
            (Some(pass), _) => pass.backward(&(policy_loss + value_loss))?,
            (None, Some(pass)) => pass.backward(&value_loss)?,
            (None, None) => value_loss.f_backward()?,
        }
        Ok(())
    }

    /// The policy's loss, scaled for the backward pass.
    fn policy_loss(&self, logprob: &Tensor, part: &Part, sums: &mut Sums) -> Result<Tensor, Error> {
        let valid = part.old_logprob.ones_like().to_kind(Kind::Bool); // [n]: own tokens only
        let policy = policy_loss(
            logprob,
            &part.old_logprob,
            &part.advantage,
            &valid,
            self.config.clip_range,
            sums.n_tokens,
        )?;
        sums.policy_loss += self.finite("the policy loss", &policy.loss)?;
        sums.squared_log_ratio += number(&policy.squared_log_ratio.sum(Kind::Double))?;
        sums.n_clipped += number(&policy.n_clipped)?;
        sums.ratio += number(&policy.ratio.sum(Kind::Double))?;
        sums.squared_ratio += number(&policy.ratio.square().sum(Kind::Double))?;
        let log_ratio = (logprob.detach() - &part.old_logprob).abs().max();
        sums.max_log_ratio = sums.max_log_ratio.max(number(&log_ratio)?);
        Ok(policy.loss * self.scale)
    }

    /// The critic's loss, weighted and scaled for the backward pass.
    fn value_loss(&self, value: &Tensor, part: &Part, sums: &mut Sums) -> Result<Tensor, Error> {
        let valid = part.old_value.ones_like().to_kind(Kind::Bool); // [n]: own tokens only
        let critic = value_loss(
            value,
            &part.old_value,
            &part.returns,
            &valid,
            self.config.value_clip_range,
            sums.n_tokens,
        )?;
        sums.value_loss += self.finite("the value loss", &critic.loss)?;
        sums.n_value_clipped += number(&critic.n_clipped)?;
        Ok(critic.loss * (self.config.value_coef * self.scale))
    }

    fn finite(&self, what: &str, loss: &Tensor) -> Result<f64, Error> {
        let loss = number(loss)?;
        if loss.is_finite() {
            return Ok(loss);
        }
        let what = what.to_owned();
        Err(arete_training::Error::NonFinite { step: self.iteration, what }.into())
    }
}

fn number(tensor: &Tensor) -> Result<f64, tch::TchError> {
    f64::try_from(tensor.to_kind(Kind::Double))
}

fn check_first_ratio(models: &Models<'_>, got: f64, iteration: u64) -> Result<(), Error> {
    if got == 0.0 {
        return Ok(());
    }
    if models.decoder.device() == Device::Cpu {
        return Err(Error::Ratio { iteration, got });
    }
    // cuBLAS promises equal bits for equal shapes on one stream, but not on every GPU and setting.
    tracing::warn!(iteration, log_ratio = got, "the first ratio is not 1");
    Ok(())
}
