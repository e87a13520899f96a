//! Both sides of pairs through a reward model, what they share computed once.

use arete_chain::batches::micro_batches;
use arete_model::{Adapter, Batch, Decoder, ScalarHead};
use arete_training::pairs::{PairTokens, trees};
use tch::Tensor;

use crate::data::Pair;

/// The scores of pairs, chosen and rejected, their common tokens computed once.
///
/// # Errors
///
/// `Model` if a pair is longer than the model's positions, `Torch` if memory runs out.
pub fn pair_scores(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    head: &ScalarHead,
    pairs: &[&Pair],
    micro_batch_tokens: usize,
) -> Result<Vec<[f64; 2]>, arete_training::Error> {
    let _guard = tch::no_grad_guard();
    let lengths: Vec<usize> = pairs.iter().map(|pair| pair.n_tokens()).collect();
    let mut out = Vec::with_capacity(pairs.len());
    for range in micro_batches(&lengths, micro_batch_tokens)? {
        let packed = PackedPairs::new(&pairs[range]);
        let hidden = decoder.forward(&packed.batch, adapter)?;
        let scores = read_scores(&packed.scores(&hidden, head))?;
        let (chosen, rejected) = scores.split_at(scores.len() / 2);
        out.extend(chosen.iter().zip(rejected).map(|(&c, &r)| [c, r]));
    }
    Ok(out)
}

/// Pairs in one forward pass, each a tree: what both sides share, then each side's own tokens.
#[derive(Debug)]
pub(crate) struct PackedPairs {
    /// The tokens.
    pub(crate) batch: Batch,
    /// Last rows of the chosen sides, then those of the rejected.
    rows: Vec<usize>,
}

impl PackedPairs {
    pub(crate) fn new(pairs: &[&Pair]) -> Self {
        let (batch, segments) = trees(pairs.iter().map(|pair| PairTokens {
            chosen: &pair.chosen.token_ids,
            rejected: &pair.rejected.token_ids,
            n_shared: pair.n_shared,
        }));
        let rows = segments.concat().into_iter().map(|segment| batch.last_row(segment)).collect();
        Self { batch, rows }
    }

    /// `[2n]` f32: the chosen sides' scores, then the rejected ones'.
    pub(crate) fn scores(&self, hidden: &Tensor, head: &ScalarHead) -> Tensor {
        head.forward(&select_rows(hidden, self.rows.iter().copied()))
    }
}

fn select_rows(hidden: &Tensor, rows: impl Iterator<Item = usize>) -> Tensor {
    let rows: Vec<i64> = rows.map(|row| row as i64).collect();
    hidden.index_select(0, &Tensor::from_slice(&rows).to_device(hidden.device())) // [n, D]
}

fn read_scores(scores: &Tensor) -> Result<Vec<f64>, arete_training::Error> {
    let scores = scores.to_kind(tch::Kind::Double).to_device(tch::Device::Cpu);
    Ok(Vec::<f64>::try_from(scores)?)
}
