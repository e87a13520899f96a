//! Looking at a stage's directory without touching it: what [`begin`](super::begin) would find.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use arete_records::hashes::HashCache;
use serde::Serialize;
use serde_json::{Map, Value};

use super::{
    Change, Found, Origin, RUN_JSON, RunJson, STAGE_JSON, StageSpec, Stale, Start, files_in, find,
};
use crate::Error;

/// What stands in a stage's directory.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Standing {
    /// Nothing yet.
    Missing,
    /// Results of the same settings and inputs, as they were recorded.
    Complete,
    /// Results of other settings or inputs.
    Stale {
        /// Everything that differs.
        changes: Vec<Change>,
    },
    /// Results that the work would go on from, further than they went.
    GoesOn {
        /// The amounts they were made with.
        from: Map<String, Value>,
    },
    /// Unfinished work of the same settings and inputs, which would go on.
    HalfDone,
    /// Unfinished work of other settings or inputs.
    HalfDoneOtherwise {
        /// Everything that differs.
        changes: Vec<Change>,
    },
    /// Results with a file that is missing or not as it was recorded, or a mark that cannot be read.
    Damaged {
        /// The file.
        file: String,
    },
    /// Files that no stage made.
    Foreign {
        /// One of them.
        file: String,
    },
}

thread_local! {
    /// What was found, while a stage is asked.
    static ASKED: RefCell<Option<Vec<(PathBuf, Standing)>>> = const { RefCell::new(None) };
}

/// Has `stage` come as far as [`begin`](super::begin), and says what that would have found in each directory; nothing is
/// written, and no work is done. What the stage itself returned counts only where it did not come so far.
///
/// # Errors
///
/// Why the stage did not come as far as that: an input that is missing, a setting that is refused.
pub fn asking<E>(stage: impl FnOnce() -> Result<(), E>) -> Result<Vec<(PathBuf, Standing)>, E> {
    ASKED.set(Some(Vec::new()));
    let result = stage();
    let found = ASKED.take().unwrap_or_default();
    match result {
        Err(error) if found.is_empty() => Err(error),
        _ => Ok(found),
    }
}

/// Whether a stage is only being asked how it stands.
pub fn is_asking() -> bool {
    ASKED.with_borrow(Option::is_some)
}

/// Logs that the results there are up to date; not where a stage is only being asked, which is told so whatever is there.
pub fn say_up_to_date(output: &Path) {
    if !is_asking() {
        tracing::info!(output = %output.display(), "up to date");
    }
}

/// Notes what stands there; the stage is told that there is nothing to do.
pub(super) fn answer(spec: &StageSpec<'_>, amounts: &[&str]) -> Result<Start, Error> {
    let (standing, complete) = standing(spec, amounts)?;
    let place = spec.output.to_owned();
    ASKED.with_borrow_mut(|asked| asked.get_or_insert_default().push((place, standing)));
    Ok(Start::UpToDate(complete.unwrap_or_else(|| RunJson::of_nothing(spec))))
}

fn standing(spec: &StageSpec<'_>, amounts: &[&str]) -> Result<(Standing, Option<RunJson>), Error> {
    let output = spec.output;
    let has = |mark: &str| output.join(mark).exists();
    if !has(RUN_JSON) && !has(STAGE_JSON) {
        // No need to read an input of many gigabytes.
        return Ok((unmarked(output)?, None));
    }
    let mut cache = HashCache::load(output);
    let origin = Origin::of(spec, &mut cache)?;
    Ok(match find(output, &origin, amounts, &mut cache)? {
        Found::Nothing => (Standing::Missing, None),
        Found::DamagedMark { mark, .. } => (Standing::Damaged { file: mark.to_owned() }, None),
        Found::Complete(complete) => (Standing::Complete, Some(complete)),
        Found::Stale { complete, why } => match why {
            Stale::Output(file) => (Standing::Damaged { file }, Some(complete)),
            Stale::Changes(changes) => (Standing::Stale { changes }, Some(complete)),
        },
        Found::Finished { complete, less } => (Standing::GoesOn { from: less }, Some(complete)),
        Found::Unfinished { .. } => (Standing::HalfDone, None),
        Found::Abandoned { changes, .. } => (Standing::HalfDoneOtherwise { changes }, None),
    })
}

fn unmarked(output: &Path) -> Result<Standing, Error> {
    if !output.is_dir() {
        return Ok(Standing::Missing);
    }
    let found = files_in(output)?.into_iter().next();
    Ok(found.map_or(Standing::Missing, |file| Standing::Foreign { file }))
}

impl RunJson {
    /// What a stage gets to see that is only asked.
    fn of_nothing(spec: &StageSpec<'_>) -> Self {
        Self {
            stage: spec.stage.to_owned(),
            config: spec.config.clone(),
            seed: spec.seed,
            inputs: Default::default(),
            versions: Default::default(),
            device: String::new(),
            dtype: String::new(),
            counts: Default::default(),
            fingerprint: String::new(),
            outputs: Default::default(),
            sha256: None,
        }
    }
}
