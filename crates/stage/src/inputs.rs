//! Inputs checked against what the stage that made them recorded: a bit that flipped on a disk, or a file that was changed
//! by hand, is refused by name rather than used in silence.
//!
//! [`run::begin`](crate::run::begin) checks every input of a stage; programs that are no stage call [`check`] where they
//! open a file.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use arete_records::Refusal;
use arete_records::hashes::{HashCache, RUN_JSON};

use crate::run::RunJson;
use crate::{Error, interrupt};

/// Directories above an input that are looked into for the mark of the stage that made it.
const MAX_UP: usize = 6;

/// Directories inside an input that may hold stages of their own: `reward/action`, `ppo/final`.
const MAX_DOWN: usize = 3;

/// Most bytes that are taken from a pipe.
const MAX_PIPED_BYTES: u64 = 1 << 30;

/// How often a signal is looked for while a pipe is silent.
const LOOK: Duration = Duration::from_millis(100);

/// Copies of what came through pipes, and what each was given as.
static COPIES: Mutex<Vec<(String, String)>> = Mutex::new(Vec::new());

/// A message in which those copies are called what they were given as.
pub(crate) fn as_given(text: &str) -> String {
    let copies = COPIES.lock().unwrap_or_else(PoisonError::into_inner);
    copies.iter().fold(text.to_owned(), |text, (copy, given)| text.replace(copy, given))
}

/// Data inputs as files: what can be read once only, standard input (`-`) and pipes, is copied, for inputs are hashed first
/// and read afterwards. The copies are gone with this.
#[derive(Debug, Default)]
pub struct Piped {
    copies: Option<tempfile::TempDir>,
    n_copies: usize,
}

impl Piped {
    /// The path to read an input from: its own, or that of its copy.
    ///
    /// # Errors
    ///
    /// A pipe that gives more than a GiB, a full disk.
    pub fn local(&mut self, input: &Path) -> Result<PathBuf, Error> {
        if input == Path::new("-") {
            return self.copied(Path::new("stdin"), || Ok(std::io::stdin()));
        }
        let is_piped = |found: std::fs::Metadata| !found.is_file() && !found.is_dir();
        if input.metadata().is_ok_and(is_piped) {
            let path = input.to_owned();
            return self.copied(input, move || fs_err::File::open(path));
        }
        Ok(input.to_owned())
    }

    /// [`Piped::local`] of several.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn all_local(&mut self, inputs: &[PathBuf]) -> Result<Vec<PathBuf>, Error> {
        inputs.iter().map(|input| self.local(input)).collect()
    }

    fn copied<R: Read>(
        &mut self,
        path: &Path,
        open: impl FnOnce() -> std::io::Result<R> + Send + 'static,
    ) -> Result<PathBuf, Error> {
        let dir = match &mut self.copies {
            Some(dir) => dir,
            None => self.copies.insert(tempfile::tempdir()?),
        };
        let own = dir.path().join(self.n_copies.to_string());
        self.n_copies += 1;
        fs_err::create_dir(&own)?;
        let target = own.join(path.file_name().unwrap_or("input".as_ref()));
        let mut file = fs_err::File::create(&target)?;
        let names = (target.display().to_string(), path.display().to_string());
        COPIES.lock().unwrap_or_else(PoisonError::into_inner).push(names);
        // In a thread of its own: a signal is answered while nobody writes.
        let (sender, copied) = channel();
        std::thread::spawn(move || {
            let copy = |reader: R| std::io::copy(&mut reader.take(MAX_PIPED_BYTES + 1), &mut file);
            let _ = sender.send(open().and_then(copy)); // nobody waits for it after a signal
        });
        let n_bytes = loop {
            match copied.recv_timeout(LOOK) {
                Err(RecvTimeoutError::Timeout) => interrupt::check()?,
                Ok(n_bytes) => break n_bytes?,
                Err(RecvTimeoutError::Disconnected) => {
                    unreachable!("the thread sends before it ends")
                }
            }
        };
        if n_bytes > MAX_PIPED_BYTES {
            let expected = format!("at most {MAX_PIPED_BYTES} bytes from a pipe");
            return Err(
                arete_records::Error::from(Refusal::file(path, "size", expected, "more")).into()
            );
        }
        Ok(target)
    }
}

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
    fn what_a_pipe_gives_is_told_by_its_first_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        std::io::Write::write_all(&mut encoder, b"{\"prompt\": \"May I?\"}\n").unwrap();
        let packed = encoder.finish().unwrap();
        let table = dir.path().join("table.parquet");
        let id = arete_records::prompt_id(&[arete_records::Message::user("May I?")]);
        let row = arete_records::rows::PromptRow {
            prompt_id: id,
            split: arete_records::Split::Train,
            source: "x".to_owned(),
            prompt: vec![arete_records::Message::user("May I?")],
        };
        arete_records::parquet::write(&table, &[row]).unwrap();
        let plain = b"[{\"prompt\": \"May I?\"}]".to_vec();
        for bytes in [packed, fs_err::read(&table).unwrap(), plain] {
            let writer = pipe.clone();
            let writing = std::thread::spawn(move || fs_err::write(writer, bytes).unwrap());
            let mut piped = Piped::default();
            let path = piped.local(&pipe).unwrap();
            writing.join().unwrap();
            let records = arete_records::table::read(path).unwrap();
            assert_eq!(records.len(), 1);
            assert!(records[0].1["prompt"].to_string().contains("May I?"), "{records:?}");
        }
        let writer = pipe.clone();
        let writing = std::thread::spawn(move || fs_err::write(writer, "{broken").unwrap());
        let mut piped = Piped::default();
        let error = arete_records::table::read(piped.local(&pipe).unwrap()).unwrap_err();
        writing.join().unwrap();
        let said = crate::exit::text_of(&error.into());
        assert!(said.starts_with(&format!("error: {}:1: expected one", pipe.display())), "{said}");
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
