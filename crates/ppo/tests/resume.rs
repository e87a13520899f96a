//! Killing the program at any moment changes no byte of the results.

mod common;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use arete_records::run::{RunJson, sha256_file};
use common::{tiny_chat, tiny_model, write_prompts, write_rewards};

/// Kills a run; `ARETE_KILLS` asks for more (the torture test).
fn n_kills() -> u64 {
    std::env::var("ARETE_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(3)
}

fn start(dir: &Path, output: &str) -> Child {
    Command::new(env!("CARGO_BIN_EXE_arete-ppo"))
        .args(["train", "--prompts"])
        .arg(dir.join("prompts"))
        .arg("--rewards")
        .arg(dir.join("reward"))
        .arg("--model")
        .arg(tiny_chat())
        .arg("--output")
        .arg(dir.join(output))
        .args(["--iterations", "6", "--rollout-size", "8", "--max-new-tokens", "12", "--rank", "4"])
        .args(["--learning-rate", "2e-3", "--kl-control", "adaptive", "--kl-horizon", "100"])
        .args(["--probe-every", "2", "--probe-prompts", "4", "--stats-samples", "8"])
        .args(["--device", "cpu", "--threads", "1"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn kills_change_no_byte() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    write_prompts(dir);
    write_rewards(dir, &tiny_model());
    let started = std::time::Instant::now();
    assert!(start(dir, "whole").wait().unwrap().success());
    let whole_run = started.elapsed();

    let n_kills = n_kills();
    for kill in 0..n_kills {
        let mut child = start(dir, "killed");
        // Spread over the run, start-up included; a resumed run has less left, so early moments repeat.
        let share = (2 * kill + 1) as f64 / (2 * n_kills) as f64;
        std::thread::sleep(
            whole_run.mul_f64(share.max(0.1) * 0.8) + Duration::from_millis(7 * kill),
        );
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert!(start(dir, "killed").wait().unwrap().success());

    let (whole, killed) = (dir.join("whole"), dir.join("killed"));
    let (a, b) = (RunJson::read(&whole).unwrap(), RunJson::read(&killed).unwrap());
    assert_eq!(a.counts, b.counts);
    assert_eq!(a.outputs.keys().collect::<Vec<_>>(), b.outputs.keys().collect::<Vec<_>>());
    for file in a.outputs.keys() {
        let same =
            sha256_file(whole.join(file)).unwrap() == sha256_file(killed.join(file)).unwrap();
        assert!(same, "{file}");
    }
    for file in ["adapter/adapter_model.safetensors", "merged/model.safetensors", "metrics.jsonl"] {
        assert!(a.outputs.contains_key(file), "{file}");
    }
    assert!(a.outputs.contains_key("rollouts/iteration-000006.parquet"));
}

#[test]
fn a_signal_stops_between_iterations_and_the_same_command_continues() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    write_prompts(dir);
    write_rewards(dir, &tiny_model());
    let mut child = start(dir, "out");
    let first = dir.join("out/rollouts/iteration-000001.parquet");
    while !first.exists() {
        std::thread::sleep(Duration::from_millis(2));
        assert!(
            child.try_wait().unwrap().is_none(),
            "it ended before its first rollout was written"
        );
    }
    let status = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(status.success());
    let code = child.wait().unwrap().code();
    // The last iterations may have been quicker than the signal.
    assert!(code == Some(130) || code == Some(0), "{code:?}");
    assert!(start(dir, "out").wait().unwrap().success());
    assert!(RunJson::read(dir.join("out")).is_ok());
}
