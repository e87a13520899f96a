//! A reward model at work: how it is loaded, what it reads of a conversation, and what its scores mean.
//!
//! It is an adapter with a scalar head over a base that others use too, or a merged `…ForSequenceClassification` model.
//! Every stage that scores does it here.

use std::path::{Path, PathBuf};

use arete_model::{
    Adapter, Chat, Decoder, Device, Error, Kind, LoadOptions, Model, ScalarHead, Source, Tensor,
    adapter,
};
use arete_records::{ScoreStats, score_stats};

use crate::batches::{Forest, micro_batches};
use crate::reading::{Reading, Transcript};

/// A spread below this is none: scores are f32 numbers of order 1.
pub const MIN_STD: f64 = 1e-6;

/// What a reward model reads with: the model under it, that model's chat template, and how much at once.
#[derive(Clone, Copy, Debug)]
pub struct Base<'a> {
    /// The base, or the merged reward model.
    pub model: &'a Model,
    /// Its chat template.
    pub chat: &'a Chat<'a>,
    /// Most tokens in one forward pass; changes scores by rounding at most.
    pub micro_batch_tokens: usize,
}

/// What scores conversations.
#[derive(Debug)]
pub struct RewardModel {
    adapter: Option<Adapter>,
    head: ScalarHead,
    reading: Reading,
}

impl RewardModel {
    /// The reward model in `dir` (with `adapter/` in it, or an adapter itself) over `base`.
    ///
    /// # Errors
    ///
    /// What is wrong with its files; [`Error::Invalid`] if it was trained on another base, [`Error::Field`] if it has no head, and as [`Reading::of`].
    pub fn over(dir: &Path, name: &str, base: &Model) -> Result<Self, Error> {
        let dir = adapter_dir(dir);
        let loaded = adapter::load(&dir, name, &base.config, base.decoder.device())?;
        loaded.meta.check_base(base)?;
        if loaded.meta.base_sha256.is_empty() {
            tracing::warn!(
                path = %dir.display(),
                trained_on = loaded.meta.base_model,
                "the adapter does not say what its base's weights were: nothing checks that they are this model's"
            );
        }
        let expected = "an adapter with a score head (modules_to_save)";
        let head = loaded.head.ok_or_else(|| not_a_reward(&dir, "head", expected, "none"))?;
        Ok(Self::of(Some(loaded.adapter), head, Reading::of(&dir, base)?))
    }

    /// The merged reward model that `model` is; `path` is where it came from.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if it has no head, and as [`Reading::of`].
    pub fn merged(model: &Model, path: &Path) -> Result<Self, Error> {
        let expected = "a …ForSequenceClassification model (or --adapter)";
        let head = model.head.as_ref();
        let head = head.ok_or_else(|| not_a_reward(path, "score.weight", expected, "none"))?;
        let head = ScalarHead { weight: head.weight.shallow_clone() };
        Ok(Self::of(None, head, Reading::of(path, model)?))
    }

    /// A reward model with the model that it reads with: `source` merged, or as the base of the adapter in `adapter_dir`.
    ///
    /// # Errors
    ///
    /// As [`RewardModel::over`], [`RewardModel::merged`] and [`Model::load`].
    pub fn load(
        source: &Source,
        adapter_dir: Option<&Path>,
        options: &LoadOptions,
    ) -> Result<(Model, Self), Error> {
        let model = Model::load(source, options)?;
        let reward = match adapter_dir {
            Some(dir) => Self::over(dir, "reward", &model)?,
            None => {
                let path = source.local_path().map(Path::to_owned);
                Self::merged(&model, &path.unwrap_or_else(|| source.to_string().into()))?
            }
        };
        Ok((model, reward))
    }

    /// One in memory.
    #[must_use]
    pub fn of(adapter: Option<Adapter>, head: ScalarHead, reading: Reading) -> Self {
        Self { adapter, head, reading }
    }

    /// What it reads of a conversation.
    ///
    /// # Errors
    ///
    /// What the template or the tokenizer refuse.
    pub fn token_ids(
        &self,
        base: Base<'_>,
        transcript: &Transcript<'_>,
    ) -> Result<Vec<i64>, Error> {
        self.reading.token_ids(base.chat, transcript, base.model.config.max_position_embeddings)
    }

    /// The score of each conversation, and the tokens read in all. What else is scored beside it changes nothing but
    /// rounding.
    ///
    /// # Errors
    ///
    /// As [`RewardModel::token_ids`] and [`sequence_scores`].
    pub fn scores(
        &self,
        base: Base<'_>,
        transcripts: &[Transcript<'_>],
    ) -> Result<(Vec<f64>, usize), Error> {
        let read = |transcript| self.token_ids(base, transcript);
        let sequences: Vec<Vec<i64>> = transcripts.iter().map(read).collect::<Result<_, _>>()?;
        let scores = self.sequence_scores(base.model, &sequences, base.micro_batch_tokens)?;
        Ok((scores, sequences.iter().map(Vec::len).sum()))
    }

    /// The score of each token sequence, read with `model`.
    ///
    /// # Errors
    ///
    /// As [`sequence_scores`].
    pub fn sequence_scores<S: AsRef<[i64]>>(
        &self,
        model: &Model,
        sequences: &[S],
        micro_batch_tokens: usize,
    ) -> Result<Vec<f64>, Error> {
        let adapter = self.adapter.as_ref();
        sequence_scores(&model.decoder, adapter, &self.head, sequences, micro_batch_tokens)
    }
}

/// The adapter's directory inside a reward model's directory (or that directory itself).
#[must_use]
pub fn adapter_dir(dir: &Path) -> PathBuf {
    let inner = dir.join("adapter");
    if inner.is_dir() { inner } else { dir.to_owned() }
}

/// The score of each token sequence, read at its last token.
///
/// # Errors
///
/// [`Error::Invalid`] if a sequence is longer than the model's positions or the budget is 0, [`Error::Torch`] if memory runs
/// out, [`Error::NonFinite`].
pub fn sequence_scores<S: AsRef<[i64]>>(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    head: &ScalarHead,
    sequences: &[S],
    micro_batch_tokens: usize,
) -> Result<Vec<f64>, Error> {
    let _guard = arete_model::no_grad_guard();
    let lengths: Vec<usize> = sequences.iter().map(|sequence| sequence.as_ref().len()).collect();
    let mut out = Vec::with_capacity(sequences.len());
    for run in micro_batches(&lengths, micro_batch_tokens)? {
        let forest = Forest::new(&sequences[run]);
        let hidden = decoder.forward(&forest.batch, adapter)?; // [N, D]
        let rows = Tensor::from_slice(&forest.last_rows()).to_device(hidden.device());
        let scores = head.forward(&hidden.index_select(0, &rows)); // [n]
        decoder.check_finite("scores", &scores)?;
        out.extend(Vec::<f64>::try_from(scores.to_kind(Kind::Double).to_device(Device::Cpu))?);
    }
    Ok(out)
}

/// Score statistics in `dir` that a score can be standardised with; none if there is no such file.
///
/// # Errors
///
/// [`Error::Field`] if they have no spread or were taken over another base than the given one; [`Error::Records`] if the
/// file is damaged.
pub fn read_stats(dir: &Path, base: Option<&Model>) -> Result<Option<ScoreStats>, Error> {
    let Some(stats) = ScoreStats::read(dir)? else { return Ok(None) };
    let path = dir.join(score_stats::FILE);
    if stats.std < MIN_STD {
        let got = stats.std.to_string();
        return Err(not_a_reward(&path, "std", "a standard deviation above 0", &got));
    }
    if let Some(base) = base
        && !base.is_base(&stats.base_sha256)?
    {
        let expected = "statistics of this base";
        return Err(not_a_reward(&path, "base_sha256", expected, &stats.base_sha256));
    }
    Ok(Some(stats))
}

/// Scores as standard deviations from the mean.
#[must_use]
pub fn standardise(score: f64, stats: &ScoreStats) -> f64 {
    (score - stats.mean) / stats.std
}

fn not_a_reward(path: &Path, field: &str, expected: &str, found: &str) -> Error {
    Error::Field {
        path: path.to_owned(),
        field: field.to_owned(),
        expected: expected.to_owned(),
        found: found.to_owned(),
    }
}
