//! The learning half of an iteration: the clipped steps.

use arete_model::Tensor;
use arete_training::{AdamW, AdamWConfig, LossScale};
use tch::{Device, Kind};

use crate::Error;
use crate::config::Config;
use crate::loss::{policy_loss, value_loss};
use crate::models::{Graph, Learning, Models};
use crate::packs::{FirstPass, Pack, PackedRollout};

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
        Ok(Self {
            policy: AdamW::new(policy, adamw)?,
            critic: AdamW::new(critic, adamw)?,
            scale: LossScale::new(models.decoder.kind() == Kind::Half),
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
            if overflow && self.scale.can_fall() {
                tracing::warn!(iteration, factor, "overflow in f16, step skipped");
                self.zero_grad();
                self.scale = self.scale.after_overflow();
                return Ok(None);
            }
            self.scale = self.scale.after_step();
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
    rollout: &PackedRollout,
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
    'epochs: for (epoch, minibatches) in rollout.epochs.iter().enumerate() {
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
                let places = rollout.places(pack);
                let part = Part {
                    old_logprob: old_logprob.index_select(0, &places),
                    old_value: old_value.index_select(0, &places),
                    advantage: targets.advantage.index_select(0, &places),
                    returns: targets.returns.index_select(0, &places),
                };
                let scale = optimisers.scale.factor();
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
        let policy = policy_loss(
            logprob,
            &part.old_logprob,
            &part.advantage,
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
        let critic = value_loss(
            value,
            &part.old_value,
            &part.returns,
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
