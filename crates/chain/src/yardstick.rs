//! The yardstick at work: reward models of human pairs that no training sees, by which runs of all recipes are measured.
//!
//! It is cross-fitted: `make yardstick` trains K reward models, each on the pairs of all folds but its own, folds by a hash of
//! the opening question. A prompt is scored by the fold that never saw its question. One definition everywhere: **the
//! answer turn only**, in standard deviations of the fold's held-out human replies. Beside each fold lies a
//! [bag of words](crate::words) of the same pairs, the second judge.
//!
//! A single reward model can stand in (one of the hub, say); it is marked as not cross-fitted, since nothing says that it
//! has not seen the prompts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use arete_model::{Error, Model, Nf4Options, Source, adapter};
use arete_records::stats::Interval;
use arete_records::{FinishReason, ScoreStats, atomic, files, fold_of, score_stats};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::reading::{self, Transcript};
use crate::reward_model::{Base, RewardModel, adapter_dir, read_stats, standardise};
use crate::rulers::{NullRulers, Ruled, share};
use crate::trim::last_sentence;
use crate::words::{self, BagOfWords};

/// Name of the file that makes a directory a cross-fitted yardstick.
pub const CARD: &str = "yardstick.json";
/// peft's configuration in an adapter's directory.
const ADAPTER_CONFIG: &str = "adapter_config.json";
/// Largest configuration that is read, in bytes.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// The directory of a fold.
#[must_use]
pub fn fold_dir(dir: &Path, fold: usize) -> PathBuf {
    dir.join(format!("fold-{fold}"))
}

/// How often a judge tells the better side of pairs, with what knows nothing beside it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Number of pairs.
    pub n: usize,
    /// Part of them whose better side scores higher (a tie is no win), with Wilson's 95 % interval.
    pub accuracy: Interval,
    /// The null rulers on the same pairs.
    pub null_rulers: NullRulers,
}

impl Measured {
    /// From scores (better, worse) of pairs; none without pairs.
    #[must_use]
    pub fn of(pairs: &[Ruled], scores: &[[f64; 2]]) -> Option<Self> {
        let wins: Vec<f64> =
            scores.iter().map(|[better, worse]| f64::from(u8::from(better > worse))).collect();
        let null_rulers = NullRulers::beside(pairs, &wins)?;
        Some(Self { n: pairs.len(), accuracy: share(&wins), null_rulers })
    }
}

/// What the card says of one judge.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JudgeCard {
    /// On every pair, each scored by the fold that did not train on it.
    pub cross_fitted: Measured,
    /// On those pairs whose sides are about equally long; none if there are none.
    pub length_matched: Option<Measured>,
}

impl JudgeCard {
    /// From held-out scores (better, worse) of pairs; none without pairs.
    #[must_use]
    pub fn of(pairs: &[Ruled], scores: &[[f64; 2]]) -> Option<Self> {
        let matched = pairs.iter().zip(scores).filter(|(pair, _)| pair.is_length_matched());
        let (some, some_scores): (Vec<Ruled>, Vec<[f64; 2]>) =
            matched.map(|(pair, scores)| (pair.clone(), *scores)).unzip();
        Some(Self {
            cross_fitted: Measured::of(pairs, scores)?,
            length_matched: Measured::of(&some, &some_scores),
        })
    }
}

/// A fold, as the card names it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FoldCard {
    /// Pairs trained on.
    pub n_train: usize,
    /// Pairs of its own questions, held out.
    pub n_held_out: usize,
    /// Fingerprint of its training.
    pub fingerprint: String,
}

/// The contents of `yardstick.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Card {
    /// In order of their number.
    pub folds: Vec<FoldCard>,
    /// Pairs scored, each by the fold that did not train on it.
    pub n_pairs: usize,
    /// Whether labels were drawn by a coin: a control.
    pub shuffled_labels: bool,
    /// The reward models.
    pub reward_model: JudgeCard,
    /// The bag of words and length.
    pub bag_of_words: JudgeCard,
}

impl Card {
    /// Reads the card of a directory; none if it has none.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if it is damaged, [`Error::Io`].
    pub fn read(dir: &Path) -> Result<Option<Self>, Error> {
        let path = dir.join(CARD);
        if !path.is_file() {
            return Ok(None);
        }
        let bytes = files::read_small(&path)?;
        let card: Self = serde_json::from_slice(&bytes)
            .map_err(|error| field(&path, "JSON", "what `make yardstick` writes", &error))?;
        if card.folds.len() < 2 {
            let found = card.folds.len().to_string();
            return Err(field(&path, "folds", "two or more", &found));
        }
        Ok(Some(card))
    }

    /// Writes the card.
    ///
    /// # Errors
    ///
    /// [`Error::Records`] if the disk refuses.
    pub fn write(&self, dir: &Path) -> Result<(), Error> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("words and numbers serialise");
        bytes.push(b'\n');
        Ok(atomic::write(dir.join(CARD), &bytes)?)
    }

    /// The card as a table in Markdown.
    #[must_use]
    pub fn markdown(&self) -> String {
        let judges = [("reward models", &self.reward_model), ("bag of words", &self.bag_of_words)];
        let mut out = format!(
            "{} folds by opening question, {} pairs, each scored by the fold that did not train on it{}.\n\n\
             | judge | pairs | n | accuracy, 95 % interval | best null ruler | lead, points |\n|---|---|---|---|---|---|\n",
            self.folds.len(),
            self.n_pairs,
            if self.shuffled_labels { "; labels by coin toss: a control" } else { "" },
        );
        for (name, judge) in judges {
            let rows = [
                ("all", Some(&judge.cross_fitted)),
                ("length-matched", judge.length_matched.as_ref()),
            ];
            for (pairs, measured) in rows {
                let Some(Measured { n, accuracy, null_rulers }) = measured else { continue };
                let best = format!(
                    "{} {:.1} %",
                    null_rulers.best.name(),
                    100.0 * null_rulers.best_accuracy()
                );
                let lead = null_rulers.lead.map_or("–".to_owned(), |lead| points(&lead));
                let accuracy = format!(
                    "{:.1} % [{:.1}, {:.1}]",
                    100.0 * accuracy.estimate,
                    100.0 * accuracy.low,
                    100.0 * accuracy.high
                );
                out += &format!("| {name} | {pairs} | {n} | {accuracy} | {best} | {lead} |\n");
            }
        }
        out += "\n| null ruler | right, % |\n|---|---|\n";
        for (ruler, accuracy) in &self.reward_model.cross_fitted.null_rulers.accuracy {
            out += &format!("| {} | {:.1} |\n", ruler.name(), 100.0 * accuracy.estimate);
        }
        out
    }
}

fn points(lead: &Interval) -> String {
    let [estimate, low, high] = [lead.estimate, lead.low, lead.high]
        .map(|value| format!("{:+.1}", 100.0 * value).replace('-', "−"));
    format!("{estimate} [{low}, {high}]")
}

/// Where a yardstick lies, resolved; nothing is loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The merged model, or the base of the adapters.
    pub source: Source,
    /// How the base is held: as in the adapters' training, whatever the recipe does with its own models, so that every recipe
    /// is measured by the same numbers.
    pub nf4: Option<Nf4Options>,
    /// One directory a fold; a single one where it is not cross-fitted.
    folds: Vec<PathBuf>,
    /// Whether it is a merged model rather than adapters.
    is_merged: bool,
}

impl Place {
    /// The yardstick in `dir`: with folds, a reward model's directory (or its adapter), or a merged model. `base`: of the adapters,
    /// if it is not the one that they name.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if a fold is missing or an adapter names no base, and what is wrong with that base or the adapter's
    /// files.
    pub fn resolve(dir: &Path, base: Option<&str>) -> Result<Self, Error> {
        if dir.join("config.json").is_file() {
            let (source, folds) = (Source::Directory(dir.to_owned()), vec![dir.to_owned()]);
            return Ok(Self { source, nf4: None, folds, is_merged: true });
        }
        let folds = folds(dir)?;
        let adapter = adapter_dir(&folds[0]);
        let named = match base {
            Some(base) => Ok(base.to_owned()),
            None => base_of_adapter(&adapter),
        };
        let source = named.and_then(|named| Source::fetch(&named));
        let merged = dir.join("merged");
        let source = match source {
            // The base may lie elsewhere by now; then a single reward model's merged form stands for it.
            Err(_) if folds.len() == 1 && merged.is_dir() => {
                let source = Source::Directory(merged);
                return Ok(Self { source, nf4: None, folds, is_merged: true });
            }
            other => other?,
        };
        let nf4 = adapter::packing(&adapter)?;
        Ok(Self { source, nf4, folds, is_merged: false })
    }

    /// The same over a model that is loaded already, if the adapters were trained over it; none if they were not.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if the card is damaged.
    pub fn on(dir: &Path, source: &Source, model: &Model) -> Result<Option<Self>, Error> {
        let folds = folds(dir)?;
        let adapter = adapter_dir(&folds[0]);
        let meta = adapter.join(reading::ADAPTER_META);
        if !meta.is_file() {
            return Ok(None);
        }
        let meta: Value = serde_json::from_slice(&files::read_small(&meta)?).map_err(|error| {
            field(&meta, "JSON", "what an adapter remembers of its base", &error)
        })?;
        let packed = adapter::packing(&adapter)?.map(|nf4| nf4.double_quantize);
        let is_own = meta.get("base_sha256").and_then(Value::as_str)
            == Some(model.base_sha256.as_str())
            && packed == model.decoder.quantization().map(|nf4| nf4.double_quantize);
        let place = Self { source: source.clone(), nf4: None, folds, is_merged: false };
        Ok(is_own.then_some(place))
    }

    /// Whether every prompt is scored by a fold that never saw its question.
    #[must_use]
    pub fn is_cross_fitted(&self) -> bool {
        self.folds.len() > 1
    }
}

/// One directory a fold; of a single reward model, its own.
fn folds(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    Ok(match Card::read(dir)? {
        Some(card) => (0..card.folds.len()).map(|fold| fold_dir(dir, fold)).collect(),
        None => vec![dir.to_owned()],
    })
}

/// The files of the yardstick in `dir`, its base's apart, for hashing, by name.
///
/// # Errors
///
/// [`Error::Field`] if the card is damaged.
pub fn files(dir: &Path) -> Result<Vec<(String, PathBuf)>, Error> {
    if dir.join("config.json").is_file() {
        return Ok(vec![("yardstick".to_owned(), dir.to_owned())]);
    }
    let folds = folds(dir)?;
    let mut out = Vec::new();
    if folds.len() > 1 {
        out.push(("yardstick card".to_owned(), dir.join(CARD)));
    }
    for (fold, own) in folds.iter().enumerate() {
        let number = if folds.len() > 1 { format!(" {fold}") } else { String::new() };
        let adapter = adapter_dir(own);
        out.push((format!("yardstick{number}"), adapter.clone()));
        // An adapter by itself has its rule and its statistics beside its directory.
        for (part, file) in
            [("reading", reading::FILE), ("stats", score_stats::FILE), ("words", words::FILE)]
        {
            let places = [own.join(file), adapter.join("..").join(file)];
            let found = places.into_iter().find(|path| path.is_file());
            out.extend(found.map(|path| (format!("yardstick{number} {part}"), path)));
        }
        let merged = own.join("merged");
        out.extend(merged.is_dir().then(|| (format!("yardstick{number} merged"), merged)));
    }
    Ok(out)
}

/// One reward model of it.
#[derive(Debug)]
struct Fold {
    reward: RewardModel,
    stats: Option<ScoreStats>,
    words: Option<BagOfWords>,
}

/// A loaded yardstick; it reads with the model it was loaded over.
#[derive(Debug)]
pub struct Yardstick {
    folds: Vec<Fold>,
}

impl Yardstick {
    /// Over `model`, which is the loaded [`Place::source`] (or the one that [`Place::on`] was given).
    ///
    /// # Errors
    ///
    /// As [`RewardModel::over`], [`RewardModel::merged`], [`read_stats`] and [`BagOfWords::read`].
    pub fn over(place: &Place, model: &Model) -> Result<Self, Error> {
        let mut folds = Vec::new();
        for dir in &place.folds {
            let reward = match place.is_merged {
                true => {
                    let path = place.source.local_path().unwrap_or(dir);
                    RewardModel::merged(model, path)?
                }
                false => RewardModel::over(dir, "yardstick", model)?,
            };
            let words = if place.is_cross_fitted() { BagOfWords::read(dir)? } else { None };
            folds.push(Fold { reward, stats: read_stats(dir, None)?, words });
        }
        Ok(Self { folds })
    }

    /// The score of each conversation through its answer, by the fold that never saw its question, in standard deviations of
    /// that fold's held-out replies; of a reward model without statistics, raw.
    ///
    /// # Errors
    ///
    /// As [`RewardModel::scores`].
    pub fn scores(
        &self,
        base: Base<'_>,
        transcripts: &[Transcript<'_>],
    ) -> Result<Vec<f64>, Error> {
        let mut by_fold: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (at, transcript) in transcripts.iter().enumerate() {
            by_fold.entry(self.fold(transcript)).or_default().push(at);
        }
        let mut out = vec![0.0; transcripts.len()];
        for (fold, places) in by_fold {
            let Fold { reward, stats, .. } = &self.folds[fold];
            let own: Vec<Transcript<'_>> =
                places.iter().map(|&at| transcripts[at].clone()).collect();
            let (scores, _) = reward.scores(base, &own)?;
            for (at, score) in places.into_iter().zip(scores) {
                out[at] = stats.as_ref().map_or(score, |stats| standardise(score, stats));
            }
        }
        Ok(out)
    }

    /// The bag of words' score of each conversation's last reply, by the fold that never saw its question; none where it is not
    /// cross-fitted. A cut reply is read to its last full sentence.
    #[must_use]
    pub fn word_scores(&self, transcripts: &[Transcript<'_>]) -> Option<Vec<f64>> {
        transcripts
            .iter()
            .map(|transcript| {
                let judge = self.folds[self.fold(transcript)].words.as_ref()?;
                let reply = transcript.messages.last().map_or("", |last| last.content.trim());
                let is_cut = transcript.finish_reasons.last() == Some(&FinishReason::Length);
                let read = if is_cut { last_sentence(reply).unwrap_or(reply) } else { reply };
                Some(judge.score(read))
            })
            .collect()
    }

    fn fold(&self, transcript: &Transcript<'_>) -> usize {
        match self.folds.len() {
            1 => 0,
            n_folds => fold_of(transcript.messages, n_folds),
        }
    }
}

/// The model that an adapter names as its base.
///
/// # Errors
///
/// [`Error::Io`], [`Error::Field`] if the adapter's configuration is missing or says nothing.
pub fn base_of_adapter(adapter: &Path) -> Result<String, Error> {
    let path = adapter.join(ADAPTER_CONFIG);
    let expected = "peft's configuration with base_model_name_or_path";
    let config: Value = serde_json::from_slice(&files::read_capped(&path, MAX_CONFIG_BYTES)?)
        .map_err(|error| field(&path, "JSON", expected, &error))?;
    match config.get("base_model_name_or_path").and_then(Value::as_str) {
        Some(base) if !base.is_empty() => Ok(base.to_owned()),
        _ => Err(field(&path, "base_model_name_or_path", expected, &"nothing")),
    }
}

fn field(path: &Path, field: &str, expected: &str, found: &impl ToString) -> Error {
    Error::Field {
        path: path.to_owned(),
        field: field.to_owned(),
        expected: expected.to_owned(),
        found: found.to_string(),
    }
}
