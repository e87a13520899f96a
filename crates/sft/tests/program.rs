//! The program itself: killed at any moment it ends with the same bytes; signals, a full disk and bad input leave clear
//! errors and the last checkpoint.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

#[path = "../../training/tests/support/base.rs"]
mod base;
#[path = "../../training/tests/support/program.rs"]
mod support;

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rand_chacha::rand_core::Rng;
use support::{assert_same_files, files, message, model};

/// Sixty short conversations, forty-eight of them to train on.
fn demonstrations(dir: &Path) -> PathBuf {
    let path = dir.join("demonstrations.jsonl");
    let endings = ["with care.", "today.", "in plain words.", "and listen."];
    let lines: Vec<String> = (0..60)
        .map(|i| {
            let split = if i % 5 == 4 { "validation" } else { "train" };
            serde_json::json!({
                "messages": [
                    {"role": "user", "content": format!("Question number {i}?")},
                    {"role": "assistant", "content": format!("I should plan it {}", endings[i % 4])},
                ],
                "split": split,
            })
            .to_string()
        })
        .collect();
    fs_err::write(&path, lines.join("\n")).unwrap();
    path
}

fn arguments(data: &Path, output: &Path) -> Vec<String> {
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let mut arguments = vec!["train".to_owned()];
    for (flag, value) in [
        ("--demonstrations", path(data)),
        ("--model", path(&model())),
        ("--output", path(output)),
        ("--rank", "2".to_owned()),
        ("--epochs", "4".to_owned()),
        ("--batch-size", "6".to_owned()),
        ("--micro-batch-tokens", "100".to_owned()),
        ("--checkpoint-every", "2".to_owned()),
        ("--eval-every", "5".to_owned()),
        ("--dtype", "f32".to_owned()),
        ("--threads", "1".to_owned()),
        ("--select", "best".to_owned()),
    ] {
        arguments.extend([flag.to_owned(), value]);
    }
    arguments
}

fn program(data: &Path, output: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_arete-sft"));
    command.args(arguments(data, output)).stderr(Stdio::piped()).stdout(Stdio::null());
    command
}

fn program_over(base: &Path, data: &Path, output: &Path) -> Command {
    let mut arguments = arguments(data, output);
    let at = arguments.iter().position(|flag| flag == "--model").unwrap() + 1;
    arguments[at] = base.to_str().unwrap().to_owned();
    let mut command = Command::new(env!("CARGO_BIN_EXE_arete-sft"));
    command.args(arguments).stderr(Stdio::piped()).stdout(Stdio::null());
    command
}

fn succeed(data: &Path, output: &Path) {
    let done = program(data, output).output().unwrap();
    assert!(done.status.success(), "{}", message(&done));
}

fn n_lines(path: &Path) -> usize {
    fs_err::read_to_string(path).map_or(0, |text| text.lines().count())
}

/// Starts the program and waits until it has logged `n` lines (or ended).
fn start_until(data: &Path, output: &Path, n: usize) -> std::process::Child {
    let mut child = program(data, output).spawn().unwrap();
    let started = Instant::now();
    while n_lines(&output.join("metrics.jsonl")) < n && child.try_wait().unwrap().is_none() {
        assert!(started.elapsed() < Duration::from_secs(120), "no progress");
        std::thread::sleep(Duration::from_millis(1));
    }
    child
}

/// Three kills; `make torture` kills twenty times.
#[test]
fn torture_by_kills_ends_with_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let data = demonstrations(dir.path());
    let whole = dir.path().join("whole");
    succeed(&data, &whole);
    let n_kills: usize = if std::env::var_os("ARETE_TORTURE").is_some() { 20 } else { 3 };
    let n_lines = n_lines(&whole.join("metrics.jsonl"));
    let mut rng = arete_model::random::stream(11, "kills");
    let killed = dir.path().join("killed");
    let mut n_interrupted = 0;
    for kill in 0..n_kills {
        // Anywhere: while starting, in a step, while a checkpoint is written, while the results are.
        let mut child = start_until(&data, &killed, n_lines * kill / n_kills);
        std::thread::sleep(Duration::from_micros(rng.next_u64() % 30_000));
        child.kill().unwrap();
        n_interrupted += usize::from(child.wait().unwrap().signal() == Some(9));
    }
    assert!(2 * n_interrupted > n_kills, "{n_interrupted} of {n_kills} were killed in time");
    succeed(&data, &killed);
    assert_same_files(&whole, &killed);

    // Nothing left to do.
    let again = program(&data, &killed).output().unwrap();
    assert!(again.status.success() && message(&again).contains("up to date"));
}

#[test]
fn a_signal_ends_it_with_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let data = demonstrations(dir.path());
    let output = dir.path().join("run");
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let child = start_until(&data, &output, 3 + n_lines(&output.join("metrics.jsonl")));
        let pid = child.id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &pid]).status().unwrap().success());
        let done = child.wait_with_output().unwrap();
        assert_eq!(done.status.code(), Some(code), "{}", message(&done));
        assert!(message(&done).contains("interrupted by SIG"), "{}", message(&done));
    }
    succeed(&data, &output);
    let whole = dir.path().join("whole");
    succeed(&data, &whole);
    assert_same_files(&whole, &output);
}

#[test]
fn a_full_disk_leaves_the_last_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let data = demonstrations(dir.path());
    let output = dir.path().join("run");
    let mut child = start_until(&data, &output, 7);
    child.kill().unwrap();
    child.wait().unwrap();
    let before = files(&output);
    assert!(before.keys().any(|name| name.ends_with("MANIFEST.json")));
    // No file may grow beyond 20 blocks of 512 bytes: the checkpoint cannot be written.
    let quoted: Vec<String> =
        arguments(&data, &output).iter().map(|argument| format!("'{argument}'")).collect();
    let script = format!(
        "trap '' XFSZ; ulimit -f 20; exec '{}' {}",
        env!("CARGO_BIN_EXE_arete-sft"),
        quoted.join(" ")
    );
    let full = Command::new("sh").args(["-c", &script]).output().unwrap();
    assert_eq!(full.status.code(), Some(74), "{}", message(&full));
    assert!(message(&full).contains("tensors.safetensors"), "{}", message(&full));
    let after = files(&output);
    for (name, bytes) in before.iter().filter(|(name, _)| name.starts_with("checkpoint-")) {
        assert_eq!(after.get(name), Some(bytes), "{name}");
    }
    succeed(&data, &output);
    let whole = dir.path().join("whole");
    succeed(&data, &whole);
    assert_same_files(&whole, &output);
}

#[test]
fn a_checkpoint_over_another_base_is_not_continued() {
    let dir = tempfile::tempdir().unwrap();
    let data = demonstrations(dir.path());
    let base = base::copied(&model(), dir.path());
    let over_base = |output: &Path| program_over(&base, &data, output);
    let output = dir.path().join("run");
    let mut child = over_base(&output).spawn().unwrap();
    while n_lines(&output.join("metrics.jsonl")) < 7 && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(files(&output).keys().any(|name| name.starts_with("checkpoint-")));
    base::change_a_weight(&base);
    let refused = over_base(&output).output().unwrap();
    let said = message(&refused);
    assert!(!refused.status.success() && said.contains("another input `model`"), "{said}");
    // With the base it was made with, the checkpoint is as good as ever.
    base::change_a_weight(&base);
    let resumed = message(&over_base(&output).output().unwrap());
    assert!(resumed.contains("resuming from checkpoint"), "{resumed}");
    let fresh = dir.path().join("fresh");
    assert!(over_base(&fresh).status().unwrap().success());
    assert_same_files(&fresh, &output);
}

#[test]
fn no_sequence_is_longer_than_the_model_has_positions() {
    let dir = tempfile::tempdir().unwrap();
    let data = demonstrations(dir.path());
    let base = base::copied(&model(), dir.path());
    let config = base.join("config.json");
    let mut settings: serde_json::Value =
        serde_json::from_slice(&fs_err::read(&config).unwrap()).unwrap();
    settings["max_position_embeddings"] = 30.into();
    fs_err::write(&config, settings.to_string()).unwrap();
    let output = dir.path().join("run");
    let done = program_over(&base, &data, &output).output().unwrap();
    let said = message(&done);
    assert!(done.status.success() && said.contains("fewer positions than max_length"), "{said}");
    let record: serde_json::Value =
        serde_json::from_slice(&fs_err::read(output.join("run.json")).unwrap()).unwrap();
    assert_eq!(record["counts"]["truncated"], 60, "{record}");
}

#[test]
fn bad_input_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("run");
    let refuse = |rows: &str, code: i32, expected: &str| {
        let data = dir.path().join("rows.jsonl");
        fs_err::write(&data, rows).unwrap();
        let done = program(&data, &output).output().unwrap();
        assert_eq!(done.status.code(), Some(code), "{}", message(&done));
        assert!(message(&done).contains(expected), "{}", message(&done));
        assert!(!output.join("run.json").exists());
    };
    refuse("", 65, "expected demonstrations to train on, got none (0 rows");
    let validation_only = r#"{"prompt": "a", "completion": "b", "split": "validation"}"#;
    refuse(validation_only, 65, "expected demonstrations to train on, got none (1 rows");
    refuse(r#"{"prompt": "a"}"#, 65, "row 1: completion: expected");
    refuse("{", 65, "rows.jsonl:1: expected one JSON value a line");

    let data = demonstrations(dir.path());
    let missing = Command::new(env!("CARGO_BIN_EXE_arete-sft"))
        .args(["train", "--demonstrations", data.to_str().unwrap()])
        .args(["--output", output.to_str().unwrap()])
        .output()
        .unwrap();
    assert_eq!(missing.status.code(), Some(2));
    assert!(message(&missing).contains("model: expected a model to start from, got none"));
    let recipe = dir.path().join("recipe.toml");
    fs_err::write(&recipe, "[sft]\nlearning_rat = 1.0\n").unwrap();
    let unknown = program(&data, &output).arg("--recipe").arg(&recipe).output().unwrap();
    assert_eq!(unknown.status.code(), Some(65));
    assert!(message(&unknown).contains("did you mean `learning_rate`?"), "{}", message(&unknown));
}
