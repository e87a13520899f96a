//! A stage that is killed and repeated ends with the same bytes; one that is asked to stop, stops.
//!
//! The stage runs in a child process: this test's own program, started again with `STAGE_DIR` set.

#![expect(clippy::unwrap_used, reason = "a test: a failure here is the finding")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use arete_records::rows::PromptRow;
use arete_records::{Message, atomic, parquet, prompt_id, split_of};
use arete_stage::metrics::MetricsWriter;
use arete_stage::run::{Completion, StageSpec, Start, begin};
use arete_stage::{interrupt, timings};

const N_SHARDS: u64 = 24;

/// Not a test by itself: what the child process runs.
#[test]
fn child() {
    if let Some(dir) = std::env::var_os("STAGE_DIR") {
        stage(Path::new(&dir));
    }
    if std::env::var_os("WAIT_FOR_SIGNAL").is_some() {
        interrupt::install().unwrap();
        atomic::write(std::env::var("WAIT_FOR_SIGNAL").unwrap(), b"ready").unwrap();
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(20) {
            if let Err(interrupted) = interrupt::check() {
                std::process::exit(128 + interrupted.signal);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn stage(dir: &Path) {
    let spec = StageSpec {
        stage: "prompts",
        output: &dir.join("out"),
        config: serde_json::json!({"n_shards": N_SHARDS}),
        seed: 1,
        inputs: vec![("input".to_owned(), dir.join("input"))],
    };
    let Start::Run(run) = begin(spec).unwrap() else {
        return;
    };
    let shard = |index: u64| run.output().join(format!("shards/{index:03}.parquet"));
    fs_err::create_dir_all(run.output().join("shards")).unwrap();
    let n_done = (0..N_SHARDS).take_while(|&index| shard(index).exists()).count() as u64;
    // Metrics are logged after the shard: the last line may be missing, never ahead.
    let last_step = n_done.saturating_sub(1);
    let mut metrics = MetricsWriter::open_at(run.output(), Some(last_step)).unwrap();
    for index in last_step..N_SHARDS {
        let rows: Vec<PromptRow> = (0..32)
            .map(|i| {
                let prompt = vec![Message::user(format!("Question {index}.{i}?"))];
                let (prompt_id, split) = (prompt_id(&prompt), split_of(&prompt));
                PromptRow { prompt_id, split, source: "test".to_owned(), prompt }
            })
            .collect();
        parquet::write(shard(index), &rows).unwrap();
        metrics.log(index + 1, &[("n_rows", 32.0)]).unwrap();
        timings::log(run.output(), "shard", 0.0, &[]).unwrap();
    }
    let merged = atomic::AtomicDir::new(run.output().join("merged")).unwrap();
    fs_err::write(merged.path().join("model"), b"weights").unwrap();
    merged.commit().unwrap();
    run.finish(Completion::default()).unwrap();
}

fn start(name: &str, value: &Path) -> std::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child"])
        .env(name, value)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn fixture() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs_err::write(dir.path().join("input"), b"input").unwrap();
    dir
}

/// Every file but wall times.
fn contents(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    fn visit(dir: &Path, base: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) {
        for entry in fs_err::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                visit(&path, base, files);
            } else if name != "timings.jsonl" && name != ".lock" && !name.contains("tfevents") {
                let relative = path.strip_prefix(base).unwrap().to_owned();
                files.insert(relative, fs_err::read(&path).unwrap());
            }
        }
    }
    let mut files = BTreeMap::new();
    visit(dir, dir, &mut files);
    files
}

#[test]
fn a_stage_killed_at_any_time_ends_with_the_same_bytes() {
    let whole = fixture();
    let began = Instant::now();
    assert!(start("STAGE_DIR", whole.path()).wait().unwrap().success());
    let duration = began.elapsed();
    let expected = contents(&whole.path().join("out"));
    assert_eq!(expected.len(), N_SHARDS as usize + 3, "{:?}", expected.keys());

    let killed = fixture();
    let mut n_kills = 0;
    for attempt in 0..100u32 {
        let mut child = start("STAGE_DIR", killed.path());
        // Different moments, the last ones long enough to finish.
        std::thread::sleep(duration * (attempt * 7 % 10) / 20 + duration * attempt / 50);
        child.kill().unwrap(); // fails only if it has been waited for
        let status: ExitStatus = child.wait().unwrap();
        if status.success() {
            break;
        }
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9), "{status}");
        n_kills += 1;
    }
    assert!(start("STAGE_DIR", killed.path()).wait().unwrap().success());
    assert!(n_kills > 0, "no kill came in time");
    assert_eq!(contents(&killed.path().join("out")), expected);
}

#[test]
fn a_signal_asks_the_stage_to_stop() {
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let dir = fixture();
        let ready = dir.path().join("ready");
        let mut child = start("WAIT_FOR_SIGNAL", &ready);
        while !ready.exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
        let kill = Command::new("sh")
            .args(["-c", &format!("kill -{signal} {}", child.id())])
            .status()
            .unwrap();
        assert!(kill.success());
        assert_eq!(child.wait().unwrap().code(), Some(code));
    }
}
