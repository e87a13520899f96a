//! A stage's run: up to date, to be continued, or to be done; and `run.json`, which marks it done.
//!
//! In the output directory, `stage.json` marks work in progress and `run.json`, written last, work
//! done. Both hold what the results depend on: stage, settings, seed, hashes of the inputs, version.
//! A [`begin`] that finds other values than its own says which and starts afresh; one that finds the
//! same values and no `run.json` keeps the partial work. Checkpoints of other inputs, and the results
//! of another stage, are refused rather than removed. No clock times anywhere.

mod aside;
mod look;
mod origin;

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use arete_records::{atomic, files, hex};
use sha2::{Digest, Sha256};

pub use arete_records::hashes::RUN_JSON;
use arete_records::hashes::{HashCache, STAGE_JSON, is_bookkeeping, walk};

use self::aside::{copy_aside, set_aside};
pub use self::look::{Standing, asking, is_asking, say_up_to_date};
use self::origin::Origin;
pub use self::origin::{Change, resolve_devices_with};
use crate::units::SHARDS;
use crate::{Error, seal};

/// What the names of checkpoint directories begin with.
pub const CHECKPOINT_PREFIX: &str = "checkpoint-";

/// Name of the file whose lock marks a working process.
const LOCK: &str = ".lock";

/// What a stage is about to do.
#[derive(Debug)]
pub struct StageSpec<'a> {
    /// The stage's name.
    pub stage: &'a str,
    /// The directory that receives the results; nothing else may be in it.
    pub output: &'a Path,
    /// The resolved settings, without paths of inputs and output.
    pub config: Value,
    /// The seed.
    pub seed: u64,
    /// Files and directories the results depend on, under stable names.
    pub inputs: Vec<(String, PathBuf)>,
}

/// What [`begin`] found.
#[derive(Debug)]
pub enum Start {
    /// The results are there and nothing they depend on has changed.
    UpToDate(RunJson),
    /// There is work to do.
    Run(StageRun),
}

/// A file that a stage made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputFile {
    /// Size in bytes.
    pub size: u64,
    /// SHA-256, in hex.
    pub sha256: String,
}

/// The contents of `run.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunJson {
    /// The stage's name.
    pub stage: String,
    /// The resolved settings.
    pub config: Value,
    /// The seed.
    pub seed: u64,
    /// SHA-256 of every input, by name.
    pub inputs: BTreeMap<String, String>,
    /// Version of the program and of the layout of its files.
    pub versions: BTreeMap<String, String>,
    /// The device the stage ran on.
    pub device: String,
    /// The number format it computed in.
    pub dtype: String,
    /// What there is to count (rows, pairs, tokens, …).
    pub counts: Map<String, Value>,
    /// Hash of everything the results depend on.
    pub fingerprint: String,
    /// Every file the stage made, by its path inside the directory.
    pub outputs: BTreeMap<String, OutputFile>,
    /// SHA-256 of everything above, in hex: damage to this file itself shows. None in files of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

impl RunJson {
    /// Reads the `run.json` of a directory.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if there is none, [`Error::Records`] if it is damaged.
    pub fn read(dir: impl AsRef<Path>) -> Result<Self, Error> {
        let path = dir.as_ref().join(RUN_JSON);
        let run: Self = read_json(&path)?;
        run.check(&path)?;
        Ok(run)
    }

    /// Hash of all but itself.
    fn digest(&self) -> String {
        let bare = Self { sha256: None, ..self.clone() };
        let json = serde_json::to_vec(&bare).expect("maps with string keys always serialise");
        hex(&Sha256::digest(json))
    }

    /// Refuses a file whose contents are not those that were written.
    fn check(&self, path: &Path) -> Result<(), Error> {
        match &self.sha256 {
            Some(expected) if *expected != self.digest() => Err(arete_records::Error::Damaged {
                path: path.to_owned(),
                what: "SHA-256 of its contents".to_owned(),
                expected: expected.clone(),
                got: format!("{}: damaged; run the stage that made it again", self.digest()),
            }
            .into()),
            _ => Ok(()),
        }
    }
}

/// What the results of a finished stage are made of.
#[derive(Debug, Default)]
pub struct Completion {
    /// The device the stage ran on.
    pub device: String,
    /// The number format it computed in.
    pub dtype: String,
    /// What there is to count (rows, pairs, tokens, …).
    pub counts: Map<String, Value>,
}

/// A stage at work; holds the lock on its output directory.
#[derive(Debug)]
pub struct StageRun {
    output: PathBuf,
    origin: Origin,
    /// Identifies what checkpoints are of.
    lineage: String,
    resumed: bool,
    /// Files in the directory that are not the stage's.
    foreign: Vec<String>,
    /// The amounts of the finished run that this one goes on from.
    went_on_from: Map<String, Value>,
    cache: HashCache,
    _lock: File,
}

/// The contents of `stage.json`.
#[derive(Debug, Serialize, Deserialize)]
struct StageJson {
    #[serde(flatten)]
    origin: Origin,
    fingerprint: String,
    /// Where the results of an earlier run are being set aside, while they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    aside: Option<String>,
    /// Files in the directory that are not the stage's.
    foreign: Vec<String>,
    /// The amounts of the finished run that this one goes on from.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    went_on_from: Map<String, Value>,
}

impl StageJson {
    /// Refuses a mark whose contents are not those that were written.
    fn check(&self, path: &Path) -> Result<(), Error> {
        let got = self.origin.fingerprint();
        if got == self.fingerprint {
            return Ok(());
        }
        let (path, what) = (path.to_owned(), "fingerprint".to_owned());
        let expected = self.fingerprint.clone();
        Err(arete_records::Error::Damaged { path, what, expected, got }.into())
    }

    fn of(origin: &Origin, foreign: &[String], aside: Option<&str>) -> Self {
        Self {
            origin: origin.clone(),
            fingerprint: origin.fingerprint(),
            aside: aside.map(str::to_owned),
            foreign: foreign.to_vec(),
            went_on_from: Map::new(),
        }
    }
}

/// Locks the output directory, hashes the inputs, and says whether there is work to do.
///
/// Results of other settings or inputs are moved to `OUTPUT.old-N` first, and the log says what changed; partial
/// work of the same settings and inputs stays. While [`asking`] runs, nothing is touched and every stage is told that
/// there is nothing to do.
///
/// # Errors
///
/// [`Error::Locked`] if another process works in the directory; [`Error::ForeignOutput`] if it
/// holds files but no stage made them; [`Error::OtherStage`] if another stage did;
/// [`Error::StaleCheckpoints`] if an unfinished run left checkpoints and an input has changed since;
/// [`Error::Io`]; [`Error::Records`] if `run.json` is another program's. Nothing is removed, in any case.
pub fn begin(spec: StageSpec<'_>) -> Result<Start, Error> {
    begin_growing(spec, &[])
}

/// [`begin`] of a stage whose checkpoints can go on further than they were meant to: `amounts` are the settings that say how
/// far. Where they alone have changed, and grown, the work goes on from the newest checkpoint; finished results are copied to
/// `OUTPUT.old-N` before, and `went_on_from` among the counts of `run.json` says from what.
///
/// # Errors
///
/// As [`begin`].
pub fn begin_growing(spec: StageSpec<'_>, amounts: &[&str]) -> Result<Start, Error> {
    if is_asking() {
        return look::answer(&spec, amounts);
    }
    let output = spec.output;
    fs_err::create_dir_all(output)?;
    let lock = lock(output)?;
    let mut cache = HashCache::load(output);
    let mut origin = Origin::of(&spec, &mut cache)?;
    let found = find(output, &origin, amounts, &mut cache)?;
    if !matches!(found, Found::Nothing) {
        atomic::sweep(output)?;
    }
    let mut resumed = false;
    let mut foreign = Vec::new();
    let mut went_on_from = Map::new();
    match found {
        Found::Nothing => {
            if let Some(found) = files_in(output)?.into_iter().next() {
                return Err(Error::ForeignOutput { path: output.to_owned(), found });
            }
        }
        Found::DamagedMark { aside, .. } => set_aside(output, &origin, &[], aside)?,
        Found::Complete(complete) => {
            remove_if_any(&output.join(STAGE_JSON))?;
            cache.save();
            return Ok(Start::UpToDate(complete));
        }
        Found::Finished { complete, less } => {
            tracing::info!(from = ?less, "going on from where the finished run ended");
            foreign = files_in(output)?;
            foreign.retain(|file| !complete.outputs.contains_key(file));
            copy_aside(output, complete.outputs.keys())?;
            (resumed, went_on_from) = (true, less);
        }
        Found::Stale { complete, why } => {
            match &why {
                Stale::Output(file) => {
                    tracing::info!(file, "output is missing or was changed, running again");
                }
                Stale::Changes(changes) => log_changes(changes),
            }
            foreign = files_in(output)?;
            foreign.retain(|file| !complete.outputs.contains_key(file));
            set_aside(output, &origin, &foreign, None)?;
        }
        Found::Unfinished { partial, grown } => {
            tracing::info!(stage = spec.stage, "continuing where an earlier run stopped");
            resumed = true;
            foreign = partial.foreign;
            went_on_from = partial.went_on_from;
            match grown {
                // As it was begun: its results are those of a run that was never stopped.
                None => origin = partial.origin,
                // Its first steps were paced for fewer; what a finished run went on from is older still.
                Some(less) => went_on_from = less.into_iter().chain(went_on_from).collect(),
            }
        }
        Found::Abandoned { partial, changes } => {
            if partial.aside.is_none() {
                refuse_stale_checkpoints(output, &changes)?;
            }
            foreign = partial.foreign;
            // An attempt that failed before it made anything was no run.
            if files_in(output)?.iter().any(|file| !foreign.contains(file)) {
                log_changes(&changes);
            }
            set_aside(output, &origin, &foreign, partial.aside)?;
        }
    }
    let mut mark = StageJson::of(&origin, &foreign, None);
    mark.went_on_from = went_on_from.clone();
    write_json(&output.join(STAGE_JSON), &mark)?;
    remove_if_any(&output.join(RUN_JSON))?;
    cache.save();
    Ok(Start::Run(StageRun {
        output: output.to_owned(),
        lineage: origin.lineage(amounts),
        origin,
        resumed,
        foreign,
        went_on_from,
        cache,
        _lock: lock,
    }))
}

/// What stands in a stage's directory, measured against what it would be made from now.
enum Found {
    Nothing,
    /// A mark that was a stage's and cannot be read any more, and where results were being set aside.
    DamagedMark {
        mark: &'static str,
        aside: Option<String>,
    },
    Complete(RunJson),
    /// Results that would be made again.
    Stale {
        complete: RunJson,
        why: Stale,
    },
    /// Results that the work can go on from; `less` are the amounts they were made with.
    Finished {
        complete: RunJson,
        less: Map<String, Value>,
    },
    /// Work that can go on; `grown` are the amounts it was begun for, where there is more to do now.
    Unfinished {
        partial: StageJson,
        grown: Option<Map<String, Value>>,
    },
    /// Unfinished work of other settings or inputs, or results that were being set aside.
    Abandoned {
        partial: StageJson,
        changes: Vec<Change>,
    },
}

/// Why results would be made again.
enum Stale {
    /// This file of theirs is missing or was changed.
    Output(String),
    /// They depend on something else than they would now.
    Changes(Vec<Change>),
}

/// The one place that decides between up to date, stale and unfinished; changes nothing.
fn find(
    output: &Path,
    origin: &Origin,
    amounts: &[&str],
    cache: &mut HashCache,
) -> Result<Found, Error> {
    let (complete, run_damaged) =
        read_own(&output.join(RUN_JSON), |run: &RunJson, path| run.check(path))?;
    let (partial, stage_damaged) = read_own(&output.join(STAGE_JSON), StageJson::check)?;
    let owner = complete.as_ref().map(|run| &run.stage);
    if let Some(owner) = owner.or_else(|| partial.as_ref().map(|partial| &partial.origin.stage))
        && *owner != origin.stage
    {
        let (path, owner) = (output.to_owned(), owner.clone());
        return Err(Error::OtherStage { path, owner, stage: origin.stage.clone() });
    }
    let aside = partial.as_ref().and_then(|partial| partial.aside.clone());
    if run_damaged || stage_damaged {
        let mark = if run_damaged { RUN_JSON } else { STAGE_JSON };
        return Ok(Found::DamagedMark { mark, aside });
    }
    Ok(match (complete, partial) {
        (Some(complete), _) if aside.is_none() => {
            let old = complete.origin().as_if_now(&complete.device, origin);
            let changes = old.changes(origin);
            let grown = old.grown(origin, amounts);
            let damaged = match changes.is_empty() || grown.is_some() {
                true => first_changed_output(output, &complete, cache)?,
                false => None,
            };
            match (damaged, grown) {
                (Some(file), _) => Found::Stale { complete, why: Stale::Output(file) },
                _ if changes.is_empty() => Found::Complete(complete),
                (None, Some(less)) => Found::Finished { complete, less },
                (None, None) => Found::Stale { complete, why: Stale::Changes(changes) },
            }
        }
        (_, Some(partial)) => {
            let (old, new) = (partial.origin.on_this_machine(), origin.on_this_machine());
            let changes = old.changes(&new);
            let grown = old.grown(&new, amounts).filter(|_| !changes.is_empty());
            if aside.is_none() && (changes.is_empty() || grown.is_some()) {
                Found::Unfinished { partial, grown }
            } else {
                Found::Abandoned { partial, changes }
            }
        }
        (_, None) => Found::Nothing,
    })
}

fn log_changes(changes: &[Change]) {
    for Change { what, key, old, new } in changes {
        tracing::info!(what, key, old, new, "changed since the last run, running again");
    }
}

/// Hours of training may stand in the checkpoints of an unfinished run, and a changed input is more often an accident
/// than a changed setting is: the user decides.
fn refuse_stale_checkpoints(output: &Path, changes: &[Change]) -> Result<(), Error> {
    let Some(change) = changes.iter().find(|change| change.what == "input") else { return Ok(()) };
    let Change { key: input, old: expected, new: got, .. } = change.clone();
    let checkpoint = files_in(output)?.into_iter().find_map(|file| {
        let (dir, _) = file.split_once('/')?;
        dir.starts_with(CHECKPOINT_PREFIX).then(|| dir.to_owned())
    });
    checkpoint.map_or(Ok(()), |checkpoint| {
        let path = output.to_owned();
        Err(Error::StaleCheckpoints { path, checkpoint, input, expected, got })
    })
}

impl StageRun {
    /// The directory that receives the results.
    pub fn output(&self) -> &Path {
        &self.output
    }

    /// Hash of everything that a checkpoint depends on: what results do, but for how far the work goes.
    pub fn fingerprint(&self) -> &str {
        &self.lineage
    }

    /// Whether partial work of an earlier run is there.
    pub fn is_resumed(&self) -> bool {
        self.resumed
    }

    /// SHA-256 of the inputs, by name.
    pub fn inputs(&self) -> &BTreeMap<String, String> {
        &self.origin.inputs
    }

    /// Records every file the stage made, and writes `run.json`.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if a file cannot be read, flushed or written.
    pub fn finish(mut self, done: Completion) -> Result<(), Error> {
        atomic::sweep(&self.output)?;
        let mut outputs = BTreeMap::new();
        for name in files_in(&self.output)? {
            if self.foreign.contains(&name) || name.split('/').any(atomic::is_set_aside) {
                continue;
            }
            let path = self.output.join(&name);
            let file = fs_err::File::open(&path)?;
            file.sync_all()?; // files that were appended to are flushed here
            let size = file.metadata()?.len();
            outputs.insert(name, OutputFile { size, sha256: self.cache.sha256_file(&path)? });
        }
        let fingerprint = self.origin.fingerprint();
        let Origin { stage, config, seed, inputs, versions } = self.origin;
        let Completion { device, dtype, mut counts } = done;
        if !self.went_on_from.is_empty() {
            counts.insert("went_on_from".to_owned(), self.went_on_from.into());
        }
        let mut run = RunJson {
            stage,
            config,
            seed,
            inputs,
            versions,
            device,
            dtype,
            counts,
            fingerprint,
            outputs,
            sha256: None,
        };
        run.sha256 = Some(run.digest());
        write_json(&self.output.join(RUN_JSON), &run)?;
        fs_err::remove_file(self.output.join(STAGE_JSON))?;
        // run.json vouches from now on; a part of a job array keeps its units and their seals.
        let keeps = |dir: &Path| is_stage_dir(dir) || dir.ends_with(SHARDS);
        seal::remove_all(&self.output, &keeps)?;
        self.cache.save();
        Ok(())
    }
}

impl RunJson {
    fn origin(&self) -> Origin {
        Origin {
            stage: self.stage.clone(),
            config: self.config.clone(),
            seed: self.seed,
            inputs: self.inputs.clone(),
            versions: self.versions.clone(),
        }
    }
}

fn lock(output: &Path) -> Result<File, Error> {
    let path = output.join(LOCK);
    let mut file = fs_err::OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)?;
    match file.file().try_lock() {
        Ok(()) => {
            file.set_len(0)?;
            file.write_all(std::process::id().to_string().as_bytes())?;
            Ok(file.into_parts().0)
        }
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            // The pid is a courtesy: without it the message still says what is wrong.
            let _ = file.read_to_string(&mut pid);
            if pid.is_empty() {
                pid.push_str("unknown");
            }
            Err(Error::Locked { path: output.to_owned(), pid })
        }
        // Network file systems without a lock service (NFS without lockd, Lustre without `-o flock`): no other process
        // can be told apart there, and the user is told so once.
        Err(TryLockError::Error(error)) if is_without_locks(&error) => {
            tracing::warn!(
                file = %path.display(), %error,
                "the file system has no locks: take care that no second process works in this directory"
            );
            Ok(file.into_parts().0)
        }
        Err(TryLockError::Error(error)) => {
            let message = format!("{}: cannot be locked: {error}", path.display());
            Err(Error::Io(std::io::Error::new(error.kind(), message)))
        }
    }
}

/// Whether a lock was refused because the file system has none: ENOLCK, ENOSYS, EOPNOTSUPP, EINVAL on Linux.
fn is_without_locks(error: &std::io::Error) -> bool {
    const WITHOUT: [i32; 4] = [37, 38, 95, 22];
    error.kind() == std::io::ErrorKind::Unsupported
        || error.raw_os_error().is_some_and(|code| WITHOUT.contains(&code))
}

/// Directories of other stages, which live their own life.
fn is_stage_dir(dir: &Path) -> bool {
    [RUN_JSON, STAGE_JSON].iter().any(|name| dir.join(name).exists())
}

/// Every file under a directory but bookkeeping and what belongs to stages nested in it: paths
/// relative to it with `/` between names, sorted.
fn files_in(dir: &Path) -> Result<Vec<String>, Error> {
    let mut files = walk(dir, &is_stage_dir)?;
    files.retain(|file| !file.rsplit('/').next().is_some_and(is_bookkeeping));
    Ok(files)
}

fn first_changed_output(
    output: &Path,
    run: &RunJson,
    cache: &mut HashCache,
) -> Result<Option<String>, Error> {
    for (name, expected) in &run.outputs {
        let path = output.join(name);
        let same = match fs_err::metadata(&path) {
            Ok(metadata) => {
                metadata.len() == expected.size && cache.sha256_file(&path)? == expected.sha256
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
            Err(error) => return Err(Error::Io(error)),
        };
        if !same {
            return Ok(Some(name.clone()));
        }
    }
    Ok(None)
}

fn write_stage_json(
    output: &Path,
    origin: &Origin,
    foreign: &[String],
    aside: Option<&str>,
) -> Result<(), Error> {
    let stage = StageJson::of(origin, foreign, aside);
    write_json(&output.join(STAGE_JSON), &stage)
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), Error> {
    let mut json =
        serde_json::to_vec_pretty(value).expect("maps with string keys always serialise");
    json.push(b'\n');
    Ok(atomic::write(path, &json)?)
}

/// Reads a mark of ours; none if there is none. True if it is damaged beyond reading: then the stage begins anew.
fn read_own<T: DeserializeOwned>(
    path: &Path,
    check: impl FnOnce(&T, &Path) -> Result<(), Error>,
) -> Result<(Option<T>, bool), Error> {
    match read_json(path) {
        Ok(mark) => match check(&mark, path) {
            Ok(()) => Ok((Some(mark), false)),
            Err(error) => {
                tracing::warn!(%error, "what is there is set aside, the stage begins anew");
                Ok((None, true))
            }
        },
        Err(Error::Io(error)) if error.kind() == std::io::ErrorKind::NotFound => Ok((None, false)),
        Err(Error::Records(error @ arete_records::Error::Json { .. })) => {
            if !was_ours(path)? {
                return Err(error.into());
            }
            tracing::warn!(%error, "damaged: what is there is set aside, the stage begins anew");
            Ok((None, true))
        }
        Err(error) => Err(error),
    }
}

/// Whether a file that cannot be read as a mark was one: no JSON any more, or JSON with some of its keys.
pub(crate) fn was_ours(path: &Path) -> Result<bool, Error> {
    const KEYS: [&str; 4] = ["stage", "fingerprint", "inputs", "versions"];
    let found = serde_json::from_slice::<Value>(&read_small(path)?);
    Ok(found.map_or(true, |value| KEYS.iter().filter(|key| value.get(*key).is_some()).count() >= 2))
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let bytes = read_small(path)?;
    serde_json::from_slice(&bytes).map_err(|error| {
        let (path, line) = (path.to_owned(), error.line());
        let expected = "what an Arete stage writes".to_owned();
        arete_records::Error::Json { path, line, expected, got: error.to_string() }.into()
    })
}

/// [`files::read_small`], with what the system refuses as this crate's own.
fn read_small(path: &Path) -> Result<Vec<u8>, Error> {
    files::read_small(path).map_err(|error| match error {
        arete_records::Error::Io(error) => error.into(),
        other => other.into(),
    })
}

fn remove_if_any(path: &Path) -> Result<(), Error> {
    match fs_err::remove_file(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests;
