//! Rounds and virtues on the tiny chat model: what each round begins with, kills, more rounds than before, refusals; reward models of
//! virtues from the judge's votes to the page.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]
#![expect(clippy::print_stdout, reason = "a test says what it measured")]

#[expect(dead_code, reason = "the other tests of this program use the rest")]
mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;

use arete_records::parquet;
use arete_records::rows::ScoreRow;
use common::{HELLO, arete, bytes, done, ended, folder, run, send, text, until, with_recipe};
use serde_json::Value;

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs_err::read(path).unwrap()).unwrap()
}

/// What `arete status` says of every step that is in.
#[track_caller]
fn steps(recipe: &Path, dir: &Path, more: &[&str]) -> Vec<(String, String)> {
    let ran = done(&with_recipe("status", recipe, dir, &[more, &["--json"]].concat()));
    let seen: Vec<Value> = serde_json::from_str(&ran.stdout).unwrap();
    let label = |own: &Value| match own["round"].as_u64() {
        Some(round) => format!("round-{round}/{}", own["stage"].as_str().unwrap()),
        None => own["stage"].as_str().unwrap().to_owned(),
    };
    let step = |own: &Value| (label(own), own["state"].as_str().unwrap().to_owned());
    seen.iter().map(step).filter(|(_, state)| state != "left_out").collect()
}

#[test]
fn each_round_begins_with_what_the_one_before_tuned() {
    let dir = folder("rounds").join("my run");
    let recipe = HELLO.recipe();
    let words = with_recipe("run", &recipe, &dir, &["--rounds", "2"]);

    // Stopped in the second round, it goes on there; status needs no flag to know of the rounds.
    let mut child = arete(&words).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let second = dir.join("round-2/ppo");
    until("PPO of the second round", || second.join("metrics.jsonl").exists());
    send("TERM", &child);
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert!(ended(&second));
    let seen: BTreeMap<String, String> = steps(&recipe, &dir, &[]).into_iter().collect();
    assert_eq!(seen["round-1/ppo"], "complete");
    assert_eq!(seen["round-2/reward"], "complete");
    assert_eq!(seen["round-2/ppo"], "half_done", "{seen:?}");
    assert_eq!(seen["scoring"], "missing");
    assert!(!seen.contains_key("round-2/sft") && !seen.contains_key("round-2/prompts"));
    done(&words);
    assert!(steps(&recipe, &dir, &[]).iter().all(|(_, state)| state == "complete"));

    // The first is the run that there would have been without rounds.
    let stages = ["sft", "conversations", "preferences", "reward", "ppo"];
    for stage in stages {
        let own = bytes(&dir.join("round-1").join(stage));
        assert!(!own.is_empty());
        assert_eq!(own, bytes(&HELLO.dir.join(stage)), "{stage}");
    }
    // The second stands on its policy: another base for its reward models and its own policy, other samples.
    let base = |file: &str| {
        let meta = json(&dir.join(file).join("adapter/arete_adapter.json"));
        meta["base_sha256"].as_str().unwrap().to_owned()
    };
    let (first, second) = (base("round-1/ppo"), base("round-2/ppo"));
    assert_ne!(first, second);
    assert_eq!(base("round-2/reward/action"), second);
    let conversations = json(&dir.join("round-2/conversations/run.json"));
    assert_eq!(conversations["seed"], 8, "hello's is 7: no round draws the numbers of another");
    let judge = |round: &str| {
        let run = json(&dir.join(round).join("preferences/run.json"));
        run["inputs"]["judge"].as_str().unwrap().to_owned()
    };
    assert_eq!(judge("round-1"), judge("round-2"), "the fine-tuned model judges in every round");
    assert_ne!(
        bytes(&dir.join("round-1/conversations")),
        bytes(&dir.join("round-2/conversations"))
    );
    // One scoring of all.
    let summary = json(&dir.join("scoring/summary.json"));
    let names: Vec<&str> = summary["models"]
        .as_array()
        .unwrap()
        .iter()
        .map(|model| model["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["original", "sft", "round-1", "final"]);
    let page = fs_err::read_to_string(dir.join("report/report.html")).unwrap();
    assert!(page.contains("all else is of round 2"));
    assert!(page.contains("round-1"));

    // Again: nothing. More of them: only what is new.
    let before = bytes(&dir);
    let again = done(&words);
    let lines: Vec<&str> = again.stderr.lines().skip(1).collect();
    assert!(lines.iter().all(|line| line.ends_with("up to date")), "{}", again.stderr);
    assert_eq!(bytes(&dir), before);
    let plan = done(&with_recipe("run", &recipe, &dir, &["--rounds", "3", "--dry-run"])).stdout;
    for line in plan.lines().skip(1) {
        let is_old = line.contains("round-1/") || line.contains("round-2/");
        assert_eq!(line.ends_with("up to date"), is_old, "{line}");
        assert!(!line.contains("round-3") || line.ends_with("runs"), "{line}");
    }
    let ran = done(&with_recipe("run", &recipe, &dir, &["--rounds", "3"]));
    assert!(ran.stdout.contains("round-2"), "{}", ran.stdout);
    let kept = bytes(&dir.join("round-2"));
    let old: BTreeMap<String, String> = before
        .into_iter()
        .filter_map(|(file, sum)| Some((file.strip_prefix("round-2/")?.to_owned(), sum)))
        .collect();
    assert_eq!(kept, old);
    assert!(dir.join("scoring.old-1/summary.json").is_file(), "the Scores of two rounds are kept");

    // The page of one round, and what may be asked of the newest alone.
    let first = dir.join("round-1");
    let page = done(&["report", "--run", text(&first)]).stdout;
    assert!(Path::new(page.trim()).is_file(), "{page}");
    let plan = ["--rounds", "3", "--from", "ppo", "--dry-run"];
    let plan = done(&with_recipe("run", &recipe, &dir, &plan)).stdout;
    let label = |line: &str| line.split_whitespace().next().unwrap().to_owned();
    let labels: Vec<String> = plan.lines().skip(1).map(label).collect();
    assert_eq!(labels, ["round-3/ppo", "scoring", "report"]);
}

#[test]
fn rounds_that_cannot_be_are_refused() {
    let recipe = HELLO.recipe();
    let dir = folder("no rounds").join("my run");
    let refused = |dir: &Path, words: &[&str], expected: &str| {
        let ran = run(&with_recipe("run", &recipe, dir, words));
        assert_eq!(ran.code, Some(2), "{words:?}: {}", ran.stderr);
        assert!(ran.stderr.contains(expected), "{expected}: {}", ran.stderr);
    };
    refused(&dir, &["--rounds", "0"], "--rounds");
    refused(&dir, &["--rounds", "2", "--set", "ppo.merge=false"], "ppo.merge = true");
    let without = ["--rounds", "2", "--set", "ppo.enabled=false"];
    refused(&dir, &without, "put `ppo` or `dpo` in");
    refused(&HELLO.dir, &["--rounds", "2"], "holds a run without rounds");
    assert!(!dir.exists());
    let sweep = ["--rounds", "2", "--set", "ppo.kl_coef=0.1,0.2"];
    let ran = run(&with_recipe("sweep", &recipe, &dir, &sweep));
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("a sweep has no rounds"), "{}", ran.stderr);
}

/// Names of directories in a directory.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs_err::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    let mut names: Vec<String> = entries
        .filter(|entry| entry.file_type().unwrap().is_dir())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

const VIRTUES: [&str; 5] = ["compassion", "honesty", "humility", "prudence", "respect"];

#[test]
fn reward_models_of_virtues_go_through_the_whole_pipeline() {
    let recipe = HELLO.recipe();
    // Beside those of turns.
    let dir = folder("virtues").join("both");
    let both = ["--set", "preferences.by=both", "--set", "preferences.ties=probability"];
    done(&with_recipe("run", &recipe, &dir, &both));
    let mut all = [&VIRTUES[..], &["action", "motivation", "consequence"]].concat();
    all.sort_unstable();
    assert_eq!(names(&dir.join("reward")), all);
    let metrics = fs_err::read_to_string(dir.join("ppo/metrics.jsonl")).unwrap();
    let scored = |name: &str| metrics.contains(&format!("\"z_{name}\":"));
    assert!(all.iter().all(|name| scored(name)), "{metrics}");
    let summary = json(&dir.join("scoring/summary.json"));
    let standardisation = summary["standardisation"].as_object().unwrap();
    assert_eq!(standardisation.len(), 8);
    let of_honesty = |own: &&Value| own["scope"] == "honesty" && own["scale"] == "standardised";
    let differences = summary["differences"].as_array().unwrap();
    assert_eq!(differences.iter().filter(of_honesty).count(), 3);
    let rows: Vec<ScoreRow> = parquet::read(dir.join("scoring/scores.parquet")).unwrap();
    let n = |name: &str| rows.iter().filter(|row| row.aspect.name() == name).count();
    assert!(n("honesty") > 0 && n("honesty") == n("action"));
    let page = fs_err::read_to_string(dir.join("report/report.html")).unwrap();
    for name in VIRTUES {
        assert!(page.contains(&format!("reward&#x2f;{name}")), "{name}");
    }

    // And alone: nothing but the answers is judged.
    let dir = folder("virtues").join("alone");
    let alone = [
        &["--set", "preferences.by=virtue", "--set", "preferences.ties=probability"][..],
        &["--set", "ppo.weights={honesty=2,respect=0}"],
        &["--set", "scoring.primary=final - sft, honesty, score"],
    ]
    .concat();
    done(&with_recipe("run", &recipe, &dir, &alone));
    assert_eq!(names(&dir.join("reward")), VIRTUES);
    let judged = json(&dir.join("preferences/run.json"));
    assert!(judged["counts"]["honesty"]["pairs"].as_u64().unwrap() > 0);
    assert!(judged["counts"].get("motivation").is_none());
    let summary = json(&dir.join("scoring/summary.json"));
    assert_eq!(summary["primary"]["turn"], "honesty");
    assert!(summary["primary"]["value"].is_number(), "{}", summary["primary"]);
    let alike: Vec<Value> = ["honesty", "respect"]
        .iter()
        .map(|name| json(&dir.join("reward").join(name).join("score_stats.json")))
        .collect();
    assert_ne!(alike[0], alike[1], "two virtues, two signals");
    // What all is standardised by is each reward model's own.
    assert_eq!(summary["standardisation"]["honesty"]["mean"].as_f64(), alike[0]["mean"].as_f64());
    // By construction nobody knows of virtues.
    let refused = [&alone[2..], &["--set", "preferences.by=virtue"]].concat();
    let refused =
        [&refused[..], &["--set", "preferences.method=contrast", "--only", "preferences"]];
    let ran = run(&with_recipe("run", &recipe, &dir, &refused.concat()));
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("knows no virtue"), "{}", ran.stderr);
}

#[test]
fn a_sweep_over_weights_ends_with_a_front() {
    let recipe = HELLO.recipe();
    let dir = folder("front").join("my sweep");
    let weights = "ppo.weights={honesty=1, respect=0}, {honesty=0, respect=1}";
    let fixed = ["--set", "preferences.by=virtue", "--set", "preferences.ties=probability"];
    let words = [&fixed[..], &["--set", "ppo.learning_rate=1e-2", "--set", weights]].concat();
    let ran = done(&with_recipe("sweep", &recipe, &dir, &words));
    let front = json(&dir.join("front/front.json"));
    assert_eq!(front["axes"], serde_json::json!(["honesty", "respect"]));
    let points = front["points"].as_array().unwrap();
    assert_eq!(points.len(), 2);
    let arms = ["ppo.weights=honesty=1+respect=0", "ppo.weights=honesty=0+respect=1"];
    for arm in arms {
        let point = points.iter().find(|point| point["name"] == arm).unwrap();
        // The gain is that of the run's own summary.
        let summary = json(&dir.join(arm).join("scoring/summary.json"));
        let own = summary["differences"].as_array().unwrap().iter().find(|own| {
            own["first"] == "sft"
                && own["last"] == "final"
                && own["scope"] == "respect"
                && own["scale"] == "standardised"
        });
        assert_eq!(point["gains"][1], own.unwrap()["mean"]["interval"]);
        assert!(ran.stdout.contains(arm), "{}", ran.stdout);
        let page = fs_err::read_to_string(dir.join(arm).join("report/report.html")).unwrap();
        assert!(page.contains("Front of honesty and respect"));
        assert!(dir.join(arm).join("report/charts/front.svg").is_file());
    }
    assert!(ran.stdout.contains("beaten in both"), "{}", ran.stdout);

    let runs = arms.map(|arm| dir.join(arm));
    let runs = [("honest", &runs[0]), ("respectful", &runs[1])];
    let runs = runs.map(|(name, run)| format!("{name}={}", run.display()));
    let output = dir.join("again");
    let front_of = |axes: [&str; 2]| {
        let words = ["front", &runs[0], &runs[1], "--axes", axes[0], axes[1], "--output"];
        run(&[&words[..], &[text(&output)]].concat())
    };
    let again = front_of(["honesty", "respect"]);
    assert_eq!(again.code, Some(0), "{}", again.stderr);
    assert_eq!(json(&output.join("front.json"))["points"].as_array().unwrap().len(), 2);
    let refused = front_of(["honesty", "courage"]);
    assert_eq!(refused.code, Some(65), "{}", refused.stderr);
    assert!(refused.stderr.contains("expected scores of courage"), "{}", refused.stderr);
    let refused = front_of(["honesty", "honesty"]);
    assert_eq!(refused.code, Some(2), "{}", refused.stderr);
}
