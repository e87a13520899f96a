//! Fuzz targets: every parser that reads what others made, or what a disk may have damaged, as a function of bytes.
//!
//! `make test` runs each over its corpus and over changed inputs that are the same every time (`tests/fuzz.rs`), `make fuzz`
//! for as long as wanted, and `tests/fuzz/` under libFuzzer, which looks for inputs that reach new code. What each promises:
//!
//! - no panic, no abort, nothing that does not end;
//! - what is refused is refused with an error whose exit code says whose fault it is (65 or 2), in a message of some lines;
//! - what is accepted can be written again and gives the same when it is read.
//!
//! An input that broke a promise is kept in `tests/fixtures/fuzz/TARGET/`, where it is tried first.

mod data;
mod model;
mod mutate;
mod own;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use arete_records::Class;
use fs_err as fs;

pub use self::mutate::{Kind, Mutator};

/// Longest message of a refusal, in bytes; inputs have up to 64 KiB.
const MAX_MESSAGE_BYTES: usize = 4096;

/// Longest seed that is taken from the files of other tests.
const MAX_SEED_BYTES: u64 = 64 << 10;

/// One parser.
pub struct Target {
    /// Its name, and that of its folder in the corpus.
    pub name: &'static str,
    /// What it reads.
    pub reads: &'static str,
    /// How its inputs are changed.
    pub kind: Kind,
    /// Files and directories of other tests whose contents are seeds too, below the repository.
    seeds: &'static [&'static str],
    /// Inputs that `make test` makes: fewer of slower ones.
    pub n_quick: u64,
    run: fn(&Place, &[u8]) -> Result<()>,
}

/// A directory that a parser's files are put in.
pub struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    /// An empty one, in memory where the system has a place for that.
    ///
    /// # Errors
    ///
    /// I/O.
    pub fn new() -> Result<Self> {
        let memory = Path::new("/dev/shm");
        let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        Ok(Self { dir: dir? })
    }

    /// The directory.
    fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where a file of a name lies.
    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Puts bytes under a name.
    fn put(&self, name: &str, bytes: &[u8]) -> Result<PathBuf> {
        let path = self.at(name);
        fs::write(&path, bytes)?;
        Ok(path)
    }

    /// Puts a file of the repository there once.
    fn keep(&self, name: &str, from: &str) -> Result<()> {
        let path = self.at(name);
        if !path.exists() {
            fs::copy(repository().join(from), path)?;
        }
        Ok(())
    }

    /// An empty directory below.
    fn fresh(&self, name: &str) -> Result<PathBuf> {
        let path = self.at(name);
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        fs::create_dir(&path)?;
        Ok(path)
    }
}

/// The root of the repository.
#[must_use]
pub fn repository() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// What an input came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was read.
    Accepted,
    /// It was refused, as it should be where it is wrong.
    Refused,
}

/// An accepted input that did not come back the same: a fault of ours, whatever the input is.
#[derive(Debug, thiserror::Error)]
#[error("not the same again: {0}")]
struct NotTheSame(String);

/// Whether what was written and read again is what was read first.
fn same<T: PartialEq + std::fmt::Debug>(what: &str, first: &T, again: &T) -> Result<()> {
    if first == again {
        return Ok(());
    }
    let short = |value: &T| format!("{value:?}").chars().take(400).collect::<String>();
    Err(NotTheSame(format!("{what}: {} and then {}", short(first), short(again))).into())
}

/// Whether a refusal is one: an error of the input's class, in a message of some lines.
fn judge(error: &anyhow::Error) -> Result<()> {
    let text = arete_stage::exit::text_of(error);
    let shown: String = text.chars().take(400).collect();
    ensure!(!error.is::<NotTheSame>(), "{shown}");
    let class = error.chain().find_map(|cause| {
        arete_training::class_of(cause).or_else(|| arete_stage::exit::class_of(cause))
    });
    ensure!(
        matches!(class, Some(Class::Data | Class::Setting)),
        "refused with a failure of class {class:?}, not of the input: {shown}"
    );
    ensure!(text.len() <= MAX_MESSAGE_BYTES, "refused in {} bytes of message: {shown}", text.len());
    Ok(())
}

impl Target {
    /// Tries one input. A panic goes through: whoever calls says which input it was.
    ///
    /// # Errors
    ///
    /// What promise was broken.
    pub fn run(&self, place: &Place, input: &[u8]) -> Result<Outcome> {
        let Err(error) = (self.run)(place, input) else { return Ok(Outcome::Accepted) };
        judge(&error)?;
        Ok(Outcome::Refused)
    }

    /// Everything that inputs are made of: the corpus, and files of other tests.
    ///
    /// # Errors
    ///
    /// I/O; a target without any.
    pub fn seeds(&self) -> Result<Vec<(PathBuf, Vec<u8>)>> {
        let root = repository();
        let mut paths = Vec::new();
        let corpus = root.join("tests/fixtures/fuzz").join(self.name);
        if corpus.is_dir() {
            paths.extend(files(&corpus)?);
        }
        for seed in self.seeds {
            let path = root.join(seed);
            let found = if path.is_dir() { files(&path)? } else { vec![path] };
            for path in found {
                if fs::metadata(&path)?.len() <= MAX_SEED_BYTES {
                    paths.push(path);
                }
            }
        }
        if paths.is_empty() {
            bail!("{}: no seeds", self.name);
        }
        paths.into_iter().map(|path| Ok((path.clone(), fs::read(&path)?))).collect()
    }
}

/// The files right in a directory, by name.
fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Every target.
#[must_use]
pub fn targets() -> Vec<&'static Target> {
    [model::TARGETS, data::TARGETS, own::TARGETS].into_iter().flatten().collect()
}
