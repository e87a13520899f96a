//! Files of a rollout or a probe: its conversations, and the scores that have no column there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use arete_records::rows::RolloutRow;
use arete_records::{At, Refusal, atomic, parquet};
use arete_stage::seal;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::scorer::Scores;

/// Where the conversations of a probe go.
pub(super) fn completions_path(output: &Path, iteration: u64) -> PathBuf {
    output.join(format!("completions/iteration-{iteration:06}.parquet"))
}

/// Writes a rollout or a probe, and its seal.
pub(super) fn write_rows(path: &Path, rows: &[RolloutRow]) -> Result<()> {
    if let Some(dir) = path.parent() {
        fs_err::create_dir_all(dir)?;
    }
    parquet::write(path, rows)?;
    Ok(seal::write(path)?)
}

/// The scores of one conversation by reward model, where these are others than the turns, for which rollouts have columns.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct NamedScores {
    prompt_id: String,
    score: BTreeMap<String, f64>,
    pub(super) z: BTreeMap<String, f64>,
}

/// `….scores.jsonl` beside a rollout or probe, a line a conversation, if a reward model has no column in it.
pub(super) fn write_scores(rows_path: &Path, rows: &[RolloutRow], scores: &Scores) -> Result<()> {
    let has_column = |name: &String| {
        rows.iter().all(|row| row.turns.iter().any(|turn| turn.aspect.name() == name))
    };
    if scores.names.iter().all(has_column) {
        return Ok(());
    }
    let by_name = |row: &[f64]| scores.names.iter().cloned().zip(row.iter().copied()).collect();
    let mut text = Vec::new();
    for ((row, raw), z) in rows.iter().zip(&scores.raw).zip(&scores.z) {
        let prompt_id = row.prompt_id.clone();
        let line = NamedScores { prompt_id, score: by_name(raw), z: by_name(z) };
        serde_json::to_writer(&mut text, &line).expect("finite numbers serialise");
        text.push(b'\n');
    }
    Ok(atomic::write(scores_path(rows_path), &text)?)
}

/// Reads them back.
pub(super) fn read_scores(path: &Path) -> Result<Vec<NamedScores>> {
    let lines = arete_records::jsonl::read(path)?;
    let parse = |(line, value): (usize, Value)| {
        let expected = "a line of scores by reward model";
        Ok(serde_json::from_value(value)
            .map_err(|error| Refusal::at(path, At::Line(line), "", expected, error))?)
    };
    lines.into_iter().map(parse).collect()
}

/// Where the scores beside a rollout or a probe go.
pub(super) fn scores_path(rows_path: &Path) -> PathBuf {
    rows_path.with_extension("scores.jsonl")
}
