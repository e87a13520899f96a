//! A reward model in memory, and the scores it gives.

use std::path::Path;

use arete_model::adapter_files;
use arete_model::{
    Adapter, Batch, BatchBuilder, Decoder, LoadOptions, Model, ScalarHead, SegmentIdx, Source,
};
use arete_training::order;
use tch::Tensor;

use crate::Error;
use crate::data::Pair;

/// A base with an adapter and head, or a merged model with its head.
#[derive(Debug)]
pub struct RewardModel {
    /// The base, or the merged model.
    pub model: Model,
    /// None if it is merged.
    pub adapter: Option<Adapter>,
    /// What reads the score.
    pub head: ScalarHead,
}

impl RewardModel {
    /// Loads a reward model: `source` merged, or as the base of the adapter in `adapter_dir`.
    ///
    /// # Errors
    ///
    /// [`Error::NotAReward`] if there is no head; [`Error::Model`] if a file is unusable or the adapter was trained on
    /// another base.
    pub fn load(
        source: &Source,
        adapter_dir: Option<&Path>,
        options: &LoadOptions,
    ) -> Result<Self, Error> {
        let mut model = Model::load(source, options)?;
        if let Some(dir) = adapter_dir {
            let loaded = adapter_files::load(dir, "reward", &model.config, options.device)?;
            loaded.meta.check_base(&model)?;
            let head = loaded.head.ok_or_else(|| Error::NotAReward {
                path: dir.to_owned(),
                expected: "an adapter with a score head (modules_to_save)",
                got: "an adapter without".to_owned(),
            })?;
            return Ok(Self { model, adapter: Some(loaded.adapter), head });
        }
        let head = model.head.take().ok_or_else(|| Error::NotAReward {
            path: source.to_string().into(),
            expected: "a …ForSequenceClassification model, or --adapter",
            got: "a model without score.weight".to_owned(),
        })?;
        Ok(Self { model, adapter: None, head })
    }

    /// The scores of token sequences.
    ///
    /// # Errors
    ///
    /// As [`sequence_scores`].
    pub fn scores<S: AsRef<[i64]>>(
        &self,
        sequences: &[S],
        micro_batch_tokens: usize,
    ) -> Result<Vec<f64>, Error> {
        let decoder = &self.model.decoder;
        let adapter = self.adapter.as_ref();
        Ok(sequence_scores(decoder, adapter, &self.head, sequences, micro_batch_tokens)?)
    }
}

/// The score of each token sequence, read at its last token. Which others are scored with it changes nothing but
/// rounding.
///
/// # Errors
///
/// `Model` if a sequence is longer than the model's positions, `Torch` if memory runs out.
pub fn sequence_scores<S: AsRef<[i64]>>(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    head: &ScalarHead,
    sequences: &[S],
    micro_batch_tokens: usize,
) -> Result<Vec<f64>, arete_training::Error> {
    let _guard = tch::no_grad_guard();
    let lengths: Vec<usize> = sequences.iter().map(|sequence| sequence.as_ref().len()).collect();
    let mut out = Vec::with_capacity(sequences.len());
    for range in order::micro_batches(&lengths, micro_batch_tokens)? {
        let part = &sequences[range];
        let batch = Batch::from_sequences(part);
        let rows = (0..part.len()).map(|idx| batch.last_row(SegmentIdx(idx)));
        let hidden = decoder.forward(&batch, adapter)?;
        out.extend(read_scores(&head.forward(&select_rows(&hidden, rows)))?);
    }
    Ok(out)
}

/// The scores of pairs, chosen and rejected, their common tokens computed once.
///
/// # Errors
///
/// As [`sequence_scores`].
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
    for range in order::micro_batches(&lengths, micro_batch_tokens)? {
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
        let mut builder = Batch::tree();
        let mut segments = [Vec::new(), Vec::new()];
        for pair in pairs {
            let shared = &pair.chosen.token_ids[..pair.n_shared];
            let root = (!shared.is_empty()).then(|| builder.root(shared));
            for (side, out) in [&pair.chosen, &pair.rejected].into_iter().zip(&mut segments) {
                out.push(add(&mut builder, root, &side.token_ids[pair.n_shared..]));
            }
        }
        let batch = builder.build();
        let rows = segments.concat().into_iter().map(|segment| batch.last_row(segment)).collect();
        Self { batch, rows }
    }

    /// `[2n]` f32: the chosen sides' scores, then the rejected ones'.
    pub(crate) fn scores(&self, hidden: &Tensor, head: &ScalarHead) -> Tensor {
        head.forward(&select_rows(hidden, self.rows.iter().copied()))
    }
}

fn add(builder: &mut BatchBuilder, root: Option<SegmentIdx>, own: &[i64]) -> SegmentIdx {
    match root {
        Some(root) => builder.child(root, own),
        None => builder.root(own),
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
