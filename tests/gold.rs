//! The gold protocol's script, end to end on the tiny chat model: a gold judge, proxies, policies, the picture; and again, when nothing is
//! left to do.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// Settings for a model of 220 kB.
const RECIPE: &str = r#"
[run]
seed = 3
device = "cpu"
dtype = "f32"
threads = 1

[prompts]
limit = 60
max_chars = 120

[conversations]
max_new_tokens = 12

[reward]
rank = 2
max_steps = 3
batch_size = 8
learning_rate = 5e-3
min_pairs = 8
stats_samples = 0

[yardstick]
rank = 2
max_steps = 3
batch_size = 8
learning_rate = 5e-3

[ppo]
rank = 2
iterations = 2
rollout_size = 4
value_warmup = 0
max_new_tokens = 12
learning_rate = 5e-3
probe_every = 1
probe_prompts = 3
stats_samples = 8

[dpo]
rank = 2
max_steps = 3
batch_size = 4
learning_rate = 5e-3
min_pairs = 8

[scoring]
max_new_tokens = 12
draws = 100
"#;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the repository")
}

fn programs() -> PathBuf {
    let test = std::env::current_exe().expect("the path of this test");
    test.ancestors().nth(2).expect("target/release").to_owned()
}

#[track_caller]
fn done(command: &mut Command) -> Output {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{message}");
    output
}

/// A line of `rows.csv`.
struct Row {
    arm: String,
    at: String,
    prompts: String,
    kl: f64,
    gold: f64,
}

fn rows(path: &Path) -> Vec<Row> {
    let json: Value = serde_json::from_slice(&fs_err::read(path).unwrap()).unwrap();
    let text = |own: &Value| own.as_str().map_or_else(|| own.to_string(), str::to_owned);
    let row = |own: &Value| Row {
        arm: text(&own["arm"]),
        at: text(&own["at"]),
        prompts: text(&own["prompts"]),
        kl: own["kl"].as_f64().unwrap(),
        gold: own["gold"].as_f64().unwrap(),
    };
    json["points"].as_array().unwrap().iter().map(row).collect()
}

#[test]
fn the_gold_protocol_runs_end_to_end_and_is_done_then() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (root, programs) = (repository(), programs());
    let model = root.join("tests/fixtures/tiny-chat");
    fs_err::write(at("recipe.toml"), RECIPE).unwrap();
    done(
        Command::new(programs.join("arete-reward"))
            .args(["train", "--pairs"])
            .arg(root.join("data/virtues/pairs.jsonl"))
            .arg("--model")
            .arg(&model)
            .arg("--recipe")
            .arg(at("recipe.toml"))
            .arg("--output")
            .arg(at("gold judge")),
    );
    let protocol = || {
        let mut command = Command::new("python3");
        command.arg(root.join("scripts/experiments/gold.py")).arg("--programs").arg(&programs);
        for (flag, place) in [("--gold", at("gold judge")), ("--recipe", at("recipe.toml"))] {
            command.arg(flag).arg(place);
        }
        command.arg("--model").arg(&model).arg("--out").arg(at("run"));
        command.arg("--prompts").arg(root.join("data/prompts"));
        let sizes = ["--members", "2", "--samples", "4", "--draws", "2", "--group", "2"];
        command.args(sizes).args(["--min-pairs", "8", "--dtype", "f32", "--threads", "1"]);
        command.args(["--betas", "0.1", "--arms", "ppo", "rloo", "rloo, min"]);
        command
    };
    done(&mut protocol());

    let found = rows(&at("run/gold/gold.json"));
    let arms = |prompts: &str| {
        let mut arms: Vec<&str> =
            found.iter().filter(|row| row.prompts == prompts).map(|row| row.arm.as_str()).collect();
        arms.dedup();
        arms
    };
    let best_of = ["best of n", "best of n, mean", "best of n, mean_minus_std", "best of n, min"];
    assert_eq!(arms("held out"), best_of);
    assert_eq!(arms("validation"), ["ppo", "rloo", "rloo, min"]);
    assert_eq!(arms("test"), ["ppo", "rloo", "rloo, min", "dpo"]);
    // The best of one is any of them; the best of eight took log 8 − 7/8 nats.
    for row in found.iter().filter(|row| row.prompts == "held out") {
        let n: f64 = row.at.parse().unwrap();
        assert!((row.kl - (n.ln() - (n - 1.0) / n)).abs() < 1e-12);
        assert!(n > 1.0 || row.gold.abs() < 1e-9, "{}", row.gold);
    }
    assert!(found.iter().any(|row| row.prompts == "held out" && row.at == "8" && row.gold != 0.0));
    // A path begins at the base, and moves.
    for arm in ["ppo", "rloo", "rloo, min"] {
        let path: Vec<&Row> =
            found.iter().filter(|row| row.arm == arm && row.prompts == "validation").collect();
        assert_eq!((path[0].kl, path[0].gold), (0.0, 0.0), "{arm}");
        assert!(path.len() == 3 && path[2].kl != 0.0, "{arm}");
    }
    assert!(found.iter().all(|row| row.kl.is_finite() && row.gold.is_finite()));
    let table = fs_err::read_to_string(at("run/gold/rows.csv")).unwrap();
    assert!(table.starts_with("arm,seed,at,prompts,kl,sqrt_kl,gold,gold_low,gold_high,proxy,n\n"));
    assert_eq!(table.lines().count(), found.len() + 1);

    let again = done(&mut protocol());
    let log = String::from_utf8_lossy(&again.stderr).into_owned();
    let n_stages = log.lines().filter(|line| line.contains("up to date")).count();
    assert!(n_stages >= 11, "{log}");
    assert!(!log.contains("arete-reward score"), "scores are kept: {log}");
    assert_eq!(fs_err::read_to_string(at("run/gold/rows.csv")).unwrap(), table);

    done(Command::new(programs.join("arete-scoring")).args(["report", "--run"]).arg(at("run")));
    let page = fs_err::read_to_string(at("run/report/report.html")).unwrap();
    assert!(page.contains("Gold protocol") && page.contains("Gained by the gold judge"));
    assert!(at("run/report/charts/gold-proxy.svg").is_file());
}
