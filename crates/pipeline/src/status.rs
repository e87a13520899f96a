//! Where a run stands, looked at by the code that decides when a stage begins, without starting or touching anything.

use std::path::{Path, PathBuf};

use anyhow::Result;
use arete_records::hashes::{RUN_JSON, STAGE_JSON};
use arete_stage::run::{self, CHECKPOINT_PREFIX, Change, Standing};
use arete_stage::units::{SHARDS, UNIT};
use serde::Serialize;

use crate::setup::Setup;
use crate::stages::{PIPELINE, Stage};
use crate::steps;

/// Characters of a value or a hash that are shown.
const SHOWN: usize = 28;

/// Where a stage stands.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum State {
    /// Its results are there, and nothing they depend on has changed.
    Complete,
    /// Its results are there, of other settings or inputs.
    Stale {
        /// Everything that differs.
        changes: Vec<Change>,
    },
    /// It was stopped, and the same command goes on.
    HalfDone {
        /// How far it came.
        how_far: String,
    },
    /// It was stopped, and has other settings or inputs since: it would begin anew.
    HalfDoneOtherwise {
        /// How far it came.
        how_far: String,
        /// Everything that differs.
        changes: Vec<Change>,
    },
    /// Nothing is there yet.
    Missing,
    /// A file of its results is missing or was changed, or a mark cannot be read.
    Damaged {
        /// The file.
        file: String,
    },
    /// It cannot be begun as things are.
    Refused {
        /// Why.
        reason: String,
    },
    /// The recipe leaves it out.
    LeftOut,
}

/// A stage and its state.
#[derive(Serialize)]
pub struct Seen {
    /// The stage's name.
    pub stage: &'static str,
    /// The round that it belongs to, if it does to one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub round: Option<u64>,
    /// Where it stands.
    #[serde(flatten)]
    pub state: State,
}

impl State {
    /// Whether there is nothing to do.
    pub fn is_done(&self) -> bool {
        matches!(self, Self::Complete | Self::LeftOut)
    }

    /// One word for it.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Stale { .. } => "stale",
            Self::HalfDone { .. } | Self::HalfDoneOtherwise { .. } => "half-done",
            Self::Missing => "missing",
            Self::Damaged { .. } => "damaged",
            Self::Refused { .. } => "refused",
            Self::LeftOut => "left out",
        }
    }

    /// What else there is to say.
    pub fn details(&self) -> String {
        match self {
            Self::Complete | Self::Missing | Self::LeftOut => String::new(),
            Self::Stale { changes } => described(changes),
            Self::HalfDone { how_far } => how_far.clone(),
            Self::HalfDoneOtherwise { how_far, changes } => {
                format!("{how_far}, with other settings since: {}", described(changes))
            }
            Self::Damaged { file } => format!("{file} is missing or was changed"),
            Self::Refused { reason } => reason.clone(),
        }
    }
}

/// Every stage of the list.
///
/// # Errors
///
/// A recipe that cannot be read as settings.
pub fn look(setup: &Setup) -> Result<Vec<Seen>> {
    let steps = steps::of(setup)?;
    let mut seen: Vec<Seen> = (steps.iter())
        .map(|step| Seen {
            stage: step.stage.name,
            round: step.round(),
            state: state(&step.setup, step.stage),
        })
        .collect();
    // What is left out stands where it would be.
    for stage in &PIPELINE {
        if !setup.has(stage.name)? {
            let position = |own: &Seen| Stage::named(own.stage).map_or(0, Stage::position);
            let at = seen.iter().position(|own| position(own) > stage.position());
            let left_out = Seen { stage: stage.name, round: None, state: State::LeftOut };
            seen.insert(at.unwrap_or(seen.len()), left_out);
        }
    }
    Ok(seen)
}

/// Where one stage stands.
pub fn state(setup: &Setup, stage: &Stage) -> State {
    let marked = marked_dirs(&setup.at(stage.name));
    if marked.is_empty() && !setup.at(stage.name).exists() {
        return State::Missing; // and nothing is fetched from the hub in order to say so
    }
    match run::asking(|| (stage.run)(setup)) {
        Ok(found) => overall(&found),
        // Before the stages that it reads have run there is nothing to be looked at.
        Err(_) if marked.is_empty() => State::Missing,
        Err(error) => State::Refused { reason: format!("{error:#}") },
    }
}

/// The state of a stage that writes into these directories: that of the first which is not complete.
fn overall(found: &[(PathBuf, Standing)]) -> State {
    let n_complete = found.iter().filter(|(_, standing)| *standing == Standing::Complete).count();
    let Some((dir, standing)) = found.iter().find(|(_, s)| *s != Standing::Complete) else {
        return State::Complete;
    };
    match standing.clone() {
        Standing::Complete => State::Complete,
        Standing::Missing if n_complete > 0 => {
            State::HalfDone { how_far: format!("{n_complete} of {} complete", found.len()) }
        }
        Standing::Missing => State::Missing,
        Standing::Stale { changes } => State::Stale { changes },
        Standing::GoesOn { from } => {
            let from: Vec<String> = from.iter().map(|(key, n)| format!("{key} {n}")).collect();
            State::HalfDone { how_far: format!("complete with {}", from.join(", ")) }
        }
        Standing::HalfDone => State::HalfDone { how_far: how_far(dir) },
        Standing::HalfDoneOtherwise { changes } => {
            State::HalfDoneOtherwise { how_far: how_far(dir), changes }
        }
        Standing::Damaged { file } => State::Damaged { file },
        Standing::Foreign { file } => State::Refused {
            reason: format!("{}: holds {file}, which no stage made", dir.display()),
        },
    }
}

/// The directories of a stage that hold its mark: its own, or those below it.
fn marked_dirs(dir: &Path) -> Vec<PathBuf> {
    let is_marked = |dir: &Path| [RUN_JSON, STAGE_JSON].iter().any(|mark| dir.join(mark).exists());
    let below = fs_err::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    std::iter::once(dir.to_owned()).chain(below).filter(|dir| is_marked(dir)).collect()
}

/// How far unfinished work came: its newest checkpoint, or the units that are written.
fn how_far(dir: &Path) -> String {
    let names = |dir: &Path| -> Vec<String> {
        let entries = fs_err::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };
    let steps = names(dir);
    let steps =
        steps.iter().filter_map(|name| name.strip_prefix(CHECKPOINT_PREFIX)?.parse::<u64>().ok());
    if let Some(step) = steps.max() {
        return format!("checkpoint of step {step}");
    }
    match names(&dir.join(SHARDS)).iter().filter(|name| name.ends_with(".parquet")).count() {
        0 => "begun, nothing kept yet".to_owned(),
        1 => format!("1 unit of {UNIT} prompts"),
        n => format!("{n} units of {UNIT} prompts"),
    }
}

/// Every change in one line.
fn described(changes: &[Change]) -> String {
    let one = |change: &Change| {
        let Change { what, key, old, new } = change;
        match *what {
            // Hashes say nothing to a reader; that there was none, or is none, does.
            "input" if old == NONE => format!("input `{key}` is new"),
            "input" if new == NONE => format!("input `{key}` is gone"),
            "input" => format!("input `{key}` changed"),
            _ => format!("{what} `{key}`: {} → {}", short(old), short(new)),
        }
    };
    changes.iter().map(one).collect::<Vec<_>>().join("; ")
}

/// What stands for a value that is not there, in a [`Change`].
const NONE: &str = "(none)";

fn short(value: &str) -> String {
    if value.chars().count() <= SHOWN {
        return value.to_owned();
    }
    value.chars().take(SHOWN).chain(['…']).collect()
}

/// The states as a table.
pub fn text(seen: &[Seen]) -> String {
    let label = |seen: &Seen| match seen.round {
        Some(round) => format!("round-{round}/{}", seen.stage),
        None => seen.stage.to_owned(),
    };
    let width = PIPELINE.iter().map(|stage| stage.name.len()).max().unwrap_or_default();
    let width = seen.iter().map(|own| label(own).len()).max().unwrap_or_default().max(width);
    let line = |seen: &Seen| {
        let (label, state) = (label(seen), &seen.state);
        let line = format!("{label:<width$}  {:<9}  {}", state.word(), state.details());
        format!("{}\n", line.trim_end())
    };
    seen.iter().map(line).collect()
}
