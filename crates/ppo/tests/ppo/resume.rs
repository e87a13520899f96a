//! Killing the program at any moment changes no byte of the results.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::{prepared, tiny_chat};
use arete_model::random;
use arete_records::hashes::sha256_file;
use arete_stage::run::RunJson;

/// Kills in `make test`; `make torture` asks for more.
fn n_kills() -> usize {
    if std::env::var_os("ARETE_TORTURE").is_some() { 20 } else { 3 }
}

pub(crate) fn start(dir: &Path, output: &str) -> Child {
    start_with(dir, output, &[])
}

/// The same run without a critic.
const RLOO: [&str; 4] = ["--algorithm", "rloo", "--samples-per-prompt", "4"];

fn start_with(dir: &Path, output: &str, flags: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_arete-ppo"))
        .args(["train", "--prompts"])
        .arg(dir.join("prompts"))
        .arg("--rewards")
        .arg(dir.join("reward"))
        .arg("--yardstick")
        .arg(dir.join("reward/action"))
        .arg("--model")
        .arg(tiny_chat())
        .arg("--output")
        .arg(dir.join(output))
        .args(["--iterations", "6", "--rollout-size", "8", "--max-new-tokens", "12", "--rank", "4"])
        .args(["--learning-rate", "2e-3", "--kl-control", "adaptive", "--kl-horizon", "100"])
        .args(["--probe-every", "2", "--probe-prompts", "4", "--stats-samples", "8"])
        .args(["--checkpoint-every", "2", "--device", "cpu", "--threads", "1"])
        .args(flags)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Everything the run made, by content; wall times are no results.
fn sums(output: &Path) -> Vec<(String, String)> {
    let run = RunJson::read(output).unwrap();
    let files: Vec<(String, String)> = run
        .outputs
        .keys()
        .map(|file| (file.clone(), sha256_file(output.join(file)).unwrap()))
        .collect();
    let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
    for file in [
        "adapter/adapter_model.safetensors",
        "merged/model.safetensors",
        "metrics.jsonl",
        "rollouts/iteration-000006.parquet",
    ] {
        assert!(names.contains(&file), "{file}");
    }
    assert!(!names.iter().any(|name| name.contains("partial")), "{names:?}");
    files
}

#[test]
fn torture_by_kills_changes_no_byte() {
    kill_and_compare(&[]);
}

#[test]
fn torture_by_kills_changes_no_byte_without_a_critic() {
    kill_and_compare(&RLOO);
}

fn kill_and_compare(flags: &[&str]) {
    let dir = prepared();
    let dir = dir.path();
    let started = Instant::now();
    assert!(start_with(dir, "whole", flags).wait().unwrap().success());
    let whole_run = started.elapsed();
    let expected = sums(&dir.join("whole"));

    let output = dir.join("killed");
    let mut rng = random::stream(5, "kills");
    let (mut n_killed, mut n_finished) = (0, 0);
    while n_killed < n_kills() {
        let mut child = start_with(dir, "killed", flags);
        // A resumed run has less left than a whole one; one that is through starts again from nothing.
        std::thread::sleep(whole_run.mul_f64(random::uniform(&mut rng)));
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success());
            assert_eq!(sums(&output), expected, "after {n_killed} kills");
            fs_err::remove_dir_all(&output).unwrap();
            n_finished += 1;
            continue;
        }
        child.kill().unwrap(); // SIGKILL
        child.wait().unwrap();
        n_killed += 1;
    }
    assert!(start_with(dir, "killed", flags).wait().unwrap().success());
    assert_eq!(sums(&output), expected, "after {n_killed} kills");
    println!("{n_killed} kills, {} runs with the same bytes", n_finished + 1);
}

/// Killed as soon as the first sequences of the third rollout have ended: with a checkpoint every second iteration,
/// its journal, which is returned, is the only one left.
pub(crate) fn start_and_kill_in_the_third_rollout(dir: &Path, output: &str) -> PathBuf {
    kill_in_the_third_rollout(dir, output, &[])
}

fn kill_in_the_third_rollout(dir: &Path, output: &str, flags: &[&str]) -> PathBuf {
    let journal = dir.join(output).join("rollouts/iteration-000003.partial.jsonl");
    let has_lines = || fs_err::metadata(&journal).is_ok_and(|file| file.len() > 0);
    let mut child = start_with(dir, output, flags);
    while !has_lines() {
        std::thread::sleep(Duration::from_micros(200));
        assert!(child.try_wait().unwrap().is_none(), "it ended before its third rollout began");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    journal
}

#[test]
fn a_half_finished_rollout_is_continued() {
    for flags in [&[][..], &RLOO] {
        continue_a_rollout(flags);
    }
}

fn continue_a_rollout(flags: &[&str]) {
    let dir = prepared();
    let dir = dir.path();
    assert!(start_with(dir, "whole", flags).wait().unwrap().success());
    let journal = kill_in_the_third_rollout(dir, "out", flags);
    // Tokens of the whole lines; the kill may have cut the last.
    let kept: u64 = fs_err::read_to_string(&journal)
        .unwrap()
        .split_inclusive('\n')
        .filter(|line| line.ends_with('\n'))
        .map(|line| {
            let (_, line) = line.split_once(' ').unwrap(); // after its hash
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            let turns = line["turns"].as_array().unwrap();
            turns.iter().map(|turn| turn["token_ids"].as_array().unwrap().len() as u64).sum::<u64>()
        })
        .sum();
    assert!(kept > 0);
    assert!(start_with(dir, "out", flags).wait().unwrap().success());
    assert!(!journal.exists());
    assert_eq!(sums(&dir.join("out")), sums(&dir.join("whole")));
    // What was kept was not sampled again. The killed attempt had not come to log its phases.
    let sampled = |output: &str| -> Vec<u64> {
        arete_records::jsonl::read(dir.join(output).join("timings.jsonl"))
            .unwrap()
            .into_iter()
            .filter(|(_, line)| line["what"] == "sampling" && line["iteration"] == 3)
            .map(|(_, line)| line["n_tokens"].as_u64().unwrap())
            .collect()
    };
    assert_eq!(sampled("out"), [sampled("whole")[0] - kept]);
}

/// Sends SIGINT as soon as a file is there; how the run ended, which on a busy machine may be sooner.
fn interrupt_once_there_is(file: &Path, child: &mut Child) -> Option<i32> {
    while !file.exists() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_micros(200));
    }
    if child.try_wait().unwrap().is_none() {
        // Not waited for yet, so the number is still its own.
        Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    }
    assert!(file.exists(), "it ended before {}", file.display());
    let code = child.wait().unwrap().code();
    assert!(code == Some(130) || code == Some(0), "{code:?}");
    code
}

#[test]
fn a_signal_stops_between_iterations_and_the_same_command_continues() {
    let dir = prepared();
    let dir = dir.path();
    let first = dir.join("out/rollouts/iteration-000001.parquet");
    interrupt_once_there_is(&first, &mut start(dir, "out"));
    assert!(start(dir, "out").wait().unwrap().success());
    assert!(RunJson::read(dir.join("out")).is_ok());
}

#[test]
fn a_signal_within_a_probe_loses_no_iteration() {
    let dir = prepared();
    let dir = dir.path();
    assert!(start(dir, "whole").wait().unwrap().success());
    let out = dir.join("out");
    let probed = |checkpoint: &str| -> serde_json::Value {
        let state = fs_err::read(out.join(checkpoint).join("trainer_state.json")).unwrap();
        serde_json::from_slice::<serde_json::Value>(&state).unwrap()["probed"].clone()
    };
    // After the second iteration's rollout is written, its probe is the next to look for signals; it may be over first.
    for attempt in 1.. {
        let second = out.join("rollouts/iteration-000002.parquet");
        let code = interrupt_once_there_is(&second, &mut start(dir, "out"));
        let checkpoint = "checkpoint-000002";
        if code == Some(130) && out.join(checkpoint).exists() && probed(checkpoint) == 0 {
            break;
        }
        assert!(attempt < 20, "twenty signals and none within a probe");
        fs_err::remove_dir_all(&out).unwrap();
    }
    // Killed after that probe has logged its numbers, before its checkpoint, if the kill comes in time.
    let mut child = start(dir, "out");
    while !out.join("completions/iteration-000002.parquet").exists() {
        std::thread::sleep(Duration::from_micros(200));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(start(dir, "out").wait().unwrap().success());
    assert_eq!(sums(&out), sums(&dir.join("whole")));
}
