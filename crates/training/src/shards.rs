//! A batch in fixed parts, and the sum of their gradients: the one place where all trainers do that.
//!
//! Which examples a shard holds depends on the batch and the number of shards alone. A rank computes a run of shards; with
//! [`Reduce::Ordered`] every number of the gradient is ((shard 0 + shard 1) + shard 2) + … in f32 on every process.

use std::error::Error as StdError;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use crate::{AdamW, Error, Passes, Ranks};

/// How several processes sum gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Reduce {
    /// In the order of shards: the same bytes with any number of processes.
    Ordered,
    /// Each process adds up its own, then all-reduce: least traffic; bytes depend on the number of processes.
    Fast,
}

/// Cuts `n` items into consecutive runs, as even as can be; of fewer items than runs some are empty.
///
/// # Panics
///
/// If `n_runs` is 0.
#[must_use]
pub fn cut(n: usize, n_runs: usize) -> Vec<Range<usize>> {
    (0..n_runs).map(|run| run * n / n_runs..(run + 1) * n / n_runs).collect()
}

/// Computes the shards of a step, those of this process here and the others elsewhere: afterwards the optimisers hold the
/// summed gradients of all. Returns the numbers of every shard, in order.
///
/// `sizes` are the shards' items: what is empty is passed over. `work` adds the gradients of one shard to the optimisers' tensors; where
/// memory runs out in it, that shard is begun anew with less kept ([`Passes::within`]).
///
/// # Errors
///
/// What `work` returns; [`Error::Ranks`] and [`Error::OutOfMemory`] as `E`.
pub fn accumulate<E: From<Error> + AsRef<dyn StdError + 'static>>(
    passes: &Passes,
    ranks: &Ranks,
    reduce: Reduce,
    sizes: &[usize],
    optimisers: &mut [&mut AdamW],
    mut work: impl FnMut(usize) -> Result<Vec<f64>, E>,
) -> Result<Vec<Vec<f64>>, E> {
    let mut sums: Vec<Sum> = optimisers.iter().map(|_| Sum::new(ranks, reduce)).collect();
    let mut own = Vec::new();
    let has_items = |shard: &usize| sizes[*shard] > 0;
    for shard in ranks.own_part(sizes.len()).filter(has_items) {
        own.push(passes.within(|| {
            optimisers.iter_mut().for_each(|optimiser| optimiser.zero_grad());
            work(shard)
        })?);
        for (sum, optimiser) in sums.iter_mut().zip(&*optimisers) {
            sum.add(optimiser.gradients())?;
        }
    }
    let n_rows: Vec<usize> = (0..ranks.n_ranks())
        .map(|rank| ranks.part_of(sizes.len(), rank).filter(has_items).count())
        .collect();
    for (sum, optimiser) in sums.into_iter().zip(optimisers) {
        sum.finish(ranks, &n_rows, optimiser)?;
    }
    Ok(gather(ranks, &own)?)
}

/// Lists of numbers from every process, one list after the other's, in the order of ranks.
///
/// # Errors
///
/// [`Error::Ranks`].
pub fn gather(ranks: &Ranks, own: &[Vec<f64>]) -> Result<Vec<Vec<f64>>, Error> {
    if ranks.n_ranks() == 1 {
        return Ok(own.to_vec());
    }
    #[expect(clippy::cast_precision_loss, reason = "lists are short")]
    let framed: Vec<f64> = own
        .iter()
        .flat_map(|list| std::iter::once(list.len() as f64).chain(list.iter().copied()))
        .collect();
    let mut lists = Vec::new();
    for part in ranks.gather_f64(&framed)? {
        let mut rest = part.as_slice();
        while let Some((&length, after)) = rest.split_first() {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a length")]
            let (list, after) = after.split_at(length as usize);
            lists.push(list.to_vec());
            rest = after;
        }
    }
    Ok(lists)
}

/// Gradients of shards as they come.
enum Sum {
    /// Added up in order.
    Running(Option<Tensor>),
    /// Kept apart, for the sum over all processes has an order; on the CPU.
    Rows(Vec<Tensor>),
}

impl Sum {
    fn new(ranks: &Ranks, reduce: Reduce) -> Self {
        match reduce {
            Reduce::Ordered if ranks.n_ranks() > 1 => Self::Rows(Vec::new()),
            Reduce::Ordered | Reduce::Fast => Self::Running(None),
        }
    }

    fn add(&mut self, gradients: &Tensor) -> Result<(), Error> {
        let _guard = tch::no_grad_guard();
        match self {
            Self::Running(None) => *self = Self::Running(Some(gradients.copy())),
            Self::Running(Some(sum)) => {
                let _ = sum.f_add_(gradients)?;
            }
            Self::Rows(rows) => rows.push(gradients.to_device(Device::Cpu).copy()),
        }
        Ok(())
    }

    fn finish(self, ranks: &Ranks, n_rows: &[usize], optimiser: &mut AdamW) -> Result<(), Error> {
        let _guard = tch::no_grad_guard();
        let n = optimiser.gradients().numel() as i64;
        match self {
            Self::Running(sum) if ranks.n_ranks() == 1 => {
                if let Some(sum) = sum {
                    optimiser.set_gradients(&sum);
                }
            }
            Self::Running(sum) => {
                let sum = sum.unwrap_or_else(|| optimiser.gradients().zeros_like());
                let sum = sum.to_device(Device::Cpu);
                ranks.sum_fast(&sum)?;
                optimiser.set_gradients(&sum);
            }
            Self::Rows(rows) => optimiser.set_gradients(&ranks.sum_in_order(&rows, n_rows, n)?),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tch::Kind;

    use super::*;
    use crate::AdamWConfig;

    #[test]
    fn twenty_pairs_in_shards() {
        let sizes =
            |n, n_runs| -> Vec<usize> { cut(n, n_runs).into_iter().map(|run| run.len()).collect() };
        assert_eq!(sizes(20, 4), [5, 5, 5, 5]);
        assert_eq!(sizes(7, 4), [1, 2, 2, 2]);
        assert_eq!(sizes(2, 4), [0, 1, 0, 1]);
    }

    proptest! {
        #[test]
        fn runs_follow_each_other_and_differ_by_one_at_most(n in 0usize..200, n_runs in 1usize..20) {
            let runs = cut(n, n_runs);
            prop_assert_eq!(runs.len(), n_runs);
            prop_assert_eq!(runs.concat_items(), (0..n).collect::<Vec<_>>());
            let longest = runs.iter().map(Range::len).max().unwrap();
            prop_assert!(runs.iter().all(|run| run.len() + 1 >= longest));
        }
    }

    trait Concat {
        fn concat_items(&self) -> Vec<usize>;
    }

    impl Concat for Vec<Range<usize>> {
        fn concat_items(&self) -> Vec<usize> {
            self.iter().cloned().flatten().collect()
        }
    }

    /// 1 + 2⁻²⁴ + 2⁻²⁴ in f32 is 1 from the left, and 1 + 2⁻²³ from the right: the order shows.
    #[test]
    fn gradients_are_summed_from_the_first_shard_on() {
        let weight = Tensor::zeros([1], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let parameters = vec![("w".to_owned(), weight.shallow_clone())];
        let mut optimiser = AdamW::new(parameters, AdamWConfig::default()).unwrap();
        let tiny = 2f64.powi(-24);
        let mut sum_of = |gradients: [f64; 3]| {
            let sizes = [1, 0, 1, 1];
            let mut left = gradients.into_iter();
            let work = |shard: usize| -> Result<Vec<f64>, Error> {
                (&weight * left.next().unwrap()).sum(Kind::Float).backward();
                Ok(vec![shard as f64])
            };
            let ranks = Ranks::alone();
            let (passes, optimisers) = (Passes::new(1, false), &mut [&mut optimiser]);
            let numbers = accumulate(&passes, &ranks, Reduce::Ordered, &sizes, optimisers, work);
            assert_eq!(numbers.unwrap(), [[0.0], [2.0], [3.0]]);
            optimiser.gradients().double_value(&[0])
        };
        assert_eq!(sum_of([1.0, tiny, tiny]), 1.0);
        assert_eq!(sum_of([tiny, tiny, 1.0]), 1.0 + 2.0 * tiny);
    }
}
