//! Inputs checked against what the stage that made them recorded: a bit that flipped on a disk, or a file that was changed
//! by hand, is refused by name rather than used in silence.
//!
//! [`run::begin`](crate::run::begin) checks every input of a stage; programs that are no stage call [`check`] where they
//! open a file.

use std::path::{Path, PathBuf};

use arete_records::hashes::{HashCache, RUN_JSON};

use crate::Error;
use crate::run::RunJson;

/// Directories above an input that are looked into for the mark of the stage that made it.
const MAX_UP: usize = 6;

/// Directories inside an input that may hold stages of their own: `reward/action`, `ppo/final`.
const MAX_DOWN: usize = 3;

/// Checks a file, or every file of a directory, against the `run.json` of the stages that made them. What no stage of ours
/// made passes, and so does what is not there: its reader says what is missing.
///
/// # Errors
///
/// [`Error::ChangedInput`] for a file that is not as its stage left it; [`Error::Records`] if that stage's `run.json` is
/// itself damaged; [`Error::Io`].
pub fn check(path: impl AsRef<Path>) -> Result<(), Error> {
    let path = path.as_ref();
    if !path.exists() {
        return Ok(());
    }
    let mut cache =
        HashCache::load(&made_in(path)?.map_or_else(|| path.to_owned(), |(dir, _)| dir));
    check_with(path, &mut cache)?;
    cache.save();
    Ok(())
}

/// [`check`] with hashes that are remembered elsewhere.
pub(crate) fn check_with(path: &Path, cache: &mut HashCache) -> Result<(), Error> {
    let path = fs_err::canonicalize(path)?;
    if let Some((dir, run)) = made_in(&path)? {
        compare(&path, &dir, &run, cache)?;
    }
    if path.is_dir() { check_inside(&path, MAX_DOWN, cache) } else { Ok(()) }
}

/// Checks the stages that lie in directories below.
fn check_inside(dir: &Path, depth: usize, cache: &mut HashCache) -> Result<(), Error> {
    for entry in fs_err::read_dir(dir)? {
        let entry = entry?;
        let is_hidden = entry.file_name().to_string_lossy().starts_with('.');
        if is_hidden || !entry.file_type()?.is_dir() {
            continue;
        }
        let path = entry.path();
        if let Some(run) = read(&path)? {
            compare(&path, &path, &run, cache)?;
        }
        if depth > 1 {
            check_inside(&path, depth - 1, cache)?;
        }
    }
    Ok(())
}

/// The nearest directory, from `path` upwards, that a stage marked as its own.
fn made_in(path: &Path) -> Result<Option<(PathBuf, RunJson)>, Error> {
    let path = fs_err::canonicalize(path)?;
    let skipped = usize::from(!path.is_dir());
    for dir in path.ancestors().skip(skipped).take(MAX_UP) {
        if let Some(run) = read(dir)? {
            return Ok(Some((dir.to_owned(), run)));
        }
    }
    Ok(None)
}

/// The `run.json` of a directory; none if there is none, or it is another program's.
fn read(dir: &Path) -> Result<Option<RunJson>, Error> {
    let path = dir.join(RUN_JSON);
    match RunJson::read(dir) {
        Ok(run) => Ok(Some(run)),
        Err(Error::Io(_)) if !path.is_file() => Ok(None),
        Err(Error::Records(arete_records::Error::Json { .. })) if !crate::run::was_ours(&path)? => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Compares the files at or below `path` with what the stage in `dir` recorded of them: all of them, if `path` is the record.
fn compare(path: &Path, dir: &Path, run: &RunJson, cache: &mut HashCache) -> Result<(), Error> {
    let is_record = path == dir.join(RUN_JSON);
    for (name, recorded) in &run.outputs {
        let file = dir.join(name);
        if !(is_record || file.starts_with(path)) || !file.is_file() {
            continue;
        }
        let got = cache.sha256_file(&file)?;
        if got != recorded.sha256 {
            return Err(Error::ChangedInput {
                path: file,
                stage: run.stage.clone(),
                dir: dir.to_owned(),
                expected: recorded.sha256.clone(),
                got,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::run::{Completion, StageSpec, Start, begin};

    /// A finished stage with a file, a directory, and a stage nested in it.
    fn finished(dir: &Path) {
        for output in [dir.join("reward"), dir.join("reward/action")] {
            let config = json!({"rank": 8});
            let spec =
                StageSpec { stage: "reward", output: &output, config, seed: 0, inputs: vec![] };
            let Start::Run(run) = begin(spec).unwrap() else { panic!("there is work to do") };
            fs_err::create_dir_all(output.join("adapter")).unwrap();
            fs_err::write(output.join("adapter/weights"), b"weights").unwrap();
            fs_err::write(output.join("stats.json"), b"{}").unwrap();
            run.finish(Completion::default()).unwrap();
        }
    }

    fn reads(input: &Path, output: &Path) -> Result<Start, Error> {
        let inputs = vec![("input".to_owned(), input.to_owned())];
        begin(StageSpec { stage: "ppo", output, config: json!({}), seed: 0, inputs })
    }

    #[test]
    fn every_flipped_bit_of_an_input_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        finished(dir.path());
        let reward = dir.path().join("reward");
        for (file, inputs) in [
            ("adapter/weights", ["adapter/weights", "run.json", ""]),
            ("stats.json", ["stats.json", "", "."]),
            ("action/adapter/weights", ["action/adapter", "action", ""]),
        ] {
            let path = reward.join(file);
            let sound = fs_err::read(&path).unwrap();
            for at in 0..8 * sound.len() {
                let mut bytes = sound.clone();
                bytes[at / 8] ^= 1 << (at % 8);
                fs_err::write(&path, bytes).unwrap();
                for input in inputs {
                    let error = check(reward.join(input)).unwrap_err().to_string();
                    assert!(
                        error.contains(file) && error.contains("not as stage `reward`"),
                        "{error}"
                    );
                    let error = reads(&reward.join(input), &dir.path().join("ppo")).unwrap_err();
                    assert!(matches!(error, Error::ChangedInput { .. }), "{error}");
                }
            }
            fs_err::write(&path, sound).unwrap();
            for input in inputs {
                check(reward.join(input)).unwrap();
            }
        }
    }

    #[test]
    fn every_flipped_bit_of_the_record_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        finished(dir.path());
        let record = dir.path().join("reward/run.json");
        let sound = fs_err::read(&record).unwrap();
        let key = sound.windows(9).rposition(|found| found == b"\"sha256\":").unwrap();
        for at in 0..8 * sound.len() {
            let mut bytes = sound.clone();
            bytes[at / 8] ^= 1 << (at % 8);
            fs_err::write(&record, &bytes).unwrap();
            let outcome = check(dir.path().join("reward/adapter"));
            // White space means the same, whichever it is; and so does a name that nobody asks for.
            let value = |bytes: &[u8]| serde_json::from_slice::<serde_json::Value>(bytes).ok();
            let same = value(&bytes).is_some() && value(&bytes) == value(&sound);
            if !same && !(key..key + 9).contains(&(at / 8)) {
                let error = outcome.unwrap_err().to_string();
                assert!(error.contains("run.json"), "{at}: {error}");
            }
        }
    }

    #[test]
    fn what_others_made_passes() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("prompts.jsonl");
        fs_err::write(&file, "{}").unwrap();
        check(&file).unwrap();
        fs_err::write(dir.path().join("run.json"), r#"{"project": "of another program"}"#).unwrap();
        check(&file).unwrap();
        check(dir.path()).unwrap();
        check(dir.path().join("missing")).unwrap(); // its reader names it
    }
}
