//! Labelled pairs as preferences: mixed in with judged ones, or alone (`arete-curation labelled`), an aspect or a virtue each.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail};
use arete_chain::Turns;
use arete_chain::constitution::listed;
use arete_chain::pairs::{self, LabelledPair};
use arete_records::left_out::{self, LeftOut};
use arete_records::rows::PreferenceRow;
use arete_records::table::Column;
use arete_records::{Aspect, Message, Refusal, Split, prompt_id, split_of};
use arete_stage::run::StageSpec;
use serde::{Deserialize, Serialize};
use serde_json::{Map, json};
use sha2::{Digest, Sha256};

use super::sets::Set;
use super::{By, PreferencesConfig, write_splits};
use crate::prompts;
use crate::stage::{self, Place};

/// The stage's name: its results are read as those of `preferences` are.
pub const STAGE: &str = super::STAGE;

/// Settings of `labelled`.
#[derive(Debug, Clone, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct LabelledConfig {
    /// What the pairs are sorted by: a directory, and with it a reward model, each
    #[arg(long, value_enum, default_value = "aspect")]
    pub by: By,
    /// Aspect of pairs that name none [default: the answer]
    #[arg(long, value_name = "ASPECT")]
    #[serde(default)]
    pub pairs_aspect: Option<String>,
    /// Fewest pairs that each of them must have
    #[arg(long, default_value_t = 20, value_name = "N")]
    pub min_pairs: usize,
    /// A column under another name than ours, as prompt=question; may be given more than once
    #[arg(long = "column", value_name = "OURS=THEIRS")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<Vec<Column>>,
}

/// Writes labelled pairs as `<aspect>/<split>.parquet`, or `<virtue>/<split>.parquet`.
///
/// # Errors
///
/// Unreadable inputs, pairs without a virtue where they are sorted by it, too few pairs, a full disk.
pub fn run(config: &LabelledConfig, files: &[PathBuf], output: &Path) -> Result<()> {
    let started = Instant::now();
    let columns = config.column.as_deref().unwrap_or_default();
    let aspect = config.pairs_aspect.as_deref();
    let (rows, mut left_out) = read(files, columns, aspect, &Turns::default())?;
    let spec = StageSpec {
        stage: STAGE,
        output,
        config: serde_json::to_value(config).expect("configurations always serialise"),
        seed: 0,
        inputs: inputs(files),
    };
    let Some(run) = stage::begin(spec)? else { return Ok(()) };
    let mut sorted: BTreeMap<&str, Vec<(Split, PreferenceRow)>> = BTreeMap::new();
    let (mut n_without, mut counts) = (0, Map::new());
    for row in &rows {
        let aspect = config.by.has_aspects().then(|| row.aspect.name());
        let virtue = row.pair.about.map(|about| about.virtue.name());
        if config.by.has_virtues() && virtue.is_none() {
            n_without += 1;
            left_out.push(pairs::of_row(row.file, row.pair.row, "names no virtue"));
        }
        for name in aspect.into_iter().chain(virtue.filter(|_| config.by.has_virtues())) {
            sorted.entry(name).or_default().push((row.split, row.row()));
        }
    }
    if n_without > 0 {
        tracing::warn!(n_without, "pairs left out: they name no virtue");
    }
    left_out::write(run.output(), &left_out)?;
    for (name, pairs) in &sorted {
        let n_train = pairs.iter().filter(|(split, _)| *split == Split::Train).count();
        if n_train < config.min_pairs {
            bail!(too_few(files, format!("{n_train} of {name}"), config.min_pairs));
        }
        write_splits(output, name, pairs)?;
        tracing::info!(name, pairs = pairs.len(), train = n_train, "labelled pairs");
        counts.insert((*name).to_owned(), json!({"pairs": pairs.len(), "train": n_train}));
    }
    if sorted.is_empty() {
        bail!(too_few(files, format!("none ({n_without} name no virtue)"), config.min_pairs));
    }
    counts.insert("without_virtue".to_owned(), n_without.into());
    stage::finish(run, STAGE, Place::none(), counts, started)
}

fn too_few(files: &[PathBuf], found: String, min_pairs: usize) -> Refusal {
    Refusal::file(
        files.first().cloned().unwrap_or_default(),
        "pairs",
        format!("at least {min_pairs} to train on (min_pairs)"),
        found,
    )
}

/// The files among a stage's inputs.
pub(super) fn inputs(files: &[PathBuf]) -> Vec<(String, PathBuf)> {
    (files.iter().enumerate()).map(|(idx, path)| (format!("pairs_{idx}"), path.clone())).collect()
}

/// A labelled pair, and where it belongs.
#[derive(Debug)]
struct Row<'a> {
    file: &'a Path,
    pair: LabelledPair,
    aspect: Aspect,
    split: Split,
    question: Vec<Message>,
    sides: [Vec<Message>; 2],
}

impl Row<'_> {
    fn row(&self) -> PreferenceRow {
        let [chosen, rejected] = self.sides.clone();
        PreferenceRow {
            prompt_id: prompt_id(&self.question),
            prompt: self.question.clone(),
            chosen,
            rejected,
            // One vote, the label's.
            score_chosen: 1,
            score_rejected: 0,
            chosen_prob: self.pair.chosen_prob,
            truncated_chosen: self.pair.chosen.truncated,
            truncated_rejected: self.pair.rejected.truncated,
        }
    }
}

/// Reads labelled pairs that have a question and two replies, repeated ones once; and what is left out of them.
fn read<'a>(
    files: &'a [PathBuf],
    columns: &[Column],
    aspect: Option<&str>,
    turns: &Turns,
) -> Result<(Vec<Row<'a>>, Vec<LeftOut>)> {
    let default = match aspect {
        None => turns.answer(),
        Some(name) => {
            let known = turns.names().into_iter().find(|aspect| aspect.name() == name);
            known.ok_or_else(|| {
                Refusal::setting("pairs_aspect", format!("one of {}", listed(&turns.names())), name)
            })?
        }
    };
    let (mut rows, mut seen) = (Vec::<Row<'_>>::new(), HashSet::new());
    let mut left_out = Vec::new();
    // A file that is named as another split than train is held out, unless none would be left.
    let held_out = |path: &Path| prompts::held_out(&[], path);
    let are_all_held_out = files.iter().all(|path| held_out(path).is_some());
    for path in files {
        let of_file = held_out(path).filter(|_| !are_all_held_out);
        let (n_left_out, n_before) = (left_out.len(), rows.len());
        let (pairs, unusable) = pairs::read_pairs(path, columns)?;
        left_out.extend(unusable);
        for pair in pairs {
            let [better, worse] =
                [&pair.chosen, &pair.rejected].map(|side| prompts::tidied(side.messages.clone()));
            let Some((question, chosen, rejected)) = pairs::part(&better, &worse) else {
                let reason = match better == worse {
                    true => "its sides are the same",
                    false => "its sides do not part after a question",
                };
                left_out.push(pairs::of_row(path, pair.row, reason));
                continue;
            };
            if !seen.insert((better, worse)) {
                left_out.push(pairs::of_row(path, pair.row, "the same pair as one before"));
                continue;
            }
            let split = pair.split.or(of_file).unwrap_or_else(|| split_of(&question));
            let aspect = pair.about.map_or(default, |about| about.aspect);
            rows.push(Row { file: path, pair, aspect, split, question, sides: [chosen, rejected] });
        }
        tracing::info!(
            path = %path.display(),
            used = rows.len() - n_before,
            left_out = left_out.len() - n_left_out,
            "labelled pairs"
        );
    }
    Ok((rows, left_out))
}

/// Labelled pairs to mix in with judged ones.
pub(super) struct Mixture<'a>(Vec<Row<'a>>);

impl<'a> Mixture<'a> {
    /// Reads those of split `train`: what is held out examines the judge.
    pub(super) fn read(config: &'a PreferencesConfig, turns: &Turns) -> Result<Self> {
        let weight = config.pairs_weight;
        if !(weight.is_finite() && weight > 0.0) {
            bail!(Refusal::setting("pairs_weight", "a positive number", weight));
        }
        let (mut rows, _) = read(&config.pairs, &[], config.pairs_aspect.as_deref(), turns)?;
        rows.retain(|row| row.split == Split::Train);
        // In the order of a hash, so that a part of them is a fair one.
        rows.sort_by_cached_key(|row| {
            let mut hash = Sha256::new();
            hash.update(config.judge.seed.to_le_bytes());
            for message in row.question.iter().chain(row.sides.iter().flatten()) {
                hash.update((message.content.len() as u64).to_le_bytes());
                hash.update(&message.content);
            }
            <[u8; 32]>::from(hash.finalize())
        });
        Ok(Self(rows))
    }

    /// Those of a set, as many as the weight allows beside `n_judged` judged pairs.
    pub(super) fn of(
        &self,
        set: &Set,
        n_judged: usize,
        config: &PreferencesConfig,
    ) -> Vec<(Split, PreferenceRow)> {
        let most = pairs::beside(n_judged, config.pairs_weight);
        let is_own = |row: &&Row<'_>| {
            let virtue = row.pair.about.map(|about| about.virtue);
            row.aspect == set.aspect && (set.virtue.is_none() || set.virtue == virtue)
        };
        let own = self.0.iter().filter(is_own).take(most);
        own.map(|row| (row.split, row.row())).collect()
    }
}

#[cfg(test)]
mod tests {
    use arete_records::{Virtue, parquet};
    use clap::{Args, FromArgMatches};

    use super::*;

    fn virtue_pairs() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/virtues/pairs.jsonl")
    }

    fn labelled(by: By, min_pairs: usize) -> LabelledConfig {
        LabelledConfig { by, pairs_aspect: None, min_pairs, column: None }
    }

    #[test]
    fn virtue_pairs_are_sorted_by_virtue_or_aspect() {
        let dir = tempfile::tempdir().unwrap();
        let files = [virtue_pairs()];
        let n = |output: &Path, name: &str, split: &str| {
            let path = output.join(name).join(format!("{split}.parquet"));
            parquet::read::<PreferenceRow>(path).unwrap().len()
        };
        let output = dir.path().join("by-virtue");
        run(&labelled(By::Virtue, 20), &files, &output).unwrap();
        // The table of data/virtues/README.md.
        assert_eq!(n(&output, "honesty", "train"), 277);
        assert_eq!((n(&output, "respect", "validation"), n(&output, "respect", "test")), (51, 30));
        let output = dir.path().join("by-aspect");
        run(&labelled(By::Aspect, 20), &files, &output).unwrap();
        let motivation: usize = ["train", "validation", "test"]
            .map(|split| n(&output, "motivation", split))
            .iter()
            .sum();
        assert_eq!(motivation, 250);
        let rows: Vec<PreferenceRow> =
            parquet::read(output.join("consequence/train.parquet")).unwrap();
        assert_eq!((rows[0].prompt.len(), rows[0].chosen.len()), (5, 1));
        assert_eq!((rows[0].score_chosen, rows[0].chosen_prob), (1, 1.0));
        let output = dir.path().join("by-both");
        run(&labelled(By::Both, 20), &files, &output).unwrap();
        assert_eq!(n(&output, "honesty", "train"), 277);
        assert!(output.join("motivation/train.parquet").is_file());
        let error = run(&labelled(By::Virtue, 300), &files, &dir.path().join("few")).unwrap_err();
        assert!(error.to_string().contains("at least 300 to train on"), "{error}");
    }

    #[test]
    fn pairs_that_name_no_virtue_are_the_answers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs.jsonl");
        let line = |n: usize| json!({"prompt": format!("q{n}"), "chosen": "yes", "rejected": "no"});
        let text: String = (0..60).map(|n| format!("{}\n", line(n))).collect();
        fs_err::write(&path, text).unwrap();
        let files = [path];
        let error = run(&labelled(By::Virtue, 1), &files, &dir.path().join("none")).unwrap_err();
        assert!(error.to_string().contains("60 name no virtue"), "{error}");
        let output = dir.path().join("motivation");
        let config = LabelledConfig {
            pairs_aspect: Some("motivation".to_owned()),
            ..labelled(By::Aspect, 1)
        };
        run(&config, &files, &output).unwrap();
        assert!(output.join("motivation/train.parquet").is_file());
        let config = LabelledConfig { pairs_aspect: Some("end".to_owned()), ..config };
        let error = run(&config, &files, &dir.path().join("other")).unwrap_err().to_string();
        assert!(error.contains("action, motivation, consequence, got end"), "{error}");
    }

    #[test]
    fn as_many_are_mixed_in_as_the_weight_allows() {
        let config = |flags: &[&str]| {
            let command =
                PreferencesConfig::augment_args(clap::Command::new("t").no_binary_name(true));
            PreferencesConfig::from_arg_matches(&command.try_get_matches_from(flags).unwrap())
                .unwrap()
        };
        let file = virtue_pairs();
        let flags = ["--pairs", file.to_str().unwrap(), "--pairs-weight", "0.5"];
        let config_half = config(&flags);
        let mixture = Mixture::read(&config_half, &Turns::default()).unwrap();
        let mixed = mixture.of(&Set::of_aspect(Aspect::ACTION), 40, &config_half);
        assert_eq!(mixed.len(), 20);
        // Of a virtue: only those in which it is what the sides differ by.
        let honest = Set::of_virtue(Virtue::HONESTY, Aspect::ACTION).unwrap();
        let mixed_honest = mixture.of(&honest, 10_000, &config_half);
        let n_all = mixture.of(&Set::of_aspect(Aspect::ACTION), 10_000, &config_half).len();
        assert!((100..n_all / 3).contains(&mixed_honest.len()), "{}", mixed_honest.len());
        assert!(mixed.iter().all(|(split, row)| *split == Split::Train && row.prompt.len() == 1));
        // No more than there are.
        assert!(mixture.of(&Set::of_aspect(Aspect::MOTIVATION), 10_000, &config_half).len() < 250);
        let none = config(&["--pairs-weight", "0"]);
        assert!(
            Mixture::read(&none, &Turns::default())
                .is_err_and(|e| e.to_string().contains("positive"))
        );
        let without = config(&[]);
        let mixture = Mixture::read(&without, &Turns::default()).unwrap();
        assert!(mixture.of(&Set::of_aspect(Aspect::ACTION), 40, &without).is_empty());
    }
}
