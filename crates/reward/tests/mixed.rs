//! Human pairs beside judged ones in one training.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

#[expect(dead_code, reason = "the tests of the program use the rest")]
#[path = "../../training/tests/support/program.rs"]
mod support;

use std::path::Path;
use std::process::{Command, Output};

use arete_records::rows::PreferenceRow;
use arete_records::{Message, Split, parquet, split_of};
use arete_stage::run::RunJson;
use serde_json::json;
use support::{message, model};

fn pair(i: usize) -> PreferenceRow {
    PreferenceRow {
        prompt: vec![Message::user(format!("Question number {i}?"))],
        chosen: vec![Message::assistant(format!("I would rather ask first, {i}."))],
        rejected: vec![Message::assistant(format!("You can steal it, {i}."))],
        score_chosen: 4,
        score_rejected: 1,
        chosen_prob: 0.8,
        prompt_id: format!("{i:016x}"),
        truncated_chosen: false,
        truncated_rejected: false,
    }
}

fn train(dir: &Path, output: &str, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_arete-reward"));
    command.args([
        "train",
        "--rank",
        "2",
        "--batch-size",
        "10",
        "--max-steps",
        "2",
        "--dtype",
        "f32",
    ]);
    command.args(["--threads", "1", "--model"]).arg(model());
    command.arg("--preferences").arg(dir.join("preferences"));
    command.arg("--output").arg(dir.join(output)).args(more).output().unwrap()
}

#[test]
fn one_bad_row_is_named_and_the_others_are_scored() {
    let dir = tempfile::tempdir().unwrap();
    let own = dir.path().join("preferences/action");
    fs_err::create_dir_all(&own).unwrap();
    let rows: Vec<PreferenceRow> = (0..30).map(pair).collect();
    parquet::write(own.join("train.parquet"), &rows).unwrap();
    let done = train(dir.path(), "reward", &[]);
    assert!(done.status.success(), "{}", message(&done));
    let input = dir.path().join("rows.jsonl");
    let row = |text: &str| {
        let turns =
            json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]);
        json!({"id": text, "messages": turns}).to_string()
    };
    let score = |lines: &[String]| {
        fs_err::write(&input, lines.join("\n")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_arete-reward"));
        command.args(["score", "--dtype", "f32", "--output", "-", "--adapter"]);
        command.arg(dir.path().join("reward/action/adapter")).arg("--input").arg(&input);
        command.output().unwrap()
    };
    let bad = json!({"id": "bad", "messages": 7}).to_string();
    let done = score(&[row("a"), bad.clone(), row("b")]);
    assert!(done.status.success(), "{}", message(&done));
    let lines = String::from_utf8(done.stdout).unwrap();
    let lines: Vec<serde_json::Value> =
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 3);
    assert!(lines[0]["score"].is_f64() && lines[2]["score"].is_f64(), "{lines:?}");
    assert_eq!((&lines[1]["id"], &lines[1]["row"]), (&json!("bad"), &json!(2)));
    assert!(lines[1]["error"].as_str().unwrap().contains("messages"), "{lines:?}");
    // A batch of bad rows never passes.
    let done = score(&[bad.clone(), bad]);
    assert_eq!(done.status.code(), Some(65), "{}", message(&done));
}

#[test]
fn human_pairs_are_mixed_in_by_weight_and_aspect() {
    let dir = tempfile::tempdir().unwrap();
    for aspect in ["action", "motivation"] {
        let own = dir.path().join("preferences").join(aspect);
        fs_err::create_dir_all(&own).unwrap();
        let rows: Vec<PreferenceRow> = (0..30).map(pair).collect();
        parquet::write(own.join("train.parquet"), &rows).unwrap();
    }
    let mut n_train = 0;
    let lines = (0..60).map(|i| {
        let question = format!("How do I say no, case {i}?");
        n_train += usize::from(split_of(&[Message::user(&question)]) == Split::Train);
        json!({"prompt": question, "chosen": "Kindly.", "rejected": "Rudely."}).to_string()
    });
    let text = lines.collect::<Vec<_>>().join("\n");
    let human = dir.path().join("human.jsonl");
    fs_err::write(&human, text).unwrap();
    assert!(n_train > 30, "{n_train}");
    let human = human.to_str().unwrap();
    let counts = |output: &str, more: &[&str]| {
        let done = train(dir.path(), output, more);
        assert!(done.status.success(), "{}", message(&done));
        ["action", "motivation"].map(|aspect| {
            let run = RunJson::read(dir.path().join(output).join(aspect)).unwrap();
            (run.counts["train"].as_u64().unwrap(), run.config.get("pairs_weight").is_some())
        })
    };
    // Without human pairs nothing is recorded of them.
    assert_eq!(counts("judged", &[]), [(30, false), (30, false)]);
    // Pairs that say nothing else speak of the answer: one for each judged pair, as many as the training split has at most.
    assert_eq!(counts("one", &["--pairs", human]), [(60, true), (30, true)]);
    let half = ["--pairs", human, "--pairs-weight", "0.5", "--pairs-aspect", "motivation"];
    assert_eq!(counts("half", &half), [(30, true), (45, true)]);
    let all = ["--pairs", human, "--pairs-weight", "100"];
    assert_eq!(counts("all", &all)[0].0, 30 + n_train as u64);
    let refused = train(dir.path(), "no", &["--pairs", human, "--pairs-aspect", "end"]);
    assert_eq!(refused.status.code(), Some(2), "{}", message(&refused));
    assert!(message(&refused).contains("action, motivation, consequence"), "{}", message(&refused));
    // A reward model of a virtue takes pairs that name it, and none of these do.
    let judged = dir.path().join("preferences");
    fs_err::rename(judged.join("motivation"), judged.join("honesty")).unwrap();
    let refused = train(dir.path(), "virtue", &["--pairs", human, "--aspect", "honesty"]);
    assert_eq!(refused.status.code(), Some(65), "{}", message(&refused));
    assert!(message(&refused).contains("pairs that name their virtue"), "{}", message(&refused));
}
