//! The cross-fitted yardstick: what becomes of the folds once each is trained.

use std::path::Path;

use anyhow::{Result, bail};
use arete_chain::Ruled;
use arete_chain::rulers::own_texts;
use arete_chain::words::BagOfWords;
use arete_chain::yardstick::{Card, FoldCard, JudgeCard, fold_dir};
use arete_records::{atomic, fold_of, jsonl};
use arete_stage::run::RunJson;
use arete_training::too_few_pairs;
use serde::{Deserialize, Serialize};

use crate::Config;
use crate::data::{self, Preference};

/// The file of scores of a fold's own pairs, which it did not train on.
pub(crate) const HELD_OUT: &str = "held_out.jsonl";

/// A line of `held_out.jsonl`: what a fold's judges say of a pair that they have not seen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct HeldOut {
    /// Row of the pair in its file, from 1.
    row: usize,
    /// Scores of the reward model, chosen and rejected.
    reward_model: [f64; 2],
    /// Scores of the bag of words, standardised by the fold's held-out texts.
    bag_of_words: [f64; 2],
}

/// Whether a pair belongs to a fold.
pub(crate) fn is_in(pair: &Preference, fold: usize, n_folds: usize) -> bool {
    fold_of(&pair.chosen.messages, n_folds) == fold
}

/// Trains a fold's bag of words and writes it beside the reward model, and both judges' scores of the held-out pairs.
pub(crate) fn write(
    output: &Path,
    train: &[Preference],
    held_out: &[Preference],
    scored: (&[usize], &[[f64; 2]]),
) -> Result<()> {
    let texts = |pair: &Preference| own_texts(&pair.chosen.messages, &pair.rejected.messages);
    let own: Vec<[String; 2]> = held_out.iter().map(texts).collect();
    let words = BagOfWords::train(&train.iter().map(texts).collect::<Vec<_>>())
        .standardised_by(own.iter().flatten().map(String::as_str));
    words.write(output)?;
    let by_row = held_out.iter().map(|pair| pair.row).zip(&own);
    let by_row: std::collections::BTreeMap<usize, &[String; 2]> = by_row.collect();
    let mut lines = Vec::new();
    for (row, scores) in scored.0.iter().zip(scored.1) {
        let bag_of_words = [0, 1].map(|side| words.score(&by_row[row][side]));
        let line = HeldOut { row: *row, reward_model: *scores, bag_of_words };
        serde_json::to_writer(&mut lines, &line).expect("numbers serialise");
        lines.push(b'\n');
    }
    Ok(atomic::write(output.join(HELD_OUT), &lines)?)
}

/// Writes the card (`yardstick.json`, `yardstick.md`) from the folds in `output`, unless it is there already.
pub(crate) fn write_card(config: &Config, pairs: &Path, output: &Path) -> Result<()> {
    let mut folds = Vec::new();
    let (mut rows, mut by_reward, mut by_words) = (Vec::new(), Vec::new(), Vec::new());
    for fold in 0..config.folds {
        let dir = fold_dir(output, fold);
        let run = RunJson::read(&dir)?;
        let n_train = run.counts.get("train").and_then(serde_json::Value::as_u64).unwrap_or(0);
        let path = dir.join(HELD_OUT);
        let before = rows.len();
        for (line, value) in jsonl::read(&path)? {
            let held_out: HeldOut =
                serde_json::from_value(value).map_err(|error| arete_records::Error::Json {
                    path: path.clone(),
                    line,
                    expected: "row, reward_model, bag_of_words".to_owned(),
                    got: error.to_string(),
                })?;
            rows.push(held_out.row);
            by_reward.push(held_out.reward_model);
            by_words.push(held_out.bag_of_words);
        }
        folds.push(FoldCard {
            n_train: usize::try_from(n_train).unwrap_or(usize::MAX),
            n_held_out: rows.len() - before,
            fingerprint: run.fingerprint,
        });
    }
    if Card::read(output)?.is_some_and(|card| card.folds == folds) {
        return Ok(());
    }
    let (all, _) = data::read_pairs(pairs, config.column.as_deref().unwrap_or_default())?;
    let all: std::collections::BTreeMap<usize, &Preference> =
        all.iter().map(|pair| (pair.row, pair)).collect();
    let ruled: Vec<Ruled> = rows
        .iter()
        .filter_map(|row| all.get(row))
        .map(|pair| Ruled::of(&pair.chosen.messages, &pair.rejected.messages))
        .collect();
    let judge = |scores: &[[f64; 2]]| {
        (ruled.len() == scores.len()).then(|| JudgeCard::of(&ruled, scores)).flatten()
    };
    let (Some(reward_model), Some(bag_of_words)) = (judge(&by_reward), judge(&by_words)) else {
        bail!(too_few_pairs(pairs, rows.len().max(1), ruled.len(), "held out by the folds"));
    };
    let card = Card {
        folds,
        n_pairs: rows.len(),
        shuffled_labels: config.shuffle_labels,
        reward_model,
        bag_of_words,
    };
    atomic::write(output.join("yardstick.md"), card.markdown().as_bytes())?;
    card.write(output)?;
    for (judge, own) in
        [("reward models", &card.reward_model), ("bag of words", &card.bag_of_words)]
    {
        let measured = &own.cross_fitted;
        tracing::info!(
            judge,
            n = measured.n,
            accuracy = measured.accuracy.estimate,
            low = measured.accuracy.low,
            high = measured.accuracy.high,
            beside = measured.null_rulers.words(),
            length_matched = own.length_matched.as_ref().map(|own| own.accuracy.estimate),
            "cross-fitted"
        );
    }
    Ok(())
}
