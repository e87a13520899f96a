//! The pairs of one reward model: read, mixed with human ones, split, and turned into tokens.

use std::path::Path;

use anyhow::Result;
use arete_chain::constitution::listed;
use arete_chain::pairs;
use arete_model::Chat;
use arete_records::{Refusal, Split, left_out, split_of};
use sha2::{Digest, Sha256};

use super::{Base, Job};
use crate::data::{self, Pairs, Preference, Rendering};
use crate::folds;

/// Pairs of both splits as tokens.
pub(super) struct Data {
    pub(super) train: Pairs,
    pub(super) validation: Pairs,
    /// What the validation pairs are called in reports.
    pub(super) validation_name: &'static str,
    pub(super) test: Pairs,
    /// Both splits as they were read, of a fold.
    pub(super) read: [Vec<Preference>; 2],
}

impl Base<'_> {
    pub(super) fn read(&self, job: &Job, chat: &Chat<'_>) -> Result<Data> {
        let config = self.config;
        let rendering = Rendering {
            max_length: self.max_length,
            over_length: config.over_length,
            label: config.label,
            margin_per_vote: config.margin_per_vote,
        };
        let mut left = Vec::new();
        let (mut train, validation, validation_name) = if job.set.is_some() {
            let mut train = data::read_preferences(&job.train)?;
            // Of few prompts none may be left of this split: the stage before writes no file of it then.
            let validation = if job.validation.is_file() {
                data::read_preferences(&job.validation)?
            } else {
                tracing::warn!(
                    file = %job.validation.display(),
                    "no pairs of the validation split: the reward model is not evaluated"
                );
                Vec::new()
            };
            train.extend(self.mixed(job, train.len())?);
            (train, validation, Split::Validation.name())
        } else {
            let columns = config.column.as_deref().unwrap_or_default();
            let (pairs, left_out) = data::read_pairs(&job.train, columns)?;
            left.extend(left_out);
            // Of a yardstick the folds are what is held out; else the splits are.
            let splits = data::splits_of_pairs(&pairs);
            let (mut train, mut held_out) = (Vec::new(), Vec::new());
            for (pair, split) in pairs.into_iter().zip(splits) {
                let is_train = match job.fold {
                    Some(fold) => !folds::is_in(&pair, fold, config.folds),
                    None => split == Split::Train,
                };
                if is_train { train.push(pair) } else { held_out.push(pair) }
            }
            if config.all_pairs {
                ([train, held_out.clone()].concat(), held_out, "held-out (trained on as well)")
            } else {
                (train, held_out, "held-out")
            }
        };
        if config.shuffle_labels {
            data::shuffle_labels(&mut train, config.seed);
        }
        let mut tokenize = |path: &Path, preferences: &[Preference]| {
            let mut pairs = data::tokenize(path, preferences, chat, &rendering)?;
            left.append(&mut pairs.left_out);
            Ok::<Pairs, anyhow::Error>(pairs)
        };
        let test = match &job.test {
            Some(path) => tokenize(path, &data::read_preferences(path)?)?,
            None => Pairs::default(),
        };
        let train_pairs = tokenize(&job.train, &train)?;
        let validation_pairs = tokenize(&job.validation, &validation)?;
        left_out::write(job.run.output(), &left)?;
        Ok(Data {
            train: train_pairs,
            validation: validation_pairs,
            validation_name,
            test,
            read: if job.fold.is_some() { [train, validation] } else { Default::default() },
        })
    }

    /// Human pairs about what this reward model reads, of questions of the training split: at most so many for each judged pair as
    /// the weight says, in the order of a hash, so that a part of them is a fair one.
    fn mixed(&self, job: &Job, n_judged: usize) -> Result<Vec<Preference>> {
        let (Some(path), Some(set)) = (&job.mixed, &job.set) else { return Ok(Vec::new()) };
        let config = self.config;
        let default = match &config.pairs_aspect {
            None => job.turns.answer(),
            Some(name) => {
                let turns = job.turns.names();
                let known = turns.iter().copied().find(|turn| turn.name() == name);
                let expected = || format!("one of {}", listed(&turns));
                known.ok_or_else(|| Refusal::setting("pairs_aspect", expected(), name))?
            }
        };
        let columns = config.column.as_deref().unwrap_or_default();
        let (mut pairs, _) = data::read_pairs(path, columns)?;
        let is_by_turn = set.is_of_turn(&job.turns);
        if !is_by_turn && pairs.iter().all(|pair| pair.about.is_none()) {
            let expected =
                format!("pairs that name their virtue, to be mixed into those of {}", set.name);
            return Err(Refusal::file(path, "", expected, "none that does").into());
        }
        pairs.retain(|pair| {
            let aspect = pair.about.map_or(default, |about| about.aspect);
            let virtue = pair.about.map(|about| about.virtue.name());
            let is_own = match is_by_turn {
                true => aspect == set.name,
                false => virtue == Some(set.name.name()),
            };
            is_own && split_of(&pair.chosen.messages) == Split::Train
        });
        pairs.sort_by_cached_key(|pair| {
            let mut hash = Sha256::new();
            hash.update(config.seed.to_le_bytes());
            for message in pair.chosen.messages.iter().chain(&pair.rejected.messages) {
                hash.update((message.content.len() as u64).to_le_bytes());
                hash.update(&message.content);
            }
            <[u8; 32]>::from(hash.finalize())
        });
        let most = pairs::beside(n_judged, config.pairs_weight);
        pairs.truncate(most);
        tracing::info!(set = %set.name, judged = n_judged, human = pairs.len(), "pairs mixed");
        Ok(pairs)
    }
}
