//! The program itself: preferences to reward models, scores, kills, signals, a full disk, and every kind of bad input.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

#[path = "../../training/tests/support/base.rs"]
mod base;
#[path = "../../training/tests/support/program.rs"]
mod support;

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use arete_records::rows::{ConversationRow, PreferenceRow, TurnRow};
use arete_records::{Aspect, FinishReason, Message, Split, parquet};
use rand_chacha::rand_core::Rng;
use serde_json::Value;
use support::{assert_same_files, files, message, model};

fn pair(i: usize) -> PreferenceRow {
    let endings = ["with care.", "today.", "in plain words.", "and listen."];
    let side = |text: &str| vec![Message::assistant(format!("{text} {}", endings[i % 4]))];
    PreferenceRow {
        prompt: vec![Message::user(format!("Question number {i}?"))],
        chosen: side("I would rather ask first"),
        rejected: side("You can steal it"),
        score_chosen: 4,
        score_rejected: 1,
        chosen_prob: 0.8,
        prompt_id: format!("{i:016x}"),
        truncated_chosen: false,
        truncated_rejected: i.is_multiple_of(7),
    }
}

/// `preferences/action/` with 30 pairs to train on and 10 to evaluate.
fn preferences(dir: &Path) -> PathBuf {
    let out = dir.join("preferences");
    write_pairs(&out, "train", &(0..30).map(pair).collect::<Vec<_>>());
    write_pairs(&out, "validation", &(30..40).map(pair).collect::<Vec<_>>());
    out
}

fn write_pairs(preferences: &Path, split: &str, rows: &[PreferenceRow]) {
    let dir = preferences.join("action");
    fs_err::create_dir_all(&dir).unwrap();
    parquet::write(dir.join(format!("{split}.parquet")), rows).unwrap();
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn train(preferences: &Path, output: &Path, more: &[&str]) -> Command {
    train_on(&model(), preferences, output, more)
}

fn train_on(model: &Path, preferences: &Path, output: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_arete-reward"));
    command.args(["train", "--aspect", "action", "--rank", "2", "--batch-size", "5"]);
    command.args(["--epochs", "3", "--learning-rate", "5e-3", "--micro-batch-tokens", "150"]);
    command.args(["--checkpoint-every", "2", "--eval-every", "4", "--dtype", "f32"]);
    command.args(["--threads", "1", "--model", &text(model)]);
    command.args(["--preferences", &text(preferences), "--output", &text(output)]);
    command.args(more).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

fn succeed(mut command: Command) -> Output {
    let done = command.output().unwrap();
    assert!(done.status.success(), "{}", message(&done));
    done
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs_err::read(path).unwrap()).unwrap()
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs_err::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn score(model: &Path, adapter: Option<&Path>, input: &Path, more: &[&str]) -> Vec<Value> {
    let output = input.with_extension("scores.jsonl");
    let mut command = Command::new(env!("CARGO_BIN_EXE_arete-reward"));
    command.args(["score", "--dtype", "f32", "--model", &text(model)]);
    command.args(["--input", &text(input), "--output", &text(&output)]).args(more);
    if let Some(adapter) = adapter {
        command.args(["--adapter", &text(adapter)]);
    }
    succeed(command);
    lines(&output)
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("{key} of {value}"))
}

fn answer(text: String, n_tokens: i32) -> TurnRow {
    TurnRow { aspect: Aspect::ACTION, text, finish_reason: FinishReason::Stop, n_tokens }
}

/// `conversations/` with two samples of six validation prompts, one of the tuned model and one of another; the rows.
fn conversations(dir: &Path) -> (PathBuf, Vec<ConversationRow>) {
    let conversations = dir.join("conversations");
    fs_err::create_dir_all(&conversations).unwrap();
    let row = |i: usize, sample: i32, split: Split| {
        let PreferenceRow { prompt, chosen, rejected, prompt_id, .. } = pair(i);
        let reply = if sample == 0 { chosen } else { rejected };
        let text = reply[0].content.clone();
        ConversationRow {
            prompt_id,
            split,
            sample,
            persona: Some(if sample == 0 { "tuned" } else { "original" }.to_owned()),
            messages: [prompt, reply].concat(),
            turns: vec![answer(text, 5)],
            seed: 0,
        }
    };
    let rows: Vec<ConversationRow> = (30..36)
        .flat_map(|i| [row(i, 0, Split::Validation), row(i, 1, Split::Validation)])
        .chain([row(0, 0, Split::Train)])
        .collect();
    parquet::write(conversations.join("conversations.parquet"), &rows).unwrap();
    (conversations, rows)
}

#[test]
fn score_statistics_rest_on_64_replies_of_the_base() {
    let dir = tempfile::tempdir().unwrap();
    let preferences = preferences(dir.path());
    let (conversations, _) = conversations(dir.path());
    let flags = ["--max-steps", "2", "--conversations", &text(&conversations)];
    let run = |output: &str, more: &[&str]| {
        let output = dir.path().join(output);
        let done = succeed(train(&preferences, &output, &[&flags[..], more].concat()));
        (json(&output.join("action/score_stats.json")), message(&done))
    };
    let (stats, log) = run("one", &["--stats-max-new-tokens", "8"]);
    assert!(!log.contains("rest on few replies"), "{log}");
    // Six replies are at hand; the six prompts are asked again, nine or ten times each.
    assert_eq!((&stats["n"], &stats["n_prompts"]), (&64.into(), &6.into()));
    let said = "the base's replies, 58 of them sampled for this (temperature 0.7, at most 8 tokens a turn)";
    assert_eq!(stats["source"], said);
    let (std, error) = (number(&stats, "std"), number(&stats, "standard_error"));
    assert!(error > 0.0 && error < std, "{stats}");
    // The same command, the same statistics.
    assert_eq!(run("two", &["--stats-max-new-tokens", "8"]).0, stats);
    let more = ["--stats-max-new-tokens", "8", "--stats-samples", "100"];
    assert_eq!(run("three", &more).0["n"], 100);
    let (few, log) = run("four", &["--stats-samples", "0"]);
    assert!(log.contains("score statistics rest on few replies"), "{log}");
    assert_eq!(few["n"], 6);

    // What the conversations were sampled with is what further samples are drawn with.
    let record = serde_json::json!({
        "stage": "conversations", "config": {"max_new_tokens": 6, "temperature": 1.25}, "seed": 0, "inputs": {},
        "versions": {}, "device": "cpu", "dtype": "f32", "counts": {}, "fingerprint": "", "outputs": {},
    });
    fs_err::write(conversations.join("run.json"), record.to_string()).unwrap();
    let source = run("five", &[]).0["source"].as_str().unwrap().to_owned();
    assert!(source.ends_with("(temperature 1.25, at most 6 tokens a turn)"), "{source}");
    let mut command = train(&preferences, &dir.path().join("six"), &flags);
    let refused = command.args(["--stats-temperature", "0"]).output().unwrap();
    let message = message(&refused);
    assert!(message.contains("stats_temperature: expected a number above 0, got 0"), "{message}");
}

#[test]
fn preferences_become_a_reward_model_that_scores() {
    let dir = tempfile::tempdir().unwrap();
    let preferences = preferences(dir.path());
    let (conversations, rows) = conversations(dir.path());
    let output = dir.path().join("reward");
    let flags = ["--merge", "--stats-samples", "0", "--conversations", &text(&conversations)];
    succeed(train(&preferences, &output, &flags));

    let action = output.join("action");
    let log = lines(&action.join("metrics.jsonl"));
    assert!(number(&log[16], "loss") < number(&log[0], "loss"), "{log:?}");
    let evaluation = json(&action.join("evaluation.json"));
    assert_eq!((&evaluation["split"], &evaluation["n"]), (&"validation".into(), &10.into()));
    assert_eq!(number(&evaluation["accuracy"], "estimate"), 1.0);
    let stats = json(&action.join("score_stats.json"));
    // Half of the samples are another model's: the statistics are of the one that PPO starts from.
    assert_eq!((&stats["split"], &stats["n"]), (&"validation".into(), &6.into()));
    assert_eq!((&stats["n_prompts"], &stats["source"]), (&6.into(), &"the base's replies".into()));

    // Scores of those conversations: adapter and merged model agree, and have the statistics written.
    let input = dir.path().join("input.jsonl");
    let messages = rows[..12]
        .iter()
        .step_by(2)
        .map(|row| serde_json::json!({"messages": row.messages}).to_string());
    fs_err::write(&input, messages.collect::<Vec<_>>().join("\n")).unwrap();
    let adapter = action.join("adapter");
    let unmerged = score(&model(), Some(&adapter), &input, &[]);
    let scores: Vec<f64> = unmerged.iter().map(|line| number(line, "score")).collect();
    assert!((arete_records::stats::mean(&scores) - number(&stats, "mean")).abs() < 1e-5);
    assert!((arete_records::stats::std(&scores) - number(&stats, "std")).abs() < 1e-5);
    let merged_dir = action.join("merged");
    let merged = score(&merged_dir, None, &input, &["--micro-batch-tokens", "1"]);
    for (a, b) in unmerged.iter().zip(&merged) {
        assert!((number(a, "score") - number(b, "score")).abs() < 1e-4, "{a} {b}");
        assert_eq!(a["n_tokens"], b["n_tokens"]);
    }
    let config = json(&merged_dir.join("config.json"));
    assert_eq!(config["architectures"], serde_json::json!(["LlamaForSequenceClassification"]));
    assert!((number(&config, "score_mean") - number(&stats, "mean")).abs() < 1e-12);
    assert_ne!(config["pad_token_id"], config["eos_token_id"]);
    // How it is to be read: some of these pairs have open ends, as `truncated = "keep"` leaves them.
    let reading = json(&action.join("reading.json"));
    assert_eq!(config["arete_reading"], reading);
    assert_eq!((&reading["cut_reply"], &reading["max_length"]), (&"open".into(), &512.into()));
    assert_eq!((&reading["head"], &reading["cut_side"]), (&"last_token".into(), &"left".into()));

    // The adapter knows its base, and a row keeps the id it is known by.
    let known = dir.path().join("known.jsonl");
    let row = fs_err::read_to_string(&input).unwrap();
    let mut row: Value = serde_json::from_str(row.lines().next().unwrap()).unwrap();
    row["id"] = 7.into();
    fs_err::write(&known, format!("{row}\n")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_arete-reward"));
    command.args(["score", "--dtype", "f32", "--adapter", &text(&adapter), "--output", "-"]);
    command.args(["--input", &text(&known)]);
    let printed: Value = serde_json::from_slice(&succeed(command).stdout).unwrap();
    assert_eq!((&printed["id"], &printed["row"]), (&7.into(), &1.into()));
    assert!((number(&printed, "score") - scores[0]).abs() < 1e-5, "{printed}");

    // Rows of pairs are scored side by side.
    let file = preferences.join("action/validation.parquet");
    let lines = score(&merged_dir, None, &file, &[]);
    assert_eq!(lines.len(), 10);
    assert!(lines.iter().all(|line| number(line, "score_chosen") > number(line, "score_rejected")));
    assert_eq!(lines[0]["prompt_id"], pair(30).prompt_id.as_str());

    // Nothing left to do; another setting starts again.
    let again = succeed(train(&preferences, &output, &flags));
    assert!(message(&again).contains("up to date"));
    let other = succeed(train(&preferences, &output, &["--max-steps", "2"]));
    assert!(message(&other).contains("max_steps"), "{}", message(&other));
    assert!(!merged_dir.exists());
}

/// Starts training and waits until it has logged `n` lines (or ended).
#[test]
fn a_virtue_has_a_reward_model_as_a_turn_has() {
    let dir = tempfile::tempdir().unwrap();
    let preferences = preferences(dir.path());
    let (conversations, _) = conversations(dir.path());
    fs_err::rename(preferences.join("action"), preferences.join("honesty")).unwrap();
    let output = dir.path().join("reward");
    let train_of = |name: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_arete-reward"));
        command.args([
            "train",
            "--aspect",
            name,
            "--rank",
            "2",
            "--max-steps",
            "2",
            "--dtype",
            "f32",
        ]);
        command.args(["--threads", "1", "--stats-samples", "0", "--model", &text(&model())]);
        command.args(["--conversations", &text(&conversations), "--seed", "3"]);
        command.args(["--preferences", &text(&preferences), "--output", &text(&output)]);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        command
    };
    succeed(train_of("all"));
    let run = json(&output.join("honesty/run.json"));
    assert_eq!((&run["stage"], &run["config"]["aspect"]), (&"reward".into(), &"honesty".into()));
    // Its statistics are of the answers in the conversations, as a turn's are.
    let stats = json(&output.join("honesty/score_stats.json"));
    assert_eq!(stats["source"], "the base's replies");
    let refused = train_of("courage").output().unwrap();
    assert_eq!(refused.status.code(), Some(2), "{}", message(&refused));
    let wanted = "a turn of the constitution: action, motivation, consequence; or a set that is there: honesty, got courage";
    assert!(message(&refused).contains(wanted), "{}", message(&refused));
    // Two virtues do not start alike, though their pairs and their seed are the same.
    let copy = |split: &str| {
        let from = preferences.join("honesty").join(split);
        fs_err::create_dir_all(preferences.join("respect")).unwrap();
        fs_err::copy(&from, preferences.join("respect").join(split)).unwrap();
    };
    ["train.parquet", "validation.parquet"].iter().for_each(|split| copy(split));
    succeed(train_of("respect"));
    let head =
        |name: &str| fs_err::read(output.join(name).join("adapter/adapter_model.safetensors"));
    assert_ne!(head("honesty").unwrap(), head("respect").unwrap());
    // What the stage before has not finished is not learned from.
    fs_err::write(preferences.join("stage.json"), "{}").unwrap();
    let refused = train_of("all").output().unwrap();
    assert_eq!(refused.status.code(), Some(2), "{}", message(&refused));
    assert!(message(&refused).contains("a stage that was stopped"), "{}", message(&refused));
}

fn start_until(preferences: &Path, output: &Path, n: usize) -> std::process::Child {
    let mut child = train(preferences, output, &[]).spawn().unwrap();
    let started = Instant::now();
    while lines(&output.join("action/metrics.jsonl")).len() < n
        && child.try_wait().unwrap().is_none()
    {
        assert!(started.elapsed() < Duration::from_secs(120), "no progress");
        std::thread::sleep(Duration::from_millis(1));
    }
    child
}

/// Three kills; `make torture` kills twenty times.
#[test]
fn torture_by_kills_ends_with_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let preferences = preferences(dir.path());
    let (whole, killed) = (dir.path().join("whole"), dir.path().join("killed"));
    succeed(train(&preferences, &whole, &[]));
    let n_kills: usize = if std::env::var_os("ARETE_TORTURE").is_some() { 20 } else { 3 };
    let n_lines = lines(&whole.join("action/metrics.jsonl")).len();
    let mut rng = arete_model::random::stream(11, "kills");
    let mut n_interrupted = 0;
    for kill in 0..n_kills {
        // Anywhere: while starting, in a step, while a checkpoint is written, while the results are.
        let mut child = start_until(&preferences, &killed, n_lines * kill / n_kills);
        std::thread::sleep(Duration::from_micros(rng.next_u64() % 30_000));
        child.kill().unwrap();
        n_interrupted += usize::from(child.wait().unwrap().signal() == Some(9));
    }
    assert!(2 * n_interrupted > n_kills, "{n_interrupted} of {n_kills} were killed in time");
    succeed(train(&preferences, &killed, &[]));
    assert_same_files(&whole, &killed);
}

#[test]
fn a_signal_ends_it_with_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let preferences = preferences(dir.path());
    let output = dir.path().join("reward");
    for (n, signal, code) in [(3, "INT", 130), (8, "TERM", 143)] {
        let child = start_until(&preferences, &output, n);
        let pid = child.id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &pid]).status().unwrap().success());
        let done = child.wait_with_output().unwrap();
        assert_eq!(done.status.code(), Some(code), "{}", message(&done));
    }
    succeed(train(&preferences, &output, &[]));
    let whole = dir.path().join("whole");
    succeed(train(&preferences, &whole, &[]));
    assert_same_files(&whole, &output);
}

/// Kills a run that has a checkpoint; returns its checkpoints.
fn killed_with_a_checkpoint(preferences: &Path, output: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut child = start_until(preferences, output, 7);
    child.kill().unwrap();
    child.wait().unwrap();
    let mut files = files(output);
    files.retain(|name, _| name.contains("/checkpoint-") || name.starts_with("checkpoint-"));
    assert!(files.keys().any(|name| name.ends_with("MANIFEST.json")));
    files
}

#[test]
fn a_full_disk_leaves_the_last_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let preferences = preferences(dir.path());
    let output = dir.path().join("reward");
    let before = killed_with_a_checkpoint(&preferences, &output);
    // No file may grow beyond 20 blocks of 512 bytes: the checkpoint cannot be written.
    let command = train(&preferences, &output, &[]);
    let quoted: Vec<String> =
        command.get_args().map(|argument| format!("'{}'", argument.to_str().unwrap())).collect();
    let program = env!("CARGO_BIN_EXE_arete-reward");
    let script = format!("trap '' XFSZ; ulimit -f 20; exec '{program}' {}", quoted.join(" "));
    let full = Command::new("sh").args(["-c", &script]).output().unwrap();
    assert_eq!(full.status.code(), Some(74), "{}", message(&full));
    assert!(message(&full).contains("tensors.safetensors"), "{}", message(&full));
    let after = files(&output);
    for (name, bytes) in &before {
        assert_eq!(after.get(name), Some(bytes), "{name}");
    }
    succeed(train(&preferences, &output, &[]));
    let whole = dir.path().join("whole");
    succeed(train(&preferences, &whole, &[]));
    assert_same_files(&whole, &output);
}

#[test]
fn a_checkpoint_over_another_base_is_not_continued() {
    let dir = tempfile::tempdir().unwrap();
    let (preferences, base) = (preferences(dir.path()), base::copied(&model(), dir.path()));
    let output = dir.path().join("reward");
    // Interrupted half-way: two of eighteen steps, as if it had been killed there.
    let mut child = train_on(&base, &preferences, &output, &[]).spawn().unwrap();
    let metrics = output.join("action/metrics.jsonl");
    while lines(&metrics).len() < 7 && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(
        files(&output)
            .keys()
            .any(|name| name.contains("/checkpoint-") || name.starts_with("checkpoint-"))
    );
    base::change_a_weight(&base);
    let refused = train_on(&base, &preferences, &output, &[]).output().unwrap();
    let said = message(&refused);
    assert!(!refused.status.success() && said.contains("another input `model`"), "{said}");
    // With the base it was made with, the checkpoint is as good as ever.
    base::change_a_weight(&base);
    let resumed = message(&succeed(train_on(&base, &preferences, &output, &[])));
    assert!(resumed.contains("resuming from checkpoint"), "{resumed}");
    let fresh = dir.path().join("fresh");
    succeed(train_on(&base, &preferences, &fresh, &[]));
    assert_same_files(&fresh, &output);
}

#[test]
fn without_validation_pairs_it_trains_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let preferences = preferences(dir.path());
    write_pairs(&preferences, "validation", &[]);
    let output = dir.path().join("reward");
    let done = succeed(train(&preferences, &output, &["--max-steps", "2"]));
    assert!(message(&done).contains("the run is not evaluated"), "{}", message(&done));
    let action = output.join("action");
    assert!(!action.join("evaluation.json").exists());
    let stats = json(&action.join("score_stats.json"));
    assert_eq!((&stats["split"], &stats["n"]), (&"train".into(), &60.into()));
}

#[test]
fn pairs_in_text_form_train_a_yardstick() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pairs.jsonl");
    let line = |i: usize| {
        let side = |text: &str| format!("\n\nHuman: Question {i}?\n\nAssistant: {text} {i}.");
        serde_json::json!({"chosen": side("I would ask first"), "rejected": side("Steal it")})
    };
    let text_of_file: Vec<String> = (0..60).map(|i| line(i).to_string()).collect();
    fs_err::write(&file, text_of_file.join("\n")).unwrap();
    let train = |output: &str, more: &[&str]| {
        let output = dir.path().join(output);
        let mut command = Command::new(env!("CARGO_BIN_EXE_arete-reward"));
        command.args(["train", "--model", &text(&model()), "--pairs", &text(&file)]);
        command.args(["--output", &text(&output), "--rank", "2", "--epochs", "4"]);
        command.args(["--learning-rate", "5e-3", "--dtype", "f32", "--threads", "1"]).args(more);
        succeed(command);
        (json(&output.join("run.json")), json(&output.join("evaluation.json")))
    };
    let (run, evaluation) = train("yardstick", &[]);
    let (n_train, n_held_out) =
        (number(&run["counts"], "train"), number(&run["counts"], "validation"));
    assert_eq!(n_train + n_held_out, 60.0);
    assert!((5.0..20.0).contains(&n_held_out), "a fifth is held out: {n_held_out}");
    assert_eq!(evaluation["split"], "held-out");
    let reading = json(&dir.path().join("yardstick/reading.json"));
    assert_eq!(reading["cut_reply"], "trim");
    assert_eq!(number(&evaluation["accuracy"], "estimate"), 1.0);
    let (run, _) = train("all", &["--all-pairs", "--max-steps", "1"]);
    assert_eq!(number(&run["counts"], "train"), 60.0);
    // Steps far too large make one score of all: that is said by the stage that knows it.
    let output = dir.path().join("collapsed");
    let mut command = Command::new(env!("CARGO_BIN_EXE_arete-reward"));
    command.args([
        "train",
        "--model",
        &text(&model()),
        "--pairs",
        &text(&file),
        "--max-steps",
        "3",
    ]);
    command.args(["--output", &text(&output), "--rank", "2", "--learning-rate", "1e6"]);
    command.args(["--dtype", "f32", "--threads", "1"]).stderr(Stdio::piped());
    let said = message(&succeed(command));
    assert!(said.contains("every reply has the same score"), "{said}");
    assert_eq!(number(&json(&output.join("score_stats.json")), "std"), 0.0);
    // With labels by the toss of a coin there is nothing to learn.
    let (_, control) = train("control", &["--shuffle-labels"]);
    assert!(number(&control, "mean_margin") < 0.5 * number(&evaluation, "mean_margin"));
}

#[test]
fn f6_a_yardstick_is_trained_in_folds_and_its_card_stands_beside_null_rulers() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pairs.jsonl");
    let side = |i: usize, text: &str| format!("\n\nHuman: Question {i}?\n\nAssistant: {text}");
    // Two pairs a question; the better reply is the longer one.
    let line = |i: usize| {
        let (better, worse) = ("I would ask her first.", "Steal it.");
        serde_json::json!({"chosen": side(i / 2, &format!("{better} {i}")), "rejected": side(i / 2, worse)})
    };
    let lines_of_file: Vec<String> = (0..80).map(|i| line(i).to_string()).collect();
    fs_err::write(&file, lines_of_file.join("\n")).unwrap();
    let output = dir.path().join("yardstick");
    let train = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_arete-reward"));
        command.args(["train", "--model", &text(&model()), "--pairs", &text(&file)]);
        command.args(["--output", &text(&output), "--rank", "2", "--max-steps", "3"]);
        command.args(["--learning-rate", "5e-3", "--dtype", "f32", "--threads", "1"]);
        command.args(["--folds", "3"]).args(more);
        command
    };
    succeed(train(&[]));
    let card = json(&output.join("yardstick.json"));
    let mut held_out = Vec::new();
    for fold in 0..3 {
        let dir = output.join(format!("fold-{fold}"));
        let counts = &json(&dir.join("run.json"))["counts"];
        let own = lines(&dir.join("held_out.jsonl"));
        assert_eq!(number(counts, "train") + number(counts, "validation"), 80.0);
        assert_eq!(number(counts, "validation"), own.len() as f64);
        assert_eq!(json(&dir.join("evaluation.json"))["split"], "held-out");
        // No question of the fold's own is among those it trained on: both pairs of a question are here.
        for held in &own {
            let row = number(held, "row") as usize;
            let question = [arete_records::Message::user(format!("Question {}?", (row - 1) / 2))];
            assert_eq!(arete_records::fold_of(&question, 3), fold);
            held_out.push(row);
        }
        // The bag of words beside it was trained on the other folds' pairs, which all hold "ask".
        let words = json(&dir.join("words.json"));
        assert!(number(&words["weights"], "ask") > 0.0 && number(&words["weights"], "steal") < 0.0);
    }
    held_out.sort_unstable();
    assert_eq!(held_out, (1..=80).collect::<Vec<usize>>(), "every pair is held out once");
    assert_eq!(card["n_pairs"], 80);
    let by_words = &card["bag_of_words"]["cross_fitted"];
    assert_eq!(number(&by_words["accuracy"], "estimate"), 1.0);
    for judge in ["reward_model", "bag_of_words"] {
        let rulers = &card[judge]["cross_fitted"]["null_rulers"];
        assert_eq!(
            (&rulers["best"], &rulers["accuracy"]["longer"]["estimate"]),
            (&"longer".into(), &1.0.into())
        );
        // No side is within a tenth of the other's length.
        assert!(card[judge]["length_matched"].is_null());
    }
    let markdown = fs_err::read_to_string(output.join("yardstick.md")).unwrap();
    assert!(markdown.contains("| bag of words | all | 80 | 100.0 %"), "{markdown}");
    // A second call has nothing to do.
    let before = fs_err::metadata(output.join("yardstick.json")).unwrap().modified().unwrap();
    assert!(message(&succeed(train(&[]))).contains("up to date"));
    let after = fs_err::metadata(output.join("yardstick.json")).unwrap().modified().unwrap();
    assert_eq!(before, after);
    // What would let a fold see its own pairs is refused.
    for flags in [&["--select", "best"][..], &["--all-pairs"]] {
        let refused = train(flags).output().unwrap();
        assert!(!refused.status.success());
        assert!(
            message(&refused).contains("no fold may see its own pairs"),
            "{}",
            message(&refused)
        );
    }
}

#[test]
fn f8_accuracy_is_of_pairs_that_nothing_was_selected_by() {
    let dir = tempfile::tempdir().unwrap();
    let preferences = preferences(dir.path());
    let test: Vec<PreferenceRow> = (36..43).map(pair).collect();
    write_pairs(&preferences, "test", &test);
    let evaluate = |output: &str, flags: &[&str]| {
        let output = dir.path().join(output);
        let steps = ["--max-steps", "4"];
        succeed(train(&preferences, &output, &[&steps, flags].concat()));
        let evaluation = json(&output.join("action/evaluation.json"));
        (evaluation["split"].clone(), number(&evaluation, "n"))
    };
    // Ten validation pairs choose the weights: the seven test pairs say how good they are.
    assert_eq!(evaluate("best", &["--select", "best"]), ("test".into(), 7.0));
    assert_eq!(evaluate("last", &[]), ("validation and test".into(), 17.0));
    fs_err::remove_file(preferences.join("action/test.parquet")).unwrap();
    let (split, n) = evaluate("selected", &["--select", "best"]);
    assert_eq!(
        (split.as_str().unwrap(), n),
        ("validation (the weights were selected on these pairs)", 10.0)
    );
}

#[test]
fn bad_input_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("reward");
    let good: Vec<PreferenceRow> = (0..30).map(pair).collect();
    let refuse = |rows: &[PreferenceRow], flags: &[&str], expected: &str| {
        let preferences = preferences(dir.path());
        write_pairs(&preferences, "train", rows);
        let done = train(&preferences, &output, flags).output().unwrap();
        assert_eq!(done.status.code(), Some(65), "{}", message(&done));
        assert!(message(&done).contains(expected), "{}", message(&done));
        assert!(!output.join("action/run.json").exists());
    };
    refuse(&[], &[], "expected at least 20 pairs to train on, got 0");
    refuse(&good[..19], &[], "expected at least 20 pairs to train on, got 19");
    let mut rows = good.clone();
    rows[3].chosen_prob = f32::NAN;
    refuse(
        &rows,
        &[],
        "train.parquet: row 4: chosen_prob: expected a number within 0 to 1, got NaN",
    );
    let identical: Vec<PreferenceRow> = good
        .iter()
        .map(|row| PreferenceRow {
            rejected: row.chosen.clone(),
            truncated_rejected: false,
            ..row.clone()
        })
        .collect();
    refuse(&identical, &[], "got 0 (0 dropped for their length, 30 identical after cutting)");
    // Cut on the right to the prompt, both sides of every pair are the same.
    let cut = ["--max-length", "10", "--over-length", "truncate-right"];
    refuse(&good, &cut, "got 0 (0 dropped for their length, 30 identical after cutting)");
    let dropped = ["--max-length", "10", "--over-length", "drop"];
    refuse(&good, &dropped, "got 0 (30 dropped for their length, 0 identical after cutting)");
    let mut rows = good.clone();
    rows[1].rejected = Vec::new();
    refuse(
        &rows,
        &[],
        "row 2: rejected: expected a conversation that ends with the assistant's reply",
    );

    // A file without the columns.
    let preferences = preferences(dir.path());
    let row = ConversationRow {
        prompt_id: String::new(),
        split: Split::Train,
        sample: 0,
        persona: None,
        messages: Vec::new(),
        turns: vec![answer(String::new(), 0)],
        seed: 0,
    };
    parquet::write(preferences.join("action/train.parquet"), &[row]).unwrap();
    let done = train(&preferences, &output, &[]).output().unwrap();
    assert_eq!(done.status.code(), Some(65));
    assert!(message(&done).contains("column `prompt` is missing"), "{}", message(&done));

    fs_err::remove_file(preferences.join("action/train.parquet")).unwrap();
    let done = train(&preferences, &output, &[]).output().unwrap();
    assert_eq!(done.status.code(), Some(74));
    assert!(message(&done).contains("train.parquet"), "{}", message(&done));
}

#[test]
fn an_adapter_is_not_used_with_another_base() {
    let dir = tempfile::tempdir().unwrap();
    let preferences = preferences(dir.path());
    let output = dir.path().join("reward");
    let base = base::copied(&model(), dir.path());
    succeed(train_on(&base, &preferences, &output, &["--max-steps", "2"]));
    base::change_a_weight(&base);
    let input = dir.path().join("input.jsonl");
    fs_err::write(&input, r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#)
        .unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_arete-reward"));
    command.args(["score", "--dtype", "f32", "--model", &text(&base), "--input", &text(&input)]);
    command.args(["--output", "-", "--adapter", &text(&output.join("action/adapter"))]);
    let done = command.output().unwrap();
    assert!(!done.status.success() && done.stdout.is_empty());
    assert!(message(&done).contains("adapter's base: expected"), "{}", message(&done));
    // Training again with the changed base starts afresh and says why.
    let again = succeed(train_on(&base, &preferences, &output, &["--max-steps", "2"]));
    assert!(message(&again).contains("model"), "{}", message(&again));
}
