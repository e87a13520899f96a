//! What the tests of `arete` share: the program, folders with a blank in their name, a finished `arete hello`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use arete_records::hashes::{sha256_file, walk};
use serde_json::Value;

/// Every stage, in order; `reward` writes three directories.
pub(crate) const STAGES: [&str; 9] = [
    "prompts",
    "demonstrations",
    "sft",
    "conversations",
    "preferences",
    "reward",
    "ppo",
    "scoring",
    "report",
];

pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// The program, computing with one thread, away from the repository's folder.
pub(crate) fn arete(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_arete"));
    command.args(words).env("OMP_NUM_THREADS", "1").stdin(Stdio::null());
    command
}

pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

pub(crate) fn ran(output: &Output) -> Ran {
    let [stdout, stderr] =
        [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    Ran { code: output.status.code(), stdout, stderr }
}

pub(crate) fn run(words: &[&str]) -> Ran {
    ran(&arete(words).output().unwrap())
}

#[track_caller]
pub(crate) fn done(words: &[&str]) -> Ran {
    let ran = run(words);
    assert_eq!(ran.code, Some(0), "{words:?}\n{}\n{}", ran.stdout, ran.stderr);
    ran
}

/// An empty folder with a blank in its name, kept for a look after a failure.
pub(crate) fn folder(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("arete pipeline").join(name);
    if dir.exists() {
        fs_err::remove_dir_all(&dir).unwrap();
    }
    fs_err::create_dir_all(&dir).unwrap();
    dir
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A finished `arete hello` that the tests read, and how long it took.
pub(crate) struct Hello {
    pub(crate) dir: PathBuf,
    pub(crate) took: Duration,
    pub(crate) ran: Ran,
}

pub(crate) static HELLO: LazyLock<Hello> = LazyLock::new(|| {
    let dir = folder("hello");
    let started = Instant::now();
    let ran = done(&["hello", "--run", text(&dir)]);
    let took = started.elapsed();
    println!("arete hello: {took:.1?}");
    Hello { dir, took, ran }
});

impl Hello {
    pub(crate) fn recipe(&self) -> PathBuf {
        self.dir.join("inputs/recipe.toml")
    }
}

/// A setup of hello's recipe, and more words.
pub(crate) fn with_recipe<'a>(
    command: &'a str,
    recipe: &'a Path,
    dir: &'a Path,
    more: &[&'a str],
) -> Vec<&'a str> {
    [&[command, "--recipe", text(recipe), "--run", text(dir)][..], more].concat()
}

/// The state of every stage.
#[track_caller]
pub(crate) fn states(recipe: &Path, dir: &Path, more: &[&str]) -> BTreeMap<String, Value> {
    let ran = done(&with_recipe("status", recipe, dir, &[more, &["--json"]].concat()));
    let seen: Vec<Value> = serde_json::from_str(&ran.stdout).unwrap();
    let named = |seen: Value| (seen["stage"].as_str().unwrap().to_owned(), seen);
    seen.into_iter().map(named).collect()
}

/// The stages that are not complete, with their state.
#[track_caller]
pub(crate) fn not_complete(recipe: &Path, dir: &Path, more: &[&str]) -> Vec<(String, String)> {
    let states = states(recipe, dir, more);
    let state = |name: &str| states[name]["state"].as_str().unwrap().to_owned();
    let all = STAGES.map(|name| (name.to_owned(), state(name)));
    all.into_iter().filter(|(_, state)| state != "complete").collect()
}

/// Hashes of a run's results: without times, logs, and what hello writes for itself.
pub(crate) fn results(dir: &Path) -> BTreeMap<String, String> {
    let files = walk(dir, &|_| false).unwrap().into_iter();
    let is_result = |file: &String| {
        !(file.contains("timings.jsonl")
            || file.contains("tfevents")
            || file.starts_with("logs/")
            || file.starts_with("inputs/")
            || file.rsplit('/').next().unwrap().starts_with('.'))
    };
    files
        .filter(is_result)
        .map(|file| (file.clone(), sha256_file(dir.join(&file)).unwrap()))
        .collect()
}

/// Waits until something is true.
#[track_caller]
pub(crate) fn until(what: &str, mut is: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is() {
        assert!(started.elapsed() < Duration::from_secs(300), "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Sends a signal to a process.
pub(crate) fn send(signal: &str, child: &std::process::Child) {
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-s", signal, &pid]).status().unwrap().success());
}

/// Whether no process holds the lock of a stage's directory.
pub(crate) fn ended(stage: &Path) -> bool {
    let lock = fs_err::File::open(stage.join(".lock")).unwrap();
    lock.file().try_lock().is_ok()
}

/// Hashes of tables, tensors and metrics: cards and descriptions name the run's own directory.
pub(crate) fn bytes(dir: &Path) -> BTreeMap<String, String> {
    let mut files = results(dir);
    let endings = [".parquet", ".safetensors", "metrics.jsonl"];
    files.retain(|file, _| endings.iter().any(|ending| file.ends_with(ending)));
    files
}
