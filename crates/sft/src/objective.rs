//! Cross-entropy of the tokens to imitate.

use std::ops::Range;

use arete_chain::batches;
use arete_model::{Adapter, Batch, Decoder, logprobs};
use arete_training::{Error, Evaluation, Objective, Passes, StepReport};
use tch::{Kind, Tensor};

use crate::data::Example;

/// Most target tokens a training step takes its accuracy from.
pub const ACCURACY_ROWS: usize = 256;

/// Rows whose logits are held at once in an evaluation.
const LOGIT_ROWS: usize = 512;

/// The mean of −log P over the target tokens of a step, for [`arete_training::train`].
#[derive(Debug)]
pub struct CrossEntropy<'a> {
    /// The frozen model.
    pub decoder: &'a Decoder,
    /// The adapter that is trained.
    pub adapter: &'a Adapter,
    /// Training examples.
    pub train: &'a [Example],
    /// Validation examples.
    pub validation: &'a [Example],
    /// How much goes into a pass, and what is kept of it.
    pub passes: Passes,
}

/// Sums over target tokens, on the model's device.
struct Sums {
    loss: Tensor,
    entropy: Tensor,
    n_correct: Tensor,
    n_judged: usize,
}

impl Sums {
    fn zero(decoder: &Decoder) -> Self {
        let zero = || Tensor::zeros([], (Kind::Double, decoder.device()));
        Self { loss: zero(), entropy: zero(), n_correct: zero(), n_judged: 0 }
    }

    /// Loss, entropy, tokens predicted rightly, tokens judged. One read from the device.
    fn numbers(&self) -> Result<Vec<f64>, Error> {
        let sums = Tensor::stack(&[&self.loss, &self.entropy, &self.n_correct], 0); // [3]
        let mut sums = Vec::<f64>::try_from(sums)?;
        #[expect(clippy::cast_precision_loss, reason = "token counts are far below 2^52")]
        sums.push(self.n_judged as f64);
        Ok(sums)
    }
}

/// Mean loss, entropy and accuracy of parts' sums together.
fn means(parts: &[Vec<f64>], n_targets: usize) -> [f64; 3] {
    let sum = |place: usize| parts.iter().map(|part| part[place]).sum::<f64>();
    #[expect(clippy::cast_precision_loss, reason = "token counts are far below 2^52")]
    let n_targets = n_targets as f64;
    [sum(0) / n_targets, sum(1) / n_targets, sum(2) / sum(3)]
}

fn n_targets<'e>(examples: impl Iterator<Item = &'e Example>) -> usize {
    examples.map(Example::n_targets).sum()
}

/// A forward pass's share of the work.
struct MicroBatch {
    batch: Batch,
    /// Rows of the target tokens.
    rows: Vec<usize>,
}

/// Packs examples into forward passes.
fn micro_batches(examples: &[&Example], budget: usize) -> Result<Vec<MicroBatch>, Error> {
    let lengths: Vec<usize> = examples.iter().map(|example| example.token_ids.len()).collect();
    let pack = |range: std::ops::Range<usize>| {
        let part = &examples[range];
        let sequences: Vec<&[i64]> =
            part.iter().map(|example| example.token_ids.as_slice()).collect();
        let target = part.iter().flat_map(|example| &example.target);
        let rows = target.enumerate().filter_map(|(row, &target)| target.then_some(row)).collect();
        MicroBatch { batch: Batch::from_sequences(&sequences), rows }
    };
    Ok(batches::micro_batches(&lengths, budget)?.into_iter().map(pack).collect())
}

impl Objective for CrossEntropy<'_> {
    fn accumulate(
        &mut self,
        shard: &[usize],
        step: &[usize],
        loss_scale: f64,
    ) -> Result<Vec<f64>, Error> {
        let examples: Vec<&Example> = shard.iter().map(|&idx| &self.train[idx]).collect();
        let n_targets = n_targets(step.iter().map(|&idx| &self.train[idx]));
        let mut sums = Sums::zero(self.decoder);
        for MicroBatch { batch, rows } in micro_batches(&examples, self.passes.micro_batch_tokens)?
        {
            let pass = self.decoder.pass(&batch, self.adapter, self.passes.recompute())?;
            let found = logprobs::of_rows(self.decoder, &pass.hidden, &batch, &rows, 1.0, true)?;
            let loss = -found.logprob.sum(Kind::Float);
            sums.loss += loss.detach();
            sums.entropy += found.entropy.sum(Kind::Double);
            let sample = evenly_spaced(&rows, (ACCURACY_ROWS * rows.len()).div_ceil(n_targets));
            sums.n_correct += n_correct(self.decoder, &pass.hidden, &batch, &sample)?;
            sums.n_judged += sample.len();
            #[expect(clippy::cast_precision_loss, reason = "token counts are far below 2^52")]
            pass.backward(&(loss * (loss_scale / n_targets as f64)))?;
        }
        sums.numbers()
    }

    fn passes(&self) -> Passes {
        self.passes.clone()
    }

    fn report(&self, step: &[usize], shards: &[Vec<f64>]) -> StepReport {
        let examples = || step.iter().map(|&idx| &self.train[idx]);
        let n_tokens: usize = examples().map(|example| example.token_ids.len()).sum();
        let [loss, entropy, accuracy] = means(shards, n_targets(examples()));
        let metrics = vec![("entropy", entropy), ("mean_token_accuracy", accuracy)];
        StepReport { loss, n_tokens: n_tokens as u64, metrics }
    }

    fn n_validation(&self) -> usize {
        self.validation.len()
    }

    fn measure(&mut self, examples: Range<usize>) -> Result<Vec<f64>, Error> {
        let _guard = tch::no_grad_guard();
        let examples: Vec<&Example> = self.validation[examples].iter().collect();
        let mut sums = Sums::zero(self.decoder);
        for MicroBatch { batch, rows } in micro_batches(&examples, self.passes.micro_batch_tokens)?
        {
            let hidden = self.decoder.forward(&batch, Some(self.adapter))?;
            let found = logprobs::of_rows(self.decoder, &hidden, &batch, &rows, 1.0, true)?;
            sums.loss -= found.logprob.sum(Kind::Double);
            sums.entropy += found.entropy.sum(Kind::Double);
            sums.n_correct += n_correct(self.decoder, &hidden, &batch, &rows)?;
            sums.n_judged += rows.len();
        }
        sums.numbers()
    }

    fn evaluation(&mut self, parts: &[Vec<f64>]) -> Result<Evaluation, Error> {
        let [loss, entropy, accuracy] = means(parts, n_targets(self.validation.iter()));
        let metrics = vec![("entropy", entropy), ("mean_token_accuracy", accuracy)];
        Ok(Evaluation { loss, metrics })
    }
}

/// `n` of the rows (all, if there are fewer), as far apart as possible.
fn evenly_spaced(rows: &[usize], n: usize) -> Vec<usize> {
    if n >= rows.len() {
        return rows.to_vec();
    }
    (0..n).map(|k| rows[k * rows.len() / n]).collect()
}

/// How many of the rows' tokens are the most probable ones, as a scalar tensor.
fn n_correct(
    decoder: &Decoder,
    hidden: &Tensor,
    batch: &Batch,
    rows: &[usize],
) -> Result<Tensor, Error> {
    let _guard = tch::no_grad_guard();
    let predecessors = batch.predecessors();
    let mut total = Tensor::zeros([], (Kind::Int64, decoder.device()));
    for rows in rows.chunks(LOGIT_ROWS) {
        let from: Vec<i64> = rows
            .iter()
            .map(|&row| predecessors[row].expect("targets are never the first token") as i64)
            .collect();
        let tokens: Vec<i64> = rows.iter().map(|&row| batch.token_ids()[row]).collect();
        let from = Tensor::from_slice(&from).to_device(hidden.device());
        let tokens = Tensor::from_slice(&tokens).to_device(hidden.device());
        let best = decoder.logits(&hidden.index_select(0, &from))?.argmax(-1, false); // [n]
        total += best.eq_tensor(&tokens).sum(Kind::Int64);
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_spread_over_the_whole_range() {
        assert_eq!(evenly_spaced(&[10, 11, 12, 13, 14, 15], 3), vec![10, 12, 14]);
        assert_eq!(evenly_spaced(&[3, 4], 5), vec![3, 4]);
    }

    #[test]
    fn target_rows_follow_the_packing() {
        let a = Example { token_ids: vec![1, 2, 3], target: vec![false, true, false] };
        let b = Example { token_ids: vec![4, 5], target: vec![false, true] };
        let batches = micro_batches(&[&a, &b], 100).unwrap();
        assert_eq!(batches.len(), 1);
        assert_eq!(batches[0].rows, vec![1, 4]);
        assert_eq!(batches[0].batch.token_ids(), &[1, 2, 3, 4, 5]);
        assert_eq!(micro_batches(&[&a, &b], 3).unwrap()[1].rows, vec![1]);
    }
}
