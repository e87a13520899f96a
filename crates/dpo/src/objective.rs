//! The losses of direct preference optimisation over a data set of pairs.

use std::ops::Range;

use arete_chain::batches::micro_batches;
use arete_model::{Adapter, Decoder};
use arete_training::{Error, Evaluation, Objective, Passes, StepReport};
use tch::{Kind, Tensor};

use crate::data::Pair;
use crate::loss::{LossSettings, preference_loss};
use crate::model::{PackedPairs, pair_logprobs};

/// Log-probabilities of the reference, `[chosen, rejected]` of each pair in nats, as far as they are known: each is computed
/// when its pair is first seen. They do not depend on what a pair is packed with, so it does not matter when that is.
#[derive(Clone, Debug)]
pub struct Reference(Vec<Option<[f64; 2]>>);

impl Reference {
    /// Nothing is known of `n` pairs.
    #[must_use]
    pub fn unknown(n: usize) -> Self {
        Self(vec![None; n])
    }
}

/// The mean loss of a step's pairs, for [`arete_training::train`].
#[derive(Debug)]
pub struct DirectPreference<'a> {
    /// The frozen base; with the adapter off, the reference.
    pub decoder: &'a Decoder,
    /// The adapter that is trained.
    pub adapter: &'a Adapter,
    /// Training pairs.
    pub train: &'a [Pair],
    /// Validation pairs.
    pub validation: &'a [Pair],
    /// The loss.
    pub loss: LossSettings,
    /// How much goes into a pass, and what is kept of it.
    pub passes: Passes,
    /// The reference on the training pairs.
    pub train_reference: Reference,
    /// The reference on the validation pairs.
    pub validation_reference: Reference,
    /// Rewards of the validation pairs, chosen and rejected, as the last evaluation found them.
    pub evaluated: Option<Vec<[f64; 2]>>,
}

impl<'a> DirectPreference<'a> {
    /// Nothing is known of the reference yet.
    #[must_use]
    pub fn new(
        decoder: &'a Decoder,
        adapter: &'a Adapter,
        (train, validation): (&'a [Pair], &'a [Pair]),
        loss: LossSettings,
        passes: Passes,
    ) -> Self {
        Self {
            decoder,
            adapter,
            train,
            validation,
            loss,
            passes,
            train_reference: Reference::unknown(train.len()),
            validation_reference: Reference::unknown(validation.len()),
            evaluated: None,
        }
    }

    /// Log-probabilities of the reference on some pairs of one forward pass.
    fn reference(
        &mut self,
        packed: &PackedPairs,
        places: &[usize],
    ) -> Result<Vec<[f64; 2]>, Error> {
        let known = &mut self.train_reference.0;
        if places.iter().any(|&place| known[place].is_none()) {
            let _guard = tch::no_grad_guard();
            let hidden = self.decoder.forward(&packed.batch, None)?;
            let found = packed.read(&packed.logprobs(self.decoder, &hidden)?.sums)?;
            for (&place, found) in places.iter().zip(found) {
                known[place] = Some(found);
            }
        }
        Ok(places.iter().map(|&place| known[place].expect("just computed")).collect())
    }
}

/// What a set of pairs came to.
#[derive(Default)]
struct Found {
    logprobs: Vec<[f64; 2]>,
    reference: Vec<[f64; 2]>,
    losses: Vec<f64>,
    /// Summed over counted tokens, nats.
    entropy: f64,
}

impl Found {
    /// As numbers: the entropy, then five a pair.
    fn numbers(&self) -> Vec<f64> {
        let pairs = self.logprobs.iter().zip(&self.reference).zip(&self.losses);
        let of_pair = |((&[c, r], &[ref_c, ref_r]), &loss): ((&[f64; 2], &[f64; 2]), &f64)| {
            [c, r, ref_c, ref_r, loss]
        };
        std::iter::once(self.entropy).chain(pairs.flat_map(of_pair)).collect()
    }

    /// From the numbers of several parts.
    fn of(parts: &[Vec<f64>]) -> Self {
        let mut found = Self::default();
        for part in parts {
            found.entropy += part[0];
            for pair in part[1..].chunks(5) {
                found.logprobs.push([pair[0], pair[1]]);
                found.reference.push([pair[2], pair[3]]);
                found.losses.push(pair[4]);
            }
        }
        found
    }
}

impl Objective for DirectPreference<'_> {
    fn accumulate(
        &mut self,
        shard: &[usize],
        step: &[usize],
        loss_scale: f64,
    ) -> Result<Vec<f64>, Error> {
        let train = self.train;
        let pairs: Vec<&Pair> = shard.iter().map(|&idx| &train[idx]).collect();
        let lengths: Vec<usize> = pairs.iter().map(|pair| pair.n_tokens()).collect();
        let mut found = Found::default();
        for range in micro_batches(&lengths, self.passes.micro_batch_tokens)? {
            let part = &pairs[range.clone()];
            let packed = PackedPairs::new(part);
            let reference = self.reference(&packed, &shard[range])?;
            let pass = self.decoder.pass(&packed.batch, self.adapter, self.passes.recompute())?;
            let sides = packed.logprobs(self.decoder, &pass.hidden)?;
            let losses = losses(&self.loss, &sides.sums, &reference, part); // [n]
            found.logprobs.extend(packed.read(&sides.sums.detach())?);
            found.losses.extend(Vec::<f64>::try_from(losses.detach())?);
            found.reference.extend(reference);
            found.entropy += f64::try_from(sides.entropy)?;
            #[expect(clippy::cast_precision_loss, reason = "a small number")]
            let scale = loss_scale / step.len() as f64;
            pass.backward(&(losses.sum(Kind::Double) * scale))?;
        }
        Ok(found.numbers())
    }

    fn passes(&self) -> Passes {
        self.passes.clone()
    }

    fn report(&self, step: &[usize], shards: &[Vec<f64>]) -> StepReport {
        let pairs: Vec<&Pair> = step.iter().map(|&idx| &self.train[idx]).collect();
        let found = Found::of(shards);
        let (loss, rewards, mut metrics) = summary(&found, self.loss.beta);
        drop(rewards);
        metrics.push(("entropy", found.entropy / n_counted(&pairs)));
        // As TRL counts: both sides whole, though what they share is computed once.
        let n_tokens = pairs
            .iter()
            .map(|pair| pair.chosen.token_ids.len() + pair.rejected.token_ids.len())
            .sum::<usize>() as u64;
        StepReport { loss, n_tokens, metrics }
    }

    fn n_validation(&self) -> usize {
        self.validation.len()
    }

    fn measure(&mut self, examples: Range<usize>) -> Result<Vec<f64>, Error> {
        let _guard = tch::no_grad_guard();
        let pairs: Vec<&Pair> = self.validation[examples.clone()].iter().collect();
        let budget = self.passes.micro_batch_tokens;
        let known = &mut self.validation_reference.0[examples];
        if known.iter().any(Option::is_none) {
            let reference = pair_logprobs(self.decoder, None, &pairs, budget)?;
            known.iter_mut().zip(reference).for_each(|(known, found)| *known = Some(found));
        }
        let reference: Vec<[f64; 2]> = known.iter().copied().flatten().collect();
        let logprobs = pair_logprobs(self.decoder, Some(self.adapter), &pairs, budget)?;
        let (chosen, rejected): (Vec<f64>, Vec<f64>) =
            logprobs.iter().map(|&[chosen, rejected]| (chosen, rejected)).unzip();
        let sides = Tensor::from_slice(&[chosen, rejected].concat());
        let losses = Vec::<f64>::try_from(losses(&self.loss, &sides, &reference, &pairs))?;
        Ok(Found { logprobs, reference, losses, entropy: 0.0 }.numbers())
    }

    fn evaluation(&mut self, parts: &[Vec<f64>]) -> Result<Evaluation, Error> {
        let (loss, rewards, metrics) = summary(&Found::of(parts), self.loss.beta);
        self.evaluated = Some(rewards);
        Ok(Evaluation { loss, metrics })
    }
}

#[expect(clippy::cast_precision_loss, reason = "token counts are far below 2^52")]
fn n_counted(pairs: &[&Pair]) -> f64 {
    pairs.iter().map(|pair| pair.chosen.counted.len() + pair.rejected.counted.len()).sum::<usize>()
        as f64
}

/// The loss of each pair `[n]` from the policy's sums over all chosen, then all rejected sides, and the reference's.
fn losses(
    settings: &LossSettings,
    sides: &Tensor,
    reference: &[[f64; 2]],
    pairs: &[&Pair],
) -> Tensor {
    let device = sides.device();
    let column = |values: Vec<f64>| Tensor::from_slice(&values).to_device(device); // [n]
    let n = pairs.len() as i64;
    #[expect(clippy::cast_precision_loss, reason = "token counts are far below 2^52")]
    let length = |n: usize| if settings.is_per_token() { n as f64 } else { 1.0 };
    let ratio = |start: i64, side: usize, lengths: Vec<f64>| {
        let reference = column(reference.iter().map(|sides| sides[side]).collect());
        (sides.narrow(0, start, n) - reference) / column(lengths)
    };
    let chosen = pairs.iter().map(|pair| length(pair.chosen.counted.len())).collect();
    let rejected = pairs.iter().map(|pair| length(pair.rejected.counted.len())).collect();
    let probabilities = column(pairs.iter().map(|pair| pair.chosen_prob).collect());
    preference_loss(settings, &ratio(0, 0, chosen), &ratio(n, 1, rejected), &probabilities)
}

/// Values by TRL's names.
type Metrics = Vec<(&'static str, f64)>;

/// Mean loss, rewards (beta times log-ratios, chosen and rejected of each pair), and TRL's metrics.
fn summary(found: &Found, beta: f64) -> (f64, Vec<[f64; 2]>, Metrics) {
    #[expect(clippy::cast_precision_loss, reason = "a small number")]
    let mean =
        |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / found.losses.len() as f64;
    let rewards: Vec<[f64; 2]> = (found.logprobs.iter().zip(&found.reference))
        .map(|(policy, reference)| [0, 1].map(|side| beta * (policy[side] - reference[side])))
        .collect();
    let metrics = vec![
        ("rewards/chosen", mean(&mut rewards.iter().map(|[chosen, _]| *chosen))),
        ("rewards/rejected", mean(&mut rewards.iter().map(|[_, rejected]| *rejected))),
        ("rewards/accuracies", mean(&mut rewards.iter().map(|[c, r]| f64::from(u8::from(c > r))))),
        ("rewards/margins", mean(&mut rewards.iter().map(|[chosen, rejected]| chosen - rejected))),
        ("logps/chosen", mean(&mut found.logprobs.iter().map(|[chosen, _]| *chosen))),
        ("logps/rejected", mean(&mut found.logprobs.iter().map(|[_, rejected]| *rejected))),
    ];
    (mean(&mut found.losses.iter().copied()), rewards, metrics)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_those_of_trl() {
        let found = Found {
            logprobs: vec![[-10.0, -20.0], [-30.0, -40.0]],
            reference: vec![[-12.0, -20.0], [-30.0, -40.0]],
            losses: vec![0.5, 1.5],
            entropy: 0.0,
        };
        let (loss, rewards, metrics) = summary(&found, 0.5);
        assert_eq!(loss, 1.0);
        assert_eq!(rewards, [[1.0, 0.0], [0.0, 0.0]]);
        let expected = [
            ("rewards/chosen", 0.5),
            ("rewards/rejected", 0.0),
            ("rewards/accuracies", 0.5), // a tie is no win
            ("rewards/margins", 0.5),
            ("logps/chosen", -20.0),
            ("logps/rejected", -30.0),
        ];
        assert_eq!(metrics, expected);
    }
}
