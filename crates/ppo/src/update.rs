//! The learning half of an iteration: the clipped steps.

use anyhow::{Result, bail};
use arete_model::Tensor;
use arete_records::stats;
use arete_training::{AdamW, AdamWConfig, LossScale, Ranks, shards};
use tch::{Device, Kind};

use crate::config::Config;
use crate::loss::{Units, importance_weights, kl_loss, policy_loss, sequence_loss, value_loss};
use crate::models::{Graph, Learning, Models};
use crate::packs::{FirstPass, Pack, PackedRollout};

/// What the steps learn from, beside the first pass; `[n]` each, in the order of conversations.
#[derive(Debug)]
pub struct Targets {
    /// f32; whitened, if that is wanted.
    pub advantage: Tensor,
    /// f32, raw; for a critic.
    pub returns: Option<Tensor>,
    /// i64: which reply or conversation each token belongs to, where the loss is one of whole replies.
    pub units: Option<Tensor>,
    /// f32: log P under the reference, and the weight of leaving it, where the KL penalty is part of the loss.
    pub reference: Option<(Tensor, f64)>,
    /// f32: log P(trainer) − log P(sampler), where that weighs.
    pub log_importance: Option<Tensor>,
}

impl Targets {
    /// PPO's.
    #[must_use]
    pub fn of_critic(advantage: Tensor, returns: Tensor) -> Self {
        let returns = Some(returns);
        Self { advantage, returns, units: None, reference: None, log_importance: None }
    }

    /// Those of some tokens, by their places.
    fn at(&self, places: &Tensor) -> Self {
        let at = |tensor: &Tensor| tensor.index_select(0, places);
        Self {
            advantage: at(&self.advantage),
            returns: self.returns.as_ref().map(at),
            units: self.units.as_ref().map(at),
            reference: self.reference.as_ref().map(|(logprob, coef)| (at(logprob), *coef)),
            log_importance: self.log_importance.as_ref().map(at),
        }
    }
}

/// The optimisers of policy and critic.
#[derive(Debug)]
pub struct Optimisers {
    /// Of the policy's adapter.
    pub policy: AdamW,
    /// Of the critic, if there is one.
    pub critic: Option<AdamW>,
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
    /// The trainer's failure if memory runs out.
    pub fn new(models: &Models<'_>, config: &Config) -> Result<Self> {
        let adamw = AdamWConfig { weight_decay: config.weight_decay, ..AdamWConfig::default() };
        let (policy, critic) = (models.policy_parameters(), models.critic_parameters());
        Ok(Self {
            policy: AdamW::new(policy, adamw)?,
            critic: critic.map(|critic| AdamW::new(critic, adamw)).transpose()?,
            scale: LossScale::new(models.decoder.kind() == Kind::Half),
        })
    }

    /// Those whose gradients a step takes.
    fn learning(&mut self, learning: Learning) -> Vec<&mut AdamW> {
        let policy = (learning == Learning::Both).then_some(&mut self.policy);
        policy.into_iter().chain(&mut self.critic).collect()
    }

    fn zero_grad(&mut self) {
        self.all().for_each(AdamW::zero_grad);
    }

    fn all(&mut self) -> impl Iterator<Item = &mut AdamW> {
        std::iter::once(&mut self.policy).chain(&mut self.critic)
    }

    /// Takes the gradients at hand; their norms, or none if an f16 overflow made this step be skipped.
    fn step(
        &mut self,
        learning: Learning,
        rates: Rates,
        max_norm: Option<f64>,
        iteration: u64,
    ) -> Result<Option<[f64; 2]>> {
        if let Some(factor) = self.scale.factor {
            let mut overflow = false;
            for part in self.all() {
                part.scale_gradients(1.0 / factor);
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
        if let Some(critic) = &self.critic {
            critic.gradient_norm(iteration)?;
        }
        let policy = match learning {
            Learning::Both => self.policy.step(rates.policy, max_norm, iteration)?,
            Learning::Critic | Learning::Neither => 0.0,
        };
        let critic = match &mut self.critic {
            Some(critic) => critic.step(rates.critic, max_norm, iteration)?,
            None => 0.0,
        };
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
    /// |log ratio| of every token, where they are not promised to be 0.
    log_ratios: Vec<f64>,
}

impl Sums {
    /// As numbers that travel between processes.
    fn numbers(&self) -> Vec<f64> {
        let mut numbers = vec![
            self.policy_loss,
            self.value_loss,
            self.squared_log_ratio,
            self.n_clipped,
            self.n_value_clipped,
            self.ratio,
            self.squared_ratio,
            self.max_log_ratio,
        ];
        numbers.extend(&self.log_ratios);
        numbers
    }

    /// The sums of a minibatch of `n_tokens`, from the numbers of its shards.
    fn of(n_tokens: f64, shards: &[Vec<f64>]) -> Self {
        let mut sums = Self { n_tokens, ..Self::default() };
        for numbers in shards {
            let (fixed, log_ratios) = numbers.split_at(8);
            sums.add(&Self {
                n_tokens: 0.0,
                policy_loss: fixed[0],
                value_loss: fixed[1],
                squared_log_ratio: fixed[2],
                n_clipped: fixed[3],
                n_value_clipped: fixed[4],
                ratio: fixed[5],
                squared_ratio: fixed[6],
                max_log_ratio: fixed[7],
                log_ratios: Vec::new(),
            });
            sums.log_ratios.extend(log_ratios);
        }
        sums
    }

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
/// A first ratio other than 1 if the first ratio is not 1 (on the CPU; elsewhere a warning);
/// [`arete_training::Error::NonFinite`] if a loss or gradient is not finite, before it reaches the weights.
#[expect(clippy::too_many_arguments, reason = "each is a part of its own of the iteration")]
pub fn update(
    ranks: &Ranks,
    models: &Models<'_>,
    optimisers: &mut Optimisers,
    rollout: &PackedRollout,
    first: FirstPass<'_>,
    targets: &Targets,
    config: &Config,
    learning: Learning,
    rates: Rates,
    iteration: u64,
) -> Result<UpdateReport> {
    let FirstPass { old_logprob, old_value, mut graphs, .. } = first;
    let mut report = UpdateReport::default();
    let mut total = Sums::default();
    let mut n_minibatches = 0.0;
    let max_norm = (config.max_grad_norm > 0.0).then_some(config.max_grad_norm);
    'epochs: for (epoch, minibatches) in rollout.epochs.iter().enumerate() {
        for (place, minibatch) in minibatches.minibatches.iter().enumerate() {
            let is_first = epoch == 0 && place == 0;
            let n_tokens = minibatch.n_own() as f64;
            let n_sequences = minibatch.n_conversations() as f64;
            let mut kept = graphs.take().map(Vec::into_iter);
            let scale = optimisers.scale.factor();
            let learn = |shard: usize| -> Result<Vec<f64>> {
                if !models.passes.keeps_graphs() {
                    kept = None; // memory ran out
                }
                let mut sums = Sums::default();
                for pack in &minibatch.shards[shard] {
                    let graph = match kept.as_mut().and_then(Iterator::next) {
                        Some(graph) => graph,
                        None => {
                            let policy = models.policy_pass(pack, learning, false)?;
                            Graph { policy, critic: None }
                        }
                    };
                    let places = rollout.places(pack);
                    let part = Part {
                        old_logprob: old_logprob.index_select(0, &places),
                        old_value: old_value.as_ref().map(|value| value.index_select(0, &places)),
                        targets: targets.at(&places),
                        n_tokens,
                        n_sequences,
                    };
                    let pass = PackPass { models, pack, learning, config, scale, iteration };
                    pass.learn(graph, &part, &mut sums)?;
                }
                Ok(sums.numbers())
            };
            let sizes: Vec<usize> = minibatch.shards.iter().map(Vec::len).collect();
            let reduce = config.shards.reduce;
            let found = shards::accumulate(
                &models.passes,
                ranks,
                reduce,
                &sizes,
                &mut optimisers.learning(learning),
                learn,
            )?;
            let mut sums = Sums::of(n_tokens, &found);
            if is_first {
                report.first_log_ratio = sums.max_log_ratio;
                check_first_ratio(models, &mut sums, iteration)?;
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

/// A pack's share of the rollout's numbers, and what its minibatch holds in all.
struct Part {
    old_logprob: Tensor,
    old_value: Option<Tensor>,
    targets: Targets,
    n_tokens: f64,
    n_sequences: f64,
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
    fn learn(&self, graph: Graph<'_>, part: &Part, sums: &mut Sums) -> Result<()> {
        let Graph { policy, critic } = graph;
        let policy_loss = self.policy_loss(&policy.logprob, part, sums)?;
        if !self.models.has_critic() {
            let pass = policy.pass.expect("without a critic the policy learns");
            return Ok(pass.backward(&policy_loss)?);
        }
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
    fn policy_loss(&self, logprob: &Tensor, part: &Part, sums: &mut Sums) -> Result<Tensor> {
        let Part { old_logprob, targets, n_tokens, n_sequences, .. } = part;
        let (advantage, clip) = (&targets.advantage, self.config.clip_range);
        let cap = self.config.importance_cap;
        let log_importance = targets.log_importance.as_ref();
        let policy = if let Some(units) = &targets.units {
            let importance = log_importance.map(|log| (log, cap));
            let units = Units::of(units);
            sequence_loss(logprob, old_logprob, advantage, &units, importance, clip, *n_sequences)?
        } else {
            let weight = log_importance.map(|log| importance_weights(log, cap));
            policy_loss(logprob, old_logprob, advantage, weight.as_ref(), clip, *n_tokens)?
        };
        let mut loss = policy.loss;
        if let Some((ref_logprob, coef)) = &targets.reference {
            loss += kl_loss(logprob, ref_logprob, *n_tokens)? * *coef;
        }
        sums.policy_loss += self.finite("the policy loss", &loss)?;
        sums.squared_log_ratio += number(&policy.squared_log_ratio.sum(Kind::Double))?;
        sums.n_clipped += number(&policy.n_clipped)?;
        sums.ratio += number(&policy.ratio.sum(Kind::Double))?;
        sums.squared_ratio += number(&policy.ratio.square().sum(Kind::Double))?;
        let log_ratio = (logprob.detach() - old_logprob).abs(); // [n]
        sums.max_log_ratio = sums.max_log_ratio.max(number(&log_ratio.max())?);
        if self.models.decoder.device() != Device::Cpu {
            sums.log_ratios.extend(Vec::<f64>::try_from(log_ratio.to_kind(Kind::Double))?);
        }
        Ok(loss * self.scale)
    }

    /// The critic's loss, weighted and scaled for the backward pass.
    fn value_loss(&self, value: &Tensor, part: &Part, sums: &mut Sums) -> Result<Tensor> {
        let old_value = part.old_value.as_ref().expect("a critic had a first pass");
        let returns = part.targets.returns.as_ref().expect("a critic has returns to learn");
        let clip = self.config.value_clip_range;
        let critic = value_loss(value, old_value, returns, clip, part.n_tokens)?;
        sums.value_loss += self.finite("the value loss", &critic.loss)?;
        sums.n_value_clipped += number(&critic.n_clipped)?;
        Ok(critic.loss * (self.config.value_coef * self.scale))
    }

    fn finite(&self, what: &str, loss: &Tensor) -> Result<f64> {
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

/// Where one GPU's kernels may round differently from call to call, so many tokens must keep to [`FIRST_LOG_RATIO`].
const AGREEING: f64 = 0.999;
/// |log ratio| before the first step that is no news on a GPU: bf16 rounds log-probabilities of order 10 by less.
const FIRST_LOG_RATIO: f64 = 1e-2;

fn check_first_ratio(models: &Models<'_>, sums: &mut Sums, iteration: u64) -> Result<()> {
    let got = sums.max_log_ratio;
    if got == 0.0 {
        return Ok(());
    }
    if models.decoder.device() == Device::Cpu {
        bail!(
            "iteration {iteration}: expected ratio 1 before the first update, got a log-ratio of {got:e}: the forward pass is not \
             deterministic"
        );
    }
    // cuBLAS promises equal bits for equal shapes on one stream, but not on every GPU and setting.
    if let Some(found) = disagreement(&mut sums.log_ratios) {
        tracing::warn!(
            iteration,
            log_ratio = found,
            quantile = AGREEING,
            largest = got,
            "the first ratio is not 1"
        );
    }
    Ok(())
}

/// What nearly all |log ratios| keep to, if that is more than rounding.
fn disagreement(log_ratios: &mut [f64]) -> Option<f64> {
    log_ratios.sort_by(f64::total_cmp);
    let found = stats::quantile(log_ratios, AGREEING);
    (found.is_nan() || found > FIRST_LOG_RATIO).then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_bad_tokens_are_no_news_and_many_are() {
        let tokens = |n_bad: usize| -> Vec<f64> {
            (0..10_000).map(|token| if token < n_bad { 0.5 } else { 1e-3 }).collect()
        };
        assert_eq!(disagreement(&mut tokens(5)), None);
        assert_eq!(disagreement(&mut tokens(20)), Some(0.5));
        assert!(disagreement(&mut [f64::NAN]).is_some_and(f64::is_nan));
    }
}
