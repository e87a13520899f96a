//! From rewards to what the steps learn from: advantages by a critic, or against the other samples of a prompt.

use anyhow::Result;
use arete_model::Tensor;
use tch::{Device, Kind};

use crate::assess::{Assessment, Pay};
use crate::config::{Aggregation, Algorithm, Config};
use crate::gae::estimate_advantages;
use crate::group;
use crate::packs::FirstPass;
use crate::reward::place;
use crate::rollout::{Conversation, Layout};
use crate::update::Targets;
use crate::whiten::{rescale, whiten};

/// What the steps of an iteration learn from.
///
/// # Shapes
///
/// - `ref_logprob`: `[n]` f32, log P of the own tokens under the reference, nats.
pub(crate) fn targets(
    conversations: &[Conversation],
    assessment: &Assessment,
    layout: &Layout,
    first: &FirstPass<'_>,
    ref_logprob: &Tensor,
    kl_coef: f64,
    config: &Config,
) -> Result<Targets> {
    let mut targets = match &first.old_value {
        Some(old_value) => of_critic(assessment, layout, old_value, config)?,
        None => {
            let kl = &first.old_logprob - ref_logprob; // [n]
            of_groups(conversations, assessment, layout, &kl, kl_coef, config)?
        }
    };
    if config.algorithm == Algorithm::Grpo && kl_coef > 0.0 {
        targets.reference = Some((ref_logprob.shallow_clone(), kl_coef));
    }
    if config.importance_cap > 0.0 {
        targets.log_importance = Some(&first.old_logprob - sampled_logprobs(conversations));
    }
    Ok(targets)
}

/// `[n]` f32: log P of the own tokens as the sampler saw them.
pub(crate) fn sampled_logprobs(conversations: &[Conversation]) -> Tensor {
    let sampled: Vec<f32> =
        conversations.iter().flat_map(|c| c.sampled_logprob.iter().copied()).collect();
    Tensor::from_slice(&sampled).to_device(Device::Cpu)
}

/// Advantages and returns of every own token by a critic.
fn of_critic(
    assessment: &Assessment,
    layout: &Layout,
    old_value: &Tensor,
    config: &Config,
) -> Result<Targets> {
    let valid = layout.valid();
    let mut rewards = assessment.token_rewards.shallow_clone();
    if config.center_scores {
        rewards -= mean_pay(&assessment.pay, layout)?;
    }
    if config.whiten_rewards {
        rewards = rescale(&rewards, &valid)?;
    }
    let values = layout.spread(old_value); // [B, T]
    let raw = estimate_advantages(&rewards, &values, &valid, config.gamma, config.lambda)?;
    let advantage = if config.whitens() { whiten(&raw.advantage, &valid)? } else { raw.advantage };
    Ok(Targets::of_critic(layout.gather(&advantage), layout.gather(&raw.returns)))
}

/// What each turn is paid in the mean over the rollout, at each conversation's place for it: `[B, T]` f32.
///
/// A number that is the same for every conversation is a baseline, and changes no gradient in expectation. A critic that
/// knows nothing yet leaves it in: at λ < 1 it presses towards short replies, and whitening makes a signal of what is
/// left of it.
fn mean_pay(pay: &Pay, layout: &Layout) -> Result<Tensor> {
    let mean = pay.amount.to_kind(Kind::Double).mean_dim(0, true, Kind::Double); // [1, U]
    let mean = mean.to_kind(Kind::Float).expand_as(&pay.amount).contiguous(); // [B, U]
    place(&mean, &pay.columns, layout.n_columns())
}

/// Advantages of every own token against the other samples of its prompt.
fn of_groups(
    conversations: &[Conversation],
    assessment: &Assessment,
    layout: &Layout,
    kl: &Tensor,
    kl_coef: f64,
    config: &Config,
) -> Result<Targets> {
    let scores = &assessment.scores;
    let amount = match config.aggregation {
        Aggregation::SumThenNormalize => assessment.pay.amount.shallow_clone(),
        Aggregation::NormalizeThenSum => {
            let z = group::standardise_each(&scores.z, config.samples_per_prompt);
            Pay::of(&z, scores, conversations, layout, config)?.amount
        }
    }; // [B, U]
    let units = layout.units(config.pays_per_turn()); // [n]
    let kl = Tensor::zeros(amount.size(), (Kind::Double, Device::Cpu))
        .view(-1)
        .index_add(0, units, &kl.to_kind(Kind::Double))
        .view_as(&amount); // [B, U]
    let columns = |tensor: &Tensor| -> Result<Vec<Vec<f64>>> {
        let columns = tensor.to_kind(Kind::Double).unbind(1);
        Ok(columns.iter().map(Vec::try_from).collect::<Result<_, _>>()?)
    };
    let advantages = compare(&columns(&amount)?, &columns(&kl)?, kl_coef, config);
    let flat: Vec<f32> = (0..conversations.len())
        .flat_map(|row| advantages.iter().map(move |column| column[row] as f32))
        .collect();
    let mut advantage = Tensor::from_slice(&flat).index_select(0, units); // [n]
    if config.whitens() {
        let valid = layout.valid();
        advantage = layout.gather(&whiten(&layout.spread(&advantage), &valid)?);
    }
    let is_sequence = config.algorithm == Algorithm::Rloo;
    Ok(Targets {
        advantage,
        returns: None,
        units: is_sequence.then(|| units.shallow_clone()),
        reference: None,
        log_importance: None,
    })
}

/// The advantage of each unit (a turn that is paid by itself, or the whole conversation).
///
/// # Shapes
///
/// - `pay`, `kl`: `[U][B]`, a column a unit: what its scores pay, and its k1 summed over own tokens, nats; so is the
///   result. The samples of a prompt follow each other.
///
/// # Source
///
/// TRL 1.16's `RLOOTrainer` (the KL penalty is part of the reward) and `GRPOTrainer` (it is part of the loss); over several
/// turns [`group::to_go`].
#[must_use]
pub fn compare(pay: &[Vec<f64>], kl: &[Vec<f64>], kl_coef: f64, config: &Config) -> Vec<Vec<f64>> {
    let n = config.samples_per_prompt;
    let of_unit = |(pay, kl): (&Vec<f64>, &Vec<f64>)| match (config.algorithm, config.aggregation) {
        (Algorithm::Grpo, Aggregation::SumThenNormalize) => group::standardise_groups(pay, n),
        (Algorithm::Grpo, Aggregation::NormalizeThenSum) => group::standardised(pay),
        (Algorithm::Rloo | Algorithm::Ppo, _) => {
            let rewards: Vec<f64> =
                pay.iter().zip(kl).map(|(pay, kl)| pay - kl_coef * kl).collect();
            group::leave_one_out(&rewards, n)
        }
    };
    group::to_go(&pay.iter().zip(kl).map(of_unit).collect::<Vec<_>>())
}
