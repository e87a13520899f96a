//! Both sides of pairs through the policy or the reference, their common prompt computed once.

use arete_chain::batches::micro_batches;
use arete_model::{Adapter, Batch, Decoder, logprobs};
use arete_training::pairs::{PairTokens, trees};
use tch::{Kind, Tensor};

use crate::data::{Pair, Sequence};

/// log P of the counted tokens of each pair's sides, `[chosen, rejected]`, summed, in nats; without an adapter those of the
/// reference.
///
/// # Errors
///
/// `Model` if a pair is longer than the model's positions, `Torch` if memory runs out.
pub fn pair_logprobs(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    pairs: &[&Pair],
    micro_batch_tokens: usize,
) -> Result<Vec<[f64; 2]>, arete_training::Error> {
    let _guard = tch::no_grad_guard();
    let lengths: Vec<usize> = pairs.iter().map(|pair| pair.n_tokens()).collect();
    let mut out = Vec::with_capacity(pairs.len());
    for range in micro_batches(&lengths, micro_batch_tokens)? {
        let packed = PackedPairs::new(&pairs[range]);
        let hidden = decoder.forward(&packed.batch, adapter)?;
        out.extend(packed.read(&packed.logprobs(decoder, &hidden)?.sums)?);
    }
    Ok(out)
}

/// What a forward pass says of the sides of its pairs, the chosen ones first.
#[derive(Debug)]
pub(crate) struct SideLogProbs {
    /// `[2n]` f64, nats: sums over the tokens that count.
    pub(crate) sums: Tensor,
    /// Sum over all counted tokens, a scalar f64: entropy of the distributions they are drawn from. Never differentiable.
    pub(crate) entropy: Tensor,
}

/// Pairs in one forward pass, each a tree: the common prompt, then each side's own tokens.
#[derive(Debug)]
pub(crate) struct PackedPairs {
    /// The tokens.
    pub(crate) batch: Batch,
    /// Rows of the counted tokens, side by side.
    rows: Vec<usize>,
    /// Of each row: its side, the chosen ones first.
    owners: Vec<i64>,
    n_pairs: usize,
}

impl PackedPairs {
    pub(crate) fn new(pairs: &[&Pair]) -> Self {
        let (batch, segments) = trees(pairs.iter().map(|pair| PairTokens {
            chosen: &pair.chosen.token_ids,
            rejected: &pair.rejected.token_ids,
            n_shared: pair.n_shared,
        }));
        let (mut rows, mut owners) = (Vec::new(), Vec::new());
        let sides: [fn(&Pair) -> &Sequence; 2] = [|pair| &pair.chosen, |pair| &pair.rejected];
        let placed = segments.iter().zip(sides).flat_map(|(segments, side)| {
            segments.iter().zip(pairs).map(move |(&segment, pair)| (segment, pair, side(pair)))
        });
        for (owner, (segment, pair, side)) in (0..).zip(placed) {
            let start = batch.rows(segment).start;
            rows.extend(side.counted.iter().map(|place| start + place - pair.n_shared));
            owners.extend(std::iter::repeat_n(owner, side.counted.len()));
        }
        Self { batch, rows, owners, n_pairs: pairs.len() }
    }

    /// Log-probabilities of the sides, differentiable in `hidden`.
    pub(crate) fn logprobs(
        &self,
        decoder: &Decoder,
        hidden: &Tensor,
    ) -> Result<SideLogProbs, arete_model::Error> {
        let found = logprobs::of_rows(decoder, hidden, &self.batch, &self.rows, 1.0, true)?;
        let device = hidden.device();
        let owners = Tensor::from_slice(&self.owners).to_device(device);
        let zeros = Tensor::zeros([2 * self.n_pairs as i64], (Kind::Double, device));
        let sums = zeros.index_add(0, &owners, &found.logprob.to_kind(Kind::Double)); // [2n]
        Ok(SideLogProbs { sums, entropy: found.entropy.sum(Kind::Double) })
    }

    /// `[2n]` as `[chosen, rejected]` of each pair.
    pub(crate) fn read(&self, sides: &Tensor) -> Result<Vec<[f64; 2]>, arete_training::Error> {
        let sides = Vec::<f64>::try_from(sides.to_device(tch::Device::Cpu))?;
        let (chosen, rejected) = sides.split_at(self.n_pairs);
        Ok(chosen.iter().zip(rejected).map(|(&chosen, &rejected)| [chosen, rejected]).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_follow_the_packing() {
        let side = |ids: &[i64], counted: &[usize]| Sequence {
            token_ids: ids.to_vec(),
            counted: counted.to_vec(),
            n_own_tokens: 1,
        };
        let tree = Pair::new(side(&[1, 2, 3, 4], &[2, 3]), side(&[1, 2, 9], &[2]), 1.0, 0);
        let apart = Pair::new(side(&[5, 6], &[1]), side(&[7, 8, 8], &[2]), 1.0, 0);
        let packed = PackedPairs::new(&[&tree, &apart]);
        let found: Vec<(i64, i64)> = (packed.rows.iter())
            .map(|&row| packed.batch.token_ids()[row])
            .zip(packed.owners.iter().copied())
            .collect();
        assert_eq!(found, [(3, 0), (4, 0), (6, 1), (9, 2), (8, 3)]);
        assert_eq!(packed.batch.n_tokens(), 2 + 2 + 1 + 2 + 3);
    }
}
