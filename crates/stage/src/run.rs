//! A stage's run: up to date, to be continued, or to be done; and `run.json`, which marks it done.
//!
//! In the output directory, `stage.json` marks work in progress and `run.json`, written last, work
//! done. Both hold what the results depend on: stage, settings, seed, hashes of the inputs, version.
//! A [`begin`] that finds other values than its own says which and starts afresh; one that finds the
//! same values and no `run.json` keeps the partial work. Checkpoints of other inputs, and the results
//! of another stage, are refused rather than removed. No clock times anywhere.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

pub use arete_records::hashes::RUN_JSON;
use arete_records::hashes::{HashCache, STAGE_JSON, is_bookkeeping, walk};
use arete_records::{atomic, hex, redact};

use crate::units::SHARDS;
use crate::{Error, inputs, seal};

/// What the names of checkpoint directories begin with.
pub const CHECKPOINT_PREFIX: &str = "checkpoint-";

/// Name of the file whose lock marks a working process.
const LOCK: &str = ".lock";

/// Version of the layout of files in a run directory; a change makes stages run again.
const FORMAT: &str = "1";

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
    fingerprint: String,
    resumed: bool,
    /// Files in the directory that are not the stage's.
    foreign: Vec<String>,
    cache: HashCache,
    _lock: File,
}

/// Everything the results depend on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Origin {
    stage: String,
    config: Value,
    seed: u64,
    inputs: BTreeMap<String, String>,
    versions: BTreeMap<String, String>,
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
}

impl StageJson {
    /// Refuses a mark whose contents are not those that were written.
    fn check(&self, path: &Path) -> Result<(), Error> {
        let got = self.origin.fingerprint();
        if got == self.fingerprint {
            return Ok(());
        }
        let (path, what) = (path.to_owned(), "fingerprint".to_owned());
        Err(arete_records::Error::Damaged { path, what, expected: self.fingerprint.clone(), got }.into())
    }
}

/// Locks the output directory, hashes the inputs, and says whether there is work to do.
///
/// Results of other settings or inputs are moved to `OUTPUT.old-N` first, and the log says what changed; partial
/// work of the same settings and inputs stays.
///
/// # Errors
///
/// [`Error::Locked`] if another process works in the directory; [`Error::ForeignOutput`] if it
/// holds files but no stage made them; [`Error::OtherStage`] if another stage did;
/// [`Error::StaleCheckpoints`] if an unfinished run left checkpoints and an input has changed since;
/// [`Error::ChangedInput`] if an input is not as the stage that made it left it; [`Error::Io`]; [`Error::Records`] if `run.json` is another program's. Nothing is removed, in any case.
pub fn begin(spec: StageSpec<'_>) -> Result<Start, Error> {
    let output = spec.output;
    fs_err::create_dir_all(output)?;
    let lock = lock(output)?;
    let mut cache = HashCache::load(output);
    let origin = Origin::of(&spec, &mut cache)?;
    let fingerprint = origin.fingerprint();

    let (complete, run_damaged) =
        read_own(&output.join(RUN_JSON), |run: &RunJson, path| run.check(path))?;
    let (partial, stage_damaged) = read_own(&output.join(STAGE_JSON), StageJson::check)?;
    let owner = complete.as_ref().map(|run| &run.stage);
    if let Some(owner) = owner.or_else(|| partial.as_ref().map(|partial| &partial.origin.stage))
        && owner != spec.stage
    {
        let (path, owner) = (output.to_owned(), owner.clone());
        return Err(Error::OtherStage { path, owner, stage: spec.stage.to_owned() });
    }
    if complete.is_some() || partial.is_some() {
        atomic::sweep(output)?;
    }
    let aside = partial.as_ref().and_then(|partial| partial.aside.clone());
    let mut resumed = false;
    let mut foreign = Vec::new();
    match (complete, partial) {
        _ if run_damaged || stage_damaged => set_aside(output, &origin, &[], aside)?,
        (Some(complete), _) if aside.is_none() => {
            if complete.fingerprint == fingerprint {
                match first_changed_output(output, &complete, &mut cache)? {
                    None => {
                        remove_if_any(&output.join(STAGE_JSON))?;
                        cache.save();
                        return Ok(Start::UpToDate(complete));
                    }
                    Some(file) => {
                        tracing::info!(file, "output is missing or was changed, running again");
                    }
                }
            } else {
                complete.origin().log_changes(&origin);
            }
            foreign = files_in(output)?;
            foreign.retain(|file| !complete.outputs.contains_key(file));
            set_aside(output, &origin, &foreign, None)?;
        }
        (_, Some(partial)) if aside.is_none() && partial.fingerprint == fingerprint => {
            tracing::info!(stage = spec.stage, "continuing where an earlier run stopped");
            resumed = true;
            foreign = partial.foreign;
        }
        (_, Some(partial)) => {
            if aside.is_none() {
                refuse_stale_checkpoints(output, &partial.origin, &origin)?;
            }
            partial.origin.log_changes(&origin);
            foreign = partial.foreign;
            set_aside(output, &origin, &foreign, aside)?;
        }
        (_, None) => {
            if let Some(found) = files_in(output)?.into_iter().next() {
                return Err(Error::ForeignOutput { path: output.to_owned(), found });
            }
        }
    }
    write_stage_json(output, &origin, &foreign, None)?;
    cache.save();
    let output = output.to_owned();
    Ok(Start::Run(StageRun { output, origin, fingerprint, resumed, foreign, cache, _lock: lock }))
}

/// Hours of training may stand in the checkpoints of an unfinished run, and a changed input is more often an accident
/// than a changed setting is: the user decides.
fn refuse_stale_checkpoints(output: &Path, old: &Origin, new: &Origin) -> Result<(), Error> {
    let changed = old.changes(new).into_iter().find(|change| change.what == "input");
    let Some(Change { key: input, old: expected, new: got, .. }) = changed else { return Ok(()) };
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

    /// Hash of everything the results depend on.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
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
            if self.foreign.contains(&name) {
                continue;
            }
            let path = self.output.join(&name);
            let file = fs_err::File::open(&path)?;
            file.sync_all()?; // files that were appended to are flushed here
            let size = file.metadata()?.len();
            outputs.insert(name, OutputFile { size, sha256: self.cache.sha256_file(&path)? });
        }
        let fingerprint = self.fingerprint;
        let Origin { stage, config, seed, inputs, versions } = self.origin;
        let Completion { device, dtype, counts } = done;
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

impl Origin {
    fn of(spec: &StageSpec<'_>, cache: &mut HashCache) -> Result<Self, Error> {
        let mut inputs = BTreeMap::new();
        for (name, path) in &spec.inputs {
            inputs.insert(name.clone(), cache.sha256_path(path)?);
            inputs::check_with(path, cache)?;
        }
        Ok(Self {
            stage: spec.stage.to_owned(),
            config: {
                let mut config = sorted(&spec.config);
                redact::redact_json(&mut config);
                config
            },
            seed: spec.seed,
            inputs,
            versions: BTreeMap::from([
                ("arete".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
                ("format".to_owned(), FORMAT.to_owned()),
            ]),
        })
    }

    fn fingerprint(&self) -> String {
        let json = serde_json::to_vec(self).expect("maps with string keys always serialise");
        hex(&Sha256::digest(json))
    }

    fn log_changes(&self, new: &Self) {
        for Change { what, key, old, new } in self.changes(new) {
            tracing::info!(what, key, old, new, "changed since the last run, running again");
        }
    }

    /// Every setting and input that differs.
    fn changes(&self, new: &Self) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut compare = |what, key: &str, old: Option<String>, new: Option<String>| {
            if old != new {
                let shown = |value: Option<String>| value.unwrap_or_else(|| "(none)".to_owned());
                changes.push(Change {
                    what,
                    key: key.to_owned(),
                    old: shown(old),
                    new: shown(new),
                });
            }
        };
        compare("stage", "stage", Some(self.stage.clone()), Some(new.stage.clone()));
        compare("recipe key", "seed", Some(self.seed.to_string()), Some(new.seed.to_string()));
        let (old_config, new_config) = (flattened(&self.config), flattened(&new.config));
        for key in union(&old_config, &new_config) {
            let get = |config: &BTreeMap<String, String>| config.get(key).cloned();
            compare("recipe key", key, get(&old_config), get(&new_config));
        }
        for key in union(&self.inputs, &new.inputs) {
            compare("input", key, self.inputs.get(key).cloned(), new.inputs.get(key).cloned());
        }
        for key in union(&self.versions, &new.versions) {
            let get = |versions: &BTreeMap<String, String>| versions.get(key).cloned();
            compare("version", key, get(&self.versions), get(&new.versions));
        }
        changes
    }
}

#[derive(Debug, PartialEq)]
struct Change {
    what: &'static str,
    key: String,
    old: String,
    new: String,
}

fn union<'a>(
    a: &'a BTreeMap<String, String>,
    b: &'a BTreeMap<String, String>,
) -> std::collections::BTreeSet<&'a String> {
    a.keys().chain(b.keys()).collect()
}

/// Settings by dotted key.
fn flattened(config: &Value) -> BTreeMap<String, String> {
    fn visit(prefix: &str, value: &Value, out: &mut BTreeMap<String, String>) {
        match value {
            Value::Object(map) if !map.is_empty() => {
                for (key, value) in map {
                    let key =
                        if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                    visit(&key, value, out);
                }
            }
            other => {
                out.insert(prefix.to_owned(), other.to_string());
            }
        }
    }
    let mut out = BTreeMap::new();
    visit("", config, &mut out);
    out
}

/// The same value with every object's keys sorted, so that equal settings give equal bytes.
fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let sorted: BTreeMap<&String, Value> =
                map.iter().map(|(key, value)| (key, self::sorted(value))).collect();
            Value::Object(sorted.into_iter().map(|(key, value)| (key.clone(), value)).collect())
        }
        Value::Array(items) => items.iter().map(sorted).collect(),
        other => other.clone(),
    }
}

fn lock(output: &Path) -> Result<File, Error> {
    let path = output.join(LOCK);
    let mut file = fs_err::OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)?
        .into_parts()
        .0;
    match file.try_lock() {
        Ok(()) => {
            file.set_len(0)?;
            file.write_all(std::process::id().to_string().as_bytes())?;
            Ok(file)
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
            Ok(file)
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

/// Moves what an earlier run of the stage left to `OUTPUT.old-N`, so that nothing is lost: every file but the foreign ones,
/// logs, and what is hidden. Links are left alone and not followed: no stage makes any. A kill half-way is noticed by
/// the mark in `stage.json`, and the rest goes to the same place.
fn set_aside(
    output: &Path,
    origin: &Origin,
    foreign: &[String],
    aside: Option<String>,
) -> Result<(), Error> {
    for file in foreign {
        tracing::warn!(file, "left alone: not made by this stage");
    }
    let mut files = Vec::new();
    own_files(output, "", &mut files)?;
    files.retain(|file| !foreign.contains(file) && file != STAGE_JSON);
    let aside = match aside {
        Some(aside) => aside,
        None => first_free(output)?,
    };
    write_stage_json(output, origin, foreign, Some(&aside))?;
    let place = atomic::parent(&fs_err::canonicalize(output)?).join(&aside);
    // First of all the mark of a complete stage; what is aside is complete, too, once all of it is there.
    files.sort_by_key(|file| file != RUN_JSON);
    for file in &files {
        let target = place.join(file);
        fs_err::create_dir_all(atomic::parent(&target))?;
        fs_err::rename(output.join(file), target)?;
    }
    if !files.is_empty() {
        tracing::info!(place = %place.display(), "what was there was set aside");
    }
    remove_empty_dirs(output)
}

/// The first `NAME.old-N` beside a directory that is not taken.
fn first_free(output: &Path) -> Result<String, Error> {
    let output = fs_err::canonicalize(output)?;
    let name = output.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let free = (1u32..).map(|n| format!("{name}.old-{n}"));
    let mut free = free.filter(|name| !atomic::parent(&output).join(name).exists());
    Ok(free.next().expect("there are more numbers than directories"))
}

/// Regular files under `dir` that a stage may have made, relative to it; hidden files, logs and nested stages are not among them.
fn own_files(dir: &Path, prefix: &str, files: &mut Vec<String>) -> Result<(), Error> {
    for entry in fs_err::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let (relative, kind) = (format!("{prefix}{name}"), entry.file_type()?);
        if kind.is_symlink() {
            tracing::warn!(link = relative, "left alone: a link, which no stage makes");
        } else if kind.is_dir() {
            if !name.starts_with('.') && !is_stage_dir(&entry.path()) {
                own_files(&entry.path(), &format!("{relative}/"), files)?;
            }
        } else if !name.starts_with('.') && !name.ends_with(".log") {
            files.push(relative);
        }
    }
    Ok(())
}

fn remove_empty_dirs(dir: &Path) -> Result<(), Error> {
    for entry in fs_err::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() && !is_stage_dir(&path) {
            remove_empty_dirs(&path)?;
            if fs_err::read_dir(&path)?.next().is_none() {
                fs_err::remove_dir(&path)?;
            }
        }
    }
    Ok(())
}

fn write_stage_json(
    output: &Path,
    origin: &Origin,
    foreign: &[String],
    aside: Option<&str>,
) -> Result<(), Error> {
    let stage = StageJson {
        origin: origin.clone(),
        fingerprint: origin.fingerprint(),
        aside: aside.map(str::to_owned),
        foreign: foreign.to_vec(),
    };
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
    let found = serde_json::from_slice::<Value>(&fs_err::read(path)?);
    Ok(found.map_or(true, |value| KEYS.iter().filter(|key| value.get(*key).is_some()).count() >= 2))
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let bytes = fs_err::read(path)?;
    serde_json::from_slice(&bytes).map_err(|error| {
        let (path, line) = (path.to_owned(), error.line());
        let expected = "what an Arete stage writes".to_owned();
        arete_records::Error::Json { path, line, expected, got: error.to_string() }.into()
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
