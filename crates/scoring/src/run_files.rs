//! What a run directory holds: every stage's files, read if they are there.
//!
//! A stage that was not run is `None`, not an error; a file that is there but damaged is an error that names it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use arete_chain::{Constitution, NullRulers, Reading, Turns, members};
use arete_records::parquet::{self, Row};
use arete_records::rows::{
    ConversationRow, DemonstrationRow, JudgementRow, PreferenceRow, PromptRow, RolloutRow, ScoreRow,
};
use arete_records::stats::{CalibrationBin, Interval};
use arete_records::{Aspect, FinishReason, Refusal, ScoreStats, Split, Virtue, files};
use arete_stage::rounds;
use arete_stage::run::RunJson;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::best_of::BestOf;
use crate::front::Front;
use crate::gold::Gold;
use crate::score;
use crate::summary::Summary;

/// What the gold protocol leaves in a run.
pub(crate) const GOLD: &str = "gold/gold.json";
/// The method of preferences that asks nobody.
const CONSTRUCTION: &str = "contrast";
/// Largest text file that is read, in bytes.
const MAX_TEXT_BYTES: u64 = 256 << 20;

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq)]
pub struct MetricsLine {
    /// Its step.
    pub step: u64,
    /// Its numbers; what was not finite is absent.
    pub values: BTreeMap<String, f64>,
}

/// The numbers of a training run, by step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    /// In file order.
    pub lines: Vec<MetricsLine>,
}

impl Metrics {
    /// (step, value) of the first of these names that occurs.
    pub fn curve(&self, names: &[impl AsRef<str>]) -> Vec<(f64, f64)> {
        let mut names = names.iter().map(AsRef::as_ref);
        let Some(name) = names.find(|name| self.has(name)) else { return Vec::new() };
        self.lines
            .iter()
            .filter_map(|line| Some((line.step as f64, *line.values.get(name)?)))
            .collect()
    }

    /// Whether a name occurs.
    pub fn has(&self, name: &str) -> bool {
        self.lines.iter().any(|line| line.values.contains_key(name))
    }

    /// The last value of the first of these names that occurs.
    pub fn last(&self, names: &[&str]) -> Option<f64> {
        self.curve(names).last().map(|(_, value)| *value)
    }
}

/// A finished stage, for the page's provenance.
#[derive(Clone, Debug)]
pub struct StageRecord {
    /// Its directory inside the run (`sft`, `reward/action`).
    pub dir: String,
    /// What it recorded; none if it was not run, or not to its end.
    pub run: Option<RunJson>,
    /// Whether its directory holds anything.
    pub begun: bool,
}

/// The contents of a reward model's `evaluation.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// What it was evaluated on.
    pub split: String,
    /// Number of pairs.
    pub n: usize,
    /// Part of the pairs whose chosen side scores higher.
    pub accuracy: Interval,
    /// What knows nothing of what is right, on the same pairs; none in files of earlier versions.
    #[serde(default)]
    pub null_rulers: Option<NullRulers>,
    /// Gap between stated probability and observed frequency.
    pub expected_calibration_error: f64,
    /// Bin by bin; none in files of earlier versions.
    #[serde(default)]
    pub calibration: Vec<CalibrationBin>,
    /// Correlation of score with length; null if either does not vary.
    pub pearson_score_length: Option<f64>,
    /// Mean lead of the chosen side.
    pub mean_margin: f64,
}

/// A reward model's files.
#[derive(Clone, Debug, Default)]
pub struct Reward {
    /// Its training.
    pub metrics: Metrics,
    /// How good it is; none if there were no validation pairs.
    pub evaluation: Option<Evaluation>,
    /// Where its scores lie.
    pub stats: Option<ScoreStats>,
    /// Why it cannot be read: it was made by a version that recorded no reading rule.
    pub unreadable: Option<String>,
}

/// The contents of the judge's `calibration.json`, as far as the page shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JudgeCalibration {
    /// One row a set of labelled pairs and method.
    pub table: Vec<JudgeMethod>,
    /// One row a method and virtue, where the pairs differ in one virtue.
    #[serde(default)]
    pub virtues: Vec<JudgeOfVirtue>,
    /// Which method to take.
    pub recommendation: Recommendation,
}

/// How far a judging method agrees with labelled pairs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JudgeMethod {
    /// The labelled pairs.
    pub set: String,
    /// The method, or `shorter`: the shorter answer wins.
    pub method: String,
    /// Judged examples shown before the question.
    pub few_shot: usize,
    /// What decided: votes, mean probability, length.
    pub by: String,
    /// Pairs on which it agrees with the label.
    pub agreement: Agreement,
    /// What knows nothing of what is right, on the same pairs.
    #[serde(default)]
    pub null_rulers: Option<NullRulers>,
    /// How often the first shown was preferred.
    pub first_position_percent: Option<f64>,
    /// How often both orders gave the same answer.
    pub swap_consistency_percent: Option<f64>,
}

/// How far a judging method tells one virtue.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JudgeOfVirtue {
    /// The virtue.
    pub virtue: Virtue,
    /// The method.
    pub method: String,
    /// Judged examples shown before the question.
    pub few_shot: usize,
    /// Pairs on which its verdict by this virtue agrees with the label; the interval is 95 % for all virtues together.
    pub agreement: Agreement,
    /// What choosing the shorter side would give.
    pub shorter: Agreement,
    /// What choosing the side shown first would give.
    pub first_shown: Agreement,
    /// What it says by the other virtues about these pairs.
    pub other_virtues: Option<f64>,
    /// Whether it may vote: the interval lies above one half.
    pub may_vote: bool,
}

/// A share of pairs, with Wilson's interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// Pairs.
    pub n: u64,
    /// Share and interval.
    #[serde(flatten)]
    pub rate: Interval,
}

/// What the calibration recommends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recommendation {
    /// In words.
    pub reason: String,
}

/// The files of `score`.
#[derive(Clone, Debug)]
pub struct Scoring {
    /// What is said about the models.
    pub summary: Summary,
    /// Every score.
    pub scores: Vec<ScoreRow>,
    /// Replies of each model, in the summary's order.
    pub replies: Vec<(String, Vec<ConversationRow>)>,
}

/// Everything a run directory holds.
#[derive(Clone, Debug, Default)]
pub struct RunFiles {
    /// The run's name: the directory's last part.
    pub name: String,
    /// The round that its stages are of, the newest; none of a run without rounds.
    pub round: Option<u64>,
    /// The turns of its constitution; the shipped ones if no stage carries another.
    pub turns: Turns,
    /// Every stage, in order.
    pub stages: Vec<StageRecord>,
    /// `prompts.parquet`.
    pub prompts: Option<Vec<PromptRow>>,
    /// `demonstrations.parquet`.
    pub demonstrations: Option<Vec<DemonstrationRow>>,
    /// Training of the SFT model.
    pub sft: Option<Metrics>,
    /// `conversations.parquet`.
    pub conversations: Option<Vec<ConversationRow>>,
    /// `judgements.parquet`; none where nobody was asked.
    pub judgements: Option<Vec<JudgementRow>>,
    /// Whether the pairs were labelled by construction: no judge was asked, and there are no votes.
    pub by_construction: bool,
    /// `calibration/calibration.json`.
    pub calibration: Option<JudgeCalibration>,
    /// What its preferences and reward models are of, in order: turns, virtues, or both.
    pub sets: Vec<Aspect>,
    /// `preferences/<name>/<split>.parquet`.
    pub preferences: BTreeMap<(Aspect, Split), Vec<PreferenceRow>>,
    /// `reward/<name>`.
    pub rewards: BTreeMap<Aspect, Reward>,
    /// Training of the policy.
    pub ppo: Option<Metrics>,
    /// All files of `ppo/rollouts`, by iteration.
    pub rollouts: Vec<RolloutRow>,
    /// `scoring`.
    pub scoring: Option<Scoring>,
    /// Why `scoring` is there and cannot be used: it was made by an older version.
    pub outdated_scoring: Option<String>,
    /// `best-of`.
    pub best_of: Option<BestOf>,
    /// What the gold protocol found.
    pub gold: Option<Gold>,
    /// The front that it is part of, and its file.
    pub front: Option<(PathBuf, Front)>,
}

/// Directories of a run that hold a stage, in the pipeline's order, before and after the reward models'.
const STAGE_DIRS: [&[&str]; 2] = [
    &["prompts", "demonstrations", "sft", "conversations", "preferences", "calibration"],
    &["yardstick", "ppo", "best-of", "scoring"],
];

/// Directories of a run that hold a stage, in the pipeline's order.
fn stage_dirs(sets: &[Aspect]) -> Vec<String> {
    let [before, after] = STAGE_DIRS.map(|dirs| dirs.iter().map(|dir| (*dir).to_owned()));
    let rewards = sets.iter().map(|name| format!("reward/{name}"));
    before.chain(rewards).chain(after).collect()
}

/// The turns of the constitution that a run's stages carry, the earliest stage first.
fn turns_of(run: &Path) -> Result<Turns> {
    for stage in ["conversations", "preferences", "ppo", "scoring"] {
        if let Some(own) = Constitution::carried(&rounds::newest_place(run, stage))? {
            return Ok(own.turns);
        }
    }
    Ok(Turns::of_reward_models(&rounds::newest_place(run, "reward"))?)
}

/// What a run's preferences and reward models are of: the turns, unless there are some of virtues alone, and the virtues.
fn sets_of(run: &Path, turns: &Turns) -> Result<Vec<Aspect>> {
    let at = |name: &str| rounds::newest_place(run, name);
    let mut found = members::preference_sets(&at("preferences"), turns)?;
    found.extend(members::reward_models(&at("reward"), turns)?);
    let of_turns = found.is_empty() || found.iter().any(|member| member.is_of_turn(turns));
    let mut sets = if of_turns { turns.names() } else { Vec::new() };
    for member in found {
        if !sets.contains(&member.name) {
            sets.push(member.name);
        }
    }
    Ok(sets)
}

impl RunFiles {
    /// Reads a run directory.
    ///
    /// # Errors
    ///
    /// A refused file if the directory is none or holds no stage; A file's failure, A refused file if a file that is
    /// there is damaged; The system's failure.
    pub fn read(run: &Path) -> Result<Self> {
        let at = |name: &str| rounds::newest_place(run, name);
        let turns = turns_of(run)?;
        let sets = sets_of(run, &turns)?;
        let dirs = stage_dirs(&sets);
        let stages: Vec<StageRecord> =
            dirs.iter().map(|dir| stage(run, dir)).collect::<Result<_, _>>()?;
        if !stages.iter().any(|stage| stage.begun) {
            bail!(Refusal::file(
                run,
                "stages",
                format!("the directory of a run, with any of {}", dirs.join(", ")),
                if run.is_dir() { "none of them" } else { "no directory" }
            ));
        }
        let mut preferences = BTreeMap::new();
        for &aspect in &sets {
            for split in Split::ALL {
                let path = at("preferences").join(aspect.name()).join(format!("{split}.parquet"));
                if let Some(rows) = rows(&path)? {
                    preferences.insert((aspect, split), rows);
                }
            }
        }
        let mut rewards = BTreeMap::new();
        for &aspect in &sets {
            let dir = at("reward").join(aspect.name());
            let metrics = metrics(&dir)?;
            let evaluation = json(&dir.join("evaluation.json"))?;
            let stats = ScoreStats::read(&dir)?;
            let unreadable = Reading::read(&dir).err().map(|error| error.to_string());
            let has_any = metrics.is_some() || evaluation.is_some() || stats.is_some();
            if has_any || unreadable.is_some() {
                let metrics = metrics.unwrap_or_default();
                rewards.insert(aspect, Reward { metrics, evaluation, stats, unreadable });
            }
        }
        let name = fs_err::canonicalize(run)?;
        // Versions before wrote a vote of every virtue for pairs that no judge had seen.
        let judgements: Option<Vec<JudgementRow>> = rows(&at("preferences/judgements.parquet"))?;
        let is_asked = |row: &JudgementRow| row.method != CONSTRUCTION;
        let judgements = judgements.filter(|rows| rows.is_empty() || rows.iter().any(is_asked));
        let preferences_of = stages.iter().find(|stage| stage.dir == "preferences");
        let method = preferences_of.and_then(|stage| stage.run.as_ref()?.config.get("method"));
        let by_construction = method.is_some_and(|method| method == CONSTRUCTION);
        Ok(Self {
            name: name
                .file_name()
                .map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
            round: rounds::newest(run),
            turns,
            stages,
            prompts: rows(&at("prompts/prompts.parquet"))?,
            demonstrations: rows(&at("demonstrations/demonstrations.parquet"))?,
            sft: metrics(&at("sft"))?,
            conversations: rows(&at("conversations/conversations.parquet"))?,
            judgements,
            by_construction,
            calibration: json(&at("calibration/calibration.json"))?,
            sets,
            preferences,
            rewards,
            ppo: metrics(&at("ppo"))?,
            rollouts: rollouts(&at("ppo/rollouts"))?,
            outdated_scoring: outdated_scoring(&at("scoring"))?,
            scoring: scoring(&at("scoring"))?,
            best_of: json(&at("best-of/best_of.json"))?,
            gold: json(&run.join(GOLD))?,
            front: Front::find(run)?,
        })
    }

    /// The record of a stage's directory.
    pub fn stage(&self, dir: &str) -> Option<&RunJson> {
        self.stages.iter().find(|stage| stage.dir == dir)?.run.as_ref()
    }

    /// Part of the conversations' replies of an aspect that the token limit cut; none without conversations.
    pub fn truncated(&self, aspect: Aspect) -> Option<f64> {
        let rows = self.conversations.as_ref().filter(|rows| !rows.is_empty())?;
        Some(rows.iter().filter(|row| row.is_cut(aspect)).count() as f64 / rows.len() as f64)
    }

    /// The turns' names, in the order of the chain.
    pub fn aspects(&self) -> Vec<Aspect> {
        self.turns.names()
    }

    /// The turns in the order of the chain, then what else there are reward models of.
    pub fn names(&self) -> Vec<Aspect> {
        let mut names = self.aspects();
        let others: Vec<Aspect> =
            self.sets.iter().copied().filter(|name| !names.contains(name)).collect();
        names.extend(others);
        names
    }

    /// Place among [`names`](Self::names); past the end for what is none.
    pub fn place(&self, name: Aspect) -> usize {
        let names = self.names();
        names.iter().position(|own| *own == name).unwrap_or(names.len())
    }

    /// What the preferences stage did with replies that the token limit cut: its setting `truncated`.
    pub fn truncated_setting(&self) -> Option<&str> {
        self.stage("preferences")?.config.get("truncated")?.as_str()
    }

    /// KL of policy and reference, nats a conversation: of the selected weights if they were probed, else in the last
    /// iteration logged (or kept), which is before that iteration's steps.
    pub fn end_kl(&self) -> Option<f64> {
        let selected =
            self.stage("ppo").and_then(|record| record.counts.get("selected_iteration")?.as_f64());
        let probed = self.ppo.as_ref().and_then(|metrics| {
            let curve = metrics.curve(&["probe/kl"]);
            curve.into_iter().find(|(at, _)| Some(*at) == selected)
        });
        if let Some((_, kl)) = probed {
            return Some(kl);
        }
        let logged = self.ppo.as_ref().and_then(|metrics| metrics.last(&["objective/kl"]));
        logged
            .or_else(|| self.rollout_curve(|row| Some(f64::from(row.kl))).last().map(|(_, kl)| *kl))
    }

    /// Numbers of every PPO iteration that its rollouts show: mean of `value` over the rows that have one.
    pub fn rollout_curve(&self, value: impl Fn(&RolloutRow) -> Option<f64>) -> Vec<(f64, f64)> {
        let mut by_iteration: BTreeMap<i32, (f64, f64)> = BTreeMap::new();
        for row in &self.rollouts {
            if let Some(value) = value(row) {
                let (sum, n) = by_iteration.entry(row.iteration).or_default();
                *sum += value;
                *n += 1.0;
            }
        }
        by_iteration.into_iter().map(|(at, (sum, n))| (f64::from(at), sum / n)).collect()
    }
}

/// Score, standardised score, tokens and end of a rollout's reply.
#[derive(Clone, Copy, Debug, Default)]
pub struct RolloutReply {
    /// Standardised score.
    pub z: Option<f64>,
    /// Tokens sampled.
    pub n_tokens: Option<f64>,
    /// 1 if the token limit cut it, else 0.
    pub truncated: Option<f64>,
}

/// The reply of one aspect.
pub fn rollout_reply(row: &RolloutRow, aspect: Aspect) -> RolloutReply {
    let Some(turn) = row.turn(aspect) else { return RolloutReply::default() };
    let is_cut = |reason| f64::from(u8::from(reason == FinishReason::Length));
    RolloutReply {
        z: turn.z.map(f64::from),
        n_tokens: turn.n_tokens.map(f64::from),
        truncated: turn.finish_reason.map(is_cut),
    }
}

fn stage(run: &Path, dir: &str) -> Result<StageRecord> {
    let path = rounds::newest_place(run, dir);
    let finished = path.join("run.json").is_file();
    Ok(StageRecord {
        dir: dir.to_owned(),
        run: if finished { Some(RunJson::read(&path)?) } else { None },
        begun: path.is_dir(),
    })
}

fn rows<T: Row>(path: &Path) -> Result<Option<Vec<T>>> {
    Ok(if path.is_file() { Some(parquet::read(path)?) } else { None })
}

fn text(path: &Path) -> Result<Option<String>> {
    if !path.is_file() {
        return Ok(None);
    }
    Ok(Some(files::read_text(path, MAX_TEXT_BYTES)?))
}

fn json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let Some(text) = text(path)? else { return Ok(None) };
    Ok(serde_json::from_str(&text)
        .map(Some)
        .map_err(|error| Refusal::file(path, "JSON", "what the stage writes", error))?)
}

fn metrics(dir: &Path) -> Result<Option<Metrics>> {
    let path = dir.join("metrics.jsonl");
    let Some(text) = text(&path)? else { return Ok(None) };
    let mut lines = Vec::new();
    let n_lines = text.lines().count();
    for (idx, line) in text.lines().enumerate() {
        let parsed = serde_json::from_str::<Map<String, Value>>(line).ok().and_then(|object| {
            let step = object.get("step")?.as_u64()?;
            let values = object
                .iter()
                .filter(|(name, _)| *name != "step")
                .filter_map(|(name, value)| Some((name.clone(), value.as_f64()?)))
                .collect();
            Some(MetricsLine { step, values })
        });
        match parsed {
            Some(line) => lines.push(line),
            // A run that is still going on, or was killed, may leave half a line at the end.
            None if idx + 1 == n_lines => {}
            None => {
                bail!(Refusal::file(
                    &path,
                    format!("line {}", idx + 1),
                    "an object with a number `step`",
                    line.chars().take(100).collect::<String>()
                ));
            }
        }
    }
    Ok(Some(Metrics { lines }))
}

fn rollouts(dir: &Path) -> Result<Vec<RolloutRow>> {
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in fs_err::read_dir(dir)? {
        let path = entry?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if !hidden && path.extension().is_some_and(|extension| extension == "parquet") {
            paths.push(path);
        }
    }
    paths.sort();
    let mut rows: Vec<RolloutRow> = Vec::new();
    for path in paths {
        rows.extend(parquet::read::<RolloutRow>(&path)?);
    }
    rows.sort_by_key(|row| row.iteration);
    Ok(rows)
}

/// Why a summary is of no use: versions that named no primary endpoint read cut replies otherwise than reward models were
/// trained to, and gave no figures at equal length.
fn outdated_scoring(dir: &Path) -> Result<Option<String>> {
    let summary = json::<Value>(&dir.join(score::SUMMARY))?;
    let is_old = summary.is_some_and(|summary| summary.get("primary").is_none());
    Ok(is_old.then(|| {
        format!(
            "{}: made by an older version, whose Scores compare replies that were read in different ways",
            dir.join(score::SUMMARY).display()
        )
    }))
}

fn scoring(dir: &Path) -> Result<Option<Scoring>> {
    if outdated_scoring(dir)?.is_some() {
        return Ok(None);
    }
    // The summary is written last: without it the other files may be half of the story.
    let Some(summary) = json::<Summary>(&dir.join(score::SUMMARY))? else { return Ok(None) };
    let scores = parquet::read(dir.join(score::SCORES))?;
    let mut replies = Vec::new();
    for model in &summary.models {
        let path = dir.join(score::REPLIES).join(format!("{}.parquet", model.name));
        replies.push((model.name.clone(), parquet::read(path)?));
    }
    Ok(Some(Scoring { summary, scores, replies }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_read_up_to_a_half_written_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        fs_err::write(
            &path,
            "{\"step\":1,\"a\":0.5,\"b\":null}\n{\"step\":2,\"a\":1.5}\n{\"step\":3,\"a\"",
        )
        .unwrap();
        let metrics = metrics(dir.path()).unwrap().unwrap();
        assert_eq!(metrics.curve(&["b", "a"]), [(1.0, 0.5), (2.0, 1.5)]);
        assert_eq!(metrics.last(&["a"]), Some(1.5));
        assert!(!metrics.has("b") && metrics.last(&["b"]).is_none());
        fs_err::write(&path, "nonsense\n{\"step\":2}\n").unwrap();
        let error = super::metrics(dir.path()).unwrap_err().to_string();
        assert!(error.contains("line 1: expected an object"), "{error}");
    }

    #[test]
    fn a_directory_without_stages_is_no_run() {
        let dir = tempfile::tempdir().unwrap();
        assert!(RunFiles::read(dir.path()).unwrap_err().to_string().contains("none of them"));
        assert!(
            RunFiles::read(&dir.path().join("x")).unwrap_err().to_string().contains("no directory")
        );
        fs_err::create_dir(dir.path().join("prompts")).unwrap();
        let files = RunFiles::read(dir.path()).unwrap();
        assert!(files.prompts.is_none() && files.scoring.is_none());
    }
}
