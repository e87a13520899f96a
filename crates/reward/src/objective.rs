//! The Bradley–Terry loss over a data set of pairs.

use std::ops::Range;

use arete_chain::batches;
use arete_model::{Adapter, Decoder, ScalarHead};
use arete_training::{Error, Evaluation, Objective, Passes, StepReport};
use tch::{Kind, Tensor};

use crate::data::Pair;
use crate::loss::{bradley_terry, column};
use crate::model::{PackedPairs, pair_scores};

/// The mean loss of a step's pairs, for [`arete_training::train`].
#[derive(Debug)]
pub struct BradleyTerry<'a> {
    /// The frozen base.
    pub decoder: &'a Decoder,
    /// The adapter that is trained.
    pub adapter: &'a Adapter,
    /// The head that is trained.
    pub head: &'a ScalarHead,
    /// Training pairs.
    pub train: &'a [Pair],
    /// Validation pairs.
    pub validation: &'a [Pair],
    /// Weight of the penalty on the sum of a pair's scores.
    pub center: f64,
    /// How much goes into a pass, and what is kept of it.
    pub passes: Passes,
    /// Scores of the validation pairs, chosen and rejected, as the last evaluation found them.
    pub evaluated: Option<Vec<[f64; 2]>>,
}

impl Objective for BradleyTerry<'_> {
    /// Of each pair: the score of the chosen side, that of the rejected, the loss.
    fn accumulate(
        &mut self,
        shard: &[usize],
        step: &[usize],
        loss_scale: f64,
    ) -> Result<Vec<f64>, Error> {
        let pairs: Vec<&Pair> = shard.iter().map(|&idx| &self.train[idx]).collect();
        let lengths: Vec<usize> = pairs.iter().map(|pair| pair.n_tokens()).collect();
        let mut numbers = Vec::new();
        for range in batches::micro_batches(&lengths, self.passes.micro_batch_tokens)? {
            let part = &pairs[range];
            let packed = PackedPairs::new(part);
            let pass = self.decoder.pass(&packed.batch, self.adapter, self.passes.recompute())?;
            let both = packed.scores(&pass.hidden, self.head); // [2n]
            let loss = losses_of(&both, part, self.center); // [n]
            let found = Tensor::cat(&[both.detach().view([2, -1]), loss.detach().unsqueeze(0)], 0); // [3, n]
            numbers.push(found.tr()); // [n, 3]
            #[expect(clippy::cast_precision_loss, reason = "a small number")]
            let scale = loss_scale / step.len() as f64;
            pass.backward(&(loss.sum(Kind::Float) * scale))?;
        }
        // One read from the device.
        let numbers = Tensor::cat(&numbers, 0).to_kind(Kind::Double);
        Ok(Vec::<f64>::try_from(numbers.contiguous().view([-1]))?)
    }

    fn passes(&self) -> Passes {
        self.passes.clone()
    }

    fn report(&self, step: &[usize], shards: &[Vec<f64>]) -> StepReport {
        let (chosen, rejected, losses) = columns(shards);
        let (loss, metrics) = summary(&chosen, &rejected, &losses);
        // As TRL counts: both sides whole, though what they share is computed once.
        let pairs = step.iter().map(|&idx| &self.train[idx]);
        let n_tokens = pairs
            .map(|pair| pair.chosen.token_ids.len() + pair.rejected.token_ids.len())
            .sum::<usize>() as u64;
        StepReport { loss, n_tokens, metrics }
    }

    fn n_validation(&self) -> usize {
        self.validation.len()
    }

    fn measure(&mut self, examples: Range<usize>) -> Result<Vec<f64>, Error> {
        let pairs: Vec<&Pair> = self.validation[examples].iter().collect();
        let budget = self.passes.micro_batch_tokens;
        let scores = pair_scores(self.decoder, Some(self.adapter), self.head, &pairs, budget)?;
        let (chosen, rejected): (Vec<f64>, Vec<f64>) =
            scores.iter().map(|&[chosen, rejected]| (chosen, rejected)).unzip();
        let both = Tensor::from_slice(&[chosen, rejected].concat());
        let losses = losses_of(&both.to_kind(Kind::Float), &pairs, self.center);
        let losses = Vec::<f64>::try_from(losses.to_kind(Kind::Double))?;
        Ok(scores.iter().zip(losses).flat_map(|(&[c, r], loss)| [c, r, loss]).collect())
    }

    fn evaluation(&mut self, parts: &[Vec<f64>]) -> Result<Evaluation, Error> {
        let (chosen, rejected, losses) = columns(parts);
        self.evaluated = Some(chosen.iter().zip(&rejected).map(|(&c, &r)| [c, r]).collect());
        let (loss, metrics) = summary(&chosen, &rejected, &losses);
        Ok(Evaluation { loss, metrics })
    }
}

/// Scores of the chosen sides, of the rejected, and losses, from three numbers a pair.
fn columns(parts: &[Vec<f64>]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let column = |place: usize| parts.iter().flatten().skip(place).step_by(3).copied().collect();
    (column(0), column(1), column(2))
}

/// The loss of each pair from the scores of all chosen, then all rejected sides.
fn losses_of(both: &Tensor, pairs: &[&Pair], center: f64) -> Tensor {
    let device = both.device();
    let n = pairs.len() as i64;
    let probabilities: Vec<f32> = pairs.iter().map(|pair| pair.chosen_prob).collect();
    let margins: Vec<f32> = pairs.iter().map(|pair| pair.margin).collect();
    bradley_terry(
        &both.narrow(0, 0, n),
        &both.narrow(0, n, n),
        &column(&probabilities, device),
        &column(&margins, device),
        center,
    )
}

/// Mean loss, and TRL's metrics (rewards are what the rest of this project calls scores).
fn summary(chosen: &[f64], rejected: &[f64], losses: &[f64]) -> (f64, Vec<(&'static str, f64)>) {
    #[expect(clippy::cast_precision_loss, reason = "a small number")]
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let all = [chosen, rejected].concat();
    let margins: Vec<f64> = chosen.iter().zip(rejected).map(|(c, r)| c - r).collect();
    let wins: Vec<f64> = margins.iter().map(|&margin| f64::from(u8::from(margin > 0.0))).collect();
    let metrics = vec![
        ("accuracy", mean(&wins)),
        ("min_reward", all.iter().copied().fold(f64::INFINITY, f64::min)),
        ("mean_reward", mean(&all)),
        ("max_reward", all.iter().copied().fold(f64::NEG_INFINITY, f64::max)),
        ("margin", mean(&margins)),
    ];
    (mean(losses), metrics)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_those_of_trl() {
        let (loss, metrics) = summary(&[1.0, 0.0, 2.0], &[0.0, 3.0, 2.0], &[0.5, 1.0, 1.5]);
        assert_eq!(loss, 1.0);
        let expected = [
            ("accuracy", 1.0 / 3.0), // a tie is no win
            ("min_reward", 0.0),
            ("mean_reward", 8.0 / 6.0),
            ("max_reward", 3.0),
            ("margin", -2.0 / 3.0),
        ];
        assert_eq!(metrics, expected);
    }
}
