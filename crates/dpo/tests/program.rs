//! The program itself: preferences to a policy, kills, signals, and every kind of bad input.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

#[path = "../../training/tests/support/program.rs"]
mod support;

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use arete_records::rows::PreferenceRow;
use arete_records::{Message, parquet};
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

/// A pair of the chain's second turn: what comes before it differs as well.
fn motivation(i: usize) -> PreferenceRow {
    let PreferenceRow { mut chosen, mut rejected, .. } = pair(i);
    for (side, reply) in [(&mut chosen, "It is kind."), (&mut rejected, "It is easy.")] {
        side.push(Message::user("What is the motivation behind the answer?"));
        side.push(Message::assistant(reply));
    }
    PreferenceRow { chosen, rejected, truncated_rejected: false, ..pair(i) }
}

/// `preferences/{action,motivation}/` with 30 and 10 pairs to train on, 10 and 4 to evaluate.
fn preferences(dir: &Path) -> PathBuf {
    let out = dir.join("preferences");
    write_pairs(&out, "action/train", (0..30).map(pair));
    write_pairs(&out, "action/validation", (30..40).map(pair));
    write_pairs(&out, "motivation/train", (0..10).map(motivation));
    write_pairs(&out, "motivation/validation", (30..34).map(motivation));
    out
}

fn write_pairs(preferences: &Path, name: &str, rows: impl Iterator<Item = PreferenceRow>) {
    let path = preferences.join(format!("{name}.parquet"));
    fs_err::create_dir_all(path.parent().unwrap()).unwrap();
    parquet::write(path, &rows.collect::<Vec<_>>()).unwrap();
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn train(preferences: &Path, output: &Path, more: &[&str]) -> Command {
    train_on(&model(), preferences, output, more)
}

fn train_on(model: &Path, preferences: &Path, output: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_arete-dpo"));
    command.args(["train", "--rank", "2", "--batch-size", "5", "--epochs", "3"]);
    command.args(["--learning-rate", "5e-3", "--micro-batch-tokens", "150", "--dtype", "f32"]);
    command.args(["--checkpoint-every", "2", "--threads", "1", "--model", &text(model)]);
    command.args(["--preferences", &text(preferences), "--output", &text(output)]);
    for (flag, value) in [("--beta", "0.5"), ("--eval-every", "4")] {
        if !more.contains(&flag) {
            command.args([flag, value]);
        }
    }
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

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("{key} of {value}"))
}

#[test]
fn preferences_become_a_policy() {
    let dir = tempfile::tempdir().unwrap();
    let preferences = preferences(dir.path());
    let output = dir.path().join("dpo");
    succeed(train(&preferences, &output, &[]));
    let run = json(&output.join("run.json"));
    assert_eq!(run["stage"], "dpo");
    let counts = &run["counts"];
    assert_eq!((&counts["train"], &counts["validation"]), (&40.into(), &14.into()));
    assert_eq!(counts["train_of_aspect"], serde_json::json!({"action": 30, "motivation": 10}));
    assert_eq!(counts["open"], 6); // rows 0, 7, 14, 21, 28 of train, 35 of validation
    assert_eq!(counts["steps"], 24);
    // The merged model is rounded to bf16, as its source is.
    assert!(number(counts, "max_logprob_difference_merged") < 1e-2, "{counts}");

    let lines = lines(&output.join("metrics.jsonl"));
    let first = lines.iter().find(|line| line["step"] == 1).unwrap();
    // B is 0: policy and reference are the same, whatever the labels.
    assert!((number(first, "loss") - std::f64::consts::LN_2).abs() < 1e-6, "{first}");
    assert_eq!(number(first, "rewards/margins"), 0.0);
    let evaluations: Vec<&Value> = lines.iter().filter(|l| l.get("eval_loss").is_some()).collect();
    assert_eq!(evaluations.len(), 6);
    let (early, late) = (evaluations[0], evaluations[5]);
    assert!(number(late, "eval_loss") < number(early, "eval_loss"), "{early} {late}");
    // Labels of 0.8 want a margin of ln 4 and no more, so it need not rise to the end.
    assert!(number(late, "eval_rewards/margins") > 0.0, "{early} {late}");
    for name in ["chosen", "rejected"] {
        assert!(late.get(format!("eval_rewards/{name}")).is_some());
        assert!(late.get(format!("eval_logps/{name}")).is_some());
    }

    let evaluation = json(&output.join("evaluation.json"));
    assert_eq!((&evaluation["split"], &evaluation["n"]), (&"validation".into(), &14.into()));
    assert_eq!(evaluation["accuracy"]["estimate"], late["eval_rewards/accuracies"]);
    assert_eq!(evaluation["aspects"]["motivation"]["n"], 4);
    let margin = number(&evaluation, "mean_margin");
    assert!((margin - number(late, "eval_rewards/margins")).abs() < 1e-12);

    // Nothing left to do.
    assert!(message(&succeed(train(&preferences, &output, &[]))).contains("up to date"));
    // The merged model is the policy, and a base of its own.
    let again = dir.path().join("again");
    succeed(train_on(&output.join("merged"), &preferences, &again, &["--max-steps", "1"]));
}

/// Pairs of one's own, without a stage before: split by their question, columns under other names, what is no pair left out.
#[test]
fn a_file_of_pairs_becomes_a_policy() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("mine.csv");
    let rows = (0..40).map(|i| {
        let ending = ["with care.", "today.", "in plain words.", "and listen."][i % 4];
        format!(
            "Question number {i}?,I would rather ask first {ending},You can steal it {ending}\n"
        )
    });
    let table =
        format!("question,chosen,rejected\n{}Only a question?,,\n", rows.collect::<String>());
    fs_err::write(&file, table).unwrap();
    let output = dir.path().join("dpo");
    let own = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_arete-dpo"));
        command.args([
            "train",
            "--rank",
            "2",
            "--max-steps",
            "2",
            "--dtype",
            "f32",
            "--threads",
            "1",
        ]);
        command.args(["--model", &text(&model()), "--output", &text(&output)]);
        command.args(more).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    };
    let file = text(&file);
    let named = ["--pairs", &file, "--column", "prompt=question"];
    let plan = own(&[&named[..], &["--dry-run"]].concat()).stdout(Stdio::piped()).output().unwrap();
    assert!(plan.status.success(), "{}", message(&plan));
    assert!(!output.exists());
    succeed(own(&named));
    let run = json(&output.join("run.json"));
    let counts = &run["counts"];
    let (train, held_out) = (number(counts, "train"), number(counts, "validation"));
    assert_eq!(train + held_out, 40.0);
    assert!((4.0..=16.0).contains(&held_out), "a fifth, more or less: {held_out}");
    assert_eq!(counts["train_of_aspect"], serde_json::json!({"pairs": train as u64}));
    assert!(run["inputs"]["pairs"].is_string(), "{}", run["inputs"]);
    assert_eq!(number(&json(&output.join("evaluation.json")), "n"), held_out);
    assert!(message(&succeed(own(&named))).contains("up to date"));
    let left_out = fs_err::read_to_string(output.join("left_out.jsonl")).unwrap();
    assert!(left_out.contains("mine.csv:41"), "{left_out}");

    let refuse = |arguments: &[&str], code: i32, expected: &str| {
        let done = own(arguments).output().unwrap();
        assert_eq!(done.status.code(), Some(code), "{}", message(&done));
        assert!(message(&done).contains(expected), "{}", message(&done));
    };
    refuse(&[&named[..], &["--aspects", "action"]].concat(), 2, "none with --pairs");
    refuse(&[&named[..], &["--preferences", "x"]].concat(), 2, "cannot be used with");
    refuse(&[], 2, "--preferences <DIR>");
    refuse(&["--preferences", &file], 65, "--pairs takes a file");
    refuse(&["--pairs", "missing.csv"], 74, "missing.csv: no such file");
}

/// Each of these settings changes what is learned, or what it is learned from.
#[test]
fn settings_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let preferences = preferences(dir.path());
    let adapter = |name: &str, more: &[&str]| {
        let output = dir.path().join(name);
        let arguments = [&["--max-steps", "3", "--eval-every", "0"], more].concat();
        succeed(train(&preferences, &output, &arguments));
        (files(&output).remove("adapter/adapter_model.safetensors").unwrap(), output)
    };
    let mut seen: Vec<(Vec<u8>, &str)> = vec![(adapter("plain", &[]).0, "plain")];
    for (name, more) in [
        ("ipo", vec!["--loss-type", "ipo"]),
        ("norm", vec!["--loss-type", "sigmoid_norm"]),
        ("beta", vec!["--beta", "0.1"]),
        ("smoothing", vec!["--label-smoothing", "0.1"]),
        ("label", vec!["--label", "hard"]),
        ("aspects", vec!["--aspects", "action"]),
        ("length", vec!["--max-length", "30"]),
        ("right", vec!["--max-length", "30", "--over-length", "truncate-right"]),
        ("seed", vec!["--seed", "5"]),
    ] {
        let (bytes, output) = adapter(name, &more);
        for (other, whose) in &seen {
            assert!(&bytes != other, "{name} makes no difference to {whose}");
        }
        if name == "aspects" {
            let counts = &json(&output.join("run.json"))["counts"];
            assert_eq!(counts["train_of_aspect"], serde_json::json!({"action": 30}));
        }
        seen.push((bytes, name));
    }
    // A recipe's table is read, and a flag goes before it.
    let recipe = dir.path().join("recipe.toml");
    fs_err::write(&recipe, "[dpo]\nloss_type = \"ipo\"\naspects = [\"action\", \"motivation\"]\n")
        .unwrap();
    let from_recipe = adapter("recipe", &["--recipe", &text(&recipe)]).0;
    assert!(from_recipe == seen[1].0, "the recipe's loss");
}

#[test]
fn more_steps_go_on_and_the_constitution_is_passed_on() {
    let dir = tempfile::tempdir().unwrap();
    let preferences = preferences(dir.path());
    let own = model().join("../confucian.toml");
    fs_err::copy(&own, preferences.join("constitution.toml")).unwrap();
    let output = dir.path().join("dpo");
    succeed(train(&preferences, &output, &["--max-steps", "4"]));
    let first = json(&output.join("run.json"));
    assert_eq!(first["counts"]["steps"], 4);
    assert!(first["inputs"]["constitution"].is_string());
    assert_eq!(
        fs_err::read(output.join("constitution.toml")).unwrap(),
        fs_err::read(&own).unwrap()
    );
    let n_lines = lines(&output.join("metrics.jsonl")).len();
    succeed(train(&preferences, &output, &["--max-steps", "8"]));
    let second = json(&output.join("run.json"));
    assert_eq!(second["counts"]["steps"], 8);
    assert_eq!(second["counts"]["went_on_from"]["max_steps"], 4, "{second}");
    assert!(lines(&output.join("metrics.jsonl")).len() > n_lines);
    assert_eq!(json(&dir.path().join("dpo.old-1/run.json"))["fingerprint"], first["fingerprint"]);
    // What was set aside on the way is nobody's result: it can be removed.
    for entry in fs_err::read_dir(&output).unwrap() {
        let path = entry.unwrap().path();
        if path.to_string_lossy().contains(".old-") {
            fs_err::remove_dir_all(path).unwrap();
        }
    }
    let again = message(&succeed(train(&preferences, &output, &["--max-steps", "8"])));
    assert!(again.contains("up to date"), "{again}");
    // Fewer begin anew.
    succeed(train(&preferences, &output, &["--max-steps", "2"]));
    let third = json(&output.join("run.json"));
    assert_eq!(third["counts"]["steps"], 2);
    assert!(third["counts"].get("went_on_from").is_none());
}

/// Three kills; `make torture` kills twenty times.
#[test]
fn torture_by_kills_ends_with_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let preferences = preferences(dir.path());
    let more = ["--select", "best"];
    let whole = dir.path().join("whole");
    succeed(train(&preferences, &whole, &more));
    let n_kills: usize = if std::env::var_os("ARETE_TORTURE").is_some() { 20 } else { 3 };
    let n_lines = lines(&whole.join("metrics.jsonl")).len();
    let mut rng = arete_model::random::stream(12, "kills");
    let killed = dir.path().join("killed");
    let mut n_interrupted = 0;
    for kill in 0..n_kills {
        // Anywhere: while starting, in a step, while a checkpoint is written, while the results are.
        let mut child = train(&preferences, &killed, &more).spawn().unwrap();
        wait_for_lines(&mut child, &killed, n_lines * kill / n_kills);
        std::thread::sleep(Duration::from_micros(rng.next_u64() % 30_000));
        child.kill().unwrap();
        n_interrupted += usize::from(child.wait().unwrap().signal() == Some(9));
    }
    assert!(2 * n_interrupted > n_kills, "{n_interrupted} of {n_kills} were killed in time");
    succeed(train(&preferences, &killed, &more));
    assert_same_files(&whole, &killed);
}

fn wait_for_lines(child: &mut std::process::Child, output: &Path, n: usize) {
    let started = Instant::now();
    let metrics = output.join("metrics.jsonl");
    while lines(&metrics).len() < n && child.try_wait().unwrap().is_none() {
        assert!(started.elapsed() < Duration::from_secs(120), "no progress");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_signal_ends_it_with_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let preferences = preferences(dir.path());
    let output = dir.path().join("run");
    let mut child = train(&preferences, &output, &[]).spawn().unwrap();
    wait_for_lines(&mut child, &output, 3);
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-s", "TERM", &pid]).status().unwrap().success());
    let done = child.wait_with_output().unwrap();
    assert_eq!(done.status.code(), Some(143), "{}", message(&done));
    succeed(train(&preferences, &output, &[]));
    let whole = dir.path().join("whole");
    succeed(train(&preferences, &whole, &[]));
    assert_same_files(&whole, &output);
}

#[test]
fn bad_input_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let preferences = preferences(dir.path());
    let output = dir.path().join("run");
    let refuse = |more: &[&str], code: i32, expected: &str| {
        let done = train(&preferences, &output, more).output().unwrap();
        assert_eq!(done.status.code(), Some(code), "{}", message(&done));
        assert!(message(&done).contains(expected), "{}", message(&done));
        assert!(!output.join("run.json").exists());
    };
    refuse(&["--beta", "0"], 2, "beta: expected a number above 0, got 0");
    refuse(
        &["--label-smoothing", "0.5"],
        2,
        "label_smoothing: expected a probability below one half",
    );
    refuse(&["--max-length", "1"], 2, "max_length: expected at least 2");
    refuse(&["--aspects", "courage"], 2, "action, motivation, got courage");
    refuse(&["--min-pairs", "41"], 65, "expected at least 41 pairs to train on, got 40");
    refuse(&["--max-length", "20", "--over-length", "drop"], 65, "40 dropped for their length");
    refuse(&["--loss-type", "hinge"], 2, "sigmoid_norm");
    let empty = dir.path().join("empty");
    fs_err::create_dir_all(&empty).unwrap();
    let none = train(&empty, &output, &[]).output().unwrap();
    assert!(message(&none).contains("<aspect>/train.parquet"), "{}", message(&none));
}
