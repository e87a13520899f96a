//! One iteration but for its files: a rollout, its rewards, the steps; and how long each phase took.

use std::time::Instant;

use anyhow::{Result, bail};
use arete_chain::reward_model::Base;
use arete_model::{Chat, Model, Tensor};
use arete_records::{FinishReason, stats};
use arete_stage::exit::BadInput;
use arete_training::Ranks;
use tch::{Device, Kind};

use crate::Config;
use crate::advantage::{sampled_logprobs, targets};
use crate::assess::{self, Assessment};
use crate::config::Algorithm;
use crate::engines::Serving;
use crate::group;
use crate::journal::Journal;
use crate::loss::importance_weights;
use crate::models::{Learning, Models};
use crate::packs::{FirstPass, PackedRollout};
use crate::prompts::Prompt;
use crate::rollout::{Conversation, Layout, Purpose, Sampler};
use crate::scorer::RewardModels;
use crate::spread::{self, Policy, Sampled};
use crate::update::{Optimisers, Rates, Targets, UpdateReport, update};

/// What an iteration works with.
#[derive(Debug)]
pub(crate) struct Iteration<'a> {
    /// The processes that share the work.
    pub(crate) ranks: &'a Ranks,
    /// The settings.
    pub(crate) config: &'a Config,
    /// The base.
    pub(crate) model: &'a Model,
    /// Its chat template.
    pub(crate) chat: &'a Chat<'a>,
    /// The reward models.
    pub(crate) rewards: &'a RewardModels,
    /// How conversations are sampled.
    pub(crate) sampler: &'a Sampler,
    /// Servers that sample in this process's place.
    pub(crate) serving: Option<Serving<'a>>,
    /// Which iteration, from 1.
    pub(crate) iteration: u64,
    /// Weight of the KL penalty.
    pub(crate) kl_coef: f64,
    /// Learning rates.
    pub(crate) rates: Rates,
}

/// A part of an iteration, timed.
#[derive(Clone, Debug)]
pub(crate) struct Phase {
    /// Its name.
    pub(crate) what: &'static str,
    /// How long it took.
    pub(crate) seconds: f64,
    /// Tokens that went through it: sampled ones for sampling, whole conversations elsewhere.
    pub(crate) n_tokens: usize,
}

impl Phase {
    /// Tokens a second.
    pub(crate) fn tokens_per_s(&self) -> f64 {
        self.n_tokens as f64 / self.seconds
    }
}

/// What came of an iteration.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// The rollout.
    pub(crate) conversations: Vec<Conversation>,
    /// Its scores and rewards.
    pub(crate) assessment: Assessment,
    /// The steps.
    pub(crate) report: UpdateReport,
    /// Numbers to log, in order.
    pub(crate) metrics: Vec<(String, f64)>,
    /// The phases, in order.
    pub(crate) phases: Vec<Phase>,
}

impl Iteration<'_> {
    /// Samples, scores and learns.
    pub(crate) fn run(
        &self,
        models: &Models<'_>,
        optimisers: &mut Optimisers,
        prompts: &[&Prompt],
        journal: Option<&mut Journal>,
    ) -> Result<Outcome> {
        let (ranks, config, iteration) = (self.ranks, self.config, self.iteration);
        let warms_up = models.has_critic() && iteration <= config.value_warmup;
        let learning = if warms_up { Learning::Critic } else { Learning::Both };
        let budget = config.micro_batch_tokens;
        let mut phases = Vec::new();

        let conversations = timed(&mut phases, "sampling", || {
            let first = (iteration - 1) * config.rollout_size as u64;
            let (model, chat, adapter) = (self.model, self.chat, Some(&models.policy));
            let policy = Policy { ranks, model, chat, adapter, serving: self.serving };
            let Sampled { conversations, n_tokens } =
                spread::sample(policy, self.sampler, prompts, Purpose::Rollout, first, journal)?;
            Ok((conversations, n_tokens))
        })?;
        let n_tokens: usize = conversations.iter().map(|c| c.token_ids.len()).sum();
        let scores = timed(&mut phases, "scoring", || {
            let base = Base { model: self.model, chat: self.chat, micro_batch_tokens: budget };
            let prompt_id = |c: &Conversation| prompts[c.prompt].prompt_id.clone();
            let raw = spread::raw_scores(ranks, self.rewards, base, &conversations)?;
            let scores = self.rewards.scores(raw, &conversations, iteration, prompt_id)?;
            let n_read = scores.n_tokens;
            Ok((scores, n_read))
        })?;
        for (name, column) in self.rewards.learned_columns(&scores.raw) {
            check_variance(&format!("scores of the {name} reward model"), &column, iteration)?;
        }
        spread::check_interrupt(ranks)?;
        let ref_logprob = timed(&mut phases, "reference", || {
            let decoder = &self.model.decoder;
            let temperature = config.temperature;
            let out = spread::logprobs(ranks, decoder, None, &conversations, temperature, budget)?;
            Ok((out, n_tokens))
        })?;
        spread::check_interrupt(ranks)?;
        let packed = PackedRollout::new(&conversations, config, iteration)?;
        let first = timed(&mut phases, "first pass", || {
            Ok((packed.first_pass(ranks, models, learning)?, n_tokens))
        })?;

        let layout = Layout::new(&conversations);
        let kl = &first.old_logprob - &ref_logprob; // [n]
        let kl_coef = self.kl_coef;
        let assessment = assess::assess(scores, &conversations, &layout, &kl, kl_coef, config)?;
        if !self.rewards.is_constant() {
            check_variance("scores paid out", &assessment.paid, iteration)?;
        }
        let targets =
            targets(&conversations, &assessment, &layout, &first, &ref_logprob, kl_coef, config)?;
        spread::check_interrupt(ranks)?;
        let mut metrics = summary(&conversations, &assessment, &first, &targets, kl_coef, config)?;
        let decoder = &self.model.decoder;
        let log_ratio = &first.old_logprob - sampled_logprobs(&conversations); // [n]
        let difference = log_ratio.abs(); // [n]
        let largest = number(&difference.max())?;
        metrics.push(("sampler_trainer_difference".to_owned(), largest));
        if self.serving.is_some() {
            let mean = number(&difference.mean(Kind::Double))?;
            metrics.push(("engine/difference_avg".to_owned(), mean));
            metrics.push(("engine/ess".to_owned(), effective_share(&log_ratio)?));
            check_engines(mean, largest, config.engine_difference, || {
                let own = |temperature| {
                    spread::logprobs(
                        ranks,
                        decoder,
                        Some(&models.policy),
                        &conversations,
                        temperature,
                        budget,
                    )
                };
                let raw = (sampled_logprobs(&conversations) - own(1.0)?).abs();
                number(&raw.mean(Kind::Double))
            })?;
        } else {
            let (kind, device) = (decoder.kind(), decoder.device());
            let told = agreement(&difference, device)?;
            check_difference(told, kind, device, config.allow_disagreement)?;
        }
        let report = timed(&mut phases, "update", || {
            let rates = self.rates;
            let report = update(
                ranks, models, optimisers, &packed, first, &targets, config, learning, rates,
                iteration,
            )?;
            let n_passes = report.n_steps.div_ceil(config.n_minibatches as u64) as usize;
            Ok((report, n_tokens * n_passes))
        })?;
        metrics.extend(of_update(&report, models.has_critic()));
        let turns = &self.sampler.turns;
        metrics.extend(assess::describe(&conversations, turns, &assessment.scores));
        // The policy takes no step while the critic warms up.
        let policy_rate = if learning == Learning::Both { self.rates.policy } else { 0.0 };
        metrics.push(("lr".to_owned(), policy_rate));
        if models.has_critic() {
            metrics.push(("value_lr".to_owned(), self.rates.critic));
        }
        metrics.extend(optimisers.scale.factor.map(|factor| ("loss_scale".to_owned(), factor)));
        Ok(Outcome { conversations, assessment, report, metrics, phases })
    }
}

fn timed<T>(
    phases: &mut Vec<Phase>,
    what: &'static str,
    work: impl FnOnce() -> Result<(T, usize)>,
) -> Result<T> {
    let started = Instant::now();
    let (out, n_tokens) = work()?;
    phases.push(Phase { what, seconds: started.elapsed().as_secs_f64(), n_tokens });
    Ok(out)
}

/// Scores that are the same for every conversation teach nothing: a broken reward model if it is the first iteration.
fn check_variance(what: &str, scores: &[f64], iteration: u64) -> Result<()> {
    let first = scores.first().copied().unwrap_or(0.0);
    if scores.len() < 2 || scores.iter().any(|&score| score != first) {
        return Ok(());
    }
    if iteration == 1 {
        bail!(all_alike(&format!("{what} in the first rollout"), first, scores.len()));
    }
    tracing::warn!(iteration, what, score = first, "every conversation scores the same");
    Ok(())
}

/// What is known of an iteration before its first step. Sums are per conversation, entropy and values per token.
fn summary(
    conversations: &[Conversation],
    assessment: &Assessment,
    first: &FirstPass<'_>,
    targets: &Targets,
    kl_coef: f64,
    config: &Config,
) -> Result<Vec<(String, f64)>> {
    let n = conversations.len() as f64;
    // GRPO's penalty is part of the loss.
    let in_reward = if config.algorithm == Algorithm::Grpo { 0.0 } else { kl_coef };
    let non_score: Vec<f64> = assessment.kl.iter().map(|kl| -in_reward * kl).collect();
    let (paid, non_score) = (stats::mean(&assessment.paid), stats::mean(&non_score));
    let ended = conversations
        .iter()
        .flat_map(|c| &c.replies)
        .filter(|reply| reply.finish_reason == FinishReason::Stop)
        .count();
    let mut line = vec![
        ("objective/kl", stats::mean(&assessment.kl)),
        ("objective/entropy", -number(&first.old_logprob.sum(Kind::Double))? / n),
        ("objective/non_score_reward", non_score),
        ("objective/rlhf_reward", paid + non_score),
        ("objective/scores", paid),
        ("objective/scores_std", stats::std(&assessment.paid)),
        ("policy/entropy_avg", number(&first.entropy.mean(Kind::Double))?),
        ("val/num_eos_tokens", ended as f64),
    ];
    if let (Some(value), Some(returns)) = (&first.old_value, &targets.returns) {
        line.extend(of_values(value, returns)?);
    } else {
        let share = group::share_without_spread(&assessment.paid, config.samples_per_prompt);
        line.push(("frac_reward_zero_std", share));
    }
    if let Some(log) = &targets.log_importance {
        let weights = importance_weights(log, config.importance_cap);
        line.push(("importance_weight", number(&weights.mean(Kind::Double))?));
    }
    line.push(("kl_coef", kl_coef));
    Ok(line.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
}

/// What the critic knew.
fn of_values(value: &Tensor, returns: &Tensor) -> Result<[(&'static str, f64); 3]> {
    let variance = |tensor: &Tensor| number(&tensor.to_kind(Kind::Double).var(false));
    let (residual, spread) = (variance(&(returns - value))?, variance(returns)?);
    Ok([
        ("value_mean", number(&value.mean(Kind::Double))?),
        ("returns_mean", number(&returns.mean(Kind::Double))?),
        ("explained_variance", if spread > 0.0 { 1.0 - residual / spread } else { 0.0 }),
    ])
}

fn number(tensor: &Tensor) -> Result<f64> {
    Ok(f64::try_from(tensor.to_kind(Kind::Double))?)
}

/// Part of the tokens on which sampler and trainer must agree where single tokens are promised nothing.
const AGREEING: f64 = 0.999;

/// The difference that counts, of every token's, in nats: the largest on the CPU; elsewhere the few worst tokens say little,
/// and what nearly all keep to counts.
fn agreement(difference: &Tensor, device: Device) -> Result<f64> {
    let quantile = if device == Device::Cpu { 1.0 } else { AGREEING };
    let mut sorted: Vec<f64> = Vec::try_from(difference.to_kind(Kind::Double))?;
    sorted.sort_by(f64::total_cmp);
    Ok(stats::quantile(&sorted, quantile))
}

/// Effective share of a rollout's tokens, were each weighed by P(trainer) / P(sampler): (Σw)² / (n Σw²), 1 where they agree.
fn effective_share(log_ratio: &Tensor) -> Result<f64> {
    let weights = log_ratio.to_kind(Kind::Double).exp(); // [n]
    let (sum, squares) =
        (number(&weights.sum(Kind::Double))?, number(&weights.square().sum(Kind::Double))?);
    Ok(sum * sum / (log_ratio.numel() as f64 * squares))
}

/// Servers are other programs, in other number formats: what they differ by on the mean is bounded. `raw` is the mean difference from
/// the trainer's values at temperature 1.
fn check_engines(
    difference: f64,
    largest: f64,
    limit: f64,
    raw: impl FnOnce() -> Result<f64>,
) -> Result<()> {
    if difference <= limit {
        return Ok(());
    }
    let hint = if raw()? <= limit {
        ": the servers tell log-probabilities as they are before temperature; start vLLM with --logprobs-mode processed_logprobs"
    } else {
        ": are the servers' weights packed in another way than the trainer's, or do they filter tokens (--generation-config vllm)?"
    };
    bail!(arete_engine::Error::Disagreement { difference, largest, limit, hint })
}

/// Sampler and trainer are one decoder, whose rows on the CPU do not depend on each other: there a difference is a fault, while
/// cuBLAS promises nothing (docs/numerics.md).
fn check_difference(difference: f64, kind: Kind, device: Device, allowed: bool) -> Result<()> {
    let limit = if kind == Kind::Float { 1e-4 } else { 1e-3 };
    if difference <= limit {
        return Ok(());
    }
    if device == Device::Cpu && !allowed {
        bail!(
            "sampler_trainer_difference: expected at most {limit} nats between a token's log-probability when sampled and when trained \
             on, got {difference}; rows of a batch depend on each other here (`arete-model machine` shows the self-tests): report it, \
             use dtype f32, or set allow_disagreement"
        );
    }
    tracing::warn!(difference, limit, "sampler and trainer disagree on log-probabilities");
    Ok(())
}

/// All conversations score the same: there is nothing to learn from.
pub(crate) fn all_alike(what: &str, score: f64, n: usize) -> BadInput {
    BadInput(format!(
        "{what}: expected scores that differ between conversations, got {score} for all {n}; is the reward model trained?"
    ))
}

/// The steps' numbers under TRL's names.
fn of_update(report: &UpdateReport, has_critic: bool) -> Vec<(String, f64)> {
    let of_critic = ["loss/value_avg", "val/clipfrac_avg", "value_grad_norm"];
    [
        ("policy/approxkl_avg", report.approx_kl),
        ("policy/clipfrac_avg", report.clip_fraction),
        ("loss/policy_avg", report.policy_loss),
        ("loss/value_avg", report.value_loss),
        ("val/clipfrac_avg", report.value_clip_fraction),
        ("val/ratio", report.ratio),
        ("val/ratio_var", report.ratio_variance),
        ("first_log_ratio", report.first_log_ratio),
        ("policy_grad_norm", report.policy_grad_norm),
        ("value_grad_norm", report.value_grad_norm),
        ("optimiser_steps", report.n_steps as f64),
        ("stopped_early", f64::from(u8::from(report.stopped_early))),
    ]
    .into_iter()
    .filter(|(name, _)| has_critic || !of_critic.contains(name))
    .map(|(name, value)| (name.to_owned(), value))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disagreement_is_an_error_on_the_cpu_unless_allowed() {
        let check =
            |difference, kind, device, allowed| check_difference(difference, kind, device, allowed);
        assert!(check(1e-3, Kind::BFloat16, Device::Cpu, false).is_ok());
        assert!(check(1e-3, Kind::Float, Device::Cpu, false).is_err());
        assert!(check(1e-3, Kind::Float, Device::Cpu, true).is_ok());
        assert!(check(0.3, Kind::BFloat16, Device::Cuda(0), false).is_ok());
        let error = check(0.3, Kind::BFloat16, Device::Cpu, false).unwrap_err().to_string();
        assert!(error.contains("0.3") && error.contains("allow_disagreement"), "{error}");
        // Not a number is no agreement.
        assert!(check(f64::NAN, Kind::BFloat16, Device::Cpu, false).is_err());
    }
}
